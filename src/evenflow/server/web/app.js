// The page's start: which view is shown, the theme, and which model the server has.

import { getJson } from "./api.js";
import { Playground } from "./chat.js";
import { byId, load, on, save, setText } from "./dom.js";
import { LiveView } from "./live.js";
import { Settings } from "./settings.js";
import { hideTooltip, listen } from "./tokens.js";

const RETRY_MS = 2000;
const VIEWS = ["playground", "live"];

const live = new LiveView();
const playground = new Playground(new Settings(), connect);
let isConnecting = false;
let chosenTheme = load("theme", (value) => ["light", "dark"].includes(value));

function showView() {
	const asked = location.hash.slice(1);
	const shown = VIEWS.includes(asked) ? asked : VIEWS[0];
	for (const view of VIEWS) byId(view).hidden = view !== shown;
	for (const link of document.querySelectorAll("nav a")) {
		if (link.hash === `#${shown}`) link.setAttribute("aria-current", "page");
		else link.removeAttribute("aria-current");
	}
	document.title = shown === "live" ? "Live · Evenflow" : "Evenflow";
	hideTooltip();
	window.scrollTo(0, 0);
	live.setShown(shown === "live");
}

// The theme follows the system until somebody chooses.
function showTheme() {
	const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
	const theme = chosenTheme ?? system;
	document.documentElement.dataset.theme = theme;
	byId("theme").setAttribute("aria-pressed", String(theme === "dark"));
	live.drawCanvases();
}

function toggleTheme() {
	chosenTheme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
	save("theme", chosenTheme);
	showTheme();
}

function setModel(state, name) {
	byId("model").dataset.state = state;
	byId("model").title = name;
	setText("model-name", name);
}

async function connect() {
	if (isConnecting) return;
	isConnecting = true;
	try {
		const [model] = (await getJson("/v1/models")).data;
		setModel("ready", model.id);
		playground.setModel(model);
	} catch {
		setModel("lost", "no answer, retrying");
		setTimeout(connect, RETRY_MS);
	}
	isConnecting = false;
}

on("theme", "click", toggleTheme);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
window.addEventListener("hashchange", showView);
document.querySelector(".skip").addEventListener("click", (event) => {
	event.preventDefault(); // its #main would be taken for a view
	byId("main").focus();
});
listen(byId("conversation"));
showTheme();
showView();
connect();
