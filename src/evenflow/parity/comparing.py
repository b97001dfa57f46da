"""A certificate beside what another engine says of the same tokens: agreement, gaps, first divergence, a verdict.

Pure functions. The gap at a position is the greatest difference of log-probabilities over the tokens that both name.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from evenflow.parity.certificate import Certificate, Position


@dataclass(frozen=True, slots=True)
class Bounds:
    """What passes. A disagreement on the best token counts only where the certificate's margin exceeds near_tie.

    The defaults hold between 16-bit and 32-bit runs of the same weights: the demo model recorded in float32 and checked
    in bfloat16 has a mean gap of 0.058 and a greatest of 0.20, in float16 0.007 and 0.025, in float32 on the same
    machine 0. A rope base that is 10 % off has 0.18 and 0.95, and fails. For the same type, stricter bounds make sense.
    """

    min_top1: float = 0.99
    max_mean_gap: float = 0.1
    max_gap: float = 0.5
    near_tie: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.min_top1 <= 1:
            raise ValueError(f"--min-top1 {self.min_top1} must be from 0 to 1")
        for name in ("max_mean_gap", "max_gap", "near_tie"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 0")


@dataclass(frozen=True, slots=True)
class Verdict:
    """top1: share of positions where both name the same best token. top1_clear: of those that are no near ties.

    first_divergence: (sequence, output position) where greedy generation first left the certificate; None: nowhere,
    or not generated. failures: the bounds that are broken, in words.
    """

    num_positions: int
    num_compared: int
    top1: float
    top1_clear: float
    num_near_ties: int
    mean_gap: float
    max_gap: float
    worst: tuple[int, int] | None
    first_divergence: tuple[int, int] | None
    num_diverged: int
    failures: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.failures

    def as_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def compare(
    certificate: Certificate,
    forced: Sequence[Sequence[Position]],
    bounds: Bounds,
    generated: Sequence[Sequence[int]] | None = None,
) -> Verdict:
    """forced: per sequence, the positions under the certificate's tokens. generated: greedy tokens of the same prompts.

    A position whose token_ids are empty has the token's own logprob only, as servers without ids give.
    Raises ValueError where the number of positions differs.
    """
    gaps: list[float] = []
    same = clear = clear_same = 0
    worst: tuple[float, int, int] | None = None
    for index, (sequence, positions) in enumerate(zip(certificate.sequences, forced, strict=True)):
        if len(positions) != len(sequence.positions):
            raise ValueError(
                f"sequence {index} has {len(sequence.positions)} positions, the other engine tells of {len(positions)}"
            )
        for place, (ours, theirs) in enumerate(zip(sequence.positions, positions, strict=True)):
            gap = _gap(sequence.output_token_ids[place], ours, theirs)
            gaps.append(gap)
            if worst is None or gap > worst[0] or (math.isnan(gap) and not math.isnan(worst[0])):
                worst = (gap, index, place)
            agrees = _agrees(ours, theirs)
            same += agrees
            if ours.margin > bounds.near_tie:
                clear += 1
                clear_same += agrees
    if not gaps:
        raise ValueError("the certificate has no position to compare")
    diverged = first_divergences(certificate, generated) if generated is not None else []
    verdict = Verdict(
        num_positions=sum(len(sequence.positions) for sequence in certificate.sequences),
        num_compared=len(gaps),
        top1=same / len(gaps),
        top1_clear=clear_same / clear if clear else 1.0,
        num_near_ties=len(gaps) - clear,
        mean_gap=math.fsum(gaps) / len(gaps),
        max_gap=worst[0] if worst else 0.0,
        worst=worst[1:] if worst else None,
        first_divergence=diverged[0] if diverged else None,
        num_diverged=len(diverged),
    )
    verdict.failures.extend(broken(verdict, bounds))
    return verdict


def _gap(token_id: int, ours: Position, theirs: Position) -> float:
    found = abs(ours.logprob - theirs.logprob)
    known = dict(zip(theirs.token_ids, theirs.logprobs, strict=False))  # without ids there is nothing to pair
    shared = [abs(p - known[t]) for t, p in zip(ours.token_ids, ours.logprobs, strict=True) if t in known]
    worst = max([found, *shared])
    return worst if not any(map(math.isnan, [found, *shared])) else math.nan


def _agrees(ours: Position, theirs: Position) -> bool:
    if theirs.token_ids and ours.token_ids:
        return ours.token_ids[0] == theirs.token_ids[0]
    # Without ids: the certificate's token is its own best one, and stands at the top of their list, or it does not.
    ours_is_best = ours.logprob >= ours.logprobs[0]
    theirs_is_best = not theirs.logprobs or theirs.logprob >= theirs.logprobs[0]
    return ours_is_best == theirs_is_best


def first_divergences(certificate: Certificate, generated: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(sequence, position of the first token that differs) of those that differ."""
    found = []
    for index, (sequence, tokens) in enumerate(zip(certificate.sequences, generated, strict=True)):
        if list(tokens) == sequence.output_token_ids:
            continue
        pairs = enumerate(zip(sequence.output_token_ids, tokens, strict=False))
        place = next((at for at, (a, b) in pairs if a != b), min(len(tokens), len(sequence.output_token_ids)))
        found.append((index, place))
    return found


def broken(verdict: Verdict, bounds: Bounds) -> list[str]:
    """The bounds that do not hold. NaN breaks them."""
    found = []
    if not verdict.top1_clear >= bounds.min_top1:
        found.append(f"top-1 agreement {verdict.top1_clear:.4f} is below {bounds.min_top1}")
    if not verdict.mean_gap <= bounds.max_mean_gap:
        found.append(f"mean gap {verdict.mean_gap:.4g} is above {bounds.max_mean_gap}")
    if not verdict.max_gap <= bounds.max_gap:
        found.append(f"greatest gap {verdict.max_gap:.4g} is above {bounds.max_gap}")
    return found
