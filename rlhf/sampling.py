"""Sampling completions from a policy: finished rows leave the batch, equal prompts are read once.

A row's randomness is drawn before it is sampled (one uniform number a token), so what a prompt gets does not depend on which rows it
is batched with, nor on how many processes share the work. top_k and top_p do not exist here (CANON S1).
"""

import hashlib
import sys

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache

from rlhf.decoding import PAST_STEP, BufferLayer, attention_for_sampling, decoder
from rlhf.encoding import Encoder
from rlhf.errors import InputError, first_line
from rlhf.masking import left_pad, left_pad_mask, positions, round_up
from rlhf.models import adapters_merged, as_written, unwrapped
from rlhf.passes import check_length, pass_cost, tight_groups
from rlhf.workers import ALONE, Workers, callers_autocast

ROWS_STEP = 8  # the batch takes few different sizes, as the past does
COMPACT_BELOW = 0.75  # the batch is repacked when fewer of its rows than this are still running


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
            return _sample_batch(policy, decode, [prompts[i] for i in rows], uniforms_BC[rows], encoder, temperature)

    completions: list[list[int]] = [[] for _ in prompts]
    # as_written: a past that grows would be compiled again and again
    with adapters_merged(policy), attention_for_sampling(policy), as_written():
        decode = decoder(policy)
        for rows, sampled in zip(parts, workers.map(completions_of, parts), strict=True):
            for i, ids in zip(rows, sampled, strict=True):
                completions[i] = ids
    return completions


def check_backbone(policy, encoder: Encoder, tokens: int) -> None:
    """InputError for a model that later stages could not sample from, or that has fewer positions than rows of `tokens`."""
    check_length(policy, tokens)
    try:
        agree = _agrees_with_itself(policy, encoder)
    except Exception as error:
        agree, why = False, first_line(error)
    else:
        why = "token by token it says something else than at once"
    if not agree:
        name = f"{policy.config.name_or_path!r} ({type(unwrapped(policy)).__name__})"
        raise InputError(f"model.init: {name} cannot be sampled from here: {why}; wanted a causal LM whose layers all attend to keys and values "
                         "(models that keep a state instead, such as Mamba, do not)")


@torch.no_grad()
def _agrees_with_itself(policy, encoder: Encoder) -> bool:
    """Whether a third token after a prompt of two gets the logits that a pass over all three gives."""
    *prompt, last = ids = [encoder.eos_id, *encoder.text_ids("as")[:1], encoder.eos_id]
    device = next(policy.parameters()).device
    seen_BT = torch.arange(PAST_STEP, device=device)[None] < len(ids)
    with attention_for_sampling(policy):
        _, layers = _read(policy, [prompt], encoder.pad_id)
        found_V = decoder(policy)(torch.tensor([[last]], device=device), torch.tensor([[len(prompt)]], device=device), seen_BT, layers)[0]
        expected_V = policy(input_ids=torch.tensor([ids], device=device)).logits[0, -1]
    return bool((found_V - expected_V).abs().max() <= 0.01 * expected_V.abs().max())


def _parts(rows: list[int], count: int) -> list[list[int]]:
    """Rows in at most `count` consecutive parts of like size."""
    size = -(-len(rows) // count)
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _sample_batch(policy, decode, prompts, uniforms_BC, encoder, temperature) -> list[list[int]]:
    device = next(policy.parameters()).device
    limit, places = uniforms_BC.shape[1], {}
    read = [places.setdefault(tuple(p), len(places)) for p in prompts]  # several answers to a prompt: it is read once
    different = list(map(list, places))
    mask_BT = left_pad_mask([len(p) for p in different]).to(device)
    width = mask_BT.shape[1]
    position = mask_BT.sum(1, keepdim=True) - 1  # of the newest token
    mask_BT = torch.cat([mask_BT, mask_BT.new_zeros(len(different), limit + PAST_STEP)], 1)  # a column turns True when its token is there
    logits, layers = _read(policy, different, encoder.pad_id)
    if len(different) < len(prompts):
        rows = torch.tensor(read, device=device)
        logits, position, mask_BT = logits[rows], position[rows], mask_BT[rows]
        for layer in layers:
            layer.keep_rows(rows)
    uniforms_BC, running, sampled = uniforms_BC.to(device), torch.arange(len(prompts), device=device), []
    going = torch.ones_like(running, dtype=torch.bool)
    for column in range(limit):
        ids = _draw(logits, uniforms_BC[:, column], temperature)[:, None]
        sampled.append((running, ids[:, 0]))
        mask_BT[:, width + column] = True
        going = going & (ids[:, 0] != encoder.eos_id)
        left = int(going.sum())
        if left == 0 or column + 1 == limit:
            break
        position = position + 1
        # Rows that ended go on producing ids that nobody reads until enough of them leave together
        if left < COMPACT_BELOW * len(running) and round_up(left, ROWS_STEP) < len(running):
            kept = going.int().argsort(descending=True, stable=True)[: round_up(left, ROWS_STEP)]
            for layer in layers:
                layer.keep_rows(kept)
            running, ids, position, uniforms_BC, mask_BT, going = (t[kept] for t in (running, ids, position, uniforms_BC, mask_BT, going))
        logits = decode(ids, position, mask_BT[:, : round_up(width + column + 1, PAST_STEP)], layers)
    return _until_eos(sampled, len(prompts), encoder)


def _read(policy, prompts: list[list[int]], pad_id: int) -> tuple[torch.Tensor, list[BufferLayer]]:
    """Logits [B, V] after each prompt, and the keys and values of all, flush right. Prompts, the shortest first, are read in narrow groups."""
    lengths, device = [len(p) for p in prompts], next(policy.parameters()).device
    parts = []
    for group in tight_groups(lengths, sys.maxsize, cost=pass_cost(policy)):
        layers = [BufferLayer() for _ in range(policy.config.get_text_config().num_hidden_layers)]
        mask_BT = left_pad_mask([lengths[i] for i in group]).to(device)
        width = mask_BT.shape[1]
        logits = policy(input_ids=left_pad([prompts[i] for i in group], pad_id).to(device), position_ids=positions(mask_BT),
                        attention_mask=F.pad(mask_BT, (0, round_up(width, PAST_STEP) - width)), past_key_values=Cache(layers=layers),
                        use_cache=True, logits_to_keep=1).logits[:, -1]
        parts.append((logits, layers))
    if len(parts) == 1:
        return logits, layers
    return torch.cat([logits for logits, _ in parts]), [BufferLayer.joined(list(same)) for same in zip(*(layers for _, layers in parts), strict=True)]


def _draw(logits_BV, uniforms_B, temperature) -> torch.Tensor:
    """Ids [B]: the first whose cumulative probability exceeds the row's uniform number (inverse transform sampling)."""
    cumulative_BV = torch.softmax(logits_BV.float() / temperature, -1).cumsum_(-1)
    threshold_B1 = (uniforms_B[:, None] * cumulative_BV[:, -1:])
    return torch.searchsorted(cumulative_BV, threshold_B1, right=True)[:, 0].clamp(max=logits_BV.shape[1] - 1)


def _until_eos(sampled, count: int, encoder: Encoder) -> list[list[int]]:
    completions: list[list[int]] = [[] for _ in range(count)]
    for rows, ids in sampled:
        for row, token in zip(rows.tolist(), ids.tolist(), strict=True):
            if not encoder.ended(completions[row]):
                completions[row].append(token)
    return completions
