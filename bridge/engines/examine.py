"""What a worker's model holds, compared with the tensors that it was given to load.

The digest of a version is that of the tensors which the model's loader was handed: a loader that
leaves one of them behind, or puts it where another belongs, does not change it. Here every tensor
is looked up in the model by what the layers say of themselves, and not by the loader's code, and
compared with what lies there:

- bit for bit, after a cast to the parameter's dtype, where the parameter can be read;
- by a probe where it cannot: on CPU vLLM packs the weights of a linear layer and frees them. The
  layer multiplies a few fixed vectors, and every row must give the products of the row that was
  sent, up to rounding. A wrong row is found; a change within a row that is smaller than the
  rounding of its products is not.

A tensor that cannot be placed is unchecked, and named.
"""

import itertools
import math
import re
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.utils import parse_fine_tuned_lora_name
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

_PROBES = 4  # vectors that a packed layer multiplies
_CHUNK = 1 << 20  # elements compared at a time: a millisecond or two
_DEVIATIONS = 10  # standard ones, of the rounding errors of a sum
_RUNS = 8  # runs of rows that a reason names
_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(\w+)")
_BITS = {2: torch.int16, 4: torch.int32}  # by the bytes of an element
_PLAIN_EXPERTS = {UnquantizedMoeBackend.TRITON, UnquantizedMoeBackend.BATCHED_TRITON}

Tensors = Sequence[tuple[str, torch.Tensor]]


class Unplaced(Exception):
    """The model has no place for a tensor, or none that this module knows how to read."""


class Block(NamedTuple):
    """A matrix or vector of the model: a parameter, one expert's, or one of an adapter's stack."""

    layer: Any
    parameter: str
    member: int | None = None


class Part(NamedTuple):
    """The rows of a tensor that was sent which belong to one block of this rank."""

    rows: torch.Tensor  # a view, [rows, columns] or [rows], in the dtype that was sent
    start: int = 0  # the first row's place in the block
    origin: int = 0  # and in the tensor
    scale: float = 1.0  # what the model multiplied it with, in the block's dtype


class Examination:
    """Compares a version with the model that it was loaded into, a little at a time."""

    def __init__(self, model: Any, version: int, tensors: Tensors, scaling: float | None = None):
        """
        Args:
          tensors: those of the model by their Hugging Face names, or of an adapter by PEFT's.
          scaling: the adapter's alpha / r, where it is one.
        """
        self._report: dict[str, Any] = {"version": version, "tensors": len(tensors)}
        self._walk = self._compare(Places(model, scaling), tensors)

    @torch.inference_mode()
    def work(self, budget_s: float) -> dict[str, Any] | None:
        """Goes on for `budget_s`, and to the end of the layer that it is at.

        Returns:
          None while there is more to do. Then version; tensors, their number; probed and unchecked,
          names; wrong, name -> reason. A name may be in several; one in none was found exactly.
        """
        end = time.monotonic() + budget_s
        for _ in self._walk:
            if time.monotonic() >= end:
                return None
        return self._report

    def _compare(self, places: "Places", tensors: Tensors) -> Iterator[None]:
        blocks: dict[Block, list[tuple[str, Part]]] = {}
        probed, unchecked, wrong = set(), set(), {}
        for name, tensor in tensors:
            yield
            try:
                for block, part in places.of(name, tensor):
                    blocks.setdefault(block, []).append((name, part))
            except Unplaced:
                unchecked.add(name)
        for block, named in blocks.items():
            names, parts = [name for name, _ in named], [part for _, part in named]
            ways = _ways(block)
            if _probe in ways:
                probed.update(names)
            if not ways:
                unchecked.update(names)
            for way in ways:
                for name, reason in zip(names, (yield from way(block, parts)), strict=True):
                    if reason:
                        wrong.setdefault(name, reason)
        self._report |= {"probed": sorted(probed), "unchecked": sorted(unchecked), "wrong": wrong}


