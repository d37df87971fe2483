"""Simulated raters: they prefer the better answer by the gold score, with Bradley-Terry noise."""

import math
import random

from rlhf.errors import InputError

LARGEST_BETA = 1e4


def _pairs(gold: list[list[float]]) -> list[float]:
    """The gold differences of all pairs of answers to the same prompt."""
    return [row[i] - row[j] for row in gold for i in range(len(row)) for j in range(i + 1, len(row))]


def _sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def expected_agreement(differences: list[float], beta: float) -> float:
    """Probability that two raters order a pair the same way: the mean of p^2 + (1 - p)^2 with p = sigmoid(beta * difference)."""
    chances = [_sigmoid(beta * difference) for difference in differences]
    return sum(p * p + (1 - p) ** 2 for p in chances) / len(chances)


def calibrate_beta(gold: list[list[float]], agreement: float = 0.73) -> float:
    """The beta at which two raters are expected to agree on this share of the pairs (InstructGPT, section 5.2: about 73 %).

    gold: the gold scores of the answers, a row per prompt. Found by bisection: expected agreement grows with beta from 0.5.
    Raises InputError if there is no pair, or if the agreement cannot be reached: pairs with equal gold are always a coin toss.
    """
    differences = _pairs(gold)
    if not differences:
        raise InputError("raters: no prompt has two answers to compare; wanted at least two answers a prompt")
    highest = expected_agreement(differences, LARGEST_BETA)
    if not 0.5 <= agreement < highest:
        ties = sum(difference == 0 for difference in differences) / len(differences)
        raise InputError(
            f"raters: an agreement of {agreement} was wanted, these answers allow 0.5 to {highest:.3f} ({ties:.0%} of the pairs have "
            "equal gold scores); ask for less, or sample answers that differ more (a higher temperature)"
        )
    low, high = 0.0, LARGEST_BETA
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_agreement(differences, middle) < agreement else (low, middle)
    return (low + high) / 2


def rank(gold: list[float], beta: float, rng: random.Random) -> list[int]:
    """A rater's ranks of K answers (1 is best), by utility beta * gold plus standard Gumbel noise.

    This is the Plackett-Luce model; each pair follows Bradley-Terry: answer i is before j with probability sigmoid(beta * (g_i - g_j)).
    """
    noisy = [beta * score - math.log(-math.log(rng.random() or 1e-300)) for score in gold]
    best_first = sorted(range(len(gold)), key=lambda place: -noisy[place])
    ranks = [0] * len(gold)
    for position, place in enumerate(best_first, start=1):
        ranks[place] = position
    return ranks


def agreement(ranks_a: list[int], ranks_b: list[int]) -> float:
    """The share of pairs that two raters order the same way."""
    pairs = [(i, j) for i in range(len(ranks_a)) for j in range(i + 1, len(ranks_a))]
    return sum((ranks_a[i] < ranks_a[j]) == (ranks_b[i] < ranks_b[j]) for i, j in pairs) / len(pairs)
