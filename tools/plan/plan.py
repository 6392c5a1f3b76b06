"""Puts a plan together: compile, estimate, and where it does not fit, try what would."""

import dataclasses
import math
from typing import Any

import jax

from jaxrl.config import Config
from jaxrl.learner import check_lengths, open_reference
from jaxrl.mesh import param_shardings
from jaxrl.model_dir import find_model
from jaxrl.models.config import load_config
from jaxrl.models.params import leaf_at, param_specs
from jaxrl.optimizer import HOST
from jaxrl.settings import revise
from tools.plan import report
from tools.plan.estimate import (
    DELTA_SHARE,
    Pools,
    Roofline,
    Sizes,
    Traffic,
    model_flops,
    pools,
    publish_seconds,
    roofline,
    sizes,
    traffic,
)
from tools.plan.program import (
    Compiled,
    Refused,
    Setup,
    TooLarge,
    compile_export,
    compile_update,
    prepare,
    version_bytes,
)
from tools.plan.report import Line, Section, flops, gb, gib, rate, seconds
from tools.plan.topology import Target, larger, mesh_axes


@dataclasses.dataclass(frozen=True)
class Plan:
    fits: bool
    text: str
    record: dict[str, Any]


def make_plan(c: Config, target: Target, options: Any) -> Plan:
    """`options`: link_gbps, engine_tokens_per_s and no_advice of the command line."""
    decoder = load_config(find_model(c.model.path), c.model.ignore_config_fields)
    check_lengths(c, decoder)
    setup = prepare(c, decoder, target)
    update, export = compile_update(setup, target), compile_export(setup)
    state = _bytes(setup.state)
    size = sizes(c, decoder, setup.specs, setup.trained, state, setup.batch)
    held = _held_beside(setup, target)
    kept = sum(held.values())
    fits = does_fit(update, target, kept) and does_fit(export, target, kept)
    sections = [_what(setup, target, size), _memory(setup, target, update, export, held)]
    step = None
    if isinstance(update, Compiled):
        moves = traffic(update.cost.collectives, mesh_axes(c), target.chip)
        if target.chip is not None:
            step = roofline(update.cost, moves, target.chip)
        sections += [_work(setup, target, update, moves, step), _collectives(moves)]
    sections.append(_outside(size, options.link_gbps, c))
    if step is not None:
        publish = publish_seconds(c, size.publish, options.link_gbps) or 0.0
        updates = c.algorithm.steps_per_batch * step.step
        both = pools(c, updates, publish, options.engine_tokens_per_s)
        sections.append(_pools(both, size, c))
    if not fits:
        sections.append(_advice(setup, target, options, update, export, kept))
    record = {"fits": fits, "target": target.name} | report.record(sections)
    return Plan(fits, report.table(sections), record)


def does_fit(program: Compiled | TooLarge, target: Target, kept: int = 0) -> bool:
    """`kept`: bytes of a device that hold something else all the time."""
    if isinstance(program, TooLarge):
        return False
    return target.memory_bytes is None or program.peak + kept <= target.memory_bytes


def _held_beside(setup: Setup, target: Target) -> dict[str, int]:
    """Bytes of a device, by what lies there all the time, beside the state."""
    c, held = setup.config, {}
    compares = {"mesh": True, "host": False, "auto": target.platform != "cpu"}[c.publish.compare]
    compares &= c.publish.encoding == "delta" and c.rollout.engine == "vllm"
    if compares:
        text = "the last version, to take differences from (publish.compare)"
        held[text] = version_bytes(setup)
    algorithm, width = c.algorithm, setup.policy.compute_dtype.itemsize
    if algorithm.reference is not None:
        specs = param_specs(open_reference(c)[1])
        shardings = param_shardings(specs, setup.mesh)
        held["the reference policy (algorithm.reference)"] = width * sum(
            math.prod(leaf_at(shardings, path).shard_shape(spec.shape))
            for path, spec in specs.items()
        )
    elif algorithm.kl_coefficient and not (algorithm.reference_every or c.lora.rank):
        text = "the reference policy (algorithm.kl_coefficient)"
        held[text] = _local_bytes(setup.state.params) * width // 4
    return held


