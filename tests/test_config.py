"""A mistake in a configuration is named, all of them at once, before anything heavy is loaded."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jaxrl.config import Config, SftConfig
from jaxrl.settings import ConfigError, load, parse_command_line, to_yaml

ROOT = Path(__file__).parents[1]
MINIMAL = {
    "run": {"name": "a", "steps": 20},
    "model": {"path": "m"},
    "data": {"source": "reasoning_gym", "task": "t"},
}
# From the schema that pydantic itself derives, not from the code that reports the errors.
SCHEMA = Config.model_json_schema()
KEYS = [
    (section, key)
    for section, reference in SCHEMA["properties"].items()
    for key in SCHEMA["$defs"][
        reference.get("$ref", reference.get("allOf", [{}])[0].get("$ref")).rsplit("/", 1)[1]
    ]["properties"]
]


def tree(**changes) -> dict:
    """MINIMAL with changes like rollout__group_size=4."""
    result = yaml.safe_load(yaml.safe_dump(MINIMAL))
    for key, value in changes.items():
        section, leaf = key.split("__")
        result.setdefault(section, {})[leaf] = value
    return result


def load_tree(tmp_path: Path, content: dict | str, *overrides: tuple[str, str]) -> Config:
    file = tmp_path / "c.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return load(file, overrides)


def problems(tmp_path: Path, content: dict | str, *overrides: tuple[str, str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_tree(tmp_path, content, *overrides)
    first, *rest = str(error.value).splitlines()
    assert str(tmp_path / "c.yaml") in first
    return [line.strip() for line in rest] or [first]


def command(tmp_path: Path, *arguments: str):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    return parse_command_line(["--config", str(file), *arguments])


def test_there_are_many_keys_to_misspell():
    assert len(KEYS) > 50 and ("rollout", "group_size") in KEYS


@pytest.mark.parametrize("section, key", KEYS, ids=".".join)
def test_each_key_misspelt_is_named_with_the_key_that_was_meant(tmp_path, section, key):
    misspelt = key[:-1] + key[-1] * 2  # a letter too many
    content = tree()
    content.setdefault(section, {})[misspelt] = content.get(section, {}).pop(key, 1)
    found = problems(tmp_path, content)
    expected = f"{section}.{misspelt}: unknown key; did you mean '{section}.{key}'?"
    required = f"{section}.{key}: required, and not set"
    assert expected in found
    assert set(found) <= {expected, required}, "nothing may be said about what is right"


@pytest.mark.parametrize("section", sorted({section for section, _ in KEYS}))
def test_each_section_misspelt_is_named(tmp_path, section):
    content = tree()
    content[section[:-1]] = content.pop(section, {})
    assert f"{section[:-1]}: unknown key; did you mean '{section}'?" in problems(tmp_path, content)


def test_a_key_in_the_wrong_place_is_sent_to_the_right_one(tmp_path):
    content = tree(rollout__seed=1)
    content["learning_rate"] = 1e-5
    found = problems(tmp_path, content)
    assert "rollout.seed: unknown key; did you mean 'run.seed'?" in found
    assert "learning_rate: unknown key; did you mean 'optimizer.learning_rate'?" in found


def test_all_problems_are_reported_at_once_contradictions_too(tmp_path):
    content = tree(
        rollout__group_sise=4,
        rollout__top_p=0.9,
        rollout__max_new_tokens="lots",
        publish__channel="carrier_pigeon",
        optimizer__learning_rate=-1.0,
        data__prompt_template="no placeholder",
    )
    del content["run"]["steps"]
    found = problems(tmp_path, content, ("mesh.dat", "2"))
    for start in (
        "run.steps: required, and not set",
        "rollout.group_sise: unknown key; did you mean 'rollout.group_size'?",
        "rollout.max_new_tokens = 'lots': expected integer",
        "publish.channel = 'carrier_pigeon': expected 'object_store' or 'shuttle'",
        "optimizer.learning_rate = -1.0: expected greater than 0",
        "mesh.dat: unknown key; did you mean 'mesh.data'?",
        "rollout.top_p = 0.9: a truncated sampling distribution",
        "data.prompt_template must contain {prompt}",
    ):
        assert any(line.startswith(start) for line in found), (start, found)
    assert len(found) == 8, found


@pytest.mark.parametrize(
    "changes, words",
    [
        (
            {"update__max_tokens_per_microbatch": 1535},
            ["1535", "data.max_prompt_tokens + rollout.max_new_tokens = 1536", "at least 1536"],
        ),
        ({"data__easy": 0.9}, ["data.easy = 0.9", "it is for data.source = jsonl"]),
        (
            {
                "data__source": "jsonl",
                "data__path": "x",
                "reward__kind": "exact",
                "data__easy": 0.5,
                "data__hard": 0.5,
            },
            ["data.hard = 0.5 is not less than data.easy = 0.5"],
        ),
        ({"rollout__top_k": 5}, ["rollout.top_k = 5", "leave it at 0"]),
        ({"rollout__min_p": 0.1}, ["rollout.min_p = 0.1"]),
        ({"data__task": None}, ["needs data.task"]),
        ({"data__source": "jsonl", "reward__kind": "exact"}, ["needs data.path"]),
        ({"data__source": "jsonl", "data__path": "x"}, ["reward.kind: exact"]),
        ({"reward__also": {"a": {}}}, ["reward.also.a: expected one of matches", "function"]),
        (
            {"reward__also": {"a": {"matches": "x", "function": "m:f"}}},
            ["reward.also.a: expected one of matches"],
        ),
        ({"reward__also": {"task": {"matches": "x"}}}, ["reward.also.task has the name"]),
        ({"reward__overlong_tokens": 512}, ["rollout.max_new_tokens = 512", "at most 511"]),
        ({"algorithm__length_bounds": [9, 8]}, ["algorithm.length_bounds = [9, 8]"]),
        ({"algorithm__length_bounds": [513, 600]}, ["at most rollout.max_new_tokens = 512"]),
        (
            {"optimizer__first_moment_dtype": "bfloat16", "optimizer__beta1": 0.999},
            ["optimizer.beta1 = 0.999", "make it 0.996 or less"],
        ),
        (
            {"publish__channel": "shuttle", "publish__fallback": "shuttle"},
            ["publish.fallback = shuttle", "set publish.fallback = none"],
        ),
        ({"run__steps": 5}, ["optimizer.warmup_steps = 10", "run.steps = 5"]),
        ({"rollout__max_lag": 1}, ["rollout.max_lag = 1", "synchronous, where it is 0"]),
        (
            {"rollout__mode": "overlap", "rollout__max_lag": 2},
            ["rollout.max_lag = 2", "overlap, where it is 1"],
        ),
        (
            {"rollout__mode": "continuous", "rollout__max_lag": 0},
            ["rollout.max_lag = 0", "where it is 1 or more"],
        ),
        (
            {"rollout__mode": "overlap", "rollout__engine": "inprocess"},
            ["rollout.mode = overlap", "set rollout.mode = synchronous"],
        ),
        (
            {"rollout__mode": "overlap", "rollout__too_old": "drop"},
            ["rollout.too_old = drop", "set rollout.mode = continuous"],
        ),
        (
            {"rollout__engine": "inprocess", "eval__temperature": 1.0, "eval__top_k": 5},
            ["eval.top_k = 5", "leave it at 0"],
        ),
        ({"eval__top_p": 0.5}, ["eval.top_p = 0.5", "set eval.temperature"]),
        (
            {"eval__beams": 4, "eval__temperature": 0.5, "eval__top_p": 0.5},
            ["eval.beams = 4 with eval.temperature = 0.5, eval.top_p = 0.5", "set eval.beams = 1"],
        ),
        ({"eval__beams": 4, "rollout__engine": "inprocess"}, ["eval.beams = 4", "leave it at 1"]),
        ({"vllm__engines": {"min": 3, "max": 2}}, ["vllm.engines: min = 3 is more than max = 2"]),
        ({"vllm__engines": 0}, ["vllm.engines = 0 without vllm.servers"]),
        ({"vllm__servers": ["http://a:1"]}, ["set publish.channel = shuttle"]),
        (
            {"vllm__servers": ["http://a:1"], "publish__fallback": "shuttle", "lora__rank": 2},
            ["lora.rank = 2", "use vllm.engines"],
        ),
        (
            {"vllm__servers": ["http://a:1"], "publish__fallback": "shuttle", "eval__beams": 2},
            ["eval.beams = 2", "use vllm.engines"],
        ),
    ],
)
def test_keys_that_contradict_each_other_are_told_with_the_way_out(tmp_path, changes, words):
    (line,) = problems(tmp_path, tree(**changes))
    assert all(word in line for word in words), line


@pytest.mark.parametrize(
    "address", ["", "ray-head", "ray-head:", ":6379", "head:ray", "head:65536"]
)
def test_a_ray_address_is_host_and_port(tmp_path, address):
    (line,) = problems(tmp_path, tree(vllm__ray_address=address))
    assert line.startswith(f"vllm.ray_address = {address}: expected HOST:PORT"), line
    for right in ("auto", "ray-head:6379", "[::1]:6379", "ray://head:10001"):
        assert load_tree(tmp_path, tree(vllm__ray_address=right)).vllm.ray_address == right


@pytest.mark.parametrize(
    "key, value",
    [
        ("rollout.group_size", "8"),
        ("rollout.group_size", True),
        ("rollout.group_size", 8.0),
        ("rollout.group_size", 1),
        ("rollout.group_size", None),
        ("log.tensorboard", 1),
        ("log.tensorboard", "true"),
        ("optimizer.learning_rate", "fast"),
        ("optimizer.learning_rate", True),
        ("optimizer.learning_rate", 1.5),
        ("optimizer.learning_rate", float("inf")),
        ("rollout.timeout_s", float("nan")),
        ("run.name", 2024),
        ("run.name", ".."),
        ("run.name", "../elsewhere"),
        ("run.name", "a/b"),
        ("run.name", ""),
        ("run.seed", 2**31),
        ("vllm.kv_cache_mib", 0),
        ("data.task_args", [1]),
    ],
)
def test_a_value_of_the_wrong_type_or_size_is_named_with_its_key(tmp_path, key, value):
    (line,) = problems(tmp_path, tree(**{key.replace(".", "__"): value}))
    assert line.startswith(f"{key} = {value!r}: expected "), line


@pytest.mark.parametrize(
    "where, problem",
    [
        ("file:///weights", "publish.shuttle_dir = file:///weights: a directory is named by"),
        ("s3://key:secret@host/run", "publish.shuttle_dir: a URL is PROTOCOL://BUCKET/RUN"),
        ("s3://bucket/run?key=secret", "publish.shuttle_dir: a URL is PROTOCOL://BUCKET/RUN"),
        ("cache::s3://bucket/run", "publish.shuttle_dir: a URL is PROTOCOL://BUCKET/RUN"),
        ("s3://", "publish.shuttle_dir = s3://: names no bucket"),
        ("s3://bucket/lr=[1]", "publish.shuttle_dir = s3://bucket/lr=[1]: no part of it"),
        ("s3://bucket/../run", "publish.shuttle_dir = s3://bucket/../run: no part of it"),
    ],
)
def test_a_shuttle_has_no_secret_in_its_url(tmp_path, where, problem):
    (found,) = problems(tmp_path, tree(publish__shuttle_dir=where))
    assert found.startswith(problem) and "secret" not in found
    for fine in ("s3://bucket/run", "gs://bucket", "/weights@new?", "s3://b/run..2", "../w[1]"):
        assert load_tree(tmp_path, tree(publish__shuttle_dir=fine)).publish.shuttle_dir == fine


@pytest.mark.parametrize("value", ["float8", ["bfloat16", "float8"], [], 16])
def test_an_engine_dtype_that_is_neither_one_nor_a_list_of_some_is_one_problem(tmp_path, value):
    (line,) = problems(tmp_path, tree(vllm__dtype=value))
    assert line.startswith("vllm.dtype: expected auto, float32, bfloat16"), line


def test_a_task_argument_of_no_known_type_is_one_problem(tmp_path):
    (line,) = problems(tmp_path, tree(data__task_args={"a": {"b": 1}}))
    assert line.startswith("data.task_args.a: expected a number, text, true, false")


@pytest.mark.parametrize(
    ("further", "problem"),
    [
        (
            {"a": {"match": "x"}},
            "reward.also.a.match: unknown key; did you mean 'reward.also.a.matches'?",
        ),
        ({"a": {"function": "len"}}, "reward.also.a.function = 'len': expected text matching"),
        ({"a": {"matches": 1}}, "reward.also.a.matches = 1: expected string"),
        ({"a/b": {"matches": "x"}}, "reward.also.a/b"),
        ({"a": "x"}, "reward.also.a: expected a section with keys, found 'x'"),
    ],
)
def test_a_further_reward_that_is_none_is_named_with_its_key(tmp_path, further, problem):
    (line,) = problems(tmp_path, tree(reward__also=further))
    assert line.startswith(problem), line


def test_further_rewards_are_written_on_the_command_line_too(tmp_path):
    given = ("--reward.also.form.matches", "[0-9]", "--reward.also.form.weight=2")
    config = command(tmp_path, *given).config
    (further,) = config.reward.also.values()
    assert (further.matches, further.weight, further.function) == ("[0-9]", 2.0, None)
    assert load_tree(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("value", [-1, "two", {"min": 1}, {"min": 0, "max": 2}, {"least": 1}])
def test_engines_that_are_neither_a_number_nor_a_range_are_one_problem(tmp_path, value):
    (line,) = problems(tmp_path, tree(vllm__engines=value))
    assert line.startswith("vllm.engines: expected a number, or {min: A, max: B}")


def test_engines_are_a_number_or_a_range(tmp_path):
    for value, expected in ((3, (3, 1, 3)), ({"min": 2, "max": 5}, (2, 2, 5))):
        vllm = load_tree(tmp_path, tree(vllm__engines=value)).vllm
        assert (vllm.min_engines, vllm.keep_engines, vllm.max_engines) == expected


def test_servers_are_engines_too(tmp_path):
    changes = {"vllm__servers": ["http://a:1", "http://b:2"], "publish__channel": "shuttle"}
    vllm = load_tree(tmp_path, tree(vllm__engines=0, **changes)).vllm
    assert (vllm.min_engines, vllm.max_engines) == (2, 2)
    (line,) = problems(tmp_path, tree(vllm__servers=["a:1"], publish__channel="shuttle"))
    assert line.startswith("vllm.servers")


@pytest.mark.parametrize(
    ("mode", "given", "max_lag"),
    [
        ("synchronous", None, 0),
        ("overlap", None, 1),
        ("continuous", None, 1),
        ("continuous", 3, 3),
    ],
)
def test_max_lag_follows_the_mode(tmp_path, mode, given, max_lag):
    assert load_tree(tmp_path, tree(rollout__mode=mode, rollout__max_lag=given)).max_lag == max_lag


@pytest.mark.parametrize("section", ["run", "rollout"])
@pytest.mark.parametrize("value", [None, 5, "x", [1]])
def test_a_section_that_is_none_is_named(tmp_path, section, value):
    content = tree()
    content[section] = value
    assert problems(tmp_path, content) == [
        f"{section}: expected a section with keys, found {value!r}"
    ]


@pytest.mark.parametrize(
    "content, where",
    [
        ("run:\n  name: a\n  steps: [1\nmodel: {}\n", "line 4, column 6"),
        ("run:\n\tname: a\n", "line 2, column 1"),
        ("run: {name: a}\nmodel: {}\nrun: {}\n", "line 3, column 1: not valid YAML: key 'run'"),
        ("run: {name: a, steps: 2, steps: 3}\n", "line 1, column 26: not valid YAML: key 'steps'"),
        ("run:\n  on: 3\n", "line 2, column 3: not valid YAML: expected a key that is text"),
        ("? [a]\n: b\n", "line 1, column 3: not valid YAML: expected a key that is text"),
        ("a: !!python/object/apply:os.system [ls]\n", "line 1, column 4"),
        ("--- {}\n--- {}\n", "line 2"),
        ("- a\n", "expected sections with keys, found list"),
        ("[" * 5000, "nested too deeply"),
        ("a: \0", "special characters"),
    ],
)
def test_malformed_yaml_is_told_with_its_line(tmp_path, content, where):
    assert where in " ".join(problems(tmp_path, content))


def test_files_that_cannot_be_read_are_errors(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: there is no such file"):
        load(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: \xfc}")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    "text, value",
    [("1e-6", 1e-6), ("1E-6", 1e-6), ("1.5e-3", 1.5e-3), ("2e0", 2.0), ("+1e-2", 0.01), ("3", 3.0)],
)
def test_numbers_with_an_exponent_are_numbers(tmp_path, text, value):
    content = yaml.safe_dump(MINIMAL) + f"optimizer: {{max_grad_norm: {text}}}\n"
    for config in (
        load_tree(tmp_path, content),
        command(tmp_path, "--optimizer.max_grad_norm", text).config,
    ):
        assert config.optimizer.max_grad_norm == value
        assert isinstance(config.optimizer.max_grad_norm, float)


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4x", "1e-4x"),
        ("1e5.", "1e5."),
        ("0x_", "0x_"),  # matches YAML's integers, and is none
        ("9" * 5000, "9" * 5000),  # more digits than Python converts
        ("2026-13-45", "2026-13-45"),
        ("2026-11-22", "2026-11-22"),
        ("!!int x", "x"),
        ("!!float ''", ""),
        ("!!bool x", "x"),
        ("!!timestamp x", "x"),
        ("!!timestamp 2026-11-22", "2026-11-22"),
    ],
)
def test_what_is_nearly_a_number_is_named_by_its_key_beside_other_mistakes(tmp_path, text, value):
    expected = [
        f"optimizer.learning_rate = {value!r}: expected number",
        "run.stepz: unknown key; did you mean 'run.steps'?",
    ]
    content = yaml.safe_dump(tree(run__stepz=1))
    file = content + f"optimizer: {{learning_rate: {text}}}\n"
    assert sorted(problems(tmp_path, file)) == expected
    override = ("optimizer.learning_rate", text)
    assert sorted(problems(tmp_path, content, override)) == expected


@pytest.mark.parametrize("text", ["2026-11-22", "1e-4x", "!!timestamp 2026-11-22", "!!int x"])
def test_such_text_may_stand_where_text_is_expected(tmp_path, text):
    content = yaml.safe_dump(MINIMAL).replace("name: a", f"name: {text}")
    assert load_tree(tmp_path, content).run.name == text.split()[-1]
    assert load_tree(tmp_path, to_yaml(load_tree(tmp_path, content))).run.name == text.split()[-1]


@pytest.mark.parametrize(
    "value",
    ["!!map x", "!!set [a]", "{? !!str [a] : b}", '"\\UFFFFFFFF"', '"\\U00110000"', "!!foo x"],
)
def test_values_that_yaml_cannot_make_are_one_message(tmp_path, value):
    file = yaml.safe_dump(MINIMAL) + f"optimizer: {{learning_rate: {value}}}\n"
    (found,) = problems(tmp_path, file)
    assert "not valid YAML" in found
    (found,) = problems(tmp_path, tree(), ("optimizer.learning_rate", value))
    assert found == f"optimizer.learning_rate = {value!r}: expected number"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--rollout.group_size", "4"],
        ["--rollout.group_size=4"],
        ["rollout.group_size=4"],
        ["--rollout.group_size", "16", "rollout.group_size=2", "--rollout.group_size=4"],
        ["rollout.group_size=16", "--resume", "--rollout.group_size", "4"],
    ],
)
def test_every_spelling_of_an_override_works_and_the_last_one_wins(tmp_path, arguments):
    parsed = command(tmp_path, *arguments)
    assert parsed.config.rollout.group_size == 4
    assert parsed.config.rollout.prompts_per_step == 32
    assert parsed.resume == ("--resume" in arguments) and not parsed.dry_run


def test_overrides_reach_sections_the_file_lacks_and_win_over_the_file(tmp_path):
    config = command(
        tmp_path,
        "--run.steps=30",
        "--data.task_args.max",
        "3",
        "--vllm.kv_cache_mib=null",
        "--run.name=2024",
        "--dry-run",
    ).config
    assert config.run.steps == 30 and config.run.name == "2024"
    assert config.data.task_args == {"max": 3} and config.vllm.kv_cache_mib is None


@pytest.mark.parametrize(
    "text", ["{prompt}", "Question: {prompt} # think", "[{prompt}]", "- {prompt}"]
)
def test_text_on_the_command_line_is_not_read_as_yaml(tmp_path, text):
    assert command(tmp_path, "--data.prompt_template", text).config.data.prompt_template == text


def test_null_clears_an_optional_text(tmp_path):
    assert command(tmp_path, "--data.held_out_path=null").config.data.held_out_path is None


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--run.steps"], "'--run.steps': expected --section.key VALUE"),
        (["stray"], "'stray': expected"),
        (["--run.steps.deep", "3"], "run.steps.deep: cannot be set, steps is not a section"),
        (["--seed", "3"], "seed: unknown key; did you mean 'run.seed'?"),
        (["--rollout.group_size", "'8'"], "rollout.group_size = '8': expected integer"),
        (["--log.tensorboard", "1"], "log.tensorboard = 1: expected boolean"),
        (["--rollout.group_size", "["], "rollout.group_size = '[': expected integer"),
        (["--res"], "'--res': expected"),
    ],
)
def test_wrong_overrides_are_told(tmp_path, arguments, words):
    with pytest.raises(ConfigError) as error:
        command(tmp_path, *arguments)
    assert words in str(error.value)


def test_without_a_file_there_is_an_error_with_the_usage():
    with pytest.raises(ConfigError, match=r"--config FILE is required\nusage: "):
        parse_command_line(["--run.steps", "3"])


def test_help_lists_every_key_with_its_default_and_unit(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse_command_line(["--help"])
    assert exit_.value.code == 0
    out = capsys.readouterr().out
    for section, key in KEYS:
        assert f"--{section}.{key} (" in out
    assert "--run.steps (required)" in out
    assert "--rollout.max_new_tokens (default: 512 tokens)" in out
    assert "--optimizer.learning_rate (default: 1.0e-06)" in out


def test_a_configuration_cannot_be_changed(tmp_path):
    config = load_tree(tmp_path, tree())
    for target, name in ((config, "run"), (config.run, "steps")):
        with pytest.raises(Exception, match="frozen"):
            setattr(target, name, 5)


def test_what_is_written_loads_as_the_same_configuration(tmp_path):
    config = load_tree(
        tmp_path, tree(optimizer__learning_rate=3e-7, data__prompt_template="Ünï {prompt}\n: #")
    )
    assert load_tree(tmp_path, to_yaml(config)) == config


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_shipped_configuration_loads(file):
    load(file, kind=SftConfig if file.stem.endswith("_sft") else Config)


@pytest.mark.parametrize("arguments", [["--run.stepz", "3"], ["--help"]])
def test_a_mistake_is_answered_before_anything_heavy_is_loaded(tmp_path, arguments):
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(MINIMAL))
    code = (
        "import sys\n"
        "from jaxrl.settings import ConfigError, parse_command_line\n"
        "try:\n"
        "    parse_command_line(sys.argv[1:])\n"
        "except (ConfigError, SystemExit):\n"
        "    heavy = {'jax', 'jaxlib', 'flax', 'optax', 'orbax', 'ray', 'torch', 'vllm'}\n"
        "    sys.exit(f'loaded {heavy & set(sys.modules)}' if heavy & set(sys.modules) else 0)\n"
        "sys.exit('no error')"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, "--config", str(file), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


GPU = (("vllm.gpus_per_engine", "1"),)
CPU = (("vllm.gpus_per_engine", "0"),)


@pytest.mark.parametrize(
    ("overrides", "engine", "wire", "tolerance", "kv_cache"),
    [
        (GPU, "bfloat16", "bfloat16", 0.5, None),
        (CPU, "float32", "float32", 1e-4, 512 << 20),
        ((*CPU, ("vllm.dtype", "bfloat16")), "bfloat16", "bfloat16", 0.5, 512 << 20),
        ((*CPU, ("vllm.dtype", "[bfloat16, auto]")), "float32", "float32", 0.5, 512 << 20),
        ((*GPU, ("publish.dtype", "float32")), "bfloat16", "float32", 0.5, None),
        ((*CPU, ("model.compute_dtype", "bfloat16")), "float32", "float32", 0.5, 512 << 20),
        ((*GPU, ("rollout.engine", "inprocess")), "bfloat16", "float32", 0.5, None),
        ((*CPU, ("publish.probe_tolerance", "0.01")), "float32", "float32", 0.01, 512 << 20),
        ((*GPU, ("vllm.kv_cache_mib", "64")), "bfloat16", "bfloat16", 0.5, 64 << 20),
    ],
)
def test_what_auto_and_default_stand_for(tmp_path, overrides, engine, wire, tolerance, kv_cache):
    config = load_tree(tmp_path, tree(), *overrides)
    assert (config.engine_dtype, config.wire_dtype) == (engine, wire)
    assert (config.probe_tolerance, config.kv_cache_bytes) == (tolerance, kv_cache)
