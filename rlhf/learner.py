"""What stage 3 steps with, and the two halves of a step: a rollout, and learning from it. stages/ppo.py trains with it, rlhf/bench.py times it.

`roll` and `learn` are called by all processes together; the seconds of their phases stand in `clock`.
"""

import functools
import math
from pathlib import Path

import torch

from rlhf.compute import my_share, sharded, synchronize
from rlhf.config import Config
from rlhf.encoding import Encoder
from rlhf.errors import TrainingStopped
from rlhf.memory import Microbatch, trim
from rlhf.models import add_lora, attention_kernel, compile_blocks, hold_for_products, load_policy, share_equal
from rlhf.passes import PolicyAndValue, make_rows
from rlhf.ppo import UpdateSettings, update
from rlhf.prompts import Prompt
from rlhf.rollout import Clock, Rollout, evaluate_tokens, make_rollout, reference, shift_to_returns
from rlhf.sampling import draw_uniforms, sample
from rlhf.scoring import CallableScorer, RewardModelScorer, Scorer, load_scorer, member_folders, with_missing_eos, with_mix
from rlhf.sharding import whole
from rlhf.value import new_value_model, ppo_optimizer
from rlhf.workers import ALONE, Workers, small, workers_for

SCORED_AT_ONCE = 2  # microbatches of tokens: nothing is kept for a backward pass
SAMPLED_AT_ONCE = 16  # microbatches of tokens: of a sampled row keys and values are kept, of a trained one what every layer did