def _what(setup: Setup, target: Target, size: Sizes) -> Section:
    B, T = setup.batch.tokens_BT.shape
    C = setup.batch.targets_BC.shape[1]
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh_axes(setup.config).items() if n > 1)
    full = (setup.batch.group_BT > 0).mean()
    active = (
        f" ({size.active_parameters / 1e9:.3g} B active)" if setup.decoder.moe is not None else ""
    )
    return Section(
        "run",
        [
            Line(
                "policy",
                f"{setup.config.model.path}: {size.parameters / 1e9:.3g} B parameters{active}, "
                f"{setup.policy.compute_dtype!s} products",
                {"parameters": size.parameters, "active_parameters": size.active_parameters},
            ),
            Line(
                "devices",
                f"{target.name}: {target.chips} chips, mesh {axes or 'of one device'}",
                {"devices": len(target.devices)},
            ),
            Line(
                "batch at its limits",
                f"{B} rows of {T} tokens, {C} of them sampled at most; {full:.0%} of the slots",
                {"rows": B, "row_tokens": T, "sampled": C, "full": float(full)},
            ),
        ],
    )


def _memory(
    setup: Setup,
    target: Target,
    update: Compiled | TooLarge,
    export: Compiled | TooLarge,
    held: dict[str, int],
) -> Section:
    """Of each device. The export runs while the whole state is there."""
    lines, kept = [], sum(held.values())
    for name, program in (("update", update), ("export", export)):
        if isinstance(program, TooLarge):
            wanted = gib(program.wanted) if program.wanted else "more than there is"
            lines.append(
                Line(
                    name,
                    f"DOES NOT FIT: XLA wants {wanted}, compiled for {program.seconds:.0f} s",
                    {"wanted_bytes": program.wanted, "message": program.message},
                )
            )
            continue
        verdict = "" if does_fit(program, target, kept) else "  DOES NOT FIT"
        lines.append(
            Line(
                name,
                f"{gib(program.peak)} at the peak: arguments {gib(program.arguments)}, outputs "
                f"{gib(program.outputs)} ({gib(program.aliased)} in their place), temporaries "
                f"{gib(program.temporaries)}, code {gib(program.code)}{verdict}",
                {
                    "peak_bytes": program.peak,
                    "argument_bytes": program.arguments,
                    "output_bytes": program.outputs,
                    "alias_bytes": program.aliased,
                    "temp_bytes": program.temporaries,
                    "code_bytes": program.code,
                    "compile_s": program.seconds,
                },
            )
        )
    lines += _state(setup)
    if kept:
        lines.append(Line("kept", f"{gib(kept)}: {', and '.join(held)}", {"bytes": kept}))
    have = target.memory_bytes
    text = "not known here" if have is None else gib(have)
    lines.append(Line("a device has", text, {"bytes": have}))
    return Section("memory of a device", lines)


def _state(setup: Setup) -> list[Line]:
    """What lies on a device between steps, and what of it on the hosts (optimizer.offload)."""
    state = setup.state
    hosted = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind == HOST]
    beside = [x for x in jax.tree.leaves(state) if x.sharding.memory_kind != HOST]
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    share, far = _local_bytes(beside), _local_bytes(hosted)
    what = f"parameters, {_dtypes(jax.tree.leaves(state.params))}"
    if not hosted:
        what = f"parameters and optimizer, {_dtypes([*jax.tree.leaves(state.params), *moments])}"
    if state.reference is not None:
        what += ", and the reference policy (algorithm.reference_every)"
    lines = [Line("state", f"{gib(share)}: {what}", {"bytes": share})]
    if hosted:
        text = f"{gib(far)} for each device: optimizer, {_dtypes(hosted)} (optimizer.offload)"
        lines.append(Line("on the hosts", text, {"bytes": far}))
    return lines


