"""`r4r runs`, `show`, `resume` and `fork`: runs that were kept."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from r4r_graph.cli.options import JsonOption, ReportOption, Sources, ThreadArgument, out
from r4r_graph.cli.talk import answered, kept_runs, new_thread, talk
from r4r_graph.errors import SettingError

runs_app = typer.Typer(help="List the runs that are kept; delete them.", rich_markup_mode=None)

_SAME = "default: as the run began."
ReviewsOption = Annotated[
    str | None,
    typer.Option(metavar="FILE", help=f"Where the run has not read its reviews yet; {_SAME}"),
]
ItemsOption = Annotated[Path | None, typer.Option(help=f"As --reviews; {_SAME}")]
BaseOption = Annotated[str | None, typer.Option(help=f"Base model; {_SAME}")]
AdaptersOption = Annotated[str | None, typer.Option(help=f"Folder of adapters, or none; {_SAME}")]
ScaleOption = Annotated[str | None, typer.Option(help=f"Rating values; {_SAME}")]
DeviceOption = Annotated[str | None, typer.Option(help=f"cpu or cuda; {_SAME}")]
BudgetsOption = Annotated[str | None, typer.Option(help=f"Token budgets; {_SAME}")]


@runs_app.callback(invoke_without_command=True)
def runs(
    context: typer.Context,
    limit: Annotated[int | None, typer.Option(min=1, help="The latest ones only.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the runs that are kept, the latest first."""
    if context.invoked_subcommand is not None:
        return
    from r4r_graph.cli import display, steps
    from r4r_graph.runs import list_runs

    with kept_runs() as (_, graph):
        found = list_runs(graph, limit)
    if as_json:
        typer.echo(display.one_line_json([asdict(run) for run in found]))
    else:
        steps.show_runs(found, out)


@runs_app.command("delete")
def delete(
    threads: Annotated[
        list[str] | None, typer.Argument(metavar="THREAD...", help="Runs to forget.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All of them.")] = False,
) -> None:
    """Forget runs, and every word of a review in them."""
    from r4r_graph.runs import delete_run, find, list_runs

    if bool(threads) == everything:
        raise SettingError("name the runs to delete, or give --all")
    with kept_runs() as (_, graph):
        names = [run.thread_id for run in list_runs(graph)] if everything else threads or []
        for thread_id in names:
            find(graph, thread_id)  # all are there, or none is deleted
        for thread_id in dict.fromkeys(names):
            delete_run(graph, thread_id)
    typer.echo(f"deleted {len(set(names))} {'run' if len(set(names)) == 1 else 'runs'}")


