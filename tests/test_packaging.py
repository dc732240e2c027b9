"""What an installed package holds."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import r4r_graph

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from this checkout."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    [found] = out.glob("*.whl")
    return found


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == {"r4r_graph", "finetune"}
    templates = {path.name for path in (ROOT / "prompts").glob("*.jinja")}
    packed = {n.split("/")[-1] for n in names if n.startswith("r4r_graph/_prompts/")}
    assert packed == templates
    for needed in (
        "r4r_graph/py.typed",
        "r4r_graph/_demo/reviews.jsonl",
        "finetune/__init__.py",
        "finetune/recipes/smollm2-cpu.yaml",
    ):
        assert needed in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Prompts and sample come from inside the package."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = (
        "import r4r_graph, r4r_graph.prompts as p; from pathlib import Path;"
        "from langgraph.store.memory import InMemoryStore;"
        "from r4r_graph import Recommender, fake_engine;"
        f"home = Path({str(tmp_path)!r});"
        "assert Path(r4r_graph.__file__).is_relative_to(home), r4r_graph.__file__;"
        "assert p.prompts_dir() == home / 'r4r_graph' / '_prompts';"
        "r = Recommender.load(home / 'r4r_graph/_demo/reviews.jsonl', engine=fake_engine(),"
        " store=InMemoryStore());"
        "print(r.rate('mara', 'glass-harbour').rating)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert 1 <= float(done.stdout) <= 5


def test_nothing_pickled_is_read_and_no_remote_code_is_run() -> None:
    """A habit of this field's public code; a pickle runs whatever it holds."""
    banned = (
        "import pickle",
        "pickle.load",
        "read_pickle",
        "torch.load(",
        "trust_remote_code=True",
    )
    for package in ("r4r_graph", "finetune", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            text = path.read_text(encoding="utf-8")
            assert not [word for word in banned if word in text], path


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == r4r_graph.__version__
