"""A certificate checked against an OpenAI-compatible server that returns log-probabilities of prompts. No torch.

Two ways, in this order: vLLM's `prompt_logprobs`, which names token ids; `echo` with `logprobs`, which names texts, so
that only the token's own log-probability and whether it is the best one are compared.
"""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evenflow.bench.client import make_http, served_model
from evenflow.parity.certificate import Certificate, Position

if TYPE_CHECKING:
    import httpx

ECHO_LOGPROBS = 5  # the most that OpenAI's own completions gave
AT_A_TIME = 4


def check(
    certificate: Certificate, base_url: str, model: str | None, api_key: str | None = None
) -> tuple[list[list[Position]], dict[str, Any]]:
    """(positions, what answered). Raises ValueError for a server that does not tell log-probabilities of prompts."""
    return asyncio.run(_check(certificate, base_url, model, api_key))


async def _check(
    certificate: Certificate, base_url: str, model: str | None, api_key: str | None
) -> tuple[list[list[Position]], dict[str, Any]]:
    async with make_http(base_url, api_key) as http:
        name = await served_model(http, model)
        first = certificate.sequences[0]
        ask = _by_ids
        try:
            await ask(http, name, first.prompt_token_ids, first.output_token_ids, certificate.top_k)
        except ValueError as error:
            ask, reason = _by_echo, error
            try:
                await ask(http, name, first.prompt_token_ids, first.output_token_ids, certificate.top_k)
            except ValueError as second:
                raise ValueError(
                    f"{base_url} returns no log-probabilities of prompts: with prompt_logprobs, {reason}; "
                    f"with echo, {second}"
                ) from None
        gate = asyncio.Semaphore(AT_A_TIME)

        async def one(prompt: list[int], output: list[int]) -> list[Position]:
            async with gate:
                return await ask(http, name, prompt, output, certificate.top_k)

        forced = await asyncio.gather(*(one(s.prompt_token_ids, s.output_token_ids) for s in certificate.sequences))
        how = "prompt_logprobs" if ask is _by_ids else "echo: own log-probabilities only"
        return list(forced), {"machine": base_url, "model": name, "how": how}


async def _post(http: "httpx.AsyncClient", body: dict[str, Any]) -> dict[str, Any]:
    """The first choice of the answer."""
    import httpx

    try:
        response = await http.post("/v1/completions", json={"temperature": 0, **body})
    except httpx.HTTPError as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    if response.status_code != 200:
        raise ValueError(f"HTTP {response.status_code}: {response.text[:200]}")
    try:
        choice: dict[str, Any] = response.json()["choices"][0]
    except (ValueError, KeyError, IndexError, TypeError):
        raise ValueError(f"the answer has no choice: {response.text[:200]}") from None
    return choice


async def _by_ids(
    http: "httpx.AsyncClient", model: str, prompt: Sequence[int], output: Sequence[int], top_k: int
) -> list[Position]:
    whole = [*prompt, *output]
    choice = await _post(http, {"model": model, "prompt": whole, "max_tokens": 1, "prompt_logprobs": top_k})
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(whole):
        raise ValueError("the answer has no prompt_logprobs")
    return [
        position_of_ids(entry, token_id, top_k) for entry, token_id in zip(entries[len(prompt) :], output, strict=True)
    ]


def position_of_ids(entry: dict[str, dict[str, Any]], token_id: int, top_k: int) -> Position:
    """vLLM's entry, token id -> {"logprob": ...}."""
    values = {int(key): float(value["logprob"]) for key, value in entry.items()}
    best = sorted(values.items(), key=lambda pair: -pair[1])[:top_k]
    return Position([key for key, _ in best], [value for _, value in best], values[token_id])


async def _by_echo(
    http: "httpx.AsyncClient", model: str, prompt: Sequence[int], output: Sequence[int], top_k: int
) -> list[Position]:
    whole = [*prompt, *output]
    asked = {"model": model, "prompt": whole, "max_tokens": 1, "echo": True, "logprobs": min(top_k, ECHO_LOGPROBS)}
    logprobs = (await _post(http, asked)).get("logprobs") or {}
    own, best = logprobs.get("token_logprobs") or [], logprobs.get("top_logprobs") or []
    if len(own) < len(whole):
        raise ValueError("the answer echoes no log-probabilities")
    found = []
    for place in range(len(prompt), len(whole)):
        top = sorted((best[place] or {}).values(), reverse=True) if place < len(best) else []
        found.append(Position([], [float(value) for value in top], float(own[place])))
    return found