def _work(
    setup: Setup, target: Target, update: Compiled, moves: list[Traffic], step: Roofline | None
) -> Section:
    cost, n = update.cost, len(target.devices)
    needed = model_flops(setup.decoder, setup.specs, setup.trained, setup.batch)
    compiled = (cost.matmul_flops + cost.kernel_flops) * n
    lines = [
        Line(
            "model FLOPs",
            f"{flops(needed.total)}: matrices {flops(needed.matrices)}, attention "
            f"{flops(needed.attention)}, head {flops(needed.head)}",
            dataclasses.asdict(needed) | {"total": needed.total},
        ),
        Line(
            "compiled FLOPs",
            f"{flops(compiled)}, {compiled / needed.total:.2f} of the model's; of them "
            f"{flops(cost.kernel_flops * n)} in kernels"
            + f"; {cost.kernels_without_flops} kernels not counted"
            * bool(cost.kernels_without_flops),
            {
                "total": compiled,
                "kernels": cost.kernel_flops * n,
                "kernels_not_counted": cost.kernels_without_flops,
                "xla_loop_bodies_once": update.xla_flops * n,
                "ratio": compiled / needed.total,
            },
        ),
        Line("HBM traffic", f"{gb(cost.hbm_bytes)} a device", {"bytes": cost.hbm_bytes}),
    ]
    if cost.unknown_loops:
        lines.append(Line("loops counted once", ", ".join(cost.unknown_loops)))
    if step is None or target.chip is None:
        lines.append(Line("step", "no estimate: this device's speed is not known here"))
        return Section("work of an update", lines)
    mfu = needed.total / (step.step * n * target.chip.flops)
    real = int((setup.batch.group_BT > 0).sum())
    lines += [
        Line(
            "step, at the least",
            f"{seconds(step.step)}: compute {seconds(step.compute)}, HBM {seconds(step.memory)}, "
            f"interconnect {seconds(step.overlapped)} hidden and {seconds(step.exposed)} not; "
            f"bound by {step.bound}",
            dataclasses.asdict(step) | {"step_s": step.step, "bound": step.bound},
        ),
        Line("MFU, at the most", f"{mfu:.0%}", {"mfu": mfu}),
        Line("tokens/s, at the most", rate(real / step.step), {"value": real / step.step}),
        Line("compiled in", f"{update.seconds:.0f} s", {"seconds": update.seconds}),
    ]
    return Section("work of an update", lines)


def _collectives(moves: list[Traffic]) -> Section:
    lines = [
        Line(
            f"{one.kind} over {one.over}" + ("" if one.overlapped else ", exposed"),
            f"{one.count:,} x, {gb(one.bytes)}; {gb(one.wire_bytes)} sent by each device"
            + ("" if one.seconds is None else f", {seconds(one.seconds)}"),
            {
                "kind": one.kind,
                "axes": list(one.axes),
                "overlapped": one.overlapped,
                "count": one.count,
                "bytes": one.bytes,
                "wire_bytes": one.wire_bytes,
                "seconds": one.seconds,
                "largest": one.largest,
            },
        )
        for one in moves
    ]
    return Section("collectives of an update", lines or [Line("none", "")])


def _outside(size: Sizes, link_gbps: float | None, c: Config) -> Section:
    publish = gb(size.publish)
    took = publish_seconds(c, size.publish, link_gbps)
    delta = publish_seconds(c, DELTA_SHARE * size.publish, link_gbps)
    if took is not None and delta is not None:
        publish += (
            f", {seconds(took)} over {link_gbps:g} Gbit/s to all engines; as a difference, where "
            f"1 % of the values changed, {seconds(delta)}"
        )
    else:
        publish += "; its time needs --link-gbps"
    if size.publish_once:
        publish += f"; once, ahead of the first, {gb(size.publish_once)} of frozen weights"
    return Section(
        "outside the devices",
        [
            Line("checkpoint", gb(size.checkpoint), {"bytes": size.checkpoint}),
            Line(
                f"publish, {c.wire_dtype}",
                publish,
                {
                    "bytes": size.publish,
                    "seconds": took,
                    "delta_seconds": delta,
                    "once_bytes": size.publish_once,
                },
            ),
            Line(
                "driver's memory",
                f"{gb(size.host)}: {c.publish.keep_versions} versions kept, one on its way"
                f"{' and one to take differences from' * (c.publish.encoding == 'delta')}, and a "
                f"packed batch of {gb(size.batch)}",
                {"bytes": size.host, "batch_bytes": size.batch},
            ),
        ],
    )


