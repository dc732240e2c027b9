"""A bulk job that is killed again and again, against the same job left alone.

    python benchmarks/kills.py [--kills 20] [--engine fake|real]

A process rates pairs into a folder, its summaries in a SQLite cache, and is ended with SIGKILL at a
random moment; the next one goes on. At last one is let through. Then the rows must equal those of
a run that nobody killed: byte for byte with the fake engine. A real model's numbers depend in
their last bits on which requests share a forward pass, and a greedy rationale may turn on such a
bit: for it the differences are counted. Every summary that was asked of the engine is logged: one
that had been kept when a process began must not be asked for by that process.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sqlite3
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq

from r4r_graph import Recommender, Review, fake_engine, load_reviews
from r4r_graph.bulk import SCHEMA, rate_pairs
from r4r_graph.caches import open_summary_store
from r4r_graph.schema import Pair

SAMPLE = Path(__file__).parents[1] / "r4r_graph" / "_demo" / "reviews.jsonl"


def invented(count: int) -> tuple[list[Review], list[Pair]]:
    """Reviews by many users, and pairs user by user, so that summaries are made all the way."""
    users = max(2, count // 5)
    reviews = [
        Review(
            f"u{user}", f"i{(user + n) % users}", 1 + (user + n) % 5, 1e3 + user, "", f"{user} {n}."
        )
        for user in range(users)
        for n in range(4)
    ]
    pairs = [Pair(f"u{n // 5}", f"i{(n // 5 + 6 + n % 5) % users}", 1e6 + n) for n in range(count)]
    return reviews, pairs


def sampled(count: int) -> tuple[list[Review], list[Pair]]:
    """The package's sample, and its latest reviews as pairs."""
    reviews = sorted(load_reviews(SAMPLE), key=lambda review: review.timestamp)
    return reviews, [Pair(r.user_id, r.item_id, r.timestamp) for r in reviews[-count:]]


