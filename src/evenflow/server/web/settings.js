// The settings of the playground: what a request says beside its text. An empty field is left out of the request.

import { byId, load, node, on, save } from "./dom.js";

const MAX_STOPS = 4;

// name, label, least, most, step, what it does
const NUMBERS = [
	["temperature", "Temperature", 0, 2, 0.05, "0: always the likeliest. Higher: bolder."],
	["top_p", "Top p", 0.01, 1, 0.01, "The likeliest, with this share together."],
	["top_k", "Top k", 0, 1000, 1, "The k likeliest tokens; 0 is all."],
	["min_p", "Min p", 0, 1, 0.01, "At least this share of the likeliest."],
	["max_tokens", "Max tokens", 1, 131072, 1, "The longest answer."],
	["seed", "Seed", 0, 2 ** 53 - 1, 1, "Same seed and settings, same answer."],
];

export class Settings {
	constructor() {
		byId("parameters").append(...NUMBERS.map(numberField), stopField());
		const stored = load("settings", (value) => typeof value === "object") ?? {};
		for (const input of this.inputs()) {
			if (typeof stored[input.id] === "string") input.value = stored[input.id];
			input.addEventListener("input", () => this.keep());
		}
		on("settings-reset", "click", () => this.reset());
		on("settings-close", "click", () => this.setOpen(false));
		on("settings-toggle", "click", () => this.setOpen(true));
		on("settings", "keydown", (event) => event.key === "Escape" && this.setOpen(false));
	}

	inputs() {
		return [...byId("settings").querySelectorAll("input, textarea")];
	}

	keep() {
		save("settings", Object.fromEntries(this.inputs().map((input) => [input.id, input.value])));
	}

	reset() {
		for (const input of this.inputs()) input.value = "";
		this.keep();
	}

	get system() {
		return byId("system").value.trim();
	}

	// The first field that cannot be sent as it is, or null. A decimal between two steps can.
	invalid() {
		const isBad = ({ step, validity }) => !validity.valid && !(validity.stepMismatch && Number(step) < 1);
		return this.inputs().find(isBad) ?? null;
	}

	// The browser says by itself what is wrong with the field.
	complain(input) {
		this.setOpen(true);
		input.focus();
		input.reportValidity();
	}

	// On a narrow page the settings are a sheet over it.
	setOpen(isOpen) {
		byId("settings").classList.toggle("open", isOpen);
		byId("settings-toggle").setAttribute("aria-expanded", String(isOpen));
		byId(isOpen ? "settings-close" : "settings-toggle").focus();
	}

	has(param) {
		return byId(`set-${param}`) !== null;
	}

	// As the API names and takes them.
	parameters() {
		const given = {};
		for (const [name] of NUMBERS) {
			const { value } = byId(`set-${name}`);
			if (value !== "") given[name] = Number(value);
		}
		const stops = byId("set-stop").value.split("\n").filter((line) => line !== "");
		if (stops.length) given.stop = stops.slice(0, MAX_STOPS);
		return given;
	}

	// Shows the field that the server named.
	focus(param) {
		this.setOpen(true);
		byId(`set-${param}`)?.focus();
	}
}

function numberField([name, label, min, max, step, hint]) {
	const id = `set-${name}`;
	const input = node("input", {
		id, type: "number", min, max, step, inputmode: step < 1 ? "decimal" : "numeric", placeholder: name === "seed" ? "random" : "default",
		"aria-describedby": `${id}-hint`,
	});
	return node("div", { class: "field number" }, node("label", { for: id }, label), input,
		node("p", { class: "hint", id: `${id}-hint` }, hint));
}

function stopField() {
	return node("div", { class: "field" }, node("label", { for: "set-stop" }, "Stop strings"),
		node("textarea", { id: "set-stop", rows: 2, placeholder: "None", "aria-describedby": "set-stop-hint" }),
		node("p", { class: "hint", id: "set-stop-hint" }, `One a line, at most ${MAX_STOPS}. The answer ends before them.`));
}
