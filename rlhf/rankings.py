"""Rankings of K answers to a prompt: as batches for the reward model (CANON R4), and how well its scores order them (R5, R6).

Shapes: B prompts, K answers of a prompt (0 ranks mark empty places where K differs), N answers of all prompts together, T tokens of
prompt + answer, P pairs of differently ranked answers of a prompt.
"""

import hashlib
from itertools import islice

import torch

from rlhf.comparison import wilson_interval
from rlhf.data.examples import LONG_COMPLETION, LONG_PROMPT, TIED
from rlhf.losses import ranking_loss
from rlhf.masking import WIDTH_STEP, length_mask, right_pad, round_up

BINS = 5
FILL_STEP = 16  # answers in a large batch are a multiple of this


def judge_share(prompt_id: str, fraction: float) -> bool:
    """True for the `fraction` of prompts (0 to 1, by hash) whose rankings are kept for the judge and never seen by the reward model."""
    return _in_share("judge", prompt_id, fraction)


def with_flips(rows: list[dict], flip_rate: float) -> list[dict]:
    """The rows with the ranks of a share of them (0 to 1, by hash of the prompt) turned round, so that as large a share of all pairs is wrong.

    Label noise for experiments (CANON R7; Coste, section 4); what else a row holds, its gold scores too, stays as it was.
    """
    return [{**row, "ranks": [max(row["ranks"]) + 1 - rank for rank in row["ranks"]]} if _in_share("flip", row["id"], flip_rate) else row
            for row in rows]


def _in_share(salt: str, prompt_id: str, fraction: float) -> bool:
    return int.from_bytes(hashlib.sha256((salt + prompt_id).encode()).digest()[:8], "big") / 2**64 < fraction


def encode_rankings(rows: list[dict], encoder, max_prompt_tokens: int, max_completion_tokens: int, ties: str) -> list[dict | str]:
    """Canonical preference rows as ids, or in the place of a row the reason for which it is left out.

    Answers over `max_completion_tokens` (with the EOS) are left out; a row is, when its prompt is over `max_prompt_tokens` or no pair is
    left to learn from. An encoded row: {"prompt": ids, "completions": [ids, ...], "ranks", "margin": float, "gold": [float, ...] or None, "id",
    "longest": tokens of the prompt with its longest completion, "length": with all of them, "left_out": answers over the limit}.
    """
    encoded, answers = [], iter(encoder.completions_ids([text for row in rows for text in row["completions"]]))
    for row, prompt in zip(rows, encoder.prompts_ids([row["prompt"] for row in rows]), strict=True):
        completions = list(islice(answers, len(row["completions"])))
        kept = [i for i, ids in enumerate(completions) if len(ids) <= max_completion_tokens]
        ranks, gold = [row["ranks"][i] for i in kept], row.get("gold")
        if len(prompt) > max_prompt_tokens or len(set(ranks)) < 2 and not (ties == "half" and len(ranks) > 1):
            encoded.append(LONG_PROMPT if len(prompt) > max_prompt_tokens else LONG_COMPLETION if len(kept) < len(completions) else TIED)
            continue
        encoded.append({"prompt": prompt, "completions": [completions[i] for i in kept], "ranks": ranks, "margin": float(row.get("margin") or 0.0),
                        "gold": gold and [gold[i] for i in kept], "id": row.get("id"),
                        "longest": len(prompt) + max(len(completions[i]) for i in kept), "left_out": len(completions) - len(kept),
                        "length": len(prompt) + sum(len(completions[i]) for i in kept)})
    return encoded


def collate_rankings(rows: list[dict], pad_id: int) -> dict:
    """Ranks and answers of some prompts; all answers are one right-padded batch in which each stands once behind its prompt.

    Large batches are filled up with copies that no prompt refers to, so that few different shapes occur (WIDTH_STEP in rlhf/masking.py).
    ids_NT, mask_NT (True on real tokens); places_BK: row in N of each answer; tokens: real ones; and `ranks_and_margins`.
    """
    answers = [row["prompt"] + completion for row in rows for completion in row["completions"]]
    filled = answers + [answers[0]] * (round_up(len(answers), FILL_STEP) - len(answers)) if len(answers) > FILL_STEP else answers
    counts = torch.tensor([len(row["completions"]) for row in rows])
    starts, real_BK = counts.cumsum(0) - counts, length_mask(counts)
    lengths, ids_NT = [len(ids) for ids in answers], right_pad(filled, pad_id, WIDTH_STEP)
    return {
        "ids_NT": ids_NT, "mask_NT": length_mask([len(ids) for ids in filled], ids_NT.shape[1]), "tokens": sum(lengths),
        "places_BK": torch.where(real_BK, starts[:, None] + torch.arange(real_BK.shape[1]), 0), **ranks_and_margins(rows)}


def ranks_and_margins(rows: list[dict]) -> dict:
    """ranks_BK: 1 is best, 0 an empty place; margin_B."""
    return {"ranks_BK": right_pad([row["ranks"] for row in rows], 0), "margin_B": torch.tensor([row["margin"] for row in rows])}


