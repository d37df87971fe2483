"""Readers of preferences among several answers: with ranks, with scores, best first, or as votes on all pairs."""

from collections.abc import Callable, Iterator
from itertools import combinations

from rlhf.data.examples import Example, Unusable, checked_ranks, dense_ranks, number
from rlhf.data.messages import PROMPT_COLUMNS, Messages, column_prompt, first_of, user_turn
from rlhf.data.pairs import FIRST, SECOND, TIE, coded_verdict, margin_of

ANSWER_LISTS = ("completions", "responses", "answers")
ANSWER_TEXT = ("response", "completion", "answer", "text", "content", "output")
HIGH_IS_BETTER = ("overall_score", "score", "pm_score", "rating")


def is_ranked(row: dict) -> bool:
    return _answer_list(row) is not None and "ranks" in row


def read_ranked(row: dict) -> Iterator[Example]:
    """Answers with ranks, 1 the best, equal numbers a tie: our own canonical rows and their like."""
    prompt, answers = column_prompt(row), row.get(_answer_list(row) or ANSWER_LISTS[0])
    example = _numbered(prompt, answers, row.get("ranks"), checked_ranks)
    example.margin = margin_of(row)
    example.family = row.get("family") if isinstance(row.get("family"), str) else None
    yield example


def is_scored(row: dict) -> bool:
    return _answer_list(row) is not None and "scores" in row


def read_scored(row: dict) -> Iterator[Example]:
    """Answers with scores, the higher the better; equal scores are a tie."""
    yield _numbered(column_prompt(row), row.get(_answer_list(row) or ANSWER_LISTS[0]), row.get("scores"), _score_ranks)


def is_scored_objects(row: dict) -> bool:
    column = _answer_list(row)
    answers = row.get(column) if column else None
    return isinstance(answers, list) and bool(answers) and isinstance(answers[0], dict) and _grade(answers[0]) is not None


def read_scored_objects(row: dict) -> Iterator[Example]:
    """Answers as objects with a text and a score (UltraFeedback) or a rank (Nectar)."""
    prompt, answers = column_prompt(row), row.get(_answer_list(row) or ANSWER_LISTS[0])
    if not isinstance(answers, list) or not all(isinstance(answer, dict) for answer in answers):
        yield Example(prompt=prompt, problem=Unusable("not a list of answers"))
        return
    grade = _grade(answers[0]) if answers else None
    texts = [answer.get(first_of(answer, ANSWER_TEXT)) for answer in answers]
    yield _numbered(prompt, texts, [answer.get(grade) for answer in answers], checked_ranks if grade == "rank" else _score_ranks)


def is_best_first(row: dict) -> bool:
    output = row.get("output")
    messages = isinstance(output, list) and any(isinstance(answer, dict) for answer in output)  # of one answer
    return isinstance(output, list) and not messages and first_of(row, PROMPT_COLUMNS) is not None


def read_best_first(row: dict) -> Iterator[Example]:
    """OASST rankings: ``output`` is a list, best first."""
    outputs = row.get("output")
    ranks = list(range(1, len(outputs) + 1)) if isinstance(outputs, list) else None
    yield _numbered(column_prompt(row), outputs, ranks, checked_ranks)


def is_qa_feedback(row: dict) -> bool:
    return all(name in row for name in ("question", "prediction 1", "prediction 2", "preference"))


def read_qa_feedback(row: dict) -> Iterator[Example]:
    """QA-Feedback: votes (0 tie, 1 first, 2 second) on all pairs of the predictions in order; ranked by the number of pairs won.

    The passages that the answers were to rest on are part of the prompt, after the question.
    """
    prompt = [user_turn("\n\n".join([_question(row), *_passages(row.get("passages"))]))]
    answers = [row[name] for name in sorted((name for name in row if name.startswith("prediction ")), key=lambda name: (len(name), name))]
    pairs, votes = list(combinations(range(len(answers)), 2)), row.get("preference")
    if not isinstance(votes, list) or len(votes) != len(pairs):
        yield Example(prompt=prompt, problem=Unusable("no verdict"))
        return
    wins = [0] * len(answers)
    for pair, vote in zip(pairs, votes, strict=True):
        winner, _ = coded_verdict(vote, {0: TIE, 1: FIRST, 2: SECOND})
        if winner != TIE:
            wins[pair[winner - 1]] += 1
    yield Example(prompt=prompt, completions=answers, ranks=dense_ranks(wins))


def _question(row: dict) -> str:
    if not isinstance(row.get("question"), str):
        raise Unusable("no prompt")
    return row["question"]


def _passages(value: object) -> list[str]:
    """Each passage (a title and its sentences) as its sentences, after the title where these do not begin with it."""
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(passage, list) for passage in value):
        raise Unusable("not text")
    if not all(isinstance(part, str) for passage in value for part in passage):
        raise Unusable("not text")
    return [_passage(*passage) for passage in value if passage]


def _passage(title: str, *sentences: str) -> str:
    text = " ".join(sentences)
    return text if text.startswith(title) else f"{title}\n{text}"


def _answer_list(row: dict) -> str | None:
    return first_of(row, ANSWER_LISTS)


def _grade(answer: dict) -> str | None:
    return first_of(answer, (*HIGH_IS_BETTER, "rank"))


def _score_ranks(scores: list[object]) -> list[int]:
    return dense_ranks([number(score, "score is not a number") for score in scores])


def _numbered(prompt: Messages, answers: object, numbers: object, to_ranks: Callable[[list], list[int]]) -> Example:
    """An example of answers with ranks or scores; where these are unusable it still has its prompt."""
    if not isinstance(answers, list) or not isinstance(numbers, list):
        return Example(prompt=prompt, problem=Unusable("not a list of answers"))
    if len(answers) != len(numbers):
        return Example(prompt=prompt, problem=Unusable("answers and ranks differ in number"))
    if len(answers) < 2:
        return Example(prompt=prompt, completions=answers, ranks=[1] * len(answers))
    try:
        return Example(prompt=prompt, completions=answers, ranks=to_ranks(numbers))
    except Unusable as why:
        return Example(prompt=prompt, problem=why)
