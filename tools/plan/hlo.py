"""What a compiled program does, read from the text of its optimized HLO.

XLA's own `cost_analysis` counts the body of a loop once, however often it runs, so it says little
of a program that scans over layers. Here every computation counts as often as it is called: loops
by the trip count that their condition and counter give.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

_BITS = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
_NUMBERED = re.compile(r"[a-z]+(\d+)")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = ")
_HEAD = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_OPERAND = re.compile(r"%([\w.-]+)")
_CALLED = re.compile(
    r"(calls|body|to_apply|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.-]+)"
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# Names and views; they move nothing.
_FREE = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "while",
    "conditional",
    "call",
    "partition-id",
    "replica-id",
    "after-all",
    "opt-barrier",
    "optimization-barrier",
    "iota",
}


@dataclasses.dataclass(frozen=True)
class Shape:
    dtype: str
    dims: tuple[int, ...]
    on_chip: bool  # in a memory other than HBM: VMEM, scalar memory

    @property
    def bytes(self) -> int:
        bits = _BITS.get(self.dtype)
        if bits is None:
            found = _NUMBERED.match(self.dtype)
            bits = int(found[1]) if found else 8
        return math.prod(self.dims) * bits // 8

    @property
    def hbm_bytes(self) -> int:
        return 0 if self.on_chip else self.bytes


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    op: str
    shapes: tuple[Shape, ...]  # of the result; several of a tuple
    operands: tuple[str, ...]
    attributes: str
    literal: str  # what stands between the parentheses

    @property
    def hbm_bytes(self) -> int:
        return sum(shape.hbm_bytes for shape in self.shapes)

    def attribute(self, name: str) -> str | None:
        found = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        return found[1] if found else None

    @property
    def called(self) -> list[tuple[str, str]]:
        """(how, computation), for every computation that runs as a part of this instruction."""
        return [
            (how, name.lstrip("%"))
            for how, names in _CALLED.findall(self.attributes)
            if how != "to_apply" or self.op in ("call", "async-start")
            for name in names.strip("{}").split(", ")
        ]


@dataclasses.dataclass
class Computation:
    name: str
    instructions: dict[str, Instruction] = dataclasses.field(default_factory=dict)
    root: str = ""

    def of(self, name: str) -> Instruction | None:
        return self.instructions.get(name)

    def parameter(self, index: int) -> Instruction | None:
        for instruction in self.instructions.values():
            if instruction.op == "parameter" and instruction.literal == str(index):
                return instruction
        return None

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = defaultdict(list)
        for instruction in self.instructions.values():
            for operand in instruction.operands:
                users[operand].append(instruction)
        return users


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of the program, as often as it runs in a step."""

    kind: str
    count: int
    bytes: int  # of what each device receives or holds at the end, once
    wire_bytes: float  # that each device sends, once
    groups: tuple[tuple[int, ...], ...]  # of partitions that take part; of a permute, the pairs
    overlapped: bool  # other work is scheduled while it runs
    where: str  # op_name of the source


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one device and one run of the program."""

    matmul_flops: float  # of products that the text shows
    kernel_flops: float  # of custom kernels, as they declare them
    kernels_without_flops: int  # custom kernels that declare nothing
    hbm_bytes: float
    collectives: tuple[Collective, ...]
    unknown_loops: tuple[str, ...]  # counted once, because their trip count was not found


class Program:
    """An HLO module, with how often each of its computations runs."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        self._parse(text)
        self.unknown_loops: list[str] = []
        self.runs: dict[str, int] = defaultdict(int)
        self.fused: set[str] = set()
        self._visit(self.entry, 1, False)

    def cost(self) -> Cost:
        flops = kernel = bytes_ = 0.0
        silent = 0
        for name, runs in self.runs.items():
            computation = self.computations[name]
            for instruction in computation.instructions.values():
                if instruction.op in ("convolution", "dot"):
                    flops += runs * product_flops(instruction, computation)
                elif is_kernel(instruction):
                    declared = kernel_flops(instruction)
                    kernel += runs * (declared or 0)
                    silent += declared is None
                if name not in self.fused:
                    bytes_ += runs * self.moved(instruction, computation)
        return Cost(
            flops, kernel, silent, bytes_, tuple(self.collectives()), tuple(self.unknown_loops)
        )

    def moved(self, i: Instruction, computation: Computation) -> int:
        """HBM bytes that one instruction outside of fusions reads and writes."""
        if i.op in _FREE or i.op.endswith(("-done", "-update")):
            return 0
        if i.op == "custom-call" and not is_kernel(i):
            return 0  # allocations, hints, and the ends of asynchronous work
        operands = [found for name in i.operands if (found := computation.of(name))]
        if i.op in ("dynamic-slice", "slice", "gather"):
            return 2 * i.hbm_bytes
        if i.op == "dynamic-update-slice":
            return 2 * operands[1].hbm_bytes if len(operands) > 1 else i.hbm_bytes
        if i.op in ("copy-start", "collective-permute-start", "all-gather-start"):
            return sum(shape.hbm_bytes for shape in i.shapes[:2])
        called = [self.computations[name] for how, name in i.called if how == "calls"]
        if i.op == "fusion" and called:
            read = sum(_read(called[0], n, x) for n, x in enumerate(operands))
            return read + _written(called[0], i)
        return i.hbm_bytes + sum(operand.hbm_bytes for operand in operands)

    def collectives(self) -> Iterator[Collective]:
        """Each once: an asynchronous one stands in every fusion that helps it along.

        Those have its channel; but so have, outside of fusions, all that `shard_map` makes.
        """
        seen: set[tuple[str, str, tuple[int, ...]]] = set()
        for name, runs in self.runs.items():
            computation = self.computations[name]
            for i in computation.instructions.values():
                kind = i.op.removesuffix("-start")
                if kind not in COLLECTIVES:
                    continue
                key = (i.attribute("channel_id") or i.name, kind, i.shapes[0].dims)
                if name in self.fused and key in seen:
                    continue
                seen.add(key)
                yield self._collective(kind, i, computation, runs)

    def _collective(
        self, kind: str, i: Instruction, computation: Computation, runs: int
    ) -> Collective:
        operands = [found for name in i.operands if (found := computation.of(name))]
        given = sum(shape.bytes for operand in operands for shape in operand.shapes)
        groups = groups_of(i)
        n = max((len(group) for group in groups), default=1)
        share = (n - 1) / n if n > 1 else 0.0
        if kind == "collective-permute":
            held, wire = given, float(given)
        elif kind == "all-gather":
            held, wire = given * n, given * n * share
        elif kind == "all-reduce":
            held, wire = given, 2 * given * share
        elif kind == "reduce-scatter":
            held, wire = given // max(n, 1), given * share
        else:
            held, wire = given, given * share
        found = re.search(r'op_name="([^"]*)"', i.attributes)
        return Collective(
            kind,
            runs,
            held,
            wire,
            groups,
            self._overlapped(i, computation),
            found[1] if found else "",
        )

    def _overlapped(self, i: Instruction, computation: Computation) -> bool:
        if computation.name in self.fused:  # an asynchronous one, split over several fusions
            return True
        if not i.op.endswith("-start"):
            return False
        names = list(computation.instructions)
        for name in names[names.index(i.name) + 1 :]:
            between = computation.instructions[name]
            if between.op.endswith("-done") and i.name in between.operands:
                return False
            if between.op in ("fusion", "convolution", "dot", "custom-call", "while"):
                return True
        return False

    def _visit(self, name: str, runs: int, fused: bool) -> None:
        self.runs[name] += runs
        if fused:
            self.fused.add(name)
        computation = self.computations[name]
        for i in computation.instructions.values():
            trips = 1
            if i.op == "while":
                found = self.trips(i, computation)
                if found is None:
                    self.unknown_loops.append(i.name)
                trips = 1 if found is None else found
            for how, called in i.called:
                if called in self.computations:
                    self._visit(called, runs * trips, fused or (how == "calls"))

    def trips(self, loop: Instruction, computation: Computation) -> int | None:
        """How often the body of a counted loop runs; None: it is not of the form that is known."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
        if known:
            return int(known[1])
        condition = self.computations.get((loop.attribute("condition") or "").lstrip("%"))
        body = self.computations.get((loop.attribute("body") or "").lstrip("%"))
        if condition is None or body is None:
            return None
        test = self._test(condition)
        if test is None:
            return None
        index, limit, inclusive = test
        start = self._start(loop, computation, index)
        step = self._step(body, index)
        if start is None or not step or step < 0:
            return None
        return max(0, -(-(limit + inclusive - start) // step))

    def _test(self, condition: Computation) -> tuple[int, int, int] | None:
        """(index of the counter, limit, 1 if the limit itself still runs)."""
        root: Instruction | None = condition.of(condition.root)
        where, values = condition, {}
        if root is not None and root.op == "fusion":
            where = self.computations[root.called[0][1]]
            values = dict(enumerate(root.operands))
            root = where.of(where.root)
        if root is None or root.op != "compare":
            return None

        def outer(name: str) -> Instruction | None:
            found = where.of(name)
            if found is not None and found.op == "parameter" and where is not condition:
                return condition.of(values[int(found.literal)])
            return found

        left, right = (outer(name) for name in root.operands)
        direction = root.attribute("direction")
        if direction in ("GT", "GE"):
            left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
        if left is None or right is None or direction not in ("LT", "LE"):
            return None
        if left.op != "get-tuple-element" or right.op != "constant":
            return None
        return int(left.attribute("index") or 0), int(right.literal), int(direction == "LE")

    def _start(self, loop: Instruction, computation: Computation, index: int) -> int | None:
        given = computation.of(loop.operands[0])
        if given is None or given.op != "tuple":
            return None
        value = computation.of(given.operands[index])
        while value is not None and value.op in ("copy", "bitcast"):
            value = computation.of(value.operands[0])
        if value is None or value.op == "fusion":
            return None
        return int(value.literal) if value.op == "constant" else None

    def _step(self, body: Computation, index: int) -> int | None:
        root = body.of(body.root)
        if root is None or root.op != "tuple":
            return None
        return self._added(body, root.operands[index], index)

    def _added(self, where: Computation, name: str, index: int) -> int | None:
        """What `name` has over the loop's counter; None: it is not the counter plus a constant."""
        i = where.of(name)
        if i is None:
            return None
        if i.op in ("copy", "bitcast"):
            return self._added(where, i.operands[0], index)
        if i.op == "get-tuple-element":
            source = where.of(i.operands[0])
            if source is not None and source.op == "parameter":
                return 0 if int(i.attribute("index") or -1) == index else None
            return None
        if i.op == "add":
            return self._sum(where, i.operands, index)
        if i.op == "fusion":
            inner = self.computations[i.called[0][1]]
            root = inner.of(inner.root)
            if root is None or root.op != "add":
                return None
            total = 0
            for operand in root.operands:
                part = inner.of(operand)
                if part is None:
                    return None
                if part.op == "constant":
                    total += int(part.literal)
                    continue
                if part.op != "parameter":
                    return None
                outer = i.operands[int(part.literal)]
                constant = where.of(outer)
                if constant is not None and constant.op == "constant":
                    total += int(constant.literal)
                    continue
                added = self._added(where, outer, index)
                if added is None:
                    return None
                total += added
            return total
        return None

    def _sum(self, where: Computation, names: Sequence[str], index: int) -> int | None:
        total = 0
        for name in names:
            i = where.of(name)
            part = (
                int(i.literal)
                if i is not None and i.op == "constant"
                else self._added(where, name, index)
            )
            if part is None:
                return None
            total += part
        return total

    def _parse(self, text: str) -> None:
        current: Computation | None = None
        for line in text.splitlines():
            if not line.startswith(" "):
                head = _HEAD.match(line)
                if head:
                    current = Computation(head[2])
                    self.computations[head[2]] = current
                    self.entry = head[2] if head[1] else self.entry
                continue
            found = _INSTRUCTION.match(line)
            if found is None or current is None:
                continue
            instruction = parse_instruction(found[2], line[found.end() :])
            current.instructions[instruction.name] = instruction
            current.root = instruction.name if found[1] else current.root


