"""Reading people's own files: one tiny hand-made sample of every schema with the canonical row it must become, every reason to drop a
row, and files broken in every way we could think of: each ends in a clean drop or in an InputError that names file and line."""

import csv
import gzip
import json
from itertools import islice
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from rlhf.data import FORMATS, KINDS, convert, prompt_id, read_rows, recognise
from rlhf.data.examples import checked_ranks, pieces_of
from rlhf.data.formats import COLUMNS
from rlhf.data.reading import Drop
from rlhf.errors import InputError

HERE = Path(__file__).resolve().parent
SHARED = HERE.parent.parent / "shared" / "data"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def write(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def converted(path, kind, mapping=None, **options):
    result = convert(path, kind, mapping, **options)
    return list(result.rows), result.report


def bare(row):
    return {name: value for name, value in row.items() if name not in ("id", "source")}


# Every schema, one row ----------------------------------------------------------------------------------------------------------------

ASK = [user("Hi?")]
PAIR = {"prompt": ASK, "completions": ["good", "bad"], "ranks": [1, 2]}
PAIR_TURNED = {"prompt": ASK, "completions": ["bad", "good"], "ranks": [2, 1]}
TALK = [user("Hi?"), assistant("Yes?"), user("More")]
TALK_PAIR = {"prompt": TALK, "completions": ["good", "bad"], "ranks": [1, 2]}
HH = "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: More\n\nAssistant:"
QA_VOTES = [1, 0, 2, 2, 0, 2]  # of 4 answers, pairs 12 13 14 23 24 34: answer 1 wins once, 3 once, 4 twice, 2 never

PREFERENCE_SAMPLES = [
    ("HH transcripts", {"chosen": HH + " good", "rejected": HH + " bad"}, TALK_PAIR),
    ("HH transcripts cut in three", {"prompt": HH, "chosen": " good", "rejected": " bad"}, TALK_PAIR),
    ("prompt, chosen, rejected", {"prompt": "Hi?", "chosen": "good", "rejected": "bad"}, PAIR),
    ("prompt, chosen, rejected", {"question": "Hi?", "chosen": "good", "rejected": "bad", "margin": 0.5}, {**PAIR, "margin": 0.5}),
    ("prompt, chosen, rejected", {"prompt": ASK, "chosen": [assistant("good")], "rejected": [assistant("bad")]}, PAIR),
    (  # UltraFeedback, binarized: the prompt is text and stands in the message lists again
        "prompt, chosen, rejected",
        {"prompt": "Hi?", "chosen": [user("Hi?"), assistant("good")], "rejected": [user("Hi?"), assistant("bad")], "score_chosen": 8.0},
        PAIR,
    ),
    (  # ShareGPT
        "prompt, chosen, rejected",
        {
            "conversations": [{"from": "human", "value": "Hi?"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        PAIR,
    ),
    (
        "prompt, chosen, rejected",
        {"system": "Be kind.", "question": "Hi?", "chosen": "good", "rejected": "bad"},
        {**PAIR, "prompt": [system("Be kind."), *ASK]},
    ),
    ("chosen, rejected messages", {"chosen": [*TALK, assistant("good")], "rejected": [*TALK, assistant("bad")]}, TALK_PAIR),
    (
        "MT-Bench votes",
        {
            "conversation_a": [*ASK, assistant("bad"), user("More"), assistant("x")],
            "conversation_b": [*ASK, assistant("good"), user("More"), assistant("y")],
            "winner": "model_b",
            "turn": 1,
        },
        PAIR_TURNED,
    ),
    (
        "PandaLM votes",
        {"instruction": "Do", "input": "this", "response1": "bad", "response2": "good", "annotator1": 2, "annotator2": 0, "annotator3": 2},
        {**PAIR_TURNED, "prompt": [user("Do\n\nthis")]},
    ),
    ("LLMBar labels", {"input": "Hi?", "output_1": "bad", "output_2": "good", "label": 2}, PAIR_TURNED),
    ("AlpacaEval annotations", {"instruction": "Hi?", "output_1": "good", "output_2": "bad", "preference": 1.0}, PAIR),
    ("AlpacaEval annotations", {"instruction": "Hi?", "output_1": "bad", "output_2": "good", "preference": 1.73}, PAIR_TURNED),
    (
        "crowd votes",
        {
            "prompt": 8,
            "text": "Hi?",
            "result_x": "good",
            "result_y": "bad",
            "votes": [{"winner": w} for w in ("left", "tie", "left", "right")],
        },
        PAIR,
    ),
    ("SHP", {"history": "Hi?", "human_ref_A": "bad", "human_ref_B": "good", "labels": 0, "score_ratio": 2.5}, PAIR_TURNED),
    ("better response id", {"prompt": "Hi?", "response_0": "good", "response_1": "bad", "better_response_id": 0}, PAIR),
    (
        "verdicts on a and b",
        {"prompt": "Hi?", "completion_a": "bad", "completion_b": "good", "preference": "b-is-slightly-better"},
        {**PAIR_TURNED, "margin": 0.5},
    ),
    (
        "verdicts on a and b",
        {"prompt": "Hi?", "completion_a": "good", "completion_b": "bad", "preference": "a-is-better"},
        {**PAIR, "margin": 1.0},
    ),
    ("verdicts on a and b", {"prompt": "Hi?", "response_a": "good", "response_b": "bad", "winner": "A"}, PAIR),
    ("verdicts on 1 and 2", {"question": "Hi?", "answer_1": "bad", "answer_2": "good", "winner": 2}, PAIR_TURNED),
    (
        "QA-Feedback",
        {
            "question": "Hi?",
            "passages": [["Book", "One.", "Two."], ["Film", "Film, a title.", "Three."]],
            "prediction 1": "a",
            "prediction 2": "b",
            "prediction 3": "c",
            "prediction 4": "d",
            "preference": QA_VOTES,
        },
        {"prompt": [user("Hi?\n\nBook\nOne. Two.\n\nFilm, a title. Three.")], "completions": ["a", "b", "c", "d"], "ranks": [2, 3, 2, 1]},
    ),
    (
        "ranked answers",
        {"prompt": ASK, "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "family": "greetings"},
        {"prompt": ASK, "completions": ["a", "b", "c"], "ranks": [2, 1, 2], "family": "greetings"},
    ),
    (
        "scored answers",
        {"prompt": "Hi?", "responses": ["a", "b", "c"], "scores": [0.1, 7, 0.1]},
        {"prompt": ASK, "completions": ["a", "b", "c"], "ranks": [2, 1, 2]},
    ),
    (
        "scored answer objects",
        {"instruction": "Hi?", "completions": [{"response": "a", "overall_score": 3.5}, {"response": "b", "overall_score": 9}]},
        {"prompt": ASK, "completions": ["a", "b"], "ranks": [2, 1]},
    ),
    (
        "scored answer objects",
        {"prompt": "Hi?", "answers": [{"answer": "a", "rank": 3}, {"answer": "b", "rank": 1}, {"answer": "c", "rank": 2}]},
        {"prompt": ASK, "completions": ["a", "b", "c"], "ranks": [3, 1, 2]},
    ),
    (
        "answers best first",
        {"instruction": "More", "input": "", "output": ["a", "b", "c"], "history": [["Hi?", "Yes?"]]},
        {"prompt": TALK, "completions": ["a", "b", "c"], "ranks": [1, 2, 3]},
    ),
    (
        "answers best first",
        {"instruction": "你吃什么", "input": "", "output": ["我不吃东西。", "亏"], "history": []},
        {"prompt": [user("你吃什么")], "completions": ["我不吃东西。", "亏"], "ranks": [1, 2]},
    ),
]


@pytest.mark.parametrize(("name", "row", "wanted"), PREFERENCE_SAMPLES, ids=[f"{n}-{s[0]}" for n, s in enumerate(PREFERENCE_SAMPLES)])
def test_a_preference_row_becomes_this_canonical_row(tmp_path, name, row, wanted):
    path = write(tmp_path, [row])
    rows, report = converted(path, "preferences")
    assert [bare(made) for made in rows] == [wanted]
    assert rows[0]["source"] == f"{path}:1"
    assert rows[0]["id"] == prompt_id(wanted["prompt"])
    assert report.formats[path].name == name
    assert name in report.describe()


DEMO = {"prompt": ASK, "completion": "good"}
DEMONSTRATION_SAMPLES = [
    ({"prompt": "Hi?", "completion": "good"}, [DEMO]),
    ({"prompt": ASK, "completion": [assistant("good")]}, [DEMO]),
    ({"prompt": HH, "response": " good"}, [{"prompt": TALK, "completion": "good"}]),
    ({"messages": [*TALK, assistant("good")]}, [{"prompt": TALK, "completion": "good"}]),
    ({"messages": [system(""), *ASK, assistant("good")]}, [DEMO]),
    ({"instruction": "Hi?", "input": "", "output": "good"}, [DEMO]),
    ({"instruction": "Hi?", "output": "good"}, [DEMO]),
    ({"instruction": "Do", "input": "this", "output": "good"}, [{"prompt": [user("Do\n\nthis")], "completion": "good"}]),
    ({"instruction": "Do", "context": "this", "response": "good"}, [{"prompt": [user("Do\n\nthis")], "completion": "good"}]),
    ({"instruction": "More", "input": "", "output": "good", "history": [["Hi?", "Yes?"]]}, [{"prompt": TALK, "completion": "good"}]),
    ({"question": "Hi?", "answer": "good"}, [DEMO]),
    (
        {"conversations": [{"from": "system", "value": "Be kind."}, {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "good"}]},
        [{"prompt": [system("Be kind."), *ASK], "completion": "good"}],
    ),
    (
        {"instruction": "Do", "instances": [{"input": "", "output": "one"}, {"input": "this", "output": "two"}]},
        [{"prompt": [user("Do")], "completion": "one"}, {"prompt": [user("Do\n\nthis")], "completion": "two"}],
    ),
]


@pytest.mark.parametrize(("row", "wanted"), DEMONSTRATION_SAMPLES)
def test_a_demonstration_row_becomes_these_canonical_rows(tmp_path, row, wanted):
    rows, _ = converted(write(tmp_path, [row]), "demonstrations")
    assert [bare(made) for made in rows] == wanted


@pytest.mark.parametrize(("name", "row", "wanted"), PREFERENCE_SAMPLES, ids=[f"{n}-{s[0]}" for n, s in enumerate(PREFERENCE_SAMPLES)])
def test_the_best_answer_of_every_preference_schema_is_a_demonstration(tmp_path, name, row, wanted):
    rows, _ = converted(write(tmp_path, [row]), "demonstrations")
    best = wanted["completions"][wanted["ranks"].index(1)]
    assert [(made["prompt"], made["completion"]) for made in rows] == [(wanted["prompt"], best)]


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        *((row, wanted["prompt"]) for _, row, wanted in PREFERENCE_SAMPLES),
        *((row, wanted[0]["prompt"]) for row, wanted in DEMONSTRATION_SAMPLES),
        ({"prompt": "Hi?"}, ASK),
        ({"prompt": TALK}, TALK),
        ({"messages": TALK}, TALK),
        ({"instruction": "Do", "input": "this"}, [user("Do\n\nthis")]),
        ({"text": "Hi?"}, ASK),
        ({"prompt": "Hi?", "completion_a": "a", "completion_b": "b", "preference": "tie"}, ASK),  # a tie has a fine prompt
        ({"instruction": "Hi?", "output": ""}, ASK),
    ],
)
def test_a_prompt_is_taken_from_every_schema(tmp_path, row, wanted):
    rows, _ = converted(write(tmp_path, [row]), "prompts")
    assert rows[0]["prompt"] == wanted
    assert set(rows[0]) == {"prompt", "id", "source"} | ({"family"} & set(row))


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"text": "One.\n\nTwo."}, "One.\n\nTwo."),
        ({"title": "登幽州臺歌", "paragraphs": ["前不見古人，", "後不見來者。"]}, "登幽州臺歌\n前不見古人，\n後不見來者。"),
        ({"rhythmic": "眼儿媚", "paragraphs": ["酣酣日脚紫烟浮。"]}, "眼儿媚\n酣酣日脚紫烟浮。"),
        ({"instruction": "Do", "input": "this", "output": "good"}, "Do\n\nthis\n\ngood"),
        ({"messages": [*TALK, assistant("good")]}, "Hi?\n\nYes?\n\nMore\n\ngood"),
        ({"prompt": "Hi?", "chosen": "good", "rejected": "bad"}, "Hi?\n\ngood"),
    ],
)
def test_text_comes_from_documents_and_from_demonstrations(tmp_path, row, wanted):
    rows, _ = converted(write(tmp_path, [row]), "text")
    assert [made["text"] for made in rows] == [wanted]


