"""The PPO update: epochs, minibatches and microbatches over one rollout, and what it reports (CANON P3-P5, P9-P11, A1, A4)."""

import math
from dataclasses import dataclass
from functools import partial

import torch

from rlhf.compute import average_gradients, max_over_processes, my_share, sharded, sum_over_processes
from rlhf.kl import k3
from rlhf.losses import language_model_loss, policy_loss, value_loss
from rlhf.memory import Microbatch
from rlhf.passes import PolicyAndValue, even_groups, make_rows, pass_cost, split_to
from rlhf.rollout import Rollout
from rlhf.sharding import shared_as
from rlhf.workers import ALONE, Workers, accumulate


@dataclass(frozen=True)
class UpdateSettings:
    """What the update needs to know; names and units as in rlhf/config.py, section ppo."""

    epochs: int
    minibatches: int
    microbatch_tokens: int
    clip: float
    value_clip: float
    value_coef: float
    policy_coef: float  # 0 while only the value model learns
    ptx_coef: float
    max_grad_norm: float
    target_kl: float | None
    temperature: float


MEANS = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "ratio_drift")  # over the real tokens of a minibatch
SUMS = (*MEANS, "ptx_loss", "tokens", "ptx_tokens")


def update(accelerator, model, optimizer, rollout: Rollout, settings: UpdateSettings, pad_id: int, seed: int, ptx_rows=(), after_step=None,
           workers: Workers = ALONE, microbatch: Microbatch | None = None, on_skip=None) -> dict:
    """Optimizes `model` (a prepared PolicyAndValue) on a rollout; returns figures for metrics.jsonl.

    `ptx_rows`: (prompt, completion) id pairs for PPO-ptx, shared out over the optimizer steps. `after_step()` runs after each step.
    `workers`: microbatches are differentiated side by side where there are several. `microbatch`: halved when memory runs out; kept by the
    caller for the next rollouts (None: of settings.microbatch_tokens).
    A step whose gradient or figures are not finite is left out, counted, and told to `on_skip(rows of the rollout)`.
    """
    generator, microbatch = torch.Generator().manual_seed(seed), microbatch or Microbatch(settings.microbatch_tokens)
    steps, skipped, first, epochs_run = [], 0, {}, 0
    ptx = [list(ptx_rows[i :: settings.epochs * settings.minibatches]) for i in range(settings.epochs * settings.minibatches)]
    for _ in range(settings.epochs):
        order = torch.randperm(len(rollout.prompts), generator=generator).tolist()
        size = len(order) // settings.minibatches
        epoch_kl = []
        for start in range(0, size * settings.minibatches, size):
            rows, ptx_rows_now = order[start : start + size], ptx[len(steps)]
            figures, norm = _step(accelerator, model, optimizer, rollout, rows, ptx_rows_now, settings, pad_id, workers, microbatch)
            if not steps:
                first = {f"first_{name}": figures[name] for name in ("ratio_error", "ratio_drift")}
            if math.isfinite(norm) and all(map(math.isfinite, figures.values())):
                optimizer.step()
                if after_step is not None:
                    after_step()
            else:
                skipped += 1
                if on_skip is not None:
                    on_skip(rows)
            optimizer.zero_grad()
            steps.append({**figures, "grad_norm": norm})
            epoch_kl.append(figures["approx_kl"])
        epochs_run += 1
        if settings.target_kl is not None and sum(epoch_kl) / len(epoch_kl) > settings.target_kl:
            break
    names = ("policy_loss", "value_loss", "approx_kl", "clip_fraction", "grad_norm")
    means = {n: sum(s[n] for s in steps) / len(steps) for n in names}
    if ptx_losses := [s["ptx_loss"] for s, rows in zip(steps, ptx, strict=False) if rows]:  # rows may be fewer than steps; epochs may end early
        means["ptx_loss"] = sum(ptx_losses) / len(ptx_losses)
    return {**means, **first, "skipped_steps": skipped, "epochs_run": epochs_run}


def _step(accelerator, model, optimizer, rollout, rows: list[int], ptx_rows: list, settings: UpdateSettings, pad_id: int,
          workers: Workers, microbatch: Microbatch) -> tuple[dict, float]:
    """Gradients of one minibatch over all processes; returns its figures and the gradient norm before clipping (nan or inf: do not step)."""
    def attempt(tokens: int):
        optimizer.zero_grad()  # of a try that did not fit into memory
        return _gradients(accelerator, model, rollout, rows, ptx_rows, settings, pad_id, workers, tokens)

    longest = max([len(rollout.prompts[i]) + len(rollout.completions[i]) for i in rows] + [len(p) + len(c) for p, c in ptx_rows])
    sums, largest = microbatch.attempt(attempt, longest, sharded(accelerator))
    average_gradients(accelerator, model)
    totals = dict(zip(SUMS, sum_over_processes(accelerator, sums).tolist(), strict=True))
    figures = {n: totals[n] / max(totals["tokens"], 1) for n in MEANS}
    figures["ptx_loss"] = totals["ptx_loss"] / max(totals["ptx_tokens"], 1)
    figures["ratio_error"] = float(accelerator.gather(largest[None]).max())
    return figures, _clip(accelerator, model, settings.max_grad_norm)


