"""`r4r bulk` and `r4r summarize`: whole datasets, stopped and gone on with at any moment."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from r4r_graph.cli.configured import configured, further_settings
from r4r_graph.cli.options import (
    AdaptersOption,
    BaseOption,
    BudgetsOption,
    DeviceOption,
    DtypeOption,
    EngineOption,
    HistoryOption,
    ItemsOption,
    MismatchOption,
    RationalesOption,
    ReadoutOption,
    ReviewsOption,
    ScaleOption,
    SeedOption,
    TimeoutOption,
    checked_knobs,
    err,
    load,
    parse_budgets,
)
from r4r_graph.configuration import engine_settings
from r4r_graph.errors import SettingError

if TYPE_CHECKING:
    from r4r_graph.recommender import Recommender

STOPPED = 130
"""Exit code, as shells have it, of what Ctrl-C ended."""


def bulk(
    reviews: ReviewsOption,
    pairs: Annotated[Path, typer.Option(help="Pairs: user_id, item_id, and as_of or timestamp.")],
    out: Annotated[Path, typer.Option("--out", help="A folder of its own, for Parquet parts.")],
    items: ItemsOption = None,
    history: HistoryOption = None,
    rationales: RationalesOption = 1,
    readout: ReadoutOption = "mean",
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    scale: ScaleOption = "1-5",
    seed: SeedOption = 0,
    timeout: TimeoutOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = None,
    budgets: BudgetsOption = None,
    concurrency: Annotated[int, typer.Option(help="Runs of the graph in flight.")] = 64,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Rate the pairs again that failed earlier.")
    ] = False,
    ray: Annotated[
        str | None,
        typer.Option(help="Rate on a Ray cluster: auto, HOST:PORT, or local for one just here."),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="With --ray: engines; default one a GPU, else one a node.")
    ] = None,
    worker_cpus: Annotated[float, typer.Option(help="With --ray: CPUs of each worker.")] = 1.0,
    worker_gpus: Annotated[
        float | None, typer.Option(help="With --ray: GPUs of each worker; default one if any.")
    ] = None,
    batch: Annotated[
        int, typer.Option(help="With --ray: pairs a worker takes at a time; one part each.")
    ] = 1024,
    allow_prompt_mismatch: MismatchOption = False,
) -> None:
    """Rate many pairs into a folder of Parquet; call it again to continue a stopped job. Failed
    pairs are kept with their reason, and tried again with --retry-failed."""
    from r4r_graph.bulk import rate_pairs
    from r4r_graph.cli.display import progress, show_failures
    from r4r_graph.parts import failures
    from r4r_graph.reviews import load_pairs

    knobs = checked_knobs(
        history=history, rationales=rationales, readout=readout, seed=seed, timeout=timeout
    )
    if ray is None and (workers is not None or worker_gpus is not None):
        raise SettingError("--workers and --worker-gpus are for --ray")
    wanted = load_pairs(pairs)
    loaded = (reviews, items, base, adapters)
    settings = {
        "scale": scale,
        "device": device,
        "dtype": dtype,
        "engine": engine,
        "allow_prompt_mismatch": allow_prompt_mismatch,
        "budgets": parse_budgets(budgets),
    }
    how: dict[str, Any] = {"retry_failed": retry_failed, "concurrency": concurrency, **knobs}
    with _stoppable(f"what is finished is in {out}"):
        if ray is None:
            with load(*loaded, **settings) as recommender, progress("ratings", err) as tell:
                report = rate_pairs(recommender, wanted, out, on_progress=tell, **how)
        else:
            from r4r_graph.ray_bulk import rate_pairs_on_ray

            name = engine or configured().engine
            settings = further_settings({**settings, "engine": "local"})
            # Ray tells of lost machines on stdout, which is for our answer alone.
            with progress("ratings", err) as tell, redirect_stdout(sys.stderr):
                report = rate_pairs_on_ray(
                    partial(_load_on_worker, tuple(map(_absolute, loaded)), name, settings),
                    wanted,
                    out,
                    address=ray,
                    workers=workers,
                    worker_cpus=worker_cpus,
                    worker_gpus=worker_gpus,
                    part_rows=batch,
                    on_progress=tell,
                    **how,
                )
    show_failures(failures(out), err)
    typer.echo(json.dumps(asdict(report)))


def summarize(
    reviews: ReviewsOption,
    items: ItemsOption = None,
    base: BaseOption = "smollm2-135m",
    adapters: AdaptersOption = None,
    scale: ScaleOption = "1-5",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    engine: EngineOption = None,
    budgets: BudgetsOption = None,
    concurrency: Annotated[int, typer.Option(help="Reviews in flight.")] = 64,
    failed: Annotated[
        Path | None,
        typer.Option(help="A JSONL file for the reviews that failed, with their reasons."),
    ] = None,
    allow_prompt_mismatch: MismatchOption = False,
) -> None:
    """Summarize every review once, into the cache; call it again for what is missing."""
    from r4r_graph.bulk import summarize_reviews
    from r4r_graph.cli.display import progress

    recommender = load(
        reviews,
        items,
        base,
        adapters,
        scale=scale,
        device=device,
        dtype=dtype,
        engine=engine,
        allow_prompt_mismatch=allow_prompt_mismatch,
        budgets=parse_budgets(budgets),
    )
    with (
        _stoppable("the summaries that were made are kept"),
        recommender,
        progress("summaries", err) as tell,
    ):
        report = summarize_reviews(
            recommender, failures=failed, concurrency=concurrency, on_progress=tell
        )
    typer.echo(json.dumps(asdict(report)))


@contextmanager
def _stoppable(kept: str) -> Iterator[None]:
    """Ctrl-C, and the signal with which schedulers end jobs, end it with a word on what is kept."""
    before = signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        yield
    except KeyboardInterrupt:
        err.print(f"stopped: {kept}; the same call continues", markup=False, soft_wrap=True)
        raise typer.Exit(STOPPED) from None
    finally:
        signal.signal(signal.SIGTERM, before)


def _as_interrupt(*_: object) -> None:
    """Ends the job as Ctrl-C does, also where that is ignored: in a shell's background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def _absolute(path: Path | str | None) -> str | None:
    """A path that holds wherever a worker begins; a name stays one."""
    if path is None:
        return None
    return str(Path(path).absolute() if Path(path).exists() else path)


def _load_on_worker(
    loaded: tuple[Any, ...], engine: str | None, settings: Mapping[str, Any]
) -> Recommender:
    """What a worker on another machine rates with: reviews, items, base and adapters, by path or
    name. Keys, and the cache's folder, are those of its own environment."""
    from r4r_graph.recommender import Recommender

    return Recommender.load(*loaded, **{**settings, **engine_settings(engine)})
