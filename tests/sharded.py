"""SFT, reward model and PPO with weights that FSDP2 shards among CPU processes; PPO is stopped after its first checkpoint and goes on, and so
do pretrain's three optimizers.

    accelerate launch --config_file configs/accelerate/cpu-2.yaml -m tests.sharded section.key=value ...

FSDP's settings come from the environment, as `accelerate launch` hands them over. accelerate shards on accelerators alone, so what it
makes of a launch file is said here; from then on everything is its and PyTorch's own.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

import stages.ppo
import stages.reward
import stages.sft
from rlhf.checkpoints import load_checkpoint
from rlhf.compute import leave_processes, start
from rlhf.config import load_config
from rlhf.learner import Learner
from rlhf.optimizers import pretraining_optimizers
from rlhf.sharding import full_weights, whole
from tests.helpers import nano, tiny_encoder

plain_init = AcceleratorState.__init__


def init_as_on_gpus(self, *args, fsdp_plugin=None, **kwargs):
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
        self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if self._mixed_precision != "no":
            fsdp_plugin.set_mixed_precision(self._mixed_precision)


def save_and_stop(*args, **kwargs):
    save_checkpoint(*args, **kwargs)
    raise KeyboardInterrupt


def full_weights_are_fp32_where_passes_are_bf16(config) -> None:
    accelerator, policy = start(config), nano(tiny_encoder())
    accelerator.state.fsdp_plugin.set_mixed_precision("bf16", override=True)
    trained = {name: p.detach().clone() for name, p in policy.named_parameters(remove_duplicate=False)}
    model, _ = accelerator.prepare(policy, torch.optim.AdamW(policy.parameters()))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2]]))
    for _ in range(2):
        with whole(model):
            assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        saved = full_weights(model)
        assert saved.keys() == trained.keys() and all(torch.equal(saved[name], weights) for name, weights in trained.items())
    assert full_weights(model, keep=False) == {}


def a_checkpoint_has_all_optimizers_of_a_model(config) -> None:
    accelerator, gpt, ids = start(config), nano(tiny_encoder()), torch.tensor([[1, 2, 5, 40]])
    model, *optimizers = accelerator.prepare(gpt, *pretraining_optimizers(gpt, 1e-2, 1e-2, 0.0))
    stage = SimpleNamespace(main=accelerator.is_main_process, checkpoints=Path(config.run.dir) / "three_optimizers")

    def weights_after_a_step():
        accelerator.backward(model(input_ids=ids, labels=ids).loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return full_weights(model)

    began = weights_after_a_step()
    save_checkpoint(accelerator, stage, 1, keep=1)
    went_on = weights_after_a_step()
    assert load_checkpoint(accelerator, stage) == {"step": 1}
    resumed = weights_after_a_step()
    assert all(torch.equal(resumed[name], weights) for name, weights in went_on.items())
    assert any(not torch.equal(began[name], weights) for name, weights in went_on.items())


def roll_and_remember(learner, rows, kl_coef, *seeds):
    if seeds[0] == 1:  # to learn from; evaluations have another number
        rolled.append(seeds)
    return roll(learner, rows, kl_coef, *seeds)


save_checkpoint, roll, rolled = stages.ppo.save_checkpoint, Learner.roll, []

if __name__ == "__main__":
    AcceleratorState.__init__ = init_as_on_gpus
    config = load_config("configs/tiny.yaml", sys.argv[1:])
    stages.sft.main(config)
    assert PartialState().distributed_type == DistributedType.FSDP
    stages.reward.main(config)
    stages.ppo.save_checkpoint, Learner.roll = save_and_stop, roll_and_remember
    try:
        stages.ppo.main(config)
    except KeyboardInterrupt:
        print("stopped after a checkpoint")
    stages.ppo.save_checkpoint = save_checkpoint
    stages.ppo.main(config)
    assert len(rolled) == len(set(rolled)) == config.ppo.rollouts, "the stage goes on after its checkpoint, and does not start over"
    full_weights_are_fp32_where_passes_are_bf16(config)
    a_checkpoint_has_all_optimizers_of_a_model(config)
    leave_processes()
