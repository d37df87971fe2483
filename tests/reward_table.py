"""Reward models of several runs side by side, as Markdown for configs/EXPERIMENTS.md.

    python -m tests.reward_table runs/helpful runs/harmless runs/oasst

Reads RUN/reward/metrics.json: held-out accuracy with its interval, the two rules that understand nothing, accuracy from the least to the most
certain fifth of the pairs, and calibration: the preference that the scores predict against the share observed.
"""

import json
import sys
from pathlib import Path

HEADS = ("run", "pairs", "right", "longer wins", "bag of words", "right by margin, five equal parts", "calibration: predicted / observed (pairs)")


def line(name: str, found: dict) -> tuple[str, ...]:
    """The cells of one run from the `eval` part of its metrics.json."""
    low, high = found["ci95"]
    words = found["bag_of_words_accuracy"]
    return (name, f"{found['pairs']:,}", f"{found['accuracy']:.3f} ({low:.3f}-{high:.3f})", f"{found['longer_wins_accuracy']:.3f}",
            "too few prompts" if words is None else f"{words:.3f}", ", ".join(f"{part['accuracy']:.2f}" for part in found["by_margin"]),
            ", ".join(f"{part['predicted']:.2f} / {part['observed']:.2f} ({part['pairs']})" for part in found["calibration"]))


def main(runs: list[str]) -> None:
    lines = [line(Path(run).name, json.loads((Path(run) / "reward" / "metrics.json").read_text(encoding="utf-8"))["eval"]) for run in runs]
    for cells in (HEADS, ("---",) * len(HEADS), *lines):
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
