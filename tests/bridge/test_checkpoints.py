"""Hugging Face directories, read and written: real files, made here byte by byte."""

import errno
import gc
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from bridge.checkpoints import load_params, save_model
from bridge.wire import HostTensor
from jaxrl.models.params import ParamSpec
from jaxrl.types import RunError, UserError

NUMPY = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}
NAMES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
L, D, H, K, F, V, E = 2, 8, 4, 2, 12, 10, 4
AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def row(shape, axes, name, inputs=None, start=0, inputs_first=False):
    name = name if "." in name else f"{name}.weight"
    return ParamSpec(shape, tuple(axes.split()), "normal", name, inputs, start, inputs_first)


SPECS = {
    ("embed",): row((V, D), "vocab embed", "embed"),
    ("layers", "q"): row((L, H, K, D), "layers heads head_dim embed", "l.{layer}.qkv", 1),
    ("layers", "k"): row((L, 2, K, D), "layers kv_heads head_dim embed", "l.{layer}.qkv", 1, H * K),
    ("layers", "v"): row((L, 2, K, D), "layers kv_heads head_dim embed", "l.{layer}.qkv", 1, 12),
    ("layers", "bias"): row((L, H, K), "layers heads head_dim", "l.{layer}.q_bias", 0),
    ("layers", "o"): row((L, D, H, K), "layers embed heads head_dim", "l.{layer}.o", 2),
    ("layers", "up"): row(
        (L, E, D, F), "layers experts embed mlp", "l.{layer}.e.{expert}.up", 1, inputs_first=True
    ),
    ("layers", "down"): row(
        (L, E, F, D), "layers experts mlp embed", "l.{layer}.e.{expert}.d", 1, inputs_first=True
    ),
    ("layers", "fused"): row((L, E, D, F), "layers experts embed mlp", "l.{layer}.fused"),
    ("norm",): row((D,), "embed", "norm"),
    ("head",): row((D, V), "embed vocab", "lm_head", 1, inputs_first=True),
}
SHAPES = {"embed.weight": (V, D), "norm.weight": (D,), "lm_head.weight": (V, D)}
for _l in range(L):
    SHAPES |= {f"l.{_l}.qkv": (16, D), f"l.{_l}.q_bias": (8,), f"l.{_l}.o": (D, 8)}
    SHAPES |= {f"l.{_l}.e.{e}.up": (F, D) for e in range(E)}
    SHAPES |= {f"l.{_l}.e.{e}.d": (D, F) for e in range(E)}
    SHAPES |= {f"l.{_l}.fused": (E, D, F)}


def random(shape, dtype, rng):
    """Random bits of any finite value: subnormals, negative zero and the largest included."""
    raw = rng.integers(0, 256, int(np.prod(shape)) * np.dtype(dtype).itemsize, np.uint8)
    values = raw.view(dtype).copy()
    with np.errstate(invalid="ignore"):  # signalling NaNs, about to go
        values[~np.isfinite(values.astype(np.float64))] = -0.0
    return values.reshape(shape)


def file_bytes(tensors, metadata=None, **changes):
    """A safetensors file; `changes` replace the entry of a tensor in its header."""
    header, data = {}, b""
    tags = {np.dtype(v): k for k, v in NUMPY.items()}
    for name, value in tensors.items():
        end = len(data) + value.nbytes
        tag = tags.get(value.dtype, "I32")
        offsets = [len(data), end]
        header[name] = {"dtype": tag, "shape": list(value.shape), "data_offsets": offsets}
        header[name] |= changes.get(name.replace(".", "_"), {})
        data += value.tobytes()
    if metadata:
        header["__metadata__"] = metadata
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def weights():
    rng = np.random.default_rng(0)
    return {name: random(shape, ml_dtypes.bfloat16, rng) for name, shape in SHAPES.items()}


@pytest.fixture
def directory(tmp_path, weights):
    """Two files and their index."""
    folder = tmp_path / "model"
    folder.mkdir()
    write_sharded(folder, weights)
    return folder


