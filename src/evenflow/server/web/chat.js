// The playground: conversations, raw text, and the run that is under way. One run at a time.

import { Answer, emptyRecord } from "./answer.js";
import { Failure, stream } from "./api.js";
import { announce, button, byId, load, node, on, save, setText } from "./dom.js";
import { hideTooltip } from "./tokens.js";

const NUM_TOP_LOGPROBS = 5;
const TEXT_MAX_TOKENS = 256; // the API's own default for raw text is 16

const DEMO_CHIPS = [
	["chat", "tell me the tale of the wolf and the lamb"],
	["text", "Once upon a time"],
];

const WORDS = {
	chat: { hint: "Enter sends, Shift + Enter starts a line, Esc stops.", placeholder: "Write a message", send: "Send" },
	text: { hint: "Ctrl + Enter continues the text, Esc stops.", placeholder: "Write a beginning", send: "Continue" },
};

export class Playground {
	// onUnreachable: called when the server did not answer.
	constructor(settings, onUnreachable) {
		this.settings = settings;
		this.onUnreachable = onUnreachable;
		this.model = null;
		this.run = null; // {controller, turn}
		this.editing = null; // a turn whose question is in the composer
		const stored = load("playground", isStored) ?? { mode: "chat", showsTokens: false, chat: [], text: [] };
		this.mode = stored.mode;
		this.showsTokens = stored.showsTokens;
		this.turns = { chat: [], text: [] };
		for (const mode of ["chat", "text"]) this.turns[mode] = stored[mode].map((turn) => this.turn(mode, turn));
		this.listen();
		this.setMode(this.mode);
		this.drawShowsTokens();
	}

	listen() {
		on("composer", "submit", (event) => {
			event.preventDefault();
			if (this.run) this.stop();
			else this.send();
		});
		on("prompt", "keydown", (event) => this.key(event));
		on("prompt", "input", grow);
		document.addEventListener("keydown", (event) => {
			if (event.key !== "Escape") return;
			if (this.run) this.stop();
			else if (this.editing) this.edit(null);
		});
		on("mode", "change", (event) => this.setMode(event.target.value));
		on("show-tokens", "change", (event) => {
			this.showsTokens = event.target.checked;
			this.drawShowsTokens();
			this.keep();
		});
		on("clear", "click", () => this.clear());
		window.addEventListener("pagehide", () => this.keep());
	}

	key(event) {
		if (event.key !== "Enter" || event.isComposing) return;
		const isTouch = matchMedia("(pointer: coarse)").matches;
		const sends = this.mode === "chat" && !isTouch ? !event.shiftKey : event.ctrlKey || event.metaKey;
		if (!sends) return;
		event.preventDefault();
		if (!this.run) this.send();
	}

	setModel(model) {
		this.model = model;
		this.drawEmpty();
	}

	setMode(mode) {
		this.stop();
		this.edit(null);
		this.mode = mode;
		document.querySelector(`input[name=mode][value=${mode}]`).checked = true;
		byId("playground").dataset.mode = mode;
		byId("system-field").hidden = mode === "text";
		const words = WORDS[mode];
		setText("prompt-label", words.placeholder);
		setText("composer-hint", words.hint);
		byId("prompt").placeholder = words.placeholder;
		this.draw();
		this.keep();
	}

	drawShowsTokens() {
		byId("show-tokens").checked = this.showsTokens;
		byId("scale").hidden = !this.showsTokens;
		hideTooltip();
		for (const turn of [...this.turns.chat, ...this.turns.text]) turn.answer.setShowsTokens(this.showsTokens);
	}

	// Turns: a question and its answer

	turn(mode, { question, record }) {
		const turn = { mode, question, record };
		const isLast = () => this.turns[mode].at(-1) === turn;
		const actions = [
			{ label: "Keep going", run: () => this.keepGoing(turn), isShown: () => mode === "text" && record.text !== "" },
			{ label: "Edit", run: () => this.edit(turn), isShown: () => mode === "text" },
			{ label: "Try again", run: () => this.answer(turn), isShown: () => mode === "text" || isLast() },
		];
		turn.answer = new Answer(record, this.settings, actions, this.showsTokens);
		const text = node("div", { class: "text" }, question);
		const edit = button("Edit", () => this.edit(turn));
		edit.setAttribute("aria-label", `Edit: ${question.slice(0, 60)}`);
		turn.text = text;
		turn.element = node("article", { class: "turn" }, node("div", { class: "question" }, text, edit), turn.answer.element);
		return turn;
	}

