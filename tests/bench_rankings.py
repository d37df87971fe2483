"""K-way rankings against exploded pairs (CANON R4): how fast, and how right on held-out prompts, with the same model and the same pairs.

    python -m tests.bench_rankings --run runs/quickstart [--k 4 9] [--prompts 640] [--rounds 3]

Reads RUN/sft/model and RUN/data/prompts. K different answers of the SFT model to each prompt are ranked by the embedded world's raters. Both
ways learn from these rankings in one epoch with our trainer: K-way, a prompt is one element and each answer goes through the model once;
exploded, each pair is an element of its own two rows. A step holds the same pairs and a microbatch the same number of rows either way,
so the two differ in nothing but the rows computed: C(K, 2) pairs of two rows against K rows, K - 1 times as many. Runs take turns;
reported are medians of the seconds a step takes (the first left out), by wall time and by this process's CPU time, which other programs
disturb less.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

import rlhf  # noqa: F401 - before torch: it decides how OpenMP's threads wait

# isort: split
import torch

from rlhf import world
from rlhf.compute import start
from rlhf.config import Config, load_config
from rlhf.models import init_reward_head, load_encoder, load_policy, load_reward_model
from rlhf.prompts import load_prompts
from rlhf.rankings import encode_rankings, evaluate_rankings
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import raw_scores
from rlhf.trl_trainers import RankingTrainer, Recipe, count_steps

BATCH = 32  # prompts in an optimizer step
DRAWS = 3  # times K answers are drawn, of which the first K that differ are ranked
ATTENTION = "eager"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run folder with a finished sft stage")
    parser.add_argument("--k", type=int, nargs="+", default=[4, 9], help="answers a prompt")
    parser.add_argument("--prompts", type=int, default=640, help="training prompts")
    parser.add_argument("--held-out", type=int, default=300, help="held-out prompts")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each way, each with a seed of its own")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    wanted = parser.parse_args()
    config = load_config(None, [f"run.dir={wanted.run}", "run.save_every=1000000"])
    accelerator = start(config)
    found = {k: compare(config, accelerator, k, wanted) for k in wanted.k}
    if wanted.json:
        print(json.dumps(found, indent=1))
    return 0


def compare(config: Config, accelerator, k: int, wanted) -> dict:
    """Medians of both ways, their ratios, and accuracies, for one K; prints them."""
    sft = str(Path(config.run.dir) / "sft" / "model")
    encoder = load_encoder(sft)
    rows = {split: rankings_of(config, accelerator, sft, encoder, k, split, count)
            for split, count in (("train", wanted.prompts), ("eval", wanted.held_out))}
    ways = {"k_way": (rows["train"], BATCH), "exploded": (exploded(rows["train"]), BATCH * k * (k - 1) // 2)}
    found = {name: [] for name in ways}
    for seed in range(wanted.rounds):
        for name, (data, batch) in ways.items():
            rows_at_once = BATCH * k // len(data[0]["completions"])
            found[name].append(train(config, sft, encoder, data, batch, rows_at_once, seed, rows["eval"], accelerator))
    figures = {name: {key: statistics.median(run[key] for run in runs) for key in runs[0]} for name, runs in found.items()}
    figures |= {f"{clock}_ratio": statistics.median(b[clock] / a[clock] for a, b in zip(found["k_way"], found["exploded"], strict=True))
                for clock in ("wall", "cpu")}
    print(f"K = {k}, {len(rows['train'])} prompts, {wanted.rounds} rounds: exploded pairs take {figures['wall_ratio']:.2f} times as long "
          f"({figures['cpu_ratio']:.2f} by CPU time)")
    for name in ways:
        one = figures[name]
        print(f"  {name}: {one['wall']:.2f} s a step ({one['cpu']:.2f} s CPU), right on {one['accuracy']:.3f} of held-out pairs, "
              f"{one['noise_free']:.3f} by noise-free labels")
    for key in ("accuracy", "noise_free"):
        gains = [a[key] - b[key] for a, b in zip(found["k_way"], found["exploded"], strict=True)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        figures[f"{key}_gain"] = [statistics.mean(gains), error]
        print(f"  {key} of K-way less that of exploded pairs, mean over rounds and its standard error: {statistics.mean(gains):+.4f} +- {error:.4f}",
              flush=True)
    return figures


def rankings_of(config: Config, accelerator, sft: str, encoder, k: int, split: str, count: int) -> list[dict]:
    """Encoded rankings of `k` different SFT answers to each prompt, as many as have them; ranks by noisy raters."""
    prompts = load_prompts(config.run.dir, split, encoder, config.data.max_prompt_tokens)[:count]
    policy = load_policy(sft, encoder, ATTENTION).eval()
    repeated = [p.ids for p in prompts for _ in range(DRAWS * k)]
    uniforms_BC = draw_uniforms(len(repeated), config.data.max_completion_tokens, config.seed, 2, k, split)
    with accelerator.autocast():
        texts = [encoder.decode(ids) for ids in sample(policy, repeated, uniforms_BC, encoder, 1.0, config.collect.batch_size)]
    answers = [list(dict.fromkeys(texts[i : i + DRAWS * k]))[:k] for i in range(0, len(texts), DRAWS * k)]
    rows = [{"prompt": p.messages, "completions": a, "gold": [world.gold_score(p.text, c) for c in a]}
            for p, a in zip(prompts, answers, strict=True) if len(a) == k]
    beta, rng = world.calibrate_beta([row["gold"] for row in rows], config.world.agreement), random.Random(f"{k} {split}")
    for row in rows:
        row["ranks"] = world.rank(row["gold"], beta, rng)
    made = encode_rankings(rows, encoder, config.data.max_prompt_tokens, config.data.max_completion_tokens, "drop")
    return [row for row in made if isinstance(row, dict)]


def exploded(rows: list[dict]) -> list[dict]:
    """Each pair of a prompt's answers as a ranking of its own."""
    return [{**row, "completions": [row["completions"][i], row["completions"][j]], "ranks": [row["ranks"][i], row["ranks"][j]], "gold": None}
            for row in rows for i, j in itertools.combinations(range(len(row["ranks"])), 2)]


