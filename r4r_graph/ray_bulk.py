"""The bulk job on a Ray cluster: pairs in, a folder of Parquet parts out, an engine per worker.

    report = rate_pairs_on_ray(load, "pairs.parquet", "out/", address="auto", workers=8)

The pairs go out in batches; each of Ray Data's actors holds a recommender of its own and rates a
batch as `bulk.rate_pairs` would. A batch whose worker or machine is lost is rated again by another
one. Results come back here and become the parts of an ordinary job: a run that was stopped goes on,
on the cluster or on one machine (`rate_pairs`), in the same folder.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from r4r_graph.bulk import SCHEMA, check_bulk_knobs, job_facts, manifest, rater, read_pairs
from r4r_graph.errors import EngineFailure, InputError, MissingExtraError, R4RError, SettingError
from r4r_graph.jobs import Columns, JobProgress, JobReport, OnProgress, open_job
from r4r_graph.recommender import Recommender
from r4r_graph.schema import Pair

Load = Callable[[], Recommender]
"""Makes a worker's recommender, on the worker. It travels there pickled, by Ray: a function, or a
`functools.partial` of one, over plain values."""


def rate_pairs_on_ray(
    load: Load,
    pairs: str | os.PathLike[str] | Sequence[Pair],
    out: str | os.PathLike[str],
    *,
    address: str = "auto",
    workers: int | None = None,
    worker_cpus: float = 1.0,
    worker_gpus: float | None = None,
    retry_failed: bool = False,
    concurrency: int = 64,
    part_rows: int = 1024,
    on_progress: OnProgress | None = None,
    **knobs: Any,
) -> JobReport:
    """Rate all pairs into the folder `out`, on the workers of a Ray cluster; continues where an
    earlier run stopped, here or on one machine.

    Args:
        load: makes each worker's recommender. What it reads must be there on every machine; each
            machine's summary cache is its own, unless `load` gives a store that all can reach.
        pairs: as for `rate_pairs`.
        out: a folder on this machine, made on demand; it holds this job and no other.
        address: `auto` (the cluster that this machine belongs to), `HOST:PORT`, or `local`, which
            starts one of this machine alone. Where Ray runs already in this process, that is used.
        workers: recommenders at a time; None is one a GPU, or one a machine where there is none.
        worker_cpus: CPUs that each takes; also the threads that torch has there.
        worker_gpus: GPUs that each takes; None is one where there are any, else none.
        retry_failed: rate the pairs again that failed earlier.
        concurrency: runs of the graph in flight, on each worker.
        part_rows: pairs in a batch, which is a part: what a lost worker has to do again.
        on_progress: called after each batch, on this thread.
        **knobs: fields of `Knobs`.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingError: there is no cluster at this address; and as `rate_pairs`.
        InputError: no recommender can be made on a worker; and as `rate_pairs`.
        DataError, StorageError: as `rate_pairs`.
        EngineFailure: the workers cannot go on. What came back from them is kept.
    """
    check_bulk_knobs(knobs)
    rows = read_pairs(pairs)
    started = time.monotonic()
    with _connected(address) as ray:
        from ray.exceptions import RayError

        takes, count = _shares(ray, workers, worker_cpus, worker_gpus)
        try:
            facts = _facts(ray, load, knobs, takes)
            with open_job(Path(out), manifest(facts, rows), SCHEMA, len(rows)) as parts:
                again = parts.failed() if retry_failed else []
                reused = done = len(parts) - len(again)
                failed = 0
                todo = parts.todo(again)
                batches = list(_batches(rows, todo, part_rows))
                rated = _rated(ray, batches, part_rows, (load, knobs, concurrency), takes, count)
                for results in rated:
                    parts.write(results, part_rows)
                    done += len(results)
                    failed += sum(row["error"] is not None for row in results.values())
                    if on_progress is not None:
                        seconds = time.monotonic() - started
                        on_progress(JobProgress(done, len(rows), failed, seconds))
        except RayError as error:
            raise EngineFailure(f"the workers cannot go on: {_reason(error)}") from error
    return JobReport(done, reused, failed, time.monotonic() - started)


class _Worker:
    """A recommender on a worker; Ray Data makes it once an actor."""

    def __init__(self, load: Load, knobs: Mapping[str, Any], concurrency: int) -> None:
        self._rate = rater(load(), knobs)
        self._concurrency = concurrency

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Rate a batch of `row`, `user_id`, `item_id`, `as_of` into `row` and `bulk.SCHEMA`."""
        rows = batch.to_pylist()
        numbers = [row.pop("row") for row in rows]
        rated = asyncio.run(self._rated([Pair(**row) for row in rows]))
        return pa.Table.from_pylist(rated, SCHEMA).add_column(0, "row", pa.array(numbers))

    async def _rated(self, pairs: Sequence[Pair]) -> list[Columns]:
        places = asyncio.Semaphore(self._concurrency)

        async def rate(pair: Pair) -> Columns:
            async with places:
                return await self._rate(pair)

        return await asyncio.gather(*map(rate, pairs))