def _gradients(accelerator, model, rollout, rows: list[int], ptx_rows: list, settings: UpdateSettings, pad_id: int,
               workers: Workers, microbatch_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Leaves this process's gradients of one minibatch in .grad; returns its SUMS, and its largest |ratio - 1|."""
    count = int(rollout.mask_BC[rows].sum())  # real tokens of the minibatch, all processes together (CANON P4)
    mine, my_ptx = my_share(accelerator, rows), my_share(accelerator, ptx_rows) if ptx_rows else []
    ptx_count = sum(len(c) for _, c in ptx_rows)

    def groups_of(lengths: list[int]) -> list[list[int]]:
        groups = even_groups(lengths, microbatch_tokens, workers.count, pass_cost(model))
        return split_to(groups, max_over_processes(accelerator, len(groups))) if sharded(accelerator) else groups

    def ppo_part(group):
        loss, sums, error = _ppo_loss(accelerator, model, rollout, [mine[i] for i in group], settings, pad_id)
        # The processes' gradients are averaged; the loss is a sum over tokens of all of them, divided once
        return loss * accelerator.num_processes / count, (sums, error)

    def ptx_part(group):
        loss, sums = _ptx_loss(accelerator, model, [my_ptx[i] for i in group], pad_id)
        return settings.ptx_coef * loss * accelerator.num_processes / ptx_count, (sums, torch.zeros_like(sums[0]))

    parts = [partial(ppo_part, group) for group in groups_of([len(rollout.prompts[i]) + len(rollout.completions[i]) for i in mine])]
    if my_ptx:
        parts += [partial(ptx_part, group) for group in groups_of([len(p) + len(c) for p, c in my_ptx])]
    sums, errors = (torch.stack(column) for column in zip(*accumulate(accelerator, workers, model, parts), strict=True))
    return sums.sum(0), errors.max()


def _ppo_loss(accelerator, model, rollout, rows: list[int], settings: UpdateSettings, pad_id: int):
    """Weighted loss sum of a microbatch, its sums for the figures, and its largest |ratio - 1|."""
    batch = make_rows([rollout.prompts[i] for i in rows], [rollout.completions[i] for i in rows], pad_id, accelerator.device)
    width = batch.mask_BC.shape[1]
    old_BC, advantages_BC, old_values_BC, returns_BC = (
        t[rows, :width].to(accelerator.device)
        for t in (rollout.old_logprobs_BC, rollout.advantages_BC, rollout.values_BC, rollout.returns_BC))
    with accelerator.autocast():
        logprobs_BC, _, values_BC = model(batch, settings.temperature)
    policy_sum, count = policy_loss(logprobs_BC, old_BC, advantages_BC, batch.mask_BC, settings.clip)
    value_sum, _ = value_loss(values_BC, old_values_BC, returns_BC, batch.mask_BC, settings.value_clip)
    with torch.no_grad():
        ratio_BC = torch.exp(torch.where(batch.mask_BC, logprobs_BC - old_BC, 0.0))
        off_BC = (ratio_BC - 1).abs()
        kl_sum = torch.where(batch.mask_BC, k3(old_BC, logprobs_BC), 0.0).sum()
        sums = _sums(policy_loss=policy_sum, value_loss=value_sum, approx_kl=kl_sum, clip_fraction=(off_BC > settings.clip).sum(),
                     ratio_drift=off_BC.sum(), tokens=count)
    return settings.policy_coef * policy_sum + settings.value_coef * value_sum, sums, off_BC.max().double()


def _ptx_loss(accelerator, model, pairs: list, pad_id: int):
    """Language-model loss sum of PPO-ptx rows (IG eq. 2), and its sums for the figures."""
    batch = make_rows([p for p, _ in pairs], [c for _, c in pairs], pad_id, accelerator.device)
    with accelerator.autocast():
        logprobs_BC, _, values_BC = model(batch, 1.0)
    loss, count = language_model_loss(logprobs_BC, batch.mask_BC)
    return loss + 0.0 * values_BC.sum(), _sums(ptx_loss=loss, ptx_tokens=count)  # the zero term keeps the value model in every process's graph


def _sums(**found: torch.Tensor) -> torch.Tensor:
    """[len(SUMS)] float64 in the order of SUMS, 0 for those that a microbatch has none of."""
    none = next(iter(found.values())).new_zeros((), dtype=torch.float64)
    return torch.stack([found.get(name, none).detach().double() for name in SUMS])


def _clip(accelerator, model, max_norm: float) -> float:
    """Clips policy and value model each by itself; the larger norm of the two, nan or inf when either is not finite."""
    inner: PolicyAndValue = accelerator.unwrap_model(model)
    norms = []
    for part in (inner.policy, inner.value_model):
        parameters = [p for p in part.parameters() if p.grad is not None]
        if parameters:
            norms.append(float(accelerator.clip_grad_norm_(parameters, max_norm)))
    return max(norms, key=lambda n: n if math.isfinite(n) else math.inf)


class MovingAverage:
    """Exponential moving average of a model's trainable weights (CANON P10): average <- decay·average + (1 - decay)·weights."""

    def __init__(self, model, decay: float):
        self.model, self.decay = model, decay
        self.average = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    def step(self) -> None:
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    self.average[name].lerp_(p, 1 - self.decay)

    def copy_to_model(self) -> None:
        """The average takes the place of the weights."""
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if p.requires_grad:
                    p.copy_(self.average[name])

    def state_dict(self) -> dict:
        return self.average

    def load_state_dict(self, state: dict) -> None:
        for name, tensor in state.items():
            self.average[name].copy_(shared_as(tensor, like=self.average[name]))