def pair_figures(rewards_BK: torch.Tensor, ranks_BK: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of the pairs with a better and a worse answer: how many are ordered right (equal rewards: half), how many there are, sum of differences."""
    difference_BKK = rewards_BK[:, :, None] - rewards_BK[:, None, :]
    better_BKK = (ranks_BK[:, :, None] > 0) & (ranks_BK[:, :, None] < ranks_BK[:, None, :])
    right_BKK = (difference_BKK > 0).float() + 0.5 * (difference_BKK == 0)
    return torch.where(better_BKK, right_BKK, 0.0).sum(), better_BKK.sum(), torch.where(better_BKK, difference_BKK, 0.0).sum()


def normalisation(raw_scores_B: torch.Tensor) -> tuple[float, float]:
    """(gain, bias) with which gain · score + bias has mean 0 and standard deviation 1 over these scores (CANON R5; biased variance).

    Equal scores have no scale: their gain is 1. ValueError for a score that is not finite.
    """
    if not torch.isfinite(raw_scores_B).all():
        raise ValueError("a reward model's score is not finite")
    mean, std = raw_scores_B.double().mean().item(), raw_scores_B.double().std(unbiased=False).item()
    gain = 1.0 / std if std > 1e-8 * max(1.0, abs(mean)) else 1.0
    return gain, -mean * gain


def evaluate_rankings(rows: list[dict], scores: list[list[float]], ties: str = "drop") -> dict:
    """CANON R6 for encoded rows and a raw score for each of their answers.

    accuracy: share of pairs ordered right, equal scores counting half; tied ranks make no pair. ci95: Wilson's interval with the sample size
    that pairs of the same prompt, which are not independent, are worth. by_margin: by difference of the scores, in equally filled
    bins. calibration: the preference that the scores predict, sigmoid of their difference, against the share observed. noise_free_*: pairs
    ordered by the rows' gold scores, where they have them. Raises ValueError when there is no pair.
    """
    difference_P, row_P = _pairs([r["ranks"] for r in rows], scores)
    if len(difference_P) == 0:
        raise ValueError("no pair of differently ranked answers to evaluate on")
    longer_P, _ = _pairs([r["ranks"] for r in rows], [[len(c) for c in r["completions"]] for r in rows])
    right_P = _right(difference_P)
    names: dict = {}
    prompt_of_row = torch.tensor([names.setdefault(row.get("id") or place, len(names)) for place, row in enumerate(rows)])  # a prompt may have many
    return {
        "accuracy": right_P.mean().item(), "ci95": list(clustered_interval(right_P, prompt_of_row[row_P])), "pairs": len(right_P),
        "longer_wins_accuracy": _right(longer_P).mean().item(), "loss": _loss(rows, scores, ties),
        "by_margin": _by_margin(difference_P.abs(), right_P), "calibration": _calibration(difference_P.abs(), right_P),
        **_noise_free(rows, scores),
    }


def clustered_interval(right_P: torch.Tensor, prompt_P: torch.Tensor) -> tuple[float, float]:
    """95 % interval of the mean of `right_P` (0, 1/2 or 1), pairs of the same prompt being one draw.

    Wilson's score interval with the effective size m(1 - m) / v, v the cluster-robust variance of the mean m; the count of prompts where all
    pairs agree and v says nothing. Inside [0, 1], and with a width at 0 and 1.
    """
    right_P, (_, cluster_P) = right_P.double(), prompt_P.unique(return_inverse=True)
    clusters, mean = int(cluster_P.max()) + 1, right_P.mean().item()
    residual = torch.zeros(clusters, dtype=torch.double).index_add(0, cluster_P, right_P - mean)
    variance = residual.square().sum().item() * clusters / max(clusters - 1, 1) / len(right_P) ** 2
    size = min(mean * (1 - mean) / variance, len(right_P)) if variance > 1e-15 else clusters
    return wilson_interval(mean, size)


def _pairs(orders: list[list], values: list[list[float]], reverse: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """(value of the better answer less that of the worse, index of the row) of all pairs; better: the lower in `orders`."""
    sign = -1 if reverse else 1
    pairs = [(value[i] - value[j], row) for row, (order, value) in enumerate(zip(orders, values, strict=True))
             for i in range(len(order)) for j in range(len(order)) if sign * order[i] < sign * order[j]]
    return torch.tensor([d for d, _ in pairs], dtype=torch.double), torch.tensor([row for _, row in pairs], dtype=torch.long)


def _right(difference_P: torch.Tensor) -> torch.Tensor:
    return (difference_P > 0).double() + 0.5 * (difference_P == 0)


def _loss(rows: list[dict], scores: list[list[float]], ties: str) -> float:
    total, count = ranking_loss(right_pad(scores, 0.0).double(), right_pad([r["ranks"] for r in rows], 0),
                                torch.tensor([r["margin"] for r in rows]).double(), ties)
    return (total / count).item()


def _by_margin(margin_P: torch.Tensor, right_P: torch.Tensor) -> list[dict]:
    order = margin_P.argsort(stable=True)
    return [{"margin_from": margin_P[part[0]].item(), "margin_to": margin_P[part[-1]].item(), "pairs": len(part),
             "accuracy": right_P[part].mean().item()} for part in order.tensor_split(BINS) if len(part)]


def _calibration(margin_P: torch.Tensor, right_P: torch.Tensor) -> list[dict]:
    """Five equal steps of the predicted preference from 1/2 to 1; empty ones are left out."""
    predicted_P = torch.sigmoid(margin_P)
    step_P = ((predicted_P - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    return [{"predicted": predicted_P[step_P == b].mean().item(), "observed": right_P[step_P == b].mean().item(), "pairs": int((step_P == b).sum())}
            for b in range(BINS) if (step_P == b).any()]


def _noise_free(rows: list[dict], scores: list[list[float]]) -> dict:
    known = [i for i, row in enumerate(rows) if row["gold"]]
    difference_P, _ = _pairs([rows[i]["gold"] for i in known], [scores[i] for i in known], reverse=True)
    found = len(difference_P) > 0
    return {"noise_free_accuracy": _right(difference_P).mean().item() if found else None, "noise_free_pairs": len(difference_P) if found else None}
