"""An OpenAI-compatible model server over the tiny model, as vLLM answers: in this process, on one
thread, offline.

Texts come from a local engine of its own, log-probabilities from one forward pass of its model.
`told` switches features off; `asked` keeps the bodies of all completions.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from r4r_graph.engine.base import GenerateRequest, GenerateResult, Message
from r4r_graph.engine.batching import BatchingEngine, Prepared, Row
from r4r_graph.engine.local import load_local_engine

FEATURES = ("chosen tokens", "structured outputs", "log-probabilities")
NEVER = -9999.0


class IdsBackend:
    """A local backend whose prompts are token ids already: the one message holds them as JSON."""

    def __init__(self, local: Any, at_work: threading.Lock) -> None:
        self.local, self.at_work = local, at_work
        self.info, self.meter = local.info, local.meter

    def __getattr__(self, name: str) -> Any:
        return getattr(self.local, name)

    def prepare(self, request: Any) -> Prepared:
        ids = tuple(json.loads(request.messages[0].content))
        key = ("generate", request.adapter, request.format)
        return Prepared(request, ids, key, len(ids) + request.max_tokens)

    def generate(self, rows: Sequence[Row]) -> Any:
        with self.at_work:
            return self.local.generate(rows)

    def rate(self, rows: Sequence[Row]) -> Any:
        raise AssertionError("servers do not rate")


class ModelServer:
    """Serves the base model in a folder, and adapters by name. `close` it."""

    def __init__(
        self, base: Path, adapters: Path, name: str = "tiny", features: Sequence[str] = FEATURES
    ) -> None:
        self.features = set(features)
        self.failing: list[int] = []
        """HTTP statuses of the next answers."""
        self.asked: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = self.dropped = 0
        self.name = name
        engine, _ = load_local_engine(base, adapters, device="cpu", calibrated=False)
        self._local: Any = engine._backend
        self._at_work = threading.Lock()
        self._engine = BatchingEngine(IdsBackend(self._local, self._at_work))
        self._tokenizer = self._local._tokenizer
        self._adapters = adapters
        routes = [
            Route("/v1/models", self._models),
            Route("/v1/completions", self._completions, methods=["POST"]),
        ]
        config = uvicorn.Config(
            Starlette(routes=routes), lifespan="off", log_config=None, http="h11", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],))
        self._thread.start()

    def close(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()
        self._socket.close()
        self._engine.close()

    async def _models(self, request: Request) -> Response:
        self.keys.add(request.headers.get("Authorization"))
        base = {"id": self.name, "root": "/models/tiny", "parent": None, "max_model_len": 2048}
        cards = [base] + [
            {"id": name, "root": str(self._adapters / name), "parent": self.name}
            for name in self._local.info.adapters
        ]
        return JSONResponse({"object": "list", "data": cards})

    async def _completions(self, request: Request) -> Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.add(request.headers.get("Authorization"))
        if self.failing:
            status = self.failing.pop(0)
            return JSONResponse({"error": {"message": f"failing on purpose {status}"}}, status)
        if body["model"] not in (self.name, *self._local.info.adapters):
            return JSONResponse({"error": {"message": f"no model {body['model']}"}}, 404)
        if "logprobs" in body:
            return JSONResponse(await asyncio.to_thread(self._told, body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if body.get("stream"):
                return StreamingResponse(self._stream(body), media_type="text/event-stream")
            result = await self._engine.asubmit(self._request(body))
            return JSONResponse(_answer(result.text, _usage(result), result.finish))
        finally:
            self.at_once -= 1

    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        pieces: asyncio.Queue[str | None] = asyncio.Queue()

        def show(piece: str) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        task = asyncio.ensure_future(self._engine.asubmit(self._request(body), show))
        task.add_done_callback(lambda _: pieces.put_nowait(None))
        try:
            while (piece := await pieces.get()) is not None:
                yield _event(_answer(piece))
            result = await task
            yield _event(_answer("", None, result.finish))
            yield _event({"choices": [], "usage": _usage(result)})
            yield "data: [DONE]\n\n"
        finally:
            self.dropped += not task.done()
            task.cancel()

    def _request(self, body: dict[str, Any]) -> GenerateRequest:
        constraint = body.get("structured_outputs") or {}
        return GenerateRequest(
            (Message("user", json.dumps(body["prompt"])),),
            adapter=None if body["model"] == self.name else body["model"],
            max_tokens=body["max_tokens"],
            temperature=body["temperature"],
            top_p=body["top_p"],
            seed=body["seed"],
            stop=tuple(body["stop"]),
            format="aspects" if "regex" in constraint else "text",
        )

    def _told(self, body: dict[str, Any]) -> dict[str, Any]:
        """One token, and log-probabilities of chosen or of the likeliest tokens."""
        import torch

        adapter = None if body["model"] == self.name else body["model"]
        with self._at_work, self._local._adapter(adapter), torch.inference_mode():
            ids = torch.tensor([body["prompt"]])
            logits = self._local._model(input_ids=ids, use_cache=False).logits[0, -1].float()
        constraint = body.get("structured_outputs") or {}
        if constraint and "structured outputs" in self.features:
            logits = logits + self._mask(constraint, len(logits))
        values = torch.log_softmax(logits, -1).tolist()
        order = sorted(range(len(values)), key=values.__getitem__, reverse=True)
        chosen = body.get("logprob_token_ids") if "chosen tokens" in self.features else None
        tokens = {order[0], *(chosen or order[: body["logprobs"]])}
        answer = _answer(self._tokenizer.decode([order[0]]), {"prompt_tokens": len(ids[0])})
        if "log-probabilities" in self.features:
            top = {f"token_id:{token}": max(values[token], NEVER) for token in tokens}
            answer["choices"][0]["logprobs"] = {
                "tokens": [f"token_id:{order[0]}"],
                "top_logprobs": [top],
            }
        return answer

    def _mask(self, constraint: dict[str, Any], size: int) -> Any:
        """Allows the first tokens of what satisfies the constraint."""
        import torch

        pattern = constraint.get("regex") or "|".join(map(re.escape, constraint["choice"]))
        wholes = constraint.get("choice") or re.findall(r"[\w.\\]+", pattern)
        wholes = [whole.replace("\\", "") for whole in wholes]
        mask = torch.full((size,), -torch.inf)
        for token, text in self._local._grammars.token_text.items():
            if text and any(whole.startswith(text) for whole in wholes):
                mask[token] = 0.0
        if re.fullmatch(pattern, ""):
            mask[self._tokenizer.eos_token_id] = 0.0
        return mask


def _answer(text: str, usage: Any = None, finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "text": text, "finish_reason": finish, "logprobs": None}
    return {"object": "text_completion", "choices": [choice], "usage": usage}


def _usage(result: GenerateResult) -> dict[str, int]:
    return {
        "prompt_tokens": result.prompt_tokens,
        "completion_tokens": result.completion_tokens,
    }


def _event(part: dict[str, Any]) -> str:
    return f"data: {json.dumps(part)}\n\n"
