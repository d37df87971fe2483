"""Readers of preferences between two answers: chosen and rejected, or two answers with a verdict or votes.

How a verdict is coded (0 is a tie here and the first answer there) stands beside each schema.
"""

from collections import Counter
from collections.abc import Callable, Iterator

from rlhf.data.examples import Example, Unusable, number
from rlhf.data.messages import (
    PROMPT_COLUMNS,
    TRANSCRIPT_START,
    Messages,
    answer_to,
    as_messages,
    column_prompt,
    first_of,
    history_messages,
    transcript,
    user_turn,
)

TIE, FIRST, SECOND = 0, 1, 2
PAIR_RANKS = {TIE: [1, 1], FIRST: [1, 2], SECOND: [2, 1]}

# Chosen and rejected ------------------------------------------------------------------------------------------------------------------


def is_transcript_pair(row: dict) -> bool:
    return all(isinstance(row.get(name), str) and row[name].startswith(TRANSCRIPT_START) for name in ("chosen", "rejected"))


def read_transcript_pair(row: dict) -> Iterator[Example]:
    """HH: two whole transcripts; what they share up to the last answer is the prompt."""
    chosen, rejected = transcript(row.get("chosen")), transcript(row.get("rejected"))
    for turns in (chosen, rejected):
        if turns[-1]["role"] != "assistant":
            raise Unusable("does not end with the assistant")
    yield _pair(chosen[:-1], chosen[-1]["content"], rejected[:-1], rejected[-1]["content"], row)


def is_transcript_prompt_pair(row: dict) -> bool:
    return _has_chosen(row) and isinstance(row.get("prompt"), str) and row["prompt"].startswith(TRANSCRIPT_START)


def read_transcript_prompt_pair(row: dict) -> Iterator[Example]:
    """HH cut in three: the prompt is a transcript that stops at ``Assistant:``, the answers go on from there."""
    prompt = transcript(row.get("prompt"))
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    chosen, rejected = (answer.strip() if isinstance(answer, str) else answer for answer in (row.get("chosen"), row.get("rejected")))
    yield _pair(prompt, chosen, prompt, rejected, row)


def is_chosen_rejected(row: dict) -> bool:
    return _has_chosen(row) and _chosen_prompt_column(row) is not None


def read_chosen_rejected(row: dict) -> Iterator[Example]:
    """A prompt (text, messages or columns) with two answers (text or messages, which may repeat the prompt)."""
    column = _chosen_prompt_column(row)
    if column and _repeats_the_conversation(row, row[column]):
        yield _read_pair(row, None)
        return
    prompt = as_messages(row[column]) if column == "conversations" else column_prompt(row)
    yield _read_pair(row, prompt)


def _repeats_the_conversation(row: dict, prompt: object) -> bool:
    """True where both answers are message lists with a conversation of their own, and the prompt is missing or one of the user's turns in it."""
    lists = all(isinstance(row.get(name), list) for name in ("chosen", "rejected"))
    if not lists or row.get("system") is not None or not (prompt is None or isinstance(prompt, str)):
        return False
    try:
        asked = [turn["content"].strip() for turn in as_messages(row["chosen"])[:-1] if turn["role"] == "user"]
    except Unusable:  # said when the answers are read
        return False
    return bool(asked) and (prompt is None or prompt.strip() in ("", asked[0], asked[-1]))


def is_implicit_prompt(row: dict) -> bool:
    return _has_chosen(row) and any(isinstance(row[name], list) for name in ("chosen", "rejected"))


def read_implicit_prompt(row: dict) -> Iterator[Example]:
    """Two message lists that share all turns but the last (TRL, "implicit prompt")."""
    yield _read_pair(row, None)


def _has_chosen(row: dict) -> bool:
    return "chosen" in row and "rejected" in row


def _chosen_prompt_column(row: dict) -> str | None:
    return first_of(row, (*PROMPT_COLUMNS, "conversations"))


