"""Forward passes over prompt + completion rows: log-probabilities, values, scores. Rows are padded on the right only, so a causal model
needs no mask: nothing real ever looks at padding. The output layer runs on completion positions alone.

Shapes: B rows, T tokens of prompt + completion, N completion tokens of all rows together, C of the longest.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import nn

from rlhf.errors import InputError
from rlhf.logprobs import output_logprobs, token_logprobs
from rlhf.masking import WIDTH_STEP, length_mask, right_pad, round_up
from rlhf.models import longest_row, unwrapped
from rlhf.workers import small

PICKED_STEP, PICKED_LOGITS = 256, 2**19  # see WIDTH_STEP in rlhf/masking.py; steps of fewer tokens, 32 at the least, where each costs more logits
EVEN_STEP = 8  # a worker that waits costs more than a kernel for another shape
# Settings of models that do more than a matrix product after the trunk (Gemma 2, Cohere, Granite, Falcon-H1, RecurrentGemma, xLSTM and others)
CHANGES_LOGITS = re.compile("(?:final_|output_)?logits?_(?:soft_?cap|scal|mup_width_mult)|lm_head_multiplier")


@dataclass(frozen=True)
class PassCost:
    """What decides how narrow the groups of a batch are cut (configs/EXPERIMENTS.md, "A PPO step timed")."""

    tokens: int = 512  # that take as long as a pass takes beside its tokens
    rows: int = 16  # that a group has a multiple of: oneDNN compiles a kernel for every new shape


SHORT, LONG = PassCost(), PassCost(tokens=96, rows=1)


def pass_cost(model: nn.Module) -> PassCost:
    """On CPUs a token of a large model takes long, beside a pass and beside making kernels."""
    on_cpu = next(model.parameters()).device.type == "cpu"
    return LONG if on_cpu and not small(model) else SHORT


@dataclass(frozen=True)
class Rows:
    """Prompt + completion rows as one padded batch, with where their completions lie."""

    ids_BT: torch.Tensor
    mask_BC: torch.Tensor  # True on real completion tokens
    before_N: torch.Tensor  # flat position (in B·T) of the token before each completion token: its logits and value predict it
    targets_N: torch.Tensor  # ids of the completion tokens
    last_B: torch.Tensor  # position of each row's last real token

    @property
    def tokens(self) -> int:
        return int(self.last_B.sum()) + len(self.last_B)

    def spread(self, values_N: torch.Tensor, fill: float = 0.0) -> torch.Tensor:
        """[N] numbers at their places in [B, C], `fill` on padding."""
        return torch.full(self.mask_BC.shape, fill, dtype=values_N.dtype, device=values_N.device).masked_scatter(self.mask_BC, values_N)


def make_rows(prompts: list[list[int]], completions: list[list[int]], pad_id: int, device) -> Rows:
    """Rows from id lists; every completion has at least one token (CANON A3, ValueError otherwise)."""
    if not all(completions):
        raise ValueError("a completion without tokens: it has no place for a score (CANON A3)")
    joined = [p + c for p, c in zip(prompts, completions, strict=True)]
    ids_BT = right_pad(joined, pad_id, WIDTH_STEP)
    width = ids_BT.shape[1]
    before = [row * width + len(p) - 1 + t for row, (p, c) in enumerate(zip(prompts, completions, strict=True)) for t in range(len(c))]
    tensors = (ids_BT, length_mask([len(c) for c in completions]), torch.tensor(before), torch.tensor([i for c in completions for i in c]),
               torch.tensor([len(row) - 1 for row in joined]))
    return Rows(*(t.to(device) for t in tensors))


def check_length(model, tokens: int) -> None:
    """Raises InputError when a batch of rows of `tokens` is wider than the model has positions: there a GPU would end without a reason."""
    width, room = round_up(tokens, WIDTH_STEP), longest_row(model)
    if room is not None and width > room:
        raise InputError(f"a prompt with its completion has {tokens} tokens of the model at {model.config.name_or_path!r} (in batches {width} "
                         f"wide), and it has {room} positions; lower data.max_prompt_tokens or data.max_completion_tokens")


def policy_pass(policy, rows: Rows, temperature: float, entropies: bool = False) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """(logprobs_BC, entropy_BC, hidden_BTD): fp32 nats of the completion tokens, 0 on padding, and the trunk's last hidden states.

    Entropies cost several passes over all logits; None where they are not asked for.
    """
    inner = unwrapped(policy)
    count, output_layer = len(rows.targets_N), inner.get_output_embeddings()
    if getattr(output_layer, "bias", None) is not None or _changes_logits(inner.config):
        output = inner(input_ids=rows.ids_BT, use_cache=False, output_hidden_states=True)
        hidden_BTD = output.hidden_states[-1]
        figures = token_logprobs(_picked(output.logits, rows.before_N)[:count], rows.targets_N, temperature, entropies)
    else:
        hidden_BTD = inner.base_model(input_ids=rows.ids_BT, use_cache=False).last_hidden_state
        hidden_ND = _picked(hidden_BTD, rows.before_N, min(PICKED_STEP, max(32, PICKED_LOGITS // len(output_layer.weight))))
        targets_N = F.pad(rows.targets_N, (0, len(hidden_ND) - count))
        figures = output_logprobs(hidden_ND, output_layer.weight, targets_N, temperature, entropies)
    logprobs_BC, *entropy_BC = (rows.spread(figure_N[:count]) for figure_N in figures)
    return logprobs_BC, entropy_BC[0] if entropies else None, hidden_BTD


def _changes_logits(config) -> bool:
    """Whether a model does more than a matrix product after its trunk; one that reads pictures too says so among the settings of its text."""
    return any(value for name, value in vars(config.get_text_config()).items() if CHANGES_LOGITS.match(name))


def _picked(states_BTX: torch.Tensor, places_N: torch.Tensor, step: int = PICKED_STEP) -> torch.Tensor:
    """Rows of [B, T, X] at flat places, and a few more of the first one, so that their count takes few different values."""
    places = torch.cat([places_N, places_N.new_zeros(round_up(len(places_N), step) - len(places_N))])
    return states_BTX.flatten(0, 1)[places]


class ValueModel(nn.Module):
    """A value per token: a trunk, a linear head and an offset. `trunk` None: the hidden states of the policy are used (CANON P6)."""

    def __init__(self, trunk: nn.Module | None, head: nn.Linear):
        super().__init__()
        self.trunk, self.head = trunk, head
        self.register_buffer("offset", torch.zeros(()))

    def forward(self, rows: Rows) -> torch.Tensor:
        """values_BC in fp32, 0 on padding: what the rest of the episode is worth before each completion token."""
        return self.of_hidden(self.trunk(input_ids=rows.ids_BT, use_cache=False).last_hidden_state, rows)

    def of_hidden(self, hidden_BTD, rows: Rows) -> torch.Tensor:
        """The same from hidden states that are already there."""
        return rows.spread(self.head(_picked(hidden_BTD, rows.before_N))[: len(rows.before_N), 0].float() + self.offset)


class PolicyAndValue(nn.Module):
    """Both networks of PPO as one module, so that one wrapper (DDP, FSDP, DeepSpeed) and one optimizer hold them."""

    def __init__(self, policy, value_model: ValueModel):
        super().__init__()
        self.policy, self.value_model = policy, value_model
        networks = (unwrapped(policy), value_model.trunk)
        self._no_split_modules = sorted({name for network in networks for name in getattr(network, "_no_split_modules", None) or ()})

    def forward(self, rows: Rows, temperature: float, entropies: bool = False) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
        """(logprobs_BC, entropy_BC, values_BC); no entropies where they are not asked for."""
        logprobs_BC, entropy_BC, hidden_BTD = policy_pass(self.policy, rows, temperature, entropies)
        values_BC = self.value_model(rows) if self.value_model.trunk is not None else self.value_model.of_hidden(hidden_BTD, rows)
        return logprobs_BC, entropy_BC, values_BC


def by_tokens(lengths: list[int], budget: int, at_least: int = 1, cost: PassCost = SHORT) -> list[list[int]]:
    """Row indices in groups of similar length whose padded size stays within `budget` tokens (a longer row makes its own group).

    `at_least`: groups are split further until there are this many (processes that must step together), as far as rows allow.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups: list[list[int]] = [[]]
    for i in order:
        width = round_up(lengths[i], WIDTH_STEP)
        if groups[-1] and (len(groups[-1]) + 1) * width > budget:
            full = len(groups[-1]) // cost.rows * cost.rows or len(groups[-1])  # few different row counts
            groups[-1:] = [groups[-1][:full], groups[-1][full:]]
            if groups[-1] and (len(groups[-1]) + 1) * width > budget:  # the rest has no room for a row so much longer
                groups.append([])
        groups[-1].append(i)
    return split_to(groups, at_least)


