"""Which side of a split a prompt is on: a pure function of the prompt, so that adding data never moves a row.

Every file of a run asks the same functions, therefore the same prompt is on the same side in all of them. Conversations are split by
their first user turn: two conversations that open alike stay together.
"""

import hashlib
import unicodedata
from functools import lru_cache

from rlhf.errors import InputError

TRAIN, EVAL, TEST = SPLITS = ("train", "eval", "test")


def normalise(text: str) -> str:
    """The text with compatibility forms folded (NFKC), letter case removed and every run of white space made one space."""
    folded = text.lower() if text.isascii() else unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return " ".join(folded.split())


def text_id(text: str) -> str:
    """Sixteen hexadecimal digits (64 bits of SHA-256) that name a text whatever its case and spacing."""
    return hashlib.sha256(normalise(text).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_id(messages: list[dict[str, str]]) -> str:
    """The id of a prompt: that of its first user turn; ValueError if there is none."""
    for message in messages:
        if message["role"] == "user":
            return text_id(message["content"])
    raise ValueError("a prompt without a user turn has no id")


@lru_cache(4096)  # several kinds of row ask about the same prompt
def split_of(prompt_id: str, eval_fraction: float, test_fraction: float) -> str:
    """The side, ``train``, ``eval`` or ``test``, of an id.

    Test takes the lowest ``test_fraction`` of all ids and eval the next ``eval_fraction`` (both in [0, 1], together below 1), so that
    changing the share of eval never moves a row into or out of test. InputError if the fractions make no sense.
    """
    if not (eval_fraction >= 0 and test_fraction >= 0 and eval_fraction + test_fraction < 1):
        raise InputError(
            f"eval_fraction = {eval_fraction} and test_fraction = {test_fraction}: wanted shares from 0 up that leave a part to train on; "
            "0.05 and 0.05 are usual"
        )
    position = int(prompt_id, 16) / 16 ** len(prompt_id)
    if position < test_fraction:
        return TEST
    return EVAL if position < test_fraction + eval_fraction else TRAIN
