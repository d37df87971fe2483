"""PPO against the other policies of finished comparisons, over all prompts and apart by whether the writers of the family have a habit.

    python -m tests.habit_table runs/quickstart

Reads RUN/compare/samples.jsonl of the embedded world; prints Markdown: win rates of PPO by gold (ties one half) with 95 % intervals.
"""

import sys
from pathlib import Path

from rlhf.comparison import label, win_rate
from rlhf.jsonl import read_jsonl
from rlhf.world import FAMILIES

HEADS = ("run", "PPO against", "all prompts", "families with a habit", "without")


def lines(name: str, samples: list[dict]) -> list[tuple[str, ...]]:
    """The cells of one run, a row for each policy beside PPO; rows as in samples.jsonl."""
    habit = [FAMILIES[row["family"]].habit is not None for row in samples]
    return [(name, label(other), *(_cell(samples, other, [has in wanted for has in habit]) for wanted in ((True, False), (True,), (False,))))
            for other in samples[0]["answers"] if other != "ppo"]


def _cell(samples: list[dict], other: str, chosen: list[bool]) -> str:
    rows = [row["answers"] for row, here in zip(samples, chosen, strict=True) if here]
    if not rows:
        return "–"
    found = win_rate([answers["ppo"]["gold"] for answers in rows], [answers[other]["gold"] for answers in rows])
    return f"{found.win_rate:.3f} ({found.ci95[0]:.3f}-{found.ci95[1]:.3f}) of {len(rows)}"


def main(runs: list[str]) -> None:
    found = [cells for run in runs for cells in lines(Path(run).name, list(read_jsonl(Path(run) / "compare" / "samples.jsonl")))]
    for cells in (HEADS, ("---",) * len(HEADS), *found):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
