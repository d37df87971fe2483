"""Splits: a pure function of the prompt. The expected ids and sides are worked out here from the definition, not from the code."""

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.data import prompt_id, split_of, text_id
from rlhf.errors import InputError
from rlhf.rankings import judge_share


def user(content):
    return [{"role": "user", "content": content}]


def test_id_is_the_start_of_the_sha256_of_the_normalised_text():
    assert prompt_id(user("  Hello\n\tWORLD ")) == hashlib.sha256(b"hello world").hexdigest()[:16]


@pytest.mark.parametrize(
    ("one", "other"),
    [("Straße", "STRASSE"), ("ﬁne １２", "fine 12"), ("a b", "a  b\n"), ("你好　吗", "你好 吗"), ("cafe\u0301", "café")],
)
def test_spellings_of_one_prompt_share_its_id(one, other):
    assert text_id(one) == text_id(other)


@pytest.mark.parametrize(("one", "other"), [("a b", "ab"), ("what is 1?", "what is 2?"), ("是", "不是")])
def test_other_prompts_have_other_ids(one, other):
    assert text_id(one) != text_id(other)


def test_conversations_are_split_by_their_first_user_turn():
    short = user("Hi")
    long = [
        {"role": "system", "content": "Be brief."},
        *short,
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "More"},
    ]
    assert prompt_id(short) == prompt_id(long)
    with pytest.raises(ValueError, match="without a user turn"):
        prompt_id([{"role": "system", "content": "Hi"}])


@pytest.mark.parametrize(
    ("identity", "side"),
    [
        ("0000000000000000", "test"),
        ("0fffffff00000000", "test"),  # just below 1/16
        ("1000000000000000", "eval"),  # 1/16
        ("1fffffff00000000", "eval"),
        ("2000000000000000", "train"),  # 1/8
        ("ffffffffffffffff", "train"),
    ],
)
def test_sides_are_intervals_of_the_ids(identity, side):
    assert split_of(identity, eval_fraction=1 / 16, test_fraction=1 / 16) == side


def test_fractions_come_out_and_the_judges_share_is_independent_of_the_side():
    ids = [text_id(f"prompt {n}") for n in range(8000)]
    sides = [split_of(identity, 0.1, 0.2) for identity in ids]
    shares = {side: sides.count(side) / len(ids) for side in ("train", "eval", "test")}
    assert shares["test"] == pytest.approx(0.2, abs=0.02)
    assert shares["eval"] == pytest.approx(0.1, abs=0.015)
    assert shares["train"] == pytest.approx(0.7, abs=0.02)
    for side in ("train", "eval", "test"):
        kept = [judge_share(identity, 0.3) for identity, found in zip(ids, sides) if found == side]
        assert sum(kept) / len(kept) == pytest.approx(0.3, abs=0.06)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=30), min_size=1, max_size=20), st.integers(0, 19))
def test_a_prompt_stays_where_it_is_whatever_else_is_there(texts, place):
    """Ids and sides of a whole file equal those of each row on its own: no function here has a memory."""
    together = [(text_id(text), split_of(text_id(text), 0.1, 0.1), judge_share(text_id(text), 0.3)) for text in texts]
    alone = texts[place % len(texts)]
    assert together[place % len(texts)] == (text_id(alone), split_of(text_id(alone), 0.1, 0.1), judge_share(text_id(alone), 0.3))


@given(st.text(), st.floats(0, 0.4), st.floats(0, 0.4))
def test_test_rows_do_not_move_when_the_share_of_eval_changes(text, one, other):
    identity = text_id(text)
    assert (split_of(identity, one, 0.3) == "test") == (split_of(identity, other, 0.3) == "test")


@pytest.mark.parametrize("fractions", [(-0.1, 0.1), (0.5, 0.5), (0.1, -0.2), (2, 0), (float("nan"), 0.1)])
def test_fractions_without_sense_are_refused(fractions):
    with pytest.raises(InputError, match="leave a part to train on"):
        split_of("0" * 16, *fractions)
