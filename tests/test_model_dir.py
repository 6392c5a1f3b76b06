"""model.path is a directory, or a hub id, or an error that says so."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from jaxrl.model_dir import engine_files, find_model
from jaxrl.types import UserError


@pytest.fixture
def hub(monkeypatch):
    """Stands for the hub: its `answer` is a path or an exception; keeps what it was asked."""

    class Hub:
        answer: object = LocalEntryNotFoundError("offline\nand more")

        def __init__(self):
            self.asked = []

        def __call__(self, name, **options):
            self.asked.append((name, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    hub = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_directory_is_itself_even_if_it_looks_like_a_hub_id(hub, tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert find_model("org/name").samefile(tmp_path / "org" / "name")
    assert find_model(str(tmp_path)) == tmp_path
    assert not hub.asked


def test_the_home_directory_may_be_written_short(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "model").mkdir()
    assert find_model("~/model") == tmp_path / "model"


@pytest.mark.parametrize("path", ["./org/name", "/org/name", "../name", "name", "a/b/c", "~/x"])
def test_a_path_that_cannot_be_a_hub_id_is_not_asked_for(path, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"^algorithm.reference = .* is no such directory$"):
        find_model(path, "algorithm.reference")
    assert not hub.asked


def test_a_hub_id_is_fetched_without_the_formats_that_are_not_read(hub, tmp_path):
    hub.answer = str(tmp_path)
    assert find_model("org/name") == tmp_path
    ((name, options),) = hub.asked
    assert name == "org/name"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any(pattern.endswith((".bin", ".pth", "*")) for pattern in options["allow_patterns"])


@pytest.mark.parametrize(
    "error", [LocalEntryNotFoundError("offline\nand more"), OSError("no route"), OSError()]
)
def test_a_hub_that_does_not_answer_is_one_line_of_error(error, hub):
    hub.answer = error
    with pytest.raises(UserError, match=r"org/name: there is no such directory here.*hub") as found:
        find_model("org/name")
    assert "\n" not in str(found.value)


def test_a_path_that_the_hub_cannot_have_is_an_error_of_the_user():
    """The real hub library refuses the name before it asks anyone."""
    with pytest.raises(UserError, match="my models/mine"):
        find_model("my models/mine")


def test_an_engine_gets_the_configuration_and_never_the_weights(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    assert engine_files(tmp_path) == {"config.json": b"{}"}
    (tmp_path / "generation_config.json").write_bytes(b"[]")
    (tmp_path / "tokenizer.json").write_bytes(b"{}")
    assert set(engine_files(tmp_path)) == {"config.json", "generation_config.json"}
    assert engine_files(tmp_path, tokenizer=True)["tokenizer.json"] == b"{}"
