"""A delta turns the old version into the new one bit for bit, or is refused and changes nothing."""

import struct
import tracemalloc

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge import delta
from bridge.delta import DeltaError

DENSE, BITS, DIFFERENCES = 0, 1, 2  # as documented, not as imported
WIDTHS = {2: np.uint16, 4: np.uint32}


@st.composite
def versions(draw, count: int = 2) -> list[np.ndarray]:
    """Consecutive versions of one tensor: a share of the elements moves, near or anywhere."""
    dtype = WIDTHS[draw(st.sampled_from([2, 4]))]
    size = draw(st.integers(0, 40) | st.integers(0, 2000))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    top = 2 ** (8 * np.dtype(dtype).itemsize)
    arrays = [rng.integers(0, top, size, dtype)]
    for _ in range(count - 1):
        share = draw(st.sampled_from([0, 0.002, 0.05, 0.5, 1]))
        reach = draw(st.sampled_from([1, 300, top // 2]))
        moved = rng.random(size) < share
        steps = rng.integers(-reach, reach + 1, size)
        arrays.append(((arrays[-1].astype(np.int64) + steps * moved) % top).astype(dtype))
    return arrays


def sparse(
    size: int, places: list[int], dtype: type = np.uint16, step: int = 1
) -> list[np.ndarray]:
    """Two versions that differ by `step` at `places`, of bits that repeat every 251 elements."""
    old = (np.arange(size) % 251).astype(dtype)
    new = old.copy()
    for place in places:
        new[place] += np.asarray(step % 2 ** (8 * old.itemsize), dtype)
    return [old, new]


PATTERNS = {
    "empty tensor": sparse(0, []),
    "one element, unchanged": sparse(1, []),
    "one element, changed": sparse(1, [0]),
    "nothing changed": sparse(1000, []),
    "everything changed": sparse(1000, list(range(1000))),
    "the first": sparse(1000, [0]),
    "the last": sparse(1000, [999]),
    "first and last": sparse(1000, [0, 999]),
    "neighbours": sparse(1000, [500, 501, 502]),
    "a gap of 254": sparse(1000, [0, 255]),
    "a gap of 255": sparse(1000, [0, 256]),
    "a gap of 256": sparse(1000, [0, 257]),
    "255 before the first": sparse(1000, [255]),
    "a gap of 510": sparse(1000, [3, 514]),
    "a gap beyond 65,536": sparse(70_001, [1, 70_000]),
    "around 131,072": sparse(140_003, [131_070, 131_071, 131_072, 131_079, 131_080, 140_002]),
    "the tail of 131,073": sparse(131_073, [0, 131_072]),
    "exactly 262,144": sparse(262_144, [131_071, 131_072, 262_143]),
    "down by one": sparse(3000, list(range(0, 3000, 7)), step=-1),
    "by more than a byte": sparse(3000, list(range(0, 3000, 7)), step=1000),
    "uint32 down": sparse(3000, list(range(0, 3000, 7)), np.uint32, step=-1),
    "uint32, a long gap": sparse(70_001, [1, 70_000], np.uint32),
}

# Quiet and signalling NaNs, infinities and zeros of both signs, the smallest subnormals.
SPECIAL = {
    np.uint16: [0x7FC0, 0x7F81, 0xFFC1, 0x7F80, 0xFF80, 0x0000, 0x8000, 0x0001, 0x8001, 0xFFFF],
    np.uint32: [0x7FC00000, 0x7F800001, 0xFFC00001, 0x7F800000, 0, 0x80000000, 1, 0xFFFFFFFF],
}


def reference(payload: bytes, old: list[int]) -> list[int]:
    """The new elements, decoded one by one from the words of the module's docstring."""
    magic, form_of_payload, width, form, _, count, gap_bytes = struct.unpack_from(
        "<5sBBBQQQ", payload
    )
    assert (magic, form_of_payload) == (b"delta", 1)
    stored = struct.unpack_from(f"<{1 + width}Q", payload, 32)
    start = 32 + 8 * (1 + width)
    streams = []
    for size, nbytes in zip(stored, [gap_bytes] + [count] * width, strict=True):
        stream = payload[start : start + size]
        streams.append(stream if size == nbytes else zstandard.decompress(stream))
        start += size
    assert start == len(payload) and [len(s) for s in streams] == [gap_bytes] + [count] * width
    values = [sum(p[i] << (8 * k) for k, p in enumerate(streams[1:])) for i in range(count)]
    if form == DENSE:
        return values
    new, place, taken = list(old), 0, 0
    for gap in streams[0]:
        place += gap
        if gap == 255:
            continue
        value = values[taken]
        if form == DIFFERENCES:
            difference = value // 2 if value % 2 == 0 else -(value // 2) - 1
            value = (old[place] + difference) % 2 ** (8 * width)
        new[place] = value
        place, taken = place + 1, taken + 1
    return new


def check_round_trip(old: np.ndarray, new: np.ndarray) -> None:
    """Compared, encoded in every way, applied, and decoded by the reference."""
    changed = delta.changes(old, new)
    a, b = old.tolist(), new.tolist()
    places = [i for i in range(len(a)) if a[i] != b[i]]
    assert changed.size == len(a)
    assert changed.indices.tolist() == places and changed.indices.dtype == np.int64
    assert changed.values.tolist() == [b[i] for i in places] and changed.values.dtype == old.dtype
    assert changed.before.tolist() == [a[i] for i in places] and changed.before.dtype == old.dtype
    for payload in (
        delta.encode(changed, new),
        delta.encode(changed, new, differences=False),
        delta.encode_dense(new),
    ):
        target = old.copy()
        delta.apply(payload, target)
        assert target.tolist() == b
        assert reference(payload, a) == b


@given(pair=versions())
@settings(deadline=None, max_examples=200)
def test_any_two_versions_round_trip(pair):
    check_round_trip(*pair)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_awkward_patterns_round_trip(pattern):
    check_round_trip(*PATTERNS[pattern])


@pytest.mark.parametrize("dtype", SPECIAL)
def test_every_special_value_becomes_every_other(dtype):
    bits = np.array(SPECIAL[dtype], dtype)
    check_round_trip(np.repeat(bits, len(bits)), np.tile(bits, len(bits)))


def test_what_is_packed_does_not_depend_on_where_a_tensor_lies():
    """Tensors lie end to end in a bucket, aligned to their own elements and to nothing more."""
    old, new = PATTERNS["around 131,072"]
    moved = [np.concatenate([np.zeros(k, np.uint16), a])[k:] for k, a in ((1, old), (3, new))]
    assert delta.encode(delta.changes(*moved), moved[1]) == delta.encode(
        delta.changes(old, new), new
    )


@pytest.mark.parametrize(
    "kind",
    [bytes, bytearray, memoryview, lambda p: np.frombuffer(p, np.uint8)],
    ids=["bytes", "bytearray", "memoryview", "array"],
)
def test_a_payload_may_be_any_bytes(kind):
    old, new = PATTERNS["by more than a byte"]
    delta.apply(kind(delta.encode(delta.changes(old, new), new)), old := old.copy())
    assert (old == new).all()


def test_bits_apply_twice_and_on_another_base_where_it_changed_nothing_else():
    old, new = PATTERNS["by more than a byte"]
    payload = delta.encode(delta.changes(old, new), new, differences=False)
    target = old.copy()
    target[::7] = 9
    delta.apply(payload, target)
    delta.apply(payload, target)
    assert (target == new).all()


@given(three=versions(3))
@settings(deadline=None, max_examples=200)
def test_merged_changes_are_those_between_the_ends(three):
    old, middle, new = three
    merged = delta.merge(delta.changes(old, middle), delta.changes(middle, new))
    direct = delta.changes(old, new)
    assert merged.size == direct.size
    for got, expected in zip(merged[1:], direct[1:], strict=True):
        assert got.tolist() == expected.tolist() and got.dtype == expected.dtype
    target = old.copy()
    delta.apply(delta.encode(merged, new), target)
    assert (target == new).all()


@pytest.mark.parametrize("shares", [(1, 0.5), (0.3, 0.9), (0, 0.7), (0.7, 0)])
def test_many_changes_merge(shares):
    """More of them than are merged at once."""
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 65536, 400_003, np.uint16)]
    for share in shares:
        new = arrays[-1].copy()
        new[rng.random(new.size) < share] ^= 1  # what moves twice goes back
        arrays.append(new)
    old, middle, new = arrays
    merged = delta.merge(delta.changes(old, middle), delta.changes(middle, new))
    places = np.flatnonzero(old != new)
    assert np.array_equal(merged.indices, places)
    assert np.array_equal(merged.values, new[places])
    assert np.array_equal(merged.before, old[places])


def test_changes_that_went_back_are_none():
    old, new = PATTERNS["neighbours"]
    merged = delta.merge(delta.changes(old, new), delta.changes(new, old))
    assert merged.indices.size == merged.values.size == merged.before.size == 0


def test_changes_that_do_not_follow_are_not_merged():
    old, new = PATTERNS["neighbours"]
    other = new.copy()
    other[501:503] += 7
    further = other.copy()
    further[:] += 1
    with pytest.raises(DeltaError, match="at 501 they found 0x102, expected 0xfb"):
        delta.merge(delta.changes(old, new), delta.changes(other, further))


@pytest.mark.parametrize("other", [sparse(999, [5]), sparse(1000, [5], np.uint32)])
def test_changes_of_different_tensors_are_not_merged(other):
    with pytest.raises(DeltaError, match="expected 1000 of uint16"):
        delta.merge(delta.changes(*PATTERNS["neighbours"]), delta.changes(*other))


@pytest.mark.parametrize("width", WIDTHS)
def test_fifty_deltas_in_a_row_end_at_the_last_version(width):
    rng = np.random.default_rng(width)
    current = rng.integers(0, 2 ** (8 * width), 20_000, WIDTHS[width])
    served = current.copy()
    late, missed = current.copy(), None
    for step in range(50):
        new = current.copy()
        moved = rng.random(new.size) < (0.04 if step == 0 else 0.01)
        new[moved] += rng.choice([-1, 1], int(moved.sum())).astype(new.dtype)
        changed = delta.changes(current, new)
        delta.apply(delta.encode(changed, new), served)
        missed = changed if missed is None else delta.merge(missed, changed)
        current = new
    assert missed is not None
    delta.apply(delta.encode(missed, current), late)
    assert served.tobytes() == late.tobytes() == current.tobytes()


def ulp_steps(size: int, share: float) -> list[np.ndarray]:
    """bfloat16 weights of a normal distribution; a share moves by one unit in the last place."""
    rng = np.random.default_rng(1)
    weights = (0.02 * rng.standard_normal(size)).astype(np.float32)
    old = (weights.view(np.uint32) >> 16).astype(np.uint16)
    new = old.copy()
    moved = rng.random(size) < share
    new[moved] += rng.choice([1, 65535], int(moved.sum())).astype(np.uint16)
    return [old, new]


@pytest.mark.parametrize(
    ("share", "most", "most_as_bits"), [(0.04, 0.02, 0.045), (0.01, 0.0065, 0.013), (0, 6e-5, 6e-5)]
)
def test_the_size_of_a_step(share, most, most_as_bits):
    old, new = ulp_steps(1_000_000, share)
    changed = delta.changes(old, new)
    assert len(delta.encode(changed, new)) <= most * new.nbytes
    assert len(delta.encode(changed, new, differences=False)) <= most_as_bits * new.nbytes


def test_where_everything_is_new_the_payload_is_hardly_larger_than_the_tensor():
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, 65536, (2, 100_000), np.uint16)
    assert len(delta.encode(delta.changes(old, new), new)) <= new.nbytes + 64
    old, new = ulp_steps(100_000, 0)
    new = np.roll(new, 1)
    assert len(delta.encode(delta.changes(old, new), new)) <= 0.75 * new.nbytes


