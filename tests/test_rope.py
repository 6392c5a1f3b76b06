"""Every kind of rotary embedding turns by the angles that transformers turns by."""

import itertools

import numpy as np
import pytest
from transformers import LlamaConfig, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from jaxrl.models.rope import KINDS, make_rope

MAX_POSITIONS = 4096


def reference(settings: dict, head_dim: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies and amplitude, by transformers."""
    config: PreTrainedConfig = LlamaConfig(
        hidden_size=4 * head_dim,
        num_attention_heads=4,
        head_dim=head_dim,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters=dict(settings),
    )
    if settings["rope_type"] == "default":
        frequencies, amplitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, amplitude = ROPE_INIT_FUNCTIONS[settings["rope_type"]](config, device=None)
    return frequencies.numpy(), float(amplitude)


def drawn(kind: str, seed: int) -> tuple[dict, int]:
    """Settings of a kind, and a head size; optional keys come and go."""
    rng = np.random.default_rng(seed)
    head_dim = int(rng.choice([8, 32, 64, 128]))
    settings = {"rope_type": kind, "rope_theta": float(rng.choice([500.0, 1e4, 5e5, 1e6]))}
    size = head_dim
    if kind in ("yarn", "longrope", "linear", "llama3") and seed % 3 == 0:
        settings["partial_rotary_factor"] = 0.5 if head_dim == 8 else 0.75
        size = int(head_dim * settings["partial_rotary_factor"])
    if kind in ("linear", "llama3", "yarn"):
        settings["factor"] = float(rng.choice([1.0, 2.0, 8.0, 32.0]))
    if kind in ("llama3", "yarn", "longrope"):
        settings["original_max_position_embeddings"] = int(rng.choice([64, 1024, MAX_POSITIONS]))
    if kind == "llama3":
        settings |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))}
    if kind == "yarn":
        if seed % 2:
            settings |= {"beta_fast": float(rng.integers(8, 64)), "beta_slow": 1.5}
        if seed % 4 == 1:
            settings["truncate"] = False
        if seed % 5 == 1:
            settings["attention_factor"] = 1.25
        if seed % 5 == 2:
            settings |= {"mscale": 0.7, "mscale_all_dim": 1.3}
    if kind == "longrope":
        settings["short_factor"] = (1 + rng.random(size // 2)).tolist()
        settings["long_factor"] = (4 + rng.random(size // 2)).tolist()
        if seed % 2:
            settings["factor"] = float(rng.choice([0.5, 4.0]))
        if seed % 5 == 1:
            settings["attention_factor"] = 1.25
    return settings, head_dim


@pytest.mark.parametrize("kind", KINDS)
def test_frequencies_and_amplitude_are_those_of_transformers(kind):
    found = set()
    for seed in range(40):
        settings, head_dim = drawn(kind, seed)
        ours = make_rope(settings, head_dim, MAX_POSITIONS)
        frequencies, amplitude = reference(settings, head_dim)
        size = 2 * len(frequencies)
        plain = settings["rope_theta"] ** -(np.arange(0, size, 2) / size)
        # llama3 takes differences of numbers as large as the plain frequency.
        scale = np.maximum(frequencies, plain) if kind == "llama3" else frequencies
        assert (np.abs(np.array(ours.frequencies) - frequencies) <= 5e-7 * scale).all(), settings
        assert ours.amplitude == pytest.approx(amplitude, rel=1e-6), settings
        original = settings.get("original_max_position_embeddings")
        assert ours.max_positions == (original if kind == "longrope" else None)
        found.add((ours.frequencies, ours.amplitude))
    assert len(found) > 8  # the settings were not all alike


def test_at_a_distant_position_the_angle_is_still_that_of_transformers():
    """A rounding of the frequency is an angle at position 100,000: none may be larger than one of
    float32 itself is."""
    for theta, size in itertools.product((1e4, 5e5, 1e6), (64, 128)):
        settings = {"rope_type": "default", "rope_theta": theta}
        ours = np.array(make_rope(settings, size, MAX_POSITIONS).frequencies)
        theirs, _ = reference(settings, size)
        assert np.abs(100_000 * (ours - theirs.astype(np.float64))).max() < 0.02


@pytest.mark.parametrize("empty", [{}, {"rope_type": None}, {"rope_type": "default"}])
def test_where_nothing_is_said_the_base_is_10_000_and_nothing_is_scaled(empty):
    rope = make_rope(empty | {"rope_theta": None, "partial_rotary_factor": None}, 8, MAX_POSITIONS)
    assert rope.frequencies == pytest.approx((1.0, 0.1, 0.01, 0.001), rel=1e-6)
    assert (rope.amplitude, rope.max_positions) == (1.0, None)


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_every_key_that_a_kind_needs_is_named_when_it_is_missing(kind):
    settings, head_dim = drawn(kind, seed=4)
    optional = {"rope_type", "rope_theta", "long_factor"}
    for key in settings.keys() - optional:
        with pytest.raises(ValueError, match=f"needs {key}"):
            make_rope(settings | {key: None}, head_dim, MAX_POSITIONS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_its_kind_does_not_read_is_named(kind):
    settings, head_dim = drawn(kind, seed=4)
    with pytest.raises(ValueError, match="does not read mrope_section"):
        make_rope(settings | {"mrope_section": [1, 2]}, head_dim, MAX_POSITIONS)


def test_a_kind_that_is_not_known_is_named_beside_those_that_are():
    with pytest.raises(ValueError, match="'dynamic' is not one of default, linear, llama3"):
        make_rope({"rope_type": "dynamic", "factor": 2.0}, 8, MAX_POSITIONS)
