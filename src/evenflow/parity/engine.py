"""Certificates of the engine in this process: recorded, and checked, by the public API. Imports torch when it runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evenflow.bench import engines, environment
from evenflow.parity import certificate as certificates
from evenflow.parity.certificate import Certificate, Position

if TYPE_CHECKING:
    from evenflow.llm import LLM
    from evenflow.request import RequestOutput

PROMPTS = (
    "Once upon a time there was a king who had three daughters.",
    "The capital of France is",
    "def fibonacci(n):",
    "In the beginning",
    "1, 1, 2, 3, 5, 8, 13,",
    "Dear Sir or Madam,",
    "The old woman said to the soldier:",
    "Q: What is the boiling point of water?\nA:",
    "Es war einmal ein armer Müller,",
    "To be, or not to be,",
    "SELECT name FROM users WHERE",
    "It was the best of times,",
    "The wolf came to the door and knocked.",
    "Translate to French: the cat sleeps.",
    "A B C D E F",
    "There was once a fisherman who lived with his wife by the sea, and every day he went out to fish.",
)
RANDOM_PROMPT_LEN = 24


def record(
    model: str, options: dict[str, Any], *, prompts: Sequence[str] = PROMPTS, max_tokens: int = 64, top_k: int = 10
) -> Certificate:
    """Generate greedily, then ask again under teacher forcing, so that a check asks exactly the same.

    Raises ValueError.
    """
    for name, value in (("--max-tokens", max_tokens), ("--top-k", top_k)):
        if value < 1:
            raise ValueError(f"{name} {value} must be at least 1")
    if not prompts:
        raise ValueError("there is no prompt to record")
    llm = engines.open_engine(model, options)
    if top_k > llm.settings.max_logprobs:
        raise ValueError(f"--top-k {top_k} exceeds max_logprobs={llm.settings.max_logprobs}; raise --max-logprobs")
    prompt_ids = _prompt_ids(llm, prompts)
    outputs = generate(llm, prompt_ids, max_tokens)
    positions = force(llm, prompt_ids, outputs, top_k)
    return Certificate(
        model=model,
        fingerprint=_fingerprint(llm),
        top_k=top_k,
        about=about(llm),
        sequences=[
            certificates.Sequence(ids, tokens, found)
            for ids, tokens, found in zip(prompt_ids, outputs, positions, strict=True)
        ],
    )


def _prompt_ids(llm: "LLM", prompts: Sequence[str]) -> list[list[int]]:
    if not llm.settings.skip_tokenizer_init:
        return [llm.tokenizer.encode(prompt) for prompt in prompts]
    from evenflow.bench.workload import random_lengths

    workload = random_lengths(
        len(prompts), input_len=RANDOM_PROMPT_LEN, output_len=1, vocab_size=llm.model_config.vocab_size
    )
    return [list(request.prompt) for request in workload.requests if not isinstance(request.prompt, str)]


def _fingerprint(llm: "LLM") -> str:
    from evenflow.model_files import find_model

    if llm.settings.load_format == "dummy":
        return f"random weights, seed {llm.settings.seed}"
    return certificates.fingerprint(find_model(llm.settings.model, llm.settings.revision))


def about(llm: "LLM") -> dict[str, Any]:
    """What computed it."""
    found = environment.manifest()
    settings = {name: getattr(llm.settings, name) for name in ("dtype", "kv_cache_dtype", "device", "block_size")}
    return {
        "machine": environment.machine_name(found),
        **settings,
        "versions": found["versions"],
        "date": found["date"],
    }


def generate(llm: "LLM", prompt_ids: Sequence[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt, ends of sequence ignored."""
    from evenflow.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([list(ids) for ids in prompt_ids], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def force(
    llm: "LLM", prompt_ids: Sequence[list[int]], outputs: Sequence[Sequence[int]], top_k: int
) -> list[list[Position]]:
    """What the model says at every output position when the tokens are given."""
    from evenflow.sampling_params import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, prompt_logprobs=top_k)
    # The last token is asked for too, so the whole sequence is the prompt.
    whole = [[*ids, *tokens] for ids, tokens in zip(prompt_ids, outputs, strict=True)]
    answers = llm.generate(whole, params, use_tqdm=False)
    return [_positions(answer, len(ids), top_k) for answer, ids in zip(answers, prompt_ids, strict=True)]


def _positions(answer: "RequestOutput", start: int, top_k: int) -> list[Position]:
    found = []
    assert answer.prompt_logprobs is not None
    for token_id, entry in zip(answer.prompt_token_ids[start:], answer.prompt_logprobs[start:], strict=True):
        assert entry is not None  # only the first token of a prompt has none
        best = sorted(entry.items(), key=lambda pair: -pair[1].logprob)[:top_k]
        found.append(
            Position([other for other, _ in best], [float(p.logprob) for _, p in best], float(entry[token_id].logprob))
        )
    return found


def check(
    certificate: Certificate, model: str | None, options: dict[str, Any]
) -> tuple[list[list[Position]], list[list[int]], dict[str, Any]]:
    """(positions under teacher forcing, greedy tokens, what computed them) by this engine.

    Raises ValueError if the model cannot hold the certificate's tokens.
    """
    llm = engines.open_engine(model or certificate.model, options)
    prompts = [sequence.prompt_token_ids for sequence in certificate.sequences]
    outputs = [sequence.output_token_ids for sequence in certificate.sequences]
    forced = force(llm, prompts, outputs, certificate.top_k)
    generated = generate(llm, prompts, max(map(len, outputs)))
    described = about(llm)
    if (mark := _fingerprint(llm)) != certificate.fingerprint:
        described["warning"] = f"other weights: fingerprint {mark}, the certificate has {certificate.fingerprint}"
    return forced, generated, described


def read_prompts(path: Path) -> list[str]:
    """One prompt a line. Raises ValueError."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts {str(path)!r} cannot be read: {error}") from None
    if not lines:
        raise ValueError(f"--prompts {str(path)!r} holds no prompt; write one a line")
    return lines