def test_text_of_a_demonstration_is_on_the_side_of_its_prompt(tmp_path):
    path = write(tmp_path, [{"prompt": "Hi?", "completion": "good"}])
    assert converted(path, "text")[0][0]["id"] == converted(path, "demonstrations")[0][0]["id"]


def test_message_trees_give_a_row_for_every_ranked_user_turn(tmp_path):
    def message(name, parent, role, text, rank=None, **more):
        return {"message_id": name, "parent_id": parent, "message_tree_id": "t", "role": role, "text": text, "rank": rank, **more}

    path = write(
        tmp_path,
        [
            message("t", None, "prompter", "Hi?"),
            message("a", "t", "assistant", "second", 1),
            message("b", "t", "assistant", "first", 0),
            message("c", "t", "assistant", "gone", 2, deleted=True),
            message("d", "t", "assistant", "late"),
            message("e", "b", "prompter", "More"),
            message("f", "e", "assistant", "alone"),
            message("g", "nowhere", "prompter", "Lost"),
            {**message("t2", None, "prompter", "Bye?"), "message_tree_id": "t2"},
        ],
    )
    rows, report = converted(path, "preferences")
    assert [bare(row) for row in rows] == [{"prompt": ASK, "completions": ["second", "first"], "ranks": [2, 1]}]
    assert report.dropped == {
        "deleted message": {path: [4]},
        "answer without a rank": {path: [5]},
        "parent message missing": {path: [8]},
        "fewer than two answers": {path: [6, 9]},
    }
    rows, report = converted(path, "demonstrations")
    assert [(row["prompt"], row["completion"], row["source"]) for row in rows] == [
        (ASK, "first", f"{path}:1"),
        ([user("Hi?"), assistant("first"), user("More")], "alone", f"{path}:6"),
    ]
    assert report.read == 9


# Every reason to drop a row -----------------------------------------------------------------------------------------------------------

GOOD_PAIR = {"prompt": "Good?", "chosen": "good", "rejected": "bad"}
GOOD_RANKED = {"prompt": "Good?", "completions": ["a", "b"], "ranks": [1, 2]}
GOOD_HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: good", "rejected": "\n\nHuman: Hi\n\nAssistant: bad"}
GOOD_TULU = {"prompt": "Good?", "completion_a": "a", "completion_b": "b", "preference": "a-is-better"}

