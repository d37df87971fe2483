"""Threads that compute parts of a step: the same gradients as one thread, to the bit whoever finishes first."""

import os
import subprocess
import sys
import time
from functools import partial

import pytest
import torch

from rlhf.cli import STAGES
from rlhf.optimizers import pretraining_optimizers
from rlhf.paths import PACKAGE
from rlhf.workers import Workers, accumulate
from tests.helpers import cpu, nano, tiny_encoder


def gradients(count: int, autocast: bool = False) -> list[torch.Tensor]:
    model, rows = nano(tiny_encoder()), torch.arange(6 * 12).reshape(6, 12) % 50 + 5

    def loss(part):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = model(input_ids=part, use_cache=False).logits
        value = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum") / 100
        return value, value.item()

    assert len(accumulate(cpu(), Workers(count), model, [partial(loss, rows[:3]), partial(loss, rows[3:])])) == 2
    return [p.grad for p in model.parameters()]


def test_P4_threads_give_the_gradients_of_one_backward():
    for one, two in zip(gradients(1), gradients(2), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("autocast", [False, True])
def test_P4_threads_give_the_same_bits_every_time(autocast):
    first = gradients(2, autocast)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(2, autocast), strict=True))


def test_results_keep_their_order_and_torchs_threads_come_back():
    before = torch.get_num_threads()
    assert Workers(3).map(lambda i: (time.sleep(0.02 * (3 - i)), i, torch.get_num_threads())[1:], [0, 1, 2]) == [(0, 1), (1, 1), (2, 1)]
    assert torch.get_num_threads() == before


def test_an_error_in_a_thread_reaches_the_caller():
    with pytest.raises(ZeroDivisionError):
        Workers(2).map(lambda i: 1 / i, [1, 0])


def test_the_optimizers_of_pretraining_hold_every_weight_once_and_step_alike_in_threads():
    models = []
    for count in (1, 2):
        model = nano(tiny_encoder())
        torch.manual_seed(3)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        optimizers = pretraining_optimizers(model, 1e-3, 0.02, 0.0)
        assert sorted(id(p) for o in optimizers for g in o.param_groups for p in g["params"]) == sorted(id(p) for p in model.parameters())
        Workers(count).map(lambda optimizer: optimizer.step(), optimizers)
        models.append(model)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("entry", ["rlhf.cli", *(f"stages.{name}" for name in STAGES)])
@pytest.mark.parametrize(("own", "wanted"), [({}, ["PASSIVE", "1000"]), ({"OMP_WAIT_POLICY": "ACTIVE"}, ["ACTIVE", "None"]),
                                             ({"GOMP_SPINCOUNT": "7"}, ["PASSIVE", "7"])])
def test_threads_soon_wait_asleep_however_the_program_is_started_unless_a_person_says_otherwise(entry, own, wanted):
    """`python -m stages.reward` once imported torch before rlhf: its threads spun, and beside other work its steps took many times as long."""
    script = f"""
import importlib, os, sys
class AtTorch:
    def find_spec(self, name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, AtTorch())
importlib.import_module("{entry}")
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")} | own
    done = subprocess.run([sys.executable, "-c", script], cwd=PACKAGE.parent, env=environment, capture_output=True, text=True)
    assert done.stdout.split() in ([], wanted), done.stderr  # the pipeline's command line needs no torch before it runs a stage
