"""What the documents say is true of the code."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

from r4r_graph.cli import app
from r4r_graph.debug import draw
from r4r_graph.engine import fake_engine
from r4r_graph.experts import Experts
from r4r_graph.graph import build_graph

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _fenced(page: str) -> list[tuple[str, str]]:
    """Language and body of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)


def _blocks(language: str) -> list[str]:
    return [body for tag, body in _fenced(README) if tag == language]


def test_the_readme_draws_the_graph_that_runs() -> None:
    [picture] = _blocks("mermaid")
    found = re.findall(r"^\s*(\w+)\S* (-\.->|-->) (\w+)", picture, re.MULTILINE)
    shown = {(source, target, arrow == "-.->") for source, arrow, target in found}
    drawn = json.loads(draw(build_graph(Experts(fake_engine())), "json"))
    assert shown == {(e["source"], e["target"], e["conditional"]) for e in drawn["edges"]}


def test_the_readme_python_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On the sample, with the fake engine in the place of the model."""
    import r4r_graph
    from r4r_graph import Recommender

    sample = ROOT / "r4r_graph" / "_demo"
    load, load_reviews = Recommender.load, r4r_graph.load_reviews

    def load_fake(reviews: str, items: str) -> Recommender:
        assert (reviews, items) == ("reviews.parquet", "items.parquet")
        return load(sample / "reviews.jsonl", sample / "items.jsonl", engine=fake_engine())

    monkeypatch.setattr(Recommender, "load", load_fake)
    monkeypatch.setattr(
        r4r_graph, "load_reviews", lambda _: load_reviews(sample / "reviews.jsonl"), raising=False
    )
    names: dict[str, Any] = {}
    for block in _blocks("python"):
        exec(block, names)
    assert 1 <= names["result"].rating <= 5
    assert 1 <= names["state"]["recommendation"]["rating"] <= 5
    assert type(names["event"]).__name__ == "Recommendation"


def test_the_readme_names_only_options_that_exist() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    block = next(b for b in _blocks("") if "r4r rate" in b)
    shown = re.findall(r"^r4r ([\w-]+)(.*?)(?=^r4r|\Z)", block, re.MULTILINE | re.DOTALL)
    assert {name for name, _ in shown} == set(commands) - {"demo"}
    for name, usage in shown:
        command = commands[name]
        inner = getattr(command, "commands", {}).get(usage.split()[0], command)
        options = {
            option
            for parameter in inner.params
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert set(re.findall(r"--[a-z-]+", usage)) <= options


def test_the_two_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_documents_link_to_files_that_exist() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_evaluation_page_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its Python, on a small set, with predictions that the fake engine made."""
    from r4r_graph import Recommender
    from r4r_graph.bulk import rate_pairs
    from tests.tiny_reviews import make_reviews, write_reviews

    rows = sorted(make_reviews(), key=lambda row: row["timestamp"])
    write_reviews(tmp_path / "reviews.parquet", rows)
    write_reviews(tmp_path / "test.parquet", rows[-12:])
    monkeypatch.chdir(tmp_path)
    with Recommender.load("reviews.parquet", engine=fake_engine()) as recommender:
        rate_pairs(recommender, "test.parquet", "ratings")
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [block] = [body for tag, body in _fenced(page) if tag == "python"]
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["report"].facts.rows == 12
    assert (tmp_path / "evaluation" / "report.html").is_file()


def test_the_evaluation_page_names_only_what_exists() -> None:
    from r4r_graph.evaluation.probes import CONDITIONS

    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    command = typer.main.get_command(app).commands["evaluate"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    assert set(re.findall(r"--[a-z][a-z-]+", page)) <= options
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == set(CONDITIONS)