def write_sharded(folder, weights):
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[:9], names[9:])):
        file = f"model-0000{i + 1}-of-00002.safetensors"
        (folder / file).write_bytes(file_bytes({name: weights[name] for name in part}))
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def shardings(specs=SPECS, rules=AXES, **sizes):
    sizes = sizes or {"data": 1}
    mesh = jax.make_mesh(
        tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes)
    )
    tree = {}
    for path, spec in specs.items():
        parts = [rules.get(a) if rules.get(a) in sizes else None for a in spec.axes]
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = NamedSharding(mesh, P(*parts))
    return tree


def expected(weights, dtype):
    """The leaves, written out by hand."""
    w = {name: value.astype(dtype) for name, value in weights.items()}
    each = range(L)
    qkv = np.stack([w[f"l.{i}.qkv"] for i in each])
    q, k, v = (qkv[:, a:b] for a, b in ((0, 8), (8, 12), (12, 16)))
    return {
        "embed": w["embed.weight"],
        "norm": w["norm.weight"],
        "head": w["lm_head.weight"].T,
        "layers": {
            "q": q.reshape(L, H, K, D),
            "k": k.reshape(L, 2, K, D),
            "v": v.reshape(L, 2, K, D),
            "bias": np.stack([w[f"l.{i}.q_bias"].reshape(H, K) for i in each]),
            "o": np.stack([w[f"l.{i}.o"].reshape(D, H, K) for i in each]),
            "up": np.stack([[w[f"l.{i}.e.{e}.up"].T for e in range(E)] for i in each]),
            "down": np.stack([[w[f"l.{i}.e.{e}.d"].T for e in range(E)] for i in each]),
            "fused": np.stack([w[f"l.{i}.fused"] for i in each]),
        },
    }


def assert_same(loaded, wanted):
    assert jax.tree.structure(loaded) == jax.tree.structure(wanted)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(loaded), jax.tree.leaves(wanted), strict=True
    ):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.ascontiguousarray(a).tobytes() == np.ascontiguousarray(b).tobytes(), path


def report(folder, **kwargs):
    """The message of the error that loading ends with."""
    before = len(jax.live_arrays())
    with pytest.raises(UserError) as error:
        load_params(folder, SPECS, shardings(**kwargs))
    assert len(jax.live_arrays()) == before, "an error leaves arrays behind"
    assert str(error.value).startswith(f"{folder}: ")
    return str(error.value)


MESHES = [{"data": 1}, {"fsdp": 2}, {"tensor": 2}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("stored", NUMPY)
def test_every_tensor_arrives_bit_for_bit_in_our_layout(stored, sizes, tmp_path):
    rng = np.random.default_rng(1)
    values = {name: random(shape, NUMPY[stored], rng) for name, shape in SHAPES.items()}
    write_sharded(tmp_path, values)
    loaded = load_params(tmp_path, SPECS, shardings(**sizes))
    assert_same(loaded, expected(values, np.float32))


@pytest.mark.parametrize("sizes", [MESHES[0], MESHES[3]])
@pytest.mark.parametrize("stored", NUMPY)
def test_bfloat16_parameters_are_the_files_values_rounded(stored, sizes, tmp_path):
    rng = np.random.default_rng(2)
    values = {name: rng.normal(size=s).astype(NUMPY[stored]) for name, s in SHAPES.items()}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(values))
    loaded = load_params(tmp_path, SPECS, shardings(**sizes), "bfloat16")
    assert_same(loaded, expected(values, ml_dtypes.bfloat16))
    doubled = jax.jit(lambda x: x * 2, donate_argnums=0)(loaded["embed"])  # the memory is its own
    assert np.array_equal(doubled, values["embed.weight"].astype(ml_dtypes.bfloat16) * 2)