class Places:
    """Where the tensors of a version lie in a model, or in this rank's part of one."""

    def __init__(self, model: Any, scaling: float | None):
        # A layer that is wrapped for an adapter comes after its wrapper, and takes its name.
        self._layers: dict[str, Any] = {
            path.replace(".base_layer", ""): layer for path, layer in model.named_modules()
        }
        self._fused: dict[str, list[str]] = getattr(model, "packed_modules_mapping", {})
        self._renames = renames(model)
        self._scaling = scaling
        self._wrappers: dict[str, Any] = {} if scaling is None else model.lora_manager.modules

    def of(self, name: str, tensor: torch.Tensor) -> list[tuple[Block, Part]]:
        """Raises Unplaced; a tensor may lie in several places, all of which count."""
        if self._scaling is not None:
            return self._adapter(name, tensor, self._scaling)
        mapped = name if self._renames is None else self._renames.map_name(name)
        path, _, parameter = (mapped or "").rpartition(".")
        if one := _EXPERT.fullmatch(path):
            return _one_expert(self._experts(one[1]), int(one[2]), one[3], parameter, tensor)
        if path.endswith(".experts"):
            return _all_experts(self._experts(path), parameter, tensor)
        place, index = self._find(path)
        layer = self._layers[place]
        held = layer._parameters.get(parameter)
        if held is None:
            raise Unplaced(f"{place} has no {parameter}")
        if isinstance(layer, VocabParallelEmbedding):
            shard = layer.shard_indices
            first, last = shard.org_vocab_start_index, shard.org_vocab_end_index
            _require(len(tensor) == layer.org_vocab_size)
            return [
                (Block(layer, parameter), Part(tensor[first:last], origin=first))
                for layer in self._layers.values()  # a tied head is a layer of its own
                if isinstance(layer, VocabParallelEmbedding)
                and layer._parameters.get(parameter) is held
            ]
        if isinstance(layer, LinearBase):
            sent = _own_columns(layer, tensor) if parameter == "weight" else tensor
            parts = _own_rows(layer, sent, index)
        else:
            parts = [_own_share(tensor, held)]
        return [(Block(layer, parameter), part) for part in parts]

    def _find(self, path: str) -> tuple[str, int | None]:
        """The path of a layer, and which of the layers fused into it is meant."""
        if path in self._layers:
            return path, None
        parent, _, leaf = path.rpartition(".")
        for fused, leaves in self._fused.items():
            place = f"{parent}.{fused}" if parent else fused
            if leaf in leaves and place in self._layers:
                return place, leaves.index(leaf)
        raise Unplaced(path)

    def _experts(self, path: str) -> Any:
        layer = self._layers.get(f"{path}.routed_experts")
        if not isinstance(layer, RoutedExperts) or layer.use_ep:
            raise Unplaced(path)
        return layer

    def _adapter(self, name: str, tensor: torch.Tensor, scaling: float) -> list[tuple[Block, Part]]:
        path, is_a = parse_fine_tuned_lora_name(name, self._renames)
        place, index = self._find(path)
        wrapper: Any = self._wrappers.get(place)
        if not isinstance(wrapper, BaseLinearLayerWithLoRA):
            raise Unplaced(path)
        layer: Any = wrapper.base_layer
        _require(wrapper.n_slices == (1 if index is None else len(layer.output_partition_sizes)))
        if is_a:
            part = Part(_own_columns(layer, tensor))
            return [(Block(wrapper, "lora_a_stacked", index or 0), part)]
        block = Block(wrapper, "lora_b_stacked", index or 0)
        parts = _own_rows(layer, tensor, index)
        start = parts[0].start  # each of the stack begins at its own first row
        return [(block, part._replace(start=part.start - start, scale=scaling)) for part in parts]


def renames(model: Any) -> Any:
    """What vLLM calls the model's modules, where it is not what Hugging Face does; or None."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    return None if mapper is None else mapper.get_rename_mapper()


def _require(condition: bool) -> None:
    if not condition:
        raise Unplaced


def _own_columns(layer: Any, tensor: torch.Tensor) -> torch.Tensor:
    _require(tensor.dim() == 2 and tensor.shape[1] == layer.input_size)
    if not isinstance(layer, RowParallelLinear):
        return tensor
    columns = layer.input_size_per_partition
    return tensor.narrow(1, layer.tp_rank * columns, columns)


def _own_rows(layer: Any, tensor: torch.Tensor, index: int | None) -> list[Part]:
    """This rank's rows of one of the layers fused into `layer`, or of all when `index` is None."""
    whole = isinstance(layer, RowParallelLinear | ReplicatedLinear)
    rank, ranks = (0, 1) if whole else (layer.tp_rank, layer.tp_size)
    sizes: list[int] = layer.output_partition_sizes  # of this rank
    _require(index is None or index < len(sizes))
    parts, origin = [], 0
    for one in range(len(sizes)) if index is None else [index]:
        # Heads of keys and values that there are too few of are held by several ranks each.
        replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and one else 1
        first = origin + rank // replicas * sizes[one]
        parts.append(Part(tensor[first : first + sizes[one]], sum(sizes[:one]), first))
        origin += sizes[one] * ranks // replicas
    _require(origin == len(tensor))
    return parts


