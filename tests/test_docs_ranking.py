"""What the guide to ranking says is true of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from r4r_graph import CandidateProgress, Ranking, Recommender
from r4r_graph.cli import app
from r4r_graph.engine import fake_engine
from r4r_graph.graph.rank import MAX_CONCURRENCY

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "ranking.md").read_text(encoding="utf-8")


def test_its_python_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the sample, with the fake engine in the place of the model."""
    sample, load = ROOT / "r4r_graph" / "_demo", Recommender.load
    monkeypatch.setattr(
        Recommender,
        "load",
        lambda reviews, items: load(
            sample / "reviews.jsonl", sample / "items.jsonl", engine=fake_engine()
        ),
    )
    first, *others = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(others) == 3
    names: dict[str, Any] = {"CandidateProgress": CandidateProgress}
    exec(first, names)
    assert 1 <= len(names["ranking"]) <= 5
    names["recommender"] = Recommender.load("", "")  # that of the page is closed
    with names["recommender"]:
        for block in others:
            exec(block, names)
    assert isinstance(names["event"], Ranking)
    assert names["ranking"].rated == len(names["candidates"])


def test_it_names_only_what_exists() -> None:
    command = typer.main.get_command(app).commands["rank"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    lines = [line for line in PAGE.splitlines() if line.startswith("r4r rank")]
    assert len(lines) == 2
    assert set(re.findall(r"--[a-z][a-z-]+", " ".join(lines))) <= options
    assert f", {MAX_CONCURRENCY} if you do not say" in PAGE