def _rated(
    ray: Any,
    batches: Sequence[pa.Table],
    part_rows: int,
    worker: tuple[Load, Mapping[str, Any], int],
    takes: Mapping[str, float],
    count: int,
) -> Iterator[dict[int, Columns]]:
    """The rows of the batches by number, a batch at a time, as they are done."""
    if not batches:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # its own defaults are deprecated
        context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    rated = ray.data.from_arrow(batches).map_batches(
        _Worker,
        fn_constructor_args=worker,
        batch_size=part_rows,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(count, len(batches))),
        **takes,
    )
    for table in rated.iter_batches(batch_size=None, batch_format="pyarrow"):
        yield {row.pop("row"): row for row in table.to_pylist()}


def _batches(rows: Sequence[Pair], todo: Iterator[int], size: int) -> Iterator[pa.Table]:
    """The pairs to rate, with their numbers, as tables of so many rows."""
    while numbers := list(islice(todo, size)):
        pairs = [rows[at] for at in numbers]
        yield pa.table(
            {
                "row": pa.array(numbers, pa.int64()),
                "user_id": pa.array([pair.user_id for pair in pairs], pa.string()),
                "item_id": pa.array([pair.item_id for pair in pairs], pa.string()),
                "as_of": pa.array([pair.as_of for pair in pairs], pa.float64()),
            }
        )


def _facts(
    ray: Any, load: Load, knobs: Mapping[str, Any], takes: Mapping[str, float]
) -> dict[str, Any]:
    """What a worker's recommender is. Made on a worker, for this machine may not hold its model;
    what is wrong with it comes to light here, before the work."""

    def look() -> dict[str, Any] | str:
        try:
            with load() as recommender:
                return job_facts(recommender.experts, knobs)
        except R4RError as error:
            return f"{type(error).__name__}: {error}"

    # One call, so that its process does not keep the model in memory.
    found: dict[str, Any] | str = ray.get(ray.remote(max_calls=1, **takes)(look).remote())
    if isinstance(found, str):
        raise InputError(f"no recommender can be made on a worker: {found}")
    return found


def _shares(
    ray: Any, workers: int | None, cpus: float, gpus: float | None
) -> tuple[dict[str, float], int]:
    """What each worker takes of the cluster, and how many there are.

    Raises:
        SettingError: the cluster has not so much.
    """
    there = ray.cluster_resources()
    gpus = (1.0 if there.get("GPU") else 0.0) if gpus is None else gpus
    nodes = [node for node in ray.nodes() if node["Alive"]]
    usual = int(there.get("GPU", 0) / gpus) if gpus else len(nodes)
    takes = {"num_gpus": gpus} if gpus else {"num_cpus": cpus}
    name, wanted = ("GPU", gpus) if gpus else ("CPU", cpus)
    if wanted <= 0 or all(node["Resources"].get(name, 0) < wanted for node in nodes):
        raise SettingError(f"no machine of the cluster has {wanted:g} {name} for a worker")
    if workers is not None and workers < 1:
        raise SettingError(f"bad workers={workers}: 1 or more")
    return takes, workers or max(1, usual)


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster; nothing is told to anyone.

    Raises:
        MissingExtraError: Ray is not installed.
        SettingError: there is no cluster there.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingExtraError("rating on a Ray cluster", "ray") from None
    if ray.is_initialized():
        yield ray
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # for a cluster that is started here
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    if address == "local":
        quiet["include_dashboard"] = False
    try:
        ray.init(address, **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise SettingError(f"no Ray cluster can be reached at {address!r}: {error}") from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _reason(error: BaseException) -> str:
    """The innermost reason, in a line: Ray wraps errors in errors, with tracebacks as messages."""
    while (inner := getattr(error, "cause", None) or error.__cause__) is not None:
        error = inner
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return lines[-1 if lines[0].startswith("Traceback") else 0].strip()
