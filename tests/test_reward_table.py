"""The table of reward models: the figures of metrics.json, in their cells."""

import json

from tests import reward_table


def test_figures_stand_in_their_cells(tmp_path, capsys):
    found = {"pairs": 1200, "accuracy": 0.6512, "ci95": [0.577, 0.719], "longer_wins_accuracy": 0.613, "bag_of_words_accuracy": 0.6,
             "by_margin": [{"accuracy": 0.46}, {"accuracy": 0.85}], "calibration": [{"predicted": 0.55, "observed": 0.5, "pairs": 9}]}
    for name, changes in (("one", {}), ("two", {"bag_of_words_accuracy": None})):
        (tmp_path / name / "reward").mkdir(parents=True)
        (tmp_path / name / "reward" / "metrics.json").write_text(json.dumps({"eval": {**found, **changes}}))
    reward_table.main([str(tmp_path / "one"), str(tmp_path / "two")])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| one | 1,200 | 0.651 (0.577-0.719) | 0.613 | 0.600 | 0.46, 0.85 | 0.55 / 0.50 (9) |"
    assert "too few prompts" in lines[3] and all(line.count("|") == len(reward_table.HEADS) + 1 for line in lines)
