"""Ratings per second in bulk, summaries cached, against a plain loop; and where the time goes.

    python benchmarks/bulk.py [--pairs 24] [--rounds 3] [--adapters FOLDER]

The plain loop (`plain_loop.py`) scans a frame for the histories, generates at batch 1 and rates in
a separate forward pass. Between the two stands our graph with one run in flight, which shows what
is won by batching alone. All ways use the same model, adapters, prompts and summaries, take turns,
and are told as medians of the rounds. `base` is the base model alone, `adapters` those given, or
those of the package.

Beside it: peak memory of a process with the adapters against one without; and how fast prompts are
read, as a share of the rate at which this machine multiplies matrices of the same shapes.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas
import torch
from langgraph.store.memory import InMemoryStore
from plain_loop import FrameReviews, PlainLoop, summaries_of

from r4r_graph import Recommender, TableReviewSource, load_items
from r4r_graph.bulk import rate_pairs
from r4r_graph.engine.adapters import find_adapters
from r4r_graph.engine.contexts import CONTEXT_CACHE_MB
from r4r_graph.engine.local import load_local_engine
from r4r_graph.engine.weights import find_base
from r4r_graph.evidence import TokenBudgets
from r4r_graph.schema import Pair

SAMPLE = Path(__file__).parents[1] / "r4r_graph" / "_demo"


def latest(source: TableReviewSource, count: int, seed: int) -> list[Pair]:
    """A seeded sample of the last tenth of the reviews by time (of as many as there are to be, if
    that is more), each to be rated as of its own time."""
    rows = sorted(source, key=lambda review: review.timestamp)
    last = rows[-max(count, len(rows) // 10) :]
    chosen = random.Random(seed).sample(last, min(count, len(last)))
    return [Pair(review.user_id, review.item_id, review.timestamp) for review in chosen]


def load(options: Any, adapters: str | None) -> Recommender:
    """A recommender of the local engine, its summaries in memory."""
    engine, _ = load_local_engine(
        options.base,
        adapters,
        dtype=options.dtype,
        context_cache_mb=options.context_cache_mb,
        allow_prompt_mismatch=True,
        calibrated=False,
    )
    budgets = TokenBudgets(**json.loads(options.budgets)) if options.budgets else None
    return Recommender.load(
        options.reviews, options.items, engine=engine, budgets=budgets, store=InMemoryStore()
    )


def in_bulk(recommender: Recommender, pairs: list[Pair], options: Any) -> pandas.DataFrame:
    """The pairs rated by the bulk job, into a folder that goes away."""
    contexts = _backend(recommender).contexts
    if contexts is not None:
        contexts.clear()  # an earlier round has read the same
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        report = rate_pairs(
            recommender, pairs, out, concurrency=options.concurrency, history=options.history
        )
        assert not report.failed
        return pandas.read_parquet(out)


def _backend(recommender: Recommender) -> Any:
    engine: Any = recommender.experts.engine
    return engine._backend


def taking_turns(ways: dict[str, Callable[[], Any]], rounds: int) -> tuple[Any, Any]:
    """Seconds of each way in each round, and what each gave in the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results: dict[str, Any] = {}
    for _ in range(rounds):
        for name, way in ways.items():
            started = time.perf_counter()
            results[name] = way()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds, results