def _pools(both: Pools, size: Sizes, c: Config) -> Section:
    needed = both.needed_tokens_per_s
    lines = [
        Line(
            "KV cache",
            f"{gb(size.kv_token)} a token; {gib(size.kv_engine)} an engine for "
            f"{c.vllm.max_num_seqs} completions at full length",
            {"token_bytes": size.kv_token, "engine_bytes": size.kv_engine},
        ),
        Line(
            "to keep the trainer busy",
            f"{rate(both.completions / both.train_s)} completions/s, {rate(needed)} tokens/s from "
            f"all engines; {rate(needed / both.engines)} from each of {both.engines}",
            {
                "completions_per_s": both.completions / both.train_s,
                "tokens_per_s": needed,
                "tokens_per_s_of_each": needed / both.engines,
            },
        ),
    ]
    if both.needed_engines is None:
        lines.append(Line("engines needed", "give --engine-tokens-per-s, what one engine samples"))
        return Section("trainer and engines", lines)
    lines.append(
        Line(
            "engines needed",
            f"{both.needed_engines} at {rate(both.engine_tokens_per_s or 0)} tokens/s each",
            {"engines": both.needed_engines},
        )
    )
    for lag, name in ((0, "max_lag 0, they alternate"), (1, "max_lag 1 or more")):
        found = both.idle(lag)
        assert found is not None
        cycle, trainer, engines = found
        lines.append(
            Line(
                name,
                f"a step takes {seconds(cycle)}; idle: trainer {trainer:.0%}, engines "
                f"{engines:.0%}",
                {"step_s": cycle, "trainer_idle": trainer, "engines_idle": engines},
            )
        )
    return Section("trainer and engines", lines)


def _advice(
    setup: Setup,
    target: Target,
    options: Any,
    update: Compiled | TooLarge,
    export: Compiled | TooLarge,
    kept: int,
) -> Section:
    """What to change, most harmless first; the first change that is seen to fit ends the search.

    The changes are of the update, and leave the export as it is.
    """
    lines: list[Line] = []
    c, exports = setup.config, does_fit(export, target, kept)
    updates = does_fit(update, target, kept)
    for change in [] if updates else _changes(setup):
        c = revise(c, change)
        keys = " ".join(f"--{key} {str(value).lower()}" for key, value in change.items())
        if options.no_advice:
            lines.append(Line("not tried", keys, {"change": change}))
            continue
        try:
            tried = compile_update(prepare(c, setup.decoder, target), target)
        except Refused as error:
            lines.append(Line("refused", f"{keys}: {error}", {"change": change, "fits": False}))
            continue
        enough = does_fit(tried, target, kept)
        if isinstance(tried, Compiled):
            found = gib(tried.peak)
        else:
            found = f"XLA wants {gib(tried.wanted) if tried.wanted else 'more than there is'}"
        fits = enough and exports
        name = "fits (compiled)" if fits else "not enough (compiled)"
        found += ", but not the export" * (enough and not exports)
        lines.append(Line(name, f"{keys}: {found}", {"change": change, "fits": fits}))
        if fits:
            return Section("what to change", lines)
        if enough:
            break
    directions = [
        *[f"more chips, {name}, and mesh.fsdp with them" for name in larger(target.name)][:1],
        *["smaller parts of an export: publish.bucket_mib"] * (not exports),
        *[
            "shorter rows: data.max_prompt_tokens, rollout.max_new_tokens, update.row_tokens",
            "fewer logits at a time: update.logits_mib",
        ]
        * (not updates),
        "fewer trained weights: lora.rank",
    ]
    lines += [Line("not tried", direction) for direction in directions]
    return Section("what to change", lines)


def _changes(setup: Setup) -> list[dict[str, Any]]:
    """Each on top of those before it."""
    from jaxrl.mesh import row_shards
    from jaxrl.update import microbatch_tokens

    found: list[dict[str, Any]] = []
    c, (B, T) = setup.config, setup.batch.tokens_BT.shape
    if setup.policy.remat != "full":
        found.append({"model.remat": "full"})
    least = T * row_shards(setup.mesh)
    if least < min(B * T, microbatch_tokens(c.update, setup.mesh)):
        found.append({"update.max_tokens_per_microbatch": least})
    return found


def _dtypes(leaves: list[Any]) -> str:
    return " and ".join(sorted({str(x.dtype) for x in leaves if x.ndim}, reverse=True))


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _local_bytes(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
