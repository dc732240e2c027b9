"""What the doctor looks at beside versions and models: settings, kept runs, caches, the CPU; and
that a key is never shown or kept, by it or by any other command."""

from __future__ import annotations

import json
import os
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from r4r_graph import caches
from r4r_graph.cli import doctor
from r4r_graph.configuration import SETTINGS, Configuration
from r4r_graph.engine.fake import fake_engine
from tests.commands import Done, R4r
from tests.model_server import ModelServer
from tests.scripted import at, review

CANARY = "sk-canary-5b1e77"


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(caches, "_told", None)


def finding(done: Done, what: str) -> dict[str, Any]:
    [one] = [one for one in json.loads(done.out)["findings"] if one["what"] == what]
    found: dict[str, Any] = one
    return found


def write_reviews(folder: Path) -> None:
    rows = [review("ann", "folk", 1, 3), review("ben", "target", 2, 2)]
    lines = [json.dumps(row.to_dict()) for row in rows]
    (folder / "reviews.jsonl").write_text("\n".join(lines))


def test_it_shows_which_setting_won_and_over_which(
    r4r: R4r, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "r4r.toml"
    file.write_text('base = "filed"\nhistory = 4\nscale = "1-10"\n')
    monkeypatch.setenv("R4R_BASE", "exported")
    monkeypatch.setenv("R4R_SCALE", "1-7")
    done = r4r("doctor", "--base", tiny_base, "--json")
    told = json.loads(done.out)
    assert (done.code, told["file"]) == (0, str(file))
    assert [row["name"] for row in told["settings"]] == list(SETTINGS)
    rows = {row.pop("name"): row for row in told["settings"]}
    over = ["R4R_BASE", f"{file}: base"]
    assert rows["base"] == {"value": str(tiny_base), "from": "argument", "over": over}
    assert rows["scale"] == {"value": "1-7", "from": "R4R_SCALE", "over": [f"{file}: scale"]}
    assert rows["history"] == {"value": 4, "from": f"{file}: history", "over": []}
    assert rows["seed"] == {"value": 0, "from": "default", "over": []}
    shown = " ".join(r4r("doctor", "--base", tiny_base).out.split())
    assert f"ok settings file: {file}" in shown
    assert "setting value from" in shown
    assert f"scale 1-7 R4R_SCALE (over {file}: scale)" in shown


def test_what_was_looked_up_is_what_it_examines(
    r4r: R4r, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("R4R_CACHE_DIR")
    (tmp_path / "r4r.toml").write_text(f'base = "{tiny_base}"\ncache_dir = "kept"\n')
    done = r4r("doctor", "--json")
    assert str(tiny_base) in finding(done, "base model")["detail"]
    assert finding(done, "cache")["detail"].startswith(str(tmp_path / "kept"))


def test_bad_settings_are_a_finding(r4r: R4r, tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "r4r.toml").write_text("reveiws = 1")
    done = r4r("doctor", "--base", tiny_base, "--json")
    amiss = finding(done, "settings")
    assert (done.code, amiss["works"]) == (1, False)
    assert "r4r.toml: unknown key reveiws (did you mean reviews?)" in amiss["mend"]
    assert finding(done, "base model")["works"]  # the rest was looked at all the same


def test_a_bad_argument_is_a_finding_too(r4r: R4r) -> None:
    assert r4r("doctor", "--base", "nowhere/at-all").code == 1


def test_a_mistyped_variable_is_told_of(
    r4r: R4r, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R4R_REVEIWS", "x.csv")
    told = finding(r4r("doctor", "--base", tiny_base, "--json"), "variable")
    assert told["detail"] == "R4R_REVEIWS (did you mean R4R_REVIEWS?) means nothing here"


def test_it_counts_kept_runs_and_sizes_the_cache(r4r: R4r, tiny_base: Path, tmp_path: Path) -> None:
    def runs() -> str:
        told = finding(r4r("doctor", "--base", tiny_base, "--json"), "kept runs")
        return f"{told['works']} {told['detail'].split()[0]}"

    assert runs() == "True 0"
    write_reviews(tmp_path)
    (tmp_path / "r4r.toml").write_text('engine = "fake"\nreviews = "reviews.jsonl"\n')
    for _ in range(2):
        assert r4r("rate", "--user", "ann", "--item", "target", "--as-of", at(9)).code == 0
    assert runs() == "True 2"
    cache = finding(r4r("doctor", "--base", tiny_base, "--json"), "cache")["detail"]
    size = sum(entry.bytes for entry in caches.cache_info())
    assert size > 10_000
    assert cache.endswith(f"{size / 1e6:.1f} MB in all")


def test_a_server_is_asked_a_chat_model_is_not(
    r4r: R4r, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def engine() -> dict[str, Any]:
        return finding(r4r("doctor", "--base", tiny_base, "--json"), "engine")

    monkeypatch.setenv("R4R_ENGINE", "openai:some-model")
    assert engine()["detail"] == "openai:some-model, a chat model, not asked"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("R4R_ENGINE", f"http://127.0.0.1:{port}")  # nobody is there any more
    gone = engine()
    assert not gone["works"]
    assert f"127.0.0.1:{port}" in gone["mend"]


def test_it_says_what_a_server_serves(
    r4r: R4r, tiny_base: Path, tiny_server: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("R4R_ENGINE", tiny_server.url)
    told = finding(r4r("doctor", "--base", tiny_base, "--json"), "engine")
    assert told["works"], told
    assert told["detail"].startswith(f"{tiny_server.url} serves ")
    assert "adapters: summarizer, reasoner, predictor" in told["detail"]


@pytest.mark.parametrize("damage", [b"no database at all" * 99, b""])
def test_runs_that_cannot_be_read_are_told_of(r4r: R4r, tiny_base: Path, damage: bytes) -> None:
    path = caches.runs_path()
    path.write_bytes(damage)
    told = finding(r4r("doctor", "--base", tiny_base, "--json"), "kept runs")
    if damage:
        assert (told["works"], "r4r cache clear" in told["mend"]) == (False, True)
    else:  # as a process leaves it that dies before its first run
        assert told["works"]


@pytest.mark.parametrize(
    ("able", "dtype", "hint"),
    [
        ({"avx512_bf16": True}, None, True),
        ({"amx_bf16": True}, None, True),
        ({"avx512_bf16": True}, "bfloat16", False),
        ({"avx512_bf16": False}, None, False),
        ({}, None, False),
    ],
)
def test_it_says_where_bfloat16_is_faster(
    able: dict[str, bool], dtype: str | None, hint: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    told = doctor._device(Configuration(dtype=dtype))
    assert ("--dtype bfloat16" in told.mend) == hint
    assert ("computes bfloat16 natively" in told.detail) == any(able.values())
    assert (f"{dtype} as set" in told.detail) == (dtype is not None)


# Keys ------------------------------------------------------------------------------------------


def everything_in(folder: Path) -> bytes:
    """Each byte of each file, and what the databases say when asked (long values are in pieces)."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    parts = [str(path).encode() + b"\n" + path.read_bytes() for path in files]
    for path in files:
        if path.suffix == ".sqlite":
            with closing(sqlite3.connect(path)) as opened:
                parts.append("\n".join(opened.iterdump()).encode(errors="replace"))
    return b"\n".join(parts)


def test_a_key_is_nowhere(
    r4r: R4r,
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Planted in the environment; then each byte that is printed, logged or written is read."""
    caplog.set_level("DEBUG")
    for name in ("R4R_API_KEY", "OPENAI_API_KEY", "ANTHROPIC_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, CANARY)
    write_reviews(tmp_path)
    (tmp_path / "r4r.toml").write_text('engine = "fake"\nreviews = "reviews.jsonl"\n')
    (tmp_path / "pairs.csv").write_text("user_id,item_id,as_of\nann,target,2021-01-01\n")
    pair = ("--user", "ann", "--item", "target", "--as-of", at(9))
    printed: list[str] = []

    def run(*command: object) -> int:
        done = r4r(*command)
        printed.extend((done.out, done.err))
        return done.code

    kept = ("rate", *pair, "--thread", "monday", "--report", "monday.html", "--influence", "same")
    assert run(*kept) == 0
    assert run("rate", *pair, "--json") == 0
    assert run("show", "monday", "--prompts") == 0
    assert run("show", "monday", "--prompts", "--json") == 0
    assert run("report", "monday", "--out", "again.html") == 0
    assert run("fork", "monday", "--set", "readout=median", "--thread", "fork") == 0
    assert run("bulk", "--pairs", "pairs.csv", "--out", "ratings") == 0
    assert run("runs", "--json") == 0
    assert run("doctor", "--base", tiny_base, "--json") == 0
    assert "R4R_API_KEY set, OPENAI_API_KEY set" in printed[-2]
    assert run("doctor", "--base", tiny_base) == 0

    def failing(**_: object) -> Any:
        """An engine whose errors tell what it was sent, as a careless client's might."""

        def rate(_: object) -> Any:
            raise RuntimeError(f"HTTP 401: Authorization: Bearer {os.environ['R4R_API_KEY']}")

        return fake_engine(rate=rate)

    monkeypatch.setattr("r4r_graph.engine.fake.fake_engine", failing)
    assert run("rate", *pair, "--thread", "failed") == 1
    assert "HTTP 401: Authorization: Bearer ***" in printed[-1]
    assert run("show", "failed", "--json") == 0
    assert run("rate", "--user", "nobody", "--item", "nothing") == 2
    shown = "\n".join(printed).encode() + caplog.text.encode()
    written = everything_in(tmp_path)
    assert b"monday.html" in written
    assert b"checkpoints" in written
    assert len(shown) > 5_000
    for place in (shown, written):
        assert CANARY.encode() not in place


def test_a_key_goes_to_its_server_and_nowhere_else(
    r4r: R4r,
    tiny_base: Path,
    tiny_server: ModelServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("R4R_API_KEY", CANARY)
    monkeypatch.setenv("R4R_ENGINE", tiny_server.url)
    monkeypatch.setenv("R4R_BASE", str(tiny_base))
    monkeypatch.setenv("R4R_BUDGETS", "rationale=16,summary=40")
    write_reviews(tmp_path)
    monkeypatch.setenv("R4R_REVIEWS", "reviews.jsonl")
    pair = ("--user", "ann", "--item", "target", "--as-of", at(9))
    tiny_server.keys.clear()
    well = r4r("rate", *pair, "--thread", "monday", "--report", "monday.html")
    tiny_server.failing.extend([401] * 9)
    try:
        refused = r4r("rate", *pair)
    finally:
        tiny_server.failing.clear()
    assert (well.code, refused.code) == (0, 1)
    assert "R4R_API_KEY" in refused.complaint
    assert {CANARY in str(key) for key in tiny_server.keys} == {True}
    shown = well.out + well.err + refused.out + refused.err + caplog.text
    assert CANARY not in shown
    assert CANARY.encode() not in everything_in(tmp_path)
