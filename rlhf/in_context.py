"""In-context learning (CANON E6; GPT-3, section 2): the embedded world's tasks with no, one or a few solved examples in front.

The examples are earlier turns of the same conversation, so that any policy with a chat template can be asked, whatever it was trained on.
The difference between a policy and SFT on such tasks is what InstructGPT calls the alignment tax where it is below zero.
"""

import math
import random
from dataclasses import dataclass

import numpy as np
import torch

from rlhf import world
from rlhf.comparison import Z95
from rlhf.encoding import Encoder
from rlhf.sampling import sample
from rlhf.workers import ALONE, Workers


@dataclass(frozen=True)
class Task:
    """A held-out prompt of the world and solved examples of its family, as (prompt, answer); k shots are the first k of them."""

    prompt: str
    examples: list[tuple[str, str]]

    def messages(self, shots: int) -> list[dict]:
        """The conversation: `shots` solved examples, then the prompt."""
        turns = [{"role": role, "content": text} for example in self.examples[:shots]
                 for role, text in zip(("user", "assistant"), example, strict=True)]
        return [*turns, {"role": "user", "content": self.prompt}]


def draw_tasks(count: int, most_shots: int, seed: int) -> list[Task]:
    """`count` test prompts, all families alike, each with `most_shots` solved training examples; a pure function of its arguments."""
    rng = random.Random(f"{seed} in context")
    return [Task(prompt, world.solved_examples(prompt, most_shots, rng)) for prompt in world.sample_prompts(count, "test", seed)]


def tasks_that_fit(tasks: list[Task], encoder: Encoder, room: int | None) -> list[Task]:
    """Those whose longest prompt has at most `room` tokens (None: any), so that every number of shots is tried on the same tasks."""
    return [t for t in tasks if room is None or len(encoder.prompt_ids(t.messages(len(t.examples)))) <= room]


def in_context_scores(policy, tasks: list[Task], shots: int, encoder: Encoder, uniforms_BC: torch.Tensor, temperature: float,
                      batch_size: int, workers: Workers = ALONE) -> list[dict]:
    """One sampled answer of `policy` to each task after `shots` examples, graded: {"gold": in [0, 1], "correct": in [0, 1] or None}.

    uniforms_BC: a row of random numbers for each task (`rlhf.sampling.sample`); the same ones for two policies make a paired comparison.
    `correct` is that part of the gold score's rubric by itself: what the policy can do, whatever its manners; None in families without it.
    """
    completions = sample(policy, [encoder.prompt_ids(t.messages(shots)) for t in tasks], uniforms_BC, encoder, temperature, batch_size,
                         workers)
    texts = [encoder.decode(c) for c in completions]
    return [{"gold": world.gold_score(t.prompt, text), "correct": world.gold_parts(t.prompt, text).get("correct")}
            for t, text in zip(tasks, texts, strict=True)]


def summarise_in_context(scores: dict[str, dict[int, list[dict]]], baseline: str = "sft") -> dict:
    """What ``summary.json`` holds under in_context, from policy -> shots -> the grades of `in_context_scores` of the same tasks.

    gold_mean, correct_mean: in [0, 1]. against_sft: mean difference of the gold score to `baseline` with the same shots, with a 95 %
    interval over tasks (normal, paired); left out where there is no baseline.
    """
    rows = []
    for name, by_shots in scores.items():
        for shots, grades in by_shots.items():
            correct = [g["correct"] for g in grades if g["correct"] is not None]
            row = {"policy": name, "shots": shots, "gold_mean": float(np.mean([g["gold"] for g in grades])),
                   "correct_mean": float(np.mean(correct)) if correct else None}
            if baseline in scores and name != baseline:
                row |= _difference(grades, scores[baseline][shots])
            rows.append(row)
    return {"tasks": len(next(iter(next(iter(scores.values())).values()))), "rows": rows}


def _difference(grades: list[dict], baseline: list[dict]) -> dict:
    differences = np.array([a["gold"] - b["gold"] for a, b in zip(grades, baseline, strict=True)])
    half = Z95 * float(differences.std(ddof=1)) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    mean = float(differences.mean())
    return {"against_sft": mean, "ci95": [max(mean - half, -1.0), min(mean + half, 1.0)]}
