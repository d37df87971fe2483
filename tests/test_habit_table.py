"""The table of PPO's wins by habit: counts by hand from rows of samples.jsonl."""

from rlhf.jsonl import write_jsonl
from tests import habit_table


def test_wins_are_counted_over_the_families_with_a_habit_and_without(tmp_path, capsys):
    # harm has a habit, lists have none: there a win and a tie (0.75), here a loss (0); all three 1.5 of 3
    golds = [("harm", 1.0, 0.0), ("harm", 1.0, 1.0), ("lists", 0.4, 0.5)]
    rows = [{"family": family, "answers": {"sft": {"gold": sft}, "ppo": {"gold": ppo}}} for family, ppo, sft in golds]
    (tmp_path / "run" / "compare").mkdir(parents=True)
    write_jsonl(tmp_path / "run" / "compare" / "samples.jsonl", rows)
    habit_table.main([str(tmp_path / "run")])
    heads, _, line = capsys.readouterr().out.splitlines()
    run, other, everything, habit, without = [cell.strip() for cell in line.strip("|").split("|")]
    assert heads.count("|") == line.count("|") and (run, other) == ("run", "SFT")
    assert everything.startswith("0.500 (") and everything.endswith(" of 3")
    assert habit.startswith("0.750 (") and habit.endswith(" of 2")
    assert without.startswith("0.000 (") and without.endswith(" of 1")