DROPPED = [
    ("chosen equals rejected", GOOD_PAIR, {"chosen": "bad "}),
    ("empty completion", GOOD_PAIR, {"chosen": " \n"}),
    ("empty completion", GOOD_PAIR, {"rejected": None}),
    ("not text", GOOD_PAIR, {"rejected": 7}),
    ("not text", GOOD_PAIR, {"chosen": True}),
    ("not text", GOOD_PAIR, {"prompt": 12}),
    ("not a list of messages", GOOD_PAIR, {"chosen": ["good"]}),
    ("not a list of messages", GOOD_PAIR, {"prompt": ["Hi?"]}),
    ("no prompt", GOOD_PAIR, {"prompt": ""}),
    ("no prompt", GOOD_PAIR, {"prompt": None}),
    ("no prompt", GOOD_PAIR, {"prompt": []}),
    ("no prompt", GOOD_PAIR, {"prompt": [system("Be kind.")]}),
    ("prompt does not end with the user", GOOD_PAIR, {"prompt": [user("Hi"), assistant("Yes?")]}),
    ("system turn is not first", GOOD_PAIR, {"prompt": [user("Hi"), system("Be kind."), user("Hi")]}),
    ("empty turn", GOOD_PAIR, {"prompt": [user(" "), assistant("Yes?"), user("Hi")]}),
    ("unknown role", GOOD_PAIR, {"prompt": [{"role": "tool", "content": "4"}, user("Hi")]}),
    ("unknown role", GOOD_PAIR, {"prompt": [{"speaker": "me"}]}),
    ("does not end with the assistant", GOOD_PAIR, {"chosen": [user("Good?")]}),
    ("prompts differ", GOOD_PAIR, {"chosen": [user("Other?"), assistant("good")]}),
    ("NUL character", GOOD_PAIR, {"chosen": "go\x00od"}),
    ("not valid Unicode", GOOD_PAIR, {"chosen": "\ud800"}),
    ("margin is not a number", GOOD_PAIR, {"margin": "wide"}),
    ("prompts differ", GOOD_HH, {"rejected": "\n\nHuman: Ho\n\nAssistant: bad"}),
    ("not a transcript", GOOD_HH, {"chosen": "Human: Hi"}),
    ("does not end with the assistant", GOOD_HH, {"chosen": "\n\nHuman: Hi"}),
    ("not text", GOOD_HH, {"rejected": ["bad"]}),
    ("all tied", GOOD_TULU, {"preference": "tie"}),
    ("no verdict", GOOD_TULU, {"preference": None}),
    ("unknown verdict", GOOD_TULU, {"preference": "both-are-fine"}),
    ("unknown verdict", GOOD_TULU, {"preference": 1}),
    ("all tied", GOOD_RANKED, {"ranks": [1, 1]}),
    ("ranks have gaps", GOOD_RANKED, {"ranks": [1, 3]}),
    ("rank is not a number", GOOD_RANKED, {"ranks": [1, "second"]}),
    ("rank is not a number", GOOD_RANKED, {"ranks": [1, float("nan")]}),
    ("rank is not a number", GOOD_RANKED, {"ranks": [1, 1.5]}),
    ("rank is not a number", GOOD_RANKED, {"ranks": [1, 10**400]}),
    ("answers and ranks differ in number", GOOD_RANKED, {"ranks": [1, 2, 3]}),
    ("fewer than two answers", GOOD_RANKED, {"completions": ["a"], "ranks": [1]}),
    ("not a list of answers", GOOD_RANKED, {"completions": "a"}),
    ("empty completion", GOOD_RANKED, {"completions": ["a", "", " "], "ranks": [1, 2, 3]}),
    ("score is not a number", {"prompt": "Good?", "completions": ["a", "b"], "scores": [1, 2]}, {"scores": [1, float("inf")]}),
    ("score is not a number", {"prompt": "Good?", "completions": ["a", "b"], "scores": [1, 2]}, {"scores": [1, True]}),
    ("no verdict", {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1}, {"preference": None}),
    ("unknown verdict", {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1}, {"preference": 3}),
    ("all tied", {"instruction": "Hi", "output_1": "a", "output_2": "b", "preference": 1}, {"preference": 0}),
    ("unknown verdict", {"input": "Hi", "output_1": "a", "output_2": "b", "label": 1}, {"label": 0}),
    (
        "all tied",
        {"text": "Hi", "result_x": "a", "result_y": "b", "votes": [{"winner": "left"}]},
        {"votes": [{"winner": "left"}, {"winner": "right"}]},
    ),
    ("no verdict", {"text": "Hi", "result_x": "a", "result_y": "b", "votes": [{"winner": "left"}]}, {"votes": []}),
]


