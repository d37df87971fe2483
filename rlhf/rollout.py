"""A rollout: prompts, what the policy answered, and everything the update needs to know about it, on every process whole.

Each process samples, scores and evaluates its share of the prompts; the rows (ids and a few floats a token) are then exchanged, so that
whitening, permutations and minibatches are those of one process whatever their number (CANON P2, P4).
Shapes: B completions of the rollout, C tokens of the longest completion.
"""

import dataclasses
import time
from dataclasses import dataclass

import torch

from rlhf.advantages import gae, moments, token_rewards, whiten
from rlhf.compute import gather_rows
from rlhf.kl import k1, k3
from rlhf.masking import length_mask, masked_mean, pad_columns
from rlhf.passes import make_rows, pass_cost, policy_pass, tight_groups
from rlhf.workers import ALONE, Workers


@dataclass(frozen=True)
class Rollout:
    """Completions sampled together. Numbers are fp32 on the CPU, 0 on padding; `old` is the policy that sampled."""

    prompts: list[list[int]]
    completions: list[list[int]]  # with their EOS, if they ended
    mask_BC: torch.Tensor  # True on real tokens
    old_logprobs_BC: torch.Tensor
    ref_logprobs_BC: torch.Tensor
    entropy_BC: torch.Tensor
    values_BC: torch.Tensor
    scores_B: torch.Tensor
    rewards_BC: torch.Tensor
    advantages_BC: torch.Tensor  # whitened over the rollout
    returns_BC: torch.Tensor  # advantages + values before whitening

    def __post_init__(self):
        sizes = {"B": len(self.prompts), "C": max(len(c) for c in self.completions)}
        for field in dataclasses.fields(self):
            value, dims = getattr(self, field.name), field.name.rpartition("_")[2]
            if isinstance(value, torch.Tensor) and tuple(value.shape) != tuple(sizes[d] for d in dims):
                raise ValueError(f"{field.name} has shape {tuple(value.shape)}, wanted {dims} = {sizes}")

    @property
    def tokens(self) -> int:
        """Real tokens of its prompts and completions."""
        return sum(len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True))

    def statistics(self, encoder) -> dict[str, float]:
        """The rollout's figures for metrics.jsonl; KL by both estimators (CANON P8)."""
        lengths = self.mask_BC.sum(1).float()
        residual, returns = (self.returns_BC - self.values_BC)[self.mask_BC], self.returns_BC[self.mask_BC]
        kl_BC = torch.where(self.mask_BC, k1(self.old_logprobs_BC, self.ref_logprobs_BC), 0.0)
        k3_BC = torch.where(self.mask_BC, k3(self.old_logprobs_BC, self.ref_logprobs_BC), 0.0)
        return {
            "score_mean": self.scores_B.mean().item(), "score_std": self.scores_B.std(unbiased=False).item(), "kl": kl_BC.sum(1).mean().item(),
            "kl_k3": k3_BC.sum(1).mean().item(), "likelihood": self.ref_logprobs_BC.sum(1).mean().item(),
            "entropy": masked_mean(self.entropy_BC, self.mask_BC).item(), "length_mean": lengths.mean().item(),
            "eos_rate": sum(map(encoder.ended, self.completions)) / len(self.completions), "return_mean": returns.mean().item(),
            "explained_variance": 1.0 - (residual.var(unbiased=False) / returns.var(unbiased=False).clamp(min=1e-8)).item(),
        }


