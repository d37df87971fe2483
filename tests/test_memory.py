"""Memory that runs out: microbatches are halved, the gradients stay those of the whole minibatch, and what cannot fit is said."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch

import rlhf.learner
import rlhf.ppo
from rlhf.config import load_config
from rlhf.errors import TrainingStopped
from rlhf.learner import Learner
from rlhf.memory import Microbatch, is_out_of_memory
from rlhf.models import load_encoder
from rlhf.paths import PACKAGE
from rlhf.ppo import update
from rlhf.prompts import Prompt
from rlhf.workers import Workers
from stages import pretrain
from tests import processes
from tests.helpers import collect, cpu, nano, policy_and_value, settings, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 12)


@pytest.mark.parametrize(("error", "expected"), [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True), (MemoryError(), True),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
    (RuntimeError("could not create a primitive"), True), (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False), (ValueError("out of memory"), False)])
def test_what_counts_as_memory_running_out(error, expected):
    assert is_out_of_memory(error) is expected


def fits(limit):
    """A function of a token budget that runs out of memory above `limit`."""
    def function(tokens):
        if tokens > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return tokens

    return function


def test_the_microbatch_is_halved_until_it_fits_and_stays_so(capsys):
    microbatch = Microbatch(1000)
    assert microbatch.attempt(fits(300), least=40) == 250 == microbatch.size
    assert microbatch.attempt(fits(300), least=40) == 250
    assert capsys.readouterr().out.count("memory ran out") == 2  # at 500 and at 250 tokens, not again


def test_one_row_is_the_least_and_then_the_run_stops_with_a_remedy():
    assert Microbatch(100).attempt(fits(60), least=60) == 60
    with pytest.raises(TrainingStopped, match="one row: at most 70.*ppo.microbatch_tokens"):
        Microbatch(100).attempt(fits(60), least=70)


def test_a_model_sharded_among_processes_stops_rather_than_leave_the_others_waiting():
    with pytest.raises(TrainingStopped):
        Microbatch(1000).attempt(fits(300), least=40, sharded=True)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError):
        Microbatch(10).attempt(lambda tokens: 1 / 0, least=1)


def test_P4_an_update_that_ran_out_of_memory_half_way_has_the_gradients_of_one_that_did_not(monkeypatch):
    model = policy_and_value(ENCODER)
    rollout = collect(cpu(), model, nano(ENCODER, 9), ENCODER, PROMPTS, len)

    def gradients(budget):
        recorder = processes.KeepsGradients(model)
        figures = update(cpu(), model, recorder, rollout, settings(minibatches=1, microbatch_tokens=budget), ENCODER.pad_id, seed=0)
        return recorder.steps[0], figures

    expected, whole = gradients(100)
    plain, tried = rlhf.ppo._ppo_loss, []

    def second_large_one_fails(accelerator, model, rollout, rows, *rest):
        tried.append(len(rows))
        if len(tried) == 2:  # the first microbatch already left gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(accelerator, model, rollout, rows, *rest)

    monkeypatch.setattr(rlhf.ppo, "_ppo_loss", second_large_one_fails)
    found, figures = gradients(200)
    assert len(tried) > 3 and figures == pytest.approx(whole, rel=1e-5)
    scale = max(g.abs().max() for g in expected.values())
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() <= 1e-6 * scale, name


@pytest.mark.parametrize("workers", [1, 2])
def test_P4_pretraining_that_ran_out_of_memory_has_the_gradients_of_a_step_that_did_not(monkeypatch, workers):
    rows, plain, tried = [list(range(5, 5 + length)) for length in range(8, 24)], pretrain._loss, []
    model = pretrain.NextTokenLoss(nano(ENCODER))

    def gradients(tokens):
        model.zero_grad()
        figures = pretrain._backward(cpu(), Workers(workers), model, rows, ENCODER.pad_id, Microbatch(tokens, "pretrain.batch_tokens"))
        return torch.cat([p.grad.flatten() for p in model.parameters()]), figures

    def four_rows_fit(model, part, *rest):
        tried.append(len(part))
        if len(part) > 4 and len(tried) > 1:  # where parts follow each other the first leaves gradients behind
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(model, part, *rest)

    expected, (loss, count) = gradients(384)
    monkeypatch.setattr(pretrain, "_loss", four_rows_fit)
    found, (loss_again, count_again) = gradients(192)
    assert max(tried) == 8 and tried[-4:] == [4] * 4 and count_again == count == sum(length - 1 for length in range(8, 24))
    assert loss_again == pytest.approx(loss, rel=1e-6)
    assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()


LIMITED = """
import resource, torch
from rlhf.ppo import update
from tests.helpers import collect, cpu, nano, policy_and_value, settings, some_prompts, tiny_encoder
from tests.processes import KeepsGradients

