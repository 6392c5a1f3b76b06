"""Rotary position embeddings, as a Hugging Face configuration describes them. NumPy only.

Every kind comes down to one inverse frequency for each pair of dimensions, and a factor on cosine
and sine. Computed in float32 in the order that transformers and vLLM use: at position 100 000 a
rounding of the frequency is a visible angle.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

KINDS = ("default", "linear", "llama3", "yarn", "longrope")

_SCALED = {"factor", "original_max_position_embeddings"}
_KEYS = {  # what each kind reads beside rope_type, rope_theta and partial_rotary_factor
    "default": set(),
    "linear": {"factor"},
    "llama3": _SCALED | {"low_freq_factor", "high_freq_factor"},
    "yarn": _SCALED
    | {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "longrope": _SCALED | {"short_factor", "long_factor", "attention_factor"},
}
_NEEDED = {
    "linear": {"factor"},
    "llama3": _KEYS["llama3"],
    "yarn": _SCALED,
    "longrope": {"short_factor", "original_max_position_embeddings"},
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Pair i of the first 2 * len(frequencies) dimensions of a head turns by position *
    frequencies[i] radians, and is scaled by `amplitude`. Further dimensions do not turn.

    `max_positions`: beyond it another embedding would be meant (longrope's long factors); None: no
    such bound.
    """

    frequencies: tuple[float, ...]
    amplitude: float = 1.0
    max_positions: int | None = None


def make_rope(settings: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    """From the keys of `rope_parameters` (or of `rope_scaling`, with `rope_theta` beside them).

    Raises:
      ValueError: an unknown kind, a missing key, or one that its kind does not read.
    """
    kind = settings.get("rope_type") or "default"
    if kind not in KINDS:
        raise ValueError(f"rope_type = {kind!r} is not one of {', '.join(KINDS)}")
    given = {key for key, value in settings.items() if value is not None}
    unknown = given - _KEYS[kind] - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    missing = _NEEDED.get(kind, set()) - given
    if unknown or missing:
        raise ValueError(
            f"rope_type = {kind!r} "
            + "; ".join(
                [f"does not read {name}" for name in sorted(unknown)]
                + [f"needs {name}" for name in sorted(missing)]
            )
        )
    with np.errstate(all="ignore"):  # what is not finite is refused below
        rope = _make(kind, settings, head_dim, max_positions)
    if not np.isfinite([*rope.frequencies, rope.amplitude]).all():
        raise ValueError(f"rope_type = {kind!r} has frequencies that are not finite: {settings}")
    return rope


def _make(kind: str, settings: Mapping[str, Any], head_dim: int, max_positions: int) -> Rope:
    size = int(head_dim * (settings.get("partial_rotary_factor") or 1.0))
    base = np.float32(float(settings.get("rope_theta") or 10_000.0))
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    plain = (np.float32(1.0) / base**exponents).astype(np.float32)
    frequencies, amplitude, bound = plain, 1.0, None
    if kind == "linear":
        frequencies = plain / np.float32(settings["factor"])
    elif kind == "llama3":
        frequencies = _llama3(plain, settings)
    elif kind == "yarn":
        frequencies, amplitude = _yarn(plain, float(base), size, settings)
    elif kind == "longrope":
        bound = int(settings["original_max_position_embeddings"])
        short = np.asarray(settings["short_factor"], np.float32)
        if short.shape != plain.shape:
            raise ValueError(f"short_factor has {short.size} entries, {plain.size} are needed")
        frequencies = (np.float32(1.0) / (short * base**exponents)).astype(np.float32)
        factor = settings.get("factor") or max_positions / bound
        amplitude = settings.get("attention_factor") or (
            math.sqrt(1 + math.log(factor) / math.log(bound)) if factor > 1.0 else 1.0
        )
    return Rope(tuple(frequencies.tolist()), float(amplitude), bound)


def _llama3(plain: np.ndarray, settings: Mapping[str, Any]) -> np.ndarray:
    """Long waves are stretched by `factor`, short ones kept, those between interpolated."""
    factor, length = settings["factor"], settings["original_max_position_embeddings"]
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    wavelength = 2 * np.float32(math.pi) / plain
    share = (length / wavelength - low) / (high - low)
    between = (1 - share) * plain / factor + share * plain
    stretched = np.where(wavelength > length / low, plain / factor, between)
    return np.where(wavelength < length / high, plain, stretched).astype(np.float32)


def _yarn(
    plain: np.ndarray, base: float, size: int, settings: Mapping[str, Any]
) -> tuple[np.ndarray, float]:
    """Peng et al. 2023, arXiv:2309.00071: dimensions that turn often are kept, the rest stretched,
    with a linear ramp between, and attention sharpened by the amplitude."""
    factor, length = settings["factor"], settings["original_max_position_embeddings"]

    def dimension(turns: float) -> float:
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(settings.get("beta_fast") or 32)
    high = dimension(settings.get("beta_slow") or 1)
    if settings.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    high = high if high != low else high + 0.001
    ramp = np.clip((np.arange(size // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    frequencies = (plain / factor * ramp + plain * (1 - ramp)).astype(np.float32)

    def mscale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    amplitude = settings.get("attention_factor")
    if amplitude is None:
        one, all_dims = settings.get("mscale"), settings.get("mscale_all_dim")
        amplitude = mscale(one) / mscale(all_dims) if one and all_dims else mscale(1.0)
    return frequencies, amplitude
