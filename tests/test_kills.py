"""Runs that are killed at random moments end as if nothing had happened (tests/kills.py), and two runs of the same seed are the same."""

import os
import subprocess
import sys

import pytest

from tests.kills import ROOT, SETTINGS, contents

SMALL = ("world.documents=300", "world.demonstrations=150", "world.prompts=150", "world.test_prompts=12", "pretrain.steps=20", "collect.prompts=60",
         "reward.batch_size=6", "reward.microbatch=3", "sft.microbatch=8", "ppo.batch_size=16", "ppo.minibatches=2", "compare.prompts=12")


def kills(*words: str) -> str:
    """What `python -m tests.kills WORDS...` said last, after a kill in each stage."""
    command = [sys.executable, "-m", "tests.kills", "--kills", "7", "--per-stage", "1", *SMALL, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_killed_in_every_stage_ends_with_the_same_models(precision):
    assert kills(f"run.precision={precision}", "--seed", "1") == "7 kills, every model the same"


@pytest.mark.slow
def test_two_processes_killed_in_every_stage_end_with_the_same_models():
    assert kills("--processes", "2", "--seed", "2") == "7 kills, every model the same"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_settings_and_seed_make_the_same_run_in_every_stage(tmp_path, precision):
    """Processes of their own, and another order of sets and dicts in each (PYTHONHASHSEED): weights, metrics without times, data, samples."""
    runs = [tmp_path / "a", tmp_path / "b"]
    started = [subprocess.Popen([sys.executable, "-m", "stages.pipeline", "--config", "configs/tiny.yaml", f"run.dir={run}", *SETTINGS,
                                 *SMALL, f"run.precision={precision}"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                                env={**os.environ, "PYTHONHASHSEED": str(seed)}) for seed, run in enumerate(runs)]
    for process in started:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said[-3000:]
    first, second = map(contents, runs)
    assert first == second and sum(name.name == "model.safetensors" for name in first) >= 4
