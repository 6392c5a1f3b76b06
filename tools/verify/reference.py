"""What a model is held against, and not ours: the safetensors library, and transformers."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.types import RunError
from tools.verify.report import progress

FILE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclasses.dataclass(frozen=True)
class FileTensor:
    file: Path
    dtype: str  # as the file calls it: F32, BF16, ...
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        bits = int("".join(filter(str.isdigit, self.dtype.split("_")[0])) or 8)
        return math.prod(self.shape) * bits // 8


def file_tensors(directory: Path) -> dict[str, FileTensor]:
    """What the safetensors files hold, without our loader."""
    from safetensors import safe_open

    index = directory / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.is_file():
        names = set(json.loads(index.read_text())["weight_map"].values())
    found = {}
    for file in sorted(directory / name for name in names):
        with safe_open(file, framework="numpy") as reader:
            for name in reader.keys():  # noqa: SIM118 (it is not a dict)
                part = reader.get_slice(name)
                found[name] = FileTensor(file, str(part.get_dtype()), tuple(part.get_shape()))
    return found


def file_digests(files: Mapping[str, FileTensor]) -> dict[str, str]:
    """SHA-256 of every tensor's bytes as they are in the files."""
    import ml_dtypes  # noqa: F401 (with it NumPy knows bfloat16)
    from safetensors import safe_open

    digests = {}
    for file in sorted({tensor.file for tensor in files.values()}):
        with safe_open(file, framework="numpy") as reader:
            for name in (name for name, tensor in files.items() if tensor.file == file):
                digests[name] = hashlib.sha256(reader.get_tensor(name).tobytes()).hexdigest()
    return digests


class Reference:
    """The model as transformers computes it, on the CPU."""

    def __init__(self, directory: Path, dtype: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        quiet_transformers()
        progress(f"loading the model into transformers, {dtype}")
        self._torch = torch
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
            output_loading_info=True,
        )
        model, found = loaded
        if missing := sorted(found["missing_keys"]):  # it would make them up
            raise RunError(f"transformers found no weights for {', '.join(missing[:5])}")
        self._model = model.eval()

    def logits(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Float32 [B, T, V]."""
        with self._torch.no_grad():
            tokens = self._torch.tensor(np.asarray(tokens_BT), dtype=self._torch.long)
            return self._model(tokens, use_cache=False).logits.float().numpy()

    def greedy(self, prompt: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
        """`count` new tokens, and the logits [count, V] that each is the largest of."""
        from transformers import GenerationConfig

        # The model's own settings may hold penalties, which are not ours to have.
        self._model.generation_config = GenerationConfig(pad_token_id=0)
        tokens = self._torch.tensor([list(prompt)])
        with self._torch.no_grad():
            out = self._model.generate(
                tokens,
                attention_mask=self._torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=count,
                output_logits=True,
                return_dict_in_generate=True,
            )
        logits = self._torch.cat(out.logits).float().numpy()
        return out.sequences[0, len(prompt) :].numpy(), logits


def quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
