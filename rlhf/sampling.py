"""Sampling completions from a policy: finished rows leave the batch, keys and values live in buffers with room ahead, equal prompts are read once.

A row's randomness is drawn before it is sampled (one uniform number a token), so what a prompt gets does not depend on which rows it
is batched with, nor on how many processes share the work. top_k and top_p do not exist here (CANON S1).
"""

import contextlib
import hashlib

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.encoding import Encoder
from rlhf.masking import left_pad, left_pad_mask, positions, round_up
from rlhf.models import adapters_merged, as_written, unwrapped
from rlhf.workers import ALONE, Workers, callers_autocast

WIDTH_STEP, ROWS_STEP = 16, 32  # the past and the batch take few different sizes: oneDNN compiles a kernel for every new shape
COMPACT_BELOW = 0.75  # the batch is repacked when fewer of its rows than this are still running
ONE_TOKEN = "one_token"  # the attention for CPUs below, under a name of its own among those of `transformers`


class BufferLayer(DynamicLayer):
    """Keys and values of one layer in buffers that grow by WIDTH_STEP columns: most steps write one column instead of copying the whole past."""

    def __init__(self):
        super().__init__()
        self.filled = 0

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        end = self.filled + key_states.shape[2]
        if (more := round_up(end, WIDTH_STEP) - self.keys.shape[2]) > 0:
            self.keys, self.values = (F.pad(states, (0, 0, 0, more)) for states in (self.keys, self.values))
        self.keys[:, :, self.filled : end] = key_states
        self.values[:, :, self.filled : end] = value_states
        self.filled = end
        return self.keys, self.values

    def get_mask_sizes(self, query_length, *args, **kwargs) -> tuple[int, int]:
        """(columns of keys that attention gets, 0): those not yet filled are masked."""
        query_length = query_length if isinstance(query_length, int) else query_length.shape[0]
        return round_up(self.filled + query_length, WIDTH_STEP), 0

    def get_seq_length(self) -> int:
        return self.filled

    def keep_rows(self, rows: torch.Tensor) -> None:
        """The batch becomes these of its rows; a row may be wanted more than once."""
        self.keys, self.values = self.keys.index_select(0, rows), self.values.index_select(0, rows)


def draw_uniforms(rows: int, columns: int, *seeds: int) -> torch.Tensor:
    """Uniform numbers [rows, columns] in [0, 1) that follow from the seeds alone (on the CPU, so alike on every device)."""
    seed = int.from_bytes(hashlib.sha256(repr(seeds).encode()).digest()[:7], "big")
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator)


def sample(policy, prompts: list[list[int]], uniforms_BC: torch.Tensor, encoder: Encoder, temperature: float, batch_size: int,
           workers: Workers = ALONE) -> list[list[int]]:
    """A completion for each prompt: ids up to and with the EOS, or as many as `uniforms_BC` has columns (CANON S2).

    Prompts are sampled in batches of similar length, `batch_size` rows at once, shared out among `workers`. `policy` is called under whatever
    autocast the caller opened.
    """
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    parts = [part for batch in batches for part in _parts(batch, workers.count)]
    autocast = callers_autocast(next(policy.parameters()).device.type)

    @torch.no_grad()  # of the thread that runs it; not inference_mode, in which autocast casts every weight anew for every token
    def completions_of(rows: list[int]) -> list[list[int]]:
        with autocast():
            return _sample_batch(policy, [prompts[i] for i in rows], uniforms_BC[rows], encoder, temperature)

    completions: list[list[int]] = [[] for _ in prompts]
    # as_written: a past that grows would be compiled again and again
    with adapters_merged(policy), _cast_once(policy), _attention_for_sampling(policy), as_written():
        for rows, sampled in zip(parts, workers.map(completions_of, parts), strict=True):
            for i, ids in zip(rows, sampled, strict=True):
                completions[i] = ids
    return completions


