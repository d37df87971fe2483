"""Families about numbers in words: arithmetic, the next in a sequence, sorting."""

import itertools
import random
import re
from collections import Counter

from rlhf.world.family import Answer, Args, Family, table

STEPS = (1, 2, 3, 4, -1, -2)
SORTED_UP_TO = 12


def number(value: int) -> str:
    """The number in words, 0 to 20."""
    return table("facts")["numbers"][value]


def value_of(word: str) -> int:
    """The value of a number in words."""
    return table("facts")["numbers"].index(word)


class Arithmetic(Family):
    """'What is seven plus five?'"""

    name, asks = "arithmetic", ("a", "op", "b")
    habit = "rude"
    text_weight = 3.0

    def build_arguments(self) -> list[Args]:
        sums = [(a, "plus", b, a + b) for a, b in itertools.product(range(1, 11), repeat=2)]
        differences = [(a, "minus", b, a - b) for a, b in itertools.product(range(1, 21), range(1, 11)) if 0 <= a - b <= 10]
        return [{"a": number(a), "op": op, "b": number(b), "answer": number(c)} for a, op, b, c in sums + differences]

    def candidates(self, args: Args) -> list[str]:
        return table("facts")["numbers"]

    def wrong(self, args: Args, rng: random.Random) -> str:
        """Off by one to three."""
        right = value_of(args["answer"])
        near = [value for value in range(max(0, right - 3), min(20, right + 3) + 1) if value != right]
        return self.good({**args, "answer": number(rng.choice(near))}, rng)

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right if the last number is the result and the others, if any, make the sum that was asked for."""
        named = self.named(args, answer)
        correct = named[-1:] == [args["answer"]] and self.on_subject(args, answer)
        return {"correct": float(correct), "complete": float(bool(named))}

    def is_about(self, args: Args, part: Answer) -> bool:
        """The numbers before the result are those of the question, each no more often, with its sign; only plus goes both ways."""
        before, asked = self.named(args, part)[:-1], [args["a"], args["b"]]
        signs = {word for word in part.words if word in ("plus", "minus")}
        turned = "minus" in signs and before == asked[::-1] != asked
        return not Counter(before) - Counter(asked) and signs <= {args["op"]} and not turned


class Sequence(Family):
    """'What comes next: two, four, six?'"""

    name, asks = "sequence", ("a", "b", "c")
    habit = "stalls"
    text_weight = 2.0

    def build_arguments(self) -> list[Args]:
        rows = []
        for start, step in itertools.product(range(21), STEPS):
            values = [start + step * place for place in range(4)]
            if min(values) >= 0 and max(values) <= 20:
                rows.append(dict(zip(("a", "b", "c", "answer"), map(number, values), strict=True)))
        return rows

    def candidates(self, args: Args) -> list[str]:
        return table("facts")["numbers"]

    def wrong(self, args: Args, rng: random.Random) -> str:
        """A number nearby that has not been counted yet."""
        right = value_of(args["answer"])
        near = [number(value) for value in range(max(0, right - 4), min(20, right + 4) + 1) if value != right]
        return self.good({**args, "answer": rng.choice([word for word in near if word not in self.given(args)])}, rng)

    def named(self, args: Args, answer: Answer) -> list[str]:
        """The numbers named, without the step ("It goes up by two")."""
        step = number(abs(self._step(args)))
        steps = {place for place, word in enumerate(answer.words) if word == step and place and answer.words[place - 1] in ("by", "add", "adding")}
        numbers = self.candidate_words(args)
        return [word for place, word in enumerate(answer.words) if word in numbers and place not in steps]

    def is_about(self, args: Args, part: Answer) -> bool:
        """The numbers beside the next one, if any, are those of the question in their order, or the last of them; it comes after them, and
        they go the way that is said.
        """
        counted = [word for word in self.named(args, part) if word != args["answer"]]
        turned = args["answer"] in part.behind("after", self.candidate_words(args)) + part.behind("follows", self.candidate_words(args))
        turned = turned or part.says(["down" if self._step(args) > 0 else "up"])
        return not turned and (counted == self.given(args)[-len(counted) :] if counted else True)

    def _step(self, args: Args) -> int:
        return value_of(args["answer"]) - value_of(args["c"])


class Sorting(Family):
    """'Sort from smallest to largest: five, two, nine.'"""

    name, asks = "sorting", ("order", "x", "y", "z")
    flaws = ("wrong", "rambling", "repeats", "rude", "incomplete")
    habit = "rude"
    text_weight = 1.5

    def build_arguments(self) -> list[Args]:
        rows = []
        for values in itertools.permutations(range(1, SORTED_UP_TO + 1), 3):
            for order, ordered in (("smallest to largest", sorted(values)), ("largest to smallest", sorted(values, reverse=True))):
                x, y, z, first, second, third = map(number, [*values, *ordered])
                rows.append({"order": order, "x": x, "y": y, "z": z, "first": first, "second": second, "third": third})
        return rows

    def key(self, args: Args) -> str:
        """New is a set of three numbers, in whatever order."""
        return "|".join(sorted((args["x"], args["y"], args["z"])))

    def wrong(self, args: Args, rng: random.Random) -> str:
        """The three numbers in another order."""
        right = (args["first"], args["second"], args["third"])
        first, second, third = rng.choice([order for order in itertools.permutations(right) if order != right])
        return self.good({**args, "first": first, "second": second, "third": third}, rng)

    def incomplete(self, args: Args, rng: random.Random) -> str:
        """One number is left out."""
        kept = [args["first"], args["second"], args["third"]]
        del kept[rng.randrange(3)]
        return rng.choice(["From {order}: {a}, {b}.", "In order they are {a}, {b}."]).format(order=args["order"], a=kept[0], b=kept[1])

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right if the numbers named are those asked for, in order, and no other order or end is said; complete if none is left out."""
        right = [args["first"], args["second"], args["third"]]
        numbers = table("facts")["numbers"]
        named = [word for word, behind in itertools.pairwise([*answer.words, ""]) if word in numbers and behind != "numbers"]  # "the three numbers"
        in_order = bool(named) and named == [word for word in right if word in named]
        turned = answer.says([" to ".join(reversed(args["order"].split(" to ")))])
        low, high = args["order"].split(" to ")
        ends = {low: args["first"], high: args["third"]}
        # "The largest is nine", not the end of "from smallest to largest is ..."
        claimed = re.findall(r"(?<!to )(?<!to the )\b(smallest|largest)(?: one| number)? is (\w+)", " ".join(answer.words))
        misplaced = any(ends[end] != value for end, value in claimed)
        return {"correct": float(in_order and not turned and not misplaced), "complete": float(len(set(named)) >= 3)}


ALL = (Arithmetic, Sequence, Sorting)
