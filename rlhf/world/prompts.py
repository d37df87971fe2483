"""Prompts: all families, reading a prompt back, and which prompts are for the test alone."""

import random
from dataclasses import dataclass
from functools import lru_cache

from rlhf.world import lookups, manners, numbers
from rlhf.world.family import Args, Family, bucket

FAMILIES: dict[str, Family] = {kind.name: kind() for kind in (*numbers.ALL, *lookups.ALL, *manners.ALL)}

TEST_COMBINATIONS = 10  # percent of the seen phrasings with seen arguments that are for the test
PHRASING_SHARE = 0.15  # of a test sample: a held-out phrasing
ARGUMENT_SHARE = 0.15  # of a test sample: a held-out argument
TRIES = 400  # draws without a new prompt after which a family counts as exhausted


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt as read: its family, its phrasing, and what it asks for."""

    family: Family
    phrasing: str
    args: Args


@lru_cache(maxsize=1 << 16)
def parse(prompt: str) -> Request | None:
    """The request that a prompt makes, or None if it is not of this world."""
    for family in FAMILIES.values():
        found = family.parse(prompt)
        if found:
            return Request(family, *found)
    return None


def family_of(prompt: str) -> str | None:
    """The name of the prompt's family, or None if it is not of this world."""
    request = parse(prompt)
    return request.family.name if request else None


def split_of(prompt: str) -> str:
    """'test' for a held-out phrasing, a held-out argument, or one in ten of the others by hash; else 'train'.

    A pure function of the prompt. Raises ValueError for a prompt that is not of this world.
    """
    request = parse(prompt)
    if request is None:
        raise ValueError(f"not a prompt of the embedded world: {prompt!r}")
    return "train" if _kind(request.family, request.phrasing, request.args, prompt) == "train" else "test"


def _kind(family: Family, phrasing: str, args: Args, prompt: str) -> str:
    """'train', or what makes it a test prompt: 'phrasing', 'argument', 'both' or 'combination'."""
    if phrasing in family.held_out:
        return "both" if family.is_held_out(args) else "phrasing"
    if family.is_held_out(args):
        return "argument"
    return "combination" if bucket(" ".join(prompt.lower().split())) < TEST_COMBINATIONS else "train"


def count_prompts() -> int:
    """Number of distinct prompts: every phrasing of every argument of every family."""
    return sum(family.count() for family in FAMILIES.values())


def sample_prompts(n: int, split: str, seed: int) -> list[str]:
    """Draw n distinct prompts of a split ('train' or 'test'), as many of each family as long as it has any.

    Raises ValueError for another split, and if the split has not enough prompts.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split is {split!r}, wanted 'train' or 'test'")
    rng = random.Random(f"{seed}|{split}")
    found: dict[str, None] = {}
    left = list(FAMILIES.values())
    while len(found) < n:
        rng.shuffle(left)
        for family in list(left)[: n - len(found)]:
            prompt = _draw_new(family, split, found, rng)
            if prompt is None:
                left.remove(family)
            else:
                found[prompt] = None
        if not left:
            raise ValueError(f"the {split} split has only {len(found)} prompts to sample, {n} were wanted")
    prompts = list(found)
    rng.shuffle(prompts)
    return prompts


def _draw_new(family: Family, split: str, found: dict[str, None], rng: random.Random) -> str | None:
    """A prompt of the family and split that is not in ``found``, or None after ``TRIES`` draws of each kind."""
    for kind in ("train",) if split == "train" else _test_kinds(rng):
        for _ in range(TRIES):
            drawn = draw(family, kind, rng)
            if drawn is not None and drawn[0] not in found:
                return drawn[0]
    return None


def _test_kinds(rng: random.Random) -> list[str]:
    """The kind of test prompt to draw, by the shares above, then the others for a family that has no more of it."""
    share = rng.random()
    first = "phrasing" if share < PHRASING_SHARE else "argument" if share < PHRASING_SHARE + ARGUMENT_SHARE else "combination"
    return [first, *(kind for kind in ("combination", "phrasing", "argument") if kind != first)]


def draw(family: Family, kind: str, rng: random.Random) -> tuple[str, Request] | None:
    """One prompt of the family at random with the request that it makes, or None if the draw is not of the kind."""
    phrasing = rng.choice(family.held_out if kind == "phrasing" else family.seen)
    args = family.draw(rng)
    prompt = family.phrase(phrasing, args)
    return (prompt, Request(family, phrasing, args)) if _kind(family, phrasing, args, prompt) == kind else None
