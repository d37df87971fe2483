"""One more token for every row of a batch: keys and values in buffers with room ahead, an attention of one query a row, and the small GPT's step.

Shapes: B rows, T columns of the past and its room, K heads of keys and values, G query heads to each of them, D a head's width, V vocabulary,
W the model's width.
"""

import contextlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface, GPT2LMHeadModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.masking import round_up
from rlhf.models import unwrapped

PAST_STEP = 16  # columns by which the past grows; few different widths, as for WIDTH_STEP of rlhf/masking.py
ONE_TOKEN = "one_token"  # the attention for CPUs below, under a name of its own among those of `transformers`


class BufferLayer(DynamicLayer):
    """Keys and values of one layer in buffers that grow in steps: most tokens write one column instead of copying the whole past.

    Keys are held in the precision of the values. Under autocast rotary positions leave them in fp32, and every token's product would cast all again.
    """

    def __init__(self):
        super().__init__()
        self.filled = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = value_states.dtype, value_states.device, True
            self.keys, self.values = key_states[:, :, :0].to(self.dtype), value_states[:, :, :0]
        end = self.filled + key_states.shape[2]
        if (more := round_up(end, PAST_STEP) - self.keys.shape[2]) > 0:
            self.keys, self.values = (F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values))
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys, self.values

    @classmethod
    def joined(cls, parts: list["BufferLayer"]) -> "BufferLayer":
        """The rows of all parts as one batch, each flush right before the room ahead."""
        whole, most = cls(), max(part.filled for part in parts)
        columns = round_up(most, PAST_STEP)
        for name in ("keys", "values"):
            states = [getattr(part, name)[:, :, : part.filled] for part in parts]
            setattr(whole, name, torch.cat([F.pad(s, (0, 0, most - s.shape[2], columns - most)) for s in states]))
        whole.dtype, whole.device, whole.is_initialized, whole.filled = parts[0].dtype, parts[0].device, True, most
        return whole

    def get_mask_sizes(self, query_length, *args, **kwargs) -> tuple[int, int]:
        """(columns of keys that attention gets, 0): those not yet filled are masked."""
        query_length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return round_up(self.filled + query_length, PAST_STEP), 0

    def get_seq_length(self) -> int:
        return self.filled

    def keep_rows(self, rows: torch.Tensor) -> None:
        """The batch becomes these of its rows; a row may be wanted more than once."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def _one_token_attention(module, query, key, value, attention_mask, scaling=None, **settings):
    """sdpa; for one query a row two plain products, which are faster than its bf16 kernel for CPUs (configs/EXPERIMENTS.md, "A PPO step timed").
    Heads that share keys and values are lines of one product."""
    plain = attention_mask is None or attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if query.shape[2] > 1 or not plain or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    lines_BKGD = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    hidden_B11T = None if attention_mask is None else ~attention_mask
    return _attended(lines_BKGD, key, value, hidden_B11T, scaling or query.shape[-1] ** -0.5).flatten(1, 2)[:, None], None


def _attended(lines_BKGD, keys_BKTD, values_BKTD, hidden_B11T, scaling: float) -> torch.Tensor:
    """What each line takes from the past [B, K, G, D]; nothing from columns that are hidden."""
    scores_BKGT = (lines_BKGD @ keys_BKTD.transpose(-1, -2)).float().mul_(scaling)
    if hidden_B11T is not None:
        scores_BKGT.masked_fill_(hidden_B11T, -torch.inf)
    return torch.softmax(scores_BKGT, -1).to(values_BKTD.dtype) @ values_BKTD


AttentionInterface.register(ONE_TOKEN, _one_token_attention)
AttentionMaskInterface.register(ONE_TOKEN, sdpa_mask)


@contextlib.contextmanager
def attention_for_sampling(policy):
    """The attention that sampling has instead of the one of the training passes, for models that have sdpa.

    Eager is slower here (configs/EXPERIMENTS.md, "A PPO step timed"), though the faster one to train with on CPUs. FlashAttention takes every mask
    for one of left padding, and would leave out the newest tokens where buffers have room ahead.
    """
    model = unwrapped(policy)
    trained_with = model.config._attn_implementation
    if trained_with == "sdpa" or not model._supports_sdpa:
        yield
        return
    model.set_attn_implementation(ONE_TOKEN if next(model.parameters()).device.type == "cpu" else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(trained_with)


def decoder(policy) -> Callable:
    """A function (ids_B1, positions_B1, seen_BT, layers) -> logits_BV: the tokens' keys and values join those of `layers`, of which `seen_BT`
    names the columns that count. Call it under `attention_for_sampling`, and the function too."""
    model = unwrapped(policy)
    if _is_plain_gpt2(model):
        return lambda ids_B1, positions_B1, seen_BT, layers: _gpt2_logits(model, ids_B1[:, 0], positions_B1[:, 0], seen_BT, layers)
    return lambda ids_B1, positions_B1, seen_BT, layers: policy(
        input_ids=ids_B1, attention_mask=seen_BT, position_ids=positions_B1, past_key_values=Cache(layers=layers), use_cache=True,
        logits_to_keep=1).logits[:, -1]


def _is_plain_gpt2(model) -> bool:
    """A GPT-2 of `transformers` as it is: no subclass (sharded models are one), and nobody listens to the parts that are passed over."""
    if type(model) is not GPT2LMHeadModel or model.config._attn_implementation != ONE_TOKEN or model.config.add_cross_attention:
        return False
    passed_over = [model, model.transformer, *model.transformer.h, *(part for block in model.transformer.h for part in (block.attn, block.mlp))]
    return not any(part._forward_hooks or part._forward_pre_hooks for part in passed_over)


def _gpt2_logits(model: GPT2LMHeadModel, ids_B, positions_B, seen_BT, layers: list[BufferLayer]) -> torch.Tensor:
    """GPT-2 for one token a row, by its own layers, with dropout off (CANON B1, B4). What `transformers` does around them for models of all kinds
    (masks, views, checks) took a fifth to a quarter of the quickstart's sampling (configs/EXPERIMENTS.md, "A PPO step timed"); the
    arithmetic is the same."""
    gpt, hidden_B11T = model.transformer, ~seen_BT[:, None, None]
    x_BW = gpt.wte(ids_B) + gpt.wpe(positions_B)
    for block, layer in zip(gpt.h, layers, strict=True):
        attention, mlp = block.attn, block.mlp
        query, key, value = attention.c_attn(block.ln_1(x_BW)).unflatten(1, (3, attention.num_heads, 1, attention.head_dim)).unbind(1)
        taken_BH1D = _attended(query, *layer.update(key, value), hidden_B11T, attention.scaling)
        x_BW = x_BW + attention.c_proj(taken_BH1D.flatten(1))
        x_BW = x_BW + mlp.c_proj(mlp.act(mlp.c_fc(block.ln_2(x_BW))))
    return model.lm_head(gpt.ln_f(x_BW))
