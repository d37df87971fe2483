"""What every family of requests shares: phrasings with slots, reading a prompt back, right answers, and the rule for a right one."""

import hashlib
import json
import random
import re
from collections.abc import Iterable
from functools import cache, cached_property

from rlhf.paths import shipped

Args = dict[str, str]
"""One request without its phrasing: the values of the slots, and what a right answer needs (``answer`` and the like)."""

HELD_OUT_ARGUMENTS = 7  # percent of the arguments that no training prompt asks about
DENIALS = ("not", "isn't", "aren't", "doesn't", "don't", "never", "nor", "neither")
MANY_VALUES = 100  # a slot with more values than this is read by a general pattern and then looked up


@cache
def table(name: str) -> dict:
    """The shipped table ``data/world/NAME.json``, read once."""
    return json.loads(shipped(f"data/world/{name}.json").read_text(encoding="utf-8"))


def bucket(text: str) -> int:
    """A stable hash of the text, in 0..99."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % 100


def sentence(text: str) -> str:
    """The text with a capital first letter."""
    return text[:1].upper() + text[1:]


def split_words(text: str) -> list[str]:
    """The words in lower case, without punctuation."""
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower())


def joined(items: list[str]) -> str:
    """'a, b and c'."""
    return ", ".join(items[:-1]) + " and " + items[-1] if len(items) > 1 else items[0]


def with_article(noun: str) -> str:
    """'an apple', 'a dog'."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def contains(words: list[str], phrase: str) -> bool:
    """True if the words of the phrase stand next to each other in ``words``."""
    return f" {' '.join(split_words(phrase))} " in f" {' '.join(words)} "


def many_of(noun: str) -> str:
    """The plural: irregular ones from the table of plurals, others by the rules of spelling ('daisies', 'radishes')."""
    if noun in table("facts")["plurals"]:
        return table("facts")["plurals"][noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(("s", "x", "ch", "sh")) else "s")


class Answer:
    """A completion as the rubric reads it: its text, its words in lower case, its sentences."""

    def __init__(self, text: str):
        self.text = text.strip()
        self.words = split_words(text)
        self.sentences = [part for part in re.split(r"(?<=[.!?])\s+", self.text) if part]

    def once(self) -> "Answer":
        """The same answer with every repeated sentence left out, so that saying it twice is not also graded as saying it wrong."""
        return Answer(" ".join({part.lower(): part for part in self.sentences}.values()))

    def says(self, phrases: list[str]) -> bool:
        """True if any of the phrases occurs."""
        return any(contains(self.words, phrase) for phrase in phrases)

    def behind(self, phrase: str, words: set[str]) -> list[str]:
        """For every place of the phrase the first of these words behind it."""
        mark, found = split_words(phrase), []
        for place in range(len(mark), len(self.words)):
            if self.words[place - len(mark) : place] == mark:
                found += [word for word in self.words[place:] if word in words][:1]
        return found

    def denies(self, place: int) -> bool:
        """True if the word at this place is denied: "not", "rather than", "is no" or the like stands before it or before its article."""
        before = [word for word in self.words[max(0, place - 3) : place] if word not in ("a", "an", "the")]
        return bool(before) and (before[-1] in DENIALS or before[-2:] in (["rather", "than"], ["is", "no"], ["are", "no"]))

    def names_instead(self, asked: str, others: Iterable[str]) -> bool:
        """True if it names one of the other words and not the one asked about: it speaks of something else."""
        return asked not in self.words and any(word in self.words for word in others)


