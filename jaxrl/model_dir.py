"""From `model.path` to a local Hugging Face directory, and what engines need of it."""

from pathlib import Path

from jaxrl.types import UserError

FILES = ("*.json", "*.safetensors", "*.txt", "*.jinja")


def find_model(path: str, key: str = "model.path") -> Path:
    """The directory `path`, or the snapshot of the hub id `path`, fetched if the hub answers.

    Args:
      key: that named it.

    Raises:
      UserError: neither exists.
    """
    local = Path(path).expanduser()
    if local.is_dir():
        return local
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{key} = {path}: there is no such directory")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(path, allow_patterns=list(FILES)))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(
            f"{key} = {path}: there is no such directory here, and the hub has no such model or "
            f"cannot be reached ({reason})"
        ) from None


def engine_files(model_dir: Path, tokenizer: bool = False) -> dict[str, bytes]:
    """The small files that an engine needs to build the model before its weights arrive, and if
    asked its `tokenizer` (see EngineSettings)."""
    names = ["config.json", "generation_config.json"]
    if tokenizer:
        names += ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    return {name: (model_dir / name).read_bytes() for name in names if (model_dir / name).is_file()}
