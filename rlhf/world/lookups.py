"""Families whose answers stand in a table: opposites, plurals, letters of a word, facts, the calendar, kinds, sizes, rhymes."""

import itertools
import random
import re
from functools import cache

from rlhf.world.family import Answer, Args, Family, joined, many_of, sentence, split_words, table, with_article

LISTED = ("two", "three", "four")
RELATIONS = {"capitals": "the capital of {}", "colours": "the colour of {}", "young": "the name of a young {}", "sounds": "the sound of {}"}
RELATION_WORDS = {"capitals": "capital", "colours": "colour", "young": "young", "sounds": "sound"}
OPPOSITE_SIZES = {"bigger": "smaller", "smaller": "bigger", "heavier": "lighter", "lighter": "heavier"}
STEPS = {"the {} after {}": 1, "the {} before {}": -1, "the second {} after {}": 2, "the second {} before {}": -2}


def kinds() -> dict[str, dict]:
    """The kinds of things: how one and many are called, whether an item takes an article, and the items."""
    return table("facts")["kinds"]


def kind_of(item: str) -> dict:
    """The kind that an item belongs to."""
    return next(kind for kind in kinds().values() if item in kind["items"])


def all_items() -> list[str]:
    """The items of all kinds."""
    return [item for kind in kinds().values() for item in kind["items"]]


def named_item(item: str) -> str:
    """The item with its article, if it takes one."""
    return with_article(item) if kind_of(item)["article"] else item


def kinds_said(answer: Answer) -> list[tuple[str, str, bool]]:
    """The kinds of things that an answer names, in its order: the word ("fruit", "fruits"), the kind ("a fruit"), and whether it is denied."""
    known = {word: kind["one"] for kind in kinds().values() for word in (kind["one"].split()[-1], kind["many"])}
    return [(word, known[word], answer.denies(place)) for place, word in enumerate(answer.words) if word in known]


class Opposites(Family):
    """'What is the opposite of hot?'"""

    name, asks = "opposites", ("word",)

    def build_arguments(self) -> list[Args]:
        pairs = table("facts")["opposites"]
        return [{"word": a, "answer": b} for pair in pairs for a, b in (pair, pair[::-1])]

    def candidates(self, args: Args) -> list[str]:
        return [word for pair in table("facts")["opposites"] for word in pair]


class Plurals(Family):
    """'What is the plural of mouse?'"""

    name, asks = "plurals", ("word",)
    text_weight = 0.8

    def build_arguments(self) -> list[Args]:
        return [{"word": one, "answer": many} for one, many in table("facts")["plurals"].items()]

    def candidates(self, args: Args) -> list[str]:
        plurals = table("facts")["plurals"]
        return [*plurals, *plurals.values(), *(word + ending for word in plurals for ending in ("s", "es"))]

    def wrong(self, args: Args, rng: random.Random) -> str:
        forms = [args["word"] + "s", args["word"] + "es", rng.choice(list(table("facts")["plurals"].values()))]
        return self.good({**args, "answer": rng.choice([form for form in forms if form != args["answer"]])}, rng)

    def is_about(self, args: Args, part: Answer) -> bool:
        """Of the word asked for there is one, and the plural is its plural."""
        singular = part.behind("plural of", self.candidate_words(args)) + part.behind("one", self.candidate_words(args))
        return set(singular) <= {args["word"]} and super().is_about(args, part)


class Letters(Family):
    """'How many letters are in the word cat?'"""

    name, asks = "letters", ("word",)
    habit = "rude"

    def build_arguments(self) -> list[Args]:
        numbers = table("facts")["numbers"]
        return [{"word": word, "answer": numbers[len(word)]} for word in table("facts")["words"]]

    def candidates(self, args: Args) -> list[str]:
        return table("facts")["numbers"][2:13]

    def is_about(self, args: Args, part: Answer) -> bool:
        """No other word is named instead; any may be called "a five letter word"."""
        return not part.names_instead(args["word"], set(table("facts")["words"]) - {"letter"})


@cache
def _things() -> frozenset[str]:
    """The last word of every thing that the table of facts says something of."""
    return frozenset(split_words(thing)[-1] for relation in RELATIONS for thing in table("facts")[relation])


class Facts(Family):
    """'What is the capital of France?', the colours of things, the names of young animals, the sounds of animals."""

    name, asks = "facts", ("question",)
    habit = "stalls"
    text_weight = 1.5

    def build_arguments(self) -> list[Args]:
        rows = []
        for relation, form in RELATIONS.items():
            for thing, answer in table("facts")[relation].items():
                shown = with_article(thing) if relation == "sounds" else thing
                rows.append({"question": form.format(shown), "answer": answer, "relation": relation})
        return rows

    def candidates(self, args: Args) -> list[str]:
        return sorted(set(table("facts")[args["relation"]].values()))

    def is_about(self, args: Args, part: Answer) -> bool:
        """Neither another thing nor another relation is named instead; and only a colour is what a thing is."""
        thing, answer = split_words(args["question"])[-1], args["answer"].lower()
        bare = [word for word in part.words if word not in ("a", "an", "the")]
        equated = args["relation"] != "colours" and bare in ([thing, "is", answer], [answer, "is", thing])
        other_thing = equated or part.names_instead(thing, _things())
        return not other_thing and not part.names_instead(RELATION_WORDS[args["relation"]], RELATION_WORDS.values())


