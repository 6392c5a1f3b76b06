"""From a command line to a checked configuration: files, overrides, `--help`, all errors at once.

Only pydantic and PyYAML are loaded: a mistake is answered before jax, Ray or a model is touched.
"""

import argparse
import copy
import dataclasses
import difflib
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticUndefined

from jaxrl.config import (
    Config,
    EngineDtype,
    FurtherReward,
    RunConfig,
    Section,
    SftConfig,
    contradictions,
)
from jaxrl.types import UserError

C = TypeVar("C", Config, SftConfig)
Kind = type[Config] | type[SftConfig]


class ConfigError(UserError):
    """All the problems of one configuration, a line each."""


@dataclasses.dataclass(frozen=True)
class Command(Generic[C]):
    config: C
    resume: bool
    dry_run: bool
    arguments: tuple[str, ...]  # as given, without the flags


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """PyYAML reads 1e-6 as text, since YAML 1.1 wants a dot; people and JSON do not. It also lets
    a key appear twice and keeps the last one, and reads the key `on` as true; here those are
    errors. 2026-11-22 is text: no key holds a date, and a run may be named after one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        if not isinstance(node, yaml.MappingNode):  # `!!map x`: an error with its line
            return super().construct_mapping(node, deep)
        seen = set()
        for key_node, _ in node.value:
            text = isinstance(key_node, yaml.ScalarNode)
            if not text or key_node.tag not in (f"{_TAG}str", f"{_TAG}merge"):
                raise yaml.constructor.ConstructorError(
                    None, None, "expected a key that is text; quote it", key_node.start_mark
                )
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} stands here twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _or_text(construct: Callable[[_Loader, Any], Any]) -> Callable[[_Loader, Any], Any]:
    """PyYAML raises whatever Python does at `0x_`, `!!int x` or `!!bool x`. They stay text, and the
    check of the types says which key has it."""

    def constructed(loader: _Loader, node: yaml.ScalarNode) -> Any:
        try:
            return construct(loader, node)
        except (ValueError, LookupError, ArithmeticError):
            return loader.construct_scalar(node)

    return constructed


_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(r"[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{_TAG}timestamp"]
    for first, resolvers in _Loader.yaml_implicit_resolvers.items()
}
_Loader.add_constructor(f"{_TAG}timestamp", _Loader.construct_yaml_str)
for _tag in (f"{_TAG}bool", f"{_TAG}int", f"{_TAG}float"):
    _Loader.add_constructor(_tag, _or_text(_Loader.yaml_constructors[_tag]))


def usage(kind: Kind) -> str:
    return (
        f"python -m {kind.program} --config FILE [--resume | --dry-run] [--section.key VALUE ...]"
    )


def parse_command_line(arguments: Sequence[str], kind: type[C] = Config) -> Command[C]:
    """Reads `--config FILE` and overrides (`--section.key value` or `section.key=value`).

    Raises:
      ConfigError: with every problem found, a line each.
      SystemExit: after `--help`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {kind.program}",
        usage=usage(kind),
        description=f"{kind.purpose} Keys, with their defaults:\n\n{_list_keys(kind)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="the YAML file of the run")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run from its newest verified checkpoint"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="print the resolved configuration, start nothing"
    )
    known, rest = parser.parse_known_args(list(arguments))
    if known.config is None:
        raise ConfigError(f"--config FILE is required\nusage: {usage(kind)}")
    config = load(Path(known.config), list(overrides(rest, kind)), kind)
    flags = ("--resume", "--dry-run")
    given = tuple(argument for argument in arguments if argument not in flags)
    return Command(config, known.resume, known.dry_run, given)


def load(path: Path, overrides: Sequence[tuple[str, str]] = (), kind: type[C] = Config) -> C:
    """Reads `path`, applies `overrides` left to right, checks the result.

    Args:
      path: a YAML file.
      overrides: pairs of dotted key and YAML text.

    Raises:
      ConfigError: with every problem found, a line each.
    """
    tree = read_yaml(path)
    problems: list[str] = []
    for key, text in overrides:
        _apply(tree, key, text, problems, kind)
    try:
        config = kind.model_validate(tree)
        problems += contradictions(config)
        if not problems:
            return config
    except ValidationError as error:
        # dict.fromkeys: a value that fits no type of a union is reported once for each of them.
        problems += dict.fromkeys(_explain(item, kind) for item in error.errors())
        wrong = [item["loc"] for item in error.errors()]
        problems += _contradictions_of_the_rest(tree, wrong, kind)
    raise ConfigError(f"{path}:\n" + "\n".join(f"  {problem}" for problem in problems))


