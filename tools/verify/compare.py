"""Logits and greedy tokens, ours against the reference's: by how much they differ."""

import dataclasses
import math
from typing import Any

import numpy as np

from jaxrl.types import RunError

NEAR_TIE = 1e-3  # logits closer than this may change places by rounding


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of two arrays of logits [..., V]."""

    max: float
    mean: float
    range: float  # largest logit of the reference less its smallest
    agree: int  # positions whose largest logit is of the same token; a near-tie may differ
    positions: int

    @property
    def ratio(self) -> float:
        return self.max / self.range if self.range else math.nan

    def values(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"ratio": self.ratio}

    def __str__(self) -> str:
        return (
            f"max {self.max:.1e}, mean {self.mean:.1e}, {self.ratio:.1e} of the range "
            f"{self.range:.1f}; top-1 {self.agree}/{self.positions}"
        )


def difference(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    if ours.shape != theirs.shape:
        raise RunError(f"our logits have shape {ours.shape}, the reference's {theirs.shape}")
    gap = np.abs(ours - theirs)
    same = ours.argmax(-1) == theirs.argmax(-1)
    spread = float(np.ptp(theirs))
    return Difference(float(gap.max()), float(gap.mean()), spread, int(same.sum()), same.size)


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How far our greedy tokens are the reference's."""

    equal: int
    logprobs: float  # largest |difference| over the equal tokens, nats
    words: str = ""  # on the first difference
    bad: bool = False


def first_difference(
    ours: np.ndarray, logprobs: np.ndarray, theirs: np.ndarray, logits_NV: np.ndarray
) -> Continuation:
    """After a near-tie the two are on different texts: what follows is not compared."""
    if len(ours) != len(theirs):
        return Continuation(0, 0.0, f"{len(ours)} tokens, not {len(theirs)}", True)
    unequal = np.flatnonzero(ours != theirs)
    equal = int(unequal[0]) if len(unequal) else len(ours)
    rows = logits_NV[:equal].astype(np.float64)
    highest = rows.max(-1, initial=-np.inf)
    norms = highest + np.log(np.exp(rows - highest[:, None]).sum(-1))
    exact = rows[np.arange(equal), theirs[:equal]] - norms
    worst = float(np.abs(exact - logprobs[:equal]).max(initial=0.0))
    if equal == len(ours):
        return Continuation(equal, worst)
    here, mine, other = logits_NV[equal], int(ours[equal]), int(theirs[equal])
    gap = float(abs(here[mine] - here[other]))
    tie = gap <= NEAR_TIE
    words = f"token {equal} is {mine}, not {other}; their logits are {gap:.1e} apart"
    return Continuation(equal, worst, words + (", a near-tie" if tie else ""), not tie)
