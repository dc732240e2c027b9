"""What the guide to importing says is true of the code."""

from __future__ import annotations

import gzip
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

from r4r_graph import load_items, load_reviews
from r4r_graph.cli import app
from r4r_graph.importing import FORMATS
from tests.import_files import amazon_2023, write_lines

PAGE = (Path(__file__).parents[1] / "docs" / "importing.md").read_text(encoding="utf-8")


def test_its_python_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reviews, items = amazon_2023()
    write_lines(tmp_path / "reviews.jsonl.gz", reviews)
    write_lines(tmp_path / "meta.jsonl.gz", items)
    monkeypatch.chdir(tmp_path)
    [block] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    names: dict[str, Any] = {}
    exec(block, names)
    report = names["report"]
    assert capsys.readouterr().out.startswith(f"{report.reviews} {report.users} {report.items} ")
    assert len(load_reviews("reviews.parquet")) == report.reviews > 0
    assert len(load_items("items.parquet")) == report.items_written > 0


def test_its_commands_have_only_options_that_exist() -> None:
    command = typer.main.get_command(app).commands["import"]  # type: ignore[attr-defined]
    options = {option for parameter in command.params for option in parameter.opts}
    lines = [line for line in PAGE.splitlines() if line.startswith("r4r import")]
    assert len(lines) == 3
    for line in lines:
        assert shlex.split(line)[2] in {*FORMATS, "table"}
    named = set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--json"}
    assert named <= options


def test_its_table_names_all_formats() -> None:
    assert set(re.findall(r"^\| `([\w-]+)` \|", PAGE, re.MULTILINE)) == {*FORMATS, "table"}


def test_a_broken_download_is_told_as_it_says(tmp_path: Path) -> None:
    from r4r_graph.errors import DataError
    from r4r_graph.importing import import_reviews

    lines = "".join(json.dumps(row) + "\n" for row in amazon_2023(500)[0])
    whole = gzip.compress(lines.encode())
    (tmp_path / "broken.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cannot be read beyond line \d+ \(Truncated compressed"):
        import_reviews("amazon-2023", [tmp_path / "broken.gz"], tmp_path / "out.parquet")
