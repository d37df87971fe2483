"""Readers of demonstrations, prompts and plain text."""

from collections.abc import Iterator

from rlhf.data.examples import Example, Unusable
from rlhf.data.messages import PROMPT_COLUMNS, TRANSCRIPT_START, answer_to, as_messages, column_prompt, first_of, transcript, user_turn

CONVERSATIONS = ("messages", "conversations", "conversation")
ANSWERS = ("completion", "response", "output", "answer")


def is_conversation(row: dict) -> bool:
    return isinstance(row.get(first_of(row, CONVERSATIONS)), list)


def read_conversation(row: dict) -> Iterator[Example]:
    """A conversation: the last answer is the completion, all before it the prompt."""
    turns = as_messages(row.get(first_of(row, CONVERSATIONS) or CONVERSATIONS[0]))
    if row.get("system") and not (turns and turns[0]["role"] == "system"):
        turns = as_messages({"role": "system", "content": row["system"]}) + turns
    if turns and turns[-1]["role"] == "assistant":
        yield Example(prompt=turns[:-1], completions=[turns[-1]["content"]], ranks=[1])
    else:
        yield Example(prompt=turns, problem=Unusable("does not end with the assistant"))


def is_self_instruct(row: dict) -> bool:
    return "instruction" in row and isinstance(row.get("instances"), list)


def read_self_instruct(row: dict) -> Iterator[Example | Unusable]:
    """Self-instruct: one instruction with a list of inputs and outputs, each a demonstration."""
    instances = row.get("instances")
    if not isinstance(instances, list) or not all(isinstance(instance, dict) for instance in instances) or not instances:
        raise Unusable("not a list of answers")
    for instance in instances:
        try:
            prompt = column_prompt({"instruction": row.get("instruction"), "input": instance.get("input")})
        except Unusable as why:
            yield why
            continue
        yield Example(prompt=prompt, completions=[instance.get("output")], ranks=[1])


def is_transcript_prompt(row: dict) -> bool:
    return first_of(row, ANSWERS) is not None and isinstance(row.get("prompt"), str) and row["prompt"].startswith(TRANSCRIPT_START)


def read_transcript_prompt(row: dict) -> Iterator[Example]:
    """A prompt that is an HH transcript up to ``Assistant:``, and the answer."""
    prompt = transcript(row.get("prompt"))
    if prompt[-1] == {"role": "assistant", "content": ""}:
        prompt = prompt[:-1]
    answer = row.get(first_of(row, ANSWERS))
    yield Example(prompt=prompt, completions=[answer.strip() if isinstance(answer, str) else answer], ranks=[1])


def is_prompt_answer(row: dict) -> bool:
    column = first_of(row, ANSWERS)
    return column is not None and first_of(row, PROMPT_COLUMNS) is not None and not _is_text_list(row[column])


def read_prompt_answer(row: dict) -> Iterator[Example]:
    """A prompt in columns (instruction, input, context, history, system) and its answer, as text or messages."""
    prompt = column_prompt(row)
    try:
        prompt, completion = answer_to(row.get(first_of(row, ANSWERS)), prompt)
    except Unusable as why:
        yield Example(prompt=prompt, problem=why)
        return
    yield Example(prompt=prompt, completions=[completion], ranks=[1])


def is_prompt(row: dict) -> bool:
    return first_of(row, PROMPT_COLUMNS) is not None


def read_prompt(row: dict) -> Iterator[Example]:
    """A prompt without an answer."""
    yield Example(prompt=column_prompt(row))


def is_text(row: dict) -> bool:
    return "text" in row


def read_text(row: dict) -> Iterator[Example]:
    """A document in one column; a title beside it is not part of it."""
    yield Example(text=row.get("text"), prompt=[user_turn("")])


def is_paragraphs(row: dict) -> bool:
    return isinstance(row.get("paragraphs"), list)


def read_paragraphs(row: dict) -> Iterator[Example]:
    """A title (``title``, or ``rhythmic`` for the tune of a ci poem) and a list of paragraphs: a line each."""
    lines = [row.get("title") or row.get("rhythmic"), *(row.get("paragraphs") or [])]
    if not all(isinstance(line, str) for line in lines if line is not None):
        raise Unusable("not text")
    yield Example(text="\n".join(line for line in lines if line))


def _is_text_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(part, str) for part in value)
