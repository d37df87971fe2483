"""Prompts of a run for sampling: read, encoded, those too long for the model left out and counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rlhf import world
from rlhf.data.examples import LONG_PROMPT
from rlhf.data.splits import SPLITS
from rlhf.encoded import EncodedRows, encoded_rows
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.progress import say


@dataclass(frozen=True)
class Prompt:
    """One prompt: its messages, its ids up to where the completion begins, its id, and its family in the embedded world (or in its own file)."""

    messages: list[dict]
    ids: list[int]
    id: str
    family: str | None

    @property
    def text(self) -> str:
        return self.messages[-1]["content"]


def load_prompts(run_dir: str, split: str, encoder: Encoder, max_tokens: int) -> EncodedRows:
    """Prompts of RUN/data/prompts/SPLIT.jsonl of at most `max_tokens` ids. Raises InputError when none is left."""
    def encode(rows: list[dict]) -> list[dict | str]:
        return [LONG_PROMPT if len(ids) > max_tokens else
                {"messages": row["prompt"], "ids": ids, "id": row["id"], "family": row.get("family"), "length": len(ids)}
                for row, ids in zip(rows, encoder.prompts_ids([row["prompt"] for row in rows]), strict=True)]

    path = Path(run_dir) / "data" / "prompts" / f"{split}.jsonl"
    kept = encoded_rows(path, encoder, "prompts", (max_tokens,), encode, lambda row: Prompt(**row))
    if not kept.read:
        raise _no_prompts(path)
    if not kept:
        raise InputError(f"{path}: none of {kept.read} prompts has at most data.max_prompt_tokens={max_tokens} tokens; raise it, or give others")
    if len(kept) < kept.read:
        say(f"prompts: {kept.read - len(kept):,} of {kept.read:,} {split} prompts left out, longer than data.max_prompt_tokens={max_tokens}")
    return kept


def refuse_empty_parts(run_dir: str) -> None:
    """InputError where no prompt fell into one of the three parts: PPO evaluates on eval, and the comparison asks test, hours later."""
    for split in SPLITS:
        path = Path(run_dir) / "data" / "prompts" / f"{split}.jsonl"
        if path.stat().st_size == 0:
            raise _no_prompts(path)


def _no_prompts(path: Path) -> InputError:
    return InputError(f"{path}: there are no {path.stem} prompts: none of the run's fell into that part; make another run (run.dir=...) with more "
                      f"prompts, or with a larger data.{path.stem}_fraction")


def prompts_of_step(prompts: Sequence, step: int, batch_size: int, seed: int) -> list:
    """The prompts of a rollout: consecutive in a permutation of all prompts drawn anew for every pass."""
    picked = []
    for place in range(step * batch_size, (step + 1) * batch_size):
        epoch, index = divmod(place, len(prompts))
        if not picked or index == 0:
            order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        picked.append(prompts[order[index]])
    return picked


def gold_scores(prompts: list[Prompt], completions: list[str]) -> list[float] | None:
    """Gold scores in [0, 1], or None when the prompts are not of the embedded world. Learning sees them only as the raters' noisy ranks."""
    # People's own rows may have a `family` too
    if any(p.family is None or world.parse(p.text) is None for p in prompts):
        return None
    return [world.gold_score(p.text, c) for p, c in zip(prompts, completions, strict=True)]
