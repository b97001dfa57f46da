"""The published figures that this project started from: EmbeddedLLM's port of vLLM v0.1.4 to ROCm, October 2023.

LLaMA-2 on L40, A100 and MI210: their tables 1, 3 and 4. Only numbers that they print are here; their curves exist as
pictures only, so no number of them is. tokens/s counts prompt and output tokens, 1,000 ShareGPT requests.
"""

from dataclasses import dataclass

from evenflow.bench import roofline
from evenflow.bench.workload import sample_lengths
from evenflow.plan import read_model_config
from evenflow.platforms.specs import find_specs

GPUS = ("L40", "A100", "MI210")
SPECS_NAMES = {"L40": "l40", "A100": "a100-80gb", "MI210": "mi210"}
MODELS = {"llama-2-7b": 1, "llama-2-13b": 2, "llama-2-70b": 4}  # name -> GPUs, for tables 3 and 4
NUM_REQUESTS = 1000
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 256, 2560  # vLLM v0.1.4's defaults

# (model, GPU) -> (table 3: tokens/s, table 4: requests/min)
CELLS: dict[tuple[str, str], tuple[float, float]] = {
    ("llama-2-70b", "L40"): (399.01, 49.8),
    ("llama-2-70b", "A100"): (629.33, 79.2),
    ("llama-2-70b", "MI210"): (436.40, 54.6),
    ("llama-2-13b", "L40"): (491.16, 61.8),
    ("llama-2-13b", "A100"): (730.01, 91.8),
    ("llama-2-13b", "MI210"): (595.11, 74.4),
    ("llama-2-7b", "L40"): (532.26, 66.6),
    ("llama-2-7b", "A100"): (757.43, 94.8),
    ("llama-2-7b", "MI210"): (718.06, 90.0),
}
# Table 1, per GPU: bf16 TFLOP/s, memory GB, GB/s, link GB/s, W, price over the L40's
TABLE_1: dict[str, tuple[float, int, float, int | None, int, str]] = {
    "A100": (312, 80, 2039, 600, 400, "2 to 2.2x"),
    "L40": (181.05, 48, 864, None, 300, "1x"),
    "MI210": (181, 64, 1638.4, 300, 300, "1x"),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One of the seed's results with the limit of its work: tokens/s in + out, ideal and without overlap."""

    tokens_per_s: float
    requests_per_min: float
    limit_tokens_per_s: float
    limit_no_overlap_tokens_per_s: float

    @property
    def fraction(self) -> float:
        return self.tokens_per_s / self.limit_tokens_per_s

    @property
    def fraction_no_overlap(self) -> float:
        return self.tokens_per_s / self.limit_no_overlap_tokens_per_s


def cell(model: str, gpu: str) -> Cell:
    """Raises KeyError for what the seed did not measure.

    The limit is of the length law, since its requests are not known.
    """
    tokens_per_s, requests_per_min = CELLS[model, gpu]
    lengths, _ = sample_lengths(NUM_REQUESTS)
    limit = roofline.offline_limit(
        lengths,
        roofline.Work.of(read_model_config(model), "float16"),
        roofline.machine_of(find_specs(SPECS_NAMES[gpu]), MODELS[model]),
        max_num_seqs=MAX_NUM_SEQS,
        max_num_batched_tokens=MAX_NUM_BATCHED_TOKENS,
    )
    total = sum(prompt + output for prompt, output in lengths)
    return Cell(tokens_per_s, requests_per_min, total / limit.ideal_s, total / limit.no_overlap_s)