def test_what_is_sent_whole_applies_to_any_base():
    rng = np.random.default_rng(0)
    old, new = rng.integers(0, 65536, (2, 1000), np.uint16)
    target = np.zeros_like(old)
    delta.apply(delta.encode(delta.changes(old, new), new), target)
    assert (target == new).all()


class Guarded:
    """An array in the middle of a larger one: what is written beside it is seen."""

    def __init__(self, elements: np.ndarray) -> None:
        self.all = np.full(elements.size + 200, 0xA5, elements.dtype)
        self.array = self.all[100 : 100 + elements.size]
        self.array[:] = elements

    def beside(self) -> bool:
        return bool((self.all[:100] == 0xA5).all() and (self.all[-100:] == 0xA5).all())


def refused(payload: bytes, old: np.ndarray, match: str | None = None) -> None:
    target = Guarded(old)
    with pytest.raises(DeltaError, match=match):
        delta.apply(payload, target.array)
    assert target.beside() and (target.array == old).all()


def payloads() -> dict[str, tuple[np.ndarray, bytes]]:
    """A small payload of each form, with streams that are compressed and streams that are not."""
    old, new = sparse(900, [3, 5, 300, 301, 899])
    many_old, many_new = sparse(3000, list(range(0, 3000, 7)), np.uint32)
    changed, many = delta.changes(old, new), delta.changes(many_old, many_new)
    return {
        "differences": (old, delta.encode(changed, new)),
        "bits": (old, delta.encode(changed, new, differences=False)),
        "dense": (old[:40], delta.encode_dense(new[:40])),
        "dense, squeezed": (old, delta.encode_dense(new)),
        "uint32": (many_old, delta.encode(many, many_new)),
        "nothing": (old, delta.encode(delta.changes(old, old), old)),
    }


