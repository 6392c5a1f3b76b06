"""Every check: what is measured, and the limit."""

import dataclasses
import json
import traceback
from collections.abc import Callable, Iterator

import numpy as np

from bridge.names import hf_tensors
from jaxrl.config import MeshSection
from jaxrl.models.config import DecoderConfig
from jaxrl.types import RunError, UserError
from tools.verify.case import SHORTEST_ROW, Case, Skip, parameters, row_tokens
from tools.verify.compare import NEAR_TIE, difference, first_difference
from tools.verify.ours import differing, load_on, our_greedy, our_logits
from tools.verify.reference import Reference, file_digests
from tools.verify.report import Check, first_line, progress

LOGITS_LIMIT = 2e-4  # largest |difference| of float32 logits, as a share of their range
MESH_LIMIT = 1e-5  # the same, a mesh against one device
ENGINE_LIMIT = 1e-4  # nats, float32


def run(case: Case) -> Iterator[Check]:
    """Every check; one that builds on a failed one is skipped."""
    failed: set[str] = set()
    for name, check, needs in CHECKS:
        if name.startswith("engine") and not case.options.engine:
            continue
        broken = sorted(failed.intersection(needs))
        if broken:
            result = Check(name, "skipped", f"needs {', '.join(broken)}")
        else:
            progress(name)
            result = attempt(name, check, case)
        if result.status == "FAIL" or broken:
            failed.add(name)
        yield result


def attempt(name: str, check: Callable[[str, Case], Check], case: Case) -> Check:
    """The check, or its failure: one line, and those of a long error below it."""
    try:
        return check(name, case)
    except Skip as reason:
        return Check(name, "skipped", str(reason))
    except RunError as error:
        first, *rest = str(error).splitlines() or [repr(error)]
        return Check(name, "FAIL", first, details=[line.strip() for line in rest])
    except Exception as error:  # whatever a library raises is this check's result
        traceback.print_exc()
        return Check(name, "FAIL", first_line(error))


def check_config(name: str, case: Case) -> Check:
    try:
        count = parameters(case.specs)
    except UserError as error:
        text = str(error).replace(str(case.directory), str(case.options.model_dir))
        raise UserError(text.replace("model.ignore_config_fields", "--ignore-field")) from None
    raw = json.loads((case.directory / "config.json").read_text())
    values = {"parameters": count, **dataclasses.asdict(case.config)}
    words = f"{raw['architectures'][0]}: {describe(case.config)}; {count:,} parameters"
    return Check(name, "pass", words, values=values)


def check_tensors(name: str, case: Case) -> Check:
    """Our loader refuses missing, unknown and misshapen tensors; the files are listed apart."""
    _ = case.params  # a UserError of the loader is this check's failure
    files, ours = case.files, hf_tensors(case.specs)
    left = sorted(files.keys() - ours.keys())
    unused = [n for n in left if not is_spare(n, case)]
    problems = [f"{n}: in the files, and not mapped" for n in unused]
    problems += [f"{n}: not in the files" for n in sorted(ours.keys() - files.keys())]
    problems += [
        f"{n}: shape {files[n].shape} in the files, {ours[n].shape} here"
        for n in sorted(ours.keys() & files.keys())
        if files[n].shape != ours[n].shape
    ]
    size = sum(tensor.nbytes for tensor in files.values())
    dtypes = sorted({tensor.dtype for tensor in files.values()})
    words = f"{len(ours)} tensors, {size / 1e6:.1f} MB ({', '.join(dtypes)}), each mapped once"
    if spare := [n for n in left if n not in unused]:
        words += f"; needed by nobody: {', '.join(spare)}"
    values = {"tensors": len(files), "bytes": size, "dtypes": dtypes, "unused": spare}
    if problems:
        return Check(name, "FAIL", f"{len(problems)} problems", values=values, details=problems)
    return Check(name, "pass", words, values=values)


def check_round_trip(name: str, case: Case) -> Check:
    differ = differing(case.params, case.specs, case.files, case.digests)
    same = len(hf_tensors(case.specs)) - len(differ)
    words = f"{same} tensors bit-exact by SHA-256, {len(differ)} not"
    values = {"equal": same, "different": differ}
    status = "FAIL" if differ else "pass"
    return Check(name, status, words, "all", values, [f"{n}: other bytes" for n in differ])


def check_random_logits(name: str, case: Case) -> Check:
    return compare_logits(name, case, case.rows)