def revise(config: Config, changes: dict[str, Any]) -> Config:
    """`config` with other values under some dotted keys, checked like one that is read."""
    tree = config.model_dump()
    for key, value in changes.items():
        section, leaf = key.split(".")
        tree[section][leaf] = value
    return Config.model_validate(tree)


def to_yaml(config: RunConfig) -> str:
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def describe(c: Config | SftConfig) -> str:
    """What a run of this configuration would start, without starting it."""
    axes = ", ".join(f"{axis} {size}" for axis, size in c.mesh)
    if isinstance(c, SftConfig):
        step = f"{c.sft.sequences_per_step} prompts with their completions"
    else:
        step = (
            f"{c.rollout.prompts_per_step} prompts x {c.rollout.group_size} completions of at "
            f"most {c.rollout.max_new_tokens} tokens"
        )
    lines = [
        f"would train {c.model.path} for {c.run.steps} steps",
        f"of {step}",
        f"on a mesh of {c.mesh.devices} devices ({axes})",
        f"outputs go to {c.run_dir}",
    ]
    if c.hosts.coordinator == "auto":
        lines.insert(3, "of all processes that the cluster starts")
    elif c.hosts.coordinator:
        lines.insert(3, f"of {c.hosts.processes} processes, of which this is {c.hosts.process_id}")
    if isinstance(c, SftConfig):
        return "\n".join(lines)
    if c.rollout.engine == "inprocess":
        lines.insert(-1, "rollouts: the jitted sampler in the trainer; no Ray, no vLLM")
    else:
        dtypes = " and ".join(c.engine_dtypes)
        where = f"the Ray cluster at {c.vllm.ray_address}" if c.vllm.ray_address else "a local Ray"
        lines.insert(
            -1,
            f"rollouts, {c.rollout.mode}: {c.vllm.how_many} in {dtypes} on {where}, each "
            f"{c.vllm.cpus_per_engine:g} CPUs and {c.vllm.gpus_per_engine:g} GPUs; weights go over "
            f"{c.publish.channel} in {c.wire_dtype}",
        )
    return "\n".join(lines)


def keys(kind: Kind) -> Iterator[tuple[str, Any]]:
    """Every dotted key with its pydantic field."""
    for name, section in kind.model_fields.items():
        for key, field in _section(section.annotation).model_fields.items():
            yield f"{name}.{key}", field


def _section(annotation: Any) -> type[BaseModel]:
    assert issubclass(annotation, Section)
    return annotation


def _list_keys(kind: Kind) -> str:
    lines = []
    for key, field in keys(kind):
        default = "required" if field.default is PydanticUndefined else _show(field.default)
        unit = (field.json_schema_extra or {}).get("unit")
        lines.append(f"  --{key} ({default}{' ' + unit if unit else ''})")
        lines.append(f"      {field.description}")
    return "\n".join(lines).replace("%", "%%")


def _show(value: Any) -> str:
    return "default: " + yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip()