def _own_share(tensor: torch.Tensor, held: torch.Tensor) -> Part:
    """Of a parameter that no layer describes: all of it, or an equal share of its rows."""
    if tensor.shape == held.shape:
        return Part(tensor)
    rank, ranks = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    _require(held.dim() > 0 and tensor.shape == (ranks * len(held), *held.shape[1:]))
    return Part(tensor[rank * len(held) : (rank + 1) * len(held)], origin=rank * len(held))


def _one_expert(
    layer: Any, expert: int, projection: str, parameter: str, tensor: torch.Tensor
) -> list[tuple[Block, Part]]:
    """One matrix of one expert: gate and up lie in the two halves of `w13`, down in `w2`."""
    _require(parameter == "weight" and tensor.dim() == 2)
    parallel = layer.moe_config.moe_parallel_config
    rank, ranks = parallel.tp_rank, parallel.tp_size
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
    _require(projection in names and expert < layer.global_num_experts)
    if projection == layer.ckpt_down_proj_name:
        size = tensor.shape[1] // ranks
        return [(Block(layer, "w2_weight", expert), Part(tensor.narrow(1, rank * size, size)))]
    size = len(tensor) // ranks
    half = layer.w13_weight.shape[1] // 2  # more than `size` where the kernel wants padding
    part = Part(tensor.narrow(0, rank * size, size), names.index(projection) * half, rank * size)
    return [(Block(layer, "w13_weight", expert), part)]


def _all_experts(layer: Any, parameter: str, tensor: torch.Tensor) -> list[tuple[Block, Part]]:
    """A tensor of all experts, [experts, in, out] or a bias, which has its parameter's own order.

    gpt-oss's: gate and up alternate, and only the first rank adds the bias of `w2`.
    """
    _require(parameter in layer._parameters and len(tensor) == layer.global_num_experts)
    parallel = layer.moe_config.moe_parallel_config
    rank, ranks = parallel.tp_rank, parallel.tp_size
    places = []
    for expert, sent in enumerate(tensor):
        matrix = sent.T if sent.dim() == 2 else sent
        if parameter.startswith("w13"):
            size = len(matrix) // ranks
            part = Part(matrix.narrow(0, rank * size, size), origin=rank * size)
        elif matrix.dim() == 2:
            size = matrix.shape[1] // ranks
            part = Part(matrix.narrow(1, rank * size, size))
        else:
            part = Part(matrix if rank == 0 else torch.zeros_like(matrix))
        places.append((Block(layer, parameter, expert), part))
    return places


Way = Callable[[Block, list[Part]], Generator[None, None, list[str]]]


def _ways(block: Block) -> list[Way]:
    """How the copies that the model has of a block can be compared; empty when they cannot."""
    if isinstance(block.layer, RoutedExperts) and block.parameter.endswith("weight"):
        return _ways_of_experts(block.layer)
    held, ways = _held(block), []
    if held.numel() > 0 and held.is_floating_point() and held.element_size() in _BITS:
        ways.append(_read)
    if block.parameter == "weight" and vars(block.layer).get("cpu_linear") is not None:
        ways.append(_probe)
    return ways


def _ways_of_experts(layer: RoutedExperts) -> list[Way]:
    method: Any = layer.quant_method
    if getattr(method, "unquantized_backend", None) in _PLAIN_EXPERTS:
        return [_read]
    kernel = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if not isinstance(kernel, CPUUnquantizedExperts):
        return []
    return [_read if kernel._use_zentorch else _read_packed]


def _held(block: Block) -> torch.Tensor:
    held = getattr(block.layer, block.parameter)
    if block.member is not None:
        held = held[block.member]
    return held[0, 0] if block.parameter.startswith("lora_") else held  # the one slot's adapter


def _matrix(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, 1)


def _chunks(part: Part) -> Iterator[tuple[int, torch.Tensor]]:
    """A few rows at a time, and where they begin."""
    rows = _matrix(part.rows)
    step = max(1, _CHUNK // rows.shape[1])
    for first in range(0, len(rows), step):
        yield first, rows[first : first + step]


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.element_size()])


def _read(block: Block, parts: list[Part]) -> Generator[None, None, list[str]]:
    """Compares bits. Yields now and then; returns a reason for each part, "" where it is right."""
    held, reasons = _matrix(_held(block)), []
    for part in parts:
        wrong = []
        for first, chunk in _chunks(part):
            sent = chunk.to(device=held.device, dtype=held.dtype)
            if part.scale != 1:
                sent = sent * part.scale
            start = part.start + first
            have = held[start : start + len(sent), : sent.shape[1]]
            differs = (_bits(have) != _bits(sent)).any(1)
            wrong += [part.origin + first + row for row in differs.nonzero()[:, 0].tolist()]
            yield
        reasons.append(_reason(block, wrong))
    return reasons