def speed(options: Any, adapters: str | None) -> dict[str, Any]:
    """Ratings per second of the three ways, and what the bulk job does with its time."""
    with load(options, adapters) as recommender:
        source, experts = recommender.reviews, recommender.experts
        assert isinstance(source, TableReviewSource)
        pairs = latest(source, options.pairs, options.seed)
        started = time.perf_counter()
        summaries = summaries_of(experts, source, pairs, options.history)
        summarizing = time.perf_counter() - started
        found = find_adapters(adapters, base := find_base(options.base), calibrated=False)
        info = experts.engine.info
        plain = PlainLoop(
            experts,
            FrameReviews(list(source), load_items(options.items) if options.items else {}),
            summaries,
            base.path,
            {name: each.path for name, each in found.items() if name != "summarizer"},
            info.device,
            info.dtype,
            options.history,
        )
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: [plain.rate(pair) for pair in pairs],
            "bulk": lambda: in_bulk(recommender, pairs, options),
        }
        if options.alone:
            alone = argparse.Namespace(**{**vars(options), "concurrency": 1})
            ways["one_in_flight"] = lambda: in_bulk(recommender, pairs, alone)
        for pair in pairs[:1]:  # what warms up is warm
            plain.rate(pair)
            in_bulk(recommender, [pair], options)
        seconds, results = taking_turns(ways, options.rounds)
        spent = where_time_goes(recommender, pairs, options)
        rows = results["bulk"]
        told = results["plain"]
        same = [text == row[0] for (text, _), row in zip(told, rows.rationales, strict=True)]
        apart = [abs(mean - row) for (_, mean), row in zip(told, rows["mean"], strict=True)]
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        return {
            "adapters": sorted(found),
            "activated": sorted(_backend(recommender)._openings),
            "ratings_per_s": {name: round(len(pairs) / s, 3) for name, s in medians.items()},
            "summaries_per_s": round(len(summaries) / summarizing, 3),
            "ratio": round(medians["plain"] / medians["bulk"], 2),
            "ratios_of_rounds": [
                round(a / b, 2) for a, b in zip(seconds["plain"], seconds["bulk"], strict=True)
            ],
            "same_rationale": sum(same),
            "largest_difference_of_means_with_the_same_rationale": round(
                max((a for a, alike in zip(apart, same, strict=True) if alike), default=0.0), 6
            ),
            "bulk_spent": spent,
            "device": info.device,
            "dtype": info.dtype,
        }