	draw() {
		const turns = this.turns[this.mode];
		const elements = turns.map((turn) => turn.element);
		const shown = [...byId("conversation").children];
		if (elements.length !== shown.length || elements.some((element, i) => element !== shown[i])) {
			byId("conversation").replaceChildren(...elements); // only then: it takes the focus from what is inside
			for (const turn of turns) if (!turn.answer.isWriting) turn.answer.drawFooter();
		}
		byId("clear").disabled = !turns.length;
		this.drawEmpty();
		this.drawSend();
	}

	drawSend() {
		setText("send", this.run ? "Stop" : this.editing ? "Resend" : WORDS[this.mode].send);
		byId("send").classList.toggle("stop", this.run !== null);
	}

	drawEmpty() {
		byId("empty").hidden = this.turns[this.mode].length > 0;
		const isDemo = this.model?.id === "demo";
		setText("greeting", isDemo ? "Shall I tell you a tale?" : "What shall it write?");
		const note = isDemo ? "This small model has read five old books of tales and nothing else." : "";
		const room = this.model?.max_model_len ? `It holds ${this.model.max_model_len.toLocaleString("en")} tokens at a time.` : "";
		setText("greeting-note", [note, room].filter(Boolean).join(" "));
		const chips = isDemo ? DEMO_CHIPS : [];
		byId("chips").replaceChildren(...chips.map(([mode, text]) => button(mode === "text" ? `${text} …` : text, () => this.suggest(mode, text), "chip")));
	}

	suggest(mode, text) {
		if (mode !== this.mode) this.setMode(mode);
		byId("prompt").value = text;
		this.send();
		byId("prompt").focus();
	}

	edit(turn) {
		this.editing?.element.classList.remove("editing");
		const prompt = byId("prompt");
		if (turn) {
			this.stop();
			turn.element.classList.add("editing");
			prompt.value = turn.question;
			prompt.focus();
			announce("Editing. Escape cancels.");
		} else if (this.editing) {
			prompt.value = "";
		}
		this.editing = turn;
		grow();
		this.drawSend();
	}

	clear() {
		this.stop();
		this.edit(null);
		this.turns[this.mode] = [];
		this.draw();
		this.keep();
		announce("Cleared");
		byId("prompt").focus();
	}

	// Runs

	send() {
		const prompt = byId("prompt");
		const question = this.mode === "chat" ? prompt.value.trim() : prompt.value;
		const invalid = this.settings.invalid();
		if (invalid) return this.settings.complain(invalid);
		if (!question) return prompt.focus();
		const { editing } = this;
		this.edit(null);
		prompt.value = "";
		grow();
		const turns = this.turns[this.mode];
		const kept = editing ? turns.slice(0, turns.indexOf(editing)) : turns;
		const turn = this.turn(this.mode, { question, record: emptyRecord() });
		// A question without an answer would leave two questions in a row, which many chat templates refuse.
		this.turns[this.mode] = [...kept.filter((other) => other.record.text !== ""), turn];
		return this.answer(turn);
	}

	// Raw text: the answer becomes a part of what is continued.
	keepGoing(turn) {
		turn.question += turn.record.text;
		turn.text.textContent = turn.question;
		return this.answer(turn);
	}

	stop() {
		this.run?.controller.abort();
	}

	async answer(turn) {
		this.stop();
		const run = { controller: new AbortController(), turn };
		this.run = run;
		Object.assign(turn.record, emptyRecord());
		if (turn.element.contains(document.activeElement)) byId("send").focus(); // the button pressed goes away
		turn.answer.restart();
		turn.answer.begin();
		this.draw();
		scrollToEnd();
		announce("Writing");
		try {
			await this.write(turn, run.controller.signal);
		} catch (error) {
			this.note(error, turn.record);
		}
		this.finish(run);
	}