@pytest.mark.parametrize(("reason", "good", "change"), DROPPED, ids=[f"{n}-{case[0]}" for n, case in enumerate(DROPPED)])
def test_a_row_that_cannot_be_used_is_dropped_for_its_reason_and_place(tmp_path, reason, good, change):
    """The bad row stands between two good ones: these are kept, and its line is in the report."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (good, {**good, **change}, good)), encoding="utf-8")
    rows, report = converted(str(path), "preferences")
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {reason: {str(path): [2]}}
    assert report.drops() == {reason: 1}
    assert f"{reason} 1" in report.describe()


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("malformed JSON", b'{"prompt": "x"'),
        ("malformed JSON", b"[" * 100_000),
        ("malformed JSON", b'{"n": ' + b"9" * 6000 + b"}"),
        ("malformed JSON", b'{"prompt": "a\x00b"}'),
        ("not an object", b'["x"]'),
        ("not an object", b"null"),
        ("not UTF-8", b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}'),
        ("a key twice", b'{"prompt": "x", "chosen": "a", "chosen": "b", "rejected": "c"}'),
        ("no prompt", b"{}"),
    ],
)
def test_a_line_that_cannot_be_read_costs_that_line_alone(tmp_path, reason, line):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD_PAIR).encode()
    path.write_bytes(b"\n".join([good, b"", line, good]))
    rows, report = converted(str(path), "preferences")
    found = {reason: lines for reason, files in report.dropped.items() for lines in files.values()}
    assert found == {reason: [3]}
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:4"]


def test_reasons_of_demonstrations_and_prompts(tmp_path):
    path = write(
        tmp_path, [{"messages": [*ASK, assistant("good")]}, {"messages": TALK}, {"messages": [*ASK, assistant("")]}, {"messages": []}]
    )
    rows, report = converted(path, "demonstrations")
    assert len(rows) == 1
    assert report.drops() == {"does not end with the assistant": 2, "empty completion": 1}
    rows, report = converted(path, "prompts")
    assert [row["prompt"] for row in rows] == [ASK, TALK]
    assert report.drops() == {"prompt seen before": 1, "no prompt": 1}


def test_of_several_answers_an_unusable_one_is_left_out_and_counted(tmp_path):
    path = write(tmp_path, [{"prompt": "Hi?", "completions": ["c", "", "a", "a "], "ranks": [3, 1, 2, 4]}])
    rows, report = converted(path, "preferences")
    assert [bare(row) for row in rows] == [{"prompt": ASK, "completions": ["c", "a"], "ranks": [2, 1]}]
    assert report.as_json()["left_out"] == {
        "empty completion": {"rows": 1, "where": {path: [1]}},
        "same answer twice": {"rows": 1, "where": {path: [1]}},
    }


def test_ties_are_kept_when_asked_for(tmp_path):
    path = write(tmp_path, [{**GOOD_TULU, "preference": "tie"}])
    rows, _ = converted(path, "preferences", keep_ties=True)
    assert rows[0]["ranks"] == [1, 1]
    with pytest.raises(InputError, match="all tied 1"):
        converted(path, "preferences")


@pytest.mark.parametrize(
    ("given_ranks", "dense"),
    [
        ([1, 2, 3], [1, 2, 3]),
        ([0, 2, 1], [1, 3, 2]),
        ([1, 1, 2], [1, 1, 2]),
        ([1, 1, 3], [1, 1, 2]),
        ([0, 0, 2, 3], [1, 1, 2, 3]),
        (["2", 1.0], [2, 1]),
    ],
)
def test_ranks_may_start_at_0_or_1_and_count_on_densely_or_by_place(given_ranks, dense):
    assert checked_ranks(given_ranks) == dense


def test_turn_2_of_mt_bench_needs_the_same_first_answer(tmp_path):
    a = [*ASK, assistant("Yes?"), user("More"), assistant("good")]
    b = [*ASK, assistant("Yes?"), user("More"), assistant("bad")]
    other = [*ASK, assistant("No?"), user("More"), assistant("bad")]
    votes = [{"conversation_a": a, "conversation_b": side, "winner": "model_a", "turn": 2} for side in (b, other)]
    rows, report = converted(write(tmp_path, votes), "preferences")
    assert [bare(row) for row in rows] == [TALK_PAIR]
    assert report.drops() == {"prompts differ": 1}


# Kinds of files -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_a_byte_order_mark_crlf_and_gzip_change_nothing(tmp_path, packed):
    content = b"\xef\xbb\xbf" + "".join(json.dumps({**GOOD_PAIR, "chosen": f"好 {n}"}) + "\r\n" for n in range(3)).encode()
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(content) if packed else content)
    rows, report = converted(str(path), "preferences")
    assert [row["completions"][0] for row in rows] == ["好 0", "好 1", "好 2"]
    assert report.dropped == {}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([GOOD_PAIR, GOOD_PAIR]),
        json.dumps([GOOD_PAIR, GOOD_PAIR], indent=2),
        json.dumps({"data": [GOOD_PAIR, GOOD_PAIR]}),
        json.dumps({"version": 1, "data": [GOOD_PAIR, GOOD_PAIR]}, indent=1),
        json.dumps(GOOD_PAIR) + "\n" + json.dumps(GOOD_PAIR),
        json.dumps(GOOD_PAIR, indent=4) + "\n" + json.dumps(GOOD_PAIR, indent=4),
    ],
)
def test_a_json_file_may_be_an_array_or_objects(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert [row for _, row in read_rows(str(path))] == [GOOD_PAIR, GOOD_PAIR]


def test_rows_that_an_object_holds_stand_on_lines_of_their_own(tmp_path):
    path = tmp_path / "rows.json"
    pairs = ["{", '"prompt": "Good?", "chosen": "good",', '"rejected": "bad"}']
    path.write_text("\n".join(["{", '"version": [1,', '2],"data"', ":", "[", *pairs, ",", *pairs, "]", ', "note": "x"}']) + "\n")
    assert list(read_rows(str(path))) == [(f"{path}:6", GOOD_PAIR), (f"{path}:10", GOOD_PAIR)]


@pytest.mark.parametrize("column", ["train", "data", "rows", "examples"])
@pytest.mark.parametrize("mark", [("[", ",\n", "]"), ("", "\n", "")])
def test_a_row_with_a_column_called_like_a_holder_of_rows_is_a_row(tmp_path, column, mark):
    first, between, last = mark
    row = {"messages": [*ASK, assistant("good")], column: "x"}
    (tmp_path / "rows.json").write_text(first + between.join([json.dumps(row)] * 2) + last)
    assert [found for _, found in read_rows(str(tmp_path / "rows.json"))] == [row, row]


def test_a_long_json_array_is_read_as_it_comes_with_lines(tmp_path):
    rows = [{**GOOD_PAIR, "chosen": "好" * 3000 + str(n)} for n in range(400)]  # 3.6 MB: several chunks, cut within characters
    path = tmp_path / "rows.json"
    path.write_text("[\n" + ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n]\n", encoding="utf-8")
    found = list(read_rows(str(path)))
    assert [row for _, row in found] == rows
    assert [where for where, _ in found] == [f"{path}:{n}" for n in range(2, 402)]


def test_csv_cells_stay_text(tmp_path):
    path = tmp_path / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["prompt", "chosen", "rejected"], ["six, plus\none?", "7", "NA"], ["b", "x"], ["c", "TRUE", "1e5"]])
    rows, report = converted(str(path), "preferences")
    assert [(row["source"], row["completions"]) for row in rows] == [(f"{path}:2", ["7", "NA"]), (f"{path}:5", ["TRUE", "1e5"])]
    assert report.dropped == {"cells and columns differ in number": {str(path): [4]}}


@pytest.mark.parametrize(("name", "mark"), [("rows.csv", ";"), ("rows.tsv", "\t"), ("rows.csv", "\t")])
def test_tables_with_other_marks_and_lists_in_cells(tmp_path, name, mark):
    path = tmp_path / name
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark).writerows([["prompt", "completions", "scores"], ["Hi?", '["a", "b"]', "[1, 2]"]])
    rows, _ = converted(str(path), "preferences")
    assert [bare(row) for row in rows] == [{"prompt": ASK, "completions": ["a", "b"], "ranks": [2, 1]}]


def table(folder, *lines, mark=","):
    path = folder / "rows.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter=mark).writerows([[cell if isinstance(cell, str) else json.dumps(cell) for cell in line] for line in lines])
    return str(path)


@pytest.mark.parametrize(("kind", "names", "cells", "wanted"), [
    ("preferences", ["conversation_a", "conversation_b", "winner"], [[*ASK, assistant("good")], [*ASK, assistant("bad")], "model_a"], PAIR),
    ("preferences", ["question", "prediction 1", "prediction 2", "preference"], ["Hi?", "good", "bad", [1]], PAIR),
    ("preferences", ["question", "passages", "prediction 1", "prediction 2", "preference"], ["Hi?", [["T", "S."]], "good", "bad", [1]],
     {**PAIR, "prompt": [user("Hi?\n\nT\nS.")]}),
    ("demonstrations", ["conversation"], [[*ASK, assistant("good")]], {"prompt": ASK, "completion": "good"}),
    ("text", ["title", "paragraphs"], ["T", ["a", "b"]], {"text": "T\na\nb"}),
])
def test_a_list_may_stand_in_a_cell_wherever_a_schema_has_one(tmp_path, kind, names, cells, wanted):
    assert [bare(row) for row in converted(table(tmp_path, names, cells), kind)[0]] == [wanted]


@pytest.mark.parametrize(("names", "cells", "mapping"), [
    (["ask", "best", "worst"], ["Hi?", [assistant("good")], [assistant("bad")]], {"prompt": "ask", "chosen": "best", "rejected": "worst"}),
    (["ask", "said", "order"], ["Hi?", ["good", "bad"], [1, 2]], {"prompt": "ask", "completions": "said", "ranks": "order"}),
])
def test_a_list_may_stand_in_a_cell_that_the_mapping_names(tmp_path, names, cells, mapping):
    assert [bare(row) for row in converted(table(tmp_path, names, cells), "preferences", mapping)[0]] == [PAIR]


@pytest.mark.parametrize("empty", ["", None, " "])
def test_what_an_instruction_is_about_may_stand_in_either_column_or_in_both(tmp_path, empty):
    about = [(empty, "this"), ("this", empty), ("this", "that"), (empty, empty)]
    rows = [{"instruction": "Do", "input": one, "context": other, "output": "x"} for one, other in about]
    made, report = converted(write(tmp_path, rows), "demonstrations")
    assert [row["prompt"] for row in made] == [[user(text)] for text in ("Do\n\nthis", "Do\n\nthis", "Do\n\nthis\n\nthat", "Do")]
    assert not report.unread


def test_an_annotator_who_did_not_vote_left_an_empty_cell(tmp_path):
    names = ["instruction", "input", "response1", "response2", "annotator1", "annotator2", "annotator3"]
    assert [bare(row) for row in converted(table(tmp_path, names, ["Hi?", "", "good", "bad", "1", "", "1"]), "preferences")[0]] == [PAIR]
    with pytest.raises(InputError, match="no verdict 1"):
        converted(table(tmp_path, names, ["Hi?", "", "good", "bad", "", "", ""]), "preferences")


def test_an_output_of_messages_is_one_answer(tmp_path):
    made, _ = converted(write(tmp_path, [{"prompt": "Hi?", "output": [assistant("good")]}]), "demonstrations")
    assert [bare(row) for row in made] == [{"prompt": ASK, "completion": "good"}]


def test_a_cell_with_json_that_is_no_message_list_is_text(tmp_path):
    rows, _ = converted(table(tmp_path, ["instruction", "output"], ["Hi?", '[{"name": "x"}]']), "demonstrations")
    assert [bare(row) for row in rows] == [{"prompt": ASK, "completion": '[{"name": "x"}]'}]


def test_parquet_streams_with_message_lists(tmp_path):
    import pyarrow
    from pyarrow import parquet

    path = tmp_path / "rows.parquet"
    row = {"chosen": [*TALK, assistant("good")], "rejected": [*TALK, assistant("bad")]}
    parquet.write_table(pyarrow.Table.from_pylist([row] * 300), path)
    rows, _ = converted(str(path), "preferences")
    assert [bare(made) for made in rows] == [TALK_PAIR] * 300
    assert rows[-1]["source"] == f"{path}:300"


def test_a_saved_data_set_is_a_folder(tmp_path):
    import datasets

    datasets.Dataset.from_list([GOOD_PAIR, GOOD_PAIR]).save_to_disk(tmp_path / "one")
    assert len(converted(str(tmp_path / "one"), "preferences")[0]) == 2
    datasets.DatasetDict({"train": datasets.Dataset.from_list([GOOD_PAIR])}).save_to_disk(tmp_path / "many")
    with pytest.raises(InputError, match="many/train"):
        convert(str(tmp_path / "many"), "preferences")


def test_a_folder_or_a_pattern_is_all_its_files_each_with_its_own_schema(tmp_path):
    write(tmp_path, [GOOD_PAIR], "a.jsonl")
    write(tmp_path, [GOOD_HH], "b.jsonl")
    (tmp_path / "README.md").write_text("no data")
    for source in (str(tmp_path), str(tmp_path / "*.jsonl")):
        rows, report = converted(source, "preferences")
        assert len(rows) == 2
        assert [form.name for form in report.formats.values()] == ["prompt, chosen, rejected", "HH transcripts"]


def test_a_pattern_that_finds_a_file_and_its_folders_gives_it_once(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    paths = [write(tmp_path / "deep" / "er", [GOOD_PAIR], "a.jsonl"), write(tmp_path, [GOOD_PAIR], "z.jsonl")]
    rows, report = converted(str(tmp_path / "**"), "preferences")
    assert [row["source"] for row in rows] == [f"{path}:1" for path in paths] and report.read == 2


def test_hub_ids_stream_with_part_and_split(tmp_path, monkeypatch):
    import datasets

    asked = []
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda path: ["default"])
    monkeypatch.setattr(datasets, "load_dataset", lambda path, **options: asked.append((path, options)) or iter([GOOD_HH]))
    rows, _ = converted("someone/hh/helpful-base@test", "preferences")
    assert asked == [("someone/hh", {"split": "test", "streaming": True, "data_dir": "helpful-base"})]
    assert rows[0]["source"] == "someone/hh/helpful-base@test:1"
    converted("someone/hh/default", "preferences")
    assert asked[-1] == ("someone/hh", {"split": "train", "streaming": True, "name": "default"})


def test_a_hub_that_refuses_is_the_users_to_know(monkeypatch):
    import datasets

    def refuse(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=r"someone/nothing: neither a file here nor a data set that the hub gives .*no route"):
        convert("someone/nothing", "preferences")


def test_plain_text_comes_in_pieces_that_join_to_the_file(tmp_path):
    content = "".join(f"Paragraph {n} has a few words.\n" + "\n" * (n % 3 == 0) for n in range(3000))
    path = tmp_path / "book.txt"
    path.write_text(content)
    rows, _ = converted(str(path), "text")
    assert len(rows) > 3
    assert "".join(row["text"] for row in rows) == content
    assert all(row["text"].endswith("\n\n") for row in rows[:-1])
    starts = [int(row["source"].rsplit(":", 1)[1]) for row in rows]
    lines = content.splitlines(keepends=True)
    assert all(row["text"].startswith(lines[start - 1]) for row, start in zip(rows, starts))


def test_plain_text_lines_are_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("Hi?\r\n\r\n你好吗？\nHi?\n".encode())
    rows, report = converted(str(path), "prompts")
    assert [(row["prompt"], row["source"]) for row in rows] == [(ASK, f"{path}:1"), ([user("你好吗？")], f"{path}:3")]
    assert report.drops() == {"prompt seen before": 1}


@given(st.text(alphabet="ab \n好", max_size=300), st.integers(5, 40))
def test_pieces_join_to_the_text_and_keep_to_their_size(text, size):
    pieces = list(pieces_of(text, size))
    assert "".join(pieces) == text
    assert all(size <= len(piece) <= 2 * size for piece in pieces[:-1])
    assert len(pieces[-1]) <= 2 * size


# Mappings and refusals ----------------------------------------------------------------------------------------------------------------


def test_a_mapping_names_the_columns(tmp_path):
    path = write(tmp_path, [{"meta": {"ask": "Hi?"}, "good": "good", "worse": "bad", "prompt": "not this"}])
    rows, _ = converted(path, "preferences", {"prompt": "meta.ask", "chosen": "good", "rejected": "worse"})
    assert [bare(row) for row in rows] == [PAIR]


def test_a_mapping_can_swap_columns(tmp_path):
    path = write(tmp_path, [GOOD_PAIR])
    rows, _ = converted(path, "preferences", {"chosen": "rejected", "rejected": "chosen"})
    assert rows[0]["completions"] == ["bad", "good"]


def test_a_mapping_can_name_the_schema(tmp_path):
    path = write(tmp_path, [{"prompt": "Hi?", "completion": "good", "text": "as a document"}])
    assert bare(converted(path, "text", {"format": "text"})[0][0])["text"] == "as a document"
    assert bare(converted(path, "text")[0][0])["text"] == "Hi?\n\ngood"
    with pytest.raises(InputError, match=r"formats: .*self-instruct"):
        convert(path, "text", {"format": "poem"})


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"promt": "ask"}, "did you mean `prompt`"),
        ({"prompt": "ask"}, "takes `prompt` from a column `ask`, but there is none; columns found: chosen, rejected"),
        ({"prompt": 3}, "takes `prompt` from 3; wanted the name of a column"),
        ("prompt", "wanted pairs such as"),
    ],
)
def test_a_wrong_mapping_is_said(tmp_path, mapping, message):
    path = write(tmp_path, [{"chosen": "a", "rejected": "b"}])
    with pytest.raises(InputError, match=message):
        convert(path, "preferences", mapping)


def test_when_nothing_fits_columns_schemas_and_remedy_are_said(tmp_path):
    path = write(tmp_path, [{"uno": "a", "dos": "b"}])
    with pytest.raises(InputError) as failure:
        convert(path, "preferences")
    message = str(failure.value)
    assert message.startswith(f"{path}: no schema for preferences fits it. Columns found: uno, dos.")
    assert "prompt + chosen + rejected" in message
    assert "mapping" in message


def test_a_better_or_worse_pair_without_prompt_fits_nothing(tmp_path):
    path = write(tmp_path, [{"chosen": "good", "rejected": "bad"}])
    with pytest.raises(InputError, match="no schema for preferences fits"):
        convert(path, "preferences")


def test_an_unknown_kind_is_refused(tmp_path):
    with pytest.raises(InputError, match="preferences, demonstrations, prompts, text"):
        convert(write(tmp_path, [GOOD_PAIR]), "rewards")


def test_recognition_bears_some_bad_rows():
    assert recognise([{}, {"chosen": 3}, GOOD_HH, GOOD_HH], "preferences").name == "HH transcripts"


REFUSED = {
    "missing.jsonl": (None, "no such file"),
    "empty.jsonl": (b"", "empty"),
    "blank.jsonl": (b"\n\n  \n", "no row"),
    "empty.json": (b"[]", "no row"),
    "empty.csv": (b"prompt,chosen,rejected\n", "no row"),
    "bad.jsonl": (b"{]\n{]\n", "none of its 2 lines can be read; line 1: malformed JSON"),
    "one_line.json": (b"[1, 2, 3]", "none of its 3 rows can be read; row 1: not an object"),
    "lists.jsonl": (b'["a"]\n', "line 1: not an object"),
    "latin1.jsonl": ('{"prompt": "café"}'.encode("latin-1"), "line 1: not UTF-8"),
    "utf16.jsonl": ('{"prompt": "x"}'.encode("utf-16"), "line 1: the file is UTF-16"),
    "cut.jsonl.gz": (gzip.compress(json.dumps(GOOD_PAIR).encode() * 5)[:-12], "cut short or damaged after line"),
    "garbage.jsonl.gz": (b"\x1f\x8b" + b"garbage" * 20, "cut short or damaged after line 0"),
    "plain.jsonl.gz": (b'{"prompt": "x"}', "its name says gzip"),
    "open.json": (b'[{"a": 1},\n {"a": 2}', "line 2: malformed JSON"),
    "broken.json": (b'[{"a": 1},\n {"a": }]', "line 2: malformed JSON"),
    "deep.json": (b"[" + b'{"a":' * 100_000, "line 1: malformed JSON"),
    "latin1.json": ('[\n{"a": "café"}]'.encode("latin-1"), "line 2: not UTF-8"),
    "twice.csv": (b"prompt,prompt\na,b\n", "line 1: the header names a column twice"),
    "quote.csv": (b'"prompt,chosen\na,b\n', "line 1: the header is malformed"),
    "latin1.csv": ("prompt,chosen\na,café\n".encode("latin-1"), "line 2: not UTF-8"),
    "table.parquet": (b"PAR1 not really", "not readable as Parquet"),
    "latin1.txt": ("café".encode("latin-1"), "line 1: not UTF-8"),
    "array.jsonl": (b'[{"prompt": "a",\n"completion": "b"}]\n', "wanted an object a line; a file that is one array is named .json"),
    "array-on-a-line.jsonl": (b'[{"prompt": "a", "completion": "b"}]\n', "wanted an object a line; a file that is one array is named .json"),
    "numbers.json": (b"[1, 2]", "wanted objects: one array of them"),
    "bars.csv": (b"prompt|chosen|rejected\na|b, c|d\n", "wanted a header and rows with commas, semicolons or tabs between the cells"),
    "notes.docx": (b"PK", "no kind of file that can be read here"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_cannot_be_read_is_named_with_what_was_wanted(tmp_path, name, kind):
    content, message = REFUSED[name]
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as failure:
        converted(str(path), kind)
    assert str(failure.value).startswith(str(path))
    assert message in str(failure.value)


def test_rows_before_damage_are_not_passed_off_as_the_whole(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress("".join(json.dumps({**GOOD_PAIR, "prompt": str(n) * 50}) + "\n" for n in range(5000)).encode())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"damaged after line \d+"):
        converted(str(path), "preferences")


@pytest.mark.parametrize(
    "content", [b'prompt,completion\n"a","b\nc,d\n', b"prompt,completion\na,b\x00\nc,d\n", b'prompt,completion\na"x"b,c"d\n']
)
def test_malformed_tables_drop_rows_or_are_refused(tmp_path, content):
    path = tmp_path / "rows.csv"
    path.write_bytes(content)
    try:
        rows, report = converted(str(path), "demonstrations")
    except InputError as failure:
        assert str(path) in str(failure)
    else:
        assert rows
        assert report.read == len(rows) + sum(report.drops().values())


def test_a_file_of_unusable_rows_is_refused_with_the_reasons(tmp_path):
    path = write(tmp_path, [{**GOOD_PAIR, "chosen": ""}, {**GOOD_PAIR, "chosen": "bad"}])
    with pytest.raises(InputError, match=r"line 1: none of the 2 rows .* empty completion 1, chosen equals rejected 1"):
        converted(path, "preferences")


def test_other_packing_in_a_folder_is_not_passed_over(tmp_path):
    write(tmp_path, [GOOD_PAIR])
    (tmp_path / "more.jsonl.zst").write_bytes(b"x")
    with pytest.raises(InputError, match=r"more.jsonl.zst: packed in a way"):
        convert(str(tmp_path), "preferences")


def test_an_endless_line_costs_that_line(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf.data.reading.MAX_LINE_BYTES", 1000)
    path = write(tmp_path, [GOOD_PAIR, {**GOOD_PAIR, "chosen": "x" * 5000}, GOOD_PAIR])
    rows, report = converted(path, "preferences")
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:3"]
    assert report.dropped == {"line too long": {path: [2]}}


# Properties ---------------------------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["user", "tie", HH, HH + " x", 10**400]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "response", "score", "rank", "winner", "input", "output"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=8,
)
ALL_COLUMNS = sorted(COLUMNS | {"annotator1", "prediction 1", "prediction 2", "deleted", "rhythmic"})


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([row for _, row, _ in PREFERENCE_SAMPLES] + [row for row, _ in DEMONSTRATION_SAMPLES]), st.data())
def test_no_value_in_any_column_makes_a_reader_fail(tmp_path_factory, sample, data):
    """A good row, then the same with some columns made anything: for each kind that the good one has, the other is made or dropped."""
    broken = dict(sample)
    for column in data.draw(st.lists(st.sampled_from(sorted(sample) + ALL_COLUMNS), min_size=1, max_size=4)):
        broken[column] = data.draw(JSON_VALUES)
    for column in data.draw(st.lists(st.sampled_from(sorted(sample)), max_size=1)):
        broken.pop(column, None)
    path = tmp_path_factory.mktemp("fuzz") / "rows.jsonl"
    path.write_text(json.dumps(sample) + "\n" + json.dumps(broken) + "\n" + json.dumps(sample) + "\n")
    for kind in ("preferences", "demonstrations", "text") if "rejected" in sample else ("demonstrations", "prompts"):
        rows, report = converted(str(path), kind)
        assert report.read == 3
        assert report.made == len(rows) >= 1
        for row in rows:
            json.dumps(row, ensure_ascii=False).encode()
            assert all(turn["content"].strip() and turn["role"] in ("system", "user", "assistant") for turn in row.get("prompt", []))
            assert all(text.strip() for text in row.get("completions", []))


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.binary(max_size=200), st.sampled_from(["rows.jsonl", "rows.json", "rows.csv", "rows.txt", "rows.jsonl.gz", "rows.parquet"]))
def test_no_bytes_make_the_reader_fail(tmp_path_factory, content, name):
    path = tmp_path_factory.mktemp("bytes") / name
    path.write_bytes(content)
    try:
        for where, row in read_rows(str(path)):
            assert where.startswith(f"{path}:")
            assert isinstance(row, (dict, Drop))
    except InputError as failure:
        assert str(path) in str(failure)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.text(min_size=1), st.text(min_size=1))
def test_text_goes_through_unchanged(tmp_path_factory, prompt, completion):
    path = tmp_path_factory.mktemp("same") / "rows.jsonl"
    path.write_text(json.dumps({"prompt": prompt, "completion": completion}) + "\n" + json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    rows, report = converted(str(path), "demonstrations")
    clean = all(text.strip() and "\x00" not in text for text in (prompt, completion))
    assert report.drops() == {} or not clean
    if clean:
        assert (rows[0]["prompt"], rows[0]["completion"]) == ([user(prompt)], completion)


def test_every_format_has_its_own_name_and_a_sample():
    names = [form.name for form in FORMATS["prompts"]]
    assert len(set(names)) == len(names)
    assert {form.name for form in FORMATS["preferences"]} - {"message trees"} == {name for name, _, _ in PREFERENCE_SAMPLES}


# What ships, and the real files beside the repository ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["preferences", "demonstrations", "prompts"])
def test_the_samples_that_ship_are_whole(kind):
    rows, report = converted(str(HERE.parent / "data" / "samples" / f"{kind}.jsonl"), kind)
    assert len(rows) >= 18
    assert report.drops() == {}
    chinese = sum(any("一" <= letter <= "鿿" for letter in row["prompt"][-1]["content"]) for row in rows)
    assert 2 <= chinese < len(rows) // 2


def test_every_example_in_the_readme_of_schemas_is_read_as_it_says(tmp_path):
    """Blocks of data/README.md that start with `KIND: SCHEMA` are rows of that schema."""
    checked = 0
    for block in (HERE.parent / "data" / "README.md").read_text(encoding="utf-8").split("```")[1::2]:
        head, _, body = block.strip().partition("\n")
        if not head.startswith("json "):
            continue
        kind, _, name = head.removeprefix("json ").partition(": ")
        path = tmp_path / f"{checked}.jsonl"
        path.write_text(body, encoding="utf-8")
        rows, report = converted(str(path), kind)
        assert [form.name for form in report.formats.values()] == [name]
        assert rows
        assert report.drops() == {}
        checked += 1
    assert checked == len({form.name for forms in FORMATS.values() for form in forms})


# file, schema, rows read, preferences and demonstrations made (None where there are no preferences)
REAL = [
    ("hh_rlhf/helpful-base", "HH transcripts", 1744, 1732, 1737),
    ("hh_rlhf/helpful-online", "HH transcripts", 861, 857, 859),
    ("hh_rlhf/helpful-rejection-sampled", "HH transcripts", 2055, 2028, 2053),
    ("hh_rlhf/harmless-base", "HH transcripts", 1758, 1750, 1750),
    ("oasst1/ranked_en", "answers best first", 465, 465, 465),
    ("oasst1/ranked_zh", "answers best first", 576, 576, 576),
    ("oasst1/messages_en_val", "message trees", 1541, 318, 363),
    ("oasst1/sft_zh", "prompt and answer", 580, None, 580),
    ("qa_feedback/dev_feedback", "QA-Feedback", 375, 366, 366),
    ("pandalm/testset_v1", "PandaLM votes", 744, 610, 661),
    ("tulu_human_eval/annotations", "verdicts on a and b", 854, 569, 571),
    ("mt_bench_human/judgments", "MT-Bench votes", 1298, 503, 508),
    ("llmbar/llmbar", "LLMBar labels", 315, 315, 315),
    ("llmfao/pairs_crowd", "crowd votes", 1665, 719, 747),
    ("alpaca_eval_gpt4/annotations", "AlpacaEval annotations", 5436, 5367, 5369),
    ("self_instruct/seed_tasks", "self-instruct tasks", 175, None, 175),
    ("self_instruct/user_oriented_instructions", "self-instruct tasks", 187, None, 187),
    ("lima/lima", "prompt and answer", 1029, None, 1029),
]
LARGE = [  # of these only the start is read
    ("dolly/dolly_15k.jsonl.gz", "demonstrations", "prompt and answer"),
    ("alpaca/alpaca_en.jsonl.gz", "demonstrations", "prompt and answer"),
    ("alpaca/alpaca_zh.jsonl.gz", "demonstrations", "prompt and answer"),
    ("books_en/books.jsonl.gz", "text", "text"),
    ("vader_sentiment/movie.jsonl.gz", "text", "text"),
    ("vader_sentiment/amazon.jsonl.gz", "text", "text"),
]
REAL_TEXT = [
    ("books_zh/poems.jsonl.gz", 646),
    ("books_zh/novels.jsonl.gz", 2),
    ("books_en/tinystories_sample.jsonl.gz", 1097),
    ("books_en/tinyshakespeare.txt.gz", 56),
]
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the real data sets are not beside this repository (../shared/data)")


@needs_shared
@pytest.mark.parametrize(("name", "schema", "read", "preferences", "demonstrations"), REAL)
def test_real_files_go_in_with_their_meaning(name, schema, read, preferences, demonstrations):
    path = str(SHARED / f"{name}.jsonl.gz")
    for kind, wanted in (("preferences", preferences), ("demonstrations", demonstrations)):
        if wanted is None:
            with pytest.raises(InputError, match="no schema for preferences fits"):
                convert(path, kind)
            continue
        rows, report = converted(path, kind)
        assert (report.formats[path].name, report.read, len(rows)) == (schema, read, wanted)


@needs_shared
@pytest.mark.parametrize(("name", "kind", "schema"), LARGE)
def test_large_real_files_start_at_once(name, kind, schema):
    path = str(SHARED / name)
    result = convert(path, kind)
    rows = list(islice(result.rows, 300))
    assert len(rows) == 300
    assert result.report.formats[path].name == schema
    assert result.report.read < 400  # lazily: not the whole file


@needs_shared
@pytest.mark.parametrize(("name", "rows"), REAL_TEXT)
def test_real_texts_go_in(name, rows):
    made, report = converted(str(SHARED / name), "text")
    assert report.read == rows
    assert len(made) >= rows
    assert all(row["text"].strip() for row in made)


@needs_shared
def test_message_trees_agree_with_the_rankings_made_from_them():
    """`ranked_en` holds what its authors made from the trees of `messages_en_val`: two files, two readers, the same rows."""
    names = [str(SHARED / "oasst1" / f"{name}.jsonl.gz") for name in ("messages_en_val", "ranked_en")]
    trees, ranked = (converted(name, "preferences")[0] for name in names)
    with gzip.open(names[1], "rt", encoding="utf-8") as file:
        from_trees = {f"{names[1]}:{n}" for n, line in enumerate(file, start=1) if json.loads(line)["source"] == "oasst1_validation"}

    def best_first(row):
        return json.dumps([row["prompt"], [text for _, text in sorted(zip(row["ranks"], row["completions"]))]])

    assert {best_first(row) for row in trees} == {best_first(row) for row in ranked if row["source"] in from_trees}


@needs_shared
def test_one_task_has_one_id_in_every_source():
    pandalm, tulu, tasks = (
        {row["id"] for row in converted(str(SHARED / name), "prompts")[0]}
        for name in (
            "pandalm/testset_v1.jsonl.gz",
            "tulu_human_eval/annotations.jsonl.gz",
            "self_instruct/user_oriented_instructions.jsonl.gz",
        )
    )
    assert len(pandalm & tulu) == 126
    assert tasks <= tulu


# Layouts that are met often, and what they must not become -------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", [None, "", "Hi?", "Hi? \n", "More"])
def test_answers_that_repeat_the_conversation_tell_the_prompt_themselves(tmp_path, prompt):
    """The column beside them is empty, or the first or the last question alone; white space around it does not count."""
    row = {"prompt": prompt, "chosen": [system("Be kind."), *TALK, assistant("good")], "rejected": [system("Be kind."), *TALK, assistant("bad")]}
    rows, report = converted(write(tmp_path, [row]), "preferences")
    assert [bare(row) for row in rows] == [{**TALK_PAIR, "prompt": [system("Be kind."), *TALK]}] and not report.dropped


def test_answers_to_another_question_than_the_column_are_still_told_apart(tmp_path):
    row = {"prompt": "Ho?", "chosen": [*ASK, assistant("good")], "rejected": [*ASK, assistant("bad")]}
    with pytest.raises(InputError, match="prompts differ 1; where the answers are whole conversations, leave out the column of the prompt"):
        converted(write(tmp_path, [row]), "preferences")


@pytest.mark.parametrize("spell", [str, json.dumps, lambda turns: json.dumps(json.dumps(turns))[1:-1]])
@pytest.mark.parametrize("column", ["prompt", "chosen", "completion"])
def test_messages_that_were_made_text_are_not_trained_on(tmp_path, spell, column):
    kind = "demonstrations" if column == "completion" else "preferences"
    good = {"prompt": "Good?", "completion": "good"} if column == "completion" else GOOD_PAIR
    spelled = spell(ASK if column == "prompt" else [*ASK, assistant("good")])
    rows, report = converted(write(tmp_path, [good, {**good, column: spelled}]), kind)
    assert len(rows) == 1 and report.drops() == {"messages written as text": 1}
    text = "[the role: content of] a list"
    rows, report = converted(write(tmp_path, [{**good, column: text}]), kind)
    assert len(rows) == 1 and not report.dropped


@pytest.mark.parametrize(("column", "prompt"), [("preference", "instruction"), ("label", "input")])
def test_verdicts_0_and_1_are_not_taken_for_1_and_2(tmp_path, column, prompt):
    """The mapping that the message proposes reads them: 0 names the first answer."""
    rows = [{prompt: f"Good {n}?", "output_1": "first", "output_2": "second", column: verdict} for n, verdict in enumerate((0, 1, 1, 0))]
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match=f"`{column}` is 0 or 1, wanted 1") as failure:
        convert(path, "preferences")
    assert f"{{prompt: {prompt}, response_0: output_1, response_1: output_2, better_response_id: {column}}}" in str(failure.value)
    mapping = {"prompt": prompt, "response_0": "output_1", "response_1": "output_2", "better_response_id": column}
    made, _ = converted(path, "preferences", mapping)
    assert [row["completions"][row["ranks"].index(1)] for row in made] == ["first", "second", "second", "first"]
    name = recognise([{**rows[0], column: 1}], "preferences").name
    assert len(converted(path, "preferences", {"format": name}, keep_ties=True)[0]) == (4 if column == "preference" else 2)
    rows[0][column] = 2
    assert converted(write(tmp_path, rows), "preferences")[1].made


@pytest.mark.parametrize("word", ["response_a", "answer_b", "Output_A"])
def test_a_verdict_may_name_the_column(tmp_path, word):
    rows, _ = converted(write(tmp_path, [{"prompt": "Good?", "response_a": "a", "response_b": "b", "winner": word}]), "preferences")
    assert rows[0]["ranks"] == ([1, 2] if word.lower().endswith("a") else [2, 1])


def test_what_was_met_and_what_is_wanted_is_said_of_verdicts_and_roles(tmp_path):
    with pytest.raises(InputError, match=r"unknown verdict 1 \('mine'\); a verdict is a or b"):
        converted(write(tmp_path, [{**GOOD_TULU, "preference": "mine"}]), "preferences")
    with pytest.raises(InputError, match=r"unknown role 1 \('tool'\); a role is system, user"):
        converted(write(tmp_path, [{"messages": [{"role": "tool", "content": "x"}, assistant("good")]}]), "demonstrations")


def test_columns_that_a_schema_does_not_read_are_named(tmp_path):
    rows = [{**GOOD_PAIR, "id": 7, "margin": 0.5, "note": None if n else "seen by two people"} for n in range(2)]
    rows, report = converted(write(tmp_path, rows), "preferences")
    assert report.unread == {"id": False, "note": True} and report.describe().endswith("; not read: id, note")
    assert report.as_json()["columns_not_read"] == ["id", "note"]
    for sample in (GOOD_HH, GOOD_TULU, GOOD_RANKED):
        assert not converted(write(tmp_path, [sample]), "preferences")[1].unread


def test_a_quote_that_is_not_closed_costs_every_line_it_takes_along(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\na,b,c\nd,"e,f\ng,h,i\nj,k,l\n', encoding="utf-8")
    rows, report = converted(str(path), "preferences")
    assert [row["source"] for row in rows] == [f"{path}:2"] and report.read == 4
    assert report.dropped == {"malformed CSV": {str(path): [3, 4, 5]}}
    path.write_text('prompt,chosen,rejected\na,"b\nb"x,c\nd,e,f\n', encoding="utf-8")
    rows, report = converted(str(path), "preferences")
    assert [row["source"] for row in rows] == [f"{path}:4"] and report.dropped == {"malformed CSV": {str(path): [2, 3]}}


@pytest.mark.parametrize("text", ["sep=;\nprompt;chosen;rejected\nGood?;good;bad\n", "prompt;chosen;rejected;;\nGood?;good;bad;;\n",
                                  ",prompt,chosen,rejected\n0,Good?,good,bad\n", " prompt , chosen , rejected \nGood?,good,bad\n"])
def test_tables_as_spreadsheets_and_pandas_write_them(tmp_path, text):
    (tmp_path / "rows.csv").write_text(text, encoding="utf-8")
    rows, _ = converted(str(tmp_path / "rows.csv"), "preferences")
    assert [bare(row) for row in rows] == [{"prompt": [user("Good?")], "completions": ["good", "bad"], "ranks": [1, 2]}]
    assert rows[0]["source"].endswith(":3" if text.startswith("sep") else ":2")


def test_a_date_that_python_cannot_tell_ends_with_the_file_named(tmp_path):
    table = pyarrow.table({"prompt": ["Good?"], "chosen": ["good"], "rejected": ["bad"],
                           "at": pyarrow.array([2**60], pyarrow.timestamp("ms"))})
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="rows.parquet: not readable as Parquet"):
        converted(str(tmp_path / "rows.parquet"), "preferences")


def test_a_source_may_begin_with_the_home_folder_and_nobodys_home_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, [{"prompt": "Hi?", "completion": "Ho."}])
    assert len(list(read_rows("~/rows.jsonl"))) == 1
    with pytest.raises(InputError, match="~nobody-of-this-name/rows.jsonl"):
        list(read_rows("~nobody-of-this-name/rows.jsonl"))


@pytest.mark.parametrize(("kind", "row", "wanted"), [
    ("preferences", {"prompt": None, "question": "Hi?", "chosen": "good", "rejected": "bad"}, PAIR),
    ("preferences", {"prompt": "Hi?", "response_a": None, "response_b": None, "answer_a": "good", "answer_b": "bad", "winner": "a"}, PAIR),
    ("preferences", {"prompt": "Hi?", "completion_a": "bad", "completion_b": "good", "preference": None, "winner": "b"}, PAIR_TURNED),
    ("preferences", {"prompt": "Hi?", "completions": None, "responses": ["good", "bad"], "ranks": [1, 2]}, PAIR),
    ("demonstrations", {"prompt": None, "instruction": "Hi?", "completion": None, "output": "good"}, {"prompt": ASK, "completion": "good"}),
    ("demonstrations", {"prompt": "", "question": "Hi?", "response": "", "answer": "good"}, {"prompt": ASK, "completion": "good"}),
    ("demonstrations", {"messages": None, "conversations": [*ASK, assistant("good")]}, {"prompt": ASK, "completion": "good"}),
    ("demonstrations", {"messages": [{"role": None, "content": None, "from": "human", "value": "Hi?"},
                                     {"role": "assistant", "content": "good", "from": None, "value": None}]}, {"prompt": ASK, "completion": "good"}),
    ("prompts", {"prompt": None, "query": "Hi?"}, {"prompt": ASK}),
])
def test_a_column_without_a_value_gives_way_to_one_of_its_other_names(tmp_path, kind, row, wanted):
    """Sources with columns of their own, stacked by pandas or in one Parquet file: each row has null under the others' names."""
    rows, report = converted(write(tmp_path, [row]), kind)
    assert [bare(made) for made in rows] == [wanted] and not report.dropped


