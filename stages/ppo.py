"""Stage 3, ppo: the SFT model learns from the reward model's scores, held near where it started by a price on KL.

    python -m stages.ppo --config configs/quickstart.yaml [ppo.kl_coef=0.1]
    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m stages.ppo

Reads RUN/data/prompts, RUN/sft/model, RUN/reward/model (or ppo.score, a callable). Leaves RUN/ppo/model and every rollout as text; with
ppo.ema_decay the model is the average, and RUN/ppo/model_last the last weights; where an evaluation on held-out prompts liked earlier weights
better, those are in RUN/ppo/best (ppo.hand_over=best: as RUN/ppo/model).
One step: sample completions; score them; old log-probabilities, reference log-probabilities and values in one pass over the rows; rewards
= -kl_coef·KL per token (+ likelihood_coef·reference log-probability) + score at the end; advantages by GAE, whitened; a few epochs of
clipped updates. What is random follows from (seed, step), so a resumed run goes on as if it had never stopped.
Simplified on purpose: every process holds the whole rollout (ids and a few floats a token), which makes one process and many the same.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf.alarms import ringing
from rlhf.checkpoints import load_checkpoint, save_checkpoint
from rlhf.cli import run_stage
from rlhf.comparison import distinct_n
from rlhf.compute import describe, peak_memory_mb, sharded, start
from rlhf.config import Config
from rlhf.encoded import demonstrations, write_drops
from rlhf.errors import SKIPS_IN_A_ROW, InputError, TrainingStopped
from rlhf.jsonl import read_jsonl, replacing_folder, write_jsonl
from rlhf.kl import adapted_kl_coef
from rlhf.learner import Learner
from rlhf.models import load_encoder, save_model
from rlhf.optimizers import linear_lr, set_lr
from rlhf.ppo import MovingAverage
from rlhf.progress import Progress, counted, say
from rlhf.prompts import gold_scores, load_prompts, prompts_of_step
from rlhf.runs import open_stage
from rlhf.sharding import full_weights

CARRIED = ("kl_coef", "bad_rollouts", "best_objective", "best_rollout")  # from one rollout to the next, through checkpoints too


def main(config: Config, within: str = "", stage_name: str = "ppo") -> None:
    settings, run = config.ppo, Path(config.run.dir)
    parents = ("prepare", "sft") + (() if settings.score else (str(Path(within) / "reward"),))
    stage = open_stage(stage_name, config, parents=parents, within=within)
    if stage.done:
        say(f"ppo: already done in {stage.folder}")
        return
    accelerator = start(config)
    if sharded(accelerator):
        _check_shares(settings, accelerator.num_processes)
    encoder = load_encoder(str(run / "sft" / "model"), config.model.trust_remote_code)
    prompts, all_held_out = (load_prompts(config.run.dir, split, encoder, config.data.max_prompt_tokens) for split in ("train", "eval"))
    held_out = all_held_out.some(settings.eval_prompts)

    learner = Learner(config, accelerator, encoder, within)
    model, optimizer = learner.model, learner.optimizer
    average = MovingAverage(learner.policy, settings.ema_decay) if settings.ema_decay else None  # after prepare: on the weights' device
    best = MovingAverage(learner.policy, 0.0)  # takes the weights as they are when an evaluation is the best so far
    kept = {"best": best} | ({} if average is None else {"average": average})
    ptx = demonstrations(run / "data" / "demonstrations" / "train.jsonl", encoder, config.data.max_prompt_tokens,
                         config.data.max_completion_tokens) if settings.ptx_coef else []
    _announce(config, accelerator, prompts)

    state = {"kl_coef": settings.kl_coef, "bad_rollouts": 0, "best_objective": -math.inf, "best_rollout": 0}
    state |= load_checkpoint(accelerator, stage, kept)
    stage.forget_after(state["step"])
    accelerator.wait_for_everyone()  # before the others read what the main process has cut
    first, told = _first_figures(stage), set()

    def roll(rows, *seeds):
        """The rollout of `rows` (all processes together), its completions as text, their gold scores, and its figures."""
        rollout = learner.roll(rows, state["kl_coef"], *seeds)
        texts = [encoder.decode(c) for c in rollout.completions]
        gold = gold_scores(rows, texts)
        figures = rollout.statistics(encoder) | {"distinct_2": distinct_n(texts)} | ({} if gold is None else {"gold_mean": sum(gold) / len(gold)})
        return rollout, texts, gold, figures

    def evaluate(rollouts: int) -> dict:
        """Held-out figures after so many rollouts; keeps the weights if they are the best so far by what PPO maximises."""
        figures = _evaluation(roll(held_out, 0, 0)[3])
        objective = figures["eval_score_mean"] - settings.kl_coef * figures["eval_kl"] + settings.likelihood_coef * figures["eval_likelihood"]
        figures["eval_objective"] = objective
        if objective > state["best_objective"]:
            best.step()
            state.update(best_objective=objective, best_rollout=rollouts)
        return figures

    def save(place: Path) -> None:
        """The policy as it is now, from the main process."""
        weights = full_weights(learner.policy, keep=stage.main)
        if stage.main:
            with replacing_folder(place) as folder:
                save_model(learner.policy_to_save(), encoder, folder, weights)

    with Progress("ppo", settings.rollouts, state["step"]) as bar:
        for step in range(state["step"], settings.rollouts):
            model.train()
            evaluation = evaluate(step) if step % settings.eval_every == 0 else {}
            learner.clock.take()
            rows = prompts_of_step(prompts, step, settings.batch_size, config.seed)
            rollout, texts, gold, figures = roll(rows, 1, step)
            # A shared trunk would move with the value loss, and Adam makes whole steps of small gradients
            lr = set_lr(optimizer, linear_lr(step, settings.rollouts), still="policy" if step < settings.warmup_rollouts else None)
            figures |= learner.learn(rollout, step, ptx_rows=_ptx_of_step(ptx, step, settings.batch_size),
                                     after_step=average.step if average is not None else None,
                                     on_skip=lambda places, rows=rows, step=step: _tell_skip([rows[i].id for i in places], step + 1))
            first = first or figures
            alarms = ringing(figures, first)
            figures |= {"kl_coef": state["kl_coef"], "lr": lr * settings.lr, "alarms": len(alarms), **learner.clock.take(), **evaluation}
            seconds = sum(v for k, v in figures.items() if k.startswith("seconds_"))
            speed = rollout.tokens / seconds
            stage.log(step + 1, **figures, seconds=seconds, tokens_per_second=speed, peak_memory_mb=peak_memory_mb())
            if stage.main:
                write_jsonl(stage.folder / "rollouts" / f"{step + 1:05d}.jsonl", _as_text(rows, texts, rollout, gold))
            _tell(alarms, told, step + 1, settings.stop_on_alarm, stage)
            state = _next_state(state, figures, settings, stage, [row.id for row in rows])
            bar.update(step + 1, score=figures["score_mean"], kl=figures["kl"], length=figures["length_mean"], tokens_per_second=int(speed))
            if (step + 1) % settings.save_every == 0 and step + 1 < settings.rollouts:
                save_checkpoint(accelerator, stage, step + 1, config.run.keep_checkpoints, kept, **{name: state[name] for name in CARRIED})

    if average is not None:
        save(stage.folder / "model_last")  # CANON E1, P10: the average takes their place as the stage's model
        average.copy_to_model()
    final = evaluate(settings.rollouts)
    stage.log(settings.rollouts, **final)
    if settings.hand_over == "best":
        best.copy_to_model()
    save(stage.model)
    if settings.hand_over == "last" and state["best_rollout"] < settings.rollouts:
        best.copy_to_model()
        save(stage.folder / "best")
    say(f"ppo: on {len(held_out)} held-out prompts score {final['eval_score_mean']:.2f} at KL {final['eval_kl']:.1f} nats; model in {stage.model}")
    say(f"ppo: what PPO maximises (score, KL and likelihood at their prices) is {final['eval_objective']:.2f} on them at the end, at best "
        f"{state['best_objective']:.2f} after {state['best_rollout']} of {settings.rollouts} rollouts; handed over: the {settings.hand_over}")
    if stage.main:
        write_drops(stage.folder, {"prompts/train.jsonl": prompts, "prompts/eval.jsonl": all_held_out})
    stage.finish(**final, best_objective=state["best_objective"], best_rollout=state["best_rollout"], handed_over=settings.hand_over)


def _check_shares(settings, processes: int) -> None:
    """InputError where processes that hold a sharded model, and wait for each other in every pass, would make different numbers of them."""
    if settings.batch_size // settings.minibatches % processes:
        raise InputError(f"ppo.batch_size={settings.batch_size} / ppo.minibatches={settings.minibatches}: found minibatches that "
                         f"{processes} processes cannot share equally, as those must that hold a sharded model; change one of them")
    if settings.ptx_coef and settings.batch_size % (settings.epochs * settings.minibatches * processes):  # as many demonstrations as completions
        raise InputError(f"ppo.batch_size={settings.batch_size} / (ppo.epochs={settings.epochs} x ppo.minibatches={settings.minibatches}): found "
                         f"demonstrations of a step (ppo.ptx_coef={settings.ptx_coef}) that {processes} processes cannot share equally, as those "
                         "must that hold a sharded model; change one of them")


def _announce(config: Config, accelerator, prompts) -> None:
    settings = config.ppo
    say(f"ppo: {describe(accelerator)}; {len(prompts):,} prompts")
    say(f"ppo: {counted(settings.rollouts, 'rollout')} x {counted(settings.batch_size, 'completion')}, each {counted(settings.epochs, 'epoch')} x "
        f"{counted(settings.minibatches, 'minibatch')} of {settings.batch_size // settings.minibatches} = "
        f"{counted(settings.rollouts * settings.epochs * settings.minibatches, 'optimizer step')}; "
        f"KL coefficient {settings.kl_coef}" + (f", likelihood coefficient {settings.likelihood_coef}" if settings.likelihood_coef else ""))


def _ptx_of_step(rows: Sequence, step: int, count: int) -> list:
    return [rows[i % len(rows)] for i in range(step * count, (step + 1) * count)] if rows else []


def _next_state(state: dict, figures: dict, settings, stage, prompt_ids: list[str]) -> dict:
    """KL coefficient for the next rollout; stops a run whose steps are all left out and names the last prompts. Raises TrainingStopped."""
    all_skipped = figures["skipped_steps"] == figures["epochs_run"] * settings.minibatches
    bad = state["bad_rollouts"] + 1 if all_skipped else 0
    if bad >= min(SKIPS_IN_A_ROW, settings.rollouts):
        raise TrainingStopped(f"ppo: no loss and gradient were finite in {bad} rollouts in a row; the last one's prompts have the ids "
                              f"{', '.join(prompt_ids)}; the last good weights: {stage.checkpoints}; lower ppo.lr")
    kl_coef = state["kl_coef"]
    if settings.kl_target is not None and math.isfinite(figures["kl"]):
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
    say(f"ppo: a step of rollout {rollout} was left out, its loss or gradient was not finite; its prompts have the ids {', '.join(prompt_ids)}")


def _evaluation(figures: dict) -> dict:
    return {f"eval_{name}": figures[name] for name in ("score_mean", "gold_mean", "kl", "likelihood", "length_mean") if name in figures}


def _as_text(prompts, texts, rollout, gold):
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        yield {"prompt": prompt.text, "completion": text, "score": round(rollout.scores_B[i].item(), 4), "id": prompt.id,
               **({} if gold is None else {"gold": gold[i]}), **({"before": prompt.messages[:-1]} if prompt.messages[1:] else {})}


if __name__ == "__main__":
    sys.exit(run_stage(main, __doc__))
