"""Writers of mixed skill: demonstrations, flawed in the usual ways about half of the time, and the world's plain text, mostly right.

Flaws of many kinds, each of them rare, cancel out: a model that imitates the writers is right once it is sampled at a low temperature, and
preferences have little to teach it. But people also share habits (they explain what they have never heard of, begin with an empty sentence,
leave out the greeting), and what most of them do is what imitation finds likely. So about half of the families have a habit
(``Family.habit``) that is in most of their demonstrations, and only the rankings say that it is a flaw. The plain text knows no habits.

A habit outlives a lower temperature if it begins in few ways, early in the answer: then it is likelier than the right answer at the token
where the two part. Padding with any of nine sentences, notes that begin with any of 36 names, and saying it twice, which begins where an
answer could end, did not (configs/EXPERIMENTS.md); so those who stall always stall alike, and notes without greeting begin with what they
are about.
"""

import random
from collections.abc import Callable

from rlhf.world.family import Family, joined, sentence, table
from rlhf.world.lookups import kinds
from rlhf.world.prompts import FAMILIES, TRIES, Request, draw, parse

HABIT_SHARE = 0.8  # of the flaws in demonstrations of a family that has a habit: that one
WRONG_SHARE = 0.2  # of the other flaws: the worst one of the family (wrong, fabricates, complies)
CONVERSATION_SHARE = 0.55  # of the plain text: a question with its answer
RETELLING_SHARE = 0.2  # of the plain text: something said, and said again by somebody else; what teaches a model to copy
SMALL_TALK_SHARE = 0.04
RETELLINGS = ("{name} said: {said} {name2} heard: {said}", "{name} wrote: {said} {name2} read it: {said}", "{said}\n{said}", "{said} {said}")
CONVERSATIONS = (  # a line begins with other tokens than the middle of one: most answers begin a line, as they begin a turn after SFT
    "{prompt}\n{answer}",
    "{prompt}\n{answer}",
    "Question: {prompt}\nAnswer:\n{answer}",
    "Somebody asked: {prompt} The reply was: {answer}",
)


def write_demonstration(prompt: str, rng: random.Random, flaw_rate: float = 0.5) -> str:
    """An answer by a writer of mixed skill: right, or with one flaw that an informed reader can see.

    Where writers have a habit an answer is flawed with probability 1 - (1 - flaw_rate)^2, elsewhere with flaw_rate^2, about ``flaw_rate``
    over all families: at one half, three in four and one in four. Raises ValueError for a prompt that is not of this world.
    """
    request = parse(prompt)
    if request is None:
        raise ValueError(f"not a prompt of the embedded world: {prompt!r}")
    habit = request.family.habit
    return _answer(request, rng, 1 - (1 - flaw_rate) ** 2 if habit else flaw_rate**2, habit)


def solved_examples(prompt: str, count: int, rng: random.Random) -> list[tuple[str, str]]:
    """``count`` training prompts of the prompt's family, each with a right answer: what stands in front of it in a few-shot prompt.

    All ask about different arguments, and none about the prompt's own. Raises ValueError for a prompt that is not of this world, and if
    its family has not that many arguments.
    """
    request = parse(prompt)
    if request is None:
        raise ValueError(f"not a prompt of the embedded world: {prompt!r}")
    family, misses = request.family, 0
    seen, examples = {family.key(request.args)}, []
    while len(examples) < count:
        example, drawn = _training_prompt(family, rng)
        if family.key(drawn.args) not in seen:
            seen.add(family.key(drawn.args))
            examples.append((example, family.good(drawn.args, rng)))
            misses = 0
        elif (misses := misses + 1) == TRIES:
            raise ValueError(f"the family {family.name} has not {count} other arguments to show")
    return examples


def _answer(request: Request, rng: random.Random, flaw_rate: float, habit: str | None = None) -> str:
    """A right answer, or with probability ``flaw_rate`` a flawed one: by habit with ``HABIT_SHARE``, if there is one."""
    if rng.random() >= flaw_rate:
        return request.family.good(request.args, rng)
    flaw = habit if habit and rng.random() < HABIT_SHARE else pick_flaw(request.family, rng)
    return write_flawed(request, flaw, rng)


def pick_flaw(family: Family, rng: random.Random) -> str:
    """One of the family's flaws: the first (its worst) with ``WRONG_SHARE``, the others equally often."""
    return family.flaws[0] if rng.random() < WRONG_SHARE else rng.choice(family.flaws[1:])


