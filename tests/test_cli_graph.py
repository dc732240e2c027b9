"""`r4r graph`: formats, files, and graphs of one's own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from r4r_graph.cli import app
from r4r_graph.engine.fake import fake_engine
from r4r_graph.experts import Experts
from r4r_graph.graph import build_graph
from tests.commands import R4r

OWN = """
from typing import TypedDict

from langgraph.graph import END, START, StateGraph

from r4r_graph import Experts, build_graph, fake_engine

class Trip(TypedDict):
    user_id: str

builder = StateGraph(Trip)
builder.add_node("rating", build_graph(Experts(fake_engine())))
builder.add_edge(START, "rating")
builder.add_edge("rating", END)
graph = builder.compile()

class Shelf:
    graph = graph

def make():
    return graph

async def amake():
    return graph

def broken():
    raise OSError("no disk")
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the working directory, with a graph that contains ours."""
    (tmp_path / "own_trips.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.delitem(sys.modules, "own_trips", raising=False)
    return "own_trips"


def edges(drawn: str) -> set[tuple[str, str]]:
    return {(edge["source"], edge["target"]) for edge in json.loads(drawn)["edges"]}


def test_it_draws_the_rating_graph(r4r: R4r) -> None:
    graph = build_graph(Experts(fake_engine())).get_graph()
    done = r4r("graph", "--format", "json")
    assert edges(done.out) == {(edge.source, edge.target) for edge in graph.edges}
    assert (done.code, done.err) == (0, "")
    mermaid = r4r("graph").out
    assert mermaid == r4r("graph", "--format", "mermaid").out
    assert mermaid.startswith("graph TD\n")
    picture = r4r("graph", "--format", "ascii").out
    assert all(f"| {name} |" in picture for name in ("recall", "summarizer", "predictor"))


def test_pictures_go_to_stdout(r4r: R4r) -> None:
    assert r4r("graph", "--format", "svg").out.startswith("<svg ")
    done = CliRunner().invoke(app, ["graph", "--format", "png"])
    assert done.exit_code == 0
    assert done.stdout_bytes.startswith(b"\x89PNG")
    assert done.stdout_bytes.endswith(b"IEND\xaeB`\x82")


def test_a_png_is_not_thrown_at_a_terminal(r4r: R4r, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    done = r4r("graph", "--format", "png")
    assert (done.code, done.complaint) == (2, "a PNG is no text for a terminal: give --out FILE")


@pytest.mark.parametrize(
    ("name", "begins"),
    [
        ("graph.svg", b"<svg "),
        ("graph.png", b"\x89PNG"),
        ("graph.json", b"{"),
        ("graph", b"graph TD"),
        ("graph.md", b"graph TD"),
    ],
)
def test_a_files_name_says_its_format(r4r: R4r, tmp_path: Path, name: str, begins: bytes) -> None:
    done = r4r("graph", "--out", tmp_path / name)
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_a_format_outweighs_a_files_name(r4r: R4r, tmp_path: Path) -> None:
    r4r("graph", "--out", tmp_path / "graph.txt", "--format", "svg")
    assert (tmp_path / "graph.txt").read_text().startswith("<svg ")


@pytest.mark.parametrize("attribute", ["graph", "Shelf.graph", "make", "amake"])
def test_a_graph_of_ones_own(r4r: R4r, own: str, attribute: str) -> None:
    path = f"{own}:{attribute}"
    closed = edges(r4r("graph", "--graph", path, "--format", "json").out)
    assert closed == {("__start__", "rating"), ("rating", "__end__")}
    opened = edges(r4r("graph", "--graph", path, "--subgraphs", "--format", "json").out)
    graph = sys.modules[own].graph.get_graph(xray=True)
    assert opened == {(edge.source, edge.target) for edge in graph.edges}
    assert len(opened) > 5


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("OWN", "bad --graph '{}': write package.module:attribute"),
        (":graph", "bad --graph '{}': write package.module:attribute"),
        ("nowhere_to_be_found:graph", "--graph {}: ModuleNotFoundError: No module named"),
        ("OWN:grape", "--graph {}: AttributeError: module 'own_trips' has no attribute 'grape'"),
        ("OWN:builder", "--graph {}: is not compiled; name what .compile() returns"),
        ("OWN:Trip", "--graph {}: _TypedDictMeta is no LangGraph"),
        ("OWN:broken", "--graph {}: OSError: no disk"),
    ],
)
def test_what_is_no_graph_is_named(r4r: R4r, own: str, path: str, reason: str) -> None:
    path = path.replace("OWN", own)
    done = r4r("graph", "--graph", path)
    assert (done.code, done.out) == (2, "")
    assert " ".join(done.complaint.split()).startswith(reason.format(path))


def test_an_unknown_format_is_named(r4r: R4r) -> None:
    done = r4r("graph", "--format", "pdf")
    assert (done.code, done.out) == (2, "")
    assert done.complaint.startswith("unknown format 'pdf'; there are: mermaid, ascii, json")


def test_a_file_that_cannot_be_written_is_named(r4r: R4r, tmp_path: Path) -> None:
    target = tmp_path / "absent" / "graph.svg"
    done = r4r("graph", "--out", target)
    assert (done.code, done.complaint) == (
        2,
        f"cannot write {target}: No such file or directory",
    )
