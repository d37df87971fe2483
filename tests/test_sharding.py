"""Models sharded by FSDP2: the stages end with the weights of one process that holds everything (two CPU processes, gloo)."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil  # accelerate brings it
import pytest
import torch
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from safetensors.torch import load_file

import rlhf.compute
from rlhf.config import load_config
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl
from rlhf.sharding import full_weights, whole
from stages import collect, ppo, prepare, pretrain, reward, sft
from tests.test_accelerate_configs import _launch_arguments

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = ["run.precision=fp32", "run.threads=1", "ppo.save_every=2", "pretrain.steps=20", "sft.epochs=0.4", "ppo.ema_decay=0.5"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> tuple[Path, Path]:
    """One process's run up to PPO, and one with sft, reward and ppo sharded between two, on the same text, tokenizer and rankings."""
    one, two = (tmp_path_factory.mktemp("sharding") / name for name in ("one", "two"))
    config = load_config("configs/tiny.yaml", [*SETTINGS, f"run.dir={one}"])
    for stage in (prepare, pretrain, sft, collect):
        stage.main(config)
    shutil.copytree(one, two)
    shutil.rmtree(two / "sft")
    for stage in (reward, ppo):
        stage.main(config)
    fsdp = {name: value for name, value in prepare_multi_gpu_env(_launch_arguments("fsdp2.yaml")).items() if name.startswith("FSDP_")}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu-2.yaml", "-m", "tests.sharded"]
    with subprocess.Popen([*command, *SETTINGS, f"run.dir={two}"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_FSDP": "true", **fsdp}) as launched:
        try:
            said, _ = launched.communicate(timeout=300)
        except subprocess.TimeoutExpired:  # processes that wait for each other would go on doing so
            for one_of_them in (*psutil.Process(launched.pid).children(recursive=True), launched):
                one_of_them.kill()
            raise
    assert launched.returncode == 0, said[-6000:]
    assert "stopped after a checkpoint" in said and "2 processes on cpu" in said
    return one, two


@pytest.mark.parametrize("folder", ["sft/model", "reward/model", "ppo/model", "ppo/model_last"])
def test_a_sharded_model_ends_with_the_weights_of_one_process(runs, folder):
    """Up to rounding: a gradient near 0 may make parts of a step of 2e-4 of it. The last bias of a reward model is left out: it adds the same to
    both answers of a pair, so its gradient is nothing but rounding."""
    alone, shared = (load_file(run / folder / "model.safetensors") for run in runs)
    assert alone.keys() == shared.keys()
    for name, weights in alone.items():
        apart = (shared[name] - weights).abs()
        assert (folder, name) == ("reward/model", "transformer.ln_f.bias") or apart.mean() < 1e-6 and apart.max() < 1e-4, name
    said, other = (json.loads((run / folder / "config.json").read_text()) for run in runs)
    assert other == said | {name: pytest.approx(said[name], rel=1e-3) for name in ("reward_gain", "reward_bias") if name in said}


@pytest.mark.parametrize(("stage", "names"), [("sft", ("loss", "grad_norm")), ("reward", ("loss", "grad_norm", "accuracy")),
                                              ("ppo", ("score_mean", "kl", "policy_loss", "value_loss", "grad_norm"))])
def test_its_figures_are_those_of_one_process(runs, stage, names):
    alone, shared = ([row for row in read_jsonl(run / stage / "metrics.jsonl") if "grad_norm" in row] for run in runs)
    assert len(alone) == len(shared) >= 2
    for row, other in zip(alone, shared, strict=True):
        assert [other[name] for name in names] == pytest.approx([row[name] for name in names], rel=1e-4, abs=1e-5)
    assert stage != "ppo" or max(row["first_ratio_error"] for row in shared) < 1e-4  # CANON A1


def test_its_rollouts_are_those_of_one_process(runs):
    alone, shared = ([row for path in sorted((run / "ppo" / "rollouts").iterdir()) for row in read_jsonl(path)] for run in runs)
    assert [row["completion"] for row in shared] == [row["completion"] for row in alone]


def test_a_model_of_one_process_stays_as_it_is():
    model = torch.nn.Linear(2, 2)
    weight = model.weight
    with whole(model):
        assert model.weight is weight and full_weights(model) is None


@pytest.mark.parametrize(("setting", "message"), [("model.lora_rank=2", "model.lora_rank=2 with a model sharded"),
                                                  ("ppo.minibatches=32", "minibatches that 2 processes cannot share equally"),
                                                  ("ppo.ptx_coef=1 ppo.epochs=3", "demonstrations of a step .* that 2 processes cannot share")])
def test_settings_that_would_make_processes_wait_for_each_other_are_refused(runs, setting, message, tmp_path, monkeypatch):
    sharded = SimpleNamespace(num_processes=2, distributed_type=DistributedType.FSDP)
    monkeypatch.setattr(rlhf.compute, "Accelerator", lambda **_: sharded)
    shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("ppo"))
    with pytest.raises(InputError, match=message):
        ppo.main(load_config("configs/tiny.yaml", [*SETTINGS, f"run.dir={tmp_path / 'run'}", *setting.split()]))
