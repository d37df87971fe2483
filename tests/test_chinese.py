"""Chinese, byte for byte: through prepare, tokenizer, template, sampling, report and terminal; and no half characters where a limit cuts one."""

import gzip
import io
import json
import random
import sys

import pytest

from rlhf import chat
from rlhf.chat import Speaker, wrapped
from rlhf.comparison import distinct_n, summarise
from rlhf.config import config_from_tree
from rlhf.data.check_page import _pieces
from rlhf.encoding import ASSISTANT, USER, Encoder
from rlhf.jsonl import read_jsonl
from rlhf.models import new_gpt, save_model, train_tokenizer
from rlhf.report import write_report
from rlhf.terminal import cells, printable
from stages import prepare
from tests.test_report import POLICIES, make_answer

# Simplified and traditional characters, full-width signs and space, one beyond the basic plane (four bytes), an emoji, Latin and digits between.
QUESTIONS = ["怎样泡一壶好茶？", "請列出三種水果，並說明理由。", "“学而时习之”是什么意思？", "用一句话介绍　北京", "𠮷野家卖什么？🙂",
             "3 加 5 等于多少（写出 GPT 式的步骤）"]
GOOD = ["先把水烧到九十度，再放茶叶；两分钟以后就能喝了。", "一、蘋果；二、香蕉；三、橙子。\n它們都很甜……", "意思是：学了以后要常常温习。",
        "北京是中国的首都，有三千多年的历史。", "卖牛肉饭——很便宜。🍚", "３＋５＝８，所以答案是 8。"]
BAD = ["不知道。", "水果。", "意思？", "北京好。", "饭。", "9"]
ALL = QUESTIONS + GOOD + BAD
ENCODER = Encoder(train_tokenizer(ALL * 5, 500))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model that has learned nothing, so that the tokens it samples are any bytes."""
    found = tmp_path_factory.mktemp("chinese") / "model"
    save_model(new_gpt("nano", ENCODER, 128, "eager"), ENCODER, found)
    return found


def test_prepare_writes_the_same_characters(tmp_path):
    rows = [{"instruction": f"{q}{n}", "input": "", "output": [g, b], "history": []} for n in range(30) for q, g, b in zip(QUESTIONS, GOOD, BAD)]
    escaped = json.dumps(rows[0]) + "\n"  # \uXXXX, surrogate pairs too, mean the same as the characters themselves
    file = tmp_path / "偏好.jsonl.gz"
    file.write_bytes(gzip.compress((escaped + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[1:])).encode()))
    run = tmp_path / "运行"
    prepare.main(config_from_tree({"run": {"dir": str(run), "threads": 1}, "data": {"preferences": [str(file)]}}, "test"))
    made = {kind: [row for split in ("train", "eval", "test") for row in read_jsonl(run / "data" / kind / f"{split}.jsonl")]
            for kind in ("preferences", "demonstrations", "prompts", "text")}
    wanted = {row["instruction"]: row["output"] for row in rows}
    assert {row["prompt"][0]["content"]: row["completions"] for row in made["preferences"]} == wanted
    assert {row["prompt"][0]["content"]: row["completion"] for row in made["demonstrations"]} == {q: o[0] for q, o in wanted.items()}
    assert {row["prompt"][0]["content"] for row in made["prompts"]} == set(wanted)
    assert {row["text"] for row in made["text"]} == {f"{q}\n\n{o[0]}" for q, o in wanted.items()}
    raw = b"".join((run / "data" / "demonstrations" / f"{split}.jsonl").read_bytes() for split in ("train", "eval", "test"))
    assert "𠮷野家卖什么？🙂0".encode() in raw and b"\\u" not in raw  # the bytes themselves, readable in any editor


@pytest.mark.parametrize("text", ALL)
def test_tokenizer_and_template_give_back_every_byte(text):
    assert ENCODER.decode(ENCODER.completion_ids(text)) == text
    ids = ENCODER.prompt_ids([{"role": "user", "content": text}])
    assert ENCODER.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == f"{USER}{text}{ASSISTANT}"
    assert "".join(piece for piece, _ in _pieces(ENCODER, ids)) == f"{USER}{text}{ASSISTANT}"  # what the page of the data check shows


def test_ids_cut_anywhere_decode_to_whole_characters_and_at_most_one_mark_of_loss():
    """A limit of tokens may cut a character: what is left of it shows as U+FFFD, and nothing before it changes."""
    cut = 0
    for text in ALL:
        ids = ENCODER.completion_ids(text)
        for end in range(len(ids)):
            said = ENCODER.decode(ids[:end])
            assert text.startswith(said.rstrip("\ufffd")) and len(said) - len(said.rstrip("\ufffd")) <= 1
            cut += said.endswith("\ufffd")
    assert cut > 10  # otherwise this test would show nothing


def test_any_ids_decode_to_text_that_can_be_written():
    rng = random.Random(1)
    for _ in range(200):
        ENCODER.decode([rng.randrange(len(ENCODER.tokenizer)) for _ in range(20)]).encode()


def test_an_answer_cut_inside_a_character_is_said_without_it(folder, monkeypatch):
    whole = ENCODER.text_ids("茶𠮷")
    parts = next(whole[:end] for end in range(len(whole), 0, -1) if ENCODER.decode(whole[:end]).endswith("\ufffd"))
    speaker = Speaker("x", str(folder), keeps_history=True)
    monkeypatch.setattr(chat, "sample", lambda *args: [parts])
    assert speaker.answer(QUESTIONS[0], 8, 1.0, 1) == "茶 [...]"
    assert speaker.messages[-1]["content"] == "茶"
    monkeypatch.setattr(chat, "sample", lambda *args: [ENCODER.completion_ids("茶\ufffd")])  # it ended there itself: nothing was cut
    assert speaker.answer(QUESTIONS[0], 8, 1.0, 1) == "茶\ufffd"


def test_a_chat_of_sampled_bytes_prints_text(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUESTIONS) + "\n"))
    assert chat.main(["--model", str(folder), "--max-tokens", "12"]) == 0
    out, err = capsys.readouterr()
    assert out.encode() and err == ""


def test_the_terminal_shows_all_of_it():
    for text in ALL:
        assert printable(text) == text
        lines = wrapped(text, 10)
        assert "".join(lines).replace(" ", "") == text.replace("\n", "").replace(" ", "")
        assert max(map(cells, lines)) <= 10


def test_the_report_shows_the_characters_and_counts_them_singly(tmp_path):
    rng = random.Random(1)
    samples = []
    for place, question in enumerate(QUESTIONS):
        answers = {policy: {**make_answer(rng, policy, False), "text": (BAD if policy == "pretrained" else GOOD)[place]} for policy in POLICIES}
        samples.append({"prompt": [{"role": "user", "content": question}], "family": None, "id": f"{place:04d}", "answers": answers})
    write_report(tmp_path, summarise(samples, "judge", POLICIES), samples, {}, "中文")
    page, plain = (tmp_path / "report.html").read_text(encoding="utf-8"), (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in QUESTIONS + GOOD:
        assert text in plain and text.replace("'", "&#39;") in page
    assert '<meta charset="utf-8">' in page
    assert distinct_n(["很好很好"], 2) == 2 / 3  # 很好, 好很, 很好: words are characters
