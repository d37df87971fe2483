"""Recognising a schema from the columns and contents of a file's first rows."""

import difflib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial

from rlhf.data import demonstrations, pairs, rankings, trees
from rlhf.data.examples import Example, Unusable
from rlhf.errors import InputError

KINDS = ("preferences", "demonstrations", "prompts", "text")


@dataclass(frozen=True)
class Format:
    """A schema: ``name`` for people and for the mapping's ``format``, ``describe`` to be said aloud with what is made of the rows.

    ``fits`` looks at one row; ``read`` says what a row means, or, where ``group`` names a column, all rows in turn that share its value;
    ``doubt`` says of a file's first rows why they must mean something else, if they must.
    """

    name: str
    describe: str
    fits: Callable[[dict], bool]
    read: Callable[[dict | list[dict]], Iterator[Example | Unusable]]
    group: str | None = None
    doubt: Callable[[list[dict]], str | None] | None = None


PREFERENCES = (
    Format(
        "HH transcripts",
        "chosen and rejected are whole transcripts, what they share is the prompt",
        pairs.is_transcript_pair,
        pairs.read_transcript_pair,
    ),
    Format(
        "HH transcripts cut in three",
        "the prompt is a transcript, chosen and rejected go on from it",
        pairs.is_transcript_prompt_pair,
        pairs.read_transcript_prompt_pair,
    ),
    Format(
        "prompt, chosen, rejected",
        "a prompt with a better and a worse answer, as text or messages",
        pairs.is_chosen_rejected,
        pairs.read_chosen_rejected,
    ),
    Format(
        "chosen, rejected messages",
        "two message lists, the turns they share are the prompt",
        pairs.is_implicit_prompt,
        pairs.read_implicit_prompt,
    ),
    Format("MT-Bench votes", "two conversations and which one won after a turn", pairs.is_arena, pairs.read_arena),
    Format("PandaLM votes", "two answers and the votes of several annotators, the majority counts", pairs.is_pandalm, pairs.read_pandalm),
    Format(
        "LLMBar labels",
        "an input with two outputs, the label is the number of the better one",
        pairs.is_llmbar,
        pairs.read_llmbar,
        doubt=partial(pairs.zeros_and_ones, "label"),
    ),
    Format(
        "AlpacaEval annotations",
        "two outputs and a preference, 1 for the first and 2 for the second",
        pairs.is_alpaca_eval,
        pairs.read_alpaca_eval,
        doubt=partial(pairs.zeros_and_ones, "preference"),
    ),
    Format("crowd votes", "two results with votes left, right or tie, the majority counts", pairs.is_crowd_votes, pairs.read_crowd_votes),
    Format("SHP", "two answers to a post, the label is 1 where A was voted higher", pairs.is_shp, pairs.read_shp),
    Format("better response id", "two answers and the number, 0 or 1, of the better one", pairs.is_better_id, pairs.read_better_id),
    Format(
        "verdicts on a and b",
        "two answers a and b with a word or a grade for the better one",
        pairs.is_verdict_pair,
        pairs.read_verdict_pair,
    ),
    Format(
        "verdicts on 1 and 2",
        "two answers 1 and 2 with the number, the column or a word for the better one",
        pairs.is_numbered_pair,
        pairs.read_numbered_pair,
        doubt=pairs.numbered_doubt,
    ),
    Format(
        "QA-Feedback",
        "predictions with votes on all pairs, ranked by the pairs they won",
        rankings.is_qa_feedback,
        rankings.read_qa_feedback,
    ),
    Format("ranked answers", "several answers with ranks, 1 the best", rankings.is_ranked, rankings.read_ranked),
    Format("scored answers", "several answers with scores, the higher the better", rankings.is_scored, rankings.read_scored),
    Format(
        "scored answer objects",
        "several answers as objects with a score or a rank (UltraFeedback)",
        rankings.is_scored_objects,
        rankings.read_scored_objects,
    ),
    Format("answers best first", "a list of answers, best first (OASST rankings)", rankings.is_best_first, rankings.read_best_first),
    Format(
        "message trees",
        "one message a row with its parent and rank (OASST trees)",
        trees.is_message_tree,
        trees.read_message_tree,
        group="message_tree_id",
    ),
)

DEMONSTRATIONS = (
    Format(
        "self-instruct tasks",
        "an instruction with a list of inputs and outputs",
        demonstrations.is_self_instruct,
        demonstrations.read_self_instruct,
    ),
    Format(
        "prompt transcripts and answers",
        "the prompt is an HH transcript, the answer goes on from it",
        demonstrations.is_transcript_prompt,
        demonstrations.read_transcript_prompt,
    ),
    Format(
        "prompt and answer",
        "prompt or instruction (with input, context, history or system) and an answer",
        demonstrations.is_prompt_answer,
        demonstrations.read_prompt_answer,
    ),
    Format(
        "conversations",
        "message lists (role/content or from/value), the last answer is the completion",
        demonstrations.is_conversation,
        demonstrations.read_conversation,
    ),
)

PROMPTS = (Format("prompts", "prompt, instruction, question or query", demonstrations.is_prompt, demonstrations.read_prompt),)

TEXT = (
    Format("text", "documents in a column `text`, or plain text", demonstrations.is_text, demonstrations.read_text),
    Format(
        "titles and paragraphs", "a title and a list of paragraphs (poems)", demonstrations.is_paragraphs, demonstrations.read_paragraphs
    ),
)

