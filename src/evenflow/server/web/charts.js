// Drawing on canvases: a line of the last minutes, and the map of the cache's blocks. Colours are the style sheet's.

const MAX_CELL = 16;
const MIN_CELL = 3;
const MAP_HEIGHT = 216; // px, aimed at
const MAX_GAP_MS = 3500; // a longer silence breaks the line

// A context in CSS pixels, cleared; null while the canvas is not laid out.
function prepare(canvas, height) {
	const width = canvas.clientWidth;
	if (!width || !height) return null;
	const scale = window.devicePixelRatio || 1;
	canvas.width = Math.round(width * scale);
	canvas.height = Math.round(height * scale);
	const context = canvas.getContext("2d");
	context.scale(scale, scale);
	return { context, width, height };
}

// points: [{ageMs, value}], oldest first. windowMs: what the width stands for.
export function drawSpark(canvas, points, windowMs) {
	const paper = prepare(canvas, canvas.clientHeight);
	if (!paper || !points.length) return;
	const { context, width, height } = paper;
	context.fillStyle = context.strokeStyle = getComputedStyle(canvas).color;
	const top = Math.max(1, ...points.map(({ value }) => value));
	const place = ({ ageMs, value }) => [(width - 4) * (1 - ageMs / windowMs), height - 2 - (value / top) * (height - 8)];
	context.lineJoin = "round";
	context.lineWidth = 2;
	for (const run of unbroken(points)) {
		const line = run.map(place);
		context.beginPath();
		context.moveTo(line[0][0], height);
		for (const [x, y] of line) context.lineTo(x, y);
		context.lineTo(line.at(-1)[0], height);
		context.globalAlpha = 0.14;
		context.fill();
		context.globalAlpha = 1;
		context.beginPath();
		for (const [x, y] of line) context.lineTo(x, y);
		context.stroke();
	}
	const [x, y] = place(points.at(-1));
	context.beginPath();
	context.arc(x, y, 3, 0, 2 * Math.PI);
	context.fill();
}

function unbroken(points) {
	const runs = [[]];
	for (const point of points) {
		const previous = runs.at(-1).at(-1);
		if (previous && previous.ageMs - point.ageMs > MAX_GAP_MS) runs.push([]);
		runs.at(-1).push(point);
	}
	return runs;
}

// The side of a cell in px, for `count` cells on `width`: as large as fits the height that is aimed at.
export function cellSize(count, width) {
	const fitting = Math.floor(Math.sqrt((width * MAP_HEIGHT) / Math.max(1, count)));
	return Math.min(MAX_CELL, Math.max(MIN_CELL, fitting));
}

// map: one character a cell, '0' to '3', in rows. samples: the legend's four cells, which have the colours.
export function drawMap(canvas, map, samples) {
	const size = cellSize(map.length, canvas.clientWidth);
	const columns = Math.max(1, Math.floor(canvas.clientWidth / size));
	const height = Math.ceil(map.length / columns) * size;
	canvas.style.height = `${height}px`;
	const paper = prepare(canvas, height);
	if (!paper) return;
	const colours = samples.map((sample) => getComputedStyle(sample).backgroundColor);
	const gap = size >= 8 ? 2 : 1;
	for (let i = 0; i < map.length; i++) {
		paper.context.fillStyle = colours[map.charCodeAt(i) - 48] ?? colours[0];
		paper.context.fillRect((i % columns) * size, Math.floor(i / columns) * size, size - gap, size - gap);
	}
}
