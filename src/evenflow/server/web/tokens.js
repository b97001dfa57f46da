// Tokens laid over the text that they made: which characters came from which token, and how likely it was.
//
// The text is the server's. Tokens are matched to it because they need not agree: a token can be part of a character,
// special tokens are not shown, and a stop string cuts the text inside of a token.

import { byId, node } from "./dom.js";

export class Alignment {
	constructor() {
		this.position = 0; // in the text
		this.queue = []; // {text, tokens}: whole characters that wait for their text
		this.open = []; // tokens that are a character only together with the next
		this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
	}

	push(token) {
		this.open.push(token);
		const text = token.bytes ? this.decoder.decode(new Uint8Array(token.bytes), { stream: true }) : token.text;
		if (text !== "") this.close(text);
	}

	close(text) {
		this.queue.push({ text, tokens: this.open });
		this.open = [];
	}

	// The spans that can be told of the text so far; [] for tokens means that none is known to have made it.
	advance(text, isLast) {
		if (isLast) this.close(this.decoder.decode());
		const spans = [];
		while (this.queue.length) {
			const rest = text.slice(this.position);
			if (!rest && !isLast) break;
			const { text: whole, tokens } = this.queue[0];
			// Some tokenizers' first token begins with a space that the text does not have.
			const piece = this.position || rest.startsWith(" ") ? whole : whole.replace(/^ +/, "");
			const isCut = !rest.startsWith(piece) && piece.startsWith(rest);
			if (isCut && !isLast) break; // the rest of it is still to come
			this.queue.shift();
			const part = isCut ? rest : rest.startsWith(piece) ? piece : ""; // cut by a stop string; whole; not shown at all
			if (part) spans.push({ text: part, tokens });
			this.position += part.length;
		}
		if (isLast && this.position < text.length) spans.push({ text: text.slice(this.position), tokens: [] });
		return spans;
	}
}

// One tab stop for all tokens of an answer; the arrow keys walk.
export function tokenSpan({ text, tokens }, isFirst) {
	if (!tokens.length) return node("span", {}, text);
	const span = node("span", { class: `token p${level(tokens)}`, role: "button", tabindex: isFirst ? "0" : "-1" }, text);
	span.tokens = tokens;
	return span;
}

function level(tokens) {
	const probability = Math.exp(Math.min(...tokens.map((token) => token.logprob ?? 0)));
	return [0.9, 0.5, 0.2, 0.05].filter((bound) => probability < bound).length;
}

function percent(logprob) {
	const value = 100 * Math.exp(logprob);
	if (value > 99.95 && value < 100) return ">99.9%";
	if (value < 0.1) return "<0.1%";
	return `${value.toFixed(value < 10 ? 1 : value < 99.5 ? 0 : 1)}%`;
}

// Spaces and line ends as something that can be seen.
const visible = (text) => text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ | $/g, "␣") || "(nothing)";

function tooltipRows(token) {
	const isChosen = ({ text, logprob }) => text === token.text && logprob === token.logprob; // two tokens can read the same
	const rows = token.top.some(isChosen) ? token.top : [...token.top, token];
	return rows.map((row) => {
		const bar = node("i", { class: "bar-fill" });
		bar.style.width = `${Math.round(100 * Math.exp(row.logprob))}%`;
		const kind = isChosen(row) ? "row chosen" : "row";
		return node("div", { class: kind }, node("span", { class: "name" }, visible(row.text)), bar,
			node("span", { class: "value" }, percent(row.logprob)));
	});
}

function show(span) {
	const tooltip = byId("tooltip");
	const blocks = span.tokens.map((token) => node("div", { class: "rows" }, ...tooltipRows(token)));
	if (span.tokens.length > 1) blocks.unshift(node("p", {}, `${span.tokens.length} tokens make this text`));
	tooltip.replaceChildren(...blocks);
	tooltip.hidden = false;
	span.setAttribute("aria-describedby", "tooltip");
	const at = span.getClientRects()[0] ?? span.getBoundingClientRect();
	const { width, height } = tooltip.getBoundingClientRect();
	const left = Math.min(Math.max(8, at.left + at.width / 2 - width / 2), document.documentElement.clientWidth - width - 8);
	const isAbove = at.top > height + 12;
	tooltip.style.left = `${left}px`;
	tooltip.style.top = `${isAbove ? at.top - height - 6 : at.bottom + 6}px`;
}

export function hideTooltip() {
	byId("tooltip").hidden = true;
}

const tokenAt = (target) => (target instanceof Element ? target.closest(".answer .token") : null);

function walk(event) {
	const span = tokenAt(event.target);
	if (!span) return;
	const all = [...span.parentElement.querySelectorAll(".token")];
	const at = all.indexOf(span);
	const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
	if (to === undefined || !all[to]) return;
	event.preventDefault();
	span.tabIndex = -1;
	all[to].tabIndex = 0;
	all[to].focus();
}

// Listens once, for all tokens of the page.
export function listen(root) {
	const showAt = (target) => {
		const span = tokenAt(target);
		if (span) show(span);
		else hideTooltip();
	};
	for (const kind of ["pointerover", "click", "focusin"]) root.addEventListener(kind, (event) => showAt(event.target));
	root.addEventListener("pointerleave", () => showAt(document.activeElement));
	root.addEventListener("focusout", hideTooltip);
	root.addEventListener("keydown", walk);
	document.addEventListener("keydown", (event) => event.key === "Escape" && hideTooltip());
	document.addEventListener("scroll", hideTooltip, { passive: true });
}