torch.set_num_threads(1)
encoder, accelerator = tiny_encoder(), cpu()
model = policy_and_value(encoder)
rollout = collect(accelerator, model, nano(encoder, 9), encoder, some_prompts(encoder, 400), len, budget=500)

def gradients(budget):
    recorder = KeepsGradients(model)
    update(accelerator, model, recorder, rollout, settings(minibatches=1, microbatch_tokens=budget), encoder.pad_id, seed=0)
    return recorder.steps[0]

expected = gradients(500)
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 40 * 2**20,) * 2)
found = gradients(16_384)
scale = max(g.abs().max() for g in expected.values())
print("largest drift", max(float((found[name] - g).abs().max() / scale) for name, g in expected.items()))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="the address space of a process is only limited so on Linux")
def test_P4_an_update_of_9000_tokens_within_40_mb_halves_its_microbatches_and_has_the_same_gradients():
    """A real limit: torch and oneDNN fail in their own words. Large blocks are mapped, so that what a failed try held leaves the address space."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True, cwd=PACKAGE.parent, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("memory ran out: microbatches have at most") >= 2
    assert float(done.stdout.split("largest drift ")[1]) < 1e-6


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc, which alone keeps what was freed")
def test_freed_memory_goes_back_to_the_system():
    """300 MB in small blocks are freed except for the last, below which glibc keeps everything."""
    code = """
from rlhf.memory import give_back
pages = lambda: int(open("/proc/self/statm").read().split()[1])
blocks = [bytearray(100_000) for _ in range(3000)]
last = blocks[-1]
del blocks
held = pages()
give_back()
print(held - pages())
"""
    went = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(went) * resource.getpagesize() > 200e6


def test_P4_sampling_that_ran_out_of_memory_is_tried_with_fewer_rows_at_once(monkeypatch, tmp_path, tiny_folder):
    """The same answers: what a prompt gets does not depend on its batch."""
    config = load_config("configs/tiny.yaml", [f"run.dir={tmp_path}", "run.precision=fp32", "ppo.score=tests.test_memory:by_length",
                                               "ppo.microbatch_tokens=4096", "data.max_completion_tokens=6"])
    shutil.copytree(tiny_folder, tmp_path / "sft" / "model")
    encoder = load_encoder(str(tiny_folder))
    learner = Learner(config, cpu(), encoder)
    rows = [Prompt(m, encoder.prompt_ids(m), str(i), None) for i, m in enumerate([{"role": "user", "content": f"Say {n}"}] for n in range(6))]
    expected, plain, tried = learner.roll(rows, 0.1, 1, 0).completions, rlhf.learner.sample, []

    def few_rows_fit(policy, prompts, uniforms_BC, encoder, temperature, batch_size, *rest):
        tried.append(batch_size)
        if len(tried) < 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(policy, prompts, uniforms_BC, encoder, temperature, batch_size, *rest)

    monkeypatch.setattr(rlhf.learner, "sample", few_rows_fit)
    assert learner.roll(rows, 0.1, 1, 0).completions == expected
    assert [round(tried[0] / size) for size in tried] == [1, 2, 4]

    def one_row_fits(policy, prompts, uniforms_BC, encoder, temperature, batch_size, *rest):
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(policy, prompts, uniforms_BC, encoder, temperature, batch_size, *rest)

    monkeypatch.setattr(rlhf.learner, "sample", one_row_fits)
    assert learner.roll(rows, 0.1, 1, 0).completions == expected


def by_length(prompts, completions):
    return [float(len(c)) for c in completions]