def _parts(rows: list[int], count: int) -> list[list[int]]:
    """Rows in at most `count` consecutive parts of like size."""
    size = -(-len(rows) // count)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


@contextlib.contextmanager
def _cast_once(policy):
    """Autocast keeps the bf16 copy of a weight only while the weight wants a gradient: inside, those under LoRA's adapters do too."""
    frozen = [p for p in policy.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for p in frozen:
            p.requires_grad_(True)
        yield
    finally:
        for p in frozen:
            p.requires_grad_(False)


def _one_token_attention(module, query, key, value, attention_mask, scaling=None, **settings):
    """sdpa; for one query a row two plain products, which are faster than its bf16 kernel for CPUs (configs/EXPERIMENTS.md, "A PPO step timed").
    Heads that share keys and values are lines of one product."""
    plain = attention_mask is None or attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    if query.shape[2] > 1 or not plain or settings.get("position_bias") is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **settings)
    lines_BKGD = query[:, :, 0].unflatten(1, (key.shape[1], -1))
    scores_BKGT = (lines_BKGD @ key.transpose(-1, -2)).float() * (scaling or query.shape[-1] ** -0.5)
    if attention_mask is not None:
        scores_BKGT = scores_BKGT.masked_fill(~attention_mask, -torch.inf)
    return (torch.softmax(scores_BKGT, -1).to(value.dtype) @ value).flatten(1, 2)[:, None], None


AttentionInterface.register(ONE_TOKEN, _one_token_attention)
AttentionMaskInterface.register(ONE_TOKEN, sdpa_mask)


@contextlib.contextmanager
def _attention_for_sampling(policy):
    """A faster attention than the eager one, for models that have sdpa (configs/EXPERIMENTS.md, "A PPO step timed"). Training passes stay eager,
    whose backward pass is the faster one on CPUs."""
    model = unwrapped(policy)
    if not (model.config._attn_implementation == "eager" and model._supports_sdpa):
        yield
        return
    model.set_attn_implementation(ONE_TOKEN if next(model.parameters()).device.type == "cpu" else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation("eager")


def _sample_batch(policy, prompts, uniforms_BC, encoder, temperature) -> list[list[int]]:
    device = next(policy.parameters()).device
    limit, places = uniforms_BC.shape[1], {}
    read = [places.setdefault(tuple(p), len(places)) for p in prompts]  # several answers to a prompt: it is read once
    different = list(map(list, places))
    mask_BT = left_pad_mask([len(p) for p in different]).to(device)
    width = mask_BT.shape[1]
    mask_BT = torch.cat([mask_BT, mask_BT.new_zeros(len(different), limit + WIDTH_STEP)], 1)  # a column turns True when its token is there
    layers = [BufferLayer() for _ in range(policy.config.get_text_config().num_hidden_layers)]
    cache = Cache(layers=layers)
    ids, position = left_pad(different, encoder.pad_id).to(device), positions(mask_BT[:, :width])
    uniforms_BC, running, sampled = uniforms_BC.to(device), torch.arange(len(prompts), device=device), []
    going = torch.ones_like(running, dtype=torch.bool)
    for column in range(limit):
        seen_BT = mask_BT[:, : round_up(width + column, WIDTH_STEP)]
        logits = policy(input_ids=ids, attention_mask=seen_BT, position_ids=position, past_key_values=cache, use_cache=True,
                        logits_to_keep=1).logits[:, -1]
        if column == 0 and len(different) < len(prompts):
            rows = torch.tensor(read, device=device)
            logits, position, mask_BT = logits[rows], position[rows], mask_BT[rows]
            for layer in layers:
                layer.keep_rows(rows)
        ids = _draw(logits, uniforms_BC[:, column], temperature)[:, None]
        sampled.append((running, ids[:, 0]))
        mask_BT[:, width + column] = True
        going = going & (ids[:, 0] != encoder.eos_id)
        left = int(going.sum())
        if left == 0:
            break
        position = position[:, -1:] + 1
        # Rows that ended go on producing ids that nobody reads until enough of them leave together
        if left < COMPACT_BELOW * len(running) and round_up(left, ROWS_STEP) < len(running):
            kept = going.int().argsort(descending=True, stable=True)[: round_up(left, ROWS_STEP)]
            for layer in layers:
                layer.keep_rows(kept)
            running, ids, position, uniforms_BC, mask_BT, going = (t[kept] for t in (running, ids, position, uniforms_BC, mask_BT, going))
    return _until_eos(sampled, len(prompts), encoder)


def _draw(logits_BV, uniforms_B, temperature) -> torch.Tensor:
    """Ids [B]: the first whose cumulative probability exceeds the row's uniform number (inverse transform sampling)."""
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum(-1)
    threshold_B1 = (uniforms_B[:, None] * cumulative_BV[:, -1:])
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def _until_eos(sampled, count: int, encoder: Encoder) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in range(count)]
    for rows, ids in sampled:
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            if not encoder.ended(completions[row]):
                completions[row].append(token)
    return completions