def _read_pair(row: dict, prompt: Messages | None) -> Example:
    try:
        before_chosen, chosen = answer_to(row.get("chosen"), prompt)
        before_rejected, rejected = answer_to(row.get("rejected"), prompt)
    except Unusable as why:
        return Example(prompt=prompt or [], problem=why)
    return _pair(before_chosen, chosen, before_rejected, rejected, row)


def _pair(before_chosen: Messages, chosen: str, before_rejected: Messages, rejected: str, row: dict) -> Example:
    problem = None if before_chosen == before_rejected else Unusable("prompts differ")
    return Example(prompt=before_chosen, completions=[chosen, rejected], ranks=[1, 2], margin=margin_of(row), problem=problem)


def margin_of(row: dict) -> float | None:
    """How much better the chosen answer is, in units of the reward, where the row says so."""
    return None if row.get("margin") in (None, "") else number(row["margin"], "margin is not a number")


# Two answers and a verdict ------------------------------------------------------------------------------------------------------------

AB_COLUMNS = (("completion_a", "completion_b"), ("response_a", "response_b"), ("answer_a", "answer_b"), ("output_a", "output_b"))
GRADED = {
    "a-is-better": (FIRST, 1.0),
    "a-is-slightly-better": (FIRST, 0.5),
    "tie": (TIE, None),
    "b-is-slightly-better": (SECOND, 0.5),
    "b-is-better": (SECOND, 1.0),
}
WORDS = {
    **dict.fromkeys(("a", "model_a", "left", "first", *(a for a, _ in AB_COLUMNS)), (FIRST, None)),
    **dict.fromkeys(("b", "model_b", "right", "second", *(b for _, b in AB_COLUMNS)), (SECOND, None)),
    **dict.fromkeys(("tie", "both", "equal", "tie (bothbad)", "tie (inconsistent)"), (TIE, None)),
    **GRADED,
}
NUMBERED = ("completion", "response", "answer", "output")  # with _1 and _2
AB_VERDICTS = ("preference", "winner", "verdict", "choice")


def word_verdict(value: object) -> tuple[int, float | None]:
    """Winner and margin from a word such as ``a``, ``model_b``, ``tie`` or one of five grades (slightly better: 0.5, better: 1)."""
    if value is None:
        raise Unusable("no verdict")
    if not isinstance(value, str) or value.strip().lower() not in WORDS:
        raise Unusable("unknown verdict", found=repr(value))
    return WORDS[value.strip().lower()]


def coded_verdict(value: object, codes: dict[float, int]) -> tuple[int, None]:
    """Winner from a number, by the codes of its schema."""
    if value is None or value == "":
        raise Unusable("no verdict")
    code = number(value, "unknown verdict")
    if code not in codes:
        raise Unusable("unknown verdict", found=repr(value))
    return codes[code], None


def majority(votes: list[int]) -> int:
    """The verdict with more votes than every other one, or a tie."""
    if not votes:
        raise Unusable("no verdict")
    (first, most), *others = Counter(votes).most_common(2)
    return TIE if others and others[0][1] == most else first


def judged(prompt: Messages, first: object, second: object, verdict: Callable[[], tuple[int, float | None]]) -> Example:
    """An example of two answers; without a usable verdict it still has its prompt."""
    try:
        winner, margin = verdict()
    except Unusable as why:
        return Example(prompt=prompt, problem=why)
    return Example(prompt=prompt, completions=[first, second], ranks=list(PAIR_RANKS[winner]), margin=margin)


def voted(prompt: Messages, first: object, second: object, votes: Callable[[], list[int]]) -> Example:
    """An example of two answers judged by several people: the verdict of their majority. Without usable votes it still has its prompt."""
    cast: list[int] = []

    def verdict() -> tuple[int, None]:
        cast.extend(votes())
        return majority(cast), None

    example = judged(prompt, first, second, verdict)
    example.votes = cast
    return example


