"""The layout, enforced: every module has a place, imports point one way, each half stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = [  # a module imports only from rows above its own
    ["jaxrl.no_tpu", "jaxrl.cpu"],
    [
        "jaxrl.types",
        "jaxrl.objectives.choices",
        "jaxrl.objectives.aggregation",
        "bridge.wire",
        "bridge.delta",
        "bridge.guard",
        "bridge.engines.errors",
        "bridge.engines.sockets",
    ],
    [
        "bridge.beam",
        "jaxrl.durable",
        "jaxrl.config",
        "jaxrl.report",
        "jaxrl.interrupt",
        "jaxrl.model_dir",
    ],
    [
        "jaxrl.settings",
        "jaxrl.hosts",
        "jaxrl.rundir",
        "jaxrl.checkpoint",
        "jaxrl.metrics",
        "jaxrl.ledger",
        "jaxrl.alarms",
        "jaxrl.curriculum",
    ],
    ["bridge.safetensors_files"],
    ["jaxrl.logprobs", "jaxrl.objectives.custom"],
    ["jaxrl.objectives.tokens"],
    ["jaxrl.objectives.policy", "jaxrl.objectives.correction", "jaxrl.objectives.kl"],
    ["jaxrl.objectives.objective"],
    ["jaxrl.models.rope"],
    ["jaxrl.models.config"],
    ["jaxrl.models.params"],
    ["jaxrl.mesh"],
    ["jaxrl.models.attention", "jaxrl.models.grouped", "bridge.names", "bridge.channels"],
    ["jaxrl.models.decoder", "jaxrl.models.lora"],
    ["jaxrl.advantages", "jaxrl.optimizer", "jaxrl.packing", "jaxrl.data"],
    ["bridge.placing", "bridge.compare"],
    ["jaxrl.rewards.tasks", "jaxrl.measure"],
    ["jaxrl.rewards", "jaxrl.collect", "bridge.checkpoints", "bridge.export", "bridge.peft"],
    ["jaxrl.update", "jaxrl.sampler", "bridge.channels.layout", "bridge.generate"],
    [
        "bridge.channels.object_store",
        "bridge.channels.shuttle",
        "bridge.torch_view",
        "bridge.node_copy",
    ],
    ["bridge.encoding", "bridge.receive", "bridge.transaction", "bridge.channels.cloud"],
    [
        "bridge.engines.examine",
        "bridge.engines.counters",
        "bridge.engines.intake",
        "bridge.engines.sampling",
    ],
    ["bridge.engines.weight_transfer", "bridge.engines.plugin", "bridge.publisher"],
    ["bridge.engines.vllm"],
    ["bridge.engines.servers"],
    ["bridge.engines.http"],
    ["bridge.roster", "bridge.schedule", "bridge.gauges"],
    ["bridge.requests"],
    ["bridge.fleet"],
    ["jaxrl.learner"],
    ["jaxrl.led"],
    ["jaxrl.program"],
    ["jaxrl.train", "jaxrl.sft"],
]
RANK = {module: rank for rank, row in enumerate(LAYERS) for module in row}

HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "torch", "vllm", "ray", "transformers"}
TRAINER = {"torch", "vllm", "ray", "transformers"}
WORKER = {"jax", "jaxlib", "flax", "optax", "orbax"}
NEVER_REACHES = {  # directly or through others
    "jaxrl.no_tpu": HEAVY,
    "jaxrl.cpu": HEAVY,
    "jaxrl.types": HEAVY,
    "jaxrl.config": HEAVY,
    "jaxrl.objectives.choices": HEAVY,
    "jaxrl.objectives.custom": HEAVY,
    "jaxrl.settings": HEAVY,
    "jaxrl.hosts": HEAVY,
    "jaxrl.models.rope": HEAVY,
    "jaxrl.models.config": HEAVY,
    "jaxrl.models.params": HEAVY,
    "bridge.wire": HEAVY,
    "bridge.delta": HEAVY,
    "bridge.guard": HEAVY,
    "bridge.beam": HEAVY,
    "bridge.names": HEAVY,
    "bridge.safetensors_files": HEAVY,
    "bridge.peft": HEAVY,
    "bridge.channels": HEAVY,
    "jaxrl.models.lora": TRAINER,
    "jaxrl.sampler": TRAINER,
    "jaxrl.advantages": HEAVY,
    "jaxrl.curriculum": HEAVY,
    "jaxrl.packing": HEAVY,
    "jaxrl.update": TRAINER,
    "jaxrl.checkpoint": TRAINER,
    "jaxrl.metrics": TRAINER,
    "jaxrl.data": TRAINER,
    "jaxrl.rewards": TRAINER,
    "bridge.placing": TRAINER,
    "bridge.checkpoints": TRAINER,
    "bridge.export": TRAINER,
    "bridge.compare": TRAINER,
    "bridge.encoding": HEAVY,
    "bridge.node_copy": HEAVY,
    "bridge.receive": HEAVY,
    "bridge.transaction": HEAVY,
    "bridge.publisher": TRAINER,
    "bridge.channels.layout": HEAVY,
    "bridge.channels.shuttle": HEAVY,
    "bridge.channels.cloud": HEAVY,
    "bridge.channels.object_store": WORKER | {"torch", "vllm"},
    "bridge.torch_view": WORKER | {"vllm", "ray"},
    "bridge.engines.errors": HEAVY,
    "bridge.engines.intake": HEAVY,
    "bridge.engines.sampling": HEAVY,
    "bridge.engines.counters": WORKER | {"ray"},
    "bridge.engines.examine": WORKER | {"ray"},
    "bridge.engines.weight_transfer": WORKER,
    "bridge.engines.plugin": WORKER,
    "bridge.engines.vllm": WORKER,
    "bridge.gauges": WORKER | {"torch", "vllm"},
    "bridge.roster": HEAVY,
    "bridge.schedule": HEAVY,
    "bridge.requests": HEAVY,
    "bridge.engines.servers": HEAVY,
    "bridge.engines.http": HEAVY,
    "bridge.generate": HEAVY,
    "bridge.fleet": WORKER | {"torch", "vllm"},
}
JOINS_THE_HALVES = {"jaxrl.learner", "jaxrl.led", "jaxrl.train"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for package in ("jaxrl", "bridge")
    for path in sorted((ROOT / package).rglob("*.py"))
}
PACKAGES_WITHOUT_CODE = {"jaxrl", "bridge", "bridge.engines", "jaxrl.models", "jaxrl.objectives"}


def imported(module: str, *, at_load: bool) -> set[str]:
    """Modules named by import statements of the file: all, or those that run when it loads."""
    tree = ast.parse(FILES[module].read_text())
    found: set[str] = set()

    def visit(node: ast.AST) -> None:
        if at_load and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            return
        if at_load and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(tree)
    return found


def ours(module: str, *, at_load: bool) -> set[str]:
    return (imported(module, at_load=at_load) & FILES.keys()) - PACKAGES_WITHOUT_CODE


def reach(module: str) -> set[str]:
    """Top-level packages that are loaded when the module is."""
    seen, waiting, packages = set(), [module], set()
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        packages |= {name.split(".")[0] for name in imported(current, at_load=True)}
        waiting += ours(current, at_load=True)
    return packages


def test_every_module_has_a_place():
    assert FILES.keys() - PACKAGES_WITHOUT_CODE == RANK.keys()


@pytest.mark.parametrize("module", RANK)
def test_imports_point_one_way(module):
    upward = {
        other for other in ours(module, at_load=False) - {module} if RANK[other] >= RANK[module]
    }
    assert not upward, f"{module} imports {sorted(upward)}, which is not above it"


@pytest.mark.parametrize("module", NEVER_REACHES)
def test_what_must_stay_light_stays_light(module):
    heavy = reach(module) & NEVER_REACHES[module]
    assert not heavy, f"{module} pulls in {sorted(heavy)}"


@pytest.mark.parametrize("module", [m for m in RANK if m.startswith("jaxrl.")])
def test_only_the_composition_root_joins_trainer_and_bridge(module):
    bridge = {name for name in imported(module, at_load=False) if name.split(".")[0] == "bridge"}
    assert module in JOINS_THE_HALVES or not bridge, f"{module} imports {sorted(bridge)}"


@pytest.mark.parametrize("module", [m for m in RANK if m.startswith("jaxrl.")])
def test_the_trainer_never_names_torch_vllm_or_ray(module):
    heavy = {name.split(".")[0] for name in imported(module, at_load=False)} & TRAINER
    assert not heavy, f"{module} imports {sorted(heavy)}"


@pytest.mark.parametrize(
    "module", ["jaxrl.train", "jaxrl.sft", "bridge.fleet", "bridge.engines.vllm"]
)
def test_what_loads_in_a_fresh_process_is_what_the_table_allows(module):
    """The table reads source; this runs it. The commands must answer a typo without jax."""
    forbidden = NEVER_REACHES.get(module, HEAVY)
    code = f"import sys, {module}; print(*sorted({forbidden!r} & set(sys.modules)))"
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.split() == []