def work(options: Any, folder: Path, ready: Any) -> None:
    """One process of the job; it ends when all is done, or is killed."""
    engine: Any
    if options.engine == "fake":
        engine = fake_engine(delay=options.delay)
        reviews, pairs = invented(options.pairs)
    else:
        from r4r_graph.engine.local import load_local_engine

        engine, _ = load_local_engine("smollm2-135m", options.adapters, allow_prompt_mismatch=True)
        reviews, pairs = sampled(options.pairs)
    log = os.open(folder / "asked.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    generate = engine.agenerate

    async def logged(requests: Any, **settings: Any) -> Any:
        for request in requests:
            if request.format == "aspects":
                os.write(log, f"{engine.fingerprint(request)}\n".encode())
        return await generate(requests, **settings)

    engine.agenerate = logged
    store = open_summary_store(folder / "summaries.sqlite")
    with Recommender.load(reviews, engine=engine, store=store) as recommender:
        ready.set()
        rate_pairs(
            recommender,
            pairs,
            folder / "out",
            concurrency=options.concurrency,
            part_seconds=options.part_seconds,
        )
    store.conn.close()


def kept(folder: Path) -> set[str]:
    """Keys of the summaries in the cache."""
    file = folder / "summaries.sqlite"
    if not file.exists():
        return set()
    with closing(sqlite3.connect(file)) as connection:
        try:
            return {key for (key,) in connection.execute("SELECT key FROM store")}
        except sqlite3.OperationalError:  # killed before the table was made
            return set()


def asked(folder: Path) -> list[str]:
    """What was asked of the engine, in order; a line that a kill cut is not whole."""
    file = folder / "asked.log"
    return file.read_text().splitlines() if file.exists() else []


def run(options: Any, folder: Path, kill_after: float | None) -> tuple[float, bool]:
    """One process, killed so long after it began to rate. Returns its seconds, and whether it was
    done."""
    processes = multiprocessing.get_context("forkserver")
    ready = processes.Event()
    process = processes.Process(target=work, args=(options, folder, ready))
    process.start()
    if not ready.wait(300):
        raise SystemExit("a process did not begin in five minutes")
    started = time.monotonic()
    process.join(kill_after)
    if process.is_alive():
        process.kill()
    process.join()
    if process.exitcode not in (0, -9):
        raise SystemExit(f"a process ended with code {process.exitcode}")
    return time.monotonic() - started, process.exitcode == 0


def rows(folder: Path) -> pa.Table:
    """All rows of the job, in one piece."""
    parts = sorted((folder / "out").glob("part-*.parquet"))
    return pa.concat_tables([pq.read_table(part) for part in parts]).combine_chunks()


def as_bytes(table: pa.Table) -> bytes:
    """The table as an Arrow stream."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, SCHEMA) as stream:
        stream.write_table(table)
    buffer: bytes = sink.getvalue().to_pybytes()
    return buffer


def compared(straight: pa.Table, killed: pa.Table) -> dict[str, Any]:
    """How far two runs' rows differ."""
    a, b = straight.to_pandas(), killed.to_pandas()
    keys = ["user_id", "item_id", "as_of"]
    same = a.rationales.map(tuple) == b.rationales.map(tuple)
    apart = (a["mean"] - b["mean"]).abs()
    return {
        "same_pairs_in_order": bool(a[keys].equals(b[keys])),
        "same_bytes": as_bytes(straight) == as_bytes(killed),
        "same_rationales": float(same.mean()),
        "largest_difference_of_means_with_the_same_rationale": _most(apart[same]),
        "largest_difference_of_means": _most(apart),
    }


def _most(apart: pandas.Series) -> float:
    return round(float(apart.max()), 7) if len(apart) else 0.0


def main() -> None:
    """Kill, go on, compare, and print one JSON object; exit code 1 where something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--engine", choices=("fake", "real"), default="fake")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument(
        "--pairs", type=int, help="default: 400 for the fake engine, 24 for a model"
    )
    parser.add_argument("--delay", type=float, default=0.02, help="seconds of a fake batch")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument(
        "--window",
        type=float,
        help="a kill comes within so many seconds; default: 1.5 times a kill's share of the job. "
        "One that lasts no batch keeps a model from ever getting on",
    )
    parser.add_argument("--adapters", default="none")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.pairs = options.pairs or {"fake": 400, "real": 24}[options.engine]
    multiprocessing.set_forkserver_preload(["r4r_graph.bulk", "langgraph.store.sqlite", "pandas"])
    dice = random.Random(options.seed)
    moments, redone, all_done = [], 0, False
    with tempfile.TemporaryDirectory() as scratch:
        straight, killed = Path(scratch) / "straight", Path(scratch) / "killed"
        straight.mkdir()
        killed.mkdir()
        options.part_seconds = 1.0
        seconds, _ = run(options, straight, None)
        # So that the work lasts for all kills, and each run may keep some of it.
        options.part_seconds = seconds / options.kills / 4
        while not all_done:
            before, past = kept(killed), len(asked(killed))
            left = options.kills - len(moments)
            window = options.window or 1.5 * seconds / options.kills
            moment = dice.uniform(0, window) if left else None
            _, all_done = run(options, killed, moment)
            if moment is not None and not all_done:
                moments.append(round(moment, 3))
            redone += len(before.intersection(asked(killed)[past:]))
        requests = asked(killed)
        figures = {
            "engine": options.engine,
            "pairs": options.pairs,
            "straight_s": round(seconds, 2),
            "kills": len(moments),
            "killed_after_s": moments,
            "summaries": len(kept(killed)),
            "same_summaries": kept(killed) == kept(straight),
            "kept_summaries_made_again": redone,
            "summaries_in_flight_when_killed": len(requests) - len(set(requests)),
            **compared(rows(straight), rows(killed)),
        }
    print(json.dumps(figures, indent=2))
    wrong = redone or not figures["same_pairs_in_order"]
    if wrong or (options.engine == "fake" and not figures["same_bytes"]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
