"""Times the parts of a step on this machine; docs/benchmarks.md records the results.

    python -m tools.bench update     one optimizer step: the gradient as it is, and its alternatives
    python -m tools.bench sampler    the in-process engine beside one vLLM engine, the same prompts

Times drift with the machine, so every table is of one run and its ratios are what counts.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.model_dir import engine_files
from jaxrl.models.config import load_config
from jaxrl.types import Prompt, Sampling

DEMO_DIR = Path("configs/tiny_policy")
DEMO = load_config(DEMO_DIR)


def main() -> None:
    parser = argparse.ArgumentParser(description="Times the parts of a step on this machine")
    parser.add_argument("what", choices=["update", "sampler"])
    {"update": bench_update, "sampler": bench_sampler}[parser.parse_args().what]()


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int = 7) -> None:
    """Prints the median seconds of each case, timed in turn, and the ratio to the first."""
    for run in cases.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, run in cases.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:44s} {median:8.4f} s   {median / first:5.2f} x")


def bench_update() -> None:
    """The gradient of 512 rows of 16 tokens, the demo's batch."""
    import jax
    import jax.numpy as jnp

    from jaxrl.losses import token_logprobs
    from jaxrl.models import decoder

    rows, length = 512, 16
    tokens_BT = (
        np.random.default_rng(0).integers(0, DEMO.vocab_size, (rows, length)).astype(np.int32)
    )
    params = decoder.init_params(DEMO, jax.random.key(0))

    def einsum(x, w, inputs=1, dtype=None):
        """`decoder.project` as one contraction of the unflattened axes."""
        y = jnp.tensordot(x, w, axes=(tuple(range(-inputs, 0)), tuple(range(inputs))))
        return y if dtype is None else y.astype(dtype)

    def gradient(remat: bool, project: Callable) -> Callable[[], Any]:
        policy = decoder.Policy(DEMO, jnp.float32, remat)

        def loss(params: Any) -> jax.Array:
            return token_logprobs(policy.logits(params, tokens_BT), tokens_BT, 1.0)[0].sum()

        ours, decoder.project = decoder.project, project
        try:  # traced here, once, with the projection that is to be timed
            compiled = jax.jit(jax.grad(loss)).lower(params).compile()
        finally:
            decoder.project = ours
        return lambda: jax.block_until_ready(compiled(params))

    interleaved(
        {
            "as it is: matrix products, remat": gradient(True, decoder.project),
            "matrix products, activations kept": gradient(False, decoder.project),
            "contractions, remat": gradient(True, einsum),
            "contractions, activations kept": gradient(False, einsum),
        }
    )


def bench_sampler() -> None:
    """Prompts of 16 tokens, 32 new tokens each, float32, random weights, no stop token."""
    import tempfile

    # vLLM's engine and Ray start before jax.
    from bridge.channels.shuttle import ShuttleChannel
    from bridge.engines.vllm import EngineSettings
    from bridge.fleet import Fleet, FleetSettings
    from bridge.names import expected_tensors
    from jaxrl.models.params import param_specs

    specs = param_specs(DEMO)
    expected = expected_tensors(specs, "float32")
    settings = EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=256,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
    )
    fleet = Fleet(FleetSettings(engines=1), settings, engine_files(DEMO_DIR), expected)
    fleet.start()
    try:
        import jax
        import jax.numpy as jnp

        from bridge.export import make_exporter
        from bridge.publisher import Publisher
        from jaxrl.models.decoder import Policy, init_params
        from jaxrl.sampler import InProcessEngine, make_score

        policy = Policy(DEMO, jnp.dtype("float32"))
        params = init_params(DEMO, jax.random.key(0))
        inprocess = InProcessEngine(policy)
        inprocess.publish(params, 1)
        fleet.wait_ready()
        with tempfile.TemporaryDirectory() as folder:
            publisher = Publisher(
                make_exporter(specs, "float32"),
                ShuttleChannel(Path(folder)),
                fleet,
                make_score(policy),
                probe=range(1, 9),
                probe_tolerance=1e-4,
                bucket_bytes=1 << 28,
                warn=print,
            )
            publisher.publish(params, 1)
            rng = np.random.default_rng(0)
            for prompts, n in ((1, 1), (1, 8), (8, 8), (32, 8)):
                asked = [
                    Prompt(i, "", tuple(rng.integers(1, DEMO.vocab_size, 16).tolist()), {})
                    for i in range(prompts)
                ]
                sampling = Sampling(n, 32, 1.0, ())
                seeds = [8 * i for i in range(prompts)]
                print(f"{prompts} prompts x {n} completions x 32 tokens")
                interleaved(
                    {
                        "vLLM": functools.partial(fleet.generate, asked, sampling, seeds),
                        "in-process": functools.partial(inprocess.generate, asked, sampling, seeds),
                    }
                )
    finally:
        fleet.close()


if __name__ == "__main__":
    main()
