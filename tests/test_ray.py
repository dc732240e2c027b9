"""The bulk job on a Ray cluster: of two nodes, one of which is killed in mid-run."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pytest

from r4r_graph.bulk import SCHEMA, rate_pairs
from r4r_graph.errors import MissingExtraError, SettingError
from r4r_graph.jobs import JobReport
from r4r_graph.ray_bulk import _reason, _Worker, rate_pairs_on_ray
from r4r_graph.schema import Pair
from tests.bulk_jobs import REVIEWS, pairs_to_rate, recommender
from tests.commands import R4r

PAIRS = pairs_to_rate(120)
PAIRS[7] = Pair("nobody", "nothing", 5.0)

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",  # else a token is written into the home folder
}

CLUSTER = """
    import sys

    from ray.cluster_utils import Cluster

    small = {"num_cpus": 1, "object_store_memory": 80 << 20}
    cluster = Cluster(True, head_node_args={**small, "include_dashboard": False})
    second = cluster.add_node(**small)
    print(cluster.address, flush=True)
    if sys.stdin.readline().strip() == "kill":
        cluster.remove_node(second, allow_graceful=False)
    sys.stdin.read()
    cluster.shutdown()
"""

DRIVER = """
    import sys
    from pathlib import Path

    from r4r_graph import Review
    from r4r_graph.errors import InputError
    from r4r_graph.ray_bulk import rate_pairs_on_ray
    from r4r_graph.schema import Pair

    address, out, seen = sys.argv[1:]
    reviews, pairs = eval(sys.stdin.read())

    def load():
        import ray
        from langgraph.store.memory import InMemoryStore

        from r4r_graph import Recommender, fake_engine

        Path(seen, ray.get_runtime_context().get_node_id()).touch()
        engine = fake_engine(delay=0.02)
        return Recommender.load(reviews, engine=engine, store=InMemoryStore())

    def broken():
        from r4r_graph.errors import ModelNotFoundError

        raise ModelNotFoundError("no such base model here")

    def rate(load, **knobs):
        return rate_pairs_on_ray(
            load, pairs, out, address=address, workers=2, part_rows=6, concurrency=2, **knobs
        )

    try:
        rate(broken)
    except InputError as error:
        print(">", error)
    print(">", rate(load))