def tight_groups(lengths: list[int], budget: int, at_least: int = 1, cost: PassCost = SHORT) -> list[list[int]]:
    """`by_tokens` with less padding: its groups are cut wherever narrower ones save more tokens than one more pass costs."""
    groups = by_tokens(lengths, budget, cost=cost)
    return split_to([part for group in groups for part in _cut(group, [round_up(lengths[i], WIDTH_STEP) for i in group], cost)], at_least)


def _cut(group: list[int], widths: list[int], cost: PassCost) -> list[list[int]]:
    """`group`, its rows from the narrowest on, in consecutive parts of whole `cost.rows` whose padded tokens and passes together cost least."""
    ends = [*range(0, len(group), cost.rows), len(group)]
    cheapest: list[tuple[int, tuple[int, ...]]] = [(0, (0,))]  # of the rows up to each end: cost in tokens, and where the parts begin and end
    for end in ends[1:]:
        ways = [(spent + (end - cuts[-1]) * widths[end - 1] + cost.tokens, (*cuts, end)) for spent, cuts in cheapest]
        cheapest.append(min(ways))
    return [group[a:b] for a, b in pairwise(cheapest[-1][1])]


def even_groups(lengths: list[int], budget: int, workers: int, cost: PassCost = SHORT) -> list[list[int]]:
    """`tight_groups` for `workers` that take a group each and wait for the last: where there are not more groups than workers, they are cut anew
    so that the costliest costs as little as can be."""
    groups, order = tight_groups(lengths, budget, cost=cost), sorted(range(len(lengths)), key=lambda i: lengths[i])
    widths = [round_up(lengths[i], WIDTH_STEP) for i in order]
    if workers == 1 or len(groups) > workers or len(_filled(widths, budget)) > workers:
        return split_to(groups, workers)
    low, high = 0, budget  # padded tokens of a group: with `high` there are enough workers
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if len(_filled(widths, middle)) <= workers else (middle, high)
    return split_to([order[start:end] for start, end in pairwise([0, *_filled(widths, high)])], workers)


