"""Stage 3, ppo: the SFT model learns from the reward model's scores, held near where it started by a price on KL.

    python -m stages.ppo --config configs/quickstart.yaml [ppo.kl_coef=0.2 ...]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m stages.ppo

Reads RUN/data/prompts, RUN/sft/model, RUN/reward/model (or ppo.score, a callable). Leaves RUN/ppo/model and every rollout as text
(with ppo.ema_decay the model is the average, and RUN/ppo/model_last the last weights).
One step: sample completions; score them; old log-probabilities, reference log-probabilities and values in one pass over the rows; rewards
= -kl_coef·KL per token + score at the end; advantages by GAE, whitened; a few epochs of clipped updates. What is random follows from
(seed, step), so a resumed run goes on as if it had never stopped.
Simplified on purpose: every process holds the whole rollout (ids and a few floats a token), which makes one process and many the same.
"""

import copy
import sys
from pathlib import Path

import torch

from rlhf.alarms import ringing
from rlhf.checkpoints import load_checkpoint, save_checkpoint
from rlhf.cli import run_stage
from rlhf.comparison import distinct_n
from rlhf.compute import describe, my_share, peak_memory_mb, start
from rlhf.config import Config
from rlhf.errors import TrainingStopped
from rlhf.jsonl import read_jsonl, replacing_folder, write_jsonl
from rlhf.kl import adapted_kl_coef
from rlhf.memory import Microbatch
from rlhf.models import add_lora, attention_kernel, load_encoder, load_policy, save_model
from rlhf.optimizers import linear_lr, set_lr
from rlhf.passes import PolicyAndValue
from rlhf.ppo import MovingAverage, UpdateSettings, update
from rlhf.progress import Progress, say
from rlhf.prompts import gold_scores, load_prompts
from rlhf.rollout import Clock, evaluate_tokens, make_rollout, reference
from rlhf.runs import open_stage
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import CallableScorer, load_scorer, member_folders, with_missing_eos, with_mix
from rlhf.value import new_value_model, ppo_optimizer
from rlhf.workers import ALONE, workers_for

SKIPS_IN_A_ROW = 5  # rollouts without a single finite step after which the run stops


