// One answer on the page: its text while it is written, its tokens on demand, what it cost, and what went wrong.
// Owns its element and its record {text, tokens, stats, ending, failure}, which can be stored as it is.

import { button, copyText, node } from "./dom.js";
import { Alignment, tokenSpan } from "./tokens.js";

export const emptyRecord = () => ({ text: "", tokens: [], stats: null, ending: null, failure: null });

const ENDINGS = {
	length: "reached the token limit",
	stopped: "stopped by you",
	interrupted: "interrupted",
};

export class Answer {
	// actions: [{label, run, isShown: (record) => boolean}] beside Copy.
	constructor(record, settings, actions, showsTokens) {
		this.record = record;
		this.settings = settings;
		this.actions = actions;
		this.showsTokens = showsTokens;
		this.body = node("div", { class: "text", role: "group", "aria-label": "Answer" });
		this.footer = node("div", { class: "answer-foot" });
		this.element = node("div", { class: "answer" }, this.body, this.footer);
		this.frame = 0;
		this.restart();
		this.finish();
	}

	// Draws the text anew, with or without its tokens.
	restart() {
		this.alignment = new Alignment();
		this.numAligned = 0;
		this.numShown = 0;
		this.body.replaceChildren();
	}

	setShowsTokens(showsTokens) {
		this.showsTokens = showsTokens;
		this.restart();
		this.draw(!this.isWriting);
	}

	begin() {
		this.isWriting = true;
		this.element.classList.add("writing");
		this.footer.replaceChildren();
	}

	push(text, tokens) {
		this.record.text += text;
		this.record.tokens.push(...tokens);
		this.frame ||= requestAnimationFrame(() => {
			this.frame = 0;
			this.draw(false);
		});
	}

	finish() {
		cancelAnimationFrame(this.frame);
		this.frame = 0;
		this.isWriting = false;
		this.element.classList.remove("writing");
		this.draw(true);
		this.drawFooter();
	}

	draw(isLast) {
		if (this.showsTokens) this.drawTokens(isLast);
		else this.drawText(isLast);
	}

	drawText(isLast) {
		const { text } = this.record;
		if (isLast) {
			this.body.replaceChildren(...blocks(text));
		} else {
			const last = this.body.lastChild;
			if (last instanceof Text) last.appendData(text.slice(this.numShown));
			else this.body.append(text.slice(this.numShown));
		}
		this.numShown = text.length;
	}

	drawTokens(isLast) {
		const { text, tokens } = this.record;
		for (; this.numAligned < tokens.length; this.numAligned++) this.alignment.push(tokens[this.numAligned]);
		for (const span of this.alignment.advance(text, isLast)) {
			this.body.append(tokenSpan(span, this.body.querySelector(".token") === null));
		}
	}

	drawFooter() {
		const { record } = this;
		const isEmpty = !record.text;
		const parts = [];
		if (record.failure) parts.push(this.failure(record.failure));
		else if (isEmpty && record.ending) parts.push(node("p", { class: "hint" }, "The answer is empty."));
		const stats = record.stats ? describe(record) : [];
		const numbers = stats.map((part) => node("span", {}, part));
		const line = node("div", { class: "line" }, node("p", { class: "stats" }, ...numbers));
		const actions = this.actions.filter((action) => action.isShown(record)).map((action) => button(action.label, action.run));
		if (!isEmpty) actions.unshift(copyButton(() => record.text));
		if (actions.length) line.append(node("div", { class: "actions" }, ...actions));
		if (record.ending || record.failure) parts.push(line);
		this.footer.replaceChildren(...parts);
	}

	failure({ message, advice, param }) {
		const box = node("div", { class: "failure", role: "alert" }, node("strong", {}, message), node("p", {}, advice));
		if (param && this.settings.has(param)) box.append(button("Show the setting", () => this.settings.focus(param)));
		return box;
	}
}

function copyButton(text) {
	const copy = button("Copy", async () => {
		copy.textContent = (await copyText(text())) ? "Copied" : "Not copied";
		setTimeout(() => (copy.textContent = "Copy"), 1500);
	});
	return copy;
}

// Fenced code gets a box of its own; the rest is text as it came.
function blocks(text) {
	if (!text) return [];
	const parts = text.split(/^```[^\n`]*\n([\s\S]*?)^```[ \t]*$\n?/m);
	return parts.map((part, i) => (i % 2 ? node("pre", {}, node("code", {}, part)) : part)).filter((part) => part !== "");
}

// The numbers under an answer.
function describe({ stats, ending, failure }) {
	const parts = [];
	if (stats.numTokens) parts.push(`${stats.numTokens} ${stats.numTokens === 1 ? "token" : "tokens"}`);
	if (stats.tokensPerS) parts.push(`${figure(stats.tokensPerS)} tokens/s`);
	if (stats.ttftMs) parts.push(`first after ${milliseconds(stats.ttftMs)}`);
	if (stats.numPromptTokens) parts.push(`prompt ${stats.numPromptTokens}${stats.numCachedTokens ? `, ${stats.numCachedTokens} cached` : ""}`);
	if (ENDINGS[ending] && !failure) parts.push(ENDINGS[ending]);
	return parts;
}

export const figure = (value) => value.toLocaleString("en", { maximumFractionDigits: value < 10 ? 1 : 0 });

export function milliseconds(value) {
	if (value < 10) return `${value.toFixed(1)} ms`;
	return value < 9999.5 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(1)} s`;
}
