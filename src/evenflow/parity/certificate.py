"""The certificate: prompts, greedy tokens, and the best log-probabilities at every position under teacher forcing."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FORMAT = 1
WHOLE_FILE_BYTES = 2**28
NUM_SAMPLES, SAMPLE_BYTES = 64, 2**16


@dataclass(frozen=True, slots=True)
class Position:
    """One output position.

    token_ids, logprobs: the best ones in falling order; logprob: of the token that stands there.
    """

    token_ids: list[int]
    logprobs: list[float]
    logprob: float

    @property
    def margin(self) -> float:
        """How far the best is above the second; infinite where there is one only."""
        return self.logprobs[0] - self.logprobs[1] if len(self.logprobs) > 1 else float("inf")


@dataclass(frozen=True, slots=True)
class Sequence:
    """A prompt, its greedy continuation, and what the model says of every token of the continuation."""

    prompt_token_ids: list[int]
    output_token_ids: list[int]
    positions: list[Position]


@dataclass(frozen=True, slots=True)
class Certificate:
    """model: name as given. fingerprint: of config and weights. about: dtype, versions, hardware."""

    model: str
    fingerprint: str
    top_k: int
    about: dict[str, Any]
    sequences: list[Sequence]

    def save(self, path: Path) -> None:
        content = asdict(self)
        text = json.dumps({"format": FORMAT, "sha256": _digest(content), **content}, separators=(",", ":"))
        path.write_text(text + "\n", encoding="utf-8")


def load(path: Path) -> Certificate:
    """Raises ValueError for a file that is missing, changed, or no certificate."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"certificate {str(path)!r} does not exist; make one with `evenflow parity record`") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"certificate {str(path)!r} cannot be read: {error}") from None
    if not isinstance(content, dict) or "sequences" not in content or "sha256" not in content:
        raise ValueError(f"{str(path)!r} is no certificate of `evenflow parity record`")
    if content.pop("format", None) != FORMAT:
        raise ValueError(f"{str(path)!r} has another format than {FORMAT}; record it again with this version")
    if content.pop("sha256") != _digest(content):
        raise ValueError(f"{str(path)!r} was changed after it was recorded: its content does not match its sha256")
    sequences = [
        Sequence(**{**sequence, "positions": [Position(**position) for position in sequence["positions"]]})
        for sequence in content.pop("sequences")
    ]
    return Certificate(**content, sequences=sequences)


def _digest(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fingerprint(directory: Path) -> str:
    """Of config.json and the weights: tells other weights apart, and reads no gigabytes.

    Of a file above 256 MiB, its beginning and 64 evenly spaced pieces of 64 KiB count.
    """
    digest = hashlib.sha256()
    for path in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        size = path.stat().st_size
        digest.update(f"{path.name} {size} ".encode())
        with path.open("rb") as file:
            if size <= WHOLE_FILE_BYTES:
                digest.update(file.read())
                continue
            for place in range(NUM_SAMPLES):
                file.seek(place * (size - SAMPLE_BYTES) // (NUM_SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()[:32]