def is_verdict_pair(row: dict) -> bool:
    return _ab_columns(row) is not None and first_of(row, AB_VERDICTS) is not None and first_of(row, PROMPT_COLUMNS) is not None


def read_verdict_pair(row: dict) -> Iterator[Example]:
    """Tulu's human evaluation and the like: two answers a and b with a word for the better one."""
    a, b = _ab_columns(row) or AB_COLUMNS[0]
    yield judged(column_prompt(row), row.get(a), row.get(b), lambda: word_verdict(row.get(first_of(row, AB_VERDICTS))))


def _ab_columns(row: dict) -> tuple[str, str] | None:
    first = first_of(row, [a for a, b in AB_COLUMNS if b in row])
    return next((pair for pair in AB_COLUMNS if pair[0] == first), None)


def is_numbered_pair(row: dict) -> bool:
    name = _numbered(row)
    third = name is not None and any(f"{name}_{other}" in row for other in (0, 3))
    return name is not None and not third and first_of(row, AB_VERDICTS) is not None and first_of(row, PROMPT_COLUMNS) is not None


def read_numbered_pair(row: dict) -> Iterator[Example]:
    """Two answers 1 and 2 with the number, the column or a word for the better one."""
    name = _numbered(row) or NUMBERED[0]

    def verdict() -> tuple[int, float | None]:
        value = row.get(first_of(row, AB_VERDICTS))
        said = str(value).strip().lower().removeprefix(f"{name}_").removesuffix(".0")
        return word_verdict({"1": "first", "2": "second"}.get(said, value))

    yield judged(column_prompt(row), row.get(f"{name}_1"), row.get(f"{name}_2"), verdict)


def _numbered(row: dict) -> str | None:
    first = first_of(row, [f"{name}_1" for name in NUMBERED if f"{name}_2" in row])
    return first and first.removesuffix("_1")


def numbered_doubt(rows: list[dict]) -> str | None:
    """As `zeros_and_ones`, of the column and the answers that the first such row has."""
    row = next(filter(is_numbered_pair, rows))
    return zeros_and_ones(first_of(row, AB_VERDICTS), rows, _numbered(row))


def is_arena(row: dict) -> bool:
    return all(name in row for name in ("conversation_a", "conversation_b", "winner"))


def read_arena(row: dict) -> Iterator[Example]:
    """MT-Bench and the Chatbot Arena: two conversations judged after ``turn`` questions; their answers before that must be the same."""
    sides = []
    for name in ("conversation_a", "conversation_b"):
        turns = as_messages(row.get(name))
        end = len(turns) if row.get("turn") is None else 2 * int(number(row["turn"], "turn is not a number"))
        if not 0 < end <= len(turns) or turns[end - 1]["role"] != "assistant":
            raise Unusable("does not end with the assistant")
        sides.append(turns[:end])
    a, b = sides
    example = judged(a[:-1], a[-1]["content"], b[-1]["content"], lambda: word_verdict(row.get("winner")))
    if a[:-1] != b[:-1]:
        example.problem = Unusable("prompts differ")
    yield example


def is_pandalm(row: dict) -> bool:
    return all(name in row for name in ("instruction", "response1", "response2", "annotator1"))


def read_pandalm(row: dict) -> Iterator[Example]:
    """PandaLM: the majority of the annotators (0 = tie, 1, 2; none in an empty cell); without one, a tie."""
    codes = {0: TIE, 1: FIRST, 2: SECOND}
    annotators = [value for name, value in row.items() if name.startswith("annotator")]
    yield voted(column_prompt(row), row.get("response1"), row.get("response2"),
                lambda: [coded_verdict(value, codes)[0] for value in annotators if value not in (None, "")])


