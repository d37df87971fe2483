"""The list of planted bugs is current: every right line stands in its file once, and every code of stages 2 and 3 has a bug."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.planted_bugs import BUGS, ROOT

CODES = {"B2", "B3", *(f"R{i}" for i in range(1, 8)), *(f"S{i}" for i in range(1, 5)), *(f"P{i}" for i in range(1, 13))}


@pytest.mark.parametrize("bug", BUGS, ids=lambda bug: f"{bug.code} {bug.breaks}")
def test_the_right_line_stands_there_once_and_the_wrong_one_differs(bug):
    assert (ROOT / bug.file).read_text(encoding="utf-8").count(bug.right) == 1
    assert bug.wrong != bug.right and bug.breaks
    assert f"_{bug.code}_" in (Path(__file__).parent / bug.test).read_text(encoding="utf-8") or not bug.code


def test_every_code_has_a_bug():
    assert {bug.code for bug in BUGS} >= CODES and len(BUGS) >= 30


@pytest.mark.slow
def test_a_sample_of_five_is_caught():
    done = subprocess.run([sys.executable, "-m", "tests.planted_bugs", "--sample", "5"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "5 of 5 caught", done.stdout[-3000:]
