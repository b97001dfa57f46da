"""The request lengths of the benchmarks: the law of ShareGPT as vLLM v0.1.4 filtered it, without the file.

Log-normal lengths with mean 249 in and 230 out; the coefficients of variation (1.3 and 0.85) are those of ShareGPT's
two sides. Requests that do not fit the context are drawn again, as that filter dropped them.
"""

import numpy as np

MEAN_PROMPT, CV_PROMPT = 249.0, 1.3
MEAN_OUTPUT, CV_OUTPUT = 230.0, 0.85


def lognormal(rng: np.random.Generator, mean: float, cv: float, count: int) -> np.ndarray:
    sigma = np.sqrt(np.log(1 + cv**2))
    return rng.lognormal(np.log(mean) - sigma**2 / 2, sigma, count)


def lengths(count: int, context: int, seed: int = 0) -> list[tuple[int, int]]:
    """(prompt tokens, output tokens) of each request; both at least 4, together at most `context`."""
    rng = np.random.default_rng(seed)
    found: list[tuple[int, int]] = []
    while len(found) < count:
        prompts = lognormal(rng, MEAN_PROMPT, CV_PROMPT, count).astype(int)
        outputs = lognormal(rng, MEAN_OUTPUT, CV_OUTPUT, count).astype(int)
        fits = (prompts >= 4) & (outputs >= 4) & (prompts + outputs <= context)
        found += list(zip(prompts[fits].tolist(), outputs[fits].tolist(), strict=True))
    return found[:count]


def prompts(request_lengths: list[tuple[int, int]], vocab_size: int, seed: int = 0) -> list[list[int]]:
    """Random token ids of the given lengths; no two share a beginning."""
    rng = np.random.default_rng(seed + 1)
    return [rng.integers(16, vocab_size, num_prompt).tolist() for num_prompt, _ in request_lengths]
