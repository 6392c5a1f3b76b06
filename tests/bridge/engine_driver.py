"""Calls an engine, wherever it runs, through the interface that all engines have."""

import asyncio
import threading
import time

import numpy as np

from bridge.channels.shuttle import ShuttleChannel
from bridge.engines.vllm import VllmEngine, actor_environment
from tests.bridge.conftest import packed

PROMPT = [11, 3, 94, 27, 60]
WAIT_S = 120.0


class Here:
    """Calls the coroutines of an engine in this process, in a loop of its own."""

    def __init__(self, engine):
        self.engine, self.loop = engine, asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()

    def call(self, method, *args):
        coroutine = getattr(self.engine, method)(*args)
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def close(self):
        self.call("shutdown")
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(WAIT_S)


class Actor:
    """Calls an engine that is a Ray actor."""

    def __init__(self, ray, name, settings, files):
        environment = {"env_vars": actor_environment(cpu=True)}
        self.ray = ray
        self.actor = (
            ray.remote(VllmEngine)
            .options(num_cpus=1, runtime_env=environment)
            .remote(name, settings, files)
        )

    def call(self, method, *args):
        return self.ray.get(getattr(self.actor, method).remote(*args), timeout=WAIT_S)

    def close(self):
        self.call("shutdown")
        self.ray.kill(self.actor)


class Driver:
    """Gives each published version the next number, and each request an id."""

    def __init__(self, kind, host, root, expected):
        self.kind, self.call = kind, host.call
        self.channel, self.expected = ShuttleChannel(root), expected
        self.version, self.asked = 0, 0
        self.models = {}  # by version

    def stage(self, model, **spoilt):
        self.version += 1
        ticket = self.channel.publish(*packed(model, self.version, **spoilt))
        self.call("stage", ticket.to_json(), self.expected, 20.0)
        self.models[self.version] = model
        return self.version, ticket

    def publish(self, model):
        version, ticket = self.stage(model)
        return self.call("commit", version), ticket

    def submit(self, **changes):
        self.asked += 1
        request = {
            "id": f"request-{self.asked}",
            "tokens": PROMPT,
            "seed": 5,
            "version": self.call("acknowledged"),
            "straggler_s": None,
            "n": 1,
            "max_new_tokens": 24,
            "temperature": 1.0,
            "stop_tokens": [],
            "stop_strings": [],
            "top_p": 1.0,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "bad_words": [],
            "regex": None,
            "json_schema": None,
        } | changes
        self.call("submit", [request])
        return request["id"]

    def ended(self, *ids):
        """What became of the requests, in order; nothing else may have ended."""
        found, end = {}, time.monotonic() + WAIT_S
        while len(found) < len(ids):
            assert time.monotonic() < end, f"{found} of {ids}"
            for done in self.call("poll", 5.0)["done"]:
                assert done["id"] in ids and done["id"] not in found
                found[done["id"]] = done
        return [found[key] for key in ids]

    def sampled(self, **changes):
        (done,) = self.ended(self.submit(**changes))
        assert "completions" in done, done
        return done["completions"]

    def check(self, completion, temperature=1.0, prompt=PROMPT):
        """Each token's log-prob is that of the version that it says sampled it."""
        tokens, versions = completion["tokens"], completion["versions"]
        assert tokens.dtype == np.int32 and versions.dtype == np.int64
        assert completion["logprobs"].dtype == np.float32
        assert len(tokens) == len(versions) == len(completion["logprobs"]) > 0
        context = [*prompt, *tokens.tolist()]
        for version in set(versions.tolist()):
            rows = self.models[version].logprobs(context, temperature)[len(prompt) - 1 : -1]
            ours = rows[np.arange(len(tokens)), tokens][versions == version]
            theirs = completion["logprobs"][versions == version]
            np.testing.assert_allclose(theirs, ours, atol=1e-4)
