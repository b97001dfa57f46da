// The server's API: one streamed answer as events, and errors in words. Owns no element of the page.

const SILENCE_MS = 4000;

// What went wrong (message) and what to do about it (advice). param: the setting at fault, if one is.
export class Failure extends Error {
	constructor(message, advice, param = null) {
		super(message);
		this.advice = advice;
		this.param = param;
		this.isUnreachable = false;
	}
}

export async function getJson(path) {
	const response = await fetch(path, { signal: AbortSignal.timeout(SILENCE_MS), cache: "no-store" });
	if (!response.ok) throw await refusal(response);
	return response.json();
}

// Yields {text, tokens, finishReason, usage} until the answer is complete. Raises Failure, or AbortError after abort.
export async function* stream(path, body, signal) {
	let response;
	try {
		response = await fetch(path, {
			method: "POST",
			headers: { "Content-Type": "application/json" },
			body: JSON.stringify({ ...body, stream: true, stream_options: { include_usage: true } }),
			signal,
		});
	} catch (error) {
		throw unreachable(error);
	}
	if (!response.ok) throw await refusal(response);
	const events = readEvents(response.body.getReader());
	let isComplete = false;
	while (!isComplete) {
		let next;
		try {
			next = await events.next();
		} catch (error) {
			throw error.name === "AbortError" ? error : cutOff();
		}
		if (next.done) throw cutOff();
		isComplete = next.value === "[DONE]";
		if (!isComplete) yield readChunk(JSON.parse(next.value));
	}
}

// The data of server-sent events, however the network cut them.
export async function* readEvents(reader) {
	const decoder = new TextDecoder();
	let buffer = "";
	for (;;) {
		const { done, value } = await reader.read();
		if (done) return;
		buffer += decoder.decode(value, { stream: true });
		const lines = buffer.split(/\r?\n/);
		buffer = lines.pop();
		for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
	}
}

function readChunk(chunk) {
	if (chunk.error) throw explain(chunk.error, 500);
	const choice = chunk.choices?.[0] ?? {};
	return {
		text: choice.delta?.content ?? choice.text ?? "",
		tokens: choice.logprobs ? readTokens(choice.logprobs) : [],
		finishReason: choice.finish_reason ?? null,
		usage: chunk.usage ?? null,
	};
}

// Both of OpenAI's shapes as [{text, bytes | null, logprob, top: [{text, logprob}]}].
export function readTokens(logprobs) {
	if (logprobs.content) {
		return logprobs.content.map(({ token, bytes, logprob, top_logprobs }) => ({
			text: token,
			bytes: bytes ?? null,
			logprob,
			top: (top_logprobs ?? []).map((other) => ({ text: other.token, logprob: other.logprob })),
		}));
	}
	return (logprobs.tokens ?? []).map((name, i) => ({
		text: name,
		bytes: bytesOf(name),
		logprob: logprobs.token_logprobs[i],
		top: Object.entries(logprobs.top_logprobs?.[i] ?? {})
			.map(([text, logprob]) => ({ text, logprob }))
			.sort((a, b) => b.logprob - a.logprob),
	}));
}

// Completions write half a character as bytes:\xe2\x80.
function bytesOf(name) {
	if (!/^bytes:(\\x[0-9a-f]{2})+$/.test(name)) return null;
	return name.slice(8).split("\\x").map((digits) => parseInt(digits, 16));
}

async function refusal(response) {
	const body = await response.json().catch(() => ({})); // not ours: a proxy's page, for example
	return explain({ message: `The server answered ${response.status}`, ...body.error }, response.status);
}

const ADVICE = {
	401: "Reload the page and give the key as the password; the user name does not matter.",
	404: "The server may have been restarted with another model. Reload the page.",
	429: "Many requests are waiting. Try again in a moment.",
	503: "Wait a little, then try again.",
};

function explain(error, status) {
	const message = sentence(error.message ?? "The server reported an error");
	if (ADVICE[status]) return new Failure(message, ADVICE[status], error.param);
	if (/max_model_len|context/.test(message)) {
		return new Failure(message, "Shorten the text, or clear what came before.");
	}
	if (status < 500) return new Failure(message, "Change it and try again.", error.param);
	return new Failure(message, "Try again. If it stays so, the server's log has the cause.");
}

function unreachable(error) {
	if (error.name === "AbortError") return error;
	const failure = new Failure("The server does not answer.", "See whether `evenflow serve` is still running, then try again.");
	failure.isUnreachable = true;
	return failure;
}

const cutOff = () => new Failure("The connection broke before the answer was complete.", "What arrived is kept. Try again.");

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
