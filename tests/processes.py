"""One rollout and one update with as many processes as it is launched with; test_ppo.py compares one process with two.

    python -m tests.processes OUT            or            accelerate launch --config_file configs/accelerate/cpu-2.yaml -m tests.processes OUT
"""

import dataclasses
import sys

import torch

from rlhf.compute import my_share
from rlhf.ppo import update
from rlhf.rollout import evaluate_tokens, make_rollout, reference
from rlhf.sampling import draw_uniforms, sample
from tests.helpers import cpu, nano, policy_and_value, settings, some_prompts, tiny_encoder


class KeepsGradients:
    """In place of an optimizer: the gradients of every step, and no change."""

    def __init__(self, model):
        self.model, self.steps = model, []

    def step(self):
        self.steps.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})

    def zero_grad(self):
        self.model.zero_grad(set_to_none=True)


def main(out: str, kind: str) -> None:
    torch.set_num_threads(1)
    accelerator, encoder = cpu(), tiny_encoder()
    prompts, inner = some_prompts(encoder, 12), policy_and_value(encoder, kind)
    model = accelerator.prepare(inner)
    mine, first = my_share(accelerator, prompts), 12 * accelerator.process_index // accelerator.num_processes
    completions = sample(inner.policy, mine, draw_uniforms(12, 8, 1)[first : first + len(mine)], encoder, 1.0, len(mine))
    scores_B = torch.tensor([sum(c) / len(c) / 100 for c in completions])
    ref_logprobs = reference(nano(encoder, 9), inner.policy, 1.0, accelerator.autocast)
    tokens = evaluate_tokens(model, ref_logprobs, list(zip(mine, completions, strict=True)), encoder.pad_id, 1.0, 100, accelerator.device)
    rollout = make_rollout(accelerator, mine, completions, scores_B, tokens, 0.05, 1.0, 0.95, False)
    ptx = [(p, encoder.completion_ids(text)) for p, text in zip(prompts, ("cold", "twelve", "plums", "Apples and pears"), strict=False)]
    recorder = KeepsGradients(inner)
    how = settings(microbatch_tokens=100, ptx_coef=0.5)
    figures = update(accelerator, model, recorder, rollout, how, encoder.pad_id, seed=3, ptx_rows=ptx)
    if accelerator.is_main_process:
        torch.save({"processes": accelerator.num_processes, "rollout": dataclasses.asdict(rollout), "figures": figures, "steps": recorder.steps}, out)
    accelerator.end_training()


if __name__ == "__main__":
    main(*sys.argv[1:])
