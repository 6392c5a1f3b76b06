"""A server that answers as SGLang's documented HTTP API does, around a tiny torch model.

It stands in for SGLang, which is not installed: what it does is what that project's documentation
and request classes say, no more. Completions are sampled one token at a time, each from the whole
context; `held` seeds stop after their first token until they are aborted.
"""

import asyncio
import json
import threading
from pathlib import Path

import torch
from aiohttp import web
from safetensors.torch import load_file

MAX_MODEL_LEN = 512


class Http:
    """Serves `gets` and `posts`, handlers by path, in a thread of its own."""

    def __init__(self, gets, posts):
        self.gets, self.posts, self.port = gets, posts, 0

    def start(self):
        self.loop, started = asyncio.new_event_loop(), threading.Event()

        async def serve():
            app = web.Application()
            for path, handler in self.gets.items():
                app.router.add_get(path, handler)
            for path, handler in self.posts.items():
                app.router.add_post(path, handler)
            self.runner = web.AppRunner(app, shutdown_timeout=1)
            await self.runner.setup()
            self.site = web.TCPSite(self.runner, "127.0.0.1", self.port)
            await self.site.start()
            self.port = self.runner.addresses[0][1]  # which it has again when it starts again
            self.url = f"http://127.0.0.1:{self.port}"
            started.set()

        self.loop.create_task(serve())
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.thread.start()
        assert started.wait(30)
        return self

    def stop(self):
        asyncio.run_coroutine_threadsafe(self.runner.cleanup(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(30)

    def die(self):
        """As when its process is killed: all at once nobody listens, and no request is answered."""

        async def drop():
            await self.site.stop()
            for connection in self.runner.server.connections:
                connection.transport.abort()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        asyncio.run_coroutine_threadsafe(drop(), self.loop).result(30)
        self.stop()


class FakeSglang(Http):
    def __init__(self, model):
        gets = {
            "/v1/models": self.models,
            "/server_info": self.server_info,
            "/model_info": self.model_info,
            "/metrics": self.metrics,
        }
        posts = {
            "/generate": self.generate,
            "/abort_request": self.abort_request,
            "/pause_generation": self.pause,
            "/continue_generation": self.go_on,
            "/update_weights_from_disk": self.update,
        }
        super().__init__(gets, posts)
        self.model = model  # its weights are overwritten by updates
        self.info = {
            "version": "0.0-test",
            "enable_deterministic_inference": True,
            "enable_metrics": True,
            "max_running_requests": 8,
            "dp_size": 1,
            "skip_tokenizer_init": True,
        }
        self.version = "default"
        self.held = set()
        self.running, self.aborted = set(), set()
        self.tokens = self.met_pause = self.counted = 0
        self.paused = asyncio.Event()
        self.load_error = self.loads_as = self.broken = None

    async def models(self, request):
        card = {"id": "tiny", "owned_by": "sglang", "max_model_len": MAX_MODEL_LEN}
        return web.json_response({"object": "list", "data": [card]})

    async def server_info(self, request):
        return web.json_response(self.info)

    async def model_info(self, request):
        return web.json_response({"weight_version": self.version})

    async def metrics(self, request):
        lines = {
            "sglang:num_running_reqs": len(self.running),
            "sglang:num_queue_reqs": 0.0,
            "sglang:token_usage": 0.0,
            "sglang:generation_tokens_total": float(self.tokens),
        }
        self.counted += 1
        text = "".join(f'# TYPE {k} gauge\n{k}{{model_name="a b"}} {v}\n' for k, v in lines.items())
        return web.Response(text=text)

    async def abort_request(self, request):
        body = await request.json()
        self.aborted |= self.running if body.get("abort_all") else {body["rid"]}
        return web.Response()

    async def pause(self, request):
        assert (await request.json())["mode"] == "abort"
        self.paused.set()
        while self.running:
            self.aborted |= self.running
            await asyncio.sleep(0.01)
        return web.json_response({"status": "ok"})

    async def go_on(self, request):
        self.paused.clear()
        return web.json_response({"status": "ok"})

    async def update(self, request):
        body = await request.json()
        assert self.paused.is_set() and body["flush_cache"]
        if self.load_error:
            answer = {"success": False, "message": self.load_error}
            return web.json_response(answer, status=400)
        directory = Path(body["model_path"])
        index = json.loads((directory / "model.safetensors.index.json").read_text())
        for file in set(index["weight_map"].values()):
            self.model.load_state_dict(load_file(directory / file), strict=False)
        self.version = self.loads_as or body["weight_version"]
        return web.json_response({"success": True, "message": "", "num_paused_requests": 0})

    async def generate(self, request):
        body = await request.json()
        if self.broken:
            return web.json_response({"error": {"message": self.broken}}, status=500)
        self.met_pause += self.paused.is_set()
        while self.paused.is_set():
            await asyncio.sleep(0.01)
        rid, params = body.get("rid", object()), body["sampling_params"]
        if not 0 < params.get("top_p", 1.0) <= 1:
            return web.json_response({"error": {"message": "top_p must be in (0, 1]"}}, status=400)
        self.running.add(rid)
        try:
            meta = await self.sampled(rid, body["input_ids"], params)
        finally:
            self.running.discard(rid)
            self.aborted.discard(rid)
        if "logprob_start_len" in body:
            rows = self.logprobs(body["input_ids"], 1.0)
            pairs = zip(rows, body["input_ids"][1:], strict=False)
            after = [[row[token].item(), token, None] for row, token in pairs]
            meta["input_token_logprobs"] = [[None, body["input_ids"][0], None], *after]
        return web.json_response({"text": "", "meta_info": meta | {"weight_version": self.version}})

    async def sampled(self, rid, prompt, params):
        temperature = params["temperature"]
        generator = torch.Generator().manual_seed(params.get("sampling_seed", 0))
        sampled, reason = [], {"type": "length", "length": params["max_new_tokens"]}
        while len(sampled) < params["max_new_tokens"]:
            await asyncio.sleep(0)
            while sampled and params.get("sampling_seed") in self.held and rid not in self.aborted:
                await asyncio.sleep(0.01)
            if rid in self.aborted:
                reason = {"type": "abort", "message": "Aborted"}
                break
            row = self.logprobs([*prompt, *(t for _, t, _ in sampled)], temperature or 1.0)[-1]
            if temperature:
                token = torch.multinomial(row.exp(), 1, generator=generator).item()
            else:
                token = row.argmax().item()
            sampled.append([row[token].item(), token, None])
            self.tokens += 1
            if token in params.get("stop_token_ids", []):
                reason = {"type": "stop", "matched": token}
                break
        return {"output_token_logprobs": sampled, "finish_reason": reason}

    def logprobs(self, tokens, temperature):
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0].float()
        return torch.log_softmax(logits / temperature, -1)