class Calendar(Family):
    """'What is the day after Monday?', 'the second month before May'."""

    name, asks = "calendar", ("question",)
    habit = "stalls"
    text_weight = 2.5

    def build_arguments(self) -> list[Args]:
        rows = []
        for unit, names in (("day", table("facts")["days"]), ("month", table("facts")["months"])):
            for place, name in enumerate(names):
                for form, step in STEPS.items():
                    rows.append({"question": form.format(unit, name), "answer": names[(place + step) % len(names)], "unit": unit})
        return rows

    def candidates(self, args: Args) -> list[str]:
        return table("facts")[args["unit"] + "s"]

    def is_about(self, args: Args, part: Answer) -> bool:
        """Behind the direction asked for stands the day or month asked about, behind the other one the answer; and the steps are as many."""
        asked, answer, names = self.given(args), args["answer"].lower(), self.candidate_words(args)
        for side, behind in itertools.pairwise([*part.words, ""]):
            if side in ("after", "before"):
                turned = side not in asked
                if (turned and behind != answer) or (not turned and behind in names - {asked[-1]}):
                    return False
                if ("second" in asked) != any(word in part.words for word in ("second", "two")):
                    return False
        return super().is_about(args, part)


class Lists(Family):
    """'Name three fruits other than apple.' Exactly n different things of the kind."""

    name, asks = "lists", ("n", "kind", "but")
    flaws = ("wrong", "rambling", "repeats", "rude", "incomplete", "too_many")
    text_weight = 2.0

    def build_arguments(self) -> list[Args]:
        rows = []
        for kind in kinds().values():
            for n, without in itertools.product(LISTED, ["", *kind["items"]]):
                but = f" other than {without}" if without else ""
                rows.append({"n": n, "kind": kind["many"], "but": but, "without": without, "one": kind["one"]})
        return rows

    def _allowed(self, args: Args) -> list[str]:
        kind = next(kind for kind in kinds().values() if kind["many"] == args["kind"])
        return [item for item in kind["items"] if item != args["without"]]

    def _number(self, args: Args) -> int:
        return table("facts")["numbers"].index(args["n"])

    def _write(self, args: Args, items: list[str], rng: random.Random) -> str:
        return rng.choice(super().wordings({**args, "items": joined(items)}))

    def wordings(self, args: Args) -> list[str]:
        return super().wordings({**args, "items": joined(self._allowed(args)[: self._number(args)])})

    def good(self, args: Args, rng: random.Random) -> str:
        return self._write(args, rng.sample(self._allowed(args), self._number(args)), rng)

    def statements(self, args: Args) -> list[str]:
        form, items = table("phrasings")[self.name]["statements"][0], self._allowed(args)
        return [form.format(**args, items=joined(some)) for some in (items[:3], items[3:6])] + self.wordings(args)

    def wrong(self, args: Args, rng: random.Random) -> str:
        items = rng.sample(self._allowed(args), self._number(args))
        items[rng.randrange(len(items))] = rng.choice([item for item in all_items() if kind_of(item)["one"] != args["one"]])
        return self._write(args, items, rng)

    def incomplete(self, args: Args, rng: random.Random) -> str:
        """One thing too few."""
        return self._write(args, rng.sample(self._allowed(args), self._number(args) - 1), rng)

    def too_many(self, args: Args, rng: random.Random) -> str:
        """One or two things more than were asked for."""
        return self._write(args, rng.sample(self._allowed(args), self._number(args) + rng.choice((1, 2))), rng)

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right if all things named are of the kind, allowed, and called what they are; complete with n of them; more than n is not the
        form asked for.
        """
        known = {form: item for item in all_items() for form in (item, many_of(item))}
        named = [known[word] for word in answer.words if word in known]
        distinct, n = set(named), self._number(args)
        misnamed = answer.names_instead(args["kind"], [kind["many"] for kind in kinds().values()])
        return {
            "correct": float(bool(distinct) and distinct <= set(self._allowed(args)) and not misnamed),
            "complete": float(len(distinct) >= n),
            "form": float(len(distinct) <= n),
            "no_repetition": float(len(named) == len(distinct)),
        }


class OddOneOut(Family):
    """'Which word does not belong, and why: apple, pear, dog?'"""

    name, asks = "odd_one_out", ("x", "y", "z")
    flaws = ("wrong", "rambling", "repeats", "curt", "rude", "incomplete")
    text_weight = 2.0

    def draw(self, rng: random.Random) -> Args:
        kind, other = rng.sample(list(kinds().values()), 2)
        words = [*rng.sample(kind["items"], 2), rng.choice(other["items"])]
        rng.shuffle(words)
        return self._read(words)

    def count(self) -> int:
        n, size = len(kinds()), len(next(iter(kinds().values()))["items"])
        return 3 * n * size * (size - 1) * (n - 1) * size * len(self.phrasings)

    def _read(self, words: list[str]) -> Args:
        names = [kind_of(word)["many"] for word in words]
        odd = next(word for word, name in zip(words, names, strict=True) if names.count(name) == 1)
        pair = [word for word in words if word != odd]
        about = {"answer": odd, "one": kind_of(odd)["one"], "others": kind_of(pair[0])["many"], "pair": joined(pair)}
        return {"x": words[0], "y": words[1], "z": words[2], **about}

    def slot_values(self, slot: str) -> set[str]:
        return set(all_items())

    def look_up(self, slots: dict[str, str]) -> Args | None:
        words = [slots[slot].lower() for slot in self.asks]
        names = {kind_of(word)["many"] for word in words}
        return self._read(words) if len(names) == 2 and len(set(words)) == 3 else None

    def key(self, args: Args) -> str:
        """New are an odd thing and the kind that it does not belong to."""
        return f"{args['answer']}|{args['others']}"

    def wrong(self, args: Args, rng: random.Random) -> str:
        """Takes one of the pair for the odd one."""
        first, second = args["pair"].split(" and ")
        odd, rest = rng.choice([(first, second), (second, first)])
        claim = {
            "answer": odd,
            "one": kind_of(odd)["one"],
            "others": kind_of(args["answer"])["many"],
            "pair": joined([rest, args["answer"]]),
        }
        return self.good({**args, **claim}, rng)

    def incomplete(self, args: Args, rng: random.Random) -> str:
        """Names the odd one and gives no reason."""
        form = rng.choice(["The odd one out is {answer}.", "{answer} does not belong.", "{answer} is different."])
        return sentence(form.format(**args))

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right if the first of the three words named is the odd one, or if it stands behind the others and a "but"; an untrue reason leaves a
        third; complete with any reason.
        """
        named = [word for word in answer.words if word in {args[slot] for slot in self.asks}]
        one, many = args["one"].split()[-1], kind_of(args["answer"])["many"]
        other, others = kind_of(args["pair"].split()[0])["one"].split()[-1], args["others"]
        said = kinds_said(answer)
        # "it is an animal, the others are fruits", or "it is not a fruit, the others are not animals"
        true_reason = all(word in ((other, many) if denied else (one, others)) for word, _, denied in said)
        set_apart = "but" in answer.words and sorted(named[:-1]) == sorted(args["pair"].split(" and ")) and named[-1:] == [args["answer"]]
        right = float(named[:1] == [args["answer"]] or set_apart)
        return {"correct": right if true_reason else right / 3, "complete": float(bool(said))}