@pytest.mark.parametrize("which", payloads())
def test_every_truncation_is_refused(which):
    old, payload = payloads()[which]
    for end in range(len(payload)):
        refused(payload[:end], old)
    refused(payload + b"\0", old, "promises")


@pytest.mark.parametrize("which", payloads())
def test_every_flipped_bit_is_refused_or_decodes_as_documented(which):
    """Headers and streams: never another exception, nothing half written, nothing beside."""
    old, payload = payloads()[which]
    accepted = 0
    for place in range(len(payload)):
        for bit in range(8):
            harmed = bytearray(payload)
            harmed[place] ^= 1 << bit
            target = Guarded(old)
            try:
                delta.apply(harmed, target.array)
            except DeltaError:
                assert (target.array == old).all()
            else:
                accepted += 1
                assert target.array.tolist() == reference(bytes(harmed), old.tolist())
            assert target.beside()
    assert accepted < len(payload) * 8


HEADER = {"magic": b"delta", "format": 1, "width": 2, "form": BITS, "size": 600, "count": 3}
GAPS = bytes([0, 255, 40, 9])  # 0, 296, 306
PLANES = [bytes([1, 2, 3]), bytes([4, 5, 6])]


def crafted(streams: list[bytes] | None = None, stored: list[int] | None = None, **lies) -> bytes:
    """A payload with any numbers in its header."""
    streams = [GAPS, *PLANES] if streams is None else streams
    stored = [len(s) for s in streams] if stored is None else stored
    header = {**HEADER, "gap_bytes": len(GAPS), **lies}
    packed = struct.pack("<5sBBBQQQ", *header.values())
    return packed + struct.pack(f"<{len(stored)}Q", *stored) + b"".join(streams)