@contextmanager
def timed_forwards(model: Any, told: Counter[str]) -> Iterator[None]:
    """Count what the model's body and head do, and their seconds, by what is read and written."""
    body, head = model.base_model, model.get_output_embeddings()
    began: list[float] = []

    def clock() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def before(*_: Any) -> None:
        began.append(clock())

    def after_body(_: Any, arguments: Any, named: dict[str, Any], __: Any) -> None:
        ids = named["input_ids"] if "input_ids" in named else arguments[0]
        kind = "read" if ids.shape[1] > 1 else "write"
        told[f"{kind}_s"] += clock() - began.pop()
        told[f"{kind}_tokens"] += ids.numel()
        told[f"{kind}_passes"] += 1

    def after_head(*_: Any) -> None:
        told["head_s"] += clock() - began.pop()

    handles = [
        body.register_forward_pre_hook(before),
        body.register_forward_hook(after_body, with_kwargs=True),
        head.register_forward_pre_hook(before),
        head.register_forward_hook(after_head),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def where_time_goes(recommender: Recommender, pairs: list[Pair], options: Any) -> dict[str, Any]:
    """One more bulk run, taken apart; and how fast it reads, beside bare matrix products."""
    model = _backend(recommender)._model
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    told: Counter[str] = Counter()
    started = time.perf_counter()
    with timed_forwards(plain, told):
        in_bulk(recommender, pairs, options)
    wall = time.perf_counter() - started
    width = round(told["read_tokens"] / max(told["read_passes"], 1))
    linear = [m for m in plain.base_model.modules() if type(m) is torch.nn.Linear]
    weights = sum(m.weight.numel() for m in linear if min(m.weight.shape) > 64)  # LoRA's aside
    reading = 2 * weights * told["read_tokens"] / told["read_s"]
    bare = matmul_rate(linear, width)
    return {
        "seconds": round(wall, 2),
        "reading_prompts": round(told["read_s"] / wall, 3),
        "writing_rationales": round(told["write_s"] / wall, 3),
        "output_head": round(told["head_s"] / wall, 3),
        "all_else": round(1 - (told["read_s"] + told["write_s"] + told["head_s"]) / wall, 3),
        "tokens_read_a_rating": round(told["read_tokens"] / len(pairs)),
        "tokens_written_a_rating": round(told["write_tokens"] / len(pairs)),
        "tokens_in_a_reading_pass": width,
        "reading_gflops": round(reading / 1e9, 1),
        "matmul_gflops": round(bare / 1e9, 1),
        "share_of_matmul_rate": round(reading / bare, 3),
    }


def matmul_rate(linear: list[Any], tokens: int, repeats: int = 5) -> float:
    """Operations per second of the body's matrix products alone, for so many tokens in a pass."""
    shapes = Counter(
        tuple(m.weight.shape) for m in linear if min(m.weight.shape) > 64
    )  # LoRA's are small
    some = linear[0].weight
    seconds, work = 0.0, 0
    with torch.inference_mode():
        for (wide, deep), count in shapes.items():
            weight = torch.randn(wide, deep, dtype=some.dtype, device=some.device)
            inputs = torch.randn(tokens, deep, dtype=some.dtype, device=some.device)
            times = []
            for _ in range(repeats):
                started = time.perf_counter()
                torch.matmul(inputs, weight.T)
                if some.is_cuda:
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            seconds += count * statistics.median(times)
            work += count * 2 * wide * deep * tokens
    return work / seconds


def peak_memory() -> int:
    """Most bytes of this process that were in memory at once; of the GPU's, where there is one."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if "VmHWM" in line)


def rate_and_measure(options: Any) -> None:
    """In a process of its own: load, rate, and print the peaks."""
    adapters = None if options.child == "package" else options.child
    with load(options, adapters) as recommender:
        loaded = peak_memory()
        assert isinstance(recommender.reviews, TableReviewSource)
        in_bulk(recommender, latest(recommender.reviews, options.pairs, options.seed), options)
        budgets = asdict(recommender.experts.budgets)
    print(json.dumps({"loaded": loaded, "rated": peak_memory(), "budgets": budgets}))


def memory(options: Any) -> dict[str, Any]:
    """Peak memory with adapters and without, medians of the rounds, each in a process of its own
    that rates the pairs with the adapters' token budgets."""
    sizes: dict[str, list[dict[str, int]]] = {"adapters": [], "base": []}
    for _ in range(options.rounds):
        with_adapters = _child(options, options.adapters or "package")
        budgets = json.dumps(with_adapters.pop("budgets"))
        alone = _child(options, "none", "--budgets", budgets)
        alone.pop("budgets")
        sizes["adapters"].append(with_adapters)
        sizes["base"].append(alone)
    found: dict[str, Any] = {}
    for when in ("loaded", "rated"):
        middle = {
            name: statistics.median(size[when] for size in each) for name, each in sizes.items()
        }
        found |= {f"{name}_{when}_mb": round(size / 2**20) for name, size in middle.items()}
        found[f"ratio_{when}"] = round(middle["adapters"] / middle["base"], 3)
        pairs = zip(sizes["adapters"], sizes["base"], strict=True)
        found[f"ratios_{when}"] = [round(a[when] / b[when], 3) for a, b in pairs]
    return found


def _child(options: Any, adapters: str, *more: str) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", adapters, "--pairs", str(options.memory_pairs)]
    names = ("reviews", "items", "base", "dtype", "history", "concurrency", "context_cache_mb")
    for name in names:
        if (value := getattr(options, name)) is not None:
            command += [f"--{name.replace('_', '-')}", str(value)]
    done = subprocess.run([*command, *more], capture_output=True, text=True, check=True)
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def main() -> None:
    """Measure and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--reviews", type=Path, default=SAMPLE / "reviews.jsonl")
    parser.add_argument("--items", type=Path)
    parser.add_argument("--pairs", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--history", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--adapters", help="a folder; default: the package's own, if any")
    parser.add_argument("--only-adapters", action="store_true", help="not the base model alone")
    parser.add_argument("--dtype")
    parser.add_argument("--context-cache-mb", type=int, default=CONTEXT_CACHE_MB)
    parser.add_argument("--only-memory", action="store_true", help="no speed is measured")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--alone", action="store_true", help="also our graph, one run in flight")
    parser.add_argument("--memory-pairs", type=int, default=8, help="0: no memory is measured")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--budgets", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.items is None and options.reviews.parent == SAMPLE:
        options.items = SAMPLE / "items.jsonl"
    if options.child:
        rate_and_measure(options)
        return
    figures: dict[str, Any] = {
        "pairs": options.pairs,
        "rounds": options.rounds,
        "history": options.history,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }
    if not (options.only_adapters or options.only_memory):
        figures["base"] = speed(options, "none")
    if options.adapters or find_adapters(None, find_base(options.base)):
        if not options.only_memory:
            figures["adapters"] = speed(options, options.adapters)
        if options.memory_pairs:
            figures["memory"] = memory(options)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