def zeros_and_ones(column: str, rows: list[dict], name: str = "output") -> str | None:
    """What is wrong with a file whose first rows have the verdicts 0 and 1 where its schema has 1 and 2, None if nothing is: half of its pairs would
    be lost and the others read the wrong way round."""
    codes = Counter(str(row.get(column)).strip().removesuffix(".0") for row in rows if row.get(column) is not None)
    if set(codes) != {"0", "1"} or min(codes.values()) < 2:
        return None
    prompt = first_of(rows[0], (*PROMPT_COLUMNS, "input"))
    return (f"`{column}` is 0 or 1, wanted 1 (the first answer is better) or 2. If 0 names the first answer, say so in the mapping: "
            f"{{prompt: {prompt}, response_0: {name}_1, response_1: {name}_2, better_response_id: {column}}}")


def is_llmbar(row: dict) -> bool:
    return all(name in row for name in ("input", "output_1", "output_2", "label"))


def read_llmbar(row: dict) -> Iterator[Example]:
    """LLMBar: ``label`` is the number, 1 or 2, of the answer that follows the instruction in ``input``."""
    prompt = column_prompt(row, "input")
    yield judged(prompt, row.get("output_1"), row.get("output_2"), lambda: coded_verdict(row.get("label"), {1: FIRST, 2: SECOND}))


def is_alpaca_eval(row: dict) -> bool:
    return all(name in row for name in ("instruction", "output_1", "output_2", "preference"))


def read_alpaca_eval(row: dict) -> Iterator[Example]:
    """AlpacaEval annotations: ``preference`` is 1 or 2, or between them (below 1.5 the first won); 0 and 1.5 are ties, null failed."""

    def verdict() -> tuple[int, None]:
        if row.get("preference") in (None, ""):
            raise Unusable("no verdict")
        value = number(row["preference"], "unknown verdict")
        if value in (0, 1.5):
            return TIE, None
        if not 1 <= value <= 2:
            raise Unusable("unknown verdict", found=repr(row["preference"]))
        return (FIRST if value < 1.5 else SECOND), None

    yield judged(column_prompt(row), row.get("output_1"), row.get("output_2"), verdict)


def is_crowd_votes(row: dict) -> bool:
    return all(name in row for name in ("result_x", "result_y", "votes")) and first_of(row, ("text", *PROMPT_COLUMNS)) is not None


def read_crowd_votes(row: dict) -> Iterator[Example]:
    """Crowd votes (llmfao): the majority of ``left``, ``right`` and ``tie``; the text is the prompt and ``prompt`` only its number."""
    column = "text" if "text" in row else first_of(row, PROMPT_COLUMNS)

    def cast() -> list[int]:
        votes = row.get("votes")
        if not isinstance(votes, list) or not all(isinstance(vote, dict) for vote in votes):
            raise Unusable("no verdict")
        return [word_verdict(vote.get("winner"))[0] for vote in votes]

    yield voted(column_prompt(row, column), row.get("result_x"), row.get("result_y"), cast)


def is_shp(row: dict) -> bool:
    return all(name in row for name in ("history", "human_ref_A", "human_ref_B", "labels"))


def read_shp(row: dict) -> Iterator[Example]:
    """SHP: ``labels`` is 1 where A was voted higher and 0 where B was; ``history`` is the post."""
    prompt = [user_turn(row["history"])] if isinstance(row.get("history"), str) else history_messages(row.get("history"))
    yield judged(prompt, row.get("human_ref_A"), row.get("human_ref_B"), lambda: coded_verdict(row.get("labels"), {1: FIRST, 0: SECOND}))


def is_better_id(row: dict) -> bool:
    return all(name in row for name in ("prompt", "response_0", "response_1", "better_response_id"))


def read_better_id(row: dict) -> Iterator[Example]:
    """PKU-SafeRLHF: ``better_response_id`` is the number, 0 or 1, of the more helpful answer."""
    codes = {0: FIRST, 1: SECOND}
    yield judged(
        column_prompt(row), row.get("response_0"), row.get("response_1"), lambda: coded_verdict(row.get("better_response_id"), codes)
    )
