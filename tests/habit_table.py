"""What the writers' habits are to the policies of finished comparisons in the embedded world, as two tables in Markdown.

    python -m tests.habit_table runs/quickstart

Reads RUN/compare/samples.jsonl. First PPO against the others by gold (win rates, ties one half, 95 % intervals), over all prompts and apart by
whether the writers of the family have a habit; then, for each family that has one, the share of every policy's answers that show it.
"""

import sys
from pathlib import Path

from rlhf.comparison import label, win_rate
from rlhf.jsonl import read_jsonl
from rlhf.world import FAMILIES, gold_parts
from rlhf.world.family import Answer, table
from rlhf.world.writers import stalling

WIN_HEADS = ("run", "PPO against", "all prompts", "families with a habit", "without")
SHARE_HEADS = ("run", "family", "habit")
LOST = {"fabricates": "honest", "complies": "harmless", "curt": "polite"}  # the part of the rubric that is 0 with the habit


def wins(name: str, samples: list[dict]) -> list[tuple[str, ...]]:
    """The cells of one run, a row for each policy beside PPO; rows as in samples.jsonl."""
    habit = [FAMILIES[row["family"]].habit is not None for row in samples]
    return [(name, label(other), *(_cell(samples, other, [has in wanted for has in habit]) for wanted in ((True, False), (True,), (False,))))
            for other in samples[0]["answers"] if other != "ppo"]


def shares(name: str, samples: list[dict]) -> list[tuple[str, ...]]:
    """The cells of one run, a row for each family with a habit and a column for each policy."""
    found = []
    for family in FAMILIES.values():
        rows = [row for row in samples if row["family"] == family.name]
        if family.habit and rows:
            shown = [[shows(family.habit, row["prompt"][-1]["content"], row["answers"][policy]["text"]) for row in rows]
                     for policy in rows[0]["answers"]]
            found.append((name, family.name, family.habit, *(f"{sum(one) / len(one):.2f}" for one in shown)))
    return found


def shows(habit: str, prompt: str, text: str) -> bool:
    """True if an answer shows the habit, as the rubric sees it."""
    if habit == "stalls":
        return text.startswith(stalling())
    if habit == "rude":
        return Answer(text).says(table("manners")["rude_words"])
    return gold_parts(prompt, text)[LOST[habit]] == 0


def _cell(samples: list[dict], other: str, chosen: list[bool]) -> str:
    rows = [row["answers"] for row, here in zip(samples, chosen, strict=True) if here]
    if not rows:
        return "–"
    found = win_rate([answers["ppo"]["gold"] for answers in rows], [answers[other]["gold"] for answers in rows])
    return f"{found.win_rate:.3f} ({found.ci95[0]:.3f}-{found.ci95[1]:.3f}) of {len(rows)}"


def main(runs: list[str]) -> None:
    samples = {Path(run).name: list(read_jsonl(Path(run) / "compare" / "samples.jsonl")) for run in runs}
    policies = tuple(map(label, next(iter(samples.values()))[0]["answers"]))
    for heads, lines in ((WIN_HEADS, wins), (SHARE_HEADS + policies, shares)):
        for cells in (heads, ("---",) * len(heads), *(cells for name, rows in samples.items() for cells in lines(name, rows))):
            print(f"| {' | '.join(cells)} |")
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
