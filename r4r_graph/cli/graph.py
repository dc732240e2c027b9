"""`r4r graph`: the rating graph drawn, or a graph of your own that contains it."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r4r_graph.errors import R4RError, SettingError

if TYPE_CHECKING:
    from r4r_graph.debug.drawing import AnyGraph


def graph(
    form: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="mermaid, json, or (with an extra) ascii, svg, png; default: as FILE ends, else "
            "mermaid.",
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="A file for it, instead of stdout.")] = None,
    subgraphs: Annotated[
        bool, typer.Option(help="Draw what is inside nodes that are graphs.")
    ] = False,
    of: Annotated[
        str | None,
        typer.Option(
            "--graph",
            help="Another compiled graph, as package.module:attribute (or a function that makes "
            "it); default: the rating graph.",
        ),
    ] = None,
) -> None:
    """Draw the rating graph, or one that contains it."""
    from r4r_graph.debug import FORMATS, draw

    if form is None:
        ending = out.suffix.removeprefix(".") if out is not None else ""
        form = ending if ending in FORMATS else "mermaid"
    if form == "png" and out is None and sys.stdout.isatty():
        raise SettingError("a PNG is no text for a terminal: give --out FILE")
    picture = draw(_rating_graph() if of is None else import_graph(of), form, subgraphs=subgraphs)
    if out is None:
        typer.echo(picture, nl=isinstance(picture, str))
        return
    try:
        out.write_bytes(picture if isinstance(picture, bytes) else f"{picture}\n".encode())
    except OSError as error:
        raise SettingError(f"cannot write {out}: {error.strerror}") from None


def import_graph(path: str) -> AnyGraph:
    """The compiled graph at `package.module:attribute`; a function without arguments is called.

    The module is looked for in the working directory first, as by `python -m`.

    Raises:
        SettingError: no such module or attribute, or it is no compiled graph.
    """
    from langgraph.graph import StateGraph
    from langgraph.pregel import Pregel

    module, _, attribute = path.partition(":")
    if not module or not attribute:
        raise SettingError(f"bad --graph {path!r}: write package.module:attribute")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = reduce(getattr, attribute.split("."), importlib.import_module(module))
        if inspect.isroutine(found):
            found = found()
        if inspect.isawaitable(found):
            found = asyncio.run(_awaited(found))
    except R4RError:
        raise
    except Exception as error:  # whatever somebody else's module does when it is imported
        raise SettingError(f"--graph {path}: {type(error).__name__}: {error}") from error
    if isinstance(found, StateGraph):
        raise SettingError(f"--graph {path}: is not compiled; name what .compile() returns")
    if not isinstance(found, Pregel):
        raise SettingError(f"--graph {path}: {type(found).__name__} is no LangGraph")
    return found


async def _awaited(value: Any) -> Any:
    return await value


def _rating_graph() -> AnyGraph:
    from r4r_graph.engine.fake import fake_engine
    from r4r_graph.experts import Experts
    from r4r_graph.graph import build_graph

    return build_graph(Experts(fake_engine()))