def _filled(widths: list[int], most: int) -> list[int]:
    """Where consecutive groups end that hold as many EVEN_STEPs of rows as fit into `most` padded tokens; a row at least."""
    ends = [0]
    while ends[-1] < len(widths):
        start = ends[-1]
        fits = [end for end in (*range(start + EVEN_STEP, len(widths), EVEN_STEP), len(widths)) if (end - start) * widths[end - 1] <= most]
        ends.append(max(fits, default=start + 1))
    return ends[1:]


def split_to(groups: list[list[int]], at_least: int) -> list[list[int]]:
    """`groups`, the largest halved until there are `at_least`, as far as rows allow."""
    while len(groups) < at_least and max(map(len, groups)) > 1:
        largest = max(range(len(groups)), key=lambda g: len(groups[g]))
        group = groups.pop(largest)
        groups[largest:largest] = [group[: len(group) // 2], group[len(group) // 2 :]]
    return groups


@torch.inference_mode()
def logprob_sums(policy, pairs: list[tuple[list[int], list[int]]], pad_id: int, temperature: float, budget: int) -> list[float]:
    """Log-probability, nats, of each completion given its prompt, in the order given."""
    device, sums = next(policy.parameters()).device, [0.0] * len(pairs)
    for group in tight_groups([len(p) + len(c) for p, c in pairs], budget, cost=pass_cost(policy)):
        rows = make_rows([pairs[i][0] for i in group], [pairs[i][1] for i in group], pad_id, device)
        for i, total in zip(group, policy_pass(policy, rows, temperature)[0].sum(1).tolist(), strict=True):
            sums[i] = total
    return sums
