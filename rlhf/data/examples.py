"""One example of any schema, and the four kinds of canonical row made from it.

A reader (`pairs.py`, `rankings.py`, `trees.py`, `demonstrations.py`) only says what a source row means: an `Example`. What makes a row
unusable depends on the kind that is wanted (a tied pair has a fine prompt), so it is decided here, once for all schemas.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from rlhf.data.splits import prompt_id, text_id

WRITTEN_MESSAGES = re.compile(r"""\s*\[\s*\{\s*\\?["'](?:role|from|content|value)\\?["']\s*:""")  # what str() or json.dumps() makes of a message list
TIED = "all tied"  # a reason of Unusable, and with those of rows too long to train on one of drops.json
LONG_PROMPT, LONG_COMPLETION = "prompt over data.max_prompt_tokens", "completion over data.max_completion_tokens"
DOCUMENT_CHARS = 20_000  # a text is cut beyond twice this: one book must not be one row, for its hash would put all of it on one side


class Unusable(Exception):
    """A row cannot be used; ``reason`` is one of a few fixed phrases, ``at`` the row's place in its group (0 for a row alone), ``found`` what was
    met there, for people."""

    def __init__(self, reason: str, at: int = 0, found: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.at = at
        self.found = found


@dataclass(slots=True)
class Example:
    """What a source row means.

    ``completions`` answer ``prompt`` (messages) and are ranked by ``ranks`` (1 = best, equal = tie); ``problem`` says why the completions
    cannot be used although the prompt may be; ``votes`` are the verdicts of several people where the ranks are their majority's; ``text`` stands
    alone for a document; ``at`` is as in `Unusable`.
    """

    prompt: list[dict[str, str]] = field(default_factory=list)
    completions: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    margin: float | None = None
    problem: Unusable | None = None
    votes: list[int] = field(default_factory=list)
    text: str | None = None
    family: str | None = None
    at: int = 0
    _checked: tuple[list[dict[str, str]], str] | None = None

    def checked(self) -> tuple[list[dict[str, str]], str]:
        """The usable prompt and its id, found out once for all kinds of row; Unusable as `checked_prompt`."""
        if self._checked is None:
            prompt = checked_prompt(self.prompt)
            self._checked = prompt, prompt_id(prompt)
        return self._checked


@dataclass(slots=True)
class Made:
    """Canonical rows made from one example, and what was left out of them (reasons, once per completion)."""

    rows: list[dict]
    left_out: list[str] = field(default_factory=list)


def checked_text(value: object, when_empty: str) -> str:
    """The value if it is text that every later part can carry; Unusable says why not, or ``when_empty``."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Unusable(when_empty)
    if not isinstance(value, str):
        raise Unusable("not text")
    if "\x00" in value:
        raise Unusable("NUL character")
    if WRITTEN_MESSAGES.match(value):
        raise Unusable("messages written as text")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair: JSON can spell it, UTF-8 cannot
            raise Unusable("not valid Unicode") from error
    return value


def checked_prompt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The messages of a usable prompt: known roles, text in every turn, a system turn only first, a user turn last."""
    turns = [turn for turn in messages if turn["role"] != "system" or turn["content"]]  # an empty system turn is no turn
    if not any(turn["role"] == "user" for turn in turns):
        raise Unusable("no prompt")
    for place, turn in enumerate(turns):
        if turn["role"] == "system" and place > 0:
            raise Unusable("system turn is not first")
        checked_text(turn["content"], "no prompt" if place == len(turns) - 1 else "empty turn")
    if turns[-1]["role"] != "user":
        raise Unusable("prompt does not end with the user")
    return turns


def dense_ranks(scores: list[float]) -> list[int]:
    """Ranks of scores, the highest first: 1 = best, equal scores share a rank, no rank is left out."""
    order = {score: place for place, score in enumerate(sorted(set(scores), reverse=True), start=1)}
    return [order[score] for score in scores]


def checked_ranks(ranks: list[object]) -> list[int]:
    """The ranks as dense integers from 1; Unusable if they are no numbers or have gaps that ties do not explain.

    Counting may start at 0 or 1, and after a tie go on densely (1, 1, 2) or by place (1, 1, 3).
    """
    numbers = [number(rank, "rank is not a number") for rank in ranks]
    if any(value != int(value) for value in numbers):
        raise Unusable("rank is not a number")
    dense = dense_ranks([-value for value in numbers])
    first = min(numbers)
    by_place = [sum(other < value for other in numbers) for value in numbers]
    if first not in (0, 1) or [value - first for value in numbers] not in ([rank - 1 for rank in dense], by_place):
        raise Unusable("ranks have gaps")
    return dense


def number(value: object, reason: str) -> float:
    """The value as a finite float, also from text such as "4.5" (CSV has no numbers); Unusable with ``reason`` otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise Unusable(reason)
    try:
        converted = float(value)
    except (ValueError, OverflowError) as error:
        raise Unusable(reason) from error
    if not math.isfinite(converted):
        raise Unusable(reason)
    return converted


def preference_row(example: Example, keep_ties: bool = False) -> Made:
    """One row of ranked completions. Of more than two, empty ones and repetitions are left out and counted; of two, the row is unusable."""
    _no_problem(example)
    prompt, identity = example.checked()
    if len(example.completions) != len(example.ranks):
        raise Unusable("answers and ranks differ in number")
    if len(example.completions) < 2:
        raise Unusable("fewer than two answers")
    kept, left_out = _usable_completions(example)
    completions = [example.completions[place] for place in kept]
    ranks = dense_ranks([-example.ranks[place] for place in kept])
    if not keep_ties and len(set(ranks)) == 1:
        raise Unusable(TIED)
    row = {"prompt": prompt, "completions": completions, "ranks": ranks}
    if example.margin is not None and len(completions) == 2:
        row["margin"] = example.margin
    return Made([_signed(row, identity, example)], left_out)


def _usable_completions(example: Example) -> tuple[list[int], list[str]]:
    """Places of the completions that can be compared, and the reason for each of the others."""
    kept, left_out, seen = [], [], set()
    few = len(example.completions) == 2
    for place, completion in enumerate(example.completions):
        try:
            text = checked_text(completion, "empty completion").strip()
            if text in seen:
                raise Unusable("chosen equals rejected" if few else "same answer twice")
        except Unusable as why:
            left_out.append(why.reason)
            continue
        seen.add(text)
        kept.append(place)
    if len(kept) < 2:
        raise Unusable(left_out[0])
    return kept, left_out


def demonstration_row(example: Example) -> Made:
    """One row with the best answer; of several best ones the first; answers that are all tied show nobody's choice."""
    _no_problem(example)
    prompt, identity = example.checked()
    if not example.completions:
        raise Unusable("no answer")
    if len(example.completions) != len(example.ranks):
        raise Unusable("answers and ranks differ in number")
    if len(example.ranks) > 1 and len(set(example.ranks)) == 1:
        raise Unusable(TIED)
    best = example.completions[example.ranks.index(min(example.ranks))]
    row = {"prompt": prompt, "completion": checked_text(best, "empty completion")}
    return Made([_signed(row, identity, example)])


def prompt_row(example: Example) -> Made:
    """One row with the prompt alone; a document is a prompt of one user turn. What is wrong with the answers does not matter."""
    asks = example if example.text is None else Example(prompt=[{"role": "user", "content": example.text}], family=example.family)
    prompt, identity = asks.checked()
    return Made([_signed({"prompt": prompt}, identity, asks)])


def text_row(example: Example) -> Made:
    """Rows of plain text: a document in pieces, or a demonstration as paragraphs without any marker of who speaks."""
    if example.text is not None:
        pieces = list(pieces_of(checked_text(example.text, "empty text")))
        return Made([{"text": piece, "id": text_id(piece)} for piece in pieces if piece.strip()])
    row = demonstration_row(example).rows[0]
    turns = [turn["content"] for turn in row["prompt"]] + [row["completion"]]
    return Made([{"text": "\n\n".join(turns), "id": row["id"]}])


def pieces_of(text: str, size: int = DOCUMENT_CHARS) -> Iterator[str]:
    """The text in pieces of ``size`` to twice ``size`` characters, cut after the last blank line, else line, else space in reach.

    Joined, the pieces are the text, character for character.
    """
    start = 0
    while len(text) - start > 2 * size:
        low, high = start + size, start + 2 * size
        cuts = ((text.rfind(mark, low, high), len(mark)) for mark in ("\n\n", "\n", " "))
        end = next((place + length for place, length in cuts if place >= 0), high)
        yield text[start:end]
        start = end
    yield text[start:]


def _no_problem(example: Example) -> None:
    if example.problem is not None:
        raise example.problem


def _signed(row: dict, identity: str, example: Example) -> dict:
    row["id"] = identity
    if example.family is not None:
        row["family"] = example.family
    return row
