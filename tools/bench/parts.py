"""Times the parts of a step beside their alternatives; see `tools.bench`."""

import dataclasses
import functools
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.config import MeshSection
from jaxrl.cpu import divide_cpu
from jaxrl.model_dir import engine_files
from jaxrl.models.config import load_config
from jaxrl.models.params import param_specs
from jaxrl.types import Prompt, Sampling
from tools.bench.timing import in_turn

DEMO_DIR = Path("configs/tiny_policy")
DEMO = load_config(DEMO_DIR)


def interleaved(cases: dict[str, Callable[[], Any]], rounds: int = 7) -> None:
    """Prints the median seconds of each case, timed in turn, and the ratio to the first."""
    medians = in_turn(cases, rounds)
    first = next(iter(medians.values()))
    for name, median in medians.items():
        print(f"{name:44s} {median:8.4f} s   {median / first:5.2f} x")


def bench_update() -> None:
    """The gradient of 512 rows of 16 tokens, the demo's batch; then the layouts of rows."""
    import jax
    import jax.numpy as jnp

    from jaxrl.models import decoder

    rows, length = 512, 16
    tokens_BT = (
        np.random.default_rng(0).integers(0, DEMO.vocab_size, (rows, length)).astype(np.int32)
    )
    params = decoder.init_params(param_specs(DEMO), jax.random.key(0))

    def einsum(x, w, inputs=1, dtype=None):
        """`decoder.project` as one contraction of the unflattened axes."""
        y = jnp.tensordot(x, w, axes=[tuple(range(-inputs, 0))] * 2)
        return y if dtype is None else y.astype(dtype)

    def gradient(remat: str, project: Callable) -> Callable[[], Any]:
        policy = decoder.Policy(DEMO, jnp.float32, remat)
        ours, decoder.project = decoder.project, project
        try:  # traced here, once, with the projection that is to be timed
            compiled = jax.jit(jax.grad(_one_a_row(policy, tokens_BT))).lower(params).compile()
        finally:
            decoder.project = ours
        return lambda: jax.block_until_ready(compiled(params))

    interleaved(
        {
            "matrix products, remat": gradient("full", decoder.project),
            "matrix products, activations kept": gradient("none", decoder.project),
            "contractions, remat": gradient("full", einsum),
            "contractions, activations kept": gradient("none", einsum),
        }
    )
    wide = dataclasses.replace(
        DEMO, vocab_size=512, hidden_size=256, intermediate_size=1024, num_layers=4, num_heads=8
    )
    print("\nthe demo: 64 prompts of 6 tokens, 8 completions of 3 to 5")
    _bench_layouts(DEMO, prompts=64, prompt_tokens=6, lengths=(3, 5), rounds=7)
    print("\n1 prompt of 1,000 tokens, 8 completions of 64; hidden 256, 4 layers")
    _bench_layouts(wide, prompts=1, prompt_tokens=1000, lengths=(64, 64), rounds=2)


def _one_a_row(policy: Any, tokens_BT: np.ndarray) -> Callable[[Any], Any]:
    """total(params): the log-probs of every token of right-padded rows."""
    from jaxrl.logprobs import token_logprobs

    def total(params: Any) -> Any:
        hidden_BSD = policy.hidden_of_rows(params, tokens_BT)[:, :-1]
        unembed = functools.partial(policy.unembed, params)
        return token_logprobs(hidden_BSD, unembed, tokens_BT[:, 1:], 1.0)[0].sum()

    return total


