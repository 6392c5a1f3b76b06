"""One vLLM engine behind a Ray actor.

The class is plain Python with coroutines; `bridge.fleet` makes the actor of it. Tokens go in and
tokens come out, exactly as they were sampled: no HTTP, and no text unless a request has options
about it. vLLM is imported when the engine starts and not before, so that the driver can name this
class without having vLLM.
"""

import asyncio
import contextlib
import dataclasses
import functools
import os
import re
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bridge.beam import Beam, Search
from bridge.engines.errors import (
    EngineDead,
    EngineError,
    RequestRefused,
    require_served,
    require_staged,
)
from bridge.engines.intake import Intake, siblings
from bridge.engines.sampling import check_tokens, sampling_of, sampling_params
from bridge.engines.sockets import SocketFolder
from bridge.guard import guarded
from jaxrl.types import MOST_BEAMS, Sampling

_STEP_TOKENS = 2048  # prompt tokens that a CPU engine takes on in one step, at least
_POLL_S = 0.01
_EXAMINE_S = 0.02  # for which decoding waits at a time while the model is examined
_FINISHED = ("stop", "length")
_LOG_TAIL_BYTES = 65536
_SOCKETS = "VLLM_RPC_BASE_PATH"  # of the environment; has the folder that vLLM puts sockets into
_LOGGED_ERROR = re.compile(r"\b((?:\w+\.)*\w+(?:Error|Exception): .+)$", re.MULTILINE)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineSettings:
    """What one engine is built with. Plain types: this crosses from the driver to the workers."""

    dtype: str = "bfloat16"
    max_model_len: int = 2048  # tokens, prompt + completion
    max_num_seqs: int = 64  # sampled at once; more wait inside the engine
    kv_cache_bytes: int | None = None  # None: sized by gpu_memory_utilization
    gpu_memory_utilization: float | None = None  # None: vLLM's default
    tensor_parallel: int = 1
    enforce_eager: bool = False
    load_format: Literal["dummy", "auto"] = "dummy"  # dummy: weights come over the bridge
    lora: dict[str, Any] | None = None  # PEFT's adapter_config, of every adapter that will come
    tokenizer: bool = False  # for options about text; its files are then among the model's
    seed: int = 0


def actor_environment(cpu: bool) -> dict[str, str]:
    """Environment variables that must be set before the engine's process imports vLLM."""
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "WARNING",
        "HF_HUB_OFFLINE": "1",  # all that an engine needs is handed to it
    }
    if cpu:
        environment |= {
            # Or vLLM takes a machine with libtpu installed (the extra plan) for one with a TPU too.
            "VLLM_TARGET_DEVICE": "cpu",
            # One process fewer: on CPU vLLM would otherwise put even a single worker into its own.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            # Asking for log-probabilities compiles C++ in every new process, for nothing gained.
            "TORCHDYNAMO_DISABLE": "1",
            # A second thread spins against the neighbours: 20 times slower on a busy machine.
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # "auto" pins every engine to the same core
            "VLLM_HOST_IP": "127.0.0.1",
        }
    return environment