def check_text_logits(name: str, case: Case) -> Check:
    return compare_logits(name, case, np.asarray([case.text], np.int32))


def compare_logits(name: str, case: Case, tokens_BT: np.ndarray) -> Check:
    found = difference(
        our_logits(case.config, case.params, tokens_BT), case.reference.logits(tokens_BT)
    )
    status = "pass" if found.ratio <= LOGITS_LIMIT else "FAIL"  # NaN fails
    words = f"{tokens_BT.shape[0]} x {tokens_BT.shape[1]} tokens: {found}"
    limit = f"{LOGITS_LIMIT:.0e} of the range"
    return Check(name, status, words, limit, found.values())


def check_bfloat16(name: str, case: Case) -> Check:
    """Reported: two roundings of the same model differ, beside how far each is from float32."""
    ours = our_logits(case.config, case.params, case.rows, "bfloat16")
    theirs = Reference(case.directory, "bfloat16").logits(case.rows)
    exact = case.reference.logits(case.rows)
    found, own, other = difference(ours, theirs), difference(ours, exact), difference(theirs, exact)
    values = found.values() | {"ours_to_float32": own.mean, "theirs_to_float32": other.mean}
    words = f"{found}; mean to float32: ours {own.mean:.1e}, transformers {other.mean:.1e}"
    status = "pass" if np.isfinite(ours).all() else "FAIL"
    return Check(name, status, words, "none, but finite", values)


def check_greedy(name: str, case: Case) -> Check:
    """The decoding loop with its cache: tokens, and the log-probs of those that are the same."""
    groups = our_greedy(case.config, case.params, case.prompts, case.options.tokens)
    answers = [case.reference.greedy(prompt, case.options.tokens) for prompt in case.prompts]
    found = [
        first_difference(group.rollouts[0].tokens, group.rollouts[0].logprobs, *answer)
        for group, answer in zip(groups, answers, strict=True)
    ]
    worst = max(item.logprobs for item in found)
    spread = max(float(np.ptp(logits)) for _, logits in answers)
    notes = [f"prompt {i}: {item.words}" for i, item in enumerate(found) if item.words]
    bad = any(item.bad for item in found) or not worst <= LOGITS_LIMIT * spread
    equal = sum(item.equal for item in found)
    words = f"{equal} of {len(found) * case.options.tokens} tokens of {len(found)} prompts equal"
    words += f", log-probs within {worst:.1e} nats"
    values = {"equal": equal, "prompts": len(found), "max_logprob_difference": worst}
    limit = f"all, or a near-tie of {NEAR_TIE:.0e}; {LOGITS_LIMIT * spread:.0e} nats"
    return Check(name, "FAIL" if bad else "pass", words, limit, values, notes)


