"""One saved rollout through our stage 3 maths, against the papers' equations written out line by line in float64 (CANON S3, P1-P3).

``saved_rollout.jsonl``: 12 completions of the quickstart's PPO policy (seed 1), a line each: the normalised score, log-probabilities by the
policy that sampled, by SFT and by a policy disturbed with noise, values by a reward model and disturbed. Nothing below the
line "ours" is used above it.
"""

import math
from pathlib import Path

import pytest
import torch

from rlhf.advantages import gae, moments, token_rewards, whiten
from rlhf.jsonl import read_jsonl
from rlhf.losses import policy_loss, value_loss
from rlhf.masking import length_mask, pad_columns

ROWS = list(read_jsonl(Path(__file__).with_name("saved_rollout.jsonl")))
KL_COEF, GAMMA, LAM, CLIP, VALUE_CLIP = 0.15, 1.0, 0.95, 0.2, 0.2


def straight_line() -> dict:
    """Token rewards (IG section 3.5), GAE (eq. 16), whitening (N+ 24), both losses (PPO eq. 7; N+ 18): flat lists in order of the tokens."""
    rewards, advantages, returns = [], [], []
    for row in ROWS:
        n, values = len(row["old_logprobs"]), [*row["old_values"], 0.0]
        r = [-KL_COEF * (row["old_logprobs"][t] - row["ref_logprobs"][t]) for t in range(n)]
        r[n - 1] += row["score"]
        delta = [r[t] + GAMMA * values[t + 1] - values[t] for t in range(n)]
        a = [sum((GAMMA * LAM) ** l * delta[t + l] for l in range(n - t)) for t in range(n)]  # noqa: E741 - the paper's letter
        rewards, advantages, returns = rewards + r, advantages + a, returns + [a[t] + values[t] for t in range(n)]
    mean = sum(advantages) / len(advantages)
    variance = sum((x - mean) ** 2 for x in advantages) / len(advantages)
    whitened = [(x - mean) / math.sqrt(variance + 1e-8) for x in advantages]
    old, new, old_values, values = ([x for row in ROWS for x in row[name]] for name in ("old_logprobs", "logprobs", "old_values", "values"))
    policy, value, clipped = 0.0, 0.0, 0
    for i, advantage in enumerate(whitened):
        ratio = math.exp(new[i] - old[i])
        policy -= min(ratio * advantage, min(max(ratio, 1 - CLIP), 1 + CLIP) * advantage)
        clipped += abs(ratio - 1) > CLIP
        held = min(max(values[i], old_values[i] - VALUE_CLIP), old_values[i] + VALUE_CLIP)
        value += 0.5 * max((values[i] - returns[i]) ** 2, (held - returns[i]) ** 2)
    return {"rewards": rewards, "advantages": whitened, "returns": returns, "policy_loss": policy / len(new), "value_loss": value / len(new),
            "clipped": clipped / len(new)}


# ours

def ours(dtype) -> dict:
    """The same numbers by the library, from padded tensors of `dtype`."""
    old_BC, ref_BC, new_BC, old_values_BC, values_BC = (
        pad_columns([torch.tensor(row[name], dtype=dtype) for row in ROWS])
        for name in ("old_logprobs", "ref_logprobs", "logprobs", "old_values", "values"))
    mask_BC = length_mask([len(row["values"]) for row in ROWS])
    rewards_BC = token_rewards(torch.tensor([row["score"] for row in ROWS], dtype=dtype), old_BC, ref_BC, mask_BC, KL_COEF)
    advantages_BC, returns_BC = gae(rewards_BC, old_values_BC, mask_BC, GAMMA, LAM)
    advantages_BC = whiten(advantages_BC, mask_BC, moments(advantages_BC, mask_BC))
    policy_sum, count = policy_loss(new_BC, old_BC, advantages_BC, mask_BC, CLIP)
    value_sum, _ = value_loss(values_BC, old_values_BC, returns_BC, mask_BC, VALUE_CLIP)
    return {"rewards": rewards_BC[mask_BC].tolist(), "advantages": advantages_BC[mask_BC].tolist(), "returns": returns_BC[mask_BC].tolist(),
            "policy_loss": (policy_sum / count).item(), "value_loss": (value_sum / count).item()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-5)])
def test_S3_P1_P2_P3_a_saved_rollout_has_the_losses_of_the_equations(dtype, tolerance):
    expected, found = straight_line(), ours(dtype)
    assert 0.02 < expected.pop("clipped") < 0.9, "the clip decides some of the tokens"
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=tolerance, abs=tolerance), name