class Learner:
    """Policy, value model, reference, scorer and optimizer of a run whose earlier stages are finished (its reward model in RUN/`within`)."""

    def __init__(self, config: Config, accelerator, encoder: Encoder, within: str = ""):
        settings, sft, trust = config.ppo, Path(config.run.dir) / "sft" / "model", config.model.trust_remote_code
        device, attention = accelerator.device, attention_kernel(config.model.attention, accelerator.device)
        self.config, self.accelerator, self.encoder = config, accelerator, encoder
        self._load_sft = functools.partial(load_policy, str(sft), encoder, attention, trust)
        self.policy = self._new_policy().to(device)
        ref_policy = None if config.model.lora_rank else self._load_sft().to(device).requires_grad_(False)
        with accelerator.autocast():  # what is frozen is held in its precision; the passes below are all under it
            self.scorer, reward_folders = scorer_of(config, Path(config.run.dir) / within, attention, device,
                                                    workers_for(accelerator, self.policy))
            value_model = new_value_model(settings.value_model, self.policy, encoder, reward_folders, sft, attention, config.model).to(device)
            for part in (self.policy, ref_policy, value_model.trunk):
                if part is not None:
                    hold_for_products(part)
                    compile_blocks(part, config.model.compile)
        if config.model.lora_rank and value_model.trunk is not None and isinstance(self.scorer, RewardModelScorer):
            share_equal(value_model.trunk, self.scorer.model)
        model = PolicyAndValue(self.policy, value_model)
        self.model, self.optimizer = accelerator.prepare(model, ppo_optimizer(model, settings.lr, settings.value_lr, settings.last_norm_lr))
        if sharded(accelerator):
            _call_once(self.model, encoder, device)
        # Adapters are switched off for all threads at once
        self.workers = ALONE if config.model.lora_rank else workers_for(accelerator, self.model)
        self.ref_logprobs = reference(ref_policy, self.policy, settings.temperature, accelerator.autocast)
        self.microbatch, self.clock = Microbatch(settings.microbatch_tokens), Clock()

    def _new_policy(self):
        """The SFT model in fp32, with fresh adapters where the run has LoRA."""
        return add_lora(self._load_sft(), self.config.model.lora_rank, self.config.model.lora_alpha, "CAUSAL_LM")

    def policy_to_save(self):
        """The policy; one with LoRA as a copy in fp32, whose adapters saving may merge for good."""
        if not self.config.model.lora_rank:
            return self.policy
        copy, trained = self._new_policy(), {name: p for name, p in self.policy.named_parameters() if p.requires_grad}
        copy.load_state_dict({name: p.detach().cpu() for name, p in trained.items()}, strict=False)
        return copy

    def roll(self, rows: list[Prompt], kl_coef: float, *seeds) -> Rollout:
        """Samples, scores and evaluates `rows`. Raises TrainingStopped for a score that is no number."""
        settings, accelerator, encoder = self.config.ppo, self.accelerator, self.encoder
        mine = my_share(accelerator, rows)
        room = self.config.data.max_completion_tokens
        uniforms_BC = draw_uniforms(len(rows), room, self.config.seed, *seeds)
        longest = max(len(p.ids) for p in mine) + room
        with whole(self.model), self.clock("sample"), accelerator.autocast():
            completions = self.microbatch.attempt(lambda tokens: sample(
                self.policy, [p.ids for p in mine], my_share(accelerator, uniforms_BC), encoder, settings.temperature,
                max(1, SAMPLED_AT_ONCE * tokens // longest), self.workers), -(-longest // SAMPLED_AT_ONCE), sharded(accelerator))  # down to one row
        if not small(self.model):  # its step would take 7 % longer, for little memory (configs/EXPERIMENTS.md)
            trim()  # of the keys and values of all rows
        with self.clock("score"), accelerator.autocast():
            scores_B = self.scorer([p.messages for p in mine], completions, encoder)
        scores_B = with_missing_eos(scores_B, [encoder.ended(c) for c in completions], settings.missing_eos_score)
        with whole(self.model), self.clock("forward"), accelerator.autocast():
            pairs = [(p.ids, c) for p, c in zip(mine, completions, strict=True)]
            longest = max(len(p) + len(c) for p, c in pairs)
            tokens = self.microbatch.attempt(lambda budget: evaluate_tokens(
                self.model, self.ref_logprobs, pairs, encoder.pad_id, settings.temperature, budget, accelerator.device, self.workers),
                longest, sharded(accelerator))
        rollout = make_rollout(accelerator, [p.ids for p in mine], completions, scores_B, tokens, kl_coef, settings.gamma, settings.lam,
                               settings.whiten_rewards, settings.likelihood_coef)
        check_finite(rollout.scores_B, rows)  # all rows on every process: they stop together
        return rollout

    def learn(self, rollout: Rollout, step: int, ptx_rows=(), after_step=None, on_skip=None) -> dict:
        """Figures of the update that follows rollout number `step` (from 0); the rest as rlhf/ppo.py: update.

        The first puts the values where its returns are, and learns from the rollout so revalued.
        """
        if step == 0:  # a value model that is off by as much everywhere would teach to end at once, or never
            shifted, offset = shift_to_returns(rollout, self.config.ppo.gamma, self.config.ppo.lam)
            if math.isfinite(offset):  # CANON A4
                rollout = shifted
                self.accelerator.unwrap_model(self.model).value_model.offset.fill_(offset)
        with self.clock("update"):
            figures = update(self.accelerator, self.model, self.optimizer, rollout, update_settings(self.config.ppo, step), self.encoder.pad_id,
                             seed=self.config.seed * 1_000_003 + step, ptx_rows=ptx_rows, after_step=after_step, workers=self.workers,
                             microbatch=self.microbatch, on_skip=on_skip)
            synchronize(self.accelerator.device)  # the last optimizer step is part of it
        return figures


@torch.no_grad()
def _call_once(model, encoder: Encoder, device) -> None:
    """A pass of the whole module: FSDP2 takes what is called first for the root of what it shards, and sampling calls the policy inside."""
    with whole(model):
        model(make_rows([[encoder.eos_id]], [[encoder.eos_id]], encoder.pad_id, device), 1.0)


def scorer_of(config: Config, within: Path, attention: str, device, workers: Workers) -> tuple[Scorer, list[Path]]:
    """What scores completions, and the reward model folders that the value model may start from (none for a callable)."""
    settings, trust = config.ppo, config.model.trust_remote_code
    if settings.score:
        folders, main = [], CallableScorer(settings.score)
    else:
        folders = member_folders(within / "reward", config.reward.members)
        main = load_scorer(folders, settings.ensemble, settings.uncertainty_coef, attention, device, trust, workers,
                           SCORED_AT_ONCE * settings.microbatch_tokens)
    return with_mix(main, settings.mix, attention, device, trust), folders


def update_settings(settings, step: int) -> UpdateSettings:
    """Of the section ppo, for rollout number `step` (from 0)."""
    return UpdateSettings(
        epochs=settings.epochs, minibatches=settings.minibatches, microbatch_tokens=settings.microbatch_tokens, clip=settings.clip,
        value_clip=settings.value_clip, value_coef=settings.value_coef, policy_coef=0.0 if step < settings.warmup_rollouts else 1.0,
        ptx_coef=settings.ptx_coef, max_grad_norm=settings.max_grad_norm, target_kl=settings.target_kl, temperature=settings.temperature)


def check_finite(scores_B: torch.Tensor, prompts) -> None:
    """CANON A4: a score that is no number never becomes a reward. Raises TrainingStopped."""
    bad = [p.id for p, ok in zip(prompts, torch.isfinite(scores_B).tolist(), strict=True) if not ok]
    if bad:
        raise TrainingStopped(f"ppo: {len(bad)} scores are not finite, for prompt ids {', '.join(bad[:5])}; nothing was learned from them. "
                              "Look at the reward model or callable; the same command goes on from the last checkpoint")
