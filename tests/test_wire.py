"""What crosses the bridge is what left it, and a manifest that lies is refused."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge import wire
from bridge.wire import HostTensor, Manifest, WireError, manifest_of, pack, verify

WIDTH = {"float32": 4, "bfloat16": 2, "float16": 2}


def tensor(name: str, dtype: str, shape: tuple[int, ...], seed: int = 0) -> HostTensor:
    size = WIDTH[dtype] * int(np.prod(shape, dtype=np.int64))
    data = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    return HostTensor(name, dtype, shape, data)


def weights() -> list[HostTensor]:
    """What has been awkward: odd sizes, a scalar, an empty tensor, one larger than a bucket."""
    return [
        tensor("model.layers.0.a", "bfloat16", (3, 5), 1),
        tensor("model.norm", "float32", (7,), 2),
        tensor("scale", "float32", (), 3),
        tensor("nothing", "float16", (0, 4), 4),
        tensor("large", "float16", (60,), 5),
        tensor("b", "bfloat16", (1,), 6),
    ]


def flat(buckets: list[list[np.ndarray]]) -> list[np.ndarray]:
    return [data for bucket in buckets for data in bucket]


NAMES = st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,11}", fullmatch=True)
TENSORS = st.lists(
    st.tuples(
        NAMES,
        st.sampled_from(sorted(WIDTH)),
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        st.integers(0, 2**32 - 1),
    ),
    max_size=12,
    unique_by=lambda t: t[0],
).map(lambda items: [tensor(*item) for item in items])


@given(tensors=TENSORS, bucket_bytes=st.integers(1, 600), version=st.integers(0, 2**63))
@settings(deadline=None, max_examples=150)
def test_every_tensor_arrives_with_its_bytes_dtype_and_shape(tensors, bucket_bytes, version):
    manifest, buckets = pack(version, tensors, bucket_bytes)
    arrived = Manifest.from_json(manifest.to_json())
    assert arrived == manifest and arrived.version == version
    verify(arrived, flat(buckets))
    assert {(e.name, e.dtype, e.shape) for e in arrived.tensors} == {
        (t.name, t.dtype, t.shape) for t in tensors
    }
    sent = {t.name: t.data.tobytes() for t in tensors}
    for entry, data in zip(arrived.tensors, flat(buckets), strict=True):
        assert data.tobytes() == sent[entry.name]
        assert entry.offset % WIDTH[entry.dtype] == 0
    assert arrived.nbytes == sum(len(data) for data in sent.values())
    for index, bucket in enumerate(buckets):
        inside = [e for e in arrived.tensors if e.bucket == index and e.nbytes]
        assert len(bucket) >= len(inside)
        assert sum(e.nbytes for e in inside) <= bucket_bytes or len(inside) == 1
        assert arrived.bucket_bytes[index] == sum(e.nbytes for e in inside)


@given(tensors=TENSORS, data=st.data())
@settings(deadline=None, max_examples=80)
def test_the_digest_does_not_depend_on_layout_or_order(tensors, data):
    sizes = st.integers(1, 600)
    one, _ = pack(1, tensors, data.draw(sizes))
    other, _ = pack(2, data.draw(st.permutations(tensors)), data.draw(sizes))
    assert one.digest == other.digest


def test_the_digest_is_the_documented_one():
    """Computed here from the docstring's words, so that a worker of another version agrees."""
    lines = [
        f"{t.name} {t.dtype} {','.join(str(n) for n in t.shape)} "
        f"{xxhash.xxh3_128(t.data.tobytes()).hexdigest()}\n"
        for t in weights()
    ]
    expected = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    assert pack(1, weights(), 64)[0].digest == expected


@given(
    which=st.integers(0, 5),
    change=st.sampled_from(["byte", "name", "dtype", "shape"]),
    at=st.data(),
)
@settings(deadline=None, max_examples=120)
def test_any_change_of_a_byte_name_dtype_or_shape_changes_the_digest(which, change, at):
    before = weights()
    after = list(before)
    old = before[which]
    if change == "byte":
        if not old.data.size:
            return
        harmed = old.data.copy()
        harmed[at.draw(st.integers(0, harmed.size - 1))] ^= at.draw(st.integers(1, 255))
        after[which] = dataclasses.replace(old, data=harmed)
    elif change == "name":
        after[which] = dataclasses.replace(old, name=old.name + "x")
    elif change == "dtype":
        same_width = {"bfloat16": "float16", "float16": "bfloat16"}
        if old.dtype not in same_width:
            return
        after[which] = dataclasses.replace(old, dtype=same_width[old.dtype])
    else:
        after[which] = dataclasses.replace(old, shape=(1, *old.shape))
    assert pack(1, before, 64)[0].digest != pack(1, after, 64)[0].digest


def test_two_tensors_that_swap_their_bytes_change_the_digest():
    a, b = tensor("a", "float32", (4,), 1), tensor("b", "float32", (4,), 2)
    swapped = [dataclasses.replace(a, data=b.data), dataclasses.replace(b, data=a.data)]
    assert pack(1, [a, b], 64)[0].digest != pack(1, swapped, 64)[0].digest


