"""PPO and SFT with as many processes as they are launched with; test_ppo.py compares one process with two.

    python -m tests.processes OUT KIND       or       accelerate launch --config_file configs/accelerate/cpu-2.yaml -m tests.processes OUT KIND
"""

import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from unittest import mock

import torch

import rlhf.ppo
from rlhf.config import Run
from rlhf.optimizers import linear_lr, set_lr
from rlhf.ppo import update
from rlhf.trl_trainers import DemonstrationTrainer, Recipe
from rlhf.value import ppo_optimizer
from tests.helpers import CORPUS, collect, cpu, gradients_of_steps, nano, policy_and_value, settings, some_prompts, tiny_encoder


class KeepsGradients:
    """In place of an optimizer: the gradients of every step, and no change."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def step(self):
        self.steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)


def mean_id(completion: list[int]) -> float:
    """A score that differs from completion to completion."""
    return sum(completion) / len(completion) / 100


@contextlib.contextmanager
def memory_runs_out_once(owner, name: str, here: bool):
    """While it lasts, and if it is to happen `here`, the second call of the function owner.name, of a microbatch, finds no memory."""
    plain, tried = getattr(owner, name), []

    def loss(*args, **kwargs):
        tried.append(len(tried))
        if here and len(tried) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(*args, **kwargs)

    with mock.patch.object(owner, name, loss):
        yield
    assert len(tried) >= 2, "memory never ran out"


def one_update(accelerator, kind: str) -> dict:
    """A rollout, and the gradients and figures of an update on it; the gradients again, memory having run out on the second process."""
    encoder = tiny_encoder()
    prompts, inner = some_prompts(encoder, 12), policy_and_value(encoder, kind)
    model = accelerator.prepare(inner)
    rollout = collect(accelerator, model, nano(encoder, 9), encoder, prompts, mean_id, budget=100)
    ptx = [(p, encoder.completion_ids(text)) for p, text in zip(prompts, ("cold", "twelve", "plums", "Apples and pears"), strict=False)]
    recorder = KeepsGradients(inner)
    how = settings(microbatch_tokens=100, ptx_coef=0.5)
    figures = update(accelerator, model, recorder, rollout, how, encoder.pad_id, seed=3, ptx_rows=ptx)
    again = KeepsGradients(inner)
    with memory_runs_out_once(rlhf.ppo, "_ppo_loss", here=accelerator.process_index == 1):
        update(accelerator, model, again, rollout, how, encoder.pad_id, seed=3, ptx_rows=ptx)
    return {"rollout": dataclasses.asdict(rollout), "figures": figures, "steps": recorder.steps, "steps_again": again.steps}


def two_sft_steps(encoder, fails_in: int | None = None) -> tuple:
    """Gradients and logged lines of two optimizer steps of SFT; with `fails_in`, memory runs out there once, in its second microbatch."""
    demonstrations = [(p, encoder.completion_ids(CORPUS[i % 6])) for i, p in enumerate(some_prompts(encoder, 24))]
    with tempfile.TemporaryDirectory() as folder:
        trainer = DemonstrationTrainer(nano(encoder), demonstrations, encoder, Recipe("sft", 2, 8, 2, 1e-4, "linear", 3, "no"), Run(), Path(folder))
        with memory_runs_out_once(trainer, "compute_loss", here=trainer.accelerator.process_index == fails_in):
            return gradients_of_steps(trainer)


def ten_rollouts(accelerator, kind: str) -> list[dict]:
    """The figures of ten rollouts, learned from in two epochs of two minibatches of 8 rows each."""
    encoder = tiny_encoder()
    model, ref_policy = policy_and_value(encoder, kind), nano(encoder)
    model, optimizer = accelerator.prepare(model, ppo_optimizer(model, 1e-3, 2e-3))
    curve = []
    for step in range(10):
        set_lr(optimizer, linear_lr(step, 10))
        rollout = collect(accelerator, model, ref_policy, encoder, some_prompts(encoder, 16), mean_id, seed=step)
        curve.append(update(accelerator, model, optimizer, rollout, settings(epochs=2, max_grad_norm=1.0), encoder.pad_id, seed=step))
    return curve


def main(out: str, kind: str) -> None:
    torch.set_num_threads(1)
    accelerator = cpu()
    found = {"processes": accelerator.num_processes, **one_update(accelerator, kind), "curve": ten_rollouts(accelerator, kind),
             "sft": two_sft_steps(tiny_encoder()), "sft_again": two_sft_steps(tiny_encoder(), fails_in=1)}
    if accelerator.is_main_process:
        torch.save(found, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
