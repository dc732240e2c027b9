"""The page about engines runs, on the sample, with stand-ins for what is not here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from r4r_graph import Recommender
from r4r_graph.cli import app
from r4r_graph.engine import fake_engine
from tests.test_chat_engine import Hosted, expert_answers

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "engines.md").read_text(encoding="utf-8")


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    load, sample = Recommender.load, ROOT / "r4r_graph" / "_demo" / "reviews.jsonl"

    def load_sample(reviews: str, **settings: Any) -> Recommender:
        assert reviews == "reviews.parquet"
        if settings.get("engine") == "http://127.0.0.1:8000":
            assert settings.pop("adapters") == "my-adapters"
        return load(sample, **(settings | {"engine": fake_engine()}))

    class ChatOpenAI(Hosted):
        model: str = ""
        answer: Any = expert_answers

    monkeypatch.setattr(Recommender, "load", load_sample)
    monkeypatch.setattr("langchain_openai.ChatOpenAI", ChatOpenAI)
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["result"].model["others"]


def test_it_names_only_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    [shown] = re.findall(r"^```\n(r4r .*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    for line in shown.splitlines():
        name = line.split()[1]
        options = {option for parameter in commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", line)) <= options