def main(config: Config, within: str = "", stage_name: str = "ppo") -> None:
    settings, run = config.ppo, Path(config.run.dir)
    parents = ("prepare", "sft") + (() if settings.score else (str(Path(within) / "reward"),))
    stage = open_stage(stage_name, config, parents=parents, within=within)
    if stage.done:
        say(f"ppo: already done in {stage.folder}")
        return
    accelerator = start(config)
    device, attention = accelerator.device, attention_kernel(config.model.attention, accelerator.device)
    encoder = load_encoder(str(run / "sft" / "model"))
    prompts = load_prompts(config.run.dir, "train", encoder, config.data.max_prompt_tokens)
    held_out = load_prompts(config.run.dir, "eval", encoder, config.data.max_prompt_tokens)[: settings.eval_prompts]

    policy = load_policy(str(run / "sft" / "model"), encoder, attention)
    ref_policy = None if config.model.lora_rank else load_policy(str(run / "sft" / "model"), encoder, attention).to(device).requires_grad_(False)
    policy = add_lora(policy, config.model.lora_rank, config.model.lora_alpha, "CAUSAL_LM")
    scorer, reward_folders = _scorer(config, run / within, attention, device)
    value_model = new_value_model(settings.value_model, policy, encoder, reward_folders, run / "sft" / "model", attention, config.model)
    model = PolicyAndValue(policy, value_model)
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, settings.lr, settings.value_lr))
    average = MovingAverage(policy, settings.ema_decay) if settings.ema_decay else None  # after prepare: on the weights' device
    if average is not None:
        accelerator.register_for_checkpointing(average)
    workers = ALONE if config.model.lora_rank else workers_for(accelerator, model)  # adapters are switched off for all threads at once
    ref_logprobs = reference(ref_policy, policy, settings.temperature, accelerator.autocast)
    ptx = _ptx_rows(config, encoder) if settings.ptx_coef else []
    _announce(config, accelerator, prompts)

    state = {"kl_coef": settings.kl_coef, "bad_rollouts": 0, **load_checkpoint(accelerator, stage)}
    stage.forget_after(state["step"])
    first, told, microbatch = _first_figures(stage), set(), Microbatch(settings.microbatch_tokens)

    def roll(rows, *seeds):
        """Samples, scores and evaluates `rows` (all processes together); returns the Rollout and its figures."""
        mine = my_share(accelerator, rows)
        uniforms_BC = draw_uniforms(len(rows), config.data.max_completion_tokens, config.seed, *seeds)
        with clock("sample"), accelerator.autocast():
            completions = sample(policy, [p.ids for p in mine], my_share(accelerator, uniforms_BC), encoder, settings.temperature, len(mine))
        with clock("score"), accelerator.autocast():
            scores_B = scorer([p.messages for p in mine], completions, encoder)
        scores_B = with_missing_eos(scores_B, [encoder.ended(c) for c in completions], settings.missing_eos_score)
        _check_finite(scores_B, mine)
        with clock("forward"), accelerator.autocast():
            pairs = [(p.ids, c) for p, c in zip(mine, completions, strict=True)]
            longest = max(len(p) + len(c) for p, c in pairs)
            tokens = microbatch.attempt(lambda budget: evaluate_tokens(
                model, ref_logprobs, pairs, encoder.pad_id, settings.temperature, budget, device, workers), longest, accelerator.num_processes)
        rollout = make_rollout(accelerator, [p.ids for p in mine], completions, scores_B, tokens, state["kl_coef"], settings.gamma, settings.lam,
                               settings.whiten_rewards)
        texts = [encoder.decode(c) for c in rollout.completions]
        gold = gold_scores(rows, texts)
        figures = rollout.statistics(encoder) | {"distinct_2": distinct_n(texts)} | ({} if gold is None else {"gold_mean": sum(gold) / len(gold)})
        return rollout, texts, gold, figures

    clock = Clock()
    with Progress("ppo", settings.rollouts, state["step"]) as bar:
        for step in range(state["step"], settings.rollouts):
            model.train()
            evaluation = _evaluation(roll(held_out, 0, 0)[3]) if step % settings.eval_every == 0 else {}
            clock.take()
            rows = _prompts_of_step(prompts, step, settings.batch_size, config.seed)
            rollout, texts, gold, figures = roll(rows, 1, step)
            lr = set_lr(optimizer, linear_lr(step, settings.rollouts))
            with clock("update"):
                figures |= update(accelerator, model, optimizer, rollout, _update_settings(settings, step), encoder.pad_id,
                                  seed=config.seed * 1_000_003 + step, ptx_rows=_ptx_of_step(ptx, step, settings.batch_size),
                                  after_step=average.step if average is not None else None, workers=workers, microbatch=microbatch,
                                  on_skip=lambda places, rows=rows, step=step: _tell_skip([rows[i].id for i in places], step + 1))
            first = first or figures
            alarms = ringing(figures, first)
            figures |= {"kl_coef": state["kl_coef"], "lr": lr * settings.lr, "alarms": len(alarms), **clock.take(), **evaluation}
            seconds = sum(v for k, v in figures.items() if k.startswith("seconds_"))
            real = sum(len(p) + len(c) for p, c in zip(rollout.prompts, rollout.completions, strict=True))
            stage.log(step + 1, **figures, seconds=seconds, tokens_per_second=real / seconds, peak_memory_mb=peak_memory_mb())
            if stage.main:
                write_jsonl(stage.folder / "rollouts" / f"{step + 1:05d}.jsonl", _as_text(rows, texts, rollout, gold))
            _tell(alarms, told, step + 1, settings.stop_on_alarm, stage)
            state = _next_state(state, figures, settings, stage)
            bar.update(step + 1, score=figures["score_mean"], kl=figures["kl"], length=figures["length_mean"], tokens_per_second=int(real / seconds))
            if (step + 1) % settings.save_every == 0 and step + 1 < settings.rollouts:
                save_checkpoint(accelerator, stage, step + 1, config.run.keep_checkpoints,
                                kl_coef=state["kl_coef"], bad_rollouts=state["bad_rollouts"])

    if average is not None:
        _save_last(stage, accelerator.unwrap_model(model).policy, encoder)
        average.copy_to_model()
    final = _evaluation(roll(held_out, 0, 0)[3])
    stage.log(settings.rollouts, **final)
    if stage.main:
        with replacing_folder(stage.model) as folder:
            save_model(accelerator.unwrap_model(model).policy, encoder, folder)
    say(f"ppo: on {len(held_out)} held-out prompts score {final['eval_score_mean']:.2f} at KL {final['eval_kl']:.1f} nats; model in {stage.model}")
    stage.finish(**final)


def _scorer(config: Config, within: Path, attention: str, device):
    """What scores completions, and the reward model folders that the value model may start from (none for a callable)."""
    settings = config.ppo
    if settings.score:
        folders, main = [], CallableScorer(settings.score)
    else:
        folders = member_folders(within / "reward", config.reward.members)
        main = load_scorer(folders, settings.ensemble, settings.uncertainty_coef, attention, device)
    return with_mix(main, settings.mix, attention, device), folders


def _announce(config: Config, accelerator, prompts) -> None:
    settings = config.ppo
    say(f"ppo: {describe(accelerator)}; {len(prompts):,} prompts")
    say(f"ppo: {settings.rollouts} rollouts x {settings.batch_size} completions, each {settings.epochs} epochs x {settings.minibatches} minibatches "
        f"of {settings.batch_size // settings.minibatches} = {settings.rollouts * settings.epochs * settings.minibatches} optimizer steps; "
        f"KL coefficient {settings.kl_coef}")


