"""A teacher behind a real socket, and a small recipe whose reviews it labels.

The server has the shape of OpenAI's `/v1/chat/completions` and keeps count of what it is asked,
what it answers and what it charges.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune.settings import Recipe, parse_recipe
from finetune.splits import make_splits
from finetune.teacher import Teacher, open_teacher
from r4r_graph import Review, chat_models
from r4r_graph.engine.base import GenerateRequest, Message
from r4r_graph.engine.batching import BatchingEngine

SUMMARY = "positive: warm voice\nnegative: none\nvalues: honesty"
SECRET = "sk-not-to-be-written-anywhere"
PROMPT = (Message("system", "You judge."), Message("user", "Context."), Message("user", "Task."))

REVIEWS = [
    Review(f"u{u}", f"i{i}", 1.0 + (u + i) % 5, 1000.0 * (u + 6 * i), f"T{i}", f"Words {u} {i}.")
    for u in range(6)
    for i in range(8)
]

Make = Callable[..., Recipe]
Reply = tuple[int, str]
"""HTTP status and the answer's text (or the reason of a failure)."""


class ChatServer:
    """A small server of the shape of OpenAI's `/v1/chat/completions`.

    `reply` gives what to answer to a question; `asked` counts questions, `answered` those that were
    answered with a text, `spent` the tokens charged for them.
    """

    def __init__(self, reply: Callable[[dict[str, Any]], Reply] | None = None) -> None:
        self.reply = reply or (lambda _: (200, SUMMARY))
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.spent = 0
        self.at_once = self.most_at_once = 0
        self.headers: dict[str, str] = {}
        self.usage = True
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                outer._serve(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        question = json.dumps(body["messages"])
        with self._lock:
            self.asked[question] += 1
            self.bodies.append(body)
            self.keys.add(handler.headers["Authorization"])
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        status, text = self.reply(body)
        prompt, completion = len(question) // 4, max(1, len(text) // 4)
        payload: dict[str, Any] = {"error": {"message": text, "code": text.split()[0]}}
        if status == 200:
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": text},
                "finish_reason": "stop",
            }
            payload = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
            payload["choices"] = [choice]
            if self.usage:
                payload["usage"] = {
                    "prompt_tokens": prompt,
                    "completion_tokens": completion,
                    "total_tokens": prompt + completion,
                }
        with self._lock:
            self.at_once -= 1
            if status == 200:
                self.answered[question] += 1
                self.spent += prompt + completion
        data = json.dumps(payload).encode()
        try:
            handler.send_response(status)
            for name, value in self.headers.items():
                handler.send_header(name, value)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(data)))
            handler.end_headers()
            handler.wfile.write(data)
        except OSError:  # who asked is gone
            handler.close_connection = True


def set_environment(patch: pytest.MonkeyPatch) -> None:
    """A key, no proxy, and short pauses."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "OPENAI_API_BASE", "OPENAI_BASE_URL"):
        patch.delenv(name, raising=False)
        patch.delenv(name.lower(), raising=False)
    patch.setenv("OPENAI_API_KEY", SECRET)
    patch.setattr(chat_models, "_FIRST_PAUSE", 0.01)


def made_recipe(folder: Path, teacher: dict[str, Any], rows: int = 6) -> Recipe:
    file = folder / "reviews.jsonl"
    file.write_text("".join(json.dumps(r.to_dict()) + "\n" for r in REVIEWS))
    recipe = parse_recipe(
        {
            "reviews": str(file),
            "work": str(folder / "work"),
            "history": 3,
            "splits": {"reward_rows": 2, "instruction_rows": rows},
            "teacher": teacher,
        }
    )
    make_splits(recipe)
    return recipe


def recipe_maker(folder: Path, server: ChatServer) -> Make:
    """Makes a recipe whose teacher is the server, or what `model` says."""

    def make(**teacher: Any) -> Recipe:
        if "model" not in teacher:
            teacher = {"model": "small-model", "base_url": server.url} | teacher
        return made_recipe(folder, teacher)

    return make


def make_meter(fake: Callable[..., BatchingEngine]) -> BatchingEngine:
    """An engine that only counts tokens: it fails when asked."""

    def refuse(_: GenerateRequest) -> str:
        raise AssertionError("the engine was asked")

    return fake(write=refuse)


def teacher_of(server: ChatServer, file: Path, **settings: Any) -> Teacher:
    tree = {"model": "small-model", "base_url": server.url, **settings}
    recipe = parse_recipe({"reviews": "r", "teacher": tree})
    return open_teacher(recipe, file)


def ask(teacher: Teacher, *questions: str, **settings: Any) -> list[Any]:
    """Answers and errors, all asked at once."""

    async def work() -> list[Any]:
        prompts = [(*PROMPT[:2], Message("user", question)) for question in questions]
        asked = (teacher.ask(prompt, **settings) for prompt in prompts)
        return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(work())


def once_each(counts: Counter[str]) -> bool:
    return set(counts.values()) == {1}
