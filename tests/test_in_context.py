"""In-context learning (CANON E6): what the examples are, how answers are graded, and the summary by hand."""

import math
import random

import pytest

from rlhf import world
from rlhf.in_context import Task, draw_tasks, in_context_scores, summarise_in_context, tasks_that_fit
from rlhf.sampling import draw_uniforms

TASKS = draw_tasks(45, 4, seed=3)


def test_E6_examples_are_training_prompts_of_the_same_family_with_right_answers():
    for task in TASKS:
        family = world.parse(task.prompt).family
        assert world.split_of(task.prompt) == "test" and len(task.examples) == 4
        for prompt, answer in task.examples:
            assert world.parse(prompt).family is family and world.split_of(prompt) == "train"
            assert world.gold_score(prompt, answer) == 1.0
    assert {world.family_of(task.prompt) for task in TASKS} == set(world.FAMILIES)


@pytest.mark.parametrize("seed", range(4))
def test_E6_no_example_gives_the_answer_away(seed):
    for task in TASKS:
        prompts = [task.prompt, *(prompt for prompt, _ in world.solved_examples(task.prompt, 12, random.Random(seed)))]
        requests = [world.parse(prompt) for prompt in prompts]
        assert len({request.family.key(request.args) for request in requests}) == 13


def test_E6_tasks_follow_from_the_seed():
    assert TASKS == draw_tasks(45, 4, seed=3) != draw_tasks(45, 4, seed=4)


def test_E6_what_a_family_cannot_show_is_refused():
    with pytest.raises(ValueError, match="not a prompt of the embedded world"):
        world.solved_examples("Who are you?", 1, random.Random(1))
    with pytest.raises(ValueError, match="has not 90000 other arguments"):
        world.solved_examples(TASKS[0].prompt, 90000, random.Random(1))


def test_E6_shots_are_earlier_turns():
    task = Task("Q3", [("Q1", "A1"), ("Q2", "A2")])
    assert task.messages(0) == [{"role": "user", "content": "Q3"}]
    turns = [("user", "Q1"), ("assistant", "A1"), ("user", "Q2"), ("assistant", "A2"), ("user", "Q3")]
    assert task.messages(2) == [{"role": role, "content": text} for role, text in turns]
    assert task.messages(1) == task.messages(2)[:2] + task.messages(0)


def test_E6_tasks_that_do_not_fit_are_left_out_for_every_number_of_shots(tiny_encoder):
    lengths = [len(tiny_encoder.prompt_ids(t.messages(4))) for t in TASKS]
    room = sorted(lengths)[20]
    assert tasks_that_fit(TASKS, tiny_encoder, room) == [t for t, n in zip(TASKS, lengths) if n <= room]
    assert tasks_that_fit(TASKS, tiny_encoder, None) == TASKS


def test_E6_grades_are_those_of_the_world(monkeypatch, tiny_encoder):
    """The sampler is replaced by one that answers every other task well: what is graded is the answer to the task's own prompt."""
    asked = []

    def well_every_second(policy, prompts, uniforms_BC, encoder, temperature, batch_size, workers):
        asked.append(prompts)
        good = [world.parse(t.prompt).family.good(world.parse(t.prompt).args, random.Random(1)) for t in TASKS]
        return [encoder.completion_ids(text if i % 2 else "seven purple") for i, text in enumerate(good)]

    monkeypatch.setattr("rlhf.in_context.sample", well_every_second)
    grades = in_context_scores(None, TASKS, 2, tiny_encoder, None, 1.0, 8)
    assert asked == [[tiny_encoder.prompt_ids(t.messages(2)) for t in TASKS]]
    assert all(g["gold"] == 1.0 for g in grades[1::2]) and all(g["gold"] < 0.6 for g in grades[::2])
    for task, grade in zip(TASKS, grades):
        without = world.family_of(task.prompt) in ("harm", "invented")  # they are graded by refusing and by honesty
        assert (grade["correct"] is None) == without


def test_E6_any_policy_answers(tiny_policy, tiny_encoder):
    tasks = TASKS[:6]
    uniforms_BC = draw_uniforms(6, 8, 1)
    grades = [in_context_scores(tiny_policy, tasks, shots, tiny_encoder, uniforms_BC, 1.0, 4) for shots in (0, 2)]
    assert all(0 <= g["gold"] <= 1 for row in grades for g in row)
    again = in_context_scores(tiny_policy, tasks, 2, tiny_encoder, uniforms_BC, 1.0, 6)
    assert again == grades[1]


def test_E6_summary_by_hand():
    def grades(gold, correct):
        return [{"gold": g, "correct": c} for g, c in zip(gold, correct)]

    scores = {"sft": {0: grades([0.2, 0.4, 0.6], [1.0, 0.0, None]), 1: grades([1.0, 1.0, 1.0], [1.0, 1.0, None])},
              "ppo": {0: grades([0.5, 0.4, 0.9], [1.0, 1.0, None]), 1: grades([0.0, 1.0, 0.5], [None, None, None])}}
    found = summarise_in_context(scores)
    assert found["tasks"] == 3
    sft0, sft1, ppo0, ppo1 = found["rows"]
    assert sft0 == pytest.approx({"policy": "sft", "shots": 0, "gold_mean": 0.4, "correct_mean": 0.5})
    assert "against_sft" not in sft1 and ppo1["correct_mean"] is None
    assert (ppo0["policy"], ppo0["shots"], ppo0["gold_mean"]) == ("ppo", 0, pytest.approx(0.6))
    assert ppo0["against_sft"] == pytest.approx(0.2)  # the differences are 0.3, 0 and 0.3: variance 0.03
    assert ppo0["ci95"] == pytest.approx([0.2 - 1.959964 * math.sqrt(0.03 / 3), 0.2 + 1.959964 * math.sqrt(0.03 / 3)], abs=1e-6)
    assert ppo1["against_sft"] == pytest.approx(-0.5)
    assert summarise_in_context({"ppo": scores["ppo"]})["rows"][0].keys() == {"policy", "shots", "gold_mean", "correct_mean"}


def test_E6_one_task_alone_has_the_widest_interval():
    one = {name: {0: [{"gold": gold, "correct": None}]} for name, gold in (("sft", 0.5), ("ppo", 0.7))}
    assert summarise_in_context(one)["rows"][1]["ci95"] == [-1.0, 1.0]