THREE = [GOOD_PAIR, {}, GOOD_PAIR]
SHARING = [json.dumps(THREE), json.dumps({"data": THREE}), " ".join(map(json.dumps, THREE))]


@pytest.mark.parametrize("content", SHARING)
def test_rows_that_share_a_line_are_named_by_their_numbers(tmp_path, content):
    path = tmp_path / "rows.json"
    path.write_text(content)
    rows, report = converted(str(path), "preferences")
    assert [row["source"] for row in rows] == [f"{path}:1", f"{path}:3"] and report.dropped == {"no prompt": {str(path): [2]}}
    path.write_text(json.dumps([{}, GOOD_PAIR, GOOD_PAIR], indent=1))  # the rows begin on lines 2, 3 and 8
    assert [row["source"] for row in converted(str(path), "preferences")[0]] == [f"{path}:3", f"{path}:8"]


@pytest.mark.parametrize(("name", "content", "place"), [
    ("rows.json", json.dumps([{**GOOD_PAIR, "chosen": ""}] * 2).encode(), "row 1"),
    ("rows.json", json.dumps([{**GOOD_PAIR, "chosen": ""}]).encode(), "line 1"),
    ("rows.json", json.dumps([{**GOOD_PAIR, "chosen": ""}] * 2, indent=1).encode(), "line 2"), ("rows.jsonl", b'{"prompt": ""}', "line 1"),
    ("rows.parquet", None, "row 1")])