def test_nothing_is_copied_to_pack_it():
    tensors = weights()
    _, buckets = pack(1, tensors, 64)
    sent = {id(t.data) for t in tensors}
    assert all(id(data) in sent for data in flat(buckets))


def test_buckets_that_were_packed_apart_make_the_same_manifest():
    tensors = weights()
    whole, _ = pack(4, tensors, 64)
    assert len(whole.bucket_bytes) > 2
    assert manifest_of(4, reversed(whole.tensors)) == whole
    with pytest.raises(WireError, match="does not follow"):
        manifest_of(4, [t for t in whole.tensors if t.bucket != 1])


def test_every_flipped_byte_is_found_and_the_tensor_named():
    manifest, buckets = pack(7, weights(), 64)
    for entry, data in zip(manifest.tensors, flat(buckets), strict=True):
        for place in range(data.nbytes):
            data[place] ^= 1
            with pytest.raises(WireError) as error:
                verify(manifest, flat(buckets))
            assert "version 7" in str(error.value) and repr(entry.name) in str(error.value)
            data[place] ^= 1
    verify(manifest, flat(buckets))


@pytest.mark.parametrize(
    "harm",
    [
        lambda b: b[:-1],
        lambda b: [*b, np.zeros(1, np.uint8)],
        lambda b: [b[0][:-1], *b[1:]],
        lambda b: [np.append(b[0], np.uint8(0)), *b[1:]],
        lambda b: b[::-1],
        lambda b: [],
    ],
    ids=["one missing", "one more", "short", "long", "reversed", "none"],
)
def test_missing_torn_and_swapped_tensors_are_found(harm):
    manifest, buckets = pack(7, weights(), 64)
    with pytest.raises(WireError, match="version 7"):
        verify(manifest, harm(flat(buckets)))


def signed(raw: dict) -> str:
    """The manifest of an attacker who can compute the digest."""
    lines = []
    for t in raw["tensors"]:
        shape = t["shape"] if isinstance(t["shape"], list) else []
        lines.append(f"{t['name']} {t['dtype']} {','.join(map(str, shape))} {t['xxh3']}\n")
    raw["digest"] = hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()
    return json.dumps(raw)


def honest() -> dict:
    """Three tensors in two buckets: x and y in the first, z in the second."""
    tensors = [
        tensor("x", "float32", (4,), 1),
        tensor("y", "float32", (4,), 2),
        tensor("z", "bfloat16", (8,), 3),
    ]
    manifest, _ = pack(3, tensors, 32)
    raw = json.loads(manifest.to_json())
    assert [t["bucket"] for t in raw["tensors"]] == [0, 0, 1]
    return raw


def test_what_the_next_version_may_be_is_no_part_of_the_digest():
    kept = Manifest.from_json(json.dumps(honest() | {"keep": True}))
    assert kept.keep and kept.digest == honest()["digest"]


def test_the_honest_manifest_is_accepted_so_that_each_lie_is_refused_for_itself():
    assert Manifest.from_json(signed(honest())).version == 3


def first(**changes):
    return lambda raw: raw["tensors"][0].update(changes)


def second(**changes):
    return lambda raw: raw["tensors"][1].update(changes)


def top(**changes):
    return lambda raw: raw.update(changes)