	async write(turn, signal) {
		const { record } = turn;
		const clock = new Clock();
		const [path, body] = turn.mode === "chat" ? this.chatBody(turn) : this.textBody(turn);
		record.ending = "interrupted"; // until another is known
		try {
			for await (const { text, tokens, finishReason, usage } of stream(path, body, signal)) {
				if (text || tokens.length) clock.tick();
				const follows = isAtEnd();
				turn.answer.push(text, tokens);
				if (follows) scrollToEnd();
				record.ending = finishReason ?? record.ending;
				clock.usage = usage ?? clock.usage;
			}
		} finally {
			record.stats = clock.stats(record.tokens.length);
		}
	}

	note(error, record) {
		if (error.name === "AbortError") {
			record.ending = "stopped";
		} else if (error instanceof Failure) {
			record.failure = { message: error.message, advice: error.advice, param: error.param };
			if (error.isUnreachable) this.onUnreachable();
		} else {
			record.failure = { message: "The page could not read the answer.", advice: "Reload the page and try again.", param: null };
			console.error(error);
		}
	}

	finish(run) {
		const { record, answer } = run.turn;
		answer.finish();
		if (this.run === run) {
			this.run = null;
			announce(record.failure ? `${record.failure.message} ${record.failure.advice}` : record.text || "The answer is empty");
		}
		this.draw();
		this.keep();
	}

	chatBody(turn) {
		const { system } = this.settings;
		const messages = system ? [{ role: "system", content: system }] : [];
		for (const earlier of this.turns.chat) {
			messages.push({ role: "user", content: earlier.question });
			if (earlier === turn) break;
			messages.push({ role: "assistant", content: earlier.record.text });
		}
		const body = { model: this.model?.id, messages, logprobs: true, top_logprobs: NUM_TOP_LOGPROBS };
		return ["/v1/chat/completions", { ...body, ...this.settings.parameters() }];
	}

	textBody(turn) {
		const body = { model: this.model?.id, prompt: turn.question, logprobs: NUM_TOP_LOGPROBS, max_tokens: TEXT_MAX_TOKENS };
		return ["/v1/completions", { ...body, ...this.settings.parameters() }];
	}

	// The browser's storage has a few megabytes. Tokens are the most of it, so they go first.
	keep() {
		const { mode, showsTokens, turns } = this;
		const all = (less) => {
			const shape = ({ question, record }) => ({ question, record: { ...record, ...less } });
			return { mode, showsTokens, chat: turns.chat.map(shape), text: turns.text.map(shape) };
		};
		return save("playground", all({})) || save("playground", all({ tokens: [] }));
	}
}

class Clock {
	constructor() {
		this.startMs = performance.now();
		this.firstMs = this.lastMs = null;
		this.usage = null;
	}

	tick() {
		this.lastMs = performance.now();
		this.firstMs ??= this.lastMs;
	}

	// numSeen: tokens that arrived, where the server did not come to say its count.
	stats(numSeen) {
		const numTokens = this.usage?.completion_tokens ?? numSeen;
		const seconds = (this.lastMs - this.firstMs) / 1000;
		return {
			numTokens,
			numPromptTokens: this.usage?.prompt_tokens ?? null,
			numCachedTokens: this.usage?.prompt_tokens_details?.cached_tokens ?? null,
			ttftMs: this.firstMs === null ? null : this.firstMs - this.startMs,
			tokensPerS: numTokens > 1 && seconds > 0 ? (numTokens - 1) / seconds : null,
		};
	}
}

function isStored(value) {
	const isTurn = ({ question, record }) => typeof question === "string" && typeof record.text === "string" && Array.isArray(record.tokens);
	return value.mode in WORDS && value.chat.every(isTurn) && value.text.every(isTurn);
}

function grow() {
	const prompt = byId("prompt");
	prompt.style.height = "auto";
	prompt.style.height = `${prompt.scrollHeight + 2}px`;
}

const isAtEnd = () => window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 80;

const scrollToEnd = () => window.scrollTo({ top: document.documentElement.scrollHeight, behavior: "instant" });
