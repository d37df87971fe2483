"""Turning the spellings of a prompt (text, message lists, transcripts, columns) into messages with a role and a content."""

import re
from collections.abc import Iterable

from rlhf.data.examples import Unusable

Messages = list[dict[str, str]]

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}
PROMPT_COLUMNS = ("prompt", "instruction", "question", "query")
DETAIL_COLUMNS = ("input", "context")  # what an instruction or a question is about
TRANSCRIPT_START = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")


def user_turn(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def as_messages(value: object) -> Messages:
    """Messages from a list of ``role``/``content`` (TRL, OpenAI) or ``from``/``value`` (ShareGPT) objects; empty turns stay in."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list):
        raise Unusable("not a list of messages")
    return [_message(turn) for turn in value]


def _message(turn: object) -> dict[str, str]:
    if not isinstance(turn, dict):
        raise Unusable("not a list of messages")
    role, content = turn.get(first_of(turn, ("role", "from"))), turn.get(first_of(turn, ("content", "value")))
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if known is None:
        raise Unusable("unknown role", found=repr(role))
    if content is None:
        content = ""
    if not isinstance(content, str):
        raise Unusable("not text")
    return {"role": known, "content": content}


def transcript(value: object) -> Messages:
    """Messages from an HH transcript: turns that start with a blank line and ``Human:`` or ``Assistant:``, white space around them cut."""
    if value is None:
        raise Unusable("no prompt")
    if not isinstance(value, str):
        raise Unusable("not text")
    parts = _TURN.split(value)
    if parts[0].strip() or len(parts) < 3 or parts[1] != "Human":
        raise Unusable("not a transcript")
    return [{"role": ROLES[who.lower()], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)]


def history_messages(value: object) -> Messages:
    """Earlier turns: a list of [user, assistant] pairs (LLaMA-Factory) or of messages; nothing from None or an empty list."""
    if value is None or value == "" or value == []:
        return []
    if not isinstance(value, list):
        raise Unusable("not a list of messages")
    if isinstance(value[0], dict):
        return as_messages(value)
    messages = []
    for pair in value:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise Unusable("not a list of messages")
        messages += as_messages([{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}])
    return messages


def first_of(row: dict, columns: Iterable[str]) -> str | None:
    """The first of the columns that the row has; one that is null or empty text gives way to one that is filled."""
    first = None
    for column in columns:
        if column in row:
            if row[column] is not None and row[column] != "":
                return column
            first = first or column
    return first


def column_prompt(row: dict, column: str | None = None) -> Messages:
    """The prompt spelled by columns: ``system``, ``history``, then the prompt column, then what it is about (``input``, ``context``).

    The parts of one user turn are joined by a blank line, so that the same task of several sources is the same prompt.
    """
    column = column or first_of(row, PROMPT_COLUMNS)
    if column is None or row.get(column) is None:
        raise Unusable("no prompt")
    value = row[column]
    system = as_messages({"role": "system", "content": row["system"]}) if row.get("system") is not None else []
    if isinstance(value, (list, dict)):
        return system + as_messages(value)
    if not isinstance(value, str):
        raise Unusable("not text")
    if not value.strip():
        raise Unusable("no prompt")
    details = [row.get(name) for name in DETAIL_COLUMNS] if column in ("instruction", "question") else []
    if not all(detail is None or isinstance(detail, str) for detail in details):
        raise Unusable("not text")
    text = "\n\n".join([value, *(detail for detail in details if detail and detail.strip())])
    return system + history_messages(row.get("history")) + [user_turn(text)]


def answer_to(value: object, prompt: Messages | None) -> tuple[Messages, str | None]:
    """Prompt and completion from an answer that is text, a message, or messages that may repeat the prompt or go on from it.

    ``prompt`` is None when the answer's own earlier turns are the prompt. Unusable if the last turn is not the assistant's.
    """
    if not isinstance(value, (list, dict)):
        if prompt is None:
            raise Unusable("not a list of messages")
        return prompt, value  # None and other types are judged with the other completions
    messages = as_messages(value)
    if not messages or messages[-1]["role"] != "assistant":
        raise Unusable("does not end with the assistant")
    before, completion = messages[:-1], messages[-1]["content"]
    if prompt is None:
        return before, completion
    if not before or before == prompt or before == [turn for turn in prompt if turn["role"] != "system"]:
        return prompt, completion
    if before[0]["role"] == "assistant":
        return prompt + before, completion
    raise Unusable("prompts differ")
