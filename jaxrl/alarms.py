"""What in a step's metrics somebody should look at: a line when it begins, none while it lasts."""

import itertools
import math
import statistics
from collections import deque
from collections.abc import Mapping

from jaxrl.config import AlarmSection

_REMEMBERED = 50  # steps, whose median a gradient is held against
_ENOUGH = 10  # steps, before there is a median worth the name
_GROWING = 3  # steps in a row
_NOISE = 1e-3  # nats: below it mismatch/k3 comes and goes with rounding


class Alarms:
    """One run's. A threshold of None is never passed."""

    def __init__(self, c: AlarmSection) -> None:
        self._c = c
        self._on: set[str] = set()
        self._first_entropy: float | None = None
        self._grad_norms: deque[float] = deque(maxlen=_REMEMBERED)
        self._k3: deque[float] = deque(maxlen=_GROWING + 1)  # the newest step's included

    def heard(self, metrics: Mapping[str, float], completions: int) -> list[str]:
        """A line for each alarm that was silent after the last step, and is not after this one.

        Args:
          metrics: of a step of `train.run`.
          completions: in it, whose rewards may be unknown.
        """
        said = self._of_step(metrics, completions)
        new = [line for name, line in said.items() if name not in self._on]
        self._on = set(said)
        grad_norm = metrics.get("grad_norm", math.nan)
        if math.isfinite(grad_norm):
            self._grad_norms.append(grad_norm)
        return new

    def _of_step(self, metrics: Mapping[str, float], completions: int) -> dict[str, str]:
        c, said = self._c, {}
        k3, ess, entropy, grad_norm, unknown, nonfinite = (  # NaN is more and less than nothing
            metrics.get(name, math.nan)
            for name in (
                "mismatch/k3",
                "mismatch/ess",
                "entropy",
                "grad_norm",
                "reward/unknown",
                "update/nonfinite",
            )
        )
        if c.mismatch_k3 is not None and k3 > c.mismatch_k3:
            said["mismatch_k3"] = (
                f"mismatch/k3 = {k3:.2g} nats, more than alarm.mismatch_k3 = {c.mismatch_k3:g}: "
                "engines sampled from another policy than the trainer computes; look at lag/mean, "
                "vllm.dtype and publish/probe_max_abs_dlogp"
            )
        self._k3.append(max(_NOISE, k3))
        if c.mismatch_growth is not None and self._grown_by(c.mismatch_growth):
            said["mismatch_growth"] = (
                f"mismatch/k3 = {', '.join(f'{x:.2g}' for x in self._k3)} nats in the last steps, "
                f"each time more than alarm.mismatch_growth = {c.mismatch_growth:g} times as much: "
                "engines and trainer drift apart; look at lag/mean, weights/version_served and "
                "grad_norm"
            )
        if c.ess is not None and ess < c.ess:
            said["ess"] = (
                f"mismatch/ess = {ess:.2f}, less than alarm.ess = {c.ess:g}: few tokens carry the "
                "update; lower rollout.max_lag, or algorithm.correction_cap"
            )
        if self._first_entropy is None:
            self._first_entropy = entropy
        if c.entropy is not None and entropy < c.entropy * self._first_entropy:
            said["entropy"] = (
                f"entropy = {entropy:.2g} nats, less than alarm.entropy = {c.entropy:g} of the "
                f"first step's {self._first_entropy:.2g}: the completions of a prompt become the "
                "same, and comparing them teaches nothing more"
            )
        if c.unknown_rewards is not None and unknown > c.unknown_rewards * completions:
            said["unknown_rewards"] = (
                f"{unknown / completions:.0%} of the rewards are unknown, more than "
                f"alarm.unknown_rewards = {c.unknown_rewards:g}: the verifier fails, see its log"
            )
        free_gib = metrics.get("host/disk_free_bytes", math.nan) / 2**30
        if c.disk_free_gib is not None and free_gib < c.disk_free_gib:
            said["disk_free_gib"] = (
                f"{free_gib:.1f} GiB are free on the disk of run.dir, less than "
                f"alarm.disk_free_gib = {c.disk_free_gib:g}: make room, or a checkpoint will fail"
            )
        if c.nonfinite_updates is not None and nonfinite > c.nonfinite_updates:
            loss = metrics.get("loss", math.nan)
            said["nonfinite_updates"] = (
                f"update/nonfinite = {nonfinite:.0f}, more than alarm.nonfinite_updates = "
                f"{c.nonfinite_updates}: updates without effect; loss = {loss:.2g} and grad_norm = "
                f"{grad_norm:.2g} in this step. Look at samples/ for what was trained on, or lower "
                "optimizer.learning_rate"
            )
        median = statistics.median(self._grad_norms) if len(self._grad_norms) >= _ENOUGH else None
        if c.grad_norm is not None and median is not None and grad_norm > c.grad_norm * median:
            said["grad_norm"] = (
                f"grad_norm = {grad_norm:.2g}, more than alarm.grad_norm = {c.grad_norm:g} times "
                f"its median of {median:.2g}"
            )
        return said

    def _grown_by(self, factor: float) -> bool:
        steps = list(self._k3)
        grown = [after > factor * before for before, after in itertools.pairwise(steps)]
        return len(grown) == _GROWING and all(grown)
