"""Proxy against gold along PPO training of several runs, as one small picture (Gao's curve, CANON E4; Coste, section 5).

    python -m tests.draw_over_optimisation configs/over-optimisation.svg "one reward model=runs/single" "worst of 3=runs/worst" ...

Reads RUN/ppo/metrics.jsonl of each run (figures on held-out prompts); prints the first, best and last ones as a table in Markdown.
"""

import sys
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from rlhf.jsonl import read_jsonl
from rlhf.report import by_rollouts_before

COLOURS = ("#b3422e", "#1f6f8b", "#5b7f3a", "#7d5ba6")
STYLE = {"svg.fonttype": "none", "svg.hashsalt": "rlhf", "font.size": 8, "axes.spines.top": False, "axes.spines.right": False,
         "legend.frameon": False}


def main(out: str, *named: str) -> int:
    runs = {}
    for words in named:
        label, _, folder = words.partition("=")
        rows = by_rollouts_before(list(read_jsonl(Path(folder) / "ppo" / "metrics.jsonl")))
        runs[label] = [row for row in rows if "eval_gold_mean" in row]
    draw(Path(out), runs)
    print("\n".join(table(runs)))
    return 0


def draw(out: Path, runs: dict[str, list[dict]]) -> None:
    """Proxy and gold over rollouts, side by side."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 2.3), layout="constrained")
        for axes, key, title in zip(figure.subplots(1, 2), ("eval_score_mean", "eval_gold_mean"), ("reward (proxy)", "gold score"), strict=True):
            for (label, rows), colour in zip(runs.items(), COLOURS, strict=False):
                axes.plot([row["step"] for row in rows], [row[key] for row in rows], color=colour, linewidth=1.3, label=label)
            axes.set_title(title, fontsize=8, loc="left")
            axes.set_xlabel("rollouts")
            axes.grid(alpha=0.2, linewidth=0.5)
        figure.axes[0].legend()
        figure.savefig(out, format="svg", metadata={"Date": None})


def table(runs: dict[str, list[dict]]) -> list[str]:
    lines = ["| reward | gold first / best / last | proxy first / last | KL last |", "|---|---|---|---|"]
    for label, rows in runs.items():
        gold, proxy = [row["eval_gold_mean"] for row in rows], [row["eval_score_mean"] for row in rows]
        best = rows[gold.index(max(gold))]["step"]
        lines.append(f"| {label} | {gold[0]:.3f} / {max(gold):.3f} after {best} / {gold[-1]:.3f} | {proxy[0]:.2f} / {proxy[-1]:.2f} "
                     f"| {rows[-1]['eval_kl']:.1f} |")
    return lines


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