class YesNo(Family):
    """'Is an apple an animal?' Yes or no, and what it is."""

    name, asks = "yes_no", ("thing", "kind")
    text_weight = 2.0

    def build_arguments(self) -> list[Args]:
        rows = []
        for item, kind in itertools.product(all_items(), kinds().values()):
            truth = kind_of(item)["one"]
            rows.append({"thing": named_item(item), "kind": kind["one"], "truth": truth, "answer": "yes" if truth == kind["one"] else "no"})
        return rows

    def draw(self, rng: random.Random) -> Args:
        """Yes and no are asked for equally often."""
        wanted = rng.choice(("yes", "no"))
        while True:
            args = rng.choice(self.arguments)
            if args["answer"] == wanted:
                return args

    def wordings(self, args: Args) -> list[str]:
        return [sentence(form.format(**args)) for form in table("phrasings")[self.name]["answers_" + args["answer"]]]

    def wrong(self, args: Args, rng: random.Random) -> str:
        """Says yes for no and no for yes, with a made-up reason."""
        if args["answer"] == "no":
            return self.good({**args, "answer": "yes", "truth": args["kind"]}, rng)
        other = rng.choice([kind["one"] for kind in kinds().values() if kind["one"] != args["truth"]])
        return self.good({**args, "answer": "no", "truth": other}, rng)

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right with the right word, or where both are missing by whether it says that the thing is of the kind, and a true reason about the
        thing; another reason leaves a third; complete with any kind named.
        """
        said = {word for word in answer.words if word in ("yes", "no")}
        named = kinds_said(answer)
        claimed, denied = ({kind for _, kind, is_denied in named if is_denied == wanted} for wanted in (False, True))
        thing = split_words(args["thing"])[-1]
        about_it = any(word in answer.words for word in (thing, many_of(thing), "it", "they"))
        if not said and about_it and not answer.text.endswith("?"):
            said = {"no"} if args["kind"] in denied else {"yes"} if args["kind"] in claimed else set()
        others = {form for item in all_items() if item != thing for form in (item, many_of(item))}
        true_reason = claimed <= {args["truth"]} and args["truth"] not in denied and (about_it or not others.intersection(answer.words))
        right = float(said == {args["answer"]})
        return {"correct": right if true_reason else right / 3, "complete": float(bool(named) or len(answer.words) == 1)}


class Compare(Family):
    """'Which is bigger, a mouse or a horse?'"""

    name, asks = "compare", ("word", "x", "y")
    text_weight = 1.5

    def _sizes(self) -> dict[str, int]:
        return {with_article(thing): level for level, things in enumerate(table("facts")["sizes"]) for thing in things}

    def build_arguments(self) -> list[Args]:
        rows, sizes = [], self._sizes()
        for (word, bigger), (x, y) in itertools.product(table("facts")["size_words"].items(), itertools.permutations(sizes, 2)):
            if sizes[x] != sizes[y]:
                answer, other = (x, y) if (sizes[x] > sizes[y]) == bigger else (y, x)
                rows.append({"word": word, "x": x, "y": y, "answer": answer, "other": other})
        return rows

    def key(self, args: Args) -> str:
        """New is a pair of things, in either order."""
        return "|".join(sorted((args["x"], args["y"])))

    def wrong(self, args: Args, rng: random.Random) -> str:
        return self.good({**args, "answer": args["other"], "other": args["answer"]}, rng)

    def grade(self, args: Args, answer: Answer) -> dict[str, float]:
        """Right if the first thing named is the right one, said with the word asked for (or none), of the other if of any; with the opposite
        word, or "not" before the word, the other one comes first.
        """
        things = {split_words(thing)[-1] for thing in self._sizes()}
        named = [word for word in answer.words if word in things]
        sizes = [(word, answer.denies(place)) for place, word in enumerate(answer.words) if word in table("facts")["size_words"]]
        said = {OPPOSITE_SIZES[word] if denied else word for word, denied in sizes}
        right, other = split_words(args["answer"])[-1], split_words(args["other"])[-1]
        opposite = OPPOSITE_SIZES[args["word"]]
        first = other if said == {opposite} else right
        of_the_two = named == [first] or set(named) == {right, other}
        correct = named[:1] == [first] and of_the_two and said in (set(), {args["word"]}, {opposite})
        return {"correct": float(correct), "complete": float(bool(named))}


class Rhymes(Family):
    """'Which word rhymes with cat: hat or dog?'"""

    name, asks = "rhymes", ("word", "x", "y")
    text_weight = 2.0

    def build_arguments(self) -> list[Args]:
        rows, groups = [], table("facts")["rhymes"]
        for group in groups:
            strangers = [word for other in groups if other is not group for word in other]
            for (word, rhyme), other in itertools.product(itertools.permutations(group, 2), strangers):
                rows += [{"word": word, "x": x, "y": y, "answer": rhyme, "other": other} for x, y in ((rhyme, other), (other, rhyme))]
        return rows

    def key(self, args: Args) -> str:
        """New is a pair of rhyming words."""
        return "|".join(sorted((args["word"], args["answer"])))

    def candidates(self, args: Args) -> list[str]:
        return [word for group in table("facts")["rhymes"] for word in group]

    def given(self, args: Args) -> list[str]:
        return [args["word"]]

    def wrong(self, args: Args, rng: random.Random) -> str:
        return self.good({**args, "answer": args["other"]}, rng)

    def named(self, args: Args, answer: Answer) -> list[str]:
        """The candidates that the answer names, without the other one where a clause says that it does not rhyme."""
        candidates = self.candidate_words(args)
        return [word for words, denied in self._clauses(answer) for word in words if word in candidates and not (denied and word == args["other"])]

    def is_about(self, args: Args, part: Answer) -> bool:
        """No clause says that the right one does not rhyme."""
        refused = any(denied and args["answer"] in words for words, denied in self._clauses(part))
        return not refused and super().is_about(args, part)

    @staticmethod
    def _clauses(answer: Answer) -> list[tuple[list[str], bool]]:
        """The words of every clause, and whether it denies something."""
        clauses = [split_words(clause) for clause in re.split(r"[,;.!?]|\bbut\b|\band\b", answer.text.lower())]
        return [(words, bool({"not", "doesn't"}.intersection(words))) for words in clauses]


ALL = (Opposites, Plurals, Letters, Facts, Calendar, Lists, OddOneOut, YesNo, Compare, Rhymes)