def evaluate_tokens(model, ref_logprobs, rows: list[tuple[list[int], list[int]]], pad_id: int, temperature: float, budget: int,
                    device, workers: Workers = ALONE) -> list[tuple]:
    """For each (prompt, completion): CPU tensors (logprobs_C, ref_logprobs_C, entropy_C, values_C).

    `model` is a PolicyAndValue, `ref_logprobs` a function of Rows. The rows go through in microbatches of the update's layout, so that the
    first minibatch finds the same numbers (CANON A1).
    """
    @torch.no_grad()  # of the thread that runs it
    def evaluate(group: list[int]) -> list[torch.Tensor]:
        batch = make_rows([rows[i][0] for i in group], [rows[i][1] for i in group], pad_id, device)
        logprobs_BC, entropy_BC, values_BC = model(batch, temperature, entropies=True)
        return [t.float().cpu() for t in (logprobs_BC, ref_logprobs(batch), entropy_BC, values_BC)]

    results: list = [None] * len(rows)
    groups = tight_groups([len(p) + len(c) for p, c in rows], budget, workers.count, pass_cost(model))
    for group, columns in zip(groups, workers.map(evaluate, groups), strict=True):
        for place, i in enumerate(group):
            results[i] = tuple(t[place, : len(rows[i][1])].clone() for t in columns)  # a view would be sent with all that it is a view of
    return results


def make_rollout(accelerator, prompts, completions, scores_B, tokens: list[tuple], kl_coef: float, gamma: float, lam: float,
                 whiten_rewards: bool, likelihood_coef: float = 0.0) -> Rollout:
    """This process's rows with everybody else's as one Rollout: rewards, advantages and returns included."""
    prompts, completions, tokens = (gather_rows(accelerator, rows) for rows in (prompts, completions, tokens))
    scores_B = torch.tensor(gather_rows(accelerator, scores_B.tolist()))
    mask_BC = length_mask([len(c) for c in completions])
    old_BC, ref_BC, entropy_BC, values_BC = (pad_columns([row[i] for row in tokens]) for i in range(4))
    rewards_BC = token_rewards(scores_B, old_BC, ref_BC, mask_BC, kl_coef, likelihood_coef)
    if whiten_rewards:
        rewards_BC = whiten(rewards_BC, mask_BC, moments(rewards_BC, mask_BC), shift_mean=False)
    advantages_BC, returns_BC = _advantages(rewards_BC, values_BC, mask_BC, gamma, lam)
    return Rollout(prompts, completions, mask_BC, old_BC, ref_BC, entropy_BC, values_BC, scores_B, rewards_BC, advantages_BC, returns_BC)


def _advantages(rewards_BC, values_BC, mask_BC, gamma: float, lam: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(whitened advantages, returns)"""
    advantages_BC, returns_BC = gae(rewards_BC, values_BC, mask_BC, gamma, lam)
    return whiten(advantages_BC, mask_BC, moments(advantages_BC, mask_BC)), returns_BC


def shift_to_returns(rollout: Rollout, gamma: float, lam: float) -> tuple[Rollout, float]:
    """The rollout as if its values had been shifted by what they lack, on average, of the rewards that followed; and by how much."""
    returns_BC = gae(rollout.rewards_BC, torch.zeros_like(rollout.values_BC), rollout.mask_BC, gamma, 1.0)[1]
    offset = masked_mean(returns_BC - rollout.values_BC, rollout.mask_BC).item()
    values_BC = torch.where(rollout.mask_BC, rollout.values_BC + offset, 0.0)
    advantages_BC, returns_BC = _advantages(rollout.rewards_BC, values_BC, rollout.mask_BC, gamma, lam)
    return dataclasses.replace(rollout, values_BC=values_BC, advantages_BC=advantages_BC, returns_BC=returns_BC), offset


def reference(ref_policy, policy, temperature: float, autocast):
    """A function Rows -> ref_logprobs_BC: a frozen copy, or the policy itself with its LoRA adapters off (CANON P12)."""
    def of_copy(rows):
        with torch.no_grad(), autocast():
            return policy_pass(ref_policy, rows, temperature)[0]

    def of_base(rows):
        with torch.no_grad(), autocast(), policy.disable_adapter():
            return policy_pass(policy, rows, temperature)[0]

    return of_copy if ref_policy is not None else of_base


class Clock:
    """Seconds by phase: `with clock("sample"): ...`; `clock.take()` returns {"seconds_sample": ...} and starts anew."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def __call__(self, phase: str):
        self.phase, self.began = phase, time.perf_counter()
        return self

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        name = f"seconds_{self.phase}"
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - self.began

    def take(self) -> dict[str, float]:
        taken, self.seconds = self.seconds, {}
        return taken