def check_mesh(name: str, case: Case) -> Check:
    """The weights are read once more, straight onto the mesh, as training does."""
    import jax

    from jaxrl.mesh import batch_sharding, kept_whole, make_mesh

    case.forget_reference()
    section = case.options.mesh or default_mesh()
    sizes = ",".join(f"{axis}={size}" for axis, size in section)
    mesh = make_mesh(section)
    params = load_on(case.directory, case.specs, section)
    shape = (section.row_shards, min(SHORTEST_ROW // 2, case.config.max_positions))
    rows = case.random().integers(0, case.config.vocab_size, shape).astype(np.int32)
    placed = jax.device_put(rows, batch_sharding(mesh, 2))
    found = difference(
        our_logits(case.config, params, placed, "float32", mesh),
        our_logits(case.config, case.params, rows),
    )
    differ = differing(params, case.specs, case.files, case.digests)
    details = [f"{n}: exported from the mesh with other bytes" for n in differ]
    status = "pass" if found.ratio <= MESH_LIMIT and not differ else "FAIL"
    words = f"{sizes} ({jax.default_backend()}) against one device: {found}"
    words += ", export bit-exact" if not differ else ""
    whole = kept_whole(case.specs, mesh)
    values = found.values() | {"mesh": sizes, "kept_whole": whole, "different": differ}
    limit = f"{MESH_LIMIT:.0e} of the range"
    return Check(name, status, words, limit, values, [*details, *whole])


def check_engine_digest(name: str, case: Case) -> Check:
    case.forget_reference()
    published = case.published
    bad = [p for p in published if p.said != p.exported]
    digests = ", ".join(p.said[:12] for p in published)
    words = f"{case.engine.software}: what it loaded of {len(published)} versions: {digests}"
    details = [f"version {p.version}: loaded {p.said}, sent {p.exported}" for p in bad]
    values = {"engine": case.engine.software, "digests": [p.said for p in published]}
    return Check(name, "FAIL" if bad else "pass", words, "equal to what was sent", values, details)


def check_engine_logprobs(name: str, case: Case) -> Check:
    """Two versions, so that a tensor that only the first one reaches is seen."""
    published = case.published
    moved = float(np.max(np.abs(published[1].ours - published[0].ours)))
    errors = [float(np.max(np.abs(p.theirs - p.ours))) for p in published]
    served = all(error <= ENGINE_LIMIT for error in errors)  # NaN fails
    words = f"max |difference| {errors[0]:.1e} nats; with every tensor changed {errors[1]:.1e}, "
    words += f"which moved them by {moved:.1e}; {len(published[0].ours)} tokens"
    values = {"max": errors, "moved": moved}
    status = "pass" if served and moved > 10 * ENGINE_LIMIT else "FAIL"
    return Check(name, status, words, f"{ENGINE_LIMIT:.0e} nats", values)


CHECKS: tuple[tuple[str, Callable[[str, Case], Check], tuple[str, ...]], ...] = (
    ("config", check_config, ()),
    ("tensors", check_tensors, ("config",)),
    ("round trip", check_round_trip, ("tensors",)),
    ("logits, random tokens", check_random_logits, ("tensors",)),
    ("logits, text", check_text_logits, ("tensors",)),
    ("logits, bfloat16", check_bfloat16, ("tensors",)),
    ("greedy tokens", check_greedy, ("tensors",)),
    ("mesh", check_mesh, ("tensors",)),
    ("engine digest", check_engine_digest, ("tensors",)),
    ("engine log-probs", check_engine_logprobs, ("tensors", "engine digest")),
)


def describe(c: DecoderConfig) -> str:
    """What a reader would compare with the model's card."""
    placement = {"pre": "before", "post": "after", "both": "before and after"}[c.norm_placement]
    parts = [
        f"{c.num_layers} layers of {c.hidden_size}",
        f"{c.num_heads} heads / {c.num_kv_heads} kv x {c.head_dim}",
        f"norms {placement} sub-layers" + (", of 1 + w" if c.norm_offset else ""),
        f"rope of {len(c.rope.frequencies)} frequencies down to {min(c.rope.frequencies):.1e}",
    ]
    if c.rope.amplitude != 1.0:
        parts[-1] += f", amplitude {c.rope.amplitude:.3f}"
    if c.sliding_rope:
        parts[-1] += ", another on sliding layers"
    if c.qk_norm:
        parts.append(f"q/k norms over {'each head' if c.qk_norm == 'head' else 'all heads'}")
    flags = {
        "q/k/v biases": c.qkv_bias,
        "output biases": c.output_bias,
        "MLP biases": c.mlp_bias,
        "fused projections": c.fused_projections,
        "attention sinks": c.attention_sinks,
        "tied embeddings": c.tied_embeddings,
        "soft caps": c.attention_softcap or c.logit_softcap,
    }
    parts += [words for words, there in flags.items() if there]
    if c.sliding_window:
        parts.append(f"window {c.sliding_window} on {sum(c.sliding)} layers")
        if c.sliding_window >= row_tokens(c):
            parts[-1] += " (longer than the rows here: --row-tokens)"
    if c.moe:
        parts.append(f"{c.moe.num_experts} experts, {c.moe.experts_per_token} a token")
    return ", ".join(parts)


def is_spare(name: str, case: Case) -> bool:
    """Whether a tensor may stay unread: a tied head that is the embedding, or old rope tables."""
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if name != "lm_head.weight" or not case.config.tied_embeddings:
        return False
    pair = {n: case.files[n] for n in (name, "model.embed_tokens.weight") if n in case.files}
    digests = file_digests(pair)
    return digests[name] == digests.get("model.embed_tokens.weight")


def default_mesh() -> MeshSection:
    import jax

    count = jax.device_count()
    if count == 1:
        raise Skip("jax sees one device")
    if jax.default_backend() == "cpu" and count >= 8:
        return MeshSection(data=2, fsdp=2, tensor=2)
    return MeshSection(data=1, fsdp=count, tensor=1)