LIES = {
    "traversal": first(name="../../etc/passwd"),
    "parent": first(name=".."),
    "absolute": first(name="/etc/passwd"),
    "slash": first(name="a/b"),
    "hidden": first(name=".bashrc"),
    "backslash": first(name="a\\b"),
    "newline": first(name="x\n"),
    "nul": first(name="x\0"),
    "space": first(name="x float32 4"),
    "empty name": first(name=""),
    "unicode name": first(name="ẋ"),
    "name is a list": first(name=["x"]),
    "listed twice": second(name="x"),
    "overlap": second(offset=0),
    "overlap by half": second(offset=8),
    "gap": second(offset=20),
    "reorder": lambda raw: raw["tensors"].reverse(),
    "both in the other bucket": second(bucket=1),
    "buckets take turns": lambda raw: raw["tensors"].insert(1, raw["tensors"].pop()),
    "no such bucket": second(bucket=2),
    "negative bucket": second(bucket=-1),
    "dtype lie": first(dtype="bfloat16"),
    "dtype of objects": first(dtype="object"),
    "dtype of pickles": first(dtype="|O"),
    "dtype is null": first(dtype=None),
    "shape lie": first(shape=[5]),
    "negative shape": first(shape=[-2, -2]),
    "fractional shape": first(shape=[4.0]),
    "true shape": first(shape=[4, True]),
    "text shape": first(shape="4"),
    "shape of nan": first(shape=[float("nan")]),
    "huge shape": first(shape=[2**62], nbytes=2**64),
    "many dimensions": first(shape=[1] * 40 + [4]),
    "negative offset": first(offset=-4),
    "offset is nan": first(offset=float("nan")),
    "size lie": first(nbytes=12),
    "negative size": first(nbytes=-16),
    "digest of a tensor": first(xxh3="0" * 31),
    "digest in capitals": first(xxh3="A" * 32),
    "digest is a number": first(xxh3=0),
    "bucket size lie": top(bucket_bytes=[32, 17]),
    "huge bucket": top(bucket_bytes=[2**62, 16]),
    "negative bucket size": top(bucket_bytes=[-32, 16]),
    "bucket size is infinite": top(bucket_bytes=[float("inf"), 16]),
    "bucket left out": top(bucket_bytes=[32]),
    "bucket nobody fills": top(bucket_bytes=[32, 16, 8]),
    "keep is a number": top(keep=1),
    "keep is text": top(keep="true"),
    "negative version": top(version=-1),
    "version is text": top(version="3"),
    "version is true": top(version=True),
    "version is nan": top(version=float("nan")),
    "tensors are text": top(bucket_bytes="32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_manifest_that_lies_is_refused_even_with_the_right_digest(lie):
    raw = honest()
    LIES[lie](raw)
    with pytest.raises(WireError):
        Manifest.from_json(signed(raw))


def test_a_consistent_manifest_of_absurd_size_is_refused():
    raw = honest()
    raw["tensors"] = [raw["tensors"][0] | {"shape": [2**58], "nbytes": 2**60}]
    raw["bucket_bytes"] = [2**60]
    with pytest.raises(WireError, match="bytes"):
        Manifest.from_json(signed(raw))


@pytest.mark.parametrize("elements", [2**50, 2**70])
def test_a_difference_of_a_tensor_of_absurd_size_is_refused(elements):
    """Whoever receives it makes room for the tensor."""
    raw = honest()
    one = raw["tensors"][0] | {"shape": [elements], "nbytes": 10, "encoding": "delta"}
    raw |= {"version": 8, "base": {"version": 7, "digest": "0" * 64}}
    raw |= {"tensors": [one], "bucket_bytes": [10]}
    with pytest.raises(WireError, match="promises more than"):
        Manifest.from_json(signed(raw))


def test_a_count_of_tensors_beyond_the_limit_is_refused(monkeypatch):
    monkeypatch.setattr(wire, "MAX_TENSORS", 2)
    with pytest.raises(WireError, match="more than 2 tensors"):
        Manifest.from_json(signed(honest()))


@pytest.mark.parametrize("field", ["version", "tensors", "bucket_bytes", "digest"])
def test_a_missing_field_is_refused(field):
    raw = json.loads(signed(honest()))
    del raw[field]
    with pytest.raises(WireError):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize("field", ["name", "dtype", "shape", "bucket", "offset", "nbytes", "xxh3"])
def test_a_missing_field_of_a_tensor_is_refused(field):
    raw = json.loads(signed(honest()))
    del raw["tensors"][0][field]
    with pytest.raises(WireError):
        Manifest.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "3",
        '"x"',
        "{",
        "{}",
        "[" * 100_000,
        '{"tensors": {}, "version": 1, "bucket_bytes": [], "digest": ""}',
        '{"tensors": "x", "version": 1, "bucket_bytes": [], "digest": ""}',
        '{"tensors": [3], "version": 1, "bucket_bytes": [], "digest": ""}',
        '{"tensors": [], "version": ' + "9" * 5000 + ', "bucket_bytes": [], "digest": ""}',
        "\ud800",
    ],
    ids=lambda text: repr(text[:30]),
)
def test_what_is_no_manifest_is_refused(text):
    with pytest.raises(WireError):
        Manifest.from_json(text)


def test_every_truncation_of_a_manifest_is_refused():
    text = pack(3, weights(), 64)[0].to_json()
    for end in range(len(text)):
        with pytest.raises(WireError):
            Manifest.from_json(text[:end])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@given(value=JSON, path=st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_value_anywhere_is_either_refused_or_changes_nothing(value, path):
    """Never another exception, and never a manifest with other tensors under the old digest."""
    before = signed(honest())
    raw = json.loads(before)
    field = path.draw(st.sampled_from(["version", "tensors", "bucket_bytes", "digest", "entry"]))
    if field == "entry":
        entry = raw["tensors"][path.draw(st.integers(0, 2))]
        entry[path.draw(st.sampled_from(sorted(entry)))] = value
    else:
        raw[field] = value
    try:
        manifest = Manifest.from_json(json.dumps(raw))
    except WireError:
        return
    assert manifest.tensors == Manifest.from_json(before).tensors


def test_packing_refuses_a_tensor_whose_bytes_do_not_fit_its_shape():
    short = dataclasses.replace(tensor("x", "float32", (4,)), data=np.zeros(12, np.uint8))
    with pytest.raises(WireError, match="'x'"):
        pack(1, [short], 64)
    with pytest.raises(WireError, match="listed twice"):
        pack(1, [tensor("x", "float32", (4,)), tensor("x", "float32", (4,))], 64)
