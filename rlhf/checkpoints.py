"""Checkpoints of the stages whose loops are ours (pretrain, ppo): written beside, renamed into place, pruned.

What is random in those loops follows from (seed, step), so a checkpoint needs weights, optimizer state and a few numbers.
accelerate would load objects of ours as unrestricted pickles, so their tensors lie in a safetensors file.
"""

import contextlib
import json
import os
import shutil
from pathlib import Path

from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from rlhf.compute import sharded
from rlhf.runs import Stage
from rlhf.sharding import full

KEPT = "kept.safetensors"


def save_checkpoint(accelerator: Accelerator, stage: Stage, step: int, keep: int, kept: dict | None = None, **numbers) -> None:
    """Saves everything accelerate prepared, `kept` (name -> MovingAverage) and `numbers` (JSON values) as of `step` finished steps."""
    path = stage.checkpoints / f"step_{step:07d}"
    beside = path.with_name(path.name + ".partial")
    if stage.main:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    with _a_model_for_each_optimizer(accelerator):
        accelerator.save_state(str(beside), safe_serialization=True)
    accelerator.wait_for_everyone()
    tensors = {f"{name}/{key}": full(tensor) for name, one in (kept or {}).items() for key, tensor in one.state_dict().items()}
    if stage.main:
        save_file(tensors, beside / KEPT)
        (beside / "numbers.json").write_text(json.dumps({"step": step, **numbers}))
        shutil.rmtree(path, ignore_errors=True)
        os.replace(beside, path)
        for old in finished_checkpoints(stage)[:-keep]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def load_checkpoint(accelerator: Accelerator, stage: Stage, kept: dict | None = None) -> dict:
    """Restores the latest checkpoint, `kept` included, and returns its numbers; {"step": 0} when there is none."""
    found = finished_checkpoints(stage)
    if not found:
        return {"step": 0}
    with _a_model_for_each_optimizer(accelerator):
        accelerator.load_state(str(found[-1]))
    if kept:
        tensors = load_file(found[-1] / KEPT)
        for name, one in kept.items():
            one.load_state_dict({key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")})
    return json.loads((found[-1] / "numbers.json").read_text())


def finished_checkpoints(stage: Stage) -> list[Path]:
    """Whole checkpoints, oldest first."""
    return sorted(p for p in stage.checkpoints.glob("step_*") if (p / "numbers.json").is_file() and not p.name.endswith(".partial"))


@contextlib.contextmanager
def _a_model_for_each_optimizer(accelerator: Accelerator):
    """accelerate goes through the optimizers of sharded models as if each had a model of its own; pretrain has three for one model."""
    models, optimizers = accelerator._models, accelerator._optimizers
    if sharded(accelerator) and len(models) == 1:
        accelerator._models = models * len(optimizers)
    try:
        yield
    finally:
        accelerator._models = models
