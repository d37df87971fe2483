"""Stages on a GPU that lives in host memory (tests/host_gpu.py): every tensor is where it belongs, and the figures are those of the CPU."""

import json
import shutil
import subprocess
import sys

import pytest

from rlhf.paths import PACKAGE
from tests.host_gpu import build

MEASURED = ("seconds", "tokens_per_second", "peak_memory_mb")  # what says how fast or large, not what was computed
FP32 = ["--config", "configs/tiny.yaml", "run.precision=fp32"]

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the device with")


@pytest.fixture(scope="module")
def gpu(tmp_path_factory):
    """The words that run a module on it."""
    library = tmp_path_factory.mktemp("device") / "host_gpu.so"
    build(library)
    return [sys.executable, "-m", "tests.host_gpu", str(library)]


@pytest.fixture(scope="module")
def cpu_run(tmp_path_factory):
    """A finished tiny run in fp32 on the CPU."""
    folder = tmp_path_factory.mktemp("cpu") / "run"
    _run([sys.executable, "-m"], "stages.pipeline", *FP32, f"run.dir={folder}")
    return folder


def _run(words, *arguments) -> str:
    done = subprocess.run([*words, *arguments], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def _computed(folder) -> list[dict]:
    """The figures of a stage, step by step, without what was measured."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(MEASURED)} for row in rows]


@pytest.mark.parametrize("code, said", [
    ("torch.ones(2, device='cuda') + torch.ones(2)", "at least two devices"),
    ("torch.nn.functional.embedding(torch.tensor([0]), torch.ones(2, 2, device='cuda'))", "tensors on two devices"),
    ("torch.ones(2, device='cuda').multinomial(1, generator=torch.Generator())", "a generator of the CPU"),
    ("torch.ones(2, device='cuda').numpy()", "can't convert cuda"),
])
def test_the_device_refuses_what_a_gpu_refuses(gpu, code, said):
    whole = f"from pathlib import Path; from tests.host_gpu import start; start(Path({gpu[-1]!r})); import torch; {code}"
    done = subprocess.run([sys.executable, "-c", whole], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and said in done.stderr


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_a_stage_computes_on_a_gpu_what_it_computes_on_the_cpu(gpu, cpu_run, tmp_path, stage):
    """Other kernels are chosen there (attention, sampling, threads, the optimizer): the same but for rounding."""
    shutil.copytree(cpu_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / stage)
    said = _run(gpu, f"stages.{stage}", *FP32, f"run.dir={tmp_path / 'run'}")
    assert "1 process on cuda, fp32" in said
    ours, theirs = _computed(tmp_path / "run" / stage), _computed(cpu_run / stage)
    assert len(ours) == len(theirs)
    for row, expected in zip(ours, theirs, strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-5)


def test_every_stage_runs_on_a_gpu_in_bf16(gpu, tmp_path):
    """With what else moves tensors: adapters, an ensemble, a moving average, an SFT term, few-shot tasks, seven policies; and the benchmark."""
    words = ["model.lora_rank=4", "reward.members=2", "ppo.ensemble=uncertainty", "ppo.ema_decay=0.9", "ppo.ptx_coef=1", "compare.shots=[0, 1]",
             "compare.shot_tasks=10", "compare.policies=[pretrained, sft, best_of_4, ppo, ppo_last, sft_at_0.5, untrained]"]
    said = _run(gpu, "stages.pipeline", "--config", "configs/tiny.yaml", f"run.dir={tmp_path / 'run'}", *words)
    assert "1 process on cuda, bf16" in said and (tmp_path / "run" / "compare" / "DONE").is_file()
    _run(gpu, "rlhf", "bench", "--run", str(tmp_path / "run"), "--steps", "1")