def test_the_number_of_a_row_is_not_called_a_line(tmp_path, name, content, place):
    path = tmp_path / name
    if content is None:
        parquet.write_table(pyarrow.Table.from_pylist([{**GOOD_PAIR, "chosen": ""}] * 2), path)
    else:
        path.write_bytes(content)
    with pytest.raises(InputError, match=f"{name}: {place}: none of the"):
        converted(str(path), "prompts" if name.endswith("l") else "preferences")


PANDAS = {
    "columns": {"prompt": {"0": "Good?", "1": "Bad?"}, "chosen": {"0": "a", "1": "c"}, "rejected": {"0": "b", "1": "d"}},
    "index": {"0": {"prompt": "Good?", "completion": "good"}, "1": {"prompt": "Bad?", "completion": "bad"}},
    "split": {"columns": ["prompt"], "index": [0, 1], "data": [["Good?"], ["Bad?"]]},
}


@pytest.mark.parametrize("orient", PANDAS)
@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_table_that_pandas_wrote_as_one_object_is_refused_with_the_remedy(tmp_path, orient, name, kind):
    (tmp_path / name).write_text(json.dumps(PANDAS[orient], indent=1 if name == "rows.json" else None))
    with pytest.raises(InputError, match=r"line 1: not one row .*pandas.*to_json.*orient=\"records\", lines=True"):
        converted(str(tmp_path / name), kind)


