"""A plain install: the wheel carries configs, data and assets, and everything runs from another folder."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import rlhf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that holds what `pip install` of this checkout would put into site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(pip, check=True, timeout=120)
    (wheel,) = folder.glob("rlhf-*.whl")
    assert wheel.name.startswith(f"rlhf-{rlhf.__version__}-py3-none-any")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, cwd: Path, *words: str) -> subprocess.CompletedProcess:
    """Python with the installed copy first on its path, started in another folder."""
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, env=environment)


def test_the_wheel_holds_what_ships_and_nothing_else(installed):
    held = {p.relative_to(installed).as_posix() for p in installed.rglob("*") if p.is_file()}
    for folder in ("configs", "data"):
        here = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file() and "__pycache__" not in p.parts}
        assert {f"rlhf/_shipped/{name}" for name in here} <= held
    code = {p.relative_to(ROOT).as_posix() for top in ("rlhf", "stages") for p in (ROOT / top).rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert code <= held
    assert {name.split("/")[0] for name in held} == {"rlhf", "stages", f"rlhf-{rlhf.__version__}.dist-info"}


def test_the_console_script_is_the_command_line(installed):
    (entry_points,) = installed.glob("*.dist-info/entry_points.txt")
    assert re.search(r"^rlhf = rlhf\.cli:main$", entry_points.read_text(encoding="utf-8"), re.M)


def test_commands_run_from_another_folder(installed, tmp_path):
    where = run(installed, tmp_path, "-c", "import rlhf, stages; print(rlhf.__file__, stages.__file__)")
    assert where.stdout.count(str(installed)) == 2
    helped = run(installed, tmp_path, "-m", "rlhf", "--help")
    assert helped.returncode == 0 and "pipeline" in helped.stdout
    prepare = run(installed, tmp_path, "-m", "rlhf", "prepare", "--help")
    assert prepare.returncode == 0 and "run.dir=" in prepare.stdout, prepare.stderr


def test_the_embedded_world_runs_from_another_folder(installed, tmp_path):
    done = run(installed, tmp_path, "-m", "rlhf", "prepare", "--config", "configs/tiny.yaml", "run.dir=mine")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine" / "data" / "prompts" / "test.jsonl").stat().st_size > 0
    unknown = run(installed, tmp_path, "-m", "stages.prepare", "--config", "configs/none.yaml")
    assert unknown.returncode == 2 and "configs/quickstart.yaml" in unknown.stderr


def test_the_code_keeps_to_python_3_10():
    """Newer syntax would only fail on somebody else's machine: the oldest supported grammar parses every file."""
    import ast

    for file in sorted(p for top in ("rlhf", "stages", "tests") for p in (ROOT / top).rglob("*.py")):
        ast.parse(file.read_text(encoding="utf-8"), feature_version=(3, 10))
