"""What a plan is made for: the slices that exist, and what their chips can do."""

import contextlib
import dataclasses
import math
import os
from collections.abc import Iterator
from typing import Any

from jaxrl.config import Config
from jaxrl.cpu import divide_cpu
from jaxrl.types import UserError

GIB = 1 << 30
_SMALL = ("2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    *("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16"),
    *("8x16x16", "16x16x16"),
)


@dataclasses.dataclass(frozen=True)
class Chip:
    """Figures of one device as jax sees it. A TPU7x chip is two devices, which halve its own."""

    name: str
    flops: float  # bfloat16 matrix products, a second
    hbm_bytes: int  # that a program may use
    hbm_bandwidth: float  # bytes a second
    link_bandwidth: float  # bytes a second, one way over one link
    devices: int = 1  # of a chip
    shapes: tuple[str, ...] = ()


# Peak FLOP/s, HBM bandwidth, and links (bidirectional bandwidth of a chip over 2 x its ports):
# docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, read 2026-11-20. Usable HBM: what XLA
# names when a program is too large for the chip (libtpu 0.0.42); it keeps the rest for itself.
TPUS = {
    "v5e": Chip("TPU v5e", 197e12, int(15.75 * GIB), 819e9, 50e9, 1, _SMALL),
    "v5p": Chip("TPU v5p", 459e12, int(95.74 * GIB), 2765e9, 100e9, 1, _CUBES),
    "v6e": Chip("TPU v6e", 918e12, int(31.25 * GIB), 1638e9, 100e9, 1, _SMALL),
    "tpu7x": Chip("TPU7x", 2307e12 / 2, int(94.75 * GIB), 7380e9 / 2, 100e9, 2, _CUBES),
}
# Dense bfloat16, memory bandwidth and NVLink one way: NVIDIA's data sheets. Memory is asked for.
GPUS = {
    "H200": Chip("H200", 989e12, 0, 4.8e12, 450e9),
    "H100": Chip("H100 SXM", 989e12, 0, 3.35e12, 450e9),
    "A100": Chip("A100 SXM", 312e12, 0, 2.039e12, 300e9),
}


@dataclasses.dataclass(frozen=True)
class Target:
    name: str  # v5e:4x4
    platform: str  # tpu, gpu or cpu
    devices: tuple[Any, ...]
    chip: Chip | None  # None: its speed is not known here
    memory_bytes: int | None  # of a device; None: not known

    @property
    def chips(self) -> int:
        return len(self.devices) // (self.chip.devices if self.chip else 1)


def choose(topology: str | None, chips: int | None, c: Config) -> str:
    """The name of the target: a slice as libtpu calls it, `cpu`, or "" for what jax sees.

    Raises UserError for what does not exist. Loads nothing: environment variables can still be set.
    """
    if topology is None and chips is None:
        return ""
    kind, _, shape = (topology or "v5e").partition(":")
    if kind == "cpu" and not shape:
        return "cpu"
    chip = TPUS.get(kind)
    if chip is None or (shape and shape not in chip.shapes):
        raise UserError(f"--topology {topology}: there is no such slice; {_known(kind)}")
    by_chips = {math.prod(map(int, s.split("x"))): s for s in reversed(chip.shapes)}
    if shape:
        have = math.prod(map(int, shape.split("x")))
        if chips is not None and chips != have:
            raise UserError(
                f"--chips {chips}: {topology} has {have}; leave --chips out, or the shape: "
                f"--topology {kind} --chips {chips}"
            )
        return f"{kind}:{shape}"
    wanted = chips if chips is not None else mesh_devices(c) // chip.devices
    if wanted not in by_chips:
        from_mesh = "" if chips is not None else " (the mesh's devices)"
        raise UserError(
            f"--topology {kind}: no slice has {wanted} chips{from_mesh}; there are "
            f"{', '.join(map(str, sorted(by_chips)))}"
        )
    return f"{kind}:{by_chips[wanted]}"


def _known(kind: str) -> str:
    kinds = [kind] if kind in TPUS else list(TPUS)
    slices = "; ".join(f"{k}: {', '.join(TPUS[k].shapes)}" for k in kinds)
    return f"known are {slices}" + ("" if kind in TPUS else "; and cpu")


def set_environment(name: str, c: Config) -> None:
    """What jax and libtpu read when they are loaded; must come first."""
    if name in ("", "cpu"):
        divide_cpu(mesh_devices(c))
    if name:
        # A program is compiled and never run: a chip that is here is left to whoever trains on it.
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"


def open_target(name: str, c: Config) -> Target:
    """Raises UserError if the mesh does not cover the target's devices, or libtpu is missing."""
    import jax

    if ":" in name:
        target = _slice(name)
    else:  # as a run does, the first devices that the mesh needs
        devices = tuple(jax.devices())[: mesh_devices(c)]
        kind = devices[0].device_kind
        chip = next((chip for key, chip in GPUS.items() if key in kind), None)
        target = Target(f"{kind} x {len(devices)}", devices[0].platform, devices, chip, _memory())
    need, have = mesh_devices(c), len(target.devices)
    if need != have:
        axes = mesh_axes(c)
        others = need // axes["fsdp"]
        way = f"--mesh.fsdp={have // others}"
        if have % others:
            way = f"--mesh.fsdp={have}, with 1 for the other axes"
        raise UserError(
            f"{' * '.join(f'mesh.{axis}' for axis in axes)} = "
            f"{' * '.join(map(str, axes.values()))} = {need} devices, and {target.name} has "
            f"{have}; for example {way}"
        )
    return target


def mesh_axes(c: Config) -> dict[str, int]:
    return c.mesh.model_dump()


def mesh_devices(c: Config) -> int:
    return math.prod(mesh_axes(c).values())


def _slice(name: str) -> Target:
    try:
        import libtpu  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"--topology {name} needs libtpu, TPU's compiler: install the extra plan "
            "(pip install '.[plan]')"
        ) from None
    from jax.experimental import topologies

    try:
        devices = topologies.get_topology_desc(name, "tpu").devices
    except Exception as error:
        raise UserError(f"--topology {name}: libtpu refuses it: {error}") from None
    chip = TPUS[name.partition(":")[0]]
    return Target(name, "tpu", tuple(devices), chip, chip.hbm_bytes)


def _memory() -> int | None:
    """Of a device that is here: what its allocator may use, or the machine's."""
    import jax

    with contextlib.suppress(Exception):
        stats = jax.devices()[0].memory_stats()
        if stats and "bytes_limit" in stats:
            return int(stats["bytes_limit"])
    if jax.default_backend() == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // jax.device_count()
    return None


def larger(name: str) -> Iterator[str]:
    """The next slices of the same kind."""
    kind, _, shape = name.partition(":")
    if kind in TPUS:
        shapes = TPUS[kind].shapes
        yield from (f"{kind}:{s}" for s in shapes[shapes.index(shape) + 1 :])
