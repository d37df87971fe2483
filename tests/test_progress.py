"""What a person sees while a stage runs."""

import os
import re
import sys

import pytest

from rlhf import progress

FIGURES = {"score": 0.482, "kl": 0.164, "length": 16.8, "tokens_per_second": 8573}


def test_one_thing_is_said_in_the_singular():
    assert [progress.counted(n, "step") for n in (0, 1, 2, 1234)] == ["0 steps", "1 step", "2 steps", "1,234 steps"]
    assert [progress.counted(n, "minibatch") for n in (1, 4)] == ["1 minibatch", "4 minibatches"]


def shown(monkeypatch, capsys, columns, step=15, figures=FIGURES):
    """What the bar of a terminal of so many columns shows, without what moves the cursor."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((columns, 24)))
    monkeypatch.delenv(progress.QUIET, raising=False)
    with progress.Progress("ppo", 30) as bar:
        bar.update(step, **figures)
    return capsys.readouterr().out.removeprefix("\r\033[K").removesuffix("\n")


def test_a_wide_terminal_gets_the_whole_bar_and_every_figure(monkeypatch, capsys):
    line = shown(monkeypatch, capsys, 120)
    assert line == "[##########..........] ppo 15/30  0:00<0:00  score 0.482  kl 0.164  length 16.8  tokens/s 8,573"


@pytest.mark.parametrize("columns", [80, 79, 72, 60, 45])
def test_a_narrow_terminal_still_gets_time_left_and_tokens_a_second_and_no_figure_is_cut(monkeypatch, capsys, columns):
    line = shown(monkeypatch, capsys, columns)
    assert len(line) < columns  # in the last column some terminals begin a new line
    parts = re.sub(r"^\[[#.]+\] ", "", line).split("  ")
    assert parts[:2] == ["ppo 15/30", "0:00<0:00"] and parts[-1] == "tokens/s 8,573"
    assert set(parts[2:]) <= {"score 0.482", "kl 0.164", "length 16.8", "tokens/s 8,573"}


def test_the_bar_shrinks_before_a_figure_goes(monkeypatch, capsys):
    # the figures take 72 of the 79 columns that may be used; brackets and a space three of the other seven
    assert shown(monkeypatch, capsys, 80) == "[##..] ppo 15/30  0:00<0:00  score 0.482  kl 0.164  length 16.8  tokens/s 8,573"
    assert shown(monkeypatch, capsys, 80, step=30).startswith("[####] ppo 30/30")


def test_a_terminal_without_room_gets_what_fits(monkeypatch, capsys):
    assert shown(monkeypatch, capsys, 12) == "ppo 15/30  "


def test_elsewhere_lines_are_plain_and_whole(monkeypatch, capsys):
    monkeypatch.delenv(progress.QUIET, raising=False)
    with progress.Progress("ppo", 30) as bar:
        bar.update(30, **FIGURES)
    assert capsys.readouterr().out == "ppo 30/30  0:00<0:00  score 0.482  kl 0.164  length 16.8  tokens/s 8,573\n"
