"""Bugs of the kind that RLHF code is known for, planted one at a time, to see that the tests go red.

    python -m tests.planted_bugs                 # all of them
    python -m tests.planted_bugs --sample 5      # some of them (--seed picks which)
    python -m tests.planted_bugs --only P3       # those of one code, or of one file

Each bug is a right line, a wrong one, what it breaks, and the test file that must notice. The tree is copied, the wrong line is put in, and
the tests of that file that are named after the bug's CANON code are run on the copy (all of its tests where the bug has no code). Caught
means that tests ran and one of them failed: a module that can no longer be imported does not count. The same tests are run once on the
copy without a bug, and must be green. Prints `N of N caught` last; exit code 0 when all are.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("rlhf", "stages", "tests", "configs", "data", "pyproject.toml")
PRELOADED = ("pytest", "hypothesis", "yaml", "torch", "transformers", "accelerate", "peft", "transformers.models.gpt2.modeling_gpt2",
             "transformers.models.llama.modeling_llama")
TESTS_FAILED = 1  # pytest's exit code when tests ran and some failed
LONGEST = 300  # seconds, on a busy machine too


@dataclass(frozen=True)
class Bug:
    """One line that could have been written."""

    code: str  # the CANON line it breaks, or "" for the contract of DESIGN
    file: str
    test: str  # the file in tests/ that must go red
    breaks: str
    right: str
    wrong: str


BUGS = [
    # B: text
    Bug("B2", "rlhf/masking.py", "test_masking.py", "position ids count the padding on the left",
        right="torch.where(mask, mask.long().cumsum(1) - 1, 0)",
        wrong="torch.arange(mask.shape[1]).expand(mask.shape)"),
    Bug("B2", "rlhf/masking.py", "test_masking.py", "the mask of left-padded prompts is that of right-padded ones",
        right="return length_mask(lengths).flip(1)",
        wrong="return length_mask(lengths)"),
    Bug("B2", "rlhf/sampling.py", "test_sampling.py", "the sampler's positions count padding: shorter prompts are sampled from elsewhere",
        right="position_ids=positions(mask_BT)",
        wrong="position_ids=torch.arange(width).expand(len(group), -1)"),
    Bug("B2", "rlhf/decoding.py", "test_decoding.py", "keys of prompts that were read apart lie flush left, where the batch's mask says padding",
        right="F.pad(s, (0, 0, most - s.shape[2], columns - most))",
        wrong="F.pad(s, (0, 0, 0, columns - s.shape[2]))"),
    Bug("B2", "rlhf/sampling.py", "test_sampling.py", "without padding a fused kernel attends to columns that are not filled yet",
        right="mask_BT.new_zeros(len(different), limit + PAST_STEP)",
        wrong="mask_BT.new_ones(len(different), limit + PAST_STEP)"),
    Bug("B2", "rlhf/decoding.py", "test_decoding.py", "in sampling, heads that share keys and values take those of other heads",
        right="query[:, :, 0].unflatten(1, (key.shape[1], -1))",
        wrong="query[:, :, 0].unflatten(1, (-1, key.shape[1])).transpose(1, 2)"),
    Bug("B2", "rlhf/sampling.py", "test_sampling.py", "every sampled token stands at the prompt's last position",
        right="position = position + 1",
        wrong="position = position"),
    Bug("B1", "rlhf/decoding.py", "test_decoding.py", "in sampling, the small GPT's MLP does not see what attention added",
        right="x_BW = x_BW + attention.c_proj(taken_BH1D.flatten(1))\n        x_BW = x_BW + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(x_BW))))",
        wrong="x_BW = x_BW + attention.c_proj(taken_BH1D.flatten(1)) + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(x_BW))))"),
    Bug("B2", "rlhf/encoding.py", "test_encoding.py", "pad is EOS: the end of a completion is masked as padding",
        right="if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:",
        wrong="if tokenizer.pad_token_id is not None:"),
    Bug("B3", "rlhf/encoding.py", "test_encoding.py", "completions have no EOS: stopping is never learned",
        right="return [[*ids, self.eos_id] for ids in",
        wrong="return [ids for ids in"),
    Bug("B3", "rlhf/encoding.py", "test_encoding.py", "a user's text forges turns and ends",
        right="split_special_tokens=True",
        wrong="split_special_tokens=False"),
    Bug("B3", "rlhf/encoding.py", "test_encoding.py", "what comes after EOS is read as text",
        right="end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)",
        wrong="end = len(ids)"),
    Bug("B4", "rlhf/models.py", "test_passes.py", "dropout stays on: old and new log-probabilities differ",
        right="            setattr(part, name, 0.0)\n",
        wrong="            pass\n"),
    # R: reward model
    Bug("R1", "rlhf/models.py", "test_sft_reward.py", "the reward head starts at another scale",
        right="/ math.sqrt(head.in_features + 1))",
        wrong="/ math.sqrt(2 * head.in_features))"),
    Bug("R2", "rlhf/scoring.py", "test_scoring.py", "the longest row's reward is read one before its EOS",
        right="reward_model(input_ids=ids_BT, attention_mask=mask_BT.long())",
        wrong="reward_model(input_ids=ids_BT[:, :-1])"),
    Bug("R2", "rlhf/scoring.py", "test_scoring.py", "scores go to other completions than their own",
        right="scores_B[group] = ",
        wrong="scores_B[sorted(group)] = "),
    Bug("R3", "rlhf/losses.py", "test_losses.py", "a margin makes the pair easier instead of harder",
        right="difference_BKK = difference_BKK - margin_B[:, None, None]",
        wrong="difference_BKK = difference_BKK + margin_B[:, None, None]"),
    Bug("R3", "rlhf/losses.py", "test_losses.py", "the reward model learns to prefer the worse answer",
        right="better_BKK = real_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :])",
        wrong="better_BKK = real_BKK & (ranks_BK[:, :, None] > ranks_BK[:, None, :])"),
    Bug("R3", "rlhf/losses.py", "test_losses.py", "a tie counts twice",
        right="-0.5 * (F.logsigmoid(plain_BKK) + F.logsigmoid(-plain_BKK))",
        wrong="-1.0 * (F.logsigmoid(plain_BKK) + F.logsigmoid(-plain_BKK))"),
    Bug("R4", "rlhf/losses.py", "test_losses.py", "a prompt with many answers outweighs the others",
        right="(losses_BKK.sum((1, 2)) / pairs_B.clamp(min=1)).sum()",
        wrong="losses_BKK.sum((1, 2)).sum()"),
    Bug("R4", "rlhf/losses.py", "test_losses.py", "empty places of the batch rank first",
        right="real_BKK = (ranks_BK[:, :, None] > 0) & (ranks_BK[:, None, :] > 0)",
        wrong="real_BKK = (ranks_BK[:, :, None] >= 0) & (ranks_BK[:, None, :] >= 0)"),
    Bug("R5", "rlhf/scoring.py", "test_scoring.py", "the reward model's normalisation is forgotten",
        right="return self.gain * raw_scores(",
        wrong="return raw_scores("),
    Bug("R5", "rlhf/rankings.py", "test_sft_reward.py", "normalised scores do not have mean 0",
        right="return gain, -mean * gain",
        wrong="return gain, -mean"),
    Bug("R6", "rlhf/rankings.py", "test_sft_reward.py", "a reward model that says the same of everything is always right",
        right="return (difference_P > 0).double() + 0.5 * (difference_P == 0)",
        wrong="return (difference_P >= 0).double()"),
    Bug("R7", "rlhf/scoring.py", "test_scoring.py", "worst-case is best-case",
        right="return scores_MB.min(0).values",
        wrong="return scores_MB.max(0).values"),
    Bug("R7", "rlhf/scoring.py", "test_scoring.py", "disagreement is rewarded",
        right="mean_B - uncertainty_coef * scores_MB.var(0, unbiased=False)",
        wrong="mean_B + uncertainty_coef * scores_MB.var(0, unbiased=False)"),
    Bug("R7", "rlhf/rankings.py", "test_sft_reward.py", "the experiment's flipped labels stay as they were",
        right="max(row[\"ranks\"]) + 1 - rank for rank",
        wrong="rank for rank"),
    # S: rollouts
    Bug("S1", "rlhf/logprobs.py", "test_logprobs.py", "log-probabilities without the sampling temperature",
        right="torch.log_softmax(logits_NV.float() / temperature, dim=-1)",
        wrong="torch.log_softmax(logits_NV.float(), dim=-1)"),
    Bug("S1", "rlhf/sampling.py", "test_sampling.py", "samples come from another policy than the one whose probabilities are used",
        right="torch.softmax(logits_BV.float() / temperature, -1)",
        wrong="torch.softmax(logits_BV.float(), -1)"),
    Bug("S1", "rlhf/rollout.py", "test_rollout.py", "old log-probabilities at another temperature",
        right="logprobs_BC, entropy_BC, values_BC = model(batch, temperature, entropies=True)",
        wrong="logprobs_BC, entropy_BC, values_BC = model(batch, 1.0, entropies=True)"),
    Bug("S1", "rlhf/learner.py", "test_ppo.py", "ppo.temperature does not reach the sampler",
        right="encoder, settings.temperature,\n                max(1, SAMPLED_AT_ONCE",
        wrong="encoder, 1.0,\n                max(1, SAMPLED_AT_ONCE"),
    Bug("S1", "rlhf/learner.py", "test_ppo.py", "the reference at another temperature than the policy",
        right="reference(ref_policy, self.policy, settings.temperature,",
        wrong="reference(ref_policy, self.policy, 1.0,"),
    Bug("S1", "rlhf/learner.py", "test_ppo.py", "the update at another temperature than the rollout",
        right="temperature=settings.temperature)",
        wrong="temperature=1.0)"),
    Bug("S1", "stages/collect.py", "test_collect.py", "collect.temperature does not reach the sampler",
        right="encoder, config.collect.temperature, max(1, len(places)),",
        wrong="encoder, 1.0, max(1, len(places)),"),
    Bug("S1", "stages/compare.py", "test_compare.py", "compare.temperature does not reach the sampler",
        right="temperature = float(cooled[1]) if cooled else settings.temperature",
        wrong="temperature = float(cooled[1]) if cooled else 1.0"),
    Bug("S1", "stages/compare.py", "test_compare.py", "KL in the report between two temperatures",
        right="for m, t in ((policy, temperature), (sft, config.compare.temperature))]",
        wrong="for m, t in ((policy, temperature), (sft, 1.0))]"),
    Bug("S1", "stages/compare.py", "test_compare.py", "SFT at a temperature has no KL to SFT",
        right="for m, t in ((policy, temperature), (sft, config.compare.temperature))]",
        wrong="for m, t in ((policy, temperature), (sft, temperature))]"),
    Bug("S1", "stages/compare.py", "test_compare.py", "tasks in context are answered at another temperature",
        right="shots, encoder, uniforms_BC, config.compare.temperature,",
        wrong="shots, encoder, uniforms_BC, 1.0,"),
    Bug("S1", "rlhf/chat.py", "test_chat.py", "the chat's temperature does not reach the sampler",
        right="uniforms_BC, self.encoder, temperature, 1)[0]",
        wrong="uniforms_BC, self.encoder, 1.0, 1)[0]"),
    Bug("", "rlhf/sampling.py", "test_host_gpu.py", "the random numbers stay on the CPU while a GPU samples",
        right="uniforms_BC, running, sampled = uniforms_BC.to(device),",
        wrong="uniforms_BC, running, sampled = uniforms_BC,"),
    Bug("", "rlhf/shared_prompts.py", "test_host_gpu.py", "a ranking's mask is made on the CPU while a GPU trains the reward model",
        right="torch.ones(width, width, dtype=torch.bool, device=ids_BT.device)",
        wrong="torch.ones(width, width, dtype=torch.bool)"),
    Bug("S2", "rlhf/sampling.py", "test_sampling.py", "rows that ended come back to life and stay in the batch",
        right="going = going & (ids[:, 0] != encoder.eos_id)",
        wrong="going = ids[:, 0] != encoder.eos_id"),
    Bug("S2", "rlhf/sampling.py", "test_sampling.py", "completions go on after their EOS",
        right="if not encoder.ended(completions[row]):",
        wrong="if True:"),
    Bug("S2", "rlhf/scoring.py", "test_scoring.py", "completions that do not end cost nothing",
        right="return torch.where(torch.tensor(ended), scores_B, missing_eos_score)",
        wrong="return scores_B"),
    Bug("S3", "rlhf/advantages.py", "test_advantages.py", "the score lands in the last column, on padding",
        right="rewards_BC[rows, mask_BC.sum(1) - 1] += scores_B",
        wrong="rewards_BC[:, -1] += scores_B"),
    Bug("S3", "rlhf/advantages.py", "test_advantages.py", "KL is rewarded",
        right="-kl_coef * k1(logprobs_BC, ref_logprobs_BC), 0.0)",
        wrong="kl_coef * k1(logprobs_BC, ref_logprobs_BC), 0.0)"),
    Bug("S3", "rlhf/advantages.py", "test_advantages.py", "the likelihood that is rewarded is the policy's own",
        right="likelihood_coef * ref_logprobs_BC, 0.0)",
        wrong="likelihood_coef * logprobs_BC, 0.0)"),
    Bug("", "stages/ppo.py", "test_pipeline.py", "the best weights are chosen without the likelihood that PPO is paid for",
        right=' + settings.likelihood_coef * figures["eval_likelihood"]',
        wrong=""),
    Bug("P5", "rlhf/value.py", "test_ppo.py", "the last norm's gain is stepped by two groups",
        right="[p for p in policy if p is not gain]",
        wrong="policy"),
    Bug("P5", "rlhf/optimizers.py", "test_ppo.py", "what is trained as one number follows each entry's own gradient",
        right="p.grad = _along(p.grad, old)",
        wrong="pass"),
    Bug("P5", "rlhf/optimizers.py", "test_ppo.py", "what is trained as one number drifts apart",
        right="p.copy_(_along(p, old))",
        wrong="pass"),
    Bug("P4", "rlhf/passes.py", "test_passes.py", "one worker gets all rows of a minibatch",
        right="pairwise([0, *_filled(widths, high)])",
        wrong="pairwise([0, *_filled(widths, budget)])"),
    Bug("", "rlhf/scoring.py", "test_scoring.py", "workers score in fp32 whatever the caller's precision",
        right="        with autocast():\n            return reward_model(",
        wrong="        if True:\n            return reward_model("),
    Bug("S4", "rlhf/scoring.py", "test_scoring.py", "a reward model with another tokenizer reads the policy's ids",
        right="(self.encoder.closed(c) if same else self.encoder.completion_ids(policy_encoder.decode(c)))",
        wrong="self.encoder.closed(c)"),
    Bug("S4", "rlhf/scoring.py", "test_scoring.py", "the weights of a mix are ignored",
        right="weight * scorer(prompts, completions, policy_encoder)",
        wrong="scorer(prompts, completions, policy_encoder)"),
    Bug("B3", "rlhf/encoding.py", "test_encoders.py", "what a prompt asks and what an encoder is shown as the answer run into each other",
        right="{% if add_generation_prompt %}{{ sep_token }}{% endif %}",
        wrong="{% if add_generation_prompt %}{% endif %}"),
    # P: PPO
    Bug("P1", "rlhf/advantages.py", "test_advantages.py", "lambda is always 1",
        right="delta_B + gamma * lam * next_advantage_B",
        wrong="delta_B + gamma * next_advantage_B"),
    Bug("P1", "rlhf/advantages.py", "test_advantages.py", "the next value is the last column's",
        right="next_value_B = values_BC[:, t]",
        wrong="next_value_B = values_BC[:, -1]"),
    Bug("P1", "rlhf/advantages.py", "test_advantages.py", "returns without the values",
        right="torch.where(mask_BC, advantages_BC + values_BC, 0.0)",
        wrong="torch.where(mask_BC, advantages_BC, 0.0)"),
    Bug("P2", "rlhf/advantages.py", "test_advantages.py", "padding is whitened too",
        right="real = values[mask].double()",
        wrong="real = values.nan_to_num().flatten().double()"),
    Bug("P2", "rlhf/advantages.py", "test_advantages.py", "reward whitening moves the mean",
        right="(whitened if shift_mean else whitened + mean)",
        wrong="whitened"),
    Bug("P2", "rlhf/rollout.py", "test_rollout.py", "advantages are not whitened",
        right="return whiten(advantages_BC, mask_BC, moments(advantages_BC, mask_BC)), returns_BC",
        wrong="return advantages_BC * mask_BC, returns_BC"),
    Bug("P2", "rlhf/rollout.py", "test_rollout.py", "whitened rewards lose their mean",
        right="whiten(rewards_BC, mask_BC, moments(rewards_BC, mask_BC), shift_mean=False)",
        wrong="whiten(rewards_BC, mask_BC, moments(rewards_BC, mask_BC))"),
    Bug("P3", "rlhf/losses.py", "test_losses.py", "the optimistic side of the clip",
        right="torch.where(mask_BC, torch.maximum(plain_BC, clipped_BC), 0.0)",
        wrong="torch.where(mask_BC, torch.minimum(plain_BC, clipped_BC), 0.0)"),
    Bug("P3", "rlhf/losses.py", "test_losses.py", "good tokens are made less likely",
        right="plain_BC = -advantages_BC * ratio_BC",
        wrong="plain_BC = advantages_BC * ratio_BC"),
    Bug("P3", "rlhf/losses.py", "test_losses.py", "the ratio upside down",
        right="torch.exp(torch.where(mask_BC, logprobs_BC - old_logprobs_BC, 0.0))",
        wrong="torch.exp(torch.where(mask_BC, old_logprobs_BC - logprobs_BC, 0.0))"),
    Bug("P3", "rlhf/losses.py", "test_losses.py", "values are clipped around 0 instead of the old values",
        right="held_BC = old_values_BC + (values_BC - old_values_BC).clamp(-clip, clip)",
        wrong="held_BC = values_BC.clamp(-clip, clip)"),
    Bug("P3", "rlhf/ppo.py", "test_ppo.py", "the value loss has weight 1",
        right="return settings.policy_coef * policy_sum + settings.value_coef * value_sum",
        wrong="return settings.policy_coef * policy_sum + value_sum"),
    Bug("P3", "rlhf/ppo.py", "test_ppo.py", "nothing is ever clipped",
        right="policy_loss(logprobs_BC, old_BC, advantages_BC, batch.mask_BC, settings.clip)",
        wrong="policy_loss(logprobs_BC, logprobs_BC.detach(), advantages_BC, batch.mask_BC, settings.clip)"),
    Bug("P4", "rlhf/ppo.py", "test_ppo.py", "the mean of microbatch means",
        right="return loss * accelerator.num_processes / count, (sums, error)",
        wrong="return loss * accelerator.num_processes / sums[SUMS.index('tokens')] / len(groups), (sums, error)"),
    Bug("P4", "rlhf/ppo.py", "test_ppo.py", "microbatches take other rows than their minibatch's",
        right="[mine[i] for i in group]",
        wrong="group"),
    Bug("P5", "rlhf/ppo.py", "test_ppo.py", "every epoch has the same minibatches",
        right="order = torch.randperm(len(rollout.prompts), generator=generator).tolist()",
        wrong="order = list(range(len(rollout.prompts)))"),
    Bug("P5", "rlhf/optimizers.py", "test_ppo.py", "the learning rate never falls",
        right="return (steps - step) / max(1, steps - rising)",
        wrong="return 1.0"),
    Bug("P5", "rlhf/value.py", "test_ppo.py", "Adam's epsilon is torch's 1e-8",
        right="lr=lr, eps=1e-5, weight_decay=0.0",
        wrong="lr=lr, weight_decay=0.0"),
    Bug("P5", "rlhf/ppo.py", "test_ppo.py", "gradients are not clipped",
        right="norms.append(float(accelerator.clip_grad_norm_(parameters, max_norm)))",
        wrong="norms.append(float(accelerator.clip_grad_norm_(parameters, math.inf)))"),
    Bug("P6", "rlhf/passes.py", "test_passes.py", "a value stands behind its token instead of before it",
        right="row * width + len(p) - 1 + t",
        wrong="row * width + len(p) + t"),
    Bug("P6", "rlhf/value.py", "test_ppo.py", "values start at random",
        right="nn.init.zeros_(head.weight)",
        wrong="nn.init.normal_(head.weight)"),
    Bug("P6", "rlhf/learner.py", "test_ppo.py", "values start at 0, wherever the returns are",
        right="value_model.offset.fill_(offset)",
        wrong="value_model.offset.fill_(0.0)"),
    Bug("P6", "rlhf/rollout.py", "test_rollout.py", "rewards far ahead hardly count in where the values start",
        right="rollout.mask_BC, gamma, 1.0)[1]",
        wrong="rollout.mask_BC, gamma, lam)[1]"),
    Bug("P7", "rlhf/kl.py", "test_kl.py", "the KL coefficient runs away from its target",
        right="return kl_coef * (1.0 + error * completions / horizon)",
        wrong="return kl_coef * (1.0 - error * completions / horizon)"),
    Bug("P7", "rlhf/kl.py", "test_kl.py", "the controller's error is not held",
        right="min(max(kl / target - 1.0, -0.2), 0.2)",
        wrong="kl / target - 1.0"),
    Bug("P8", "rlhf/kl.py", "test_kl.py", "k3 of the wrong direction, biased",
        right="log_ratio = ref_logprobs - logprobs",
        wrong="log_ratio = logprobs - ref_logprobs"),
    Bug("P8", "rlhf/kl.py", "test_kl.py", "k1 without its sign",
        right="    return logprobs - ref_logprobs",
        wrong="    return (logprobs - ref_logprobs).abs()"),
    Bug("P9", "rlhf/ppo.py", "test_ppo.py", "the weight of PPO-ptx is ignored",
        right="settings.ptx_coef * loss * accelerator.num_processes / ptx_count",
        wrong="loss * accelerator.num_processes / ptx_count"),
    Bug("P9", "rlhf/ppo.py", "test_ppo.py", "PPO-ptx learns from nothing",
        right="ptx_rows[i :: settings.epochs * settings.minibatches]",
        wrong="ptx_rows[:0]"),
    Bug("P10", "rlhf/ppo.py", "test_ppo.py", "the average is nearly the last weights",
        right="self.average[name].lerp_(p, 1 - self.decay)",
        wrong="self.average[name].lerp_(p, self.decay)"),
    Bug("P11", "rlhf/ppo.py", "test_ppo.py", "epochs stop while the policy is near and go on when it is far",
        right="sum(epoch_kl) / len(epoch_kl) > settings.target_kl",
        wrong="sum(epoch_kl) / len(epoch_kl) < settings.target_kl"),
    Bug("P12", "rlhf/rollout.py", "test_rollout.py", "with LoRA the reference is the policy itself",
        right="with torch.no_grad(), autocast(), policy.disable_adapter():",
        wrong="with torch.no_grad(), autocast():"),
    Bug("P12", "rlhf/learner.py", "test_bench.py", "with LoRA the saved policy is made of weights that were rounded to bf16 for the passes",
        right="copy, trained = self._new_policy(),",
        wrong="copy, trained = __import__('copy').deepcopy(self.policy),"),
    Bug("", "rlhf/models.py", "test_models.py", "embeddings are rounded to bf16 with the output layer that is tied to them",
        right="if layer.weight is embeddings:",
        wrong="if False:"),
    Bug("P12", "rlhf/checkpoints.py", "test_ppo.py", "a run goes on from its oldest checkpoint",
        right="accelerator.load_state(str(found[-1]))",
        wrong="accelerator.load_state(str(found[0]))"),
    # A: alarms
    Bug("A1", "rlhf/ppo.py", "test_ppo.py", "the alarm on ratios adds up over microbatches",
        right="return sums.sum(0), errors.max()",
        wrong="return sums.sum(0), errors.sum()"),
    Bug("A2", "rlhf/alarms.py", "test_alarms.py", "KL before anything was learned rings nothing",
        right="if now is first and",
        wrong="if now is None and"),
    Bug("P4", "rlhf/compute.py", "test_ppo.py", "the processes' gradients are added, not averaged",
        right="gradient /= accelerator.num_processes",
        wrong="gradient /= 1"),
    Bug("P4", "stages/pretrain.py", "test_memory.py", "a try that did not fit leaves its gradients behind",
        right="model.zero_grad()  # of a try that did not fit into memory",
        wrong="pass"),
    Bug("P4", "rlhf/workers.py", "test_workers.py", "of several workers' gradients the last one stays",
        right="parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)",
        wrong="parameter.grad = 1.0 * gradient"),
    Bug("P4", "rlhf/ppo.py", "test_memory.py", "a try that ran out of memory leaves its gradients behind",
        right="optimizer.zero_grad()  # of a try that did not fit into memory",
        wrong="pass"),
    Bug("P4", "rlhf/trl_trainers.py", "test_sft_reward.py", "SFT and the reward stage keep the gradients of microbatches they take anew",
        right="model.zero_grad()",
        wrong="pass"),
    Bug("P4", "rlhf/trl_trainers.py", "test_sft_reward.py", "workers leave out rows of a microbatch",
        right="(part := places[first :: self.workers.count])",
        wrong="(part := places[first : first + 1])"),
    Bug("R4", "rlhf/shared_prompts.py", "test_shared_prompts.py", "answers that share a prompt see the answers before them",
        right="(answer_BT[:, None, :] == 0) | (answer_BT[:, None, :] == answer_BT[:, :, None])",
        wrong="(answer_BT[:, None, :] >= 0)"),
    Bug("R4", "rlhf/shared_prompts.py", "test_shared_prompts.py", "an answer's positions go on from the answer before it",
        right="range(start, start + len(completion))",
        wrong="range(end, end + len(completion))"),
    Bug("S2", "rlhf/sampling.py", "test_sampling.py", "answers to equal prompts go on from another prompt",
        right="rows = torch.tensor(read, device=device)",
        wrong="rows = torch.tensor(read[::-1], device=device)"),
    Bug("", "rlhf/sharding.py", "test_sharding.py", "sharded weights stay whole after sampling, and what the optimizer steps on is not what is read",
        right="            unit.reshard()\n",
        wrong="            pass\n"),
    Bug("", "rlhf/learner.py", "test_sharding.py", "sampling is the first to call a sharded model, whose root is then a block",
        right="_call_once(self.model, encoder, device)",
        wrong="pass"),
    Bug("", "rlhf/models.py", "test_sampling.py", "LoRA adapters stay in the frozen weights after sampling, and are added again by every pass",
        right="layer.get_base_layer().weight.data = weight\n",
        wrong="pass\n"),
    Bug("", "rlhf/sampling.py", "test_compile.py", "every length of the past and every size of the batch is compiled anew in sampling",
        right=", attention_for_sampling(policy), as_written():",
        wrong=", attention_for_sampling(policy):"),
    Bug("A4", "rlhf/trl_trainers.py", "test_sft_reward.py", "SFT and the reward stage learn from a loss that is no number",
        right="self.skipped = not (math.isfinite(norm) and math.isfinite(loss))",
        wrong="self.skipped = not math.isfinite(norm)"),
    Bug("R2", "rlhf/encoding.py", "test_scoring.py", "answers that were cut off are scored where no answer ended in training",
        right="return completion if self.ended(completion) else [*completion[:-1], self.eos_id]",
        wrong="return completion"),
    Bug("A3", "rlhf/passes.py", "test_passes.py", "a completion without tokens passes",
        right="if not all(completions):",
        wrong="if not completions:"),
    Bug("A4", "rlhf/losses.py", "test_losses.py", "NaN in an empty place reaches the gradient",
        right="rewards_BK = torch.where(ranks_BK > 0, rewards_BK, 0.0)",
        wrong="rewards_BK = rewards_BK * 1.0"),
    Bug("A4", "rlhf/losses.py", "test_losses.py", "NaN times a mask is NaN",
        right="values_BC, old_values_BC, returns_BC = (torch.where(mask_BC, t, 0.0) for t in (values_BC, old_values_BC, returns_BC))",
        wrong="values_BC, old_values_BC, returns_BC = (t * mask_BC for t in (values_BC, old_values_BC, returns_BC))"),
    Bug("A4", "rlhf/ppo.py", "test_ppo.py", "a NaN gradient reaches the weights",
        right="if math.isfinite(norm) and all(map(math.isfinite, figures.values())):",
        wrong="if True:"),
    # E: evaluation
    Bug("E1", "stages/compare.py", "test_compare.py", "PPO's last weights are its average again",
        right="\"ppo/model_last\" if name == \"ppo_last\"",
        wrong="\"ppo/model\" if name == \"ppo_last\""),
    Bug("E2", "stages/compare.py", "test_compare.py", "the training reward named by its folder passes for an independent judge",
        right=".get(judge, [Path(judge)])",
        wrong=".get(judge, [])"),
    Bug("E2", "stages/compare.py", "test_compare.py", "a reward that was mixed into PPO's passes for an independent judge",
        right="folders), *config.ppo.mix)}",
        wrong="folders),)}"),
    Bug("P6", "rlhf/optimizers.py", "test_ppo.py", "a shared trunk moves with the value loss while only the value model is to warm up",
        right="group.get(\"network\") == still else",
        wrong="group.get(\"network\") == 0 else"),
    Bug("", "rlhf/data/pairs.py", "test_data_formats.py", "verdicts 0 and 1 are read as 1 and 2: what is left of the pairs is the wrong way round",
        right="if set(codes) != {\"0\", \"1\"}",
        wrong="if codes"),
    Bug("", "rlhf/data/examples.py", "test_data_formats.py", "Python's spelling of a message list is trained on as an answer",
        right="if WRITTEN_MESSAGES.match(value):",
        wrong="if False:"),
    Bug("E3", "rlhf/comparison.py", "test_comparison.py", "equal length is read off a line where no answers were",
        right="np.mean(difference >= 0)) < MIN_OVERLAP",
        wrong="np.mean(difference >= 0)) < -1"),
    Bug("E3", "rlhf/comparison.py", "test_comparison.py", "a judge's verdict in one order is believed",
        right="0.5 + shown_first / 2 if shown_first == shown_second else 0.5",
        wrong="0.5 + shown_first / 2"),
    Bug("E3", "stages/compare.py", "test_compare.py", "the function that judges pairs decides nothing",
        right="pair_judge=pair_judge)",
        wrong="pair_judge=None)"),
    Bug("E5", "rlhf/comparison.py", "test_comparison.py", "an untrained model that wins is not told",
        right="row[\"win_rate\"] < MIN_AGAINST_UNTRAINED",
        wrong="row[\"win_rate\"] > MIN_AGAINST_UNTRAINED"),
    Bug("E6", "rlhf/world/writers.py", "test_in_context.py", "an example may answer the task's own question",
        right="{family.key(request.args)}, []",
        wrong="set(), []"),
    Bug("E6", "rlhf/in_context.py", "test_in_context.py", "the examples come after the question",
        right="return [*turns, {\"role\": \"user\", \"content\": self.prompt}]",
        wrong="return [{\"role\": \"user\", \"content\": self.prompt}, *turns]"),
    Bug("E6", "rlhf/in_context.py", "test_in_context.py", "policies are compared with other numbers of examples",
        right="scores[baseline][shots])",
        wrong="scores[baseline][0])"),
    # the embedded world
    Bug("", "rlhf/world/writers.py", "test_world.py", "what most writers do is as rare as any flaw",
        right="flaw = habit if habit and rng.random() < HABIT_SHARE else",
        wrong="flaw = habit if habit and rng.random() < 0.0 else"),
    Bug("", "rlhf/world/writers.py", "test_world.py", "the pretraining text has the writers' habits",
        right="answer = _answer(request, rng, flaw_rate)\n",
        wrong="answer = _answer(request, rng, flaw_rate, family.habit)\n"),
    Bug("", "rlhf/world/family.py", "test_world.py", "an answer that speaks of something else than was asked is right",
        right="float(found and self.on_subject(args, answer))",
        wrong="float(found)"),
    Bug("", "rlhf/world/lookups.py", "test_world.py", "an answer with a sentence that has no word stops the run",
        right='itertools.pairwise([*part.words, ""])',
        wrong='zip(part.words, [*part.words[1:], ""], strict=True)'),
    Bug("", "rlhf/prompts.py", "test_compare.py", "prompts that only carry a family's name are taken for the embedded world's",
        right="p.family is None or world.parse(p.text) is None",
        wrong="p.family is None"),
    Bug("", "rlhf/alarms.py", "test_alarms.py", "a run in which no answer ends is told as if all were well",
        right='now["eos_rate"] < max(first["eos_rate"] - EOS_RATE_LOST, FEW_END)',
        wrong='now["eos_rate"] < first["eos_rate"] - EOS_RATE_LOST'),
    # the contract of DESIGN
    Bug("", "rlhf/runs.py", "test_runs.py", "another experiment is mixed into a folder",
        right='if old.get("fingerprint") == stage._manifest["fingerprint"] and not replaced:',
        wrong="if old:"),
    Bug("", "rlhf/runs.py", "test_contents.py", "a run goes on with other weights or code than it began with",
        right="if before.get(name, digest) != digest\n",
        wrong="if name not in before\n"),
    Bug("", "rlhf/contents.py", "test_contents.py", "the weights of a large file are told by its size alone",
        right="file.seek((size - BLOCK) * place // (BLOCKS - 1))",
        wrong="continue"),
    Bug("", "rlhf/data/bulk.py", "test_bulk.py", "the pool of a killed prepare waits for ever",
        right='multiprocessing.get_context("fork"), _end_with_parent)',
        wrong='multiprocessing.get_context("fork"))'),
    Bug("", "rlhf/runs.py", "test_runs.py", "a stage starts from a parent that did not finish",
        right="if not done.is_file():",
        wrong="if not done.parent.is_dir():"),
    Bug("", "rlhf/config.py", "test_config.py", "a mistyped setting is ignored",
        right="if key not in hints:",
        wrong="if not prefix and key not in hints:"),
    Bug("", "rlhf/jsonl.py", "test_runs.py", "a file is overwritten in place, and half of it may stay",
        right="    os.replace(beside, path)\n\n\n@contextmanager",
        wrong="    shutil.copy(beside, path)\n\n\n@contextmanager"),
]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, help="plant only this many, picked by --seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="plant only the bugs of this code or file")
    arguments = parser.parse_args(argv)
    bugs = [bug for bug in BUGS if arguments.only in (None, bug.code, bug.file)]
    if arguments.sample:
        bugs = random.Random(arguments.seed).sample(bugs, min(arguments.sample, len(bugs)))
    _preload()
    with tempfile.TemporaryDirectory() as folder:
        scratch = _copy_of_tree(Path(folder) / "tree")
        if not _green_without_bugs(scratch, bugs):
            return 1
        caught = sum([_plant(scratch, bug) for bug in bugs])
    print(f"{caught} of {len(bugs)} caught")
    return 0 if caught == len(bugs) else 1


def _plant(scratch: Path, bug: Bug) -> bool:
    """Puts the wrong line in, runs the tests, takes it out again; True when a test failed."""
    path, began = scratch / bug.file, time.perf_counter()
    text = path.read_text(encoding="utf-8")
    if text.count(bug.right) != 1:
        print(f"MISSED  {bug.code:4} {bug.file}: the right line stands there {text.count(bug.right)} times: {bug.right}", flush=True)
        return False
    path.write_text(text.replace(bug.right, bug.wrong), encoding="utf-8")
    code, output = _run(scratch, bug.test, f"_{bug.code}_" if bug.code else "")
    path.write_text(text, encoding="utf-8")
    red = re.search(r"FAILED (\S+)", output)
    how = red[1].partition("::")[2] if red else f"pytest ended with {code}"
    caught = code == TESTS_FAILED
    seconds = time.perf_counter() - began
    print(f"{'caught' if caught else 'MISSED'}  {bug.code:4} {bug.file}: {bug.breaks}  ({bug.test}: {how}, {seconds:.1f} s)", flush=True)
    if not caught:
        print(output[-1500:])
    return caught


def _green_without_bugs(scratch: Path, bugs: list[Bug]) -> bool:
    """True when the tests that the bugs name pass on the tree as it is: what is red anyway catches nothing."""
    green = True
    for test in sorted({bug.test for bug in bugs}):
        codes = {bug.code for bug in bugs if bug.test == test}
        code, output = _run(scratch, test, "" if "" in codes else " or ".join(f"_{c}_" for c in sorted(codes)))
        if code != 0:
            print(f"{test} is not green without a bug (pytest ended with {code}):\n{output[-1500:]}")
            green = False
    return green


def _run(scratch: Path, test: str, names: str) -> tuple[int | None, str]:
    """(pytest's exit code, its output) of a test file in a process of its own, or (None, ...) when it had to be stopped."""
    log = scratch.parent / "log.txt"
    process = multiprocessing.get_context("fork").Process(target=_child, args=(scratch, log, [f"tests/{test}", *(["-k", names] if names else [])]))
    process.start()
    process.join(LONGEST)
    if process.is_alive():
        process.kill()
        process.join()
        return None, ""
    return process.exitcode, log.read_text(encoding="utf-8")


def _child(scratch: Path, log: Path, words: list[str]) -> None:
    """Runs pytest on the copy; the modules of the tree itself are not to be found."""
    sys.dont_write_bytecode = True  # a wrong line as long as the right one, written in the same second, would meet a stale cache
    os.chdir(scratch)
    sys.path[:] = [str(scratch), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    for name in [n for n in sys.modules if n.partition(".")[0] in ("rlhf", "stages", "tests")]:
        del sys.modules[name]
    importlib.invalidate_caches()
    import pytest

    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = int(pytest.main([*words, "-x", "-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(scratch)]))
    os._exit(code)


def _copy_of_tree(target: Path) -> Path:
    target.mkdir()
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        elif source.is_file():
            shutil.copy(source, target / name)
    return target


def _preload() -> None:
    """The large libraries, once for all processes: each would spend most of its time on importing them."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
    for name in PRELOADED:
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


if __name__ == "__main__":
    sys.exit(main())