def _bench_layouts(
    model: Any, prompts: int, prompt_tokens: int, lengths: tuple[int, int], rounds: int
) -> None:
    """One completion a row, with logits of every token, against packed rows; XLA's FLOPs too."""
    import jax
    import jax.numpy as jnp

    from jaxrl.config import UpdateSection
    from jaxrl.models.decoder import Policy, init_params
    from jaxrl.packing import pack, row_length
    from jaxrl.types import Group, Rollout
    from jaxrl.update import score_sampled

    rng = np.random.default_rng(0)

    def rollout(i: int) -> Rollout:
        length = int(rng.integers(lengths[0], lengths[1] + 1))
        tokens = rng.integers(1, model.vocab_size, length).astype(np.int32)
        return Rollout(tokens, -np.ones(len(tokens)), np.zeros(len(tokens)), "stop", i)

    groups = [
        Group(
            Prompt(p, "", tuple(rng.integers(1, model.vocab_size, prompt_tokens).tolist()), {}),
            tuple(rollout(i) for i in range(8)),
        )
        for p in range(prompts)
    ]
    rows = [(*g.prompt.tokens, *r.tokens.tolist()) for g in groups for r in g.rollouts]
    tokens_BT = np.zeros((len(rows), row_length(max(map(len, rows)))), np.int32)
    for b, row in enumerate(rows):
        tokens_BT[b, : len(row)] = row
    policy, params = Policy(model, jnp.float32), init_params(param_specs(model), jax.random.key(0))

    def packed(c: UpdateSection) -> tuple[Callable, Any]:
        batch = pack(groups, np.ones((prompts, 8)), np.ones((prompts, 8)), c)
        return lambda params: score_sampled(policy, params, batch, 1.0)[0].sum(), batch.tokens_BT

    alone, shared = UpdateSection(share_prompts=False), UpdateSection()
    cases: dict[str, Callable[[], Any]] = {}
    for name, (total, tokens) in {
        "one completion a row": (_one_a_row(policy, tokens_BT), tokens_BT),
        "packed": packed(alone),
        "packed, prompts shared": packed(shared),
        "packed, prompts shared, rows of 32": packed(UpdateSection(row_tokens=32)),
    }.items():
        compiled = jax.jit(jax.grad(total)).lower(params).compile()
        flops = (compiled.cost_analysis() or {})["flops"]
        label = f"{name}: {tokens.shape[0]} x {tokens.shape[1]}"
        print(f"{label:44s} {flops / 1e9:8.3f} GFLOP by XLA's count")
        cases[label] = functools.partial(_finish, compiled, params)
    interleaved(cases, rounds)


def _finish(run: Callable, *arguments: Any) -> None:
    import jax

    jax.block_until_ready(run(*arguments))


