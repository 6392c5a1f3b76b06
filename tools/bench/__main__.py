"""Times a step of GRPO and its parts on this machine; docs/benchmarks.md records the results.

    python -m tools.bench train       the update                   [--size s|m] [--new 32] ...
    python -m tools.bench sample      the in-process engine, tokens/s
    python -m tools.bench logprobs    log-probs of every token, forward alone
    python -m tools.bench step        rollouts, advantages, packing, update, publish
    python -m tools.bench loss        what each policy loss adds to the update
    python -m tools.bench update      the gradient of the demo: how it is computed, and how rows lie
    python -m tools.bench sampler     the in-process engine beside one vLLM engine
    python -m tools.bench convert     files -> sharded parameters, and tensors -> files
    python -m tools.bench publish     parameters -> both channels -> staged in --workers
    python -m tools.bench load        a version -> a vLLM engine, beside vLLM's reload of its own
    python -m tools.bench fleet       the engines: beside vLLM, shared prompts, recovery, modes
    python -m tools.bench delta       what changed in a tensor: compared, packed, applied, merged

The first five do a fixed work, float32 on CPU, from random weights: `--prompts` prompts of
`--prompt-tokens` tokens, `--group` completions of each, of `--new` tokens (`--ragged`: of 1 to
--new), on the devices of `--mesh`. Times drift with the machine: each is the median of several,
between measurements of a plain matrix product, and what counts is the ratio.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from jaxrl.cpu import divide_cpu
from jaxrl.types import UserError
from tools.mesh_option import parse_mesh
from tools.options import check_file, count

FIXED = ("train", "sample", "logprobs", "step", "loss")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench", description="Times a step of GRPO and its parts here"
    )
    add = parser.add_argument
    add(
        "what",
        choices=[*FIXED, "update", "sampler", "convert", "publish", "load", "delta", "fleet"],
    )
    add("--size", choices=["s", "m"], default="s", help="s: 4 layers of 256; m: 8 layers of 512")
    add("--prompts", type=count, default=8)
    add("--prompt-tokens", type=count, default=16)
    add("--group", type=count, default=8, help="completions of each prompt")
    add("--new", type=count, default=32, help="tokens of a completion")
    add("--ragged", action="store_true", help="completions of 1 to --new tokens")
    add("--repeat", type=count, default=7, help="measurements, after one to warm up")
    add("--json", type=Path, metavar="FILE", help="write the numbers there as well")
    add(
        "--gigabytes",
        type=_above_0,
        help="of bfloat16 weights; convert: 4, publish and load: 1, delta: 0.5",
    )
    add("--workers", type=count, default=1, help="publish: that stage each version")
    add(
        "--held",
        choices=["float32", "bfloat16"],
        default="float32",
        help="publish: dtype of the parameters",
    )
    add("--far", action="store_true", help="publish: workers on a Ray node of their own")
    add(
        "--device-gbs",
        type=_above_0,
        metavar="GB/S",
        help="publish: parameters come to the host no faster than this",
    )
    add("--bucket-mib", type=count, default=256, help="publish: of a buffer on the wire")
    add(
        "--channels",
        nargs="+",
        choices=["object_store", "shuttle"],
        default=["object_store", "shuttle"],
        help="publish: through these",
    )
    add("--files", type=count, default=4, help="convert: that hold the weights")
    add(
        "--mesh",
        type=parse_mesh,
        default="data=1",
        metavar="data=2",
        help="of the first five and of convert: sizes by name; a CPU is divided",
    )
    options = parser.parse_args()
    if options.json is not None and options.what not in FIXED:
        parser.error(f"--json is for {', '.join(FIXED)}")
    try:
        if options.what == "delta":
            from tools.bench.delta import bench_delta

            bench_delta(round((options.gigabytes or 0.5) * 1e9 / 2))
            return 0
        if options.what == "publish":
            from tools.bench.publish import bench_publish

            bench_publish(
                options.gigabytes or 1,
                options.workers,
                options.held,
                options.bucket_mib << 20,
                options.channels,
                options.repeat,
                options.far,
                options.device_gbs,
            )
            return 0
        if options.what == "load":
            from tools.bench.load import bench_load

            bench_load(options.gigabytes or 1, options.repeat)
            return 0
        if options.what == "fleet":
            from tools.bench.fleet import bench_fleet

            bench_fleet(options.repeat)
            return 0
        if options.what not in FIXED:
            from tools.bench import parts

            if options.what == "convert":
                parts.bench_convert(options.gigabytes or 4, options.files, options.mesh)
            else:
                {"update": parts.bench_update, "sampler": parts.bench_sampler}[options.what]()
            return 0
        if options.json is not None:
            check_file("--json", options.json)
        from tools.bench.work import Work, bench

        divide_cpu(options.mesh.devices)
        work = Work(
            options.size,
            options.prompts,
            options.prompt_tokens,
            options.group,
            options.new,
            options.ragged,
            options.mesh,
        )
        if options.what == "loss":
            from tools.bench.loss import bench_loss

            record = bench_loss(work, options.repeat)
        else:
            record = bench(options.what, work, options.repeat)
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=2) + "\n")
        return 0
    except UserError as error:
        print(f"tools.bench: {error}", file=sys.stderr)
        return 2


def _above_0(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0, or not finite")
    return number


if __name__ == "__main__":
    sys.exit(main())