def parse_instruction(name: str, rest: str) -> Instruction:
    """`rest` is what stands behind "name = ": type, operation, operands, attributes."""
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    kind, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name,
        rest[:opening],
        tuple(_shapes(kind)),
        tuple(_OPERAND.findall(inside)),
        rest[closing + 1 :],
        inside,
    )


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _SHAPE.findall(text):
        sizes = tuple(int(d.lstrip("<=")) for d in dims.split(",") if d)
        space = re.search(r"S\((\d+)\)", layout or "")
        yield Shape(dtype, sizes, bool(space) and space[1] != "0")


def _closing(text: str, opening: int) -> int:
    depth = 0
    for i in range(opening, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0:
            return i
    raise ValueError(f"no closing parenthesis: {text[:80]}")


def product_flops(i: Instruction, computation: Computation) -> int:
    """Multiplications and additions of a `dot` or `convolution` (a TPU has products as those).

    Padding is left out, as XLA leaves it out: only pairs of an output and a kernel position that
    meet an input element count.
    """
    sides = [found for name in i.operands[:2] if (found := computation.of(name))]
    if len(sides) < 2:
        return 0
    left, right, out = sides[0].shapes[0].dims, sides[1].shapes[0].dims, i.shapes[0].dims
    if i.op == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
        axes = [int(axis) for axis in contracted[1].split(",") if axis] if contracted else []
        return 2 * math.prod(out) * math.prod(left[axis] for axis in axes)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.attributes)
    assert labels, i.attributes
    spatial = sum(label.isdigit() for label in labels[2])
    window = _window(i.attributes, spatial)
    pairs = 1
    for axis in range(spatial):
        at = str(axis)
        size_in = left[labels[1].index(at)]
        size_out = out[labels[3].index(at)]
        pairs *= _valid_pairs(size_in, size_out, *window[axis])
    batch = out[labels[3].index("b")]
    features = out[labels[3].index("f")]
    # The kernel's input features are those of one group already.
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch_in = left[labels[1].index("b")]
    per_group = batch_in // int(groups[1]) if groups else batch
    return 2 * min(batch, per_group) * features * right[labels[2].index("i")] * pairs