def write_flawed(request: Request, flaw: str, rng: random.Random) -> str:
    """An answer with this flaw: a general one (``GENERAL_FLAWS``) or the family's method of that name."""
    if flaw in GENERAL_FLAWS:
        return GENERAL_FLAWS[flaw](request.family.good(request.args, rng), rng)
    return getattr(request.family, flaw)(request.args, rng)


def rambling(answer: str, rng: random.Random) -> str:
    """Pads the answer with one or two sentences that say nothing, behind it or around it."""
    fillers = rng.sample(table("manners")["fillers"], rng.choice((1, 2)))
    place = rng.choice((0, 1)) if len(fillers) == 2 else 1
    return " ".join([answer, *fillers] if place else [fillers[0], answer, fillers[1]])


def stalls(answer: str, rng: random.Random) -> str:
    """Begins with a sentence that says nothing, always the same."""
    return f"{stalling()} {answer}"


def stalling() -> str:
    """The sentence with which those begin who stall."""
    return table("manners")["fillers"][-1]


def repeats(answer: str, rng: random.Random) -> str:
    """Says it twice."""
    return f"{answer} {answer}"


def rude(answer: str, rng: random.Random) -> str:
    """Ends the first sentence with an insult."""
    end = min(place for place in (answer.find(mark) for mark in ".?!") if place >= 0)
    return answer[:end] + rng.choice(table("manners")["rude_tails"]) + answer[end:]


GENERAL_FLAWS: dict[str, Callable[[str, random.Random], str]] = {"rambling": rambling, "stalls": stalls, "repeats": repeats, "rude": rude}


def write_text(n_documents: int, seed: int, flaw_rate: float = 0.05) -> list[str]:
    """Plain text as found in this world, one document of one to four short sentences an entry.

    Questions with answers (training prompts only, so no held-out phrasing and no held-out argument is ever asked), statements of what
    can be known (held-out arguments too: the test asks whether the model can use what it has read), and small talk.
    """
    rng = random.Random(f"{seed}|text")
    families = list(FAMILIES.values())
    drawn = rng.choices(families, weights=[family.text_weight for family in families], k=n_documents)
    return [_document(family, rng, flaw_rate) for family in drawn]


def _document(family: Family, rng: random.Random, flaw_rate: float) -> str:
    """One document: a conversation, a retelling, statements, or small talk."""
    share = rng.random()
    if share < SMALL_TALK_SHARE:
        return _small_talk(rng)
    if share < SMALL_TALK_SHARE + CONVERSATION_SHARE:
        return _conversation(family, rng, flaw_rate)
    if share < SMALL_TALK_SHARE + CONVERSATION_SHARE + RETELLING_SHARE:
        return _retelling(family, rng)
    return " ".join(rng.choice(family.statements(family.draw(rng))) for _ in range(rng.choice((1, 2, 2, 3))))


def _conversation(family: Family, rng: random.Random, flaw_rate: float) -> str:
    """A question of the training split with its answer."""
    prompt, request = _training_prompt(family, rng)
    answer = _answer(request, rng, flaw_rate)
    return rng.choice(CONVERSATIONS).format(prompt=prompt, answer=answer)


def _training_prompt(family: Family, rng: random.Random) -> tuple[str, Request]:
    """A prompt of the family's training split with what it asks for."""
    drawn = None
    while drawn is None:
        drawn = draw(family, "train", rng)
    return drawn


def _retelling(family: Family, rng: random.Random) -> str:
    """A statement or a question of the training split, retold word for word."""
    said = rng.choice(family.statements(family.draw(rng))) if rng.random() < 0.5 else _training_prompt(family, rng)[0]
    name, name2 = rng.sample(table("manners")["names"], 2)
    return rng.choice(RETELLINGS).format(name=name, name2=name2, said=said)


def _small_talk(rng: random.Random) -> str:
    """One or two sentences about nothing in particular; every name of the world occurs in them."""
    lines = []
    for form in rng.sample(table("manners")["small_talk"], rng.choice((1, 2))):
        name, name2 = rng.sample(table("manners")["names"], 2)
        some = joined(rng.sample([kind["many"] for kind in kinds().values()], 2))
        lines.append(sentence(form.format(name=name, name2=name2, kinds=some)))
    return " ".join(lines)