def test_a_row_of_objects_is_no_table_of_pandas(tmp_path):
    rows = [{"prompt": ASK[0], "completion": assistant("good")}]
    assert len(converted(write(tmp_path, rows), "demonstrations")[0]) == 1


@pytest.mark.parametrize("name", ["answer", "response", "output", "completion"])
@pytest.mark.parametrize(("winner", "ranks"), [("1", [1, 2]), (2, [2, 1]), ("2.0", [2, 1]), ("NAME_1", [1, 2]), ("Name_2", [2, 1]),
                                               ("second", [2, 1]), ("tie", [1, 1])])
def test_numbered_answers_with_a_winner_are_a_verdict(tmp_path, name, winner, ranks):
    winner = winner.replace("NAME", name).replace("Name", name.title()) if isinstance(winner, str) else winner
    row = {"question": "Hi?", f"{name}_1": "one", f"{name}_2": "two", "winner": winner}
    rows, report = converted(write(tmp_path, [row]), "preferences", keep_ties=True)
    assert bare(rows[0]) == {"prompt": ASK, "completions": ["one", "two"], "ranks": ranks} and not report.unread


def test_a_third_answer_beside_two_is_not_lost_in_silence(tmp_path):
    row = {"question": "Hi?", "answer_1": "one", "answer_2": "two", "winner": 1}
    for third in ("answer_3", "answer_0"):
        with pytest.raises(InputError, match="no schema for preferences"):
            converted(write(tmp_path, [{**row, third: "three"}]), "preferences")