def base() -> np.ndarray:
    return np.arange(600).astype(np.uint16)


def test_the_honest_payload_is_accepted_so_that_each_lie_is_refused_for_itself():
    expected = base()
    expected[[0, 296, 306]] = [0x0401, 0x0502, 0x0603]
    target = base()
    delta.apply(crafted(), target)
    assert (target == expected).all()


def claiming(data: bytes, nbytes: int) -> bytes:
    """A frame of zstd that holds `data`, and claims to hold `nbytes` bytes."""
    frame = bytearray(zstandard.compress(data))
    assert frame[4] & 0xE0 == 0x60  # one segment; its size less 256 in the next two bytes
    struct.pack_into("<H", frame, 5, nbytes - 256)
    return bytes(frame)


ZEROS = zstandard.compress(bytes(4000))  # one frame that says its size
COUNT = {"count": 4000, "size": 5000, "gap_bytes": 4000}
HUGE = 2**64 - 1

LIES = {
    "magic": (crafted(magic=b"Delta"), "starts with"),
    "format": (crafted(format=2), "format 2, expected 1"),
    "width 1": (crafted(width=1), "width 1"),
    "width 8": (crafted(width=8), "width 8"),
    "width of another dtype": (crafted(width=4), "."),
    "form": (crafted(form=3), "form 3"),
    "size less": (crafted(size=599), "payload is for 599"),
    "size more": (crafted(size=601), "payload is for 601"),
    "size huge": (crafted(size=HUGE), f"payload is for {HUGE}"),
    "more values than elements": (
        crafted([bytes(601)] * 3, count=601, gap_bytes=601),
        "601 values, expected 0 to 600",
    ),
    "count huge": (crafted(count=HUGE), "values"),
    "everything huge": (crafted(count=HUGE, size=HUGE, gap_bytes=HUGE), "."),
    "fewer values than gaps": (
        crafted([GAPS, b"ab", b"cd"], count=2),
        "3 gaps arrived, expected 2",
    ),
    "more values than gaps": (
        crafted([GAPS, b"abcd", b"abcd"], count=4),
        "3 gaps arrived, expected 4",
    ),
    "more gap bytes than fit": (
        crafted([bytes([255] * 6), *PLANES], gap_bytes=6),
        "6 gap bytes, expected at most 5",
    ),
    "gap bytes without values": (
        crafted([b"\xff", b"", b""], count=0, gap_bytes=1),
        "goes on past 0 values",
    ),
    "the last gap goes on": (
        crafted([bytes([0, 1, 2, 255]), *PLANES]),
        "goes on past 3 values",
    ),
    "a place past the end": (
        crafted([bytes([255, 254, 1, 89]), *PLANES], gap_bytes=4),
        "the last change is at 601 of 600",
    ),
    "a place just past the end": (
        crafted([bytes([255, 254, 1, 88]), *PLANES], gap_bytes=4),
        "the last change is at 600 of 600",
    ),
    "trailing byte": (crafted() + b"\0", "promises"),
    "a stream larger than itself": (crafted([GAPS, *PLANES, b"x"], [5, 3, 3]), "stored in 5"),
    "sizes that overflow": (crafted(stored=[4, HUGE, 2]), "stored in"),
    "streams shifted": (crafted(stored=[3, 3, 4]), "stored in 4"),
    "no frame": (crafted([b"abc", *PLANES]), "corrupted"),
    "an empty frame": (crafted([b"", *PLANES]), "corrupted"),
    "dense with too few": (crafted(form=DENSE, gap_bytes=0), "3 values, expected 600 to 600"),
    "dense with gaps": (
        crafted([b"a", bytes(600), bytes(600)], form=DENSE, count=600, gap_bytes=1),
        "gap bytes, expected at most 0",
    ),
    "a frame of more": (crafted([ZEROS] * 3, **{**COUNT, "count": 3999}), "expand to 4000"),
    "a frame that claims too much": (
        crafted([claiming(bytes(3999), 4000)] * 3, **COUNT),
        "corrupted",
    ),
    "a frame that claims too little": (
        crafted([claiming(bytes(4001), 4000)] * 3, **COUNT),
        "corrupted",
    ),
    "a frame cut short": (crafted([ZEROS[:-1]] * 3, **COUNT), "corrupted"),
    "a byte behind a frame": (crafted([ZEROS + b"x"] * 3, **COUNT), "corrupted"),
    "two frames": (crafted([ZEROS * 2] * 3, **COUNT), "corrupted"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_payload_that_lies_is_refused(lie):
    payload, match = LIES[lie]
    size = 5000 if len(payload) > 56 and struct.unpack_from("<Q", payload, 8)[0] == 5000 else 600
    refused(payload, np.arange(size).astype(np.uint16), match)


def test_frames_with_the_right_size_are_accepted_so_that_the_others_are_refused_for_theirs():
    target = np.arange(5000).astype(np.uint16)
    delta.apply(crafted([ZEROS] * 3, **COUNT), target)
    assert target.tolist() == [0] * 4000 + list(range(4000, 5000))


def silent_frame(data: bytes) -> bytes:
    """A frame of zstd that does not say how large it is."""
    squeezer = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    return squeezer.compress(data) + squeezer.flush()


@pytest.mark.parametrize("frame", [zstandard.compress, silent_frame], ids=["claims", "silent"])
def test_a_bomb_is_refused_before_it_takes_memory(frame):
    bomb = frame(bytes(1 << 26))
    old = np.arange(10_000).astype(np.uint16)
    payload = crafted(
        [bomb, bytes(10_000), bytes(10_000)], count=10_000, size=10_000, gap_bytes=10_000
    )
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        refused(payload, old, "expand")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_consistent_payload_for_a_larger_tensor_takes_no_memory():
    """Its streams would expand to what its header allows, so the array must say no first."""
    frame = zstandard.compress(bytes(1 << 25))
    payload = crafted([frame] * 3, count=1 << 25, size=1 << 25, gap_bytes=1 << 25)
    tracemalloc.start()
    try:
        refused(payload, base(), "array has 600 elements")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


ARRAYS = {
    "read-only": (read_only(base()), "read-only"),
    "strided": (np.zeros(1200, np.uint16)[::2], "contiguous"),
    "two dimensions": (np.zeros((2, 300), np.uint16), r"\[2, 300\]"),
    "signed": (np.zeros(600, np.int16), "int16"),
    "bytes": (np.zeros(1200, np.uint8), "uint8"),
    "floats": (np.zeros(600, np.float32), "float32"),
    "big-endian": (np.zeros(600, ">u2"), ">u2"),
    "wider": (np.zeros(600, np.uint32), "elements of 4 bytes"),
    "shorter": (np.zeros(599, np.uint16), "599 elements"),
    "empty": (np.zeros(0, np.uint16), "0 elements"),
}


@pytest.mark.parametrize("which", ARRAYS)
def test_a_payload_is_applied_to_its_own_kind_of_array_only(which):
    array, match = ARRAYS[which]
    before = array.copy()
    with pytest.raises(DeltaError, match=match):
        delta.apply(crafted(), array)
    assert (array == before).all()


def test_only_versions_of_one_tensor_are_compared():
    old = base()
    for other in (old[:-1], old.astype(np.uint32), old[::-1], old.view(np.int16)):
        with pytest.raises(DeltaError):
            delta.changes(old, other)
        with pytest.raises(DeltaError):
            delta.changes(other, old)


@pytest.mark.parametrize(
    "indices", [[1, 1], [2, 1], [-1, 3], [5, 600]], ids=["twice", "back", "negative", "beyond"]
)
def test_changes_that_are_not_in_order_are_not_encoded(indices):
    bits = np.zeros(2, np.uint16)
    changed = delta.Changes(600, np.array(indices), bits + 1, bits)
    with pytest.raises(DeltaError, match="ascend"):
        delta.encode(changed, base())


def test_changes_are_encoded_with_their_own_tensor_only():
    old, new = PATTERNS["neighbours"]
    for other in (new[:-1], new.astype(np.uint32)):
        with pytest.raises(DeltaError, match="expected 1000 of uint16"):
            delta.encode(delta.changes(old, new), other)
