"""Servers that somebody else started, spoken to over HTTP: vLLM's and SGLang's.

What each must have been started with is checked first (`ready`), and what is missing is named with
its flag; docs/engines.md has the whole commands. No vLLM, no torch and no jax in this process.
"""

import asyncio
import contextlib
import dataclasses
import json
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import aiohttp
import numpy as np

from bridge import channels, wire
from bridge.channels import ChannelError, Ticket
from bridge.engines import plugin
from bridge.engines.errors import EngineDead, EngineError, RequestRefused
from bridge.engines.vllm import merged
from jaxrl.types import Sampling

_ANSWER_S = 30.0  # for what needs no work
_LOAD_S = 600.0  # for a load; the fleet has a deadline of its own, and ends this process
_POLL_S = 0.05
_EXAMINE_S = 0.02  # for which decoding waits at a time while the model is examined
_NAMED = 8  # tensors, in a message
_WORKER = "bridge.engines.weight_transfer.BridgeWorker"
_WORKER_ERROR = re.compile(r"Worker failed with error '(.*)', please check", re.DOTALL)
_SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{.*\})? ([^ ]+)$", re.MULTILINE)


class ErrorAnswer(EngineError):
    """The server answered with an error; `status` is that of HTTP."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status

    def __reduce__(self) -> Any:  # or it would not survive the way to another process
        return ErrorAnswer, (str(self), self.status)


class About(NamedTuple):
    """What a server says of itself."""

    software: str  # its name and release
    max_model_len: int  # tokens, prompt + completion
    max_num_seqs: int  # sampled at once
    tokenizer: bool  # without one, options that are about text would be ignored, silently


class Counters(NamedTuple):
    """What a server's metrics say. The counts are since it was started."""

    running: int  # sequences
    waiting: int
    kv_use: float  # 0..1
    tokens: int  # sampled
    prompt_tokens: int  # looked up in the prefix cache
    prefix_hits: int  # and found
    steps: int  # of the scheduler, where it counts them


