"""What all tests share: one thread, no network, and a GPT so small that a test of a whole stage takes seconds."""

import os

# Before torch, tokenizers or the hub client are imported, here and in the processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1",
                  HF_HUB_DISABLE_PROGRESS_BARS="1", CUDA_VISIBLE_DEVICES="")

import copy
import ipaddress
import socket

import hypothesis
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from rlhf import runs, world
from rlhf.encoding import Encoder
from rlhf.models import new_gpt, save_model, train_tokenizer

CONTEXT, VOCABULARY = 256, 600  # tokens

# How long an example takes says something about the neighbours on this machine, nothing about the code.
hypothesis.settings.register_profile("busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("busy")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models lose from threads (255 s became 10 s on two busy cores); stages that run inside a test set their own number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_a_new_process():
    """Each test starts as a program does: without accelerate's state, which refuses a second precision, and without locks on run folders.

    Fixtures of a whole file are made before this, so what they leave is cleared as well.
    """
    _forget()
    yield
    _forget()


def _forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for lock in runs._locks.values():
        lock.close()
    runs._locks.clear()


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Connections leave this machine in no test; processes on this machine may talk to each other."""
    connect = socket.socket.connect

    def only_here(self, address):
        host = address[0] if isinstance(address, tuple) else ""
        if self.family in (socket.AF_INET, socket.AF_INET6) and host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise OSError(f"a test tried to connect to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_here)


@pytest.fixture(scope="session")
def tiny_encoder() -> Encoder:
    """An encoder with a byte-level BPE of 600 tokens, made from a little text of the embedded world."""
    return Encoder(train_tokenizer(world.write_text(500, seed=1), VOCABULARY))


@pytest.fixture(scope="session")
def _tiny_gpt(tiny_encoder):
    torch.manual_seed(1)
    return new_gpt("nano", tiny_encoder, CONTEXT, "eager").eval()


@pytest.fixture
def tiny_policy(_tiny_gpt):
    """A nano GPT with the same random weights every time, a copy of its own for each test."""
    return copy.deepcopy(_tiny_gpt)


@pytest.fixture(scope="session")
def tiny_folder(_tiny_gpt, tiny_encoder, tmp_path_factory):
    """The same model and tokenizer as a Hugging Face folder; not to be written to."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    save_model(_tiny_gpt, tiny_encoder, folder)
    return folder
