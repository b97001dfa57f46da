// The live view: asks /live once a second while it is looked at, and shows what the engine does. Owns the history.

import { Failure, getJson } from "./api.js";
import { figure, milliseconds } from "./answer.js";
import { drawMap, drawSpark } from "./charts.js";
import { announce, byId, setText } from "./dom.js";

const POLL_MS = 1000;
const MIN_WINDOW_MS = 30_000;
const MAX_WINDOW_MS = 120_000;

export class LiveView {
	constructor() {
		this.isShown = false;
		this.history = []; // {atMs, rate, running}, of the last two minutes
		this.latest = null;
		this.lastAnswerMs = null;
		this.timer = null;
		document.addEventListener("visibilitychange", () => this.wake());
		new ResizeObserver(() => this.drawCanvases()).observe(byId("cards"));
	}

	setShown(isShown) {
		this.isShown = isShown;
		this.wake();
	}

	get isWatched() {
		return this.isShown && document.visibilityState === "visible";
	}

	wake() {
		if (!this.isWatched || this.timer !== null) return;
		this.lastAnswerMs = performance.now(); // what was missed while nobody looked is not the server's silence
		this.timer = 0;
		this.poll();
	}

	async poll() {
		const startMs = performance.now();
		const live = await getJson("/live").catch((error) => this.missed(error));
		try {
			if (live) this.take(live);
		} finally {
			if (this.isWatched) this.timer = setTimeout(() => this.poll(), Math.max(0, POLL_MS - (performance.now() - startMs)));
			else this.timer = null;
		}
	}

	// Told aloud once; the seconds are for the eye.
	missed(error) {
		const banner = byId("live-banner");
		const seconds = Math.max(1, Math.round((performance.now() - this.lastAnswerMs) / 1000));
		const what = error instanceof Failure ? error.message : `The server stopped answering ${seconds} s ago`;
		setText("live-banner", `${what}; retrying`);
		if (banner.hidden) announce(what);
		banner.hidden = false;
		byId("live").classList.add("stale");
	}

	take(live) {
		const nowMs = performance.now();
		this.latest = live;
		this.lastAnswerMs = nowMs;
		this.history.push({ atMs: nowMs, rate: live.output_tokens_per_s ?? 0, running: live.num_running });
		this.history = this.history.filter(({ atMs }) => atMs > nowMs - MAX_WINDOW_MS);
		if (!byId("live-banner").hidden) announce("The server answers again");
		byId("live-banner").hidden = true;
		byId("live").classList.remove("stale");
		this.drawFigures(live);
		this.drawCanvases();
	}

	drawFigures(live) {
		const about = [live.model, `Evenflow ${live.version}`, `up ${duration(live.uptime_s)}`];
		if (live.state !== "ready") about.unshift(live.state);
		setText("live-about", about.join(" · "));
		const { completed, aborted, failed } = live.num_requests;
		const { queries, hits } = live.prefix;
		const figures = {
			"output-rate": rate(live.output_tokens_per_s),
			"output-foot": `prompts ${rate(live.prompt_tokens_per_s)} tokens/s`,
			running: count(live.num_running),
			waiting: count(live.num_waiting),
			"requests-foot": `${count(completed)} completed, ${count(aborted)} aborted, ${count(failed)} failed`,
			"hit-rate": queries ? `${Math.round((100 * hits) / queries)}%` : "–",
			"hit-foot": queries ? `${count(hits)} of ${count(queries)} tokens` : "no prompt yet",
			preemptions: count(live.num_preemptions),
		};
		for (const [id, text] of Object.entries(figures)) setText(id, text);
		for (const name of ["p50", "p90", "p99"]) {
			setText(`ttft-${name}`, latency(live.ttft_ms[name]));
			setText(`itl-${name}`, latency(live.itl_ms[name]));
		}
		this.drawCache(live.kv);
	}

	drawCache(kv) {
		const share = kv.num_blocks ? (100 * kv.num_used) / kv.num_blocks : 0;
		setText("kv-used", `${figure(share)}%`);
		const free = kv.num_blocks - kv.num_used - kv.num_cached;
		const perCell = kv.blocks_per_cell > 1 ? ` A cell is ${kv.blocks_per_cell} blocks.` : "";
		const shared = kv.map && kv.blocks_per_cell === 1 ? `, ${count(kv.map.split("3").length - 1)} of them shared` : "";
		setText(
			"kv-summary",
			`${count(kv.num_used)} of ${count(kv.num_blocks)} blocks held${shared}; ${count(kv.num_cached)} cached, ${count(free)} free. ` +
				`A block is ${kv.block_size} tokens.${perCell}`,
		);
		byId("kv-map").hidden = !kv.map;
	}

	drawCanvases() {
		if (!this.latest || !this.isShown) return;
		const nowMs = this.lastAnswerMs;
		const windowMs = Math.max(MIN_WINDOW_MS, nowMs - this.history[0].atMs);
		const seconds = Math.round(windowMs / 1000);
		for (const [name, show] of [["rate", rate], ["running", count]]) {
			const points = this.history.map((entry) => ({ ageMs: nowMs - entry.atMs, value: entry[name] }));
			const peak = `peak ${show(Math.max(...points.map(({ value }) => value)))} in ${seconds} s`;
			const canvas = byId(`${name}-spark`);
			drawSpark(canvas, points, windowMs);
			setText(`${name}-peak`, peak);
			canvas.setAttribute("aria-label", `${canvas.dataset.of}: ${show(points.at(-1).value)} now, ${peak}`);
		}
		if (this.latest.kv.map) drawMap(byId("kv-map"), this.latest.kv.map, [0, 1, 2, 3].map((state) => document.querySelector(`.cell.c${state}`)));
	}
}

const count = (value) => value.toLocaleString("en");

// The server has no number before the first request.
const rate = (value) => (value == null ? "–" : figure(value));

const latency = (value) => (value == null ? "–" : milliseconds(value));

// 3 d 01:02:03
function duration(seconds) {
	const days = Math.floor(seconds / 86400);
	return (days ? `${days} d ` : "") + new Date((seconds % 86400) * 1000).toISOString().slice(11, 19);
}