def train(config: Config, sft: str, encoder, data: list[dict], batch: int, rows_at_once: int, seed: int, held_out: list[dict], accelerator) -> dict:
    """One epoch: seconds of wall and CPU time a step, and accuracy on held-out rankings."""
    reward_model = load_reward_model(sft, encoder, ATTENTION)
    reward_model.config.use_cache = False
    init_reward_head(reward_model, torch.Generator().manual_seed(seed))
    recipe = Recipe("reward", count_steps(len(data), batch, 1), batch, rows_at_once, config.reward.lr, "linear", seed,
                    accelerator.mixed_precision)
    ends = []
    with tempfile.TemporaryDirectory() as folder:
        trainer = RankingTrainer(reward_model, data, encoder, recipe, config.run, Path(folder))
        stage = types.SimpleNamespace(main=True, log=lambda step, **figures: ends.append((time.perf_counter(), time.process_time())))
        trainer.follow(stage, 1, "bench")
        trainer.run()
    wall, cpu = ((last - first) / (len(ends) - 1) for first, last in zip(ends[0], ends[-1], strict=True))
    answers = [row["prompt"] + c for row in held_out for c in row["completions"]]
    with accelerator.autocast():
        scores = raw_scores(reward_model.eval(), answers, encoder.pad_id).split([len(row["completions"]) for row in held_out])
    measured = evaluate_rankings(held_out, [part.tolist() for part in scores])
    return {"wall": wall, "cpu": cpu, "accuracy": measured["accuracy"], "noise_free": measured["noise_free_accuracy"]}


if __name__ == "__main__":
    sys.exit(main())
