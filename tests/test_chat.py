"""`rlhf chat`: what it prints, how it ends, and that nothing a model says can command the terminal."""

import io
import json
import shutil
import subprocess
import sys

import pytest

import rlhf.models
from rlhf import chat
from rlhf.chat import Speaker, cells, find_model, layout, printable, wrapped
from rlhf.errors import InputError
from rlhf.jsonl import write_jsonl
from tests.helpers import greedy


@pytest.fixture
def run_folder(tiny_folder, tmp_path):
    """A run whose sft and ppo stages left the same tiny model."""
    for stage in ("sft", "ppo"):
        shutil.copytree(tiny_folder, tmp_path / "run" / stage / "model")
    return tmp_path / "run"


def talk(monkeypatch, capsys, lines: str, *options: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    code = chat.main([*options, "--max-tokens", "6"])
    return code, *capsys.readouterr()


def test_a_pipe_gets_one_answer_a_line_and_nothing_else(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(Speaker, "answer", lambda self, text, *rest: f"you said {text}")
    code, out, err = talk(monkeypatch, capsys, "one\n\ntwo\n/quit\nthree\n", "--run", str(run_folder))
    assert (code, out, err) == (0, "you said one\nyou said two\n", "")


def test_two_models_are_asked_the_same(run_folder, monkeypatch, capsys):
    monkeypatch.setattr(Speaker, "answer", lambda self, text, *rest: f"you said {text}")
    _, out, _ = talk(monkeypatch, capsys, "one\n", "--run", str(run_folder), "--model", "sft", "--against", "ppo")
    assert out == "sft: you said one\nppo: you said one\n"


def test_the_same_seed_gives_the_same_answers(run_folder, monkeypatch, capsys):
    said = [talk(monkeypatch, capsys, "hello\nhello again\n", "--run", str(run_folder), "--seed", seed)[1] for seed in ("3", "3", "4")]
    assert said[0] == said[1] != said[2]


def test_S1_the_temperature_asked_for_is_the_one_of_the_answers(run_folder, tiny_folder, monkeypatch, capsys):
    speaker = Speaker("x", str(tiny_folder), keeps_history=False)
    likeliest = greedy(speaker.policy, speaker.encoder, speaker.encoder.prompt_ids([{"role": "user", "content": "hello"}]), 6)
    said = [talk(monkeypatch, capsys, "hello\n", "--run", str(run_folder), "--temperature", t)[1] for t in ("0.001", "1", "2")]
    assert said[0].removesuffix("\n").removesuffix(" [...]") == printable(speaker.encoder.decode(likeliest)) and len(set(said)) == 3


@pytest.mark.parametrize("asked", [False, True])
def test_code_that_comes_with_a_model_is_run_only_when_the_person_asks(run_folder, monkeypatch, capsys, asked):
    """A run folder may be somebody else's: what its config.yaml says of model.trust_remote_code is not a word of this person."""
    plain, trusted = rlhf.models._load, []

    def note(auto_class, source, **settings):
        trusted.append(settings["trust_remote_code"])
        return plain(auto_class, source, **settings)

    monkeypatch.setattr(rlhf.models, "_load", note)
    (run_folder / "ppo" / "config.yaml").write_text("model:\n  trust_remote_code: true\n")
    code, _, _ = talk(monkeypatch, capsys, "hello\n", "--run", str(run_folder), *["--trust-remote-code"] * asked)
    assert code == 0 and set(trusted) == {asked}


def test_history_is_kept_and_forgotten(tiny_folder):
    speaker = Speaker("x", str(tiny_folder), keeps_history=True)
    speaker.answer("first", 4, 1.0, 1)
    speaker.answer("second", 4, 1.0, 2)
    assert [m["role"] for m in speaker.messages] == ["user", "assistant", "user", "assistant"]
    assert [m["content"] for m in speaker.messages][::2] == ["first", "second"]
    forgetful = Speaker("x", str(tiny_folder), keeps_history=False)
    forgetful.answer("first", 4, 1.0, 1)
    assert forgetful.messages == []


def test_reset_forgets(run_folder, monkeypatch, capsys):
    fresh = talk(monkeypatch, capsys, "a\nb\n", "--run", str(run_folder), "--history", "none")[1].splitlines()
    reset = talk(monkeypatch, capsys, "a\n/reset\nb\n", "--run", str(run_folder), "--history", "keep")[1].splitlines()
    kept = talk(monkeypatch, capsys, "a\nb\n", "--run", str(run_folder), "--history", "keep")[1].splitlines()
    assert fresh == reset != kept


def test_an_unknown_command_is_told_and_a_message_may_begin_with_a_slash(run_folder, tiny_folder, monkeypatch, capsys):
    monkeypatch.setattr(Speaker, "answer", lambda self, text, *rest: f"you said {text}")
    code, out, err = talk(monkeypatch, capsys, "//hi there\n/hlep me\nafter\n", "--run", str(run_folder))
    assert (code, out) == (2, "you said /hi there\n")
    assert "/hlep: no such command, wanted /reset, /quit or /help" in err and "//hlep" in err
    lines = iter(["/hlep me", "/reset now", "/help", "//", "after"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/quit"))
    speaker = Speaker("x", str(tiny_folder), keeps_history=True)
    assert list(chat._turns([speaker], typed=True)) == ["/", "after"]
    out = capsys.readouterr().out
    assert out.startswith("/hlep: no such command") and out.count("no such command") == out.count("forgotten") == out.count(chat.HELP) == 1


def test_a_run_of_single_questions_starts_every_question_anew(run_folder):
    assert not chat._single_questions(run_folder), "nothing is known without demonstrations"
    file = run_folder / "data" / "demonstrations" / "train.jsonl"
    question = {"role": "user", "content": "What is red?"}
    write_jsonl(file, [{"prompt": [question], "completion": "A colour."}] * 3)
    assert chat._single_questions(run_folder)
    turns = [question, {"role": "assistant", "content": "A colour."}, question]
    write_jsonl(file, [{"prompt": [question], "completion": "x"}, {"prompt": turns, "completion": "y"}])
    assert not chat._single_questions(run_folder)


def test_oldest_turns_leave_first_when_the_context_is_full(tiny_folder):
    speaker = Speaker("x", str(tiny_folder), keeps_history=True)
    turns = [{"role": role, "content": f"{role} {n} " + "word " * 10} for n in range(6) for role in ("user", "assistant")]
    messages, prompt = speaker._fitting([*turns, {"role": "user", "content": "last"}], room=100)
    assert 0 < len(prompt) <= speaker.context - 100
    assert messages[-1]["content"] == "last" and messages[0]["role"] == "user" and 2 < len(messages) < 13
    assert messages[:-1] == turns[-(len(messages) - 1):], "the newest remain, in order"


def test_a_message_longer_than_the_context_is_refused(run_folder, monkeypatch, capsys):
    code, out, err = talk(monkeypatch, capsys, "x " * 2000 + "\n", "--run", str(run_folder))
    assert (code, out) == (2, "") and "256 at most" in err


def test_a_missing_model_names_the_command_that_makes_it(tmp_path, run_folder, monkeypatch, capsys):
    code, _, err = talk(monkeypatch, capsys, "", "--run", str(tmp_path / "none"))
    assert code == 2 and "rlhf pipeline run.dir=" in err
    shutil.rmtree(run_folder / "ppo")
    code, _, err = talk(monkeypatch, capsys, "", "--run", str(run_folder), "--model", "ppo")
    assert code == 2 and f"rlhf ppo run.dir={run_folder}" in err
    code, _, err = talk(monkeypatch, capsys, "", "--run", str(run_folder), "--model", "nonsense")
    assert code == 2 and "sft" in err


def test_models_are_found_by_stage_folder_and_stage_folder(run_folder, tiny_folder):
    assert find_model(None, run_folder) == ("ppo", str(run_folder / "ppo" / "model"))
    assert find_model("sft", run_folder) == ("sft", str(run_folder / "sft" / "model"))
    shutil.copytree(tiny_folder, run_folder / "ppo" / "best")
    assert find_model("ppo/best", run_folder) == ("best", str(run_folder / "ppo" / "best"))
    assert find_model(str(run_folder / "sft"), run_folder) == ("sft", str(run_folder / "sft" / "model"))
    assert find_model(str(tiny_folder), run_folder)[1] == str(tiny_folder)
    assert find_model("OWNER/NAME", run_folder) == ("OWNER/NAME", "OWNER/NAME")


def test_pretrained_is_found_where_the_run_says(run_folder):
    (run_folder / "sft" / "config.yaml").write_text("model: {init: OWNER/NAME}\n", encoding="utf-8")
    assert find_model("pretrained", run_folder) == ("pretrained", "OWNER/NAME")
    shutil.copytree(run_folder / "sft" / "model", run_folder / "pretrain" / "model")
    assert find_model("pretrained", run_folder) == ("pretrained", str(run_folder / "pretrain" / "model"))


def test_a_reward_model_is_refused(run_folder):
    shutil.copytree(run_folder / "sft" / "model", run_folder / "reward" / "model")
    config = run_folder / "reward" / "model" / "config.json"
    settings = json.loads(config.read_text(encoding="utf-8")) | {"architectures": ["GPT2ForSequenceClassification"]}
    config.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(InputError, match="scores answers"):
        find_model("reward", run_folder)


@pytest.mark.parametrize(("option", "value"), [("--temperature", "0"), ("--temperature", "nan"), ("--max-tokens", "0"), ("--max-tokens", "many")])
def test_numbers_out_of_range_are_refused(option, value, capsys):
    with pytest.raises(SystemExit) as ending:
        chat.main([option, value])
    assert ending.value.code == 2 and "wanted a number from" in capsys.readouterr().err


def test_ctrl_c_ends_with_130_and_no_traceback(run_folder, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(Speaker, "answer", interrupted)
    code, _, err = talk(monkeypatch, capsys, "hello\n", "--run", str(run_folder))
    assert (code, err) == (130, "")


def test_a_typed_question_that_is_stopped_is_forgotten(tiny_folder, monkeypatch, capsys):
    speaker = Speaker("x", str(tiny_folder), keeps_history=True)
    speaker.answer("first", 4, 1.0, 1)
    before = speaker.messages

    def half_way(self, text, *rest):
        self.messages = []
        raise KeyboardInterrupt
    monkeypatch.setattr(Speaker, "answer", half_way)
    assert chat._answers([speaker], "second", chat.parser().parse_args([]), 1, typed=True) is None
    assert speaker.messages == before
    assert "Stopped" in capsys.readouterr().out


@pytest.mark.parametrize(("said", "shown"), [
    ("plain 你好\n\ttext", "plain 你好\n\ttext"),
    ("\x1b[31mred\x1b[0m", "red"),
    ("\x1b[2J\x1b[Hgone", "gone"),
    ("\x1b]0;title\x07after", "after"),
    ("\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "link"),
    ("\x1b]52;c;cGFzdGU=", ""),
    ("\x9b31mred", "red"),
    ("\x1bcreset\x1b", "reset"),
    ("a\rb\x08\x7f\x00c\r\n", "abc\n"),
    ("\u202eabc\u2066", "abc"),
])
def test_control_sequences_are_stripped(said, shown):
    assert printable(said) == shown


def test_wrapping_counts_columns():
    assert wrapped("one two three", 7) == ["one two", "three"]
    assert wrapped("你好你好你好", 4) == ["你好", "你好", "你好"]
    assert wrapped("abcdefgh ij", 3) == ["abc", "def", "gh", "ij"]
    assert wrapped("a\n\nb", 9) == ["a", "", "b"]
    assert cells("e\u0301你") == 3


def test_two_answers_stand_side_by_side_only_where_there_is_room():
    answers = [("sft", "你好 " * 30), ("ppo", "short")]
    wide, narrow = layout(answers, 83).splitlines(), layout(answers, 60).splitlines()
    assert wide[0].split() == ["sft", "|", "ppo"] and wide[2].endswith("| short")
    bars = {cells(line[: line.index("|")]) for line in wide}
    assert bars == {41} and max(map(cells, wide)) <= 83
    assert narrow[0].startswith("sft: ") and narrow[-1] == "ppo: short" and max(map(cells, narrow)) <= 60


def test_the_command_answers_a_pipe(run_folder):
    """Through `python -m rlhf`, as a person runs it, with bytes that are no text among the question."""
    done = subprocess.run([sys.executable, "-m", "rlhf", "chat", "--run", str(run_folder), "--against", "sft", "--max-tokens", "5"],
                          input=b"What is \xff red?\n", capture_output=True, timeout=120)
    lines = done.stdout.decode().splitlines()
    assert done.returncode == 0, done.stderr.decode()
    assert lines[0].startswith("ppo: ") and any(line.startswith("sft: ") for line in lines)
    assert b"\x1b" not in done.stdout
