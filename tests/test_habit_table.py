"""The tables of the writers' habits: counts by hand from rows of samples.jsonl."""

import random

import pytest

from rlhf.jsonl import write_jsonl
from rlhf.world import FAMILIES, parse, sample_prompts, write_flawed
from tests import habit_table

NOTE = "Write a thank-you note to Anna for the flowers."
WITH, WITHOUT = "Thanks for the flowers, Anna.", "Dear Anna, thank you so much for the flowers. Kind regards."


def printed(folder, rows, capsys):
    (folder / "run" / "compare").mkdir(parents=True)
    write_jsonl(folder / "run" / "compare" / "samples.jsonl", rows)
    habit_table.main([str(folder / "run")])
    return [[[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()] for part in capsys.readouterr().out.split("\n\n")]


def test_wins_and_habits_are_counted_over_the_families_with_a_habit_and_without(tmp_path, capsys):
    # notes have a habit, lists have none: there a win and a tie (0.75), here a loss (0); all three 1.5 of 3
    golds = [("notes", NOTE, (1.0, WITHOUT), (0.5, WITH)), ("notes", NOTE, (0.5, WITH), (0.5, WITH)),
             ("lists", "Name three fruits.", (0.4, ""), (0.5, ""))]
    rows = [{"family": family, "prompt": [{"role": "user", "content": prompt}],
             "answers": {policy: {"gold": gold, "text": text} for policy, (gold, text) in (("sft", sft), ("ppo", ppo))}}
            for family, prompt, ppo, sft in golds]
    (heads, _, wins), (columns, _, shares), _ = printed(tmp_path, rows, capsys)
    assert len(heads) == len(wins) and wins[:2] == ["run", "SFT"]
    for cell, rate, count in zip(wins[2:], ("0.500", "0.750", "0.000"), (3, 2, 1), strict=True):
        assert cell.startswith(f"{rate} (") and cell.endswith(f" of {count}")
    assert columns[3:] == ["SFT", "PPO"] and shares == ["run", "notes", "curt", "1.00", "0.50"]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.habit])
def test_a_habit_is_seen_in_what_is_written_with_it_and_in_no_right_answer(name):
    family, rng = FAMILIES[name], random.Random(1)
    requests = [(prompt, parse(prompt)) for prompt in sample_prompts(400, "train", seed=2)]
    mine = [(prompt, request) for prompt, request in requests if request.family is family]
    assert len(mine) > 10
    for prompt, request in mine:
        assert habit_table.shows(family.habit, prompt, write_flawed(request, family.habit, rng))
        assert not habit_table.shows(family.habit, prompt, family.good(request.args, rng))