def show(
    thread_id: ThreadArgument,
    prompts: Annotated[
        bool, typer.Option("--prompts", help="Also what each step was asked.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show the steps of a kept run: what each said, its time, its tokens."""
    from r4r_graph.cli import display, steps
    from r4r_graph.runs import find, history

    with kept_runs() as (_, graph):
        states = history(graph, thread_id)
        now = find(graph, thread_id)
    told = steps.run_steps(states, now, thread_id)
    if as_json:
        typer.echo(display.one_line_json(told))
    else:
        steps.show_steps(told, out, prompts=prompts)


def resume(
    thread_id: ThreadArgument,
    answer: Annotated[
        str | None,
        typer.Option(help="accept, edit or refuse a rationale; accept or rate a rating."),
    ] = None,
    rationale: Annotated[
        list[str] | None,
        typer.Option(help="With edit: the text instead; once for each that is asked about."),
    ] = None,
    rating: Annotated[float | None, typer.Option(help="With rate: the rating instead.")] = None,
    reviews: ReviewsOption = None,
    items: ItemsOption = None,
    base: BaseOption = None,
    adapters: AdaptersOption = None,
    scale: ScaleOption = None,
    device: DeviceOption = None,
    budgets: BudgetsOption = None,
    allow_prompt_mismatch: Annotated[bool | None, typer.Option(help=_SAME)] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Go on with a run that waits for an answer, failed, or was stopped."""
    from r4r_graph import runs as kept
    from r4r_graph.cli import display
    from r4r_graph.ratings import RatingScale

    given = _answer(answer, rationale or [], rating)
    with kept_runs() as (saver, graph):
        state = kept.find(graph, thread_id)
        sources = Sources.of(kept.labels_of(state)).but(
            reviews=reviews,
            items=_text(items),
            base=base,
            adapters=adapters,
            scale=scale,
            device=device,
            budgets=budgets,
            allow_prompt_mismatch=allow_prompt_mismatch,
        )
        asked, values = kept.question(state), RatingScale.parse(sources.scale)
        if asked is not None and given is None:
            if not as_json:
                display.show_question(asked, out)
            given = answered(thread_id, asked, values, as_json=as_json)
        kept.continuation(state, thread_id, given, values)  # refused before a model is loaded
        with _loaded(sources, state, thread_id, saver) as recommender:
            events = recommender.stream_resumed(thread_id, given)
            talk(recommender, events, as_json=as_json, thread_id=thread_id, report=report)


def fork(
    thread_id: ThreadArgument,
    at: Annotated[
        str | None,
        typer.Option(help="The step after which it begins: a name or a number of `r4r show`."),
    ] = None,
    changed: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="rationale=TEXT, without=USER/ITEM, or a setting such as readout=median, "
            "influence=same, ask=true. May be given again.",
        ),
    ] = None,
    thread: Annotated[str | None, typer.Option(help="Keep the new run under this name.")] = None,
    base: BaseOption = None,
    adapters: AdaptersOption = None,
    device: DeviceOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """A new run out of a kept one, with something changed; the kept one stays as it is."""
    from r4r_graph import runs as kept
    from r4r_graph.forks import fork as make_fork

    with kept_runs() as (saver, graph):
        state = kept.find(graph, thread_id)
        sources = Sources.of(kept.labels_of(state)).but(base=base, adapters=adapters, device=device)
        step = int(at) if at is not None and at.lstrip("-").isdecimal() else at
        new = new_thread(saver, thread)
        make_fork(graph, thread_id, _changes(changed or [], state.values), at=step, new=new)
        with _loaded(sources, kept.find(graph, new), new, saver) as recommender:
            events = recommender.stream_resumed(new)
            talk(recommender, events, as_json=as_json, thread_id=new, report=report)


def _loaded(sources: Sources, state: Any, thread_id: str, saver: Any) -> Any:
    """The recommender that goes on with a run. Reviews are loaded only where it will read some."""
    from r4r_graph.runs import unread

    if not unread(state):
        sources = replace(sources, reviews=None, items=None)
    elif sources.reviews is None:
        raise SettingError(f"run {thread_id} has not read its reviews yet: give --reviews")
    return sources.load(checkpointer=saver)


def _answer(answer: str | None, rationales: list[str], rating: float | None) -> Any:
    """What a person said with options; None where they said nothing."""
    if answer is None and not rationales and rating is None:
        return None
    said: dict[str, Any] = {"action": answer or ("edit" if rationales else "rate")}
    if rationales:
        said["rationales"] = rationales
    if rating is not None:
        said["rating"] = rating
    return said


def _changes(given: list[str], values: dict[str, Any]) -> Any:
    """The changes of `--set`."""
    changes: dict[str, Any] = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise SettingError(f"bad --set {text!r}: write name=value")
        if name == "rationale":
            changes[name] = value
        elif name == "without":
            changes.setdefault(name, []).append(_pair(value, values))
        else:
            changes.setdefault("knobs", {})[name] = _value(value)
    return changes


def _pair(text: str, values: dict[str, Any]) -> tuple[str, str]:
    """USER/ITEM, whatever slashes there are in either."""
    for side in ("user_reviews", "item_reviews"):
        for entry in values.get(side) or ():
            user_id, item_id = entry["review"]["user_id"], entry["review"]["item_id"]
            if f"{user_id}/{item_id}" == text:
                return user_id, item_id
    user_id, _, item_id = text.partition("/")
    return user_id, item_id


def _value(text: str) -> Any:
    """A number, true or false; else the text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, int | float) else text


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
