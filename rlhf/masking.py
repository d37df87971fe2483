"""Padding, masks and positions, made from lengths alone (CANON B2). True always means a real token.

Shapes: B rows, P prompt tokens, C completion tokens, T all tokens of a row.
"""

import torch

WIDTH_STEP = 8  # widths of training batches are multiples of this: oneDNN compiles a kernel for every new shape, 2 ms each


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def right_pad(rows: list[list[int]], pad_id: int, step: int = 1) -> torch.Tensor:
    """Ids [B, T], rows flush left; T is a multiple of `step`."""
    width = round_up(max(len(row) for row in rows), step)
    return torch.tensor([row + [pad_id] * (width - len(row)) for row in rows])


def left_pad(rows: list[list[int]], pad_id: int) -> torch.Tensor:
    """Ids [B, P], rows flush right, as sampling needs them."""
    width = max(len(row) for row in rows)
    return torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])


def length_mask(lengths: list[int] | torch.Tensor, width: int | None = None) -> torch.Tensor:
    """Bool [B, width], True on the first `lengths[b]` places of row b."""
    lengths = torch.as_tensor(lengths)
    return torch.arange(int(lengths.max()) if width is None else width, device=lengths.device) < lengths[:, None]


def left_pad_mask(lengths: list[int]) -> torch.Tensor:
    """Bool [B, P], True on the last `lengths[b]` places of row b."""
    return length_mask(lengths).flip(1)


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, T]: 0 on the first real token of a row, whichever side its padding is on; 0 on padding."""
    return torch.where(mask, mask.long().cumsum(1) - 1, 0)


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over True places. What stands elsewhere, NaN included, does not count."""
    return torch.where(mask, values, 0).sum() / mask.sum()


def pad_columns(rows: list[torch.Tensor], fill: float = 0.0) -> torch.Tensor:
    """1-d tensors of different lengths as one [B, C], flush left."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