def _read_packed(block: Block, parts: list[Part]) -> Generator[None, None, list[str]]:
    """Compares bits with what was sent, packed as vLLM packs it for its kernel for experts.

    Which rows differ is told by packing their numbers in the same way.
    """
    held: Any = _held(block)
    isa = block.layer.quant_method.moe_kernel.fused_experts.isa
    sent = torch.zeros_like(held)
    for part in parts:
        rows, columns = part.rows.shape
        sent[part.start : part.start + rows, :columns] = part.rows
    yield
    differs = _bits(cpu_prepack_moe_weight(sent[None], isa)[0]) != _bits(held)
    wrong: list[int] = []
    if differs.any():
        numbers = torch.arange(len(held), dtype=_BITS[held.element_size()])
        numbers = numbers[:, None].expand(held.shape).contiguous().view(held.dtype)
        packed = _bits(cpu_prepack_moe_weight(numbers[None], isa)[0])
        wrong = (packed[differs].int() & 0xFFFF).unique().tolist()
    yield
    reasons = []
    for part in parts:
        own = range(part.start, part.start + len(part.rows))
        reasons.append(
            _reason(block, [row - part.start + part.origin for row in wrong if row in own])
        )
    return reasons


def _probe(block: Block, parts: list[Part]) -> Generator[None, None, list[str]]:
    """Compares what the layer makes of fixed vectors; yields and returns as `_read` does."""
    layer, dtype = block.layer, _held(block).dtype
    vectors = _vectors(parts[0].rows.shape[1])
    products = layer.quant_method.apply(layer, vectors.to(dtype)).float().T  # [rows, probes]
    yield
    reasons = []
    for part in parts:
        wrong, worst = [], (0.0, 0.0)
        for first, chunk in _chunks(part):
            sent = chunk.to(dtype).float()
            expected = sent @ vectors.T
            start = part.start + first
            error = (products[start : start + len(sent)] - expected).abs()
            bound = _bound(sent, expected, dtype)
            differs = ~(error <= bound)  # so that what is not a number differs
            wrong += [part.origin + first + row for row in differs.any(1).nonzero()[:, 0].tolist()]
            if differs.any():
                pairs = zip(error[differs].tolist(), bound[differs].tolist(), strict=True)
                worst = max(worst, *pairs)
            yield
        detail = "as packed, a product is {:.2g} off where rounding allows {:.2g}".format(*worst)
        reasons.append(_reason(block, wrong, detail))
    return reasons


def _vectors(columns: int) -> torch.Tensor:
    """What a packed layer multiplies, float32 [_PROBES, columns]: the same in every call.

    Magnitudes in [1, 2), so that no column counts for little; signs, so that sums stay small; and
    all different, so that columns cannot trade places unseen. Every engine's dtype has them.
    """
    generator = torch.Generator().manual_seed(0)
    steps = torch.randint(0, 128, (_PROBES, columns), generator=generator)
    signs = torch.randint(0, 2, (_PROBES, columns), generator=generator) * 2 - 1
    return signs * (1 + steps / 128)


def _bound(rows: torch.Tensor, products: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """How far two right products can lie apart, [rows, _PROBES].

    Both are summed in float32, with roundings of 2^-24 of at most S, the sum of the terms'
    magnitudes. Over n terms these exceed `_DEVIATIONS` sqrt(n) 2^-24 S with a probability below
    2 n exp(-_DEVIATIONS^2 / 2), 1e-16 at 100,000 terms (Higham and Mary, "A new approach to
    probabilistic rounding error analysis", 2019); the certain bound has n in the place of the root,
    and would hide much. The layer's is rounded once more, to its dtype.
    """
    terms = 2 * rows.abs().sum(1, keepdim=True)  # no vector has an element of 2
    summing = 2 * _DEVIATIONS * math.sqrt(rows.shape[1]) * 2.0**-24 * terms
    return summing + torch.finfo(dtype).eps * products.abs()


def _reason(block: Block, rows: list[int], detail: str = "") -> str:
    """What is said of a part with wrong rows, by their numbers in the tensor that was sent."""
    if not rows:
        return ""
    runs = []
    for _, group in itertools.groupby(enumerate(rows), lambda pair: pair[1] - pair[0]):
        (_, first), *rest = group
        runs.append(f"{first} to {rest[-1][1]}" if rest else f"{first}")
    more = f" and {len(runs) - _RUNS} more runs" if len(runs) > _RUNS else ""
    expert = f"expert {block.member}, " if isinstance(block.layer, RoutedExperts) else ""
    named = ", ".join(runs[:_RUNS]) + more
    return f"{expert}rows {named} are not what was sent{detail and f' ({detail})'}"
