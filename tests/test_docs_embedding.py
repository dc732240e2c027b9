"""The guides on tools, MCP, subgraphs and testing are true: their Python runs, in order."""

from __future__ import annotations

import json
import re
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
from langgraph.store.memory import InMemoryStore

import r4r_graph
from r4r_graph import testing
from r4r_graph.cli import app
from r4r_graph.engine.batching import BatchingEngine
from r4r_graph.recommender import Recommender

pytest_plugins = ["pytester"]

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str, language: str = "python") -> list[str]:
    text = (DOCS / page).read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [body for tag, body in fenced if tag == language]


@pytest.fixture
def run_page(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Runs a page's Python on the sample, with fake engines in the place of the model."""
    engines: list[BatchingEngine] = []
    sample, real_load = testing.sample_reviews(), Recommender.load

    def fake(**settings: Any) -> BatchingEngine:
        engines.append(testing.scripted_engine(**settings))
        return engines[-1]

    def load(reviews: str, items: str) -> Recommender:
        assert (reviews, items) == ("reviews.parquet", "items.parquet")
        return real_load(sample, engine=fake(), store=InMemoryStore())

    monkeypatch.setattr(Recommender, "load", load)
    monkeypatch.setattr(r4r_graph, "load_reviews", lambda _: sample, raising=False)
    monkeypatch.setattr(r4r_graph, "fake_engine", fake, raising=False)

    def run(page: str) -> dict[str, Any]:
        module = types.ModuleType(f"page_{Path(page).stem}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        for block in blocks(page):
            exec(compile(block, page, "exec"), module.__dict__)
        return module.__dict__

    yield run
    for engine in engines:
        engine.close()


def test_the_agents_page_runs(run_page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("agents.md")
    told = capsys.readouterr().out
    shown = blocks("agents.md", "")[0].splitlines()
    form = [re.sub(r"[\d.]+", "0", line) for line in told.splitlines()]
    for line in (*shown[:1], *shown[2:5]):  # the form is the page's; figures are the engine's
        assert re.sub(r"[\d.]+", "0", line) in form
    assert names["found"].item_id == "glass-harbour"
    assert names["profile"].ratings.count == 7
    assert "user_id" not in names["tools"][0].args


@pytest.mark.skipif(find_spec("mcp") is None, reason="the package mcp is not installed")
def test_the_mcp_page_runs(run_page: Any) -> None:
    names = run_page("mcp.md")
    assert 1 <= names["answer"].structured_content["rating"] <= 5
    assert not names["answer"].is_error


def test_the_mcp_page_names_only_options_that_exist() -> None:
    command = typer.main.get_command(app).commands["mcp"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    text = (DOCS / "mcp.md").read_text(encoding="utf-8")
    assert set(re.findall(r"--[a-z-]+", text)) <= options
    [client] = blocks("mcp.md", "json")
    arguments = json.loads(client)["mcpServers"]["r4r"]["args"]
    assert {text for text in arguments if text.startswith("--")} <= options


def test_the_subgraphs_page_runs(run_page: Any, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_page("subgraphs.md")
    told = capsys.readouterr().out
    assert "rate ['recall']" in told
    assert names["asked"].value["answers"] == ["accept", "edit", "refuse"]
    assert 1 <= names["state"]["stars"] <= 5


def test_the_testing_page_runs(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("\n\n".join(blocks("testing.md")))
    pytester.runpytest_subprocess("-W", "error").assert_outcomes(passed=3)