"""


def _python(code: str, *arguments: object, warnings: str = "error") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", warnings, "-c", textwrap.dedent(code), *map(str, arguments)],
        env={**os.environ, **QUIET},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture
def cluster() -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """Two nodes on this machine; their address, and a process that kills one when it is told."""
    if find_spec("ray") is None:
        pytest.skip("the extra 'ray' is not installed")
    process = _python(CLUSTER, warnings="ignore")  # those are Ray's own
    assert process.stdout is not None
    if not (address := process.stdout.readline().strip()):
        pytest.skip(f"Ray did not start: {process.communicate()[1].splitlines()[-1]}")
    yield address, process
    process.communicate(timeout=120)


def test_a_node_is_killed_and_no_row_is_lost(
    cluster: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    address, nodes = cluster
    out, seen = tmp_path / "out", tmp_path / "seen"
    seen.mkdir()
    driver = _python(DRIVER, address, out, seen)
    assert driver.stdin is not None
    assert nodes.stdin is not None
    driver.stdin.write(repr((REVIEWS, PAIRS)))
    driver.stdin.close()
    driver.stdin = None
    deadline = time.monotonic() + 240
    while len(list(out.glob("part-*"))) < 3 or len(list(seen.iterdir())) < 2:
        assert driver.poll() is None, driver.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert len(list(out.glob("part-*"))) < 18  # in mid-run
    nodes.stdin.write("kill\n")
    nodes.stdin.flush()
    told, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors
    # Ray's core says how an actor is restarted, on its own account; nothing else may speak.
    assert [line for line in errors.splitlines() if " core_worker.cc:" not in line] == []
    # On stdout Ray tells of the lost node.
    wrong, report = [line[2:] for line in told.splitlines() if line.startswith("> ")]
    assert wrong.endswith("ModelNotFoundError: no such base model here")
    assert report.startswith("JobReport(rows=120, reused=0, failed=1, ")
    with recommender() as made:
        # The folder is that of the same job on one machine.
        assert rate_pairs(made, PAIRS, out).reused == 120
        rate_pairs(made, PAIRS, tmp_path / "straight")
    pandas.testing.assert_frame_equal(
        pandas.read_parquet(out), pandas.read_parquet(tmp_path / "straight")
    )


def test_a_worker_rates_a_batch_as_rate_pairs_does(tmp_path: Path) -> None:
    with recommender() as made:
        rate_pairs(made, PAIRS[:10], tmp_path / "out")
        batch = pa.Table.from_pylist(
            [
                {"row": 3 + n, "user_id": p.user_id, "item_id": p.item_id, "as_of": p.as_of}
                for n, p in enumerate(PAIRS[:10])
            ]
        )
        table = _Worker(lambda: made, {}, concurrency=4)(batch)
    assert table.schema.names == ["row", *SCHEMA.names]
    assert table["row"].to_pylist() == list(range(3, 13))
    assert table["error"][7].as_py().startswith("UnknownPairError")
    pandas.testing.assert_frame_equal(
        table.drop_columns("row").to_pandas(), pandas.read_parquet(tmp_path / "out")
    )


def test_the_command_sends_a_recommender_that_travels_and_keeps_stdout_clean(
    r4r: R4r, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given: dict[str, Any] = {}

    def instead(load: Any, pairs: list[Pair], out: Path, **settings: Any) -> JobReport:
        print("(raylet) Ray tells of a lost node")
        given.update(settings)
        local = ("retry_failed", "concurrency", "on_progress", "seed")
        with pickle.loads(pickle.dumps(load))() as made:
            return rate_pairs(made, pairs, out, **{name: settings[name] for name in local})

    monkeypatch.setattr("r4r_graph.ray_bulk.rate_pairs_on_ray", instead)
    reviews, pairs, out = tmp_path / "reviews.jsonl", tmp_path / "pairs.jsonl", tmp_path / "out"
    reviews.write_text("\n".join(json.dumps(review.to_dict()) for review in REVIEWS))
    pairs.write_text(json.dumps({"user_id": "u1", "item_id": "i2", "as_of": 1040}))
    monkeypatch.chdir(tmp_path)
    command = ("bulk", "--reviews", "reviews.jsonl", "--pairs", pairs, "--out", out)
    cluster = ("--ray", "head:6379", "--workers", 2, "--worker-gpus", 0.5, "--batch", 64)
    done = r4r(*command, *cluster, "--engine", "fake", "--seed", 3)
    assert (done.code, json.loads(done.out)["rows"]) == (0, 1), done.err
    assert "lost node" in done.err
    wanted = {"address": "head:6379", "workers": 2, "worker_gpus": 0.5, "worker_cpus": 1.0}
    assert given.items() >= {**wanted, "part_rows": 64, "seed": 3}.items()


def test_without_ray_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"r4r-graph\[ray\]"):
        rate_pairs_on_ray(recommender, PAIRS, tmp_path / "out")
    with pytest.raises(SettingError, match="can ask nobody"):
        rate_pairs_on_ray(recommender, PAIRS, tmp_path / "out", ask=True)
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_worker_is_told_by_its_innermost_reason() -> None:
    inner = ValueError("the engine served none of the last 100 rows\nand more")
    middle = RuntimeError("Traceback (most recent call last):\n...")
    middle.__cause__ = inner
    outer = RuntimeError("outer")
    outer.cause = middle  # type: ignore[attr-defined]
    assert _reason(outer) == "the engine served none of the last 100 rows"
    assert _reason(RuntimeError("Traceback (most recent\n  File\nKeyError: 1\n")) == "KeyError: 1"