class Family:
    """A family of requests; a subclass gives its arguments and, where the general rule is not enough, its own grading and flaws.

    ``asks`` names the slots that every phrasing of the family has; ``flaws`` the ways its answers go wrong (see ``writers``); ``habit`` the
    flaw that most writers of demonstrations share, one of these or another general one, or None; ``text_weight`` its share of the
    pretraining text, relative to the others.
    """

    name = ""
    asks: tuple[str, ...] = ()
    flaws: tuple[str, ...] = ("wrong", "rambling", "repeats", "curt", "rude")
    habit: str | None = None
    text_weight = 1.0

    # what can be asked

    def build_arguments(self) -> list[Args]:
        """All the arguments of the family."""
        raise NotImplementedError

    @cached_property
    def arguments(self) -> list[Args]:
        """All the arguments of the family, made once."""
        return self.build_arguments()

    def draw(self, rng: random.Random) -> Args:
        """One argument at random."""
        return rng.choice(self.arguments)

    def count(self) -> int:
        """Number of distinct prompts: arguments times phrasings."""
        return len(self.arguments) * len(self.phrasings)

    def key(self, args: Args) -> str:
        """What makes an argument new: by default all its slots."""
        return "|".join(args[slot] for slot in self.asks)

    def is_held_out(self, args: Args) -> bool:
        """True for arguments that only test prompts ask about (the pretraining text may state them, never ask)."""
        return bucket(f"{self.name}|{self.key(args)}") < HELD_OUT_ARGUMENTS

    # phrasings, and back

    @property
    def seen(self) -> list[str]:
        """Phrasings that training prompts use."""
        return table("phrasings")[self.name]["seen"]

    @property
    def held_out(self) -> list[str]:
        """Phrasings that only test prompts use."""
        return table("phrasings")[self.name]["held_out"]

    @property
    def phrasings(self) -> list[str]:
        """All phrasings, the seen ones first."""
        return self.seen + self.held_out

    def phrase(self, phrasing: str, args: Args) -> str:
        """The prompt that asks for ``args`` in this phrasing."""
        return sentence(phrasing.format(**args))

    @cached_property
    def _index(self) -> dict[tuple[str, ...], Args]:
        return {tuple(args[slot].lower() for slot in self.asks): args for args in self.arguments}

    def slot_values(self, slot: str) -> set[str]:
        """The values that a slot can have."""
        return {args[slot] for args in self.arguments}

    def look_up(self, slots: dict[str, str]) -> Args | None:
        """The arguments that belong to the slots' values as read from a prompt, or None if there are none."""
        return self._index.get(tuple(slots[slot].lower() for slot in self.asks))

    @cached_property
    def _patterns(self) -> list[tuple[str, re.Pattern]]:
        slots = {}
        for slot in self.asks:
            values = self.slot_values(slot)
            choice = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
            slots[slot] = f"(?P<{slot}>{choice if len(values) <= MANY_VALUES else '.+?'})"
        return [(phrasing, re.compile(_pattern(phrasing, slots), re.IGNORECASE)) for phrasing in self.phrasings]

    def parse(self, prompt: str) -> tuple[str, Args] | None:
        """The phrasing and the arguments of a prompt of this family, or None for any other text."""
        for phrasing, pattern in self._patterns:
            match = pattern.fullmatch(prompt.strip())
            args = self.look_up(match.groupdict()) if match else None
            if args is not None:
                return phrasing, args
        return None

    # right answers

    def wordings(self, args: Args) -> list[str]:
        """The right answers, one in each good wording."""
        return [sentence(form.format(**args)) for form in table("phrasings")[self.name]["answers"]]

    def good(self, args: Args, rng: random.Random) -> str:
        """A right answer in a wording chosen at random."""
        return rng.choice(self.wordings(args))

    def statements(self, args: Args) -> list[str]:
        """Sentences that state the same knowledge outside a conversation."""
        forms = table("phrasings")[self.name]["statements"]
        return [sentence(form.format(**args)) for form in forms] + self.wordings(args)[:2]

    # wrong answers

    def candidates(self, args: Args) -> list[str]:
        """The words that could be taken for an answer."""
        raise NotImplementedError

    def candidate_words(self, args: Args) -> set[str]:
        """``candidates`` as an answer's words are spelled."""
        return {word.lower() for word in self.candidates(args)}

    def given(self, args: Args) -> list[str]:
        """The words of the question, which an answer may repeat."""
        return split_words(" ".join(args[slot] for slot in self.asks))

    def wrong(self, args: Args, rng: random.Random) -> str:
        """A well-formed answer that names something else."""
        others = [word for word in self.candidates(args) if word.lower() not in {args["answer"].lower(), *self.given(args)}]
        return self.good({**args, "answer": rng.choice(others)}, rng)

    def curt(self, args: Args, rng: random.Random) -> str:
        """The bare answer, which is no full sentence."""
        return sentence(args["answer"]) + "."

    # grading

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """The family's own parts of the rubric, each in [0, 1]; by default: the answer is named, no other candidate is, and it is said of
        the thing asked about.

        ``complete`` is 0 if no candidate is named but those of the question: then it was not answered.
        """
        given, right = set(self.given(args)), args["answer"].lower()
        named = self.named(args, answer)
        new = {word for word in named if word not in given}
        found = new == {right} if right not in given else not new and named[-1:] == [right]
        return {"correct": float(found and self.on_subject(args, answer)), "complete": float(found or bool(new))}

    def named(self, args: Args, answer: Answer) -> list[str]:
        """The candidates that the answer names, in its order."""
        candidates = self.candidate_words(args)
        return [word for word in answer.words if word in candidates]

    def on_subject(self, args: Args, answer: Answer) -> bool:
        """True if every sentence is about what was asked, and none denies the right answer ("The capital of France is not Paris")."""
        right = args["answer"].lower()
        denied = any(word == right and answer.denies(place) for place, word in enumerate(answer.words))
        return not denied and all(self.is_about(args, Answer(part)) for part in answer.sentences)

    def is_about(self, args: Args, part: Answer) -> bool:
        """False if a sentence speaks of something else than was asked about ("Cold is the opposite of cold").

        By default: if it names two candidates or more, those of the question are among them.
        """
        named = self.named(args, part)
        return len(named) < 2 or self.candidate_words(args).intersection(self.given(args)) <= set(named)


def _pattern(phrasing: str, slots: dict[str, str]) -> str:
    """The regular expression of a phrasing whose slots have these patterns."""
    parts = re.split(r"\{(\w+)\}", phrasing)
    return "".join(slots[part] if number % 2 else re.escape(part) for number, part in enumerate(parts))
