"""Padding, masks and positions (CANON B2), by hand and against plain loops."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.masking import left_pad, left_pad_mask, length_mask, masked_mean, pad_columns, positions, right_pad

rows_of_ids = st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=7), min_size=1, max_size=6)


def test_B2_prompts_are_padded_on_the_left_and_rows_on_the_right():
    assert left_pad([[5, 6], [7], [8, 9, 1]], 0).tolist() == [[0, 5, 6], [0, 0, 7], [8, 9, 1]]
    assert right_pad([[5, 6], [7], [8, 9, 1]], 0).tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 1]]


def test_masks_by_hand():
    assert length_mask([2, 0, 3]).tolist() == [[True, True, False], [False, False, False], [True, True, True]]
    assert length_mask([1, 2], 4).tolist() == [[True, False, False, False], [True, True, False, False]]
    assert left_pad_mask([2, 1, 3]).tolist() == [[False, True, True], [False, False, True], [True, True, True]]
    assert length_mask([2]).dtype == torch.bool


@given(rows_of_ids)
def test_B2_masks_find_the_real_ids_again_even_where_a_real_id_equals_pad(rows):
    pad = rows[0][0]
    lengths = [len(row) for row in rows]
    for ids, mask in ((right_pad(rows, pad), length_mask(lengths)), (left_pad(rows, pad), left_pad_mask(lengths))):
        assert [i[m].tolist() for i, m in zip(ids, mask, strict=True)] == rows


def test_B2_positions_start_at_0_on_the_first_real_token():
    left = torch.tensor([[False, False, True, True], [True, True, True, True]])
    assert positions(left).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
    assert positions(left.flip(1)).tolist() == [[0, 1, 0, 0], [0, 1, 2, 3]]


@given(rows_of_ids)
def test_B2_real_tokens_have_positions_0_1_2_whichever_side_is_padded(rows):
    lengths = [len(row) for row in rows]
    for mask in (length_mask(lengths), left_pad_mask(lengths)):
        found = positions(mask)
        assert [p[m].tolist() for p, m in zip(found, mask, strict=True)] == [list(range(n)) for n in lengths]
        assert found[~mask].eq(0).all()


def test_masked_mean_does_not_count_what_stands_on_padding():
    values = torch.tensor([[1.0, 2.0, math.nan], [6.0, math.inf, math.nan]])
    assert masked_mean(values, torch.tensor([[True, True, False], [True, False, False]])).item() == 3.0


def test_pad_columns_puts_rows_flush_left():
    assert pad_columns([torch.tensor([1.0, 2.0]), torch.tensor([3.0])]).tolist() == [[1.0, 2.0], [3.0, 0.0]]
