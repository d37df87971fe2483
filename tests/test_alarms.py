"""Alarms of a PPO run: each rings at its own figure, for its own reason, and nothing rings in a healthy run."""

import types
from pathlib import Path

import pytest

from rlhf.alarms import ALARMS, history, ringing
from rlhf.errors import TrainingStopped
from stages import ppo

FIRST = {"first_ratio_error": 0.1, "first_ratio_drift": 0.01, "entropy": 1.0, "eos_rate": 0.99, "distinct_2": 0.5, "kl": 0.0,
         "length_mean": 20.0, "skipped_steps": 0, "score_std": 1.0}
HEALTHY = {"first_ratio_error": 0.3, "first_ratio_drift": 0.03, "entropy": 0.4, "eos_rate": 1.0, "distinct_2": 0.4, "kl": 6.0,
           "length_mean": 24.0, "skipped_steps": 0, "score_std": 0.4}


def test_nothing_rings_in_a_healthy_run():
    assert ringing(FIRST, FIRST) == [] == ringing(HEALTHY, FIRST)


@pytest.mark.parametrize(("name", "value"), [
    ("first_ratio_error", 1.1), ("first_ratio_drift", 0.06), ("entropy", 0.09), ("eos_rate", 0.78), ("distinct_2", 0.19), ("kl", 25.1),
    ("length_mean", 41.0), ("length_mean", 9.0), ("skipped_steps", 1), ("score_std", 0.0)])
def test_each_alarm_rings_alone_and_says_what_to_change(name, value):
    [(rang, message)] = ringing(HEALTHY | {name: value}, FIRST)
    assert rang == name
    assert next(a.advice for a in ALARMS if a.name == name) in message and "{" not in message


@pytest.mark.parametrize(("name", "value"), [
    ("entropy", 0.1), ("eos_rate", 0.99 - 0.2), ("distinct_2", 0.4 * 0.5), ("length_mean", 10.0), ("length_mean", 40.0)])
def test_a_figure_at_its_limit_rings_nothing(name, value):
    assert ringing(HEALTHY | {name: value}, FIRST) == []


def test_what_it_was_at_the_start_is_said():
    [(_, message)] = ringing(HEALTHY | {"length_mean": 9.0}, FIRST | {"length_mean": 24.0})
    assert "(9 tokens on average, 24 at the start)" in message


def test_a_run_in_which_no_answer_ends_is_told_from_its_first_rollout_on():
    """Nothing got worse, but all answers have one score: as with data.max_completion_tokens below what the SFT model writes."""
    cut = FIRST | {"eos_rate": 0.0, "score_std": 0.0}
    assert [name for name, _ in ringing(cut, cut)] == ["score_std", "eos_rate"]
    assert ringing(FIRST | {"eos_rate": 0.15}, FIRST | {"eos_rate": 0.3}) == []


def test_every_alarm_is_tried_above():
    assert {a.name for a in ALARMS} == set(HEALTHY)


def test_A2_kl_before_anything_was_learned_rings_in_the_first_rollout_alone():
    started_off = FIRST | {"kl": 0.01}
    assert [name for name, _ in ringing(started_off, started_off)] == ["kl_at_start"]
    assert ringing(FIRST | {"kl": 0.01}, FIRST) == []


def test_figures_that_are_no_numbers_ring_nothing():
    assert ringing(HEALTHY | {"entropy": None}, FIRST) == [] == ringing(HEALTHY, FIRST | {"distinct_2": None})
    nothing_known = dict.fromkeys(FIRST)
    assert ringing(nothing_known, nothing_known) == []
    unknown_kl = FIRST | {"kl": None}
    assert history([{"step": 1, **unknown_kl}]) == []


def test_history_counts_rollouts_and_names_the_first():
    rows = [{"step": 1, **FIRST}, {"step": 2, **HEALTHY, "kl": 30.0}, {"step": 3, **HEALTHY, "kl": 40.0}, {"step": 3, "eval_kl": 99.0}]
    [told] = history(rows)
    assert told.startswith("Alarm in 2 of 3 rollouts, first in rollout 2: the policy is far from the SFT model (KL 30 nats")
    assert history(rows[:1]) == [] == history([])


def test_the_stage_says_an_alarm_once_and_stops_only_when_asked(capsys):
    stage, told = types.SimpleNamespace(checkpoints=Path("RUN/ppo/checkpoints")), set()
    for rollout in (4, 5):
        ppo._tell([("kl", "too far; raise it")], told, rollout, False, stage)
    assert capsys.readouterr().out == "ppo: ALARM in rollout 4: too far; raise it\n"
    ppo._tell([], told, 6, True, stage)
    with pytest.raises(TrainingStopped, match="rollout 7 .*too far; raise it; the last good weights: RUN/ppo/checkpoints"):
        ppo._tell([("kl", "too far; raise it")], told, 7, True, stage)
