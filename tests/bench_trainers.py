"""Stages 1 and 2 against TRL's own SFTTrainer and RewardTrainer on the same data: seconds an optimizer step takes.

    python -m tests.bench_trainers --run runs/quickstart [--steps 8] [--rounds 3] [--json]

Reads RUN/sft/model, RUN/data/demonstrations, RUN/data/preferences, and the settings in RUN/sft/config.yaml. Both sides start from the same
weights and learn from the same rows: the first ones of RUN that fill `--steps` optimizer steps of sft.batch_size demonstrations and of
reward.batch_size rankings. TRL has its defaults but for the batch, the microbatch and the precision, which are the run's; it knows pairs
alone, so it gets every pair of a ranking, as many a step as ours has on average. Sides take turns; reported are medians over the rounds of
the seconds a step takes (the first left out), by wall time and by this process's CPU time, and medians of the ratios.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path

import rlhf  # noqa: F401 - before torch: it decides how OpenMP's threads wait

# isort: split
import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback, TrainerCallback
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf.compute import start
from rlhf.config import Config, load_config
from rlhf.jsonl import read_jsonl
from rlhf.models import attention_kernel, init_reward_head, load_encoder, load_policy, load_reward_model
from rlhf.rankings import encode_rankings
from rlhf.trl_trainers import DemonstrationTrainer, RankingTrainer, Recipe

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, help="a run folder with finished stages up to collect")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps of each side and round")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    wanted = parser.parse_args()
    disable_progress_bars()
    config = load_config(str(Path(wanted.run) / "sft" / "config.yaml"), [f"run.dir={wanted.run}", "run.save_every=1000000"])
    accelerator = start(config)
    found = {}
    for name, sides in {"sft": sft_sides, "reward": reward_sides}.items():
        found[name] = compared(sides(config, accelerator, str(Path(wanted.run) / "sft" / "model"), wanted.steps), wanted.rounds)
        ours, theirs = found[name]["ours"], found[name]["trl"]
        print(f"{name}: TRL {theirs['wall']:.2f} s a step ({theirs['cpu']:.2f} s CPU), ours {ours['wall']:.2f} ({ours['cpu']:.2f}): "
              f"{found[name]['wall_ratio']:.2f} times as fast ({found[name]['cpu_ratio']:.2f} by CPU time)", flush=True)
    if wanted.json:
        print(json.dumps(found, indent=1))
    return 0


def compared(sides: dict[str, Callable], rounds: int) -> dict:
    """Medians of each side's {"wall", "cpu"} seconds a step, and of TRL's over ours."""
    runs: dict[str, list[dict]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, train in sides.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(timed(train(folder)))
    figures = {name: {clock: statistics.median(run[clock] for run in found) for clock in CLOCKS} for name, found in runs.items()}
    return figures | {f"{clock}_ratio": statistics.median(b[clock] / a[clock] for a, b in zip(runs["ours"], runs["trl"], strict=True))
                      for clock in CLOCKS}


class Clock(TrainerCallback):
    """Notes when each optimizer step ended."""

    def __init__(self):
        self.ends: list[dict[str, float]] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append({name: clock() for name, clock in CLOCKS.items()})


def timed(trainer) -> dict[str, float]:
    """Seconds a step of `trainer` takes, the first left out."""
    clock = Clock()
    trainer.add_callback(clock)
    if hasattr(trainer, "follow"):
        trainer.follow(types.SimpleNamespace(main=True, log=lambda step, **figures: None), 1, "bench")
        trainer.run()
    else:
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {name: (clock.ends[-1][name] - clock.ends[0][name]) / (len(clock.ends) - 1) for name in CLOCKS}


def trl_arguments(kind, accelerator, folder: str, steps: int, batch: int, microbatch: int):
    """TRL's defaults but for what is named."""
    return kind(output_dir=folder, max_steps=steps, per_device_train_batch_size=microbatch, gradient_accumulation_steps=batch // microbatch,
                bf16=accelerator.mixed_precision == "bf16", use_cpu=accelerator.device.type == "cpu", save_strategy="no", report_to=[],
                disable_tqdm=True)


def recipe(config: Config, section: str, steps: int, accelerator) -> Recipe:
    settings = getattr(config, section)
    return Recipe(section, steps, settings.batch_size, settings.microbatch, settings.lr, "linear", 0, accelerator.mixed_precision)


def first_rows(config: Config, kind: str, count: int) -> list[dict]:
    rows = list(itertools.islice(read_jsonl(Path(config.run.dir) / "data" / kind / "train.jsonl"), count))
    if len(rows) < count:
        raise SystemExit(f"{config.run.dir} has {len(rows)} training {kind}, and {count} are wanted; lower --steps")
    return rows


def answer(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


def sft_sides(config: Config, accelerator, sft: str, steps: int) -> dict[str, Callable]:
    """How each side makes its SFT trainer in a folder."""
    rows, encoder, batch = first_rows(config, "demonstrations", steps * config.sft.batch_size), load_encoder(sft), config.sft.batch_size
    pairs = [(encoder.prompt_ids(row["prompt"]), encoder.completion_ids(row["completion"])) for row in rows]
    texts = Dataset.from_list([{"prompt": row["prompt"], "completion": answer(row["completion"])} for row in rows])

    def ours(folder: str):
        policy = load_policy(sft, encoder, attention_kernel(config.model.attention, accelerator.device))
        return DemonstrationTrainer(policy, pairs, encoder, recipe(config, "sft", steps, accelerator), config.run, Path(folder))

    def trl(folder: str):
        return SFTTrainer(sft, args=trl_arguments(SFTConfig, accelerator, folder, steps, batch, config.sft.microbatch), train_dataset=texts,
                          processing_class=encoder.tokenizer)

    return {"ours": ours, "trl": trl}


def reward_sides(config: Config, accelerator, sft: str, steps: int) -> dict[str, Callable]:
    """How each side makes its reward trainer in a folder."""
    rows, encoder = first_rows(config, "preferences", steps * config.reward.batch_size), load_encoder(sft)
    made = encode_rankings(rows, encoder, config.data.max_prompt_tokens, config.data.max_completion_tokens, "drop")
    rankings = [row for row in made if isinstance(row, dict)]
    pairs = Dataset.from_list([
        {"prompt": row["prompt"], "chosen": answer(row["completions"][better]), "rejected": answer(row["completions"][worse])}
        for row in rows for better, worse in itertools.permutations(range(len(row["ranks"])), 2) if row["ranks"][better] < row["ranks"][worse]])
    microbatch = config.reward.microbatch
    batch = max(1, round(len(pairs) / steps / microbatch)) * microbatch

    def ours(folder: str):
        model = load_reward_model(sft, encoder, attention_kernel(config.model.attention, accelerator.device))
        model.config.use_cache = False
        init_reward_head(model, torch.Generator().manual_seed(0))
        return RankingTrainer(model, rankings, encoder, recipe(config, "reward", steps, accelerator), config.run, Path(folder))

    def trl(folder: str):
        return RewardTrainer(sft, args=trl_arguments(RewardConfig, accelerator, folder, steps, batch, microbatch), train_dataset=pairs,
                             processing_class=encoder.tokenizer)

    return {"ours": ours, "trl": trl}


if __name__ == "__main__":
    sys.exit(main())
