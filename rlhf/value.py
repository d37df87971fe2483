"""The value model of stage 3 and the optimizer of both networks (CANON P5, P6)."""

from pathlib import Path

import torch
from torch import nn

from rlhf.encoding import Encoder
from rlhf.models import Fp32Linear, add_lora, last_norm_gain, load_encoder, load_policy, load_reward_model, unwrapped
from rlhf.optimizers import step_as_one_number
from rlhf.passes import PolicyAndValue, ValueModel


def new_value_model(kind: str, policy, encoder: Encoder, reward_folders: list[Path], sft: Path, attention: str, model_settings) -> ValueModel:
    """A ValueModel whose head is 0. `separate`: on the trunk of the (first) reward model (IG, N+ 22), or of the SFT model where the reward model
    reads other tokens or is none. `shared`: on the policy's own trunk (LHP)."""
    head = Fp32Linear(policy.config.get_text_config().hidden_size, 1)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    if kind == "shared":
        return ValueModel(None, head)
    lora, trust = (model_settings.lora_rank, model_settings.lora_alpha), model_settings.trust_remote_code
    if reward_folders and load_encoder(str(reward_folders[0]), trust).fingerprint() == encoder.fingerprint():
        reward_model = load_reward_model(str(reward_folders[0]), encoder, attention, trust)
        if hasattr(reward_model, "score"):
            # DEPARTS: P6 keeps its head too (IG, N+ 22), which has read finished answers alone. What it says of unfinished ones is mostly noise, and
            # was 3.6 off on average, which taught the policy to end at once (configs/EXPERIMENTS.md)
            return ValueModel(_trunk(add_lora(reward_model, *lora, "SEQ_CLS")), head)
    return ValueModel(_trunk(add_lora(load_policy(str(sft), encoder, attention, trust), *lora, "CAUSAL_LM")), head)


def ppo_optimizer(model: PolicyAndValue, lr: float, value_lr: float, last_norm_lr: float | None = None) -> torch.optim.AdamW:
    """AdamW (eps 1e-5, CANON P5) with a learning rate for each network; `set_lr` scales all of them.

    `last_norm_lr`: the length of the last norm's gain in the policy is trained as one number, at this rate times what an entry of it is at the
    start. It says how sure the policy is, as a temperature does. At a rate for weights of 0.02 it hardly moves, and entries trained one by one
    drift apart instead (configs/EXPERIMENTS.md).
    """
    policy, value = ([p for p in part.parameters() if p.requires_grad] for part in (model.policy, model.value_model))
    groups = [{"params": policy, "lr_scale": lr, "network": "policy"}, {"params": value, "lr_scale": value_lr, "network": "value"}]
    gain = last_norm_gain(model.policy) if last_norm_lr is not None else None
    if gain is not None and gain.requires_grad:
        groups[0]["params"] = [p for p in policy if p is not gain]
        size = gain.detach().square().mean().sqrt().item()
        groups.append({"params": [gain], "lr_scale": last_norm_lr * size, "network": "policy", "one_number": True})
    optimizer = torch.optim.AdamW(groups, lr=lr, eps=1e-5, weight_decay=0.0, fused=True)
    step_as_one_number(optimizer)
    return optimizer


def _trunk(model) -> nn.Module:
    return unwrapped(model).base_model
