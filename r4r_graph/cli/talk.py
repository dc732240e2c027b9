"""A run on the terminal, to its end or to a question: asked right there, or left waiting."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from r4r_graph.cli.options import err, out
from r4r_graph.errors import EngineError, SettingError, UnknownRunError

if TYPE_CHECKING:
    from langgraph.checkpoint.sqlite import SqliteSaver

    from r4r_graph.events import Event
    from r4r_graph.graph import RatingGraph
    from r4r_graph.ratings import RatingScale
    from r4r_graph.recommender import Recommender

WAITING = 3
"""Exit code of a run that waits for a person."""


def talk(
    recommender: Recommender,
    events: Iterable[Event],
    *,
    as_json: bool,
    thread_id: str | None,
    report: Path | None = None,
) -> None:
    """Show a run to its end; where it asks, ask the person at the terminal, if there is one.

    Args:
        recommender: what runs it.
        events: of `Recommender.stream`.
        as_json: print one JSON object instead, and ask nobody.
        thread_id: under which it is kept; None: not at all.
        report: a file for its report, wherever it ends.

    Raises:
        typer.Exit: it waits; exit code 3.
        SettingError: the report cannot be written.
    """
    if report is None or thread_id is None:
        _talk(recommender, events, as_json, thread_id)
        return
    from r4r_graph.cli.report import reported

    with reported(recommender.graph, thread_id, report):
        _talk(recommender, events, as_json, thread_id)


def _talk(
    recommender: Recommender, events: Iterable[Event], as_json: bool, thread_id: str | None
) -> None:
    from r4r_graph.cli import display
    from r4r_graph.schema import Recommendation

    kept = {} if thread_id is None else {"thread_id": thread_id}
    while True:
        with _told_how_to_go_on(thread_id):
            end = display.last(events) if as_json else display.show_run(events, out, err)
        if isinstance(end, Recommendation):
            break
        answer = answered(end.thread_id, end.asked, recommender.experts.scale, as_json=as_json)
        events = recommender.stream_resumed(end.thread_id, answer)
    if as_json:
        typer.echo(display.one_line_json({**kept, **end.to_dict()}))
    elif thread_id is not None:
        out.print(display.safe(f"kept as {thread_id}: r4r show {thread_id}"), style="dim")


@contextmanager
def _told_how_to_go_on(thread_id: str | None) -> Iterator[None]:
    try:
        yield
    except (EngineError, KeyboardInterrupt):
        if thread_id is not None:
            err.print(f"what is done is kept: r4r resume {thread_id}", markup=False)
        raise


def answered(
    thread_id: str, asked: Mapping[str, Any], scale: RatingScale, *, as_json: bool
) -> dict[str, Any]:
    """What the person at the terminal answers to a question that is shown already.

    Raises:
        typer.Exit: nobody is there, or they leave; how to answer later has been said. Exit code 3.
    """
    from r4r_graph.cli import display

    if not as_json and sys.stdin.isatty():
        answer = _asked(asked, scale)
        if answer is not None:
            return answer
    if as_json:
        waiting = {"waiting": True, "thread_id": thread_id, **asked}
        typer.echo(display.one_line_json(waiting))
    else:
        display.show_waiting(thread_id, asked, out)
    raise typer.Exit(WAITING)


def _asked(asked: Mapping[str, Any], scale: RatingScale) -> dict[str, Any] | None:
    """A person's answer, asked for until it is one; None where they leave (end of input)."""
    from r4r_graph.cli import display
    from r4r_graph.graph import human

    actions = asked["answers"]
    try:
        while True:
            word = err.input(f"\n{', '.join(actions)}? ", markup=False).strip().lower()
            chosen = [action for action in actions if word and action.startswith(word)]
            answer: dict[str, Any] = {"action": chosen[0] if chosen else word}
            if answer["action"] == "edit":
                answer["rationales"] = [
                    err.input("the rationale instead: ", markup=False) for _ in asked["rationales"]
                ]
            elif answer["action"] == "rate":
                answer["rating"] = _number(err.input("the rating: ", markup=False))
            wrong = human.fault(answer, asked, scale)
            if wrong is None:
                return answer
            err.print(display.safe(wrong, "red"))
    except EOFError:
        return None


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


# Kept runs ---------------------------------------------------------------------------------------


@contextmanager
def kept_runs() -> Iterator[tuple[SqliteSaver, RatingGraph]]:
    """The runs of the command line, and a graph without a model: enough to find, show, fork and
    delete them."""
    from r4r_graph.engine.fake import fake_engine
    from r4r_graph.experts import Experts
    from r4r_graph.graph import build_graph
    from r4r_graph.runs import open_runs

    with open_runs() as saver, fake_engine() as engine:
        yield saver, build_graph(Experts(engine), checkpointer=saver)


def new_thread(saver: SqliteSaver, wanted: str | None = None) -> str:
    """A thread id that is free: the one wanted, or a short random one.

    Raises:
        SettingError: the one wanted is taken, or blank.
    """
    import secrets

    from r4r_graph.runs import thread

    if wanted is not None:
        if not wanted.strip():
            raise SettingError("bad --thread: a blank name")
        if saver.get_tuple(thread(wanted)) is not None:
            raise SettingError(
                f"a run is kept as {wanted} already: choose another --thread, or delete it with "
                f"`r4r runs delete {wanted}`"
            )
        return wanted
    while saver.get_tuple(thread(made := secrets.token_hex(4))) is not None:
        pass
    return made


def forget_unread(recommender: Recommender, thread_id: str | None) -> None:
    """Forget a run whose input was refused: there is nothing to go on with."""
    from r4r_graph.runs import delete_run, find, unread

    if thread_id is not None:
        with suppress(UnknownRunError):
            if unread(find(recommender.graph, thread_id)):
                delete_run(recommender.graph, thread_id)
