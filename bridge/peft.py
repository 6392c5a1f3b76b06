"""Adapters as the PEFT library writes them. No jax, no torch.

DIRECTORY/  adapter_config.json   adapter_model.safetensors
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bridge.safetensors_files import write_file
from bridge.wire import HostTensor
from jaxrl import durable
from jaxrl.models.config import LoraConfig
from jaxrl.models.params import ParamSpec
from jaxrl.models.params import Path as ParamPath


def adapter_config(
    lora: LoraConfig, specs: dict[ParamPath, ParamSpec], base: str
) -> dict[str, Any]:
    """adapter_config.json: what peft and vLLM need to know. `specs`: of `params.lora_specs`."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": sorted({spec.hf_name.split(".")[-3] for spec in specs.values()}),
    }


def save_adapter(tensors: Iterable[HostTensor], config: dict[str, Any], target: Path) -> None:
    """Writes a PEFT directory. It appears whole or not at all; one that exists is replaced.

    Raises:
      RunError: it cannot be written; what was there before is as it was.
    """
    with durable.replacing(target) as folder:
        durable.write_file(folder / "adapter_config.json", json.dumps(config, indent=2) + "\n")
        write_file(folder / "adapter_model.safetensors", list(tensors))