class VllmEngine:
    """Serves one version of the weights at a time, and knows which.

    A new version is staged while the old one serves, and committed in a pause of milliseconds.
    Whatever fails before the commit leaves the old version serving; a commit that fails shuts the
    engine down, because half a version must not serve.

    With `EngineSettings.lora` a version is either the model's weights, which come first, or an
    adapter's tensors by PEFT's names, which then take each other's place on frozen weights.
    """

    def __init__(self, name: str, settings: EngineSettings, model: str | dict[str, bytes]):
        """`model` is a Hugging Face directory, or its small files (config.json, ...) by name."""
        self._name = name
        self._settings = settings
        self._model = model
        self._llm: Any = None
        self._counters: Any = None
        self._sockets: SocketFolder | None = None  # None: they lie where vLLM puts them
        self._intake = Intake(self._samples)
        self._vocab_size = 0
        self._version: int | None = None  # acknowledged; None until weights were loaded
        self._staged: int | None = None
        self._staged_adapter = False
        self._adapted = False  # whether an adapter was ever loaded: the weights are frozen
        self._lora_request: Any = None  # what every request carries, where there are adapters
        self._updating = asyncio.Lock()

    async def start(self) -> dict[str, Any]:
        """Builds the engine and tries it. Weights that came from `model` are version 0.

        Raises:
          EngineDead: vLLM is missing, or refuses the model or the machine.
        """
        started = time.perf_counter()
        try:
            self._make_socket_folder()
            import vllm

            with guarded():
                await self._build()
            # Some models are refused only by the first forward pass.
            await self._run([0], sampling_params(_TRIAL, seed=0))
        except Exception as error:  # vLLM raises whatever its many parts raise
            await self.shutdown()
            raise EngineDead(
                f"{self._name} on {os.uname().nodename} could not start vLLM: {_sentence(error)}"
            ) from error
        self._vocab_size = self._llm.model_config.get_vocab_size()
        if self._settings.load_format == "auto":
            await self._llm.update_weight_version("0")
            self._version = 0
        self._intake = Intake(self._samples)  # from here on it counts who is idle
        return {
            "name": self._name,
            "software": f"vLLM {vllm.__version__}",
            "version": self._version,
            "max_num_seqs": self._settings.max_num_seqs,
            "seconds": time.perf_counter() - started,
            "pid": os.getpid(),
            "node": os.uname().nodename,
        }

    def _make_socket_folder(self) -> None:
        """vLLM and the processes that it starts read the environment, and remove no socket."""
        if _SOCKETS in os.environ:
            return
        with contextlib.suppress(OSError):  # nobody needs a folder to start an engine
            self._sockets = SocketFolder()
            os.environ[_SOCKETS] = str(self._sockets.path)

    async def _build(self) -> None:
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

        from bridge.engines import plugin
        from bridge.engines.counters import Counters

        settings = self._settings
        if settings.tensor_parallel > 1 and os.environ.get("VLLM_CPU_OMP_THREADS_BIND"):
            # vLLM's CPU workers need to be told their cores when there are several of them.
            cores = [str(rank) for rank in range(settings.tensor_parallel)]
            os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(cores)
        dtype: Any = settings.dtype  # vLLM checks it, and says what it may be
        optional: dict[str, Any] = {
            "kv_cache_memory_bytes": settings.kv_cache_bytes,
            "gpu_memory_utilization": settings.gpu_memory_utilization,
            **_adapter_arguments(settings.lora),
        }
        if current_platform.is_cpu():
            # A prompt split over two steps takes back its generator's first draw, which torch's
            # CPU generators cannot do: vLLM 0.32 dies of it. Whole prompts, then.
            optional["enable_chunked_prefill"] = False
            optional["max_num_batched_tokens"] = max(settings.max_model_len, _STEP_TOKENS)
        with self._model_directory() as directory:
            args = AsyncEngineArgs(
                model=directory,
                skip_tokenizer_init=not settings.tokenizer,
                generation_config="vllm",  # no sampling setting is taken from the model's files
                dtype=dtype,
                max_model_len=settings.max_model_len,
                max_num_seqs=settings.max_num_seqs,
                tensor_parallel_size=settings.tensor_parallel,
                # Named, because inside a placement group vLLM would choose Ray and not ask.
                distributed_executor_backend="mp" if settings.tensor_parallel > 1 else "uni",
                enforce_eager=settings.enforce_eager,
                load_format=settings.load_format,
                seed=settings.seed,
                enable_prefix_caching=True,
                # Log-probabilities of the distribution that was sampled from, temperature applied.
                logprobs_mode="processed_logprobs",
                max_logprobs=2 * MOST_BEAMS,
                disable_log_stats=True,  # but for our own counters
                weight_transfer_config=WeightTransferConfig(backend=plugin.BACKEND),
                worker_extension_cls="bridge.engines.weight_transfer.BridgeWorker",
                **{name: value for name, value in optional.items() if value is not None},
            )
            # Kept from here on: whatever fails next, `shutdown` ends the processes behind it.
            self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[Counters])
        self._counters, *_ = self._llm.logger_manager.stat_loggers
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info={}))
        if settings.lora is not None:
            if current_platform.is_cpu() and self._llm.model_config.is_moe:
                # Its own kernel for experts has no adapters, and it then takes one for GPUs.
                raise ValueError("on CPU vLLM has no adapters for a mixture of experts; use a GPU")
            await self._start_adapter()

    async def _start_adapter(self) -> None:
        """Loads an adapter of zeros, so that every request has one from the first on.

        A batch in which only some requests have an adapter is computed wrong by vLLM 0.32.
        """
        from vllm.lora.request import LoRARequest

        from bridge.engines.weight_transfer import ADAPTER_ID

        # The path is for an adapter that is not loaded; there is none, and a read would fail.
        self._lora_request = LoRARequest("bridge", ADAPTER_ID, "/dev/null")
        await self._llm.collective_rpc("bridge_load_adapter", args=(self._settings.lora,))

    @contextlib.contextmanager
    def _model_directory(self) -> Iterator[str]:
        """What vLLM builds the model from; it reads it while it starts, and not later."""
        if isinstance(self._model, str):
            yield self._model
            return
        with tempfile.TemporaryDirectory(prefix="jaxrl-model-") as folder:
            for name, content in self._model.items():
                if Path(name).name != name:
                    raise ValueError(f"{name!r} is not a plain file name")
                (Path(folder) / name).write_bytes(content)
            yield folder

    async def stage(
        self, ticket_json: str, expected: list[list[Any]], deadline_s: float
    ) -> dict[str, Any]:
        """Brings one version into the workers' memory and proves it, while the old one serves.

        Args:
          ticket_json: a `channels.Ticket`.
          expected: [[name, dtype, shape], ...] of every tensor that the version has: all of the
            model's, or all of an adapter's.
          deadline_s: for the bytes to arrive; checking them may take as long again.

        Raises:
          EngineError: the version is late, torn, incomplete, not the model's, or an adapter where
            there can be none. The engine serves on, and the next `stage` starts afresh.
        """
        from bridge.channels import Ticket
        from bridge.engines.weight_transfer import ADAPTER_PREFIX

        ticket = Ticket.from_json(ticket_json)
        adapter = any(name.startswith(ADAPTER_PREFIX) for name, _, _ in expected)
        async with self._updating:
            started = time.perf_counter()
            with self._plain_errors():
                await self._abort()
                self._check_order(ticket.version, adapter)
                await self._llm.start_weight_update()
                await self._receive(ticket_json, expected, deadline_s)
            self._staged, self._staged_adapter = ticket.version, adapter
            return {"version": ticket.version, "stage_s": time.perf_counter() - started}

    def _check_order(self, version: int, adapter: bool) -> None:
        where = f"{self._name}: weight version {version}"
        if adapter and self._settings.lora is None:
            raise EngineError(
                f"{where} is an adapter, and this engine takes none; set EngineSettings.lora"
            )
        if adapter and self._version is None:
            raise EngineError(
                f"{where} is an adapter, and there are no weights under it yet; publish those of "
                "the model first"
            )
        if self._adapted and not adapter:
            raise EngineError(
                f"{where} has the model's weights, which are frozen once an adapter was loaded; "
                "publish an adapter, or start a new engine"
            )

    async def _receive(self, ticket_json: str, expected: list[list[Any]], deadline_s: float):
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        await self._llm.collective_rpc("bridge_prefetch", args=(ticket_json, deadline_s))
        while not all(await self._llm.collective_rpc("bridge_prefetched")):
            await asyncio.sleep(_POLL_S)  # decoding goes on; the workers give up at their deadline
        info = {"ticket": ticket_json, "deadline_s": deadline_s, "expected": expected}
        await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))

    async def commit(self, version: int) -> dict[str, Any]:
        """Loads the staged version and serves it from the next token on.

        Requests under way are kept; what they sampled is recomputed under the new weights, because
        the cache of the old ones is dropped, and their next tokens carry the new version.

        Returns:
          version; digest of what was handed to the model's loader; pause_s, for which nothing was
          sampled; load_s, the part of it spent loading; stage_s.
        """
        async with self._updating:
            require_staged(self._name, self._staged, version)
            self._staged = None
            started = time.perf_counter()
            try:
                await self._llm.pause_generation(mode="keep", clear_cache=True)
                paused = max(started, self._counters.sampled_at)  # the step under way gave tokens
                await self._llm.finish_weight_update(weight_version=str(version))
                if self._settings.lora is not None:  # finishing unloads the adapter
                    await self._llm.collective_rpc(
                        "bridge_load_adapter", args=(self._settings.lora,)
                    )
                loaded = await self._agreed(version)
                self._version = version
                self._adapted |= self._staged_adapter
                await self._llm.resume_generation()
            except Exception as error:  # whatever it was, the weights are not known any more
                await self.shutdown()
                raise EngineDead(
                    f"{self._name}: loading version {version} failed half way, and the engine was "
                    f"shut down: {_sentence(error)}"
                ) from error
            return loaded | {"pause_s": time.perf_counter() - paused}

    async def acknowledged(self) -> int | None:
        """The version that the engine serves, or None before the first."""
        return self._version

    async def _agreed(self, version: int) -> dict[str, Any]:
        """What the workers loaded, which must be the same thing in each of them."""
        first, *others = await self._llm.collective_rpc("bridge_loaded")
        for loaded in [first, *others]:
            if (loaded["version"], loaded["digest"]) != (version, first["digest"]):
                raise EngineError(f"the workers loaded different weights: {[first, *others]}")
        return first

    async def examine(self, deadline_s: float) -> dict[str, Any]:
        """Compares what the model holds with the version that was loaded last.

        Decoding goes on in between, and no update begins meanwhile.

        Returns:
          version; how many of its tensors were found exactly and how many were probed; unchecked,
          the names of those that could not be compared; wrong, the name of each other tensor and
          what is not right. Each tensor counts once. See `bridge.engines.examine`.

        Raises:
          EngineError: nothing was loaded, the version's tensors are not held any more, or the
            deadline passed.
        """
        async with self._updating:
            end = time.monotonic() + deadline_s
            with self._plain_errors():
                self._require_running()
                try:
                    reports = await self._examined(end)
                finally:  # others may wait for the tensors' memory
                    await self._llm.collective_rpc("bridge_end_examination")
            if None in reports:
                raise EngineError(
                    f"{self._name}: weight version {self._version} was not examined within "
                    f"{deadline_s:g} s; give it longer"
                )
            return merged(reports)

    async def _examined(self, end: float) -> list[Any]:
        """The workers' reports; None for one that was not ready at `end`."""
        config, reports = self._settings.lora, [None]
        left = max(0.0, end - time.monotonic())
        await self._llm.collective_rpc("bridge_begin_examination", args=(config, left))
        while not all(await self._llm.collective_rpc("bridge_found")) and time.monotonic() < end:
            await asyncio.sleep(_POLL_S)
        while None in reports and time.monotonic() < end:
            reports = await self._llm.collective_rpc("bridge_examine", args=(_EXAMINE_S,))
        return reports

    async def abort_update(self) -> None:
        """Drops a staged version. The engine serves what it served, and can stage again."""
        async with self._updating:
            with self._plain_errors():
                await self._abort()

    async def _abort(self) -> None:
        self._require_running()
        self._staged = None
        await self._llm.collective_rpc("bridge_abort")

    async def submit(self, requests: list[dict[str, Any]]) -> None:
        """Takes requests on and returns; `poll` tells how each ended.

        Args:
          requests: of each its id, tokens, seed, version (the oldest of the weights that may sample
            it), straggler_s (see `intake.siblings`; None waits for all) and the fields of
            `Sampling`.

        Raises:
          EngineDead: it took none.
        """
        self._require_running()
        self._intake.submit(requests)

    async def poll(self, wait_s: float) -> dict[str, Any]:
        """Waits until a request has ended, for `wait_s` at most. One call at a time.

        Returns:
          done: of each request that ended since the last call its id, and one of: completions, as
            `generate` has them; refused, why no engine would serve it; failed, why this one did
            not;
          progress, which grows with all that vLLM does for its requests;
          running and waiting, the sequences in vLLM's scheduler; kv_use, the share of the KV cache
            that they use;
          since the start: tokens sampled; prompt_tokens looked up in the prefix cache, and
            prefix_hits, those found; idle_s, without a request that was submitted.

        Raises:
          EngineDead: nothing that was not reported will be.
        """
        self._require_running()
        done = await self._intake.take(wait_s)
        self._require_running()
        return {"done": done, "idle_s": self._intake.idle_s, **self._counters.report()}

    async def cancel(self, ids: list[str]) -> None:
        """Aborts submitted requests. They are not reported; unknown ids are ignored."""
        self._intake.cancel(ids)

    async def generate(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Samples the completions of one prompt and waits for them.

        Args:
          request: tokens, seed, version and the fields of `Sampling`; options that it does not name
            are off. Sibling i is sampled with seed + i. Temperature 0 is greedy, and its
            log-probabilities are those of temperature 1. Of a beam search sibling 0 is the best.

        Returns:
          One dict for each sibling: tokens int32, logprobs float32 nats of the sampling
          distribution, versions int64, finish_reason, seed.

        Raises:
          RequestRefused: no engine could serve this request.
          StaleVersion: this engine has not acknowledged the request's version.
          EngineError: vLLM did not finish it.
        """
        return await siblings(self._samples(request), straggler_s=None)

    def _samples(self, request: dict[str, Any]) -> list[Coroutine[Any, Any, dict[str, Any]]]:
        """The siblings of a request as requests of their own, which share the prompt in the cache:
        vLLM would give those of one request back together, and not before the last."""
        self._require_running()
        require_served(self._name, self._version, request["version"])
        sampling = sampling_of(request, self._settings.tokenizer)
        tokens, seed = request["tokens"], request["seed"]
        self._check_tokens(tokens, new=sampling.max_new_tokens)
        if sampling.beams > 1:
            # Begun by the first sibling that runs: a task that nobody awaits is never cancelled.
            search = functools.cache(lambda: asyncio.create_task(self._search(tokens, sampling)))
            return [self._found(search, rank, seed) for rank in range(sampling.n)]
        with self._plain_errors():
            params = [sampling_params(sampling, seed + sibling) for sibling in range(sampling.n)]
        return [self._sample(tokens, own) for own in params]

    async def _sample(self, tokens: list[int], params: Any) -> dict[str, Any]:
        with self._plain_errors():
            output = await self._run(tokens, params)
        return self._result(output.outputs[0], params.seed)

    async def _search(self, tokens: list[int], sampling: Sampling) -> tuple[tuple[Beam, ...], int]:
        """The best completions, and the version that all of their tokens are of: if it changes
        under way, the search begins anew."""
        versions: set[int] = set()
        search = Search(len(tokens), sampling)
        while not search.over:
            likeliest = min(search.wanted, self._vocab_size)
            asked = [self._next(tokens, beam, sampling, likeliest) for beam in search.live]
            steps = await siblings(asked, straggler_s=None)
            versions.update(step["version"] for step in steps)
            if len(versions) == 1:
                search = search.step([step["logprobs"] for step in steps])
            else:
                versions, search = set(), Search(len(tokens), sampling)
        (version,) = versions
        return search.completions(), version

    async def _next(
        self, tokens: list[int], beam: Beam, sampling: Sampling, likeliest: int
    ) -> dict[str, Any]:
        """The log-probs of so many tokens that may follow a beam, the likeliest first, and the
        version that they are of. What beams have in common is in the prefix cache."""
        with self._plain_errors():
            params = sampling_params(dataclasses.replace(sampling, max_new_tokens=1), 0, likeliest)
            output = await self._run([*tokens, *beam.tokens], params)
        (completion,) = output.outputs
        (version,) = self._versions(completion)
        flat = completion.logprobs
        logprobs = dict(zip(flat.token_ids, flat.logprobs, strict=True))
        return {"logprobs": logprobs, "version": int(version)}

    async def _found(
        self, search: Callable[[], Awaitable[tuple[tuple[Beam, ...], int]]], rank: int, seed: int
    ) -> dict[str, Any]:
        """One of the completions that a search finds, by its rank."""
        found, version = await search()
        if rank >= len(found):
            raise RequestRefused(
                f"{self._name}: there are only {len(found)} completions of so few tokens; ask for "
                "fewer, or for longer ones"
            )
        beam = found[rank]
        return {
            "tokens": np.array(beam.tokens, np.int32),
            "logprobs": np.array(beam.logprobs, np.float32),
            "versions": np.full(len(beam.tokens), version, np.int64),
            "finish_reason": "stop" if beam.stopped else "length",
            "seed": seed + rank,
        }

    async def score(self, tokens: list[int]) -> np.ndarray:
        """Log-probability of each token given those before it, float32 [len(tokens)], nats.

        Under the loaded weights, at temperature 1. Position 0 has nothing before it and is 0.
        """
        from vllm import SamplingParams

        self._require_running()
        if self._version is None:
            raise EngineError(f"{self._name} has no weights yet")
        self._check_tokens(tokens, new=1)
        params = SamplingParams(
            max_tokens=1, prompt_logprobs=0, flat_logprobs=True, detokenize=False, temperature=0.0
        )
        with self._plain_errors():
            flat = (await self._run(tokens, params)).prompt_logprobs
        scores = np.zeros(len(tokens), np.float32)
        for position in range(1, len(tokens)):
            start = flat.start_indices[position]
            if flat.token_ids[start] != tokens[position]:
                raise EngineError(f"{self._name}: vLLM scored another token at {position}")
            scores[position] = flat.logprobs[start]
        return scores

    async def shutdown(self) -> None:
        """Ends vLLM's processes."""
        llm, self._llm = self._llm, None
        self._version = None
        self._intake.close()
        if llm is not None:
            llm.shutdown()
        if self._sockets is not None:
            self._sockets.close()
            self._sockets = None
            os.environ.pop(_SOCKETS, None)

    async def _run(self, tokens: list[int], params: Any) -> Any:
        from vllm.inputs import tokens_input

        results = self._llm.generate(
            tokens_input(tokens), params, uuid.uuid4().hex, lora_request=self._lora_request
        )
        *_, last = [output async for output in results]  # to its end, or vLLM would abort it
        return last

    def _result(self, completion: Any, seed: int) -> dict[str, Any]:
        versions, flat = self._versions(completion), completion.logprobs
        if flat.token_ids != list(completion.token_ids):
            raise EngineError(f"{self._name}: vLLM's log-probabilities are of other tokens")
        return {
            "tokens": np.array(completion.token_ids, np.int32),
            "logprobs": np.array(flat.logprobs, np.float32),
            "versions": versions,
            "finish_reason": completion.finish_reason,
            "seed": seed,
        }

    def _versions(self, completion: Any) -> np.ndarray:
        """Of each token of a completion, int64, if it came to its end."""
        if completion.finish_reason not in _FINISHED:
            raise EngineError(f"{self._name}: a completion ended with {completion.finish_reason!r}")
        versions = np.full(len(completion.token_ids), -1, np.int64)
        for span in completion.weight_versions or []:
            versions[span.start : span.end] = int(span.version)
        if (versions < 0).any():
            raise EngineError(f"{self._name}: vLLM did not say which weights sampled each token")
        return versions

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        """Lets only this module's errors out: the driver has no vLLM to unpickle others with."""
        try:
            yield
        except EngineError:
            raise
        except Exception as error:  # vLLM rebuilds its workers' errors as types of its own
            from vllm.exceptions import VLLMClientError

            self._require_running()
            kind = RequestRefused if isinstance(error, VLLMClientError) else EngineError
            raise kind(f"{self._name}: {_sentence(error)}") from error

    def _require_running(self) -> None:
        if self._llm is None:
            raise EngineDead(f"{self._name} is not running")
        if self._llm.errored:
            raise EngineDead(f"{self._name}: {_sentence(self._llm.dead_error)}")

    def _check_tokens(self, tokens: Sequence[int], new: int) -> None:
        check_tokens(tokens, new, self._settings.max_model_len, self._vocab_size)


def merged(reports: list[dict[str, Any]]) -> dict[str, Any]:
    """One report of the workers' own (see Examination.work): of each tensor the worst is said."""
    wrong: dict[str, str] = {}
    for rank, report in enumerate(reports):
        where = f"worker {rank}: " if len(reports) > 1 else ""
        wrong = {name: where + why for name, why in report["wrong"].items()} | wrong
    unchecked = {name for report in reports for name in report["unchecked"]} - wrong.keys()
    probed = {name for report in reports for name in report["probed"]} - wrong.keys() - unchecked
    return {
        "version": reports[0]["version"],
        "exact": reports[0]["tensors"] - len(wrong) - len(unchecked) - len(probed),
        "probed": len(probed),
        "unchecked": sorted(unchecked),
        "wrong": wrong,
    }


_TRIAL = Sampling(n=1, max_new_tokens=1, temperature=1.0, stop_tokens=())


def _adapter_arguments(lora: dict[str, Any] | None) -> dict[str, Any]:
    """What vLLM is started with for adapters of this PEFT configuration."""
    if lora is None:
        return {}
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.peft_helper import PEFTHelper

    rank = PEFTHelper.from_dict(lora).r  # says what is missing
    ranks = [most for most in get_args(MaxLoRARanks) if most >= rank]
    if not ranks:
        raise ValueError(f"LoRA rank {rank}: vLLM takes at most {max(get_args(MaxLoRARanks))}")
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": min(ranks),
        "lora_target_modules": list(lora["target_modules"]),
    }


def _sentence(error: Exception) -> str:
    """What went wrong, in one line.

    Where vLLM only says that its child process failed, the child's own error is looked up in what
    it printed: an actor and its children print to the same files.
    """
    if isinstance(error, EngineError):
        return str(error)
    text = " ".join(str(error).split())
    if not text and isinstance(error.__cause__, Exception):  # vLLM's wrapper of what went wrong
        return _sentence(error.__cause__)
    if "root cause" not in text:
        return f"{type(error).__name__}: {text}" if type(error) is not Exception else text
    printed = _own_output("/proc/self/fd/1") + _own_output("/proc/self/fd/2")
    causes = [line for line in _LOGGED_ERROR.findall(printed) if "root cause" not in line]
    return causes[-1] if causes else text


def _own_output(descriptor: str) -> str:
    """The end of the file that this process prints to, or "" if that is not a file."""
    path = Path(descriptor)
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")
