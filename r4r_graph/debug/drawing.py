"""Draws a compiled graph, offline. The edges are LangGraph's own: what is drawn can run."""

from __future__ import annotations

import json
from typing import Any, Literal, get_args

from langgraph.graph.state import CompiledStateGraph

from r4r_graph.errors import MissingExtraError, SettingError

Format = Literal["mermaid", "ascii", "json"]
FORMATS: tuple[str, ...] = get_args(Format)


def draw(graph: CompiledStateGraph[Any, Any, Any, Any], form: str = "mermaid") -> str:
    """A picture of the graph as text.

    Args:
        graph: any compiled LangGraph.
        form: `mermaid`, `ascii` (needs the `drawing` extra), or `json`: `nodes` with `id` and
            `metadata`, `edges` with `source`, `target` and whether they are `conditional`.

    Raises:
        SettingError: no such format.
        MissingExtraError: `ascii` without the extra.
    """
    drawable = graph.get_graph()
    if form == "mermaid":
        return drawable.draw_mermaid()
    if form == "json":
        nodes = [{"id": n.id, "metadata": n.metadata or {}} for n in drawable.nodes.values()]
        edges = [
            {"source": e.source, "target": e.target, "conditional": e.conditional}
            for e in sorted(drawable.edges, key=lambda e: (e.source, e.target))
        ]
        return json.dumps({"nodes": nodes, "edges": edges}, indent=2)
    if form == "ascii":
        try:
            picture = str(drawable.draw_ascii())
        except ImportError:
            raise MissingExtraError("drawing a graph in ASCII", "drawing") from None
        # The picture has no arrow heads and lays one line over another where edges run both ways.
        arrows = sorted(
            f"{e.source} {'..>' if e.conditional else '-->'} {e.target}" for e in drawable.edges
        )
        return "\n".join([picture, "", *arrows])
    raise SettingError(f"unknown format {form!r}; there are: {', '.join(FORMATS)}")
