"""`r4r evaluate`: how good predictions are, beside what simple arithmetic predicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r4r_graph.cli.options import (
    BaseOption,
    BudgetsOption,
    DeviceOption,
    DtypeOption,
    HistoryOption,
    ItemsOption,
    JsonOption,
    MismatchOption,
    RationalesOption,
    ReviewsOption,
    ScaleOption,
    checked_knobs,
    err,
    load,
    out,
    parse_budgets,
)
from r4r_graph.errors import SettingError

if TYPE_CHECKING:
    from r4r_graph.evaluation.contenders import Tell
    from r4r_graph.evaluation.words.likeness import TextScorer

PACKAGED = "minilm"


def evaluate(
    reviews: ReviewsOption,
    targets: Annotated[
        Path, typer.Option(help="The rows to predict, with their true ratings: a file of reviews.")
    ],
    out_folder: Annotated[
        Path, typer.Option("--out", help="A folder for this evaluation: jobs and reports.")
    ],
    items: ItemsOption = None,
    predictions: Annotated[
        list[str] | None,
        typer.Option(help="Predictions at hand, as [NAME=]PATH: what `bulk` wrote, or any table."),
    ] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            help="Adapters to predict with, as [NAME=]FOLDER[@CONDITION]; in the folder's place "
            "shipped: the package's own, none: the base model. "
            "Give several to compare them with the first."
        ),
    ] = None,
    sample: Annotated[
        int | None, typer.Option(help="Score so many of the targets, drawn by the seed.")
    ] = None,
    seed: Annotated[
        int, typer.Option(help="Decides the sample, what is exchanged, and the intervals.")
    ] = 0,
    train: Annotated[
        Path | None,
        typer.Option(help="What floors are fitted on; default: reviews before every target."),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(
            help="Rate again with something changed: all, or a list of without_rationale, "
            "swapped_rationale, true_review, without_texts, averages_only."
        ),
    ] = None,
    fusion: Annotated[
        list[str] | None,
        typer.Option(help="Score a set fused with averages, too: NAME=FILE, as `fuse` wrote it."),
    ] = None,
    similarity: Annotated[
        str | None,
        typer.Option(help="Rationales against later reviews: minilm, or an embedding model."),
    ] = None,
    bleurt: Annotated[
        Path | None, typer.Option(help="The same by BLEURT: a checkpoint for transformers.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="The same by a chat model, such as openai:NAME.")
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server for the judge.")
    ] = None,
    teacher_aspects: Annotated[
        Path | None, typer.Option(help="A teacher's summaries, to hold the summarizer's against.")
    ] = None,
    top: Annotated[str, typer.Option(help="Lengths of the top of a ranking.")] = "1,3,5,10",
    liked: Annotated[
        float | None, typer.Option(help="An item is liked from this rating on; default 4 of 1-5.")
    ] = None,
    resamples: Annotated[int, typer.Option(help="Of the bootstrap.")] = 2000,
    history: HistoryOption = None,
    rationales: RationalesOption = 1,
    base: BaseOption = "smollm2-135m",
    scale: ScaleOption = "1-5",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    budgets: BudgetsOption = None,
    concurrency: Annotated[int, typer.Option(help="Rows in flight.")] = 64,
    allow_prompt_mismatch: MismatchOption = False,
    as_json: JsonOption = False,
) -> None:
    """Errors of predictions beside simple floors, with intervals; call it again to continue."""
    from r4r_graph.cli import display
    from r4r_graph.evaluation import contenders as experts
    from r4r_graph.evaluation.evaluate import Contender, Settings, check_names
    from r4r_graph.evaluation.evaluate import evaluate as score
    from r4r_graph.evaluation.floors import check_apart
    from r4r_graph.evaluation.fusion import fuse, fusions_by_name
    from r4r_graph.evaluation.predictions import read_predictions
    from r4r_graph.evaluation.probes import CONDITIONS
    from r4r_graph.evaluation.rendering.outputs import print_report, write_report
    from r4r_graph.evaluation.targets import (
        draw,
        earlier_reviews,
        load_targets,
        record_sample,
    )
    from r4r_graph.evaluation.words.labels import read_aspects
    from r4r_graph.ratings import RatingScale
    from r4r_graph.reviews import load_items, load_reviews, open_reviews

    if not predictions and not adapters:
        raise SettingError("nothing to evaluate: give --predictions or --adapters")
    knobs = checked_knobs(history=history, rationales=rationales, seed=seed)
    values = RatingScale.parse(scale)
    settings = Settings(values, _whole_numbers(top, "--top"), liked, seed, resamples)
    sets = [experts.AdapterSet.parse(text) for text in adapters or []]
    asked = [name.strip() for name in (probe or "").split(",") if name.strip()]
    probes = list(CONDITIONS) if asked == ["all"] else asked
    token_budgets = parse_budgets(budgets)

    every = load_targets(targets, values)
    rows = draw(every, sample, seed)
    source = open_reviews(reviews, scale=values, items=load_items(items) if items else None)
    # All that can be refused is refused before a model is loaded.
    fit_on = list(load_reviews(train, scale=values)) if train else earlier_reviews(source, rows)
    check_apart(rows, fit_on)
    at_hand = [
        read_predictions(path, rows, values, name=name)
        for name, path in map(_named, predictions or [])
    ]
    names = [*(each.name for each in at_hand), *(each.name for each in sets)]
    check_names(names)
    fusions = fusions_by_name(fusion or [], names)
    checks = experts.WordChecks(
        scorers=_scorers(similarity, bleurt, judge, judge_url, out_folder, device),
        labels=None
        if teacher_aspects is None
        else read_aspects(teacher_aspects, confident_only=True),
        resamples=resamples,
    )
    record_sample(rows, out_folder / "sample.parquet")

    def open_recommender(folder: str) -> Any:
        return load(
            source,
            None,
            base,
            folder,
            scale=values,
            device=device,
            dtype=dtype,
            allow_prompt_mismatch=allow_prompt_mismatch,
            budgets=token_budgets,
        )

    found = [
        Contender(
            each,
            words=experts.words_of(
                each, rows, source, values, checks.scorers, seed=seed, resamples=resamples
            ),
        )
        for each in at_hand
    ]
    with _bars() as tell:
        found += [
            experts.run_adapters(
                each,
                rows,
                open_recommender,
                out_folder / "sets",
                probes=probes,
                checks=checks,
                concurrency=concurrency,
                tell=tell,
                **knobs,
            )
            for each in sets
        ]
    found += [
        Contender(fuse(fusions[each.predictions.name], each.predictions, rows, source, values))
        for each in found
        if each.predictions.name in fusions
    ]
    with err.status("counting", spinner="line"):
        report = score(
            rows,
            source,
            found,
            settings=settings,
            train=fit_on,
            drawn_from=len(every),
            sample_seed=None if sample is None else seed,
        )
    files = write_report(report, out_folder)
    if as_json:
        typer.echo(display.one_line_json(report.to_dict()))
    else:
        print_report(report, out, whole=False)
        for file in files.values():
            err.print(f"wrote {file}", markup=False, soft_wrap=True)


@contextmanager
def _bars() -> Iterator[Tell]:
    """A progress bar for each thing that is done, one after the other."""
    from contextlib import ExitStack

    from r4r_graph.cli import display
    from r4r_graph.jobs import JobProgress, OnProgress

    current: list[tuple[str, OnProgress]] = []
    with ExitStack() as stack:

        def tell(what: str, now: JobProgress) -> None:
            if not current or current[0][0] != what:
                stack.close()
                current[:] = [(what, stack.enter_context(display.progress(what, err)))]
            current[0][1](now)

        yield tell


def _named(text: str) -> tuple[str, str]:
    """`NAME=PATH`, or a path that gives the name."""
    name, equals, path = text.partition("=")
    if equals and not Path(text).exists():
        return name, path
    return Path(text).resolve().name.partition(".")[0], text


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise SettingError(f"bad {option} {text!r}: whole numbers, as 1,3,5") from None


def _scorers(
    similarity: str | None,
    bleurt: Path | None,
    judge: str | None,
    judge_url: str | None,
    folder: Path,
    device: str | None,
) -> tuple[TextScorer, ...]:
    """What rationales are held against later reviews with."""
    from r4r_graph.evaluation.words.judging import chat_judge
    from r4r_graph.evaluation.words.likeness import bleurt as bleurt_scorer
    from r4r_graph.evaluation.words.likeness import embedding_similarity

    found: list[TextScorer] = []
    if similarity is not None:
        model = None if similarity == PACKAGED else similarity
        found.append(embedding_similarity(model, device=device))
    if bleurt is not None:
        found.append(bleurt_scorer(bleurt, device=device))
    if judge is not None:
        found.append(chat_judge(judge, base_url=judge_url, folder=folder / "judge"))
    elif judge_url is not None:
        raise SettingError("--judge-url without --judge: name the model")
    return tuple(found)