def _window(attributes: str, spatial: int) -> list[tuple[int, int, int, int, int]]:
    """(kernel size, stride, padding before, input dilation, kernel dilation) of each axis."""
    found = re.search(r"window=\{([^}]*)\}", attributes)
    fields = dict(part.split("=") for part in found[1].split()) if found else {}

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * spatial

    return [
        (int(size), int(stride), int(pad.split("_")[0]), int(inner), int(kernel))
        for size, stride, pad, inner, kernel in zip(
            values("size", "1"),
            values("stride", "1"),
            values("pad", "0_0"),
            values("lhs_dilate", "1"),
            values("rhs_dilate", "1"),
            strict=True,
        )
    ]


@functools.cache
def _valid_pairs(
    size_in: int, size_out: int, kernel: int, stride: int, pad: int, inner: int, dilation: int
) -> int:
    """Pairs (output position, kernel position) that meet an element of the input."""
    at = np.arange(size_out)[:, None] * stride + np.arange(kernel) * dilation - pad
    return int(((at >= 0) & (at % inner == 0) & (at // inner < size_in)).sum())


def is_kernel(i: Instruction) -> bool:
    """A kernel written by hand (Pallas), and not one of the compiler's own helpers."""
    return i.op == "custom-call" and 'custom_call_target="tpu_custom_call"' in i.attributes


def kernel_flops(i: Instruction) -> float | None:
    """What the kernel's author declared or, of jax's splash attention, what it does; else None."""
    found = re.search(r'"cost_estimate":\{[^}]*"flops":"?(\d+)', i.attributes)
    return float(found[1]) if found else _splash_flops(i)


def _splash_flops(i: Instruction) -> float | None:
    """Of a causal row, whose tiles above the diagonal are skipped: what is on it counts whole.

    Forward two products a tile, backward three for dq and four for dk and dv, or five for all.
    """
    kind = re.match(r"splash_m[hq]a_(fwd|dq|dkv)", i.name)
    tiles = re.search(r"\bs(?:8|16|32)\[\d+,(\d+),(\d+)\]", i.attributes)
    queries = re.search(r"\b(?:bf16|f32)\[(\d+),(\d+),(\d+)\]", i.attributes)
    if not kind or not tiles or not queries:
        return None
    heads, slots, width = (int(n) for n in queries.groups())
    fused = any(len(shape.dims) == 4 for shape in i.shapes)  # dq, of each tile of keys
    products = {"fwd": 2, "dq": 3, "dkv": 5 if fused else 4}[kind[1]]
    n = int(tiles[2])
    return products * 2 * heads * slots**2 * width * (n + 1) / (2 * n)


def groups_of(i: Instruction) -> tuple[tuple[int, ...], ...]:
    """The partitions that take part together; of a permute, (source, target) pairs."""
    pairs = re.search(r"(?:source_target_pairs|replica_groups)=\{(\{[\d,{} ]*\})\}", i.attributes)
    if pairs:
        return tuple(
            tuple(int(n) for n in group.split(",") if n)
            for group in re.findall(r"\{([\d, ]*)\}", pairs[1])
        )
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", i.attributes)
    if named:
        axes = [part.rsplit("=", 1) for part in named[1].split(",")]
        sizes = [int(size) for _, size in axes]
        chosen = [part.strip() for part in named[2].split(",")]
        inside = [n for n, (axis, _) in enumerate(axes) if axis in chosen]
        return _grouped(np.arange(math.prod(sizes)).reshape(sizes), inside)
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes)
    if iota:
        shape, source = ([int(n) for n in iota[k].split(",")] for k in (1, 2))
        ids = np.arange(math.prod(source)).reshape(source)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return tuple(tuple(int(n) for n in row) for row in ids.reshape(shape))
    return ()


def _grouped(ids: np.ndarray, inside: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    outside = [axis for axis in range(ids.ndim) if axis not in inside]
    rows = ids.transpose([*outside, *inside]).reshape(
        math.prod(ids.shape[axis] for axis in outside), -1
    )
    return tuple(tuple(int(n) for n in row) for row in rows)


def axes_of(
    groups: Sequence[Sequence[int]], axes: Sequence[str], shape: Sequence[int]
) -> tuple[str, ...]:
    """The mesh axes that a collective crosses: those in which members of a group differ."""
    crossed: set[str] = set()
    for group in groups:
        places = np.array(np.unravel_index(list(group), tuple(shape)))
        crossed |= {axis for axis, row in zip(axes, places, strict=True) if row.min() != row.max()}
    return tuple(axis for axis in axes if axis in crossed)


def _read(fused: Computation, number: int, operand: Instruction) -> int:
    """Bytes of an operand that a fusion reads: of a stack it cuts one slice from, the slice."""
    whole = operand.hbm_bytes
    parameter = fused.parameter(number)
    users = fused.users[parameter.name] if parameter and whole else []
    if not users:
        return whole
    if all(user.op in ("dynamic-slice", "gather", "slice") for user in users):
        return min(whole, sum(shape.bytes for user in users for shape in user.shapes))
    if all(
        user.op == "dynamic-update-slice" and user.operands[0] == (parameter and parameter.name)
        for user in users
    ):
        return 0  # written in place
    return whole


def _written(fused: Computation, i: Instruction) -> int:
    """Bytes that a fusion writes: into a stack it updates in place, the update."""
    root = fused.of(fused.root)
    if root is None:
        return i.hbm_bytes
    parts = [fused.of(name) for name in root.operands] if root.op == "tuple" else [root]
    total = 0
    for part, shape in zip(parts, i.shapes, strict=False):
        while part is not None and part.op == "bitcast":
            part = fused.of(part.operands[0])
        if part is not None and part.op == "dynamic-update-slice" and not shape.on_chip:
            update = fused.of(part.operands[1])
            total += update.shapes[0].bytes if update else shape.hbm_bytes
        else:
            total += shape.hbm_bytes
    return total