# A kind can be taken from any schema that holds it: the chosen answer is a demonstration, and every demonstration holds a prompt.
FORMATS = {
    "preferences": PREFERENCES,
    "demonstrations": PREFERENCES + DEMONSTRATIONS,
    "prompts": PREFERENCES + DEMONSTRATIONS + PROMPTS + TEXT,
    "text": PREFERENCES + DEMONSTRATIONS + TEXT,
}

WANTED = {
    "preferences": (
        "prompt + chosen + rejected (text or messages)",
        "chosen + rejected (HH transcripts that start with a blank line and `Human:`, or message lists)",
        "prompt + completions + ranks (1 = best) or scores (higher is better)",
        "instruction + output (a list, best first)",
        "prompt + completion_a + completion_b + preference (a, b, tie), or completion_1 + completion_2 + winner (1, 2, tie)",
    ),
    "demonstrations": (
        "prompt + completion (text or messages)",
        "messages or conversations that end with the assistant",
        "instruction + output (+ input, history)",
        "instruction + response (+ context)",
        "any preference schema",
    ),
    "prompts": ("prompt, instruction, question or text", "messages", "any schema of demonstrations or preferences"),
    "text": ("text", "title + paragraphs", "a .txt file", "any schema of demonstrations or preferences"),
}

# fmt: off
COLUMNS = frozenset((
    "answer", "answer_1", "answer_2", "answer_a", "answer_b", "answers", "better_response_id", "chosen", "completion", "completion_1",
    "completion_2", "completion_a", "completion_b",
    "completions", "context", "conversation", "conversation_a", "conversation_b", "conversations", "family", "history", "human_ref_A",
    "human_ref_B", "input", "instances", "instruction", "label", "labels", "margin", "message_id", "message_tree_id", "messages",
    "output", "output_1", "output_2", "output_a", "output_b", "paragraphs", "parent_id", "passages", "preference", "prompt", "query",
    "question", "rank", "ranks", "rejected", "response", "response_0", "response_1", "response_2", "response_a", "response_b", "response1",
    "response2", "responses", "result_x", "result_y", "role", "scores", "system", "text", "title", "turn", "verdict", "votes", "winner",
    "choice",
))
# fmt: on


def recognise(rows_head: list[dict], kind: str, mapping: dict[str, str] | None = None, source: str = "the data") -> Format:
    """The most particular schema that fits half of a file's first rows (renamed by the mapping), else the one that fits most.

    ``mapping["format"]`` names a schema outright. InputError lists the columns found, the schemas wanted and the remedy.
    """
    check_kind(kind)
    check_mapping(mapping, source)
    rows = [row for row in rows_head if isinstance(row, dict)]
    for wanted, found in (mapping or {}).items():
        if wanted != "format" and rows and not any(wanted in row for row in rows):
            raise InputError(
                f"{source}: the mapping takes `{wanted}` from a column `{found}`, but there is none; columns found: {_columns(rows)}"
            )
    if mapping and "format" in mapping:
        return named_format(mapping["format"], kind, source)
    counts = [sum(form.fits(row) for row in rows) for form in FORMATS[kind]]
    if not any(counts):
        raise InputError(_no_fit(rows, kind, source))
    enough = min(max(counts), len(rows) / 2)  # the first, not the largest: a broken row still looks like a bare prompt
    form = next(form for form, count in zip(FORMATS[kind], counts, strict=True) if count >= enough)
    if form.doubt and (why := form.doubt(rows)):
        raise InputError(f"{source}: read as {form.name}: {why}; if the rows are meant as they are, {{format: {form.name}}}")
    return form


def named_format(name: str, kind: str, source: str) -> Format:
    for form in FORMATS[kind]:
        if form.name == name:
            return form
    names = [form.name for form in FORMATS[kind]]
    raise InputError(f"{source}: the mapping names the format {name!r}, which is none for {kind}; formats: {', '.join(names)}")


def check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise InputError(f"kind of data {kind!r}: wanted one of {', '.join(KINDS)}")


def check_mapping(mapping: dict[str, str] | None, source: str) -> None:
    """InputError unless the mapping goes from known columns (or ``format``) to names."""
    if mapping is not None and not isinstance(mapping, dict):
        raise InputError(f"{source}: the mapping is {mapping!r}; wanted pairs such as {{prompt: question, completion: reply}}")
    for wanted, found in (mapping or {}).items():
        if wanted != "format" and wanted not in COLUMNS:
            near = difflib.get_close_matches(str(wanted), COLUMNS, n=1)
            hint = f"did you mean `{near[0]}`?" if near else f"known: {', '.join(sorted(COLUMNS))}"
            raise InputError(f"{source}: the mapping gives `{wanted}`, which no schema has; {hint} (the mapping reads wanted: found)")
        if not isinstance(found, str):
            raise InputError(f"{source}: the mapping takes `{wanted}` from {found!r}; wanted the name of a column")


def _columns(rows: Iterable[dict]) -> str:
    names = list(dict.fromkeys(str(name)[:60] for row in rows for name in row))
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "") or "none"


def _no_fit(rows: list[dict], kind: str, source: str) -> str:
    wanted = "\n".join(f"  {line}" for line in WANTED[kind])
    return (
        f"{source}: no schema for {kind} fits it. Columns found: {_columns(rows)}. Wanted one of:\n{wanted}\n"
        "Rename the columns, or say in the config's mapping which is which, e.g. {prompt: question, chosen: good, rejected: bad}"
    )