class Server(Protocol):
    """What `bridge.engines.http` needs of a kind of server. Errors are EngineErrors."""

    async def ready(self) -> About:
        """Raises EngineDead unless it was started so that it can be used."""
        ...

    async def sample(self, tokens: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        """One completion: tokens int32, logprobs float32, versions int64, finish_reason, seed.

        Raises:
          RequestRefused: the request is at fault.
        """
        ...

    async def score(self, tokens: Sequence[int]) -> np.ndarray:
        """See VllmEngine.score."""
        ...

    async def stage(
        self, ticket: Ticket, expected: Sequence[Sequence[Any]], deadline_s: float
    ) -> None:
        """See VllmEngine.stage. Starts afresh, whatever an earlier update left behind."""
        ...

    async def commit(self, version: int) -> dict[str, Any]:
        """See VllmEngine.commit. Any error from here leaves weights that nobody knows."""
        ...

    async def abort(self) -> None:
        """Drops what is staged."""
        ...

    async def examine(self, deadline_s: float) -> dict[str, Any]:
        """See VllmEngine.examine."""
        ...

    async def counters(self) -> Counters: ...


class Client:
    """Requests to one server, each with a deadline and with errors that name what was asked."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        # A connection for each request: a server may close an idle one just when it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(connector=connector)

    async def close(self) -> None:
        await self._session.close()

    async def get(self, path: str, **query: str) -> Any:
        return await self._ask("GET", path, _ANSWER_S, params=query)

    async def post(self, path: str, body: Any = None, timeout_s: float | None = _ANSWER_S) -> Any:
        return await self._ask("POST", path, timeout_s, json={} if body is None else body)

    async def _ask(self, method: str, path: str, timeout_s: float | None, **how: Any) -> Any:
        """The answer: JSON as Python has it, or text.

        Raises:
          EngineDead: nobody listens there.
          ErrorAnswer: the answer is an error.
          EngineError: there is none, or not within `timeout_s`.
        """
        where = f"{method} {self.url}{path}"
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=_ANSWER_S)
        try:
            async with self._session.request(
                method, self.url + path, timeout=timeout, **how
            ) as answer:
                text = await answer.text()
                if answer.status >= 400:
                    raise ErrorAnswer(f"{where}: {answer.status}: {_reason(text)}", answer.status)
                return json.loads(text) if answer.content_type == "application/json" else text
        except aiohttp.ClientConnectorError as error:
            raise EngineDead(f"{where}: {error}") from error
        except TimeoutError as error:
            raise EngineError(f"{where}: no answer within {timeout_s or _ANSWER_S:g} s") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise EngineError(f"{where}: {type(error).__name__}: {error}") from error


def server_at(client: Client, owner: str, max_model_len: int) -> Server:
    """
    Args:
      owner, max_model_len: as the server lists its model.

    Raises:
      EngineDead: it is a kind of server that is not known.
    """
    kinds = {"vllm": VllmServer, "sglang": SglangServer}
    if owner not in kinds:
        raise EngineDead(
            f"{client.url} says that its model is owned by {owner!r}; servers of {sorted(kinds)} "
            "can be used"
        )
    return kinds[owner](client, max_model_len)


class VllmServer:
    """`vllm serve` with this package's weight-transfer backend in its workers.

    The workers stage, prove and load a version as those of `VllmEngine` do, and say with every
    token which version sampled it.
    """

    def __init__(self, client: Client, max_model_len: int):
        self._client, self._max_model_len = client, max_model_len

    async def ready(self) -> About:
        about = await self._client.get("/version")
        try:
            info = await self._client.get("/server_info", config_format="json")
        except ErrorAnswer as error:
            raise self._unusable(["VLLM_SERVER_DEV_MODE=1 in its environment"]) from error
        config = info["vllm_config"]
        model, parallel = config["model_config"], config["parallel_config"]
        scheduler, transfer = config["scheduler_config"], config["weight_transfer_config"] or {}
        has = {
            f'--weight-transfer-config \'{{"backend": "{plugin.BACKEND}"}}\'': (
                transfer.get("backend") == plugin.BACKEND
            ),
            f"--worker-extension-cls {_WORKER}": parallel["worker_extension_cls"] == _WORKER,
            "--logprobs-mode processed_logprobs": model["logprobs_mode"] == "processed_logprobs",
            "--enable-scale-out": await self._takes_tokens(),
            "--data-parallel-size 1": parallel["data_parallel_size"] == 1,
            # See VllmEngine: on CPU vLLM 0.32 dies of a prompt that is split over two steps.
            "--no-enable-chunked-prefill": (
                config["device_config"]["device"] != "cpu"
                or not scheduler["enable_chunked_prefill"]
            ),
        }
        if missing := [flag for flag, there in has.items() if not there]:
            raise self._unusable(missing)
        await self._client.post("/init_weight_transfer_engine", {"init_info": {}})
        return About(
            software=f"vLLM {about['version']}",
            max_model_len=self._max_model_len,
            max_num_seqs=scheduler["max_num_seqs"],
            tokenizer=not model["skip_tokenizer_init"],
        )

    async def _takes_tokens(self) -> bool:
        try:
            await self._client.get("/inference/v1/generate")
        except ErrorAnswer as error:
            return error.status != 404  # 405 where it is: it wants a POST
        return True

    def _unusable(self, missing: Sequence[str]) -> EngineDead:
        return EngineDead(
            f"the vLLM server at {self._client.url} lacks {', '.join(missing)}; start it as "
            "docs/engines.md says"
        )

    async def sample(self, tokens: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        body = {"token_ids": tokens, "sampling_params": _vllm_params(sampling, seed)}
        answer = await _sampled(self._client, "/inference/v1/generate", body)
        (choice,) = answer["choices"]
        content = choice["logprobs"]["content"]
        if [item["token_id"] for item in content] != choice["token_ids"]:
            raise EngineError(f"{self._client.url}: log-probabilities are of other tokens")
        spans = choice["weight_versions"] or []
        versions = [span["version"] for span in spans for _ in range(span["start"], span["end"])]
        return _completion(self._client, content, versions, choice["finish_reason"], seed)

    async def score(self, tokens: Sequence[int]) -> np.ndarray:
        params = {"max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0, "detokenize": False}
        body = {"token_ids": list(tokens), "sampling_params": params}
        answer = await self._client.post("/inference/v1/generate", body, _LOAD_S)
        scored = answer["prompt_logprobs"][1:]
        pairs = [(row[str(t)]["logprob"], t) for t, row in zip(tokens[1:], scored, strict=True)]
        return _scores(self._client, tokens, pairs)

    async def stage(
        self, ticket: Ticket, expected: Sequence[Sequence[Any]], deadline_s: float
    ) -> None:
        _require_channel(self._client, ticket, ("shuttle", "cloud"))
        await self.abort()
        await self._client.post("/start_weight_update")
        await self._call("bridge_prefetch", ticket.to_json(), deadline_s)
        # Decoding goes on; the workers give up at their deadline. Over HTTP False is "False".
        while set(await self._call("bridge_prefetched")) != {"True"}:
            await asyncio.sleep(_POLL_S)
        info = {"ticket": ticket.to_json(), "deadline_s": deadline_s, "expected": expected}
        await self._client.post("/update_weights", {"update_info": info}, _ANSWER_S + deadline_s)

    async def commit(self, version: int) -> dict[str, Any]:
        await self._client.post("/pause?mode=keep&clear_cache=true")
        finish = {"weight_version": str(version)}
        await self._client.post("/finish_weight_update", finish, _LOAD_S)
        first, *others = await self._call("bridge_loaded")
        agreed = version, first["digest"]
        if any((each["version"], each["digest"]) != agreed for each in [first, *others]):
            raise EngineError(f"the workers loaded different weights: {[first, *others]}")
        await self._client.post("/resume")
        return first

    async def abort(self) -> None:
        await self._call("bridge_abort")

    async def examine(self, deadline_s: float) -> dict[str, Any]:
        end = time.monotonic() + deadline_s
        try:
            await self._call("bridge_begin_examination", None, deadline_s)
            while set(await self._call("bridge_found")) != {"True"} and time.monotonic() < end:
                await asyncio.sleep(_POLL_S)
            reports: list[Any] = [None]
            while None in reports and time.monotonic() < end:
                reports = await self._call("bridge_examine", _EXAMINE_S)
        finally:  # others may wait for the tensors' memory
            await self._call("bridge_end_examination")
        if None in reports:
            raise EngineError(
                f"{self._client.url}: its model was not examined within {deadline_s:g} s; give it "
                "longer"
            )
        return merged(reports)

    async def counters(self) -> Counters:
        found = _metrics(await self._client.get("/metrics"))
        return Counters(
            running=int(found["vllm:num_requests_running"]),
            waiting=int(found["vllm:num_requests_waiting"]),
            kv_use=found["vllm:kv_cache_usage_perc"],
            tokens=int(found["vllm:generation_tokens_total"]),
            prompt_tokens=int(found["vllm:prefix_cache_queries_total"]),
            prefix_hits=int(found["vllm:prefix_cache_hits_total"]),
            steps=int(found["vllm:iteration_tokens_total_count"]),
        )

    async def _call(self, method: str, *args: Any) -> list[Any]:
        """What each worker returns."""
        body = {"method": method, "args": args}
        return (await self._client.post("/collective_rpc", body, _LOAD_S))["results"]


@dataclasses.dataclass(frozen=True)
class _Staged:
    version: int
    digest: str
    directory: str
    tensors: list[str]
    seconds: float


class SglangServer:
    """SGLang's own loader reads a version from the shuttle's directory.

    Every byte of it is checked against the manifest here, by this process, and not on its way into
    the model. The whole version is read, so one that is a difference cannot be had. A completion
    has one version: what is under way at a commit is aborted, and sampled again by the new weights.
    """

    def __init__(self, client: Client, max_model_len: int):
        self._client, self._max_model_len = client, max_model_len
        self._version: int | None = None
        self._staged: _Staged | None = None
        self._tensors: list[str] = []  # of the version that was loaded last
        self._commits = 0
        self._open = asyncio.Event()  # cleared while a version is loaded
        self._open.set()

    async def ready(self) -> About:
        info = await self._client.get("/server_info")
        has = {
            # Without it the seeds of requests are ignored.
            "--enable-deterministic-inference": info.get("enable_deterministic_inference"),
            "--enable-metrics": info.get("enable_metrics"),
            "--max-running-requests N": info.get("max_running_requests"),
            "--dp-size 1": info.get("dp_size") == 1,
        }
        if missing := [flag for flag, there in has.items() if not there]:
            raise EngineDead(
                f"the SGLang server at {self._client.url} lacks {', '.join(missing)}; start it as "
                "docs/engines.md says"
            )
        return About(
            software=f"SGLang {info['version']}",
            max_model_len=self._max_model_len,
            max_num_seqs=info["max_running_requests"],
            tokenizer=not info["skip_tokenizer_init"],
        )

    async def sample(self, tokens: Sequence[int], sampling: Sampling, seed: int) -> dict[str, Any]:
        if sampling.bad_words:
            raise RequestRefused("SGLang has no bad_words")
        while True:
            await self._open.wait()
            version, commits = self._version, self._commits
            meta = await self._generate(tokens, sampling, seed)
            reason = meta["finish_reason"]["type"]
            if reason != "abort" or commits == self._commits:
                break
        # A request may reach the server behind a commit that it was sent ahead of.
        if (said := meta["weight_version"]) not in (str(version), str(self._version)):
            raise EngineError(
                f"{self._client.url}: weight version {said} sampled a completion that was asked of "
                f"{version}; does another program update this server?"
            )
        scored = meta.get("output_token_logprobs") or []
        content = [{"logprob": logprob, "token_id": token} for logprob, token, _ in scored]
        return _completion(self._client, content, [said] * len(content), reason, seed)

    async def _generate(
        self, tokens: Sequence[int], sampling: Sampling, seed: int
    ) -> dict[str, Any]:
        rid = uuid.uuid4().hex
        body = {
            "rid": rid,
            "input_ids": tokens,
            "sampling_params": _sglang_params(sampling, seed),
            "return_logprob": True,
        }
        try:
            return (await _sampled(self._client, "/generate", body))["meta_info"]
        except asyncio.CancelledError:  # it looks only now and then whether we are still there
            with contextlib.suppress(EngineError):
                await self._client.post("/abort_request", {"rid": rid})
            raise

    async def score(self, tokens: Sequence[int]) -> np.ndarray:
        body = {
            "input_ids": list(tokens),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0.0},
            "return_logprob": True,
            "logprob_start_len": 0,
        }
        answer = await self._client.post("/generate", body, _LOAD_S)
        scored = answer["meta_info"]["input_token_logprobs"][1:]
        return _scores(self._client, tokens, [(item[0], item[1]) for item in scored])

    async def stage(
        self, ticket: Ticket, expected: Sequence[Sequence[Any]], deadline_s: float
    ) -> None:
        _require_channel(self._client, ticket, ("shuttle",))
        started, self._staged = time.perf_counter(), None
        try:
            manifest, data = await asyncio.to_thread(channels.fetch, ticket, deadline_s)
            if manifest.base is not None:
                raise EngineError(
                    f"weight version {ticket.version} is a difference from "
                    f"{manifest.base.version}, and SGLang reads whole versions; set "
                    "publish.encoding: full"
                )
            _require_expected(manifest, expected)
            digest = await asyncio.to_thread(wire.verify, manifest, data)
        except (ChannelError, wire.WireError) as error:
            raise EngineError(str(error)) from error
        names = [entry.name for entry in manifest.tensors]
        seconds = time.perf_counter() - started
        self._staged = _Staged(ticket.version, digest, ticket.address, names, seconds)

    async def commit(self, version: int) -> dict[str, Any]:
        staged, self._staged = self._staged, None
        assert staged is not None and staged.version == version, "stage comes first"
        self._open.clear()
        self._commits += 1
        await self._client.post("/pause_generation", {"mode": "abort"}, _LOAD_S)
        started = time.perf_counter()
        update = {
            "model_path": staged.directory,
            "weight_version": str(version),
            "flush_cache": True,
        }
        answer = await self._client.post("/update_weights_from_disk", update, _LOAD_S)
        if not answer["success"]:
            raise EngineError(f"{self._client.url}: {answer['message']}")
        load_s = time.perf_counter() - started
        if (said := (await self._client.get("/model_info"))["weight_version"]) != str(version):
            raise EngineError(f"{self._client.url} was to load version {version}, and has {said}")
        self._version, self._tensors = version, staged.tensors
        await self._client.post("/continue_generation")
        self._open.set()
        loaded = {"version": version, "digest": staged.digest}
        return loaded | {"load_s": load_s, "stage_s": staged.seconds}

    async def abort(self) -> None:
        self._staged = None

    async def examine(self, deadline_s: float) -> dict[str, Any]:
        """Says that nothing can be: such a server does not say what its model holds."""
        report = {"version": self._version, "exact": 0, "probed": 0, "wrong": {}}
        return report | {"unchecked": self._tensors}

    async def counters(self) -> Counters:
        found = _metrics(await self._client.get("/metrics"))
        return Counters(
            running=int(found["sglang:num_running_reqs"]),
            waiting=int(found["sglang:num_queue_reqs"]),
            kv_use=found["sglang:token_usage"],
            tokens=int(found["sglang:generation_tokens_total"]),
            prompt_tokens=int(found["sglang:prompt_tokens_total"]),
            prefix_hits=int(found["sglang:cached_tokens_total"]),
            steps=int(found["sglang:realtime_tokens_total"]),
        )


def _vllm_params(sampling: Sampling, seed: int) -> dict[str, Any]:
    structure = {"regex": sampling.regex, "json": sampling.json_schema}
    structure = {name: value for name, value in structure.items() if value is not None}
    return {
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": not structure,  # see engines.sampling
        "stop": list(sampling.stop_strings),
        "detokenize": bool(sampling.stop_strings),
        "bad_words": list(sampling.bad_words),
        "structured_outputs": structure or None,
        "logprobs": 0,  # of the sampled token, and of no other
    }


def _sglang_params(sampling: Sampling, seed: int) -> dict[str, Any]:
    return {
        "sampling_seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "min_p": sampling.min_p,
        "repetition_penalty": sampling.repetition_penalty,
        "max_new_tokens": sampling.max_new_tokens,
        "stop_token_ids": list(sampling.stop_tokens),
        "ignore_eos": sampling.regex is None and sampling.json_schema is None,
        "stop": list(sampling.stop_strings),
        "no_stop_trim": True,  # what stopped it was sampled too
        "regex": sampling.regex,
        "json_schema": sampling.json_schema,
    }


async def _sampled(client: Client, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """No deadline: how long sampling may take is the fleet's to judge, by the progress it sees."""
    try:
        return await client.post(path, body, timeout_s=None)
    except ErrorAnswer as error:
        if error.status in (400, 422):
            raise RequestRefused(str(error)) from error
        raise


def _completion(
    client: Client,
    content: Sequence[Mapping[str, Any]],
    versions: Sequence[Any],
    finish_reason: str,
    seed: int,
) -> dict[str, Any]:
    if finish_reason not in ("stop", "length"):
        raise EngineError(f"{client.url}: a completion ended with {finish_reason!r}")
    if len(versions) != len(content):
        raise EngineError(f"{client.url} did not say which weights sampled each token")
    return {
        "tokens": np.array([item["token_id"] for item in content], np.int32),
        "logprobs": np.array([item["logprob"] for item in content], np.float32),
        "versions": np.array([int(version) for version in versions], np.int64),
        "finish_reason": finish_reason,
        "seed": seed,
    }


def _scores(
    client: Client, tokens: Sequence[int], scored: Sequence[tuple[float, int]]
) -> np.ndarray:
    """Of the log-probs and ids of all tokens but the first: float32 [len(tokens)]."""
    if [token for _, token in scored] != list(tokens[1:]):
        raise EngineError(f"{client.url} scored other tokens than those that were sent")
    return np.array([0.0, *(logprob for logprob, _ in scored)], np.float32)


def _require_channel(client: Client, ticket: Ticket, known: Collection[str]) -> None:
    if ticket.channel not in known:
        raise EngineError(
            f"{client.url}: weight version {ticket.version} lies in {ticket.channel}, which this "
            "server cannot read; set publish.channel: shuttle, or publish.fallback: shuttle, and a "
            "publish.shuttle_dir that it sees"
        )


def _require_expected(manifest: wire.Manifest, expected: Sequence[Sequence[Any]]) -> None:
    want = {(name, dtype, tuple(shape)) for name, dtype, shape in expected}
    have = {(entry.name, entry.dtype, entry.shape) for entry in manifest.tensors}
    if wrong := sorted(name for name, _, _ in want ^ have):
        raise EngineError(
            f"weight version {manifest.version}: {len(set(wrong))} tensors are missing, not the "
            f"model's, or of another dtype or shape: {', '.join(wrong[:_NAMED])}"
        )


def _metrics(text: str) -> Mapping[str, float]:
    """Of Prometheus' text format: the sum over all labels of each name; 0 for others."""
    found: dict[str, float] = defaultdict(float)
    for name, value in _SAMPLE.findall(text):
        found[name] += float(value)
    return found


def _reason(text: str) -> str:
    """The sentence in the body of an error."""
    with contextlib.suppress(ValueError, AttributeError):
        raw = json.loads(text)
        raw = raw.get("error", raw)
        text = str(raw.get("message") or raw.get("detail") or raw)
    inner = _WORKER_ERROR.search(text)
    return " ".join((inner[1] if inner else text).split())
