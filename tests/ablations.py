"""One line of stage 3 changed at a time (CANON P6-P11), each from the same SFT and reward model: what it does to gold, KL and the alignment tax.

    python -m tests.ablations --run runs/quickstart --out runs/ablations [--only ptx ema]

Reads the finished stages of RUN up to reward. Each variant is a run folder OUT/NAME that shares them and has a ppo and a compare stage of its
own; finished ones are not run again. Prints a table in Markdown: the policy against SFT, and the gold score of the world's tasks with no,
one and four solved examples in front, less SFT's (rlhf/in_context.py).
"""

import argparse
import json
import sys
from pathlib import Path

from rlhf.config import Config, load_config
from rlhf.jsonl import read_jsonl
from stages import compare, ppo

SHARED = ("data", "prepare", "pretrain", "sft", "collect", "reward")
SHOTS = (0, 1, 4)
VARIANTS = {
    "base": [],
    "score": ["ppo.likelihood_coef=0"],
    "rate": ["ppo.last_norm_lr=null"],
    "ptx": ["ppo.ptx_coef=0.5"],
    "ema": ["ppo.ema_decay=0.95"],  # of 112 policy steps: the canon's 0.992 would still be half the SFT model
    "adaptive": ["ppo.kl_target=2.0", "ppo.kl_horizon=1000"],  # the canon's 10,000 completions are more than the run has
    "shared": ["ppo.value_model=shared"],
    "epochs": ["ppo.epochs=4"],
    "stop": ["ppo.epochs=4", "ppo.target_kl=0.0005"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run folder with finished stages up to reward")
    parser.add_argument("--out", required=True, help="where the variants' run folders go")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="these variants alone")
    wanted = parser.parse_args()
    rows = []
    for name in wanted.only:
        folder = Path(wanted.out).resolve() / name
        share(Path(wanted.run).resolve(), folder)
        policies = ["sft", "ppo", *(["ppo_last"] if name == "ema" else [])]
        config = load_config(None, [f"run.dir={folder}", f"compare.policies={policies}", f"compare.shots={list(SHOTS)}", "compare.shot_tasks=500",
                                    *VARIANTS[name]])
        ppo.main(config)
        compare.main(config)
        rows += lines(name, config, folder)
    print("\n".join([*head(), *rows]))
    return 0


def share(run: Path, folder: Path) -> None:
    """OUT/NAME with the stages of RUN that all variants have in common, as links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in SHARED:
        if (run / name).is_dir() and not (folder / name).exists():
            (folder / name).symlink_to(run / name)


def head() -> list[str]:
    heads = ["variant", "settings", "policy", "win rate by gold", "gold", "KL", *(f"{k} shots" for k in SHOTS), "epochs a rollout", "last KL price"]
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]


def lines(name: str, config: Config, folder: Path) -> list[str]:
    """A row of the table for each policy of a variant that was compared with SFT."""
    summary = json.loads((folder / "compare" / "summary.json").read_text(encoding="utf-8"))
    steps = [row for row in read_jsonl(folder / "ppo" / "metrics.jsonl") if "epochs_run" in row]
    found = []
    for row in summary["comparisons"]:
        if row["b"] != "sft" or row["a"] == "sft":
            continue
        figures, (low, high) = summary["policies"][row["a"]], row["ci95"]
        shots = {r["shots"]: r for r in summary["in_context"]["rows"] if r["policy"] == row["a"]}
        taxes = [f"{shots[k]['against_sft']:+.3f} ({shots[k]['ci95'][0]:+.3f} to {shots[k]['ci95'][1]:+.3f})" for k in SHOTS]
        cells = [name, " ".join(VARIANTS[name]) or "the quickstart's", row["a"], f"{row['win_rate']:.3f} ({low:.3f}-{high:.3f})",
                 f"{figures['gold_mean']:.3f}", f"{figures['kl_mean']:.2f}", *taxes, f"{sum(s['epochs_run'] for s in steps) / len(steps):.1f}",
                 f"{steps[-1]['kl_coef']:.3f}"]
        found.append(f"| {' | '.join(cells)} |")
    return found


if __name__ == "__main__":
    sys.exit(main())