def _prompts_of_step(prompts: list, step: int, batch_size: int, seed: int) -> list:
    """The prompts of a rollout: consecutive in a permutation of all prompts drawn anew for every pass."""
    picked = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(place, len(prompts))
        if not picked or index == 0:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        picked.append(prompts[order[index]])
    return picked


def _save_last(stage, policy, encoder) -> None:
    """The last step's weights, beside the average that takes their place as the stage's model (CANON E1, P10)."""
    if stage.main:
        with replacing_folder(stage.folder / "model_last") as folder:
            # saving merges LoRA adapters for good, and these are still needed
            save_model(copy.deepcopy(policy) if hasattr(policy, "merge_and_unload") else policy, encoder, folder)


def _update_settings(settings, step: int) -> UpdateSettings:
    return UpdateSettings(
        epochs=settings.epochs, minibatches=settings.minibatches, microbatch_tokens=settings.microbatch_tokens, clip=settings.clip,
        value_clip=settings.value_clip, value_coef=settings.value_coef, policy_coef=0.0 if step < settings.warmup_rollouts else 1.0,
        ptx_coef=settings.ptx_coef, max_grad_norm=settings.max_grad_norm, target_kl=settings.target_kl, temperature=settings.temperature)


def _ptx_rows(config: Config, encoder) -> list[tuple[list[int], list[int]]]:
    """Demonstrations as (prompt, completion) ids for PPO-ptx."""
    rows = read_jsonl(Path(config.run.dir) / "data" / "demonstrations" / "train.jsonl")
    pairs = [(encoder.prompt_ids(r["prompt"]), encoder.completion_ids(r["completion"])) for r in rows]
    return [(p, c) for p, c in pairs if len(p) <= config.data.max_prompt_tokens and len(c) <= config.data.max_completion_tokens]


def _ptx_of_step(rows: list, step: int, count: int) -> list:
    return [rows[i % len(rows)] for i in range(step * count, (step + 1) * count)] if rows else []


def _check_finite(scores_B: torch.Tensor, prompts) -> None:
    """CANON A4: a score that is no number never becomes a reward. Raises TrainingStopped."""
    bad = [p.id for p, ok in zip(prompts, torch.isfinite(scores_B).tolist(), strict=True) if not ok]
    if bad:
        raise TrainingStopped(f"ppo: {len(bad)} scores are not finite, for prompt ids {', '.join(bad[:5])}; nothing was learned from them. "
                              "Look at the reward model or callable; the same command goes on from the last checkpoint")


def _next_state(state: dict, figures: dict, settings, stage) -> dict:
    """KL coefficient for the next rollout; stops a run whose steps are all left out. Raises TrainingStopped."""
    all_skipped = figures["skipped_steps"] == figures["epochs_run"] * settings.minibatches
    bad = state["bad_rollouts"] + 1 if all_skipped else 0
    if bad >= SKIPS_IN_A_ROW:
        raise TrainingStopped(f"ppo: no gradient was finite in {bad} rollouts in a row; the last good weights: {stage.checkpoints}; lower ppo.lr")
    kl_coef = state["kl_coef"]
    if settings.kl_target is not None:
        kl_coef = adapted_kl_coef(kl_coef, figures["kl"], settings.kl_target, settings.batch_size, settings.kl_horizon)
    return {**state, "kl_coef": kl_coef, "bad_rollouts": bad}


def _first_figures(stage) -> dict | None:
    """Figures of the run's first rollout, which alarms compare with; None before there is one."""
    path = stage.folder / "metrics.jsonl"
    rows = read_jsonl(path) if path.is_file() else ()
    return next((row for row in rows if "first_ratio_error" in row), None)


def _tell(alarms: list[tuple[str, str]], told: set[str], rollout: int, stop: bool, stage) -> None:
    """Says every alarm once; with `stop` the first one ends the run. Raises TrainingStopped."""
    for name, message in alarms:
        if name not in told:
            say(f"ppo: ALARM in rollout {rollout}: {message}")
        told.add(name)
    if alarms and stop:
        raise TrainingStopped(f"ppo: stopped in rollout {rollout} (ppo.stop_on_alarm): {alarms[0][1]}; the last good weights: {stage.checkpoints}")


def _tell_skip(prompt_ids: list[str], rollout: int) -> None:
    say(f"ppo: a step of rollout {rollout} was left out, its gradient was not finite; its prompts have the ids {', '.join(prompt_ids)}")


def _evaluation(figures: dict) -> dict:
    return {f"eval_{name}": figures[name] for name in ("score_mean", "gold_mean", "kl", "length_mean") if name in figures}


def _as_text(prompts, texts, rollout, gold):
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        yield {"prompt": prompt.text, "completion": text, "score": round(rollout.scores_B[i].item(), 4), "id": prompt.id,
               **({} if gold is None else {"gold": gold[i]})}


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