def test_a_winner_by_the_numbers_0_and_1_is_not_taken_for_1_and_2(tmp_path):
    rows = [{"question": f"Good {n}?", "answer_1": "first", "answer_2": "second", "winner": verdict} for n, verdict in enumerate((0, 1, 1, 0))]
    path = write(tmp_path, rows)
    with pytest.raises(InputError, match="`winner` is 0 or 1, wanted 1") as failure:
        convert(path, "preferences")
    assert "{prompt: question, response_0: answer_1, response_1: answer_2, better_response_id: winner}" in str(failure.value)
    mapping = {"prompt": "question", "response_0": "answer_1", "response_1": "answer_2", "better_response_id": "winner"}
    made, _ = converted(path, "preferences", mapping)
    assert [row["completions"][row["ranks"].index(1)] for row in made] == ["first", "second", "second", "first"]


def test_a_winner_that_names_a_column_which_the_mapping_renamed_is_not_guessed_at(tmp_path):
    path = write(tmp_path, [{"question": "Hi?", "answer_1": "one", "answer_2": "two", "winner": "answer_1"}])
    with pytest.raises(InputError, match="unknown verdict 1"):
        converted(path, "preferences", {"completion_a": "answer_2", "completion_b": "answer_1"})


@pytest.mark.parametrize("name", ["rows.csv", "rows.tsv"])
@pytest.mark.parametrize("content", [b"prompt,chosen,rejected\rGood?,good,bad\r", b"prompt,chosen,rejected\rGood?,\"go\nod\",bad\r"])
def test_a_table_of_lines_that_end_with_cr_alone_is_refused_with_the_remedy(tmp_path, name, content):
    (tmp_path / name).write_bytes(content.replace(b",", b"\t") if name.endswith("tsv") else content)
    with pytest.raises(InputError, match=f"{name}: its lines end with CR alone.*save it again with LF or CRLF"):
        converted(str(tmp_path / name), "preferences")


@pytest.mark.parametrize("content", [{"data": [GOOD_PAIR] * 40_000}, {"text": "x" * 3_000_000}])
def test_an_object_beyond_the_limit_is_not_called_malformed(tmp_path, monkeypatch, content):
    monkeypatch.setattr("rlhf.data.reading.MAX_LINE_BYTES", 2**20)
    (tmp_path / "rows.json").write_text("\n" + json.dumps(content, indent=0))
    with pytest.raises(InputError, match=r"line 2: one object of over 1 MiB; wanted one array of objects, without an object around it, or .jsonl"):
        converted(str(tmp_path / "rows.json"), "preferences")