def read_yaml(path: Path) -> dict[str, Any]:
    """Raises ConfigError, with the line where there is one."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except RecursionError:
        raise ConfigError(f"{path}: nested too deeply") from None
    except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ConfigError(f"{path}{where}: not valid YAML: {what}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections with keys, found {type(tree).__name__}")
    return tree


def overrides(arguments: Sequence[str], kind: Kind = Config) -> Iterator[tuple[str, str]]:
    """`--a.b v`, `--a.b=v` and `a.b=v`, as (key, text) pairs."""
    remaining = iter(arguments)
    for argument in remaining:
        key, equals, value = argument.removeprefix("--").partition("=")
        if not equals:
            following = next(remaining, None) if argument.startswith("--") else None
            if following is None:
                raise ConfigError(
                    f"{argument!r}: expected --section.key VALUE or section.key=VALUE\n"
                    f"usage: {usage(kind)}"
                )
            value = following
        yield key, value


def _apply(tree: dict[str, Any], key: str, text: str, problems: list[str], kind: Kind) -> None:
    value = _read_value(key, text, kind)
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            problems.append(f"{key}: cannot be set, {parent} is not a section")
            return
    node[leaf] = value


def _read_value(key: str, text: str, kind: Kind) -> Any:
    """Text of the command line as YAML, but verbatim where the key holds text: a prompt template
    such as `{prompt}` or `Question: {prompt}` would be a mapping in YAML."""
    if key.startswith("reward.also."):
        field = FurtherReward.model_fields.get(key.rpartition(".")[2])
    else:
        field = dict(keys(kind)).get(key)
    annotation = field.annotation if field else None
    if annotation is str or (annotation == (str | None) and text != "null"):
        return text
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError, OverflowError):
        return text


def _contradictions_of_the_rest(tree: dict[str, Any], wrong: list[tuple], kind: Kind) -> list[str]:
    """Contradictions between the values that are right, while others are wrong or missing."""
    stand_ins = {"run.name": "x", "run.steps": 2**31, "model.path": "x", "data.source": "jsonl"}
    rest = copy.deepcopy(tree)
    for location in wrong:
        *parents, leaf = location[:2]
        node = rest.setdefault(parents[0], {}) if parents else rest
        if isinstance(node, dict):
            node.pop(leaf, None)
    for key, value in stand_ins.items():
        section, leaf = key.split(".")
        rest.setdefault(section, {}).setdefault(leaf, value)
    keys_in_doubt = [".".join(map(str, location[:2])) for location in wrong]
    keys_in_doubt += [_probably_meant(key.split("."), kind) or key for key in keys_in_doubt]
    return [
        problem
        for problem in contradictions(kind.model_validate(rest))
        if not any(key in problem for key in keys_in_doubt)
    ]


def _explain(item: Any, kind: Kind) -> str:
    location = [str(part) for part in item["loc"]]
    key = ".".join(location)
    problem, value = item["type"], item.get("input")
    if key.startswith("vllm.engines."):
        return "vllm.engines: expected a number, or {min: A, max: B} with two of at least 1"
    if problem == "extra_forbidden":
        return f"{key}: unknown key{_nearest(location, kind)}"
    if problem == "missing":
        return f"{key}: required, and not set"
    if problem == "model_type":
        return f"{key}: expected a section with keys, found {value!r}"
    if key.startswith("data.task_args."):
        return f"{'.'.join(location[:3])}: expected a number, text, true, false or a list of texts"
    if key.startswith("vllm.dtype."):
        return f"vllm.dtype: expected {', '.join(get_args(EngineDtype))} or a list of some of them"
    message = item["msg"].removeprefix("Input should be ")
    message = message.replace("String should match", "text matching")
    return f"{key} = {value!r}: expected {message.removeprefix('a valid ')}"


def _nearest(location: list[str], kind: Kind) -> str:
    meant = _probably_meant(location, kind)
    return f"; did you mean {meant!r}?" if meant else f"; known here: {_known(location, kind)}"


def _probably_meant(location: list[str], kind: Kind) -> str | None:
    """The nearest spelling: in this section first, then anywhere."""
    close = difflib.get_close_matches(location[-1], _known(location, kind), n=1)
    if close:
        return ".".join([*location[:-1], close[0]])
    every = [key for key, _ in keys(kind)]
    elsewhere = [key for key in every if key.split(".")[1] == location[-1]]
    elsewhere += difflib.get_close_matches(".".join(location), every, n=1)
    return elsewhere[0] if elsewhere else None


def _known(location: list[str], kind: Kind) -> list[str]:
    """The keys that may stand beside `location`."""
    if len(location) == 1:
        return list(kind.model_fields)
    if location[:2] == ["reward", "also"]:
        return list(FurtherReward.model_fields)
    return [key.split(".")[1] for key, _ in keys(kind) if key.split(".")[0] == location[0]]
