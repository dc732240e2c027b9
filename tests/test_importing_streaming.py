"""Files of rows: what they are, and their rows one at a time."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from r4r_graph.errors import DataError
from r4r_graph.importing import streaming
from r4r_graph.importing.streaming import Fault, Numbered, examine, first_rows, open_rows
from tests.import_files import write_lines

ROWS = [{"a": n, "text": f"row {n}"} for n in range(500)]


def read(path: Path) -> list[Numbered]:
    with open_rows(examine(path)) as (rows, position):
        found = list(rows)
        assert position() == path.stat().st_size
    return found


@pytest.mark.parametrize("name", ["plain", "a.gz", "a.zst", "a.bz2"])
def test_compression_is_seen_from_the_content(name: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / name, ROWS).rename(tmp_path / "no-suffix.xyz")
    assert read(path) == list(enumerate(ROWS, 1))


@pytest.mark.parametrize("name", ["a.gz", "a.zst"])
def test_files_of_several_members(name: str, tmp_path: Path) -> None:
    first = write_lines(tmp_path / name, ROWS[:200]).read_bytes()
    path = write_lines(tmp_path / name, ROWS[200:])
    path.write_bytes(first + path.read_bytes())
    assert [row for _, row in read(path)] == ROWS


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(
        b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": NaN}\n{"a": "\\ud800"}\n{"a"\n7\n{"a": "\xff"}\n'
        b"{'a': (1, 'x')}\n{'a': f()}\n" + b"[" * 100_000 + b'\n{"a": ' + b"9" * 5000 + b"}"
    )
    found = read(path)
    assert [line for line, _ in found] == [1, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert found[0][1] == {"a": 1}
    assert found[6][1] == {"a": (1, "x")}
    faults = {n: row.reason.partition(":")[0] for n, row in found if isinstance(row, Fault)}
    not_json = dict.fromkeys((6, 10, 11, 12), "not JSON")
    assert faults == {**not_json, 7: "not a JSON object", 8: "not UTF-8"}


def test_csv_rows_of_several_lines_and_bad_ones(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(
        b'\n"a", b \n1,"two\r\nlines ""here"""\n\n2\n3,caf\xe9\n4,"x" y\n5,"never closed\n6,fine\n'
    )
    found = read(path)
    assert found[0] == (3, {"a": "1", "b": 'two\r\nlines "here"'})
    reasons = [(n, row.reason.partition(":")[0]) for n, row in found if isinstance(row, Fault)]
    assert reasons == [
        (6, "wrong number of fields"),
        (7, "not UTF-8"),
        (8, "not CSV"),
        (9, "not CSV"),
    ]
    assert found[-1] == (
        10,
        {"a": "6", "b": "fine"},
    )


def test_an_open_quotation_mark_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    good = "".join(f"{n},fine number {n}\n" for n in range(20_000))
    path.write_text('a,b\n"open,x\n' + good)
    found = read(path)
    assert isinstance(found[0][1], Fault)
    assert len(found) == 20_001
    assert found[-1] == (20_002, {"a": "19999", "b": "fine number 19999"})


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "f"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    assert read(path) == list(enumerate(ROWS, 1))
    with open_rows(examine(path), columns={"a", "not there"}) as (rows, _):
        assert next(rows) == (1, {"a": 0})
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match="cannot be read beyond line 0"):
        read(path)


def test_a_time_that_python_has_not(tmp_path: Path) -> None:
    path = tmp_path / "f"
    times = pa.array([0, 400_000_000_000], pa.timestamp("s"))
    pq.write_table(pa.table({"when": times}), path)
    with pytest.raises(DataError, match="cannot be read beyond line 0"):
        read(path)


def test_what_is_no_file_of_rows(tmp_path: Path) -> None:
    zipped, tarred = tmp_path / "z", tmp_path / "t"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("a.csv", "a,b\n")
    with tarfile.open(tarred, "w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a.csv"), io.BytesIO())
    bad = {
        b"": "the file is empty",
        b"\n \n": "the file is empty",
        b'[{"a": 1}]': "one JSON array; expected one JSON object a line",
        "a,b\n".encode("utf-16"): "its text is UTF-16",
        bytes(range(256)): "neither text nor Parquet",
        gzip.compress(b"a,b\n")[:-6]: r"cannot be read beyond line 0 \(Truncated",
    }
    for content, reason in bad.items():
        (tmp_path / "f").write_bytes(content)
        with pytest.raises(DataError, match=rf"f: .*{reason}"):
            examine(tmp_path / "f")
    with pytest.raises(DataError, match="a zip archive; unpack it first"):
        examine(zipped)
    with pytest.raises(DataError, match="a tar archive; unpack it first"):
        examine(tarred)
    with pytest.raises(DataError, match="no such file"):
        examine(tmp_path / "nowhere")
    with pytest.raises(DataError, match="not a file"):
        examine(tmp_path)


def test_no_rows_at_the_beginning(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_text("a,b\n")
    with pytest.raises(DataError, match=r"looks like CSV, but holds no rows$"):
        first_rows(examine(path))
    path.write_text("{nothing\n")
    with pytest.raises(DataError, match=r"JSON lines, but holds no rows .*\(line 1: not JSON"):
        first_rows(examine(path))
    path.write_text("a,a\n1,2\n")
    with pytest.raises(DataError, match="column 'a' is there twice"):
        first_rows(examine(path))


def test_a_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "LONGEST_LINE", 2**20)
    path = tmp_path / "f"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 2**20)
    with pytest.raises(DataError, match=r"f:2: a line longer than 1 MiB"):
        read(path)
