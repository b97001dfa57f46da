// Elements and the browser's storage. Text goes in as text nodes only: nothing here or elsewhere parses HTML.

export const byId = (id) => document.getElementById(id);

export const on = (id, kind, listener) => byId(id).addEventListener(kind, listener);

// node("button", { class: "quiet", type: "button", onclick }, "Copy"): names with "on" are listeners.
export function node(tag, attributes = {}, ...children) {
	const element = document.createElement(tag);
	for (const [name, value] of Object.entries(attributes)) {
		if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
		else element.setAttribute(name, value);
	}
	element.append(...children);
	return element;
}

export const button = (label, onclick, kind = "quiet") => node("button", { class: kind, onclick }, label);

// Setting only what differs keeps the layout, and a reader's selection, alone.
export function setText(id, text) {
	const element = byId(id);
	if (element.textContent !== text) element.textContent = text;
}

// A polite word for screen readers. The same word twice is spoken twice.
export function announce(text) {
	byId("announce").replaceChildren(node("span", {}, text));
}

export async function copyText(text) {
	try {
		await navigator.clipboard.writeText(text); // only over https and on localhost
		return true;
	} catch {
		const area = node("textarea", { class: "sr" });
		area.value = text;
		document.body.append(area);
		area.select();
		const copied = document.execCommand("copy");
		area.remove();
		return copied;
	}
}

// localStorage may be switched off, full, or hold what an older page wrote.
export function load(key, isValid) {
	try {
		const value = JSON.parse(localStorage.getItem(`evenflow.${key}`));
		return value !== null && isValid(value) ? value : null;
	} catch {
		return null;
	}
}

export function save(key, value) {
	try {
		localStorage.setItem(`evenflow.${key}`, JSON.stringify(value));
		return true;
	} catch {
		return false;
	}
}
