"""Stage 2a, collect: several answers of the SFT model to each prompt, ranked by raters. Skipped when data.preferences is given.

    python -m stages.collect --config configs/quickstart.yaml [collect.k=4]

Reads RUN/data/prompts, RUN/sft/model (or a later policy, in the second and later rounds of stages.pipeline). Leaves
RUN/data/preferences/{train,eval}.jsonl: K answers a prompt with ranks. The raters are those of the embedded world: each ranks by the gold
score with Bradley-Terry noise, set so that two of them agree on world.agreement of the pairs; one rater ranks a prompt.
Answers are kept as they come, so that a run that was stopped goes on behind the last whole batch of prompts.
Rows carry the gold scores beside the ranks, for the reward model's evaluation on noise-free labels alone.
"""

import random
import sys
from pathlib import Path

from rlhf import world
from rlhf.cli import run_stage
from rlhf.compute import describe, gather_rows, share, start
from rlhf.config import Config
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl, write_jsonl
from rlhf.models import attention_kernel, load_encoder, load_policy
from rlhf.progress import Progress, say
from rlhf.prompts import Prompt, load_prompts
from rlhf.runs import open_stage
from rlhf.sampling import draw_uniforms, sample
from rlhf.workers import workers_for


def main(config: Config, number: int | None = None) -> None:
    settings, run, number = config.collect, Path(config.run.dir), number or config.pipeline.rounds
    within = "" if number == config.pipeline.rounds else f"round_{number}"
    policy = "sft" if number == 1 else f"round_{number - 1}/ppo"
    stage = open_stage("collect", config, parents=("prepare", policy), within=within)
    if stage.done:
        say(f"collect: already done in {stage.folder}")
        return
    if config.data.preferences:
        say("collect: skipped, data.preferences is given")
        stage.finish(skipped=True)
        return
    if not config.uses_world:
        raise InputError("collect: the embedded raters only rank answers to the embedded world's prompts; set data.preferences to your rankings")
    accelerator = start(config)
    source = str(run / policy / "model")
    encoder = load_encoder(source, config.model.trust_remote_code)
    model = load_policy(source, encoder, attention_kernel(config.model.attention, accelerator.device), config.model.trust_remote_code)
    model = model.to(accelerator.device).eval()
    asked = _prompts(config, encoder, number)
    say(f"collect: {describe(accelerator)}; {len(asked['train']):,} + {len(asked['eval']):,} prompts x {settings.k} answers of {policy}")
    answered = {split: (prompts, _answers(config, accelerator, model, encoder, prompts, side, number, stage.checkpoints / split))
                for side, (split, prompts) in enumerate(asked.items())}
    if stage.main:
        earlier = [run / f"round_{n}" for n in range(1, number)]
        stage.finish(**_rank(config, answered, run / within, earlier, number))


def _prompts(config: Config, encoder, number: int) -> dict[str, list[Prompt]]:
    """The prompts of round `number`: training prompts that no earlier round asked, and always the same held-out ones.

    Raises InputError, in the first round already, where they do not last for all rounds.
    """
    train, held_out = (load_prompts(config.run.dir, split, encoder, config.data.max_prompt_tokens) for split in ("train", "eval"))
    each, rounds = config.collect.prompts, config.pipeline.rounds
    if each * (rounds - 1) >= len(train):
        raise InputError(f"collect: found {len(train):,} training prompts, which collect.prompts={each} uses up before the last of "
                         f"pipeline.rounds={rounds}; lower either, or give more prompts (world.prompts in another run.dir)")
    return {"train": train[each * (number - 1) : each * number], "eval": held_out[: config.collect.eval_prompts]}


def _answers(config: Config, accelerator, model, encoder, prompts: list[Prompt], side: int, number: int, kept: Path) -> list[list[str]]:
    """K sampled answers to each prompt, in the order of `prompts`, on every process; batches that a stopped run left in `kept` are read."""
    k, chunk = config.collect.k, max(1, config.collect.batch_size // config.collect.k)
    answers = [row["answers"] for batch in sorted(kept.glob("*.jsonl")) for row in read_jsonl(batch)]
    workers = workers_for(accelerator, model)
    with Progress("collect", len(prompts), len(answers)) as bar:
        for start_at in range(len(answers), len(prompts), chunk):
            rows = [p.ids for p in prompts[start_at : start_at + chunk] for _ in range(k)]
            uniforms_BC = draw_uniforms(len(rows), config.data.max_completion_tokens, config.seed, 2, number, side, start_at)
            places = share(accelerator, list(range(len(rows))))
            with accelerator.autocast():
                ids = sample(model, [rows[i] for i in places], uniforms_BC[places], encoder, config.collect.temperature, max(1, len(places)),
                             workers)
            texts = gather_rows(accelerator, [encoder.decode(c) for c in ids])
            batch = [texts[i : i + k] for i in range(0, len(texts), k)]
            if accelerator.is_main_process:
                write_jsonl(kept / f"{start_at:09d}.jsonl", ({"answers": a} for a in batch))
            answers += batch
            bar.update(min(start_at + chunk, len(prompts)))
    return answers


def _rank(config: Config, answered: dict, folder: Path, earlier: list[Path], number: int) -> dict:
    """Ranks by one noisy rater a prompt, written out behind those of earlier rounds; returns what DONE says.

    Equal answers to a prompt are shown to the rater once, and a prompt whose answers are all equal teaches nothing.
    """
    rng = random.Random(f"{config.seed} raters {number}")
    rows = {split: [_row(p, a) for p, a in zip(*pair, strict=True) if len(set(a)) > 1] for split, pair in answered.items()}
    beta = world.calibrate_beta([row["gold"] for row in rows["train"]], config.world.agreement)
    agreement = []
    for split, ready in rows.items():
        for row in ready:
            row["ranks"] = world.rank(row["gold"], beta, rng)
            agreement.append(world.agreement(row["ranks"], world.rank(row["gold"], beta, rng)))
        before = [old for place in earlier for old in read_jsonl(place / "data" / "preferences" / f"{split}.jsonl")]
        write_jsonl(folder / "data" / "preferences" / f"{split}.jsonl", before + ready)
    measured = sum(agreement) / len(agreement)
    gold = [g for row in rows["train"] for g in row["gold"]]
    say(f"collect: {len(rows['train']):,} + {len(rows['eval']):,} rankings; mean gold {sum(gold) / len(gold):.3f}; "
        f"two raters agree on {measured:.1%} of the pairs")
    return {"beta": beta, "agreement": measured, "gold_mean": sum(gold) / len(gold), "rankings": {s: len(r) for s, r in rows.items()}}


def _row(prompt: Prompt, answers: list[str]) -> dict:
    completions = list(dict.fromkeys(answers))
    return {"prompt": prompt.messages, "id": prompt.id, "family": prompt.family, "completions": completions, "ranks": [],
            "gold": [world.gold_score(prompt.text, c) for c in completions]}


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