@pytest.mark.parametrize("chunk", [1, 100])
@pytest.mark.parametrize("sizes", MESHES[:4])
def test_what_is_placed_in_chunks_is_the_same(chunk, sizes, directory, weights, monkeypatch):
    monkeypatch.setattr("bridge.placing._CHUNK", chunk)
    loaded = load_params(directory, SPECS, shardings(**sizes))
    assert_same(loaded, expected(weights, np.float32))


def test_experts_can_be_split_too(directory, weights):
    rules = AXES | {"experts": "tensor", "mlp": None}
    loaded = load_params(directory, SPECS, shardings(rules=rules, fsdp=2, tensor=4 // 2))
    assert loaded["layers"]["up"].addressable_shards[0].data.shape == (L, E // 2, D // 2, F)
    assert_same(loaded, expected(weights, np.float32))


def test_the_layout_also_changes_on_the_device(directory, weights, monkeypatch):
    """As it does on an accelerator: the tensors go there as they lie in the file."""
    monkeypatch.setattr("bridge.placing._TRANSPOSED", set())
    for sizes in MESHES[0], MESHES[3]:
        for dtype in ("float32", "bfloat16"):
            loaded = load_params(directory, SPECS, shardings(**sizes), dtype)
            assert_same(loaded, expected(weights, jnp.dtype(dtype)))


def test_a_device_gets_its_shard_and_nothing_else(directory):
    gc.collect()
    alive = jax.live_arrays()
    others = {id(x) for x in alive}
    loaded = load_params(directory, SPECS, shardings(data=2, fsdp=2, tensor=2))
    up = loaded["layers"]["up"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(L, E, D // 2, F // 2)}
    assert len(up.addressable_shards) == 8
    new = [x for x in jax.live_arrays() if id(x) not in others and x.sharding == up.sharding]
    assert len(new) == 2, "more than `up` and `fused` lives"


def test_links_of_the_hub_cache_are_followed(directory, weights):
    blobs = directory.parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(directory.iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(Path("../blobs") / str(i))
    assert_same(load_params(directory, SPECS, shardings()), expected(weights, np.float32))


def test_harmless_extras_are_accepted(tmp_path, weights):
    extras = {"l.0.rotary_emb.inv_freq": np.ones(4, np.float32)}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(weights | extras))
    load_params(tmp_path, SPECS, shardings())
    tied = {path: spec for path, spec in SPECS.items() if path != ("head",)}
    load_params(tmp_path, tied, shardings(tied))


def test_everything_that_does_not_fit_is_said_at_once(tmp_path, weights):
    del weights["norm.weight"]
    weights["l.0.o"] = weights["l.0.o"][:4]
    weights["l.9.extra"] = np.ones(3, np.float32)
    weights["l.1.qkv"] = np.ones((16, D), np.int32)
    (tmp_path / "model.safetensors").write_bytes(file_bytes(weights))
    said = report(tmp_path)
    assert "norm.weight: missing" in said
    assert "model.safetensors: l.0.o: shape (4, 8), expected (8, 8)" in said
    assert "model.safetensors: l.9.extra: not a tensor of this model" in said
    assert "model.safetensors: l.1.qkv: dtype I32, quantised or integer" in said


@pytest.mark.parametrize("tag", ["F8_E4M3", "U8", "I8", "F64", "I32", "NEW"])
def test_other_dtypes_are_named(tag, tmp_path, weights):
    bits = {"F64": 64, "I32": 32, "NEW": 8}.get(tag, 8)
    weights["norm.weight"] = np.zeros(D * bits // 16, ml_dtypes.bfloat16)
    changes = {"norm_weight": {"dtype": tag, "shape": [D]}}
    (tmp_path / "model.safetensors").write_bytes(file_bytes(weights, **changes))
    said = report(tmp_path)
    assert "model.safetensors: norm.weight: dtype" in said and "bfloat16" in said
    assert ("float64" if tag == "F64" else f"{tag}, quantised or integer") in said


FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"


def patch_index(change):
    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def patch_bytes(change, file=FIRST):
    def damage(folder):
        path = folder / file
        path.write_bytes(change(path.read_bytes()))

    return damage


def patch_header(change):
    """Replaces the JSON of the first file's header."""

    def apply(data):
        length = struct.unpack("<Q", data[:8])[0]
        text = change(data[8 : 8 + length].decode()).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return patch_bytes(apply)


def patch_entry(key, value):
    """Replaces one field of the first tensor's entry."""

    def change(text):
        header = json.loads(text)
        header["embed.weight"][key] = value
        return json.dumps(header)

    return patch_header(change)


def move(old, new):
    def change(text):
        assert old in text
        return text.replace(old, new)

    return change


def replace_with(make):
    def damage(folder):
        (folder / FIRST).unlink()
        make(folder / FIRST)

    return damage


def twice(folder):
    rest = (folder / SECOND).read_bytes()
    length = struct.unpack("<Q", rest[:8])[0]
    header = json.loads(rest[8 : 8 + length])
    end = max(e["data_offsets"][1] for e in header.values())
    header["embed.weight"] = {"dtype": "BF16", "shape": [V, D], "data_offsets": [end, end + 160]}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + rest[8 + length :] + bytes(160)
    (folder / SECOND).write_bytes(data)


DAMAGES = {
    "one byte short": (patch_bytes(lambda b: b[:-1]), FIRST),
    "half": (patch_bytes(lambda b: b[: len(b) // 2]), FIRST),
    "empty": (patch_bytes(lambda b: b""), FIRST),
    "seven bytes": (patch_bytes(lambda b: b[:7]), FIRST),
    "appended": (patch_bytes(lambda b: b + b"\0"), FIRST),
    "absurd header": (patch_bytes(lambda b: struct.pack("<Q", 1 << 60) + b[8:]), FIRST),
    "not JSON": (patch_header(lambda t: t[:-1] + "!"), FIRST),
    "not UTF-8": (patch_bytes(lambda b: b[:12] + b"\xff" + b[13:]), FIRST),
    "not an object": (patch_header(lambda t: "[]"), FIRST),
    "too deep": (patch_header(lambda t: "[" * 100_000), FIRST),
    "key twice, among many": (
        patch_header(lambda t: "{" + ",".join(f'"{min(i, 99_998)}":1' for i in range(10**5)) + "}"),
        "'99998' is there twice",
    ),
    "key twice": (patch_header(move('"l.0.e.0.up"', '"embed.weight"')), "embed.weight"),
    "metadata": (patch_header(lambda t: '{"__metadata__": {"a": 1},' + t[1:]), "__metadata__"),
    "entry": (patch_header(move('"dtype"', '"etype"')), "embed.weight"),
    "negative shape": (patch_entry("shape", [-V, -D]), "embed.weight"),
    "fractional shape": (patch_entry("shape", [V, 8.0]), "embed.weight"),
    "true in a shape": (patch_entry("shape", [True, V * D]), "embed.weight"),
    "wrong size": (patch_entry("shape", [V, D + 1]), "embed.weight"),
    "wrong dtype": (patch_entry("dtype", "F32"), "embed.weight"),
    "no dtype": (patch_entry("dtype", None), "embed.weight"),
    "three offsets": (patch_entry("data_offsets", [0, 1, 2]), "embed.weight"),
    "reversed": (patch_entry("data_offsets", [160, 0]), "embed.weight"),
    "overlap": (patch_entry("data_offsets", [2, 162]), "does not follow"),
    "out of range": (patch_entry("data_offsets", [1 << 40, (1 << 40) + 160]), "embed.weight"),
    "folder": (replace_with(lambda p: p.mkdir()), FIRST),
    "pipe": (replace_with(os.mkfifo), FIRST),
    "loop": (replace_with(lambda p: p.symlink_to(p.name)), FIRST),
    "gone": (replace_with(lambda p: None), FIRST),
    "index too long": (patch_index(lambda m: m.update({"l.7.o": FIRST})), "l.7.o"),
    "index too short": (patch_index(lambda m: m.pop("embed.weight")), "embed.weight"),
    "index elsewhere": (patch_index(lambda m: m.update({"embed.weight": SECOND})), "embed.weight"),
    "two files": (twice, f"{SECOND}: embed.weight: damaged: is also in {FIRST}"),
    "index of a gone file": (patch_index(lambda m: m.update({"norm.weight": "x"})), "x: damaged"),
}
for _name in (
    "../m",
    "/etc/passwd",
    "..",
    ".",
    "",
    "a/b",
    "a\\b",
    "a\0b",
    "\ud800",
    5,
    None,
    ["a"],
):
    DAMAGES[f"index names {_name!r}"] = (
        patch_index(lambda m, name=_name: m.update({"norm.weight": name})),
        "norm.weight",
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named_before_anything_is_placed(damage, directory, monkeypatch):
    make, named = DAMAGES[damage]
    make(directory)
    monkeypatch.setattr("bridge.checkpoints.zeros", None)  # what places would fail on this
    said = report(directory)
    assert named in said and "damaged" in said, said


def test_two_damaged_files_are_both_named_and_their_tensors_are_not_called_missing(directory):
    for file in (FIRST, SECOND):
        patch_bytes(lambda b: b[:-3], file)(directory)
    said = report(directory)
    assert FIRST in said and SECOND in said and "missing" not in said


def test_tensors_of_a_single_damaged_file_are_not_called_missing(tmp_path, weights):
    (tmp_path / "model.safetensors").write_bytes(file_bytes(weights)[:-1])
    assert "missing" not in report(tmp_path)


INDEX_TEXTS = ["", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\xff"]


@pytest.mark.parametrize("text", [*INDEX_TEXTS, '{"weight_map": {"a": "b", "a": "c"}}'])
def test_a_malformed_index_is_named(text, directory):
    (directory / "model.safetensors.index.json").write_bytes(text.encode("latin-1"))
    assert "model.safetensors.index.json: damaged" in report(directory)


def test_a_flipped_bit_anywhere_in_a_header_is_refused_or_harmless(tmp_path):
    value = np.arange(6, dtype=np.float16).reshape(2, 3)
    specs = {("a",): row((2, 3), "x y", "a.weight"), ("b",): row((2, 3), "x y", "b.weight")}
    digests = {n: hashlib.sha256(value.tobytes()).hexdigest() for n in ("a.weight", "b.weight")}
    metadata = {"format": "pt", "sha256": json.dumps(digests)}
    whole = file_bytes({"a.weight": value, "b.weight": value}, metadata)
    places, path = shardings(specs), tmp_path / "model.safetensors"
    refused = 0
    for i in range(len(whole) - 2 * value.nbytes):
        flipped = bytearray(whole)
        flipped[i] ^= 1 << i % 6
        path.write_bytes(flipped)
        try:
            loaded = load_params(tmp_path, specs, places)
        except UserError:
            refused += 1
        else:
            assert np.array_equal(loaded["a"], value) and np.array_equal(loaded["b"], value)
    assert refused > len(whole) // 2


def test_a_pickle_is_never_opened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    said = report(tmp_path)
    assert "pytorch_model.bin is a pickle" in said and "convert it to safetensors" in said


def test_a_directory_without_weights_says_so(tmp_path):
    assert "no model.safetensors and no model.safetensors.index.json" in report(tmp_path)


def test_two_checkpoints_in_one_directory_are_not_chosen_from(directory, weights):
    (directory / "model.safetensors").write_bytes(file_bytes(weights))
    assert "two checkpoints" in report(directory)


def host_tensors(weights):
    names = {np.dtype(v): NAMES[k] for k, v in NUMPY.items()}
    for name, value in weights.items():
        yield HostTensor(name, names[value.dtype], value.shape, value.reshape(-1).view(np.uint8))


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", "a": 1}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text("{}")
    (folder / "notes.txt").write_text("stays here")
    return folder


@pytest.mark.parametrize("stored", NUMPY)
@pytest.mark.parametrize("most", [1 << 30, 500, 1])
def test_a_saved_model_comes_back_bit_for_bit(stored, most, source, tmp_path):
    rng = np.random.default_rng(3)
    weights = {name: random(shape, NUMPY[stored], rng) for name, shape in SHAPES.items()}
    target = tmp_path / "target"
    save_model(host_tensors(weights), source, target, max_shard_bytes=most)
    assert_same(load_params(target, SPECS, shardings(fsdp=2)), expected(weights, np.float32))
    config = json.loads((target / "config.json").read_text())
    assert config == {"a": 1, "dtype": NAMES[stored]}
    assert (target / "tokenizer.json").is_file() and not (target / "notes.txt").exists()
    files = sorted(p.name for p in target.glob("*.safetensors"))
    if most > 1 << 20:
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    for path in target.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_tensors_are_written_shard_by_shard(source, tmp_path):
    """The generator sees files of earlier tensors before it has made the last."""
    sizes = []

    def stream():
        for i in range(20):
            value = np.full(1000, i, np.uint8)
            yield HostTensor(f"t.{i}", "float32", (250,), value)
            sizes.append(sum(p.stat().st_size for p in tmp_path.rglob("tmp.*") if p.is_file()))

    save_model(stream(), source, tmp_path / "target", max_shard_bytes=3000)
    written = 1000 * np.arange(1, 21)
    assert all(written - np.array(sizes) <= 4000)


def test_a_flipped_bit_in_the_data_of_a_saved_model_names_the_tensor(source, tmp_path, weights):
    target = tmp_path / "target"
    save_model(host_tensors(weights), source, target, max_shard_bytes=1000)
    damaged = {}
    for file in sorted(target.glob("*.safetensors"))[:2]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
        header = json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])
        header.pop("__metadata__")
        damaged[file.name] = max(header, key=lambda name: header[name]["data_offsets"])
    said = report(target)
    for file, name in damaged.items():
        assert f"{file}: {name}: damaged: has SHA-256" in said
    assert said.count("SHA-256") == 2


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), RuntimeError("x")])
@pytest.mark.parametrize("there_before", [True, False])
def test_a_save_that_fails_leaves_what_was_there(failure, there_before, source, tmp_path, weights):
    target = tmp_path / "target"
    if there_before:
        save_model(host_tensors(weights), source, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()} if there_before else {}

    def stream():
        yield from list(host_tensors(weights))[:5]
        raise failure

    wanted = RunError if isinstance(failure, OSError) else RuntimeError
    with pytest.raises(wanted, match="target.*No space left" if wanted is RunError else "x"):
        save_model(stream(), source, target, max_shard_bytes=200)
    assert target.exists() == there_before
    after = {p.name: p.read_bytes() for p in target.iterdir()} if there_before else {}
    assert before == after
    assert not [p for p in tmp_path.iterdir() if p.name not in ("source", "target")]


def test_a_save_that_cannot_be_renamed_changes_nothing(source, tmp_path, weights, monkeypatch):
    target = tmp_path / "target"
    save_model(host_tensors(weights), source, target)
    before = {p.name: p.read_bytes() for p in target.iterdir()}
    rename = Path.rename

    def refuse_new(path, other):
        if other == target and "removed" not in path.name:
            raise OSError(5, "Input/output error")
        return rename(path, other)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(RunError, match="Input/output error"):
        save_model(host_tensors(weights | {"norm.weight": weights["l.0.o"]}), source, target)
    assert before == {p.name: p.read_bytes() for p in target.iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source", "target"]


def test_each_tensor_starts_at_a_multiple_of_its_element(source, tmp_path):
    """Torch cannot open others."""
    rng = np.random.default_rng(4)
    dtypes = [ml_dtypes.bfloat16, np.float32, np.float16, np.float32]
    mixed = {f"t.{i}": random((3,), dtype, rng) for i, dtype in enumerate(dtypes)}
    save_model(host_tensors(mixed), source, tmp_path / "target")
    data = (tmp_path / "target" / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    for i, (name, value) in enumerate(mixed.items()):
        start, end = header[name]["data_offsets"]
        assert (8 + length + start) % value.itemsize == 0
        assert data[8 + length + start : 8 + length + end] == value.tobytes(), i


def test_a_save_replaces_all_of_an_older_one_and_may_be_its_source(source, weights):
    (source / "model-00001-of-00009.safetensors").write_bytes(b"old")
    save_model(host_tensors(weights), source, source)
    names = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
    assert sorted(p.name for p in source.iterdir()) == names


def test_what_cannot_be_removed_spoils_no_save_and_none_after_it(
    source, tmp_path, weights, monkeypatch
):
    """As a file on NFS that a server on the same host has mapped."""
    target, real = tmp_path / "target", shutil.rmtree

    def rmtree(path, *args, **kwargs):
        if (Path(path) / "held").exists():
            raise OSError(errno.EBUSY, "Device or resource busy")
        real(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    for mark in ("first", "second", "third"):
        save_model(host_tensors(weights), source, target)
        assert not (target / "held").exists() and (target / "model.safetensors").exists(), mark
        (target / "held").touch()
    assert len(list(tmp_path.glob("tmp.*"))) == 2  # those that could not be removed


def test_a_name_twice_is_refused(source, tmp_path, weights):
    with pytest.raises(ValueError, match="names"):
        save_model([*host_tensors(weights), *host_tensors(weights)], source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("most", [1 << 30, 20_000])
def test_transformers_opens_what_is_saved(most, tmp_path):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
    )
    model = transformers.Qwen3ForCausalLM(config).to(torch.bfloat16)
    source, target = tmp_path / "source", tmp_path / "target"
    config.save_pretrained(source)
    weights = {
        name: value.detach().contiguous().view(torch.uint8).numpy().reshape(-1)
        for name, value in model.state_dict().items()
    }
    tensors = [
        HostTensor(name, "bfloat16", tuple(model.state_dict()[name].shape), data)
        for name, data in weights.items()
    ]
    save_model(tensors, source, target, max_shard_bytes=most)
    opened = transformers.AutoModelForCausalLM.from_pretrained(target)
    assert opened.dtype == torch.bfloat16
    for name, value in opened.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


MEMORY = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from bridge.checkpoints import load_params
from jaxrl.models.params import ParamSpec

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

specs = {("w",): ParamSpec((12, 6144, 2048), ("layers", "mlp", "embed"), "normal", "l.{layer}", 1)}
mesh = jax.make_mesh((2, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
places = {"w": NamedSharding(mesh, P(None, "tensor", "fsdp"))}
jax.block_until_ready(jnp.zeros(8) + 1)
Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
before = status("VmRSS")
params = load_params(Path(sys.argv[1]), specs, places, sys.argv[2])
arrays = sum(shard.data.nbytes for shard in params["w"].addressable_shards)
print(status("VmHWM") - before - arrays)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is Linux's VmHWM")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_host_never_holds_more_than_a_file(dtype, tmp_path):
    """300 MB of weights in four files of 75 MB."""
    shape, index = (6144, 2048), {}
    value = np.ones(shape, ml_dtypes.bfloat16)
    for file in range(4):
        part = {f"l.{3 * file + i}": value for i in range(3)}
        (tmp_path / f"{file}.safetensors").write_bytes(file_bytes(part))
        index |= dict.fromkeys(part, f"{file}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    shown = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), dtype],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[2],
    )
    assert shown.returncode == 0, shown.stderr
    assert int(shown.stdout) <= 1.3 * 3 * value.nbytes