def bench_sampler() -> None:
    """Prompts of 16 tokens, 32 new tokens each, float32, random weights, no stop token."""
    import tempfile

    # vLLM's engine and Ray start before jax.
    from bridge.channels.shuttle import ShuttleChannel
    from bridge.engines.vllm import EngineSettings
    from bridge.fleet import Fleet, FleetSettings
    from bridge.names import expected_tensors

    specs = param_specs(DEMO)
    expected = expected_tensors(specs, "float32")
    settings = EngineSettings(
        dtype="float32",
        max_model_len=512,
        max_num_seqs=256,
        kv_cache_bytes=64 << 20,
        enforce_eager=True,
    )
    fleet = Fleet(FleetSettings(), settings, engine_files(DEMO_DIR), expected)
    fleet.start()
    try:
        import jax
        import jax.numpy as jnp

        from bridge.export import Exporter
        from bridge.publisher import Publisher
        from jaxrl.models.decoder import Policy, init_params
        from jaxrl.sampler import InProcessEngine, make_score

        policy = Policy(DEMO, jnp.dtype("float32"))
        params = init_params(param_specs(DEMO), jax.random.key(0))
        inprocess = InProcessEngine(policy)
        inprocess.publish(params, 1)
        fleet.wait_ready()
        with tempfile.TemporaryDirectory() as folder:
            publisher = Publisher(
                Exporter(specs, "float32"),
                ShuttleChannel(Path(folder)),
                fleet,
                make_score(policy),
                probe=range(1, 9),
                probe_tolerance=1e-4,
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


def bench_convert(gigabytes: float, files: int, mesh: MeshSection) -> None:
    """Random bfloat16 weights in some files, read from the page cache and written to the disk.

    Each row is a process of its own, so that its peak memory is its own too.
    """
    import tempfile

    divide_cpu(mesh.devices)  # in the children, which are spawned; this process never loads jax
    layers = max(round((gigabytes * 1e9 / 2 - 151_936 * 2048) / 50_337_024), 1)
    nbytes = 2 * (151_936 * 2048 + layers * 50_337_024)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        print(f"{nbytes / 1e9:.2f} GB of bfloat16, {layers} layers, {files} files, mesh {mesh}")
        raw_write = _row("raw write, flushed", nbytes, _raw_write, Path(folder, "raw"), nbytes)
        _row(
            "save, SHA-256 of each tensor",
            nbytes,
            _save,
            model,
            layers,
            nbytes // files,
            base=raw_write,
        )
        _raw_read(model)
        raw_read = _row("raw read", nbytes, _raw_read, model)
        _row("fresh memory for float32, touched", nbytes, _touch, 2 * nbytes, base=raw_read)
        load = functools.partial(_row, base=raw_read)
        load("load as float32, digests checked", nbytes, _load, model, layers, mesh, "float32")
        for file in model.glob("*.safetensors"):
            _forget_digests(file)
        for dtype in ("float32", "bfloat16"):
            load(f"load as {dtype}", nbytes, _load, model, layers, mesh, dtype)


def _row(name: str, nbytes: int, run: Callable, *arguments: Any, base: float | None = None):
    """Prints GB/s of the files' bytes, the ratio to `base`, and the peak over the arrays."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        seconds, peak_ratio = pool.submit(run, *arguments).result()
    speed = nbytes / 1e9 / seconds
    ratio = f"{speed / base:5.2f} x" if base else " " * 7
    peak = f"   peak memory over the arrays: {peak_ratio:.2f} of the largest file"
    print(f"{name:36s} {speed:6.2f} GB/s   {ratio}{peak if peak_ratio else ''}")
    return speed


def _convert_specs(layers: int) -> Any:
    """Of Qwen3-1.7B, but for the depth."""
    sizes = {"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 6144}
    heads = {"num_heads": 16, "num_kv_heads": 8, "head_dim": 128}
    c = dataclasses.replace(DEMO, **sizes, **heads, num_layers=layers, tied_embeddings=True)
    return param_specs(c)


def _save(model: Path, layers: int, file_bytes: int) -> tuple[float, float]:
    from bridge.checkpoints import save_model
    from bridge.names import hf_tensors
    from bridge.wire import HostTensor

    tensors = hf_tensors(_convert_specs(layers))
    most = max(2 * int(np.prod(tensor.shape)) for tensor in tensors.values())
    # Any bits below 0x3c00, as 16-bit integers, are finite, in bfloat16 as in float16.
    data = np.random.default_rng(0).integers(0, 0x3C00, most // 2, np.uint16).view(np.uint8)
    stream = (
        HostTensor(name, "bfloat16", tensor.shape, data[: 2 * int(np.prod(tensor.shape))])
        for name, tensor in tensors.items()
    )
    start = time.perf_counter()
    save_model(stream, DEMO_DIR, model, max_shard_bytes=file_bytes + most // 8)
    return time.perf_counter() - start, 0.0


def _load(model: Path, layers: int, mesh: MeshSection, dtype: str) -> tuple[float, float]:
    import resource

    import jax

    from bridge.checkpoints import load_params
    from jaxrl.mesh import make_mesh, param_shardings

    specs = _convert_specs(layers)
    shardings = param_shardings(specs, make_mesh(mesh))
    start = time.perf_counter()
    params = load_params(model, specs, shardings, dtype)
    seconds = time.perf_counter() - start
    leaves = jax.tree.leaves(params)
    arrays = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
    largest = max(file.stat().st_size for file in model.glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return seconds, (peak - arrays) / largest


def _raw_read(model: Path) -> tuple[float, float]:
    memory = np.empty(16 << 20, np.uint8)
    start = time.perf_counter()
    for path in model.glob("*.safetensors"):
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(memory.data):
                pass
    return time.perf_counter() - start, 0.0


def _touch(nbytes: int) -> tuple[float, float]:
    """What parameters cost before they hold anything: a page fault for every page."""
    start = time.perf_counter()
    bytearray(nbytes)[::4096] = bytes(-(-nbytes // 4096))
    return time.perf_counter() - start, 0.0


def _raw_write(path: Path, nbytes: int) -> tuple[float, float]:
    memory = np.random.default_rng(0).integers(0, 255, 16 << 20, np.uint8)
    start = time.perf_counter()
    with path.open("xb", buffering=0) as stream:
        for done in range(0, nbytes, memory.nbytes):
            stream.write(memory[: nbytes - done].data)
        os.fsync(stream.fileno())
    seconds = time.perf_counter() - start
    path.unlink()
    return seconds, 0.0


def _forget_digests(path: Path) -> None:
    """Renames the key of the digests in the header: the file is as the hub's are."""
    with path.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length)
        stream.seek(8)
        stream.write(header.replace(b'"sha256":', b'"unused":', 1))
