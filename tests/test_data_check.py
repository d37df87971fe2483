"""`rlhf data check`: what it finds in files with known faults, how it ends, and that nothing in a file is obeyed or run."""

import gzip
import itertools
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from rlhf import cli
from rlhf.data import check, duplicates
from rlhf.data.converting import Report
from rlhf.data.duplicates import Signatures, contradictions, near_duplicates, repeated, row_key, signature, verdict_key
from rlhf.data.facts import Facts, Finding, Limits, Ruler, left_out, quantiles, shared_prompts, warnings_of
from rlhf.data.shortcuts import Pair, accuracy, bag_of_words, longer_wins, words_learned
from rlhf.data.splits import text_id
from rlhf.data.wording import script_of, words_of
from rlhf.rankings import encode_rankings

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"  # beside this repository
NOUNS = ["apple", "boat", "candle", "door", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle", "ladder"]
ATTACK = "</div><script>document.title='run'</script><img src=x onerror=alert(1)>"


def clean_rows(n=120, seed=1):
    """Preferences without a fault: every prompt once, both answers of equal length and of words drawn alike, so that no shortcut works."""
    rng = random.Random(seed)
    names = list(itertools.product(NOUNS, NOUNS))
    rng.shuffle(names)
    return [{"prompt": f"Tell me about the {a} and the {b}, please.", "chosen": " ".join(rng.choices(NOUNS, k=8)),
             "rejected": " ".join(rng.choices(NOUNS, k=8))} for a, b in names[:n]]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(autouse=True)
def working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")


def facts_of(path, kind=None, most=None, limits=None):
    return check.look_at(str(path), kind, None, Ruler(), limits or Limits(), most)


def run(capsys, *words):
    code = cli.main(["data", "check", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_row_of_more_than_65536_files_has_its_place():
    facts = Facts("folder", Report("folder", "text"), Ruler(), Limits())
    files = 2**16 + 1
    for number in range(files):
        facts._remember_place(f"folder/{number}.txt:1")
    assert facts.place(0) == "folder/0.txt:1" and facts.place(files - 1) == "folder/65536.txt:1"


# --- how it ends --------------------------------------------------------------------------------------------------------------------


def test_a_clean_file_ends_with_0_and_leaves_the_page(tmp_path, capsys):
    code, out, err = run(capsys, write(tmp_path / "mine.jsonl", clean_rows()))
    assert (code, err) == (0, "")
    assert "Nothing to warn of" in out and "report: data-check/report.html" in out
    assert (tmp_path / "data-check" / "report.html").is_file()
    assert {p.name for p in tmp_path.iterdir()} == {"mine.jsonl", "data-check"}


def test_warnings_end_with_1_and_carry_a_remedy(tmp_path, capsys):
    code, out, _ = run(capsys, write(tmp_path / "mine.jsonl", clean_rows(20)))
    assert code == 1 and "Usable, with 1 warning." in out
    assert len(re.findall(r"^warning: ", out, re.M)) == len(re.findall(r"^  remedy: \w", out, re.M)) == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("empty.jsonl", "", "the file is empty"),
        ("broken.jsonl", "{]\n{]\n", "malformed JSON"),
        ("columns.jsonl", '{"colour": "red"}\n', "Columns found: colour"),
        ("same.jsonl", '{"prompt": "a", "chosen": "b", "rejected": "b"}\n', "chosen equals rejected"),
    ],
)
def test_a_file_that_cannot_be_used_ends_with_2_and_one_message(tmp_path, capsys, name, content, said):
    (tmp_path / name).write_text(content, encoding="utf-8")
    code, out, err = run(capsys, tmp_path / name)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and name in err and said in err and "Traceback" not in err


def test_a_missing_file_is_named_once(capsys):
    code, _, err = run(capsys, "none/here.jsonl")
    assert code == 2 and err.count("none/here.jsonl") == 1 and "no such file" in err


def test_a_wrong_tokenizer_is_named(tmp_path, capsys):
    code, _, err = run(capsys, write(tmp_path / "mine.jsonl", clean_rows(20)), "--tokenizer", tmp_path)
    assert code == 2 and f"--tokenizer {tmp_path}" in err and "counted in words" in err


def test_a_mapping_names_columns(tmp_path, capsys):
    rows = [{"prompt": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in clean_rows()]
    path = write(tmp_path / "mine.jsonl", rows)
    assert run(capsys, path, "--kind", "preferences")[0] == 2
    assert run(capsys, path, "--mapping", "chosen=good", "--mapping", "rejected=bad")[0] == 0
    code, _, err = run(capsys, path, "--mapping", "chosen")
    assert code == 2 and "WANTED=FOUND" in err


# --- what a file is -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preferences"),
        ({"prompt": "a", "completions": ["b", "c"], "ranks": [2, 1]}, "preferences"),
        ({"instruction": "a", "output": "b"}, "demonstrations"),
        ({"prompt": "a"}, "prompts"),
        ({"text": "a"}, "text"),
    ],
)
def test_the_kind_is_recognised(tmp_path, row, kind):
    assert facts_of(write(tmp_path / "mine.jsonl", [row])).kind == kind


def test_a_kind_can_be_asked_for(tmp_path):
    facts = facts_of(write(tmp_path / "mine.jsonl", clean_rows(5)), kind="prompts")
    assert (facts.kind, facts.rows, facts.pairs) == ("prompts", 5, 0)
    assert set(facts.lengths) == {"prompt"}


def test_rows_stop_the_reading(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", clean_rows(50))
    facts = facts_of(path, most=7)
    assert (facts.rows, facts.read, facts.stopped_early) == (7, 7, True)
    assert (facts_of(path, most=50).read, facts_of(path, most=50).stopped_early) == (50, False)
    assert "7 read (stopped there, --rows)" in run(capsys, path, "--rows", "7")[1]


def test_figures_of_a_small_file_by_hand(tmp_path):
    rows = [
        {"prompt": "What is red?", "chosen": "A colour it is.", "rejected": "No."},
        {"prompt": "What is blue?", "chosen": "A colour.", "rejected": "No, not at all."},
        {"prompt": "What is up?", "completions": ["x", "y", "z"], "ranks": [1, 1, 2]},
        {"prompt": "And what is down?", "completions": ["x", "y"], "ranks": [1, 1]},
    ]
    facts = facts_of(write(tmp_path / "pairs.jsonl", rows[:2]))
    assert {role: list(lengths) for role, lengths in facts.lengths.items()} == {"prompt": [3, 3], "chosen": [4, 2], "rejected": [1, 4]}
    assert facts.longer.value == 0.5 and facts.pairs == 2 and facts.words is None
    ranked = facts_of(write(tmp_path / "ranked.jsonl", rows[2:]))
    assert (ranked.rows, ranked.pairs, ranked.tied_pairs, ranked.report.drops()) == (1, 2, 1, {"all tied": 1})


def test_dropped_rows_are_told_with_their_lines(tmp_path):
    rows = clean_rows(100) + [{"prompt": "x", "chosen": "same", "rejected": "same"}] * 10
    warnings = warnings_of(facts_of(write(tmp_path / "mine.jsonl", rows)))
    assert [w.text for w in warnings] == ["10 of 110 rows (9.1 %) cannot be used: chosen equals rejected 10 (first: line 101)"]
    few = warnings_of(facts_of(write(tmp_path / "few.jsonl", rows[:104])))  # 4 of 104 is below 5 %
    assert few == []


def test_ties_are_a_warning_of_their_own(tmp_path):
    rows = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]], "ranks": [1, 2]} for row in clean_rows(120)]
    for row in rows[:18]:
        row["ranks"] = [1, 1]
    (warning,) = warnings_of(facts_of(write(tmp_path / "mine.jsonl", rows)))
    assert warning.text == "18 rows (15.0 %) are ties and are dropped" and "reward.ties=half" in warning.remedy


def test_one_broken_line_is_a_warning(tmp_path):
    path = Path(write(tmp_path / "mine.jsonl", clean_rows(120)))
    path.write_text(path.read_text() + '{"prompt": "x", "chos\n')
    assert ["malformed JSON 1 (first: line 121: " in w.text for w in warnings_of(facts_of(path))] == [True]


@pytest.mark.parametrize(("rows", "kind", "named"), [
    ([{"prompt": f"Say {n}", "completion": f"Well, {n}.", "label": n % 2 == 0, "id": n} for n in range(120)], "demonstrations", "`label` is"),
    ([{"instruction": f"Say {n}", "response": f"Well, {n}.", "user_rating": n % 5} for n in range(120)], "demonstrations", "`user_rating` is"),
    ([{"prompt": f"Say {n}", "better_answer": "a", "worse_answer": "b"} for n in range(120)], "prompts", "`better_answer`, `worse_answer` are"),
    ([{"prompt": f"Say {n}", "response_1": "It is what I say.", "lang": "en"} for n in range(120)], "prompts", "`response_1` is")])
def test_judgements_and_answers_that_are_not_read_are_warned_of(tmp_path, rows, kind, named):
    facts = facts_of(write(tmp_path / "mine.jsonl", rows))
    found = [w for w in warnings_of(facts) if "not read" in w.text]
    assert facts.kind == kind and len(found) == 1 and found[0].text.startswith(named) and "scores or ranks" in found[0].remedy


def test_other_columns_are_named_without_a_warning(tmp_path, capsys):
    code, out, _ = run(capsys, write(tmp_path / "mine.jsonl", [{**row, "label": "x", "source": "web"} for row in clean_rows()]))
    assert code == 0 and "not read   columns label, source" in out


# --- repetitions and contradictions -------------------------------------------------------------------------------------------------


def test_rows_are_the_same_but_for_case_and_spacing():
    assert row_key(["Hello  World", "a"]) == row_key(["hello world ", "A"])
    assert row_key(["ab", "c"]) != row_key(["a", "bc"])
    assert repeated([7, 8, 7, 9, 8, 7]).tolist() == [2, 4, 5]
    assert duplicates.earlier([7, 8, 7, 9, 8, 7], 4) == 1


def test_a_verdict_and_its_opposite_share_all_bits_but_the_last():
    one, other = verdict_key(["q"], "yes", "no"), verdict_key(["q"], "no", "yes")
    assert one >> 1 == other >> 1 and {one & 1, other & 1} == {0, 1}
    assert verdict_key(["Q "], "YES", "no") == one
    assert verdict_key(["r"], "yes", "no") >> 1 != one >> 1
    assert verdict_key(["q"], "yes", " Yes") is None


def test_contradictions_and_agreement_by_hand():
    a, b, c = 2, 4, 6  # verdicts on three pairs of answers; the last bit is the winner
    places, again, agreement = contradictions([a, b, a + 1, c, b, a])
    assert places == [(0, 2)]  # the pair `a` was won twice by one and once by the other
    assert again == 2
    assert agreement == pytest.approx((1 / 3 + 1) / 2)  # a: of three pairs of verdicts one agrees; b: both agree
    assert contradictions([a, b])[:2] == ([], 0) and math.isnan(contradictions([a, b])[2])


def test_planted_faults_are_found_with_their_lines(tmp_path):
    rows = clean_rows(120)
    rows.append({**rows[4], "prompt": rows[4]["prompt"].upper()})  # line 121 repeats line 5
    rows.append({**rows[6], "chosen": rows[6]["rejected"], "rejected": rows[6]["chosen"]})  # line 122 says the opposite of line 7
    facts = facts_of(write(tmp_path / "mine.jsonl", rows))
    assert (facts.counts["repeated"], facts.repeated) == (1, [("line 121", "line 5")])
    assert (facts.counts["opposed"], facts.opposed) == (1, [("line 122", "line 7")])
    assert facts.counts["prompts"] == 120
    assert facts.judged_again == 2 and facts.agreement == 0.5
    assert [w.text for w in warnings_of(facts)] == ["1 pairs of answers to one prompt are ordered both ways: line 122 against line 7"]


def voted_rows(*votes):
    """PandaLM rows on different questions, each with the given verdicts of three annotators."""
    return [{"instruction": f"What is red, {i}?", "input": "", "response1": f"A colour, {i}.", "response2": f"No, {i}.",
             **{f"annotator{n}": vote for n, vote in enumerate(row, 1)}} for i, row in enumerate(votes)]


def test_votes_on_a_row_agree_in_the_share_of_their_pairs_by_hand(tmp_path, capsys):
    # of three pairs of votes: all say the same; one of three; none, a tie that is dropped and yet was voted on; one vote has no pair
    rows = voted_rows((1, 1, 1), (1, 1, 0), (0, 1, 2), (2, None, None))
    facts = facts_of(write(tmp_path / "votes.jsonl", rows))
    assert (facts.rows, facts.report.drops()) == (3, {"all tied": 1})
    assert facts.report.voted == 3 and facts.report.votes_agree / facts.report.voted == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert "3 rows judged by several people: two of them say the same in 44%" in run(capsys, tmp_path / "votes.jsonl", "--show", "0")[1]


def test_votes_of_a_crowd_count_and_those_of_rows_that_cannot_be_used_or_were_not_looked_at_do_not(tmp_path):
    crowd = [{"text": f"What is red, {i}?", "result_x": f"A colour, {i}.", "result_y": answer, "votes": [{"winner": vote} for vote in votes]}
             for i, (answer, votes) in enumerate([("No.", ("left", "left")), ("", ("left", "right")), ("No.", ("right", "left", "right"))])]
    report = facts_of(write(tmp_path / "crowd.jsonl", crowd)).report
    assert (report.voted, report.votes_agree) == (2, pytest.approx(1 + 1 / 3))  # the second row has an empty answer
    stopped = facts_of(write(tmp_path / "votes.jsonl", voted_rows((1, 1, 1), (2, 2, 1), (1, 2, 1))), most=1)
    assert (stopped.rows, stopped.report.voted, stopped.report.votes_agree) == (1, 1, 1.0)
    assert facts_of(write(tmp_path / "pairs.jsonl", clean_rows(5))).report.voted == 0


def test_a_signature_estimates_the_share_of_common_runs():
    words = [f"w{i}" for i in range(302)]  # 300 runs of three
    changed = words[:150] + ["other"] + words[151:]  # 3 runs are lost and 3 are new: 297 of 303 in common
    half = words[:152] + [f"v{i}" for i in range(150)]  # 150 runs in common, 300 - 150 of each alone: 150 of 450
    estimate = lambda one, other: (signature(one) == signature(other)).mean()  # noqa: E731
    assert estimate(words, list(words)) == 1
    assert estimate(words, changed) == pytest.approx(297 / 303, abs=0.06)
    assert estimate(words, half) == pytest.approx(1 / 3, abs=0.18)  # three standard deviations of 64 draws
    assert estimate(words, [f"u{i}" for i in range(302)]) <= 0.05


def test_near_duplicates_point_to_an_earlier_row():
    rng = random.Random(3)
    texts = [[f"w{rng.randrange(5000)}" for _ in range(120)] for _ in range(60)]
    texts.append([*texts[10][:60], "new", *texts[10][61:]])  # 3 of 118 runs differ
    texts.append(texts[20])
    signatures = Signatures()
    for words in texts:
        signatures.add(words)
    assert signatures.table().shape == (62, duplicates.HASHES)
    assert near_duplicates(signatures.table()) == {60: 10, 61: 20}
    assert near_duplicates(np.zeros((0, duplicates.HASHES), np.uint32)) == {}


def test_near_duplicates_in_a_file_are_not_counted_twice(tmp_path):
    long = " ".join(f"word{i}" for i in range(100))
    rows = clean_rows(30)
    rows.append({"prompt": "Say much.", "chosen": long, "rejected": "No."})
    rows.append({"prompt": "Say much.", "chosen": long + " indeed", "rejected": "No."})
    rows.append(rows[-2])
    facts = facts_of(write(tmp_path / "mine.jsonl", rows))
    assert (facts.similar, facts.repeated) == ([("line 32", "line 31")], [("line 33", "line 31")])


# --- shortcuts ----------------------------------------------------------------------------------------------------------------------


def test_longer_wins_by_hand():
    ids = [text_id(str(i)) for i in range(4)]
    assert longer_wins([3, 2, 5, 1], [1, 2, 9, 0], ids).value == (1 + 0.5 + 0 + 1) / 4
    one = accuracy([1.0] * 10, [ids[0]] * 10)  # ten pairs of one prompt are one draw: Wilson's interval for 1 of 1
    assert (one.value, one.high) == (1.0, 1.0) and one.low == pytest.approx(1 / (1 + 1.959964**2))


def word_pairs(n, better, worse, seed=5):
    rng = random.Random(seed)
    noise = lambda: " ".join(rng.choices(NOUNS, k=5))  # noqa: E731
    return [Pair(text_id(f"prompt {i}"), f"{noise()} {better} {noise()}", f"{noise()} {worse} {noise()}") for i in range(n)]


def test_a_word_that_gives_the_better_answer_away_is_found():
    found = bag_of_words(word_pairs(150, "splendid", "dreadful"))
    assert found.accuracy.value > 0.98 and found.accuracy.low > 0.9
    assert found.good[0] == "splendid" and found.bad[0] == "dreadful"


def test_random_labels_give_a_bag_of_words_nothing():
    found = bag_of_words(word_pairs(400, "plain", "plain"))
    assert found.accuracy.low < 0.5 < found.accuracy.high or abs(found.accuracy.value - 0.5) < 0.07


def test_the_bag_of_words_does_not_ask_about_prompts_it_learned_from():
    """Every prompt has a word of its own that wins in all its pairs: known prompts would be answered perfectly, new ones are a coin toss."""
    pairs = [Pair(text_id(str(i)), f"only{i} a b", "a b c") if i % 2 else Pair(text_id(str(i)), "a b c", f"only{i} a b")
             for i in range(60) for _ in range(6)]
    assert bag_of_words(pairs).accuracy.value < 0.7


def test_how_an_answer_ends_is_a_feature():
    rng = random.Random(2)
    pairs = [Pair(text_id(str(i)), " ".join(rng.choices(NOUNS, k=6)) + ".", " . ".join(rng.choices(NOUNS, k=3))) for i in range(60)]
    assert "ends with ." in bag_of_words(pairs).good  # the full stop itself is in both


def test_too_few_prompts_say_nothing():
    assert bag_of_words(word_pairs(19, "good", "bad")) is None


def test_words_learned_from_some_pairs_are_asked_of_others():
    pairs = word_pairs(150, "splendid", "dreadful")
    assert words_learned(pairs[:100], pairs[100:]).value > 0.98
    assert words_learned(pairs[:100], word_pairs(50, "dreadful", "splendid")).value < 0.02
    assert words_learned(pairs[:100], word_pairs(50, "unseen", "unheard", seed=6)).pairs == 50
    assert words_learned(pairs[:19], pairs[100:]) is None
    nothing_often = [Pair(text_id(str(i)), f"one{i}", f"two{i}") for i in range(30)]
    assert words_learned(nothing_often, nothing_often).value == 0.5  # each ends with a word, and no word is in three answers


def test_shortcuts_become_warnings(tmp_path):
    rows = [{**row, "chosen": row["chosen"] + " and so it is, as everyone can see"} for row in clean_rows()]
    texts = " | ".join(w.text for w in warnings_of(facts_of(write(tmp_path / "mine.jsonl", rows))))
    assert "the longer answer is the better one in 100% of the pairs" in texts
    assert "single words give the better answer away in 100% of the pairs" in texts
    assert re.search(r"for it speak: `\S+` `", texts)  # a comma may be one of them
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    assert "the shorter answer is the better one in 100%" in " | ".join(
        w.text for w in warnings_of(facts_of(write(tmp_path / "swapped.jsonl", swapped))))


# --- lengths and scripts ------------------------------------------------------------------------------------------------------------


def test_words_of_any_language():
    assert words_of("Don't stop, 12 birds!") == ["don't", "stop", "12", "birds"]
    assert words_of("红色 is red") == ["红", "色", "is", "red"]
    assert words_of("...") == []


@pytest.mark.parametrize(
    ("text", "script"),
    [("Wie geht's, Müller?", "Latin"), ("你好吗 ok", "Han"), ("これは日本語です", "Japanese"), ("Привет, как дела", "Cyrillic"),
     ("안녕하세요", "Hangul"), ("مرحبا", "Arabic"), ("שלום", "Hebrew"), ("γειά", "Greek"), ("12 + 5 = ?", "no letters"), ("ქართული", "other")],
)
def test_scripts_are_guessed(text, script):
    assert script_of(text) == script


def test_quantiles_by_hand():
    assert quantiles([*range(1, 101)]) == (50, 95, 100)
    assert quantiles([7]) == (7, 7, 7)


def test_what_is_too_long_is_what_the_stages_leave_out(tiny_encoder):
    """The same rows through two doors: this rule and the reward stage's own."""
    rng = random.Random(4)
    for _ in range(60):
        answers = [" ".join(rng.choices(NOUNS, k=rng.randrange(1, 7))) for _ in range(3)]
        row = {"prompt": [{"role": "user", "content": "What?"}], "completions": answers, "ranks": rng.choice([[1, 2, 3], [1, 1, 2], [2, 1, 1]])}
        over = [len(tiny_encoder.completion_ids(text)) > 12 for text in answers]
        assert left_out(row["ranks"], over, True) == isinstance(encode_rankings([row], tiny_encoder, 100, 12, "drop")[0], str)
    assert left_out([1], [True], False) and not left_out([1], [False], False)


def test_too_long_answers_of_rankings_that_stay_are_counted_apart(tmp_path, capsys):
    """At three words: the first row loses two of four answers, the second all but one and so itself, the third none."""
    rows = [{"prompt": f"What is red, {i}?", "completions": answers, "ranks": [1, 2, 3, 4]} for i, answers in enumerate([
        ["a", "b", "c c c c", "d d d d"], ["a", "b b b b", "c c c c", "d d d d"], ["a", "b", "c", "d"]])]
    facts = facts_of(write(tmp_path / "four.jsonl", rows), limits=Limits(10, 3))
    assert (facts.too_long["row"], facts.too_long["answer"]) == (1, 2)
    said = run(capsys, tmp_path / "four.jsonl", "--show", "0", "--max-completion-tokens", "3")[1]
    assert "1 rows (33.3 %) and 2 single answers of others would be left out" in said


def test_tokens_are_counted_as_the_model_reads_them(tmp_path, tiny_encoder):
    row = {"prompt": "What is red?", "completion": "A colour."}
    facts = check.look_at(write(tmp_path / "mine.jsonl", [row]), None, None, Ruler(tiny_encoder, "tiny"), Limits(4, 2))
    prompt = tiny_encoder.prompt_ids([{"role": "user", "content": "What is red?"}])
    assert list(facts.lengths["prompt"]) == [len(prompt)]
    assert list(facts.lengths["completion"]) == [len(tiny_encoder.completion_ids("A colour."))]
    assert dict(facts.too_long) == {"prompt": 1, "completion": 1, "row": 1}


def test_rows_that_are_too_long_are_a_warning_with_limits_that_would_do(tmp_path):
    rows = clean_rows()
    for row in rows[:12]:
        row["chosen"] = row["rejected"] + " tall" * 92  # 100 words
    (warning,) = (w for w in warnings_of(facts_of(write(tmp_path / "mine.jsonl", rows))) if "longer" in w.text and "too" not in w.text)
    assert warning.text.startswith("12 rows (10.0 %) are longer") and "data.max_completion_tokens=104" in warning.remedy


def test_damaged_text_and_answers_for_two_are_warned_of(tmp_path):
    rows = clean_rows()
    rows[2]["chosen"] += " caf\u00c3\u00a9"
    rows[3]["rejected"] += "\n\nHuman: and more"
    texts = " | ".join(w.text for w in warnings_of(facts_of(write(tmp_path / "mine.jsonl", rows))))
    assert "1 rows hold characters that a wrong encoding leaves (first: line 3)" in texts
    assert "1 rows have an answer with markers of a turn or of an end in it, such as `Human:` or `</s>` (first: line 4)" in texts


# --- between files ------------------------------------------------------------------------------------------------------------------


def test_prompts_in_two_files_are_found_by_the_rule_of_the_split(tmp_path, capsys):
    rows = clean_rows(144)
    train, test = rows[:120], [*rows[120:], {**rows[0], "prompt": rows[0]["prompt"].upper() + "  "}]
    one, other = write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", test)
    (found,) = shared_prompts([facts_of(one), facts_of(other)])
    assert (found.prompts, found.rows) == (1, (1, 1))
    code, out, _ = run(capsys, one, other)
    assert code == 1 and "1 prompts stand in both files (1 and 1 rows)" in out
    assert run(capsys, one, write(tmp_path / "rest.jsonl", rows[120:]))[1].count("no prompt is in two of them") == 1


# --- what is shown ------------------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """A page's visible text, its elements' attributes, and the texts inside elements of a class."""

    def __init__(self, html):
        super().__init__()
        self.text, self.attributes, self.inside, self.open, self.tags = "", [], {}, [], []
        self.feed(html)
        assert [tag for tag, _ in self.open] == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, *pair) for pair in attrs]
        if tag not in ("meta",) and "svg" not in [name for name, _ in self.open]:
            self.open.append((tag, (dict(attrs).get("class") or "").split()))

    def handle_endtag(self, tag):
        if "svg" in [name for name, _ in self.open] and tag != "svg":
            return
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.text += data
        for name in {name for _, names in self.open for name in names}:
            self.inside[name] = self.inside.get(name, "") + data


def test_nothing_in_a_file_is_run_or_obeyed(tmp_path, capsys):
    rows = clean_rows(8)
    for row in rows:
        row["chosen"] = f"{ATTACK}\x1b[31m\x1b]0;title\x07{row['chosen']}"
    code, out, _ = run(capsys, write(tmp_path / "mine.jsonl", rows), "--show", "8")
    assert code == 1 and "document.title" in out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", out) and "title\x07" not in out
    html = (tmp_path / "data-check" / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert page.text.count(ATTACK) == 8 and "script" not in page.tags and "img" not in page.tags
    assert not [one for one in page.attributes if one[1].startswith("on")]
    assert "default-src 'none'" in html and not re.search(r"https?://|@import|url\((?!#)", html)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", html)


def test_a_file_name_is_text_too(tmp_path, capsys):
    path = write(tmp_path / "<b>x&\x1b[31m.jsonl", clean_rows(20))
    _, out, _ = run(capsys, path)
    assert "\x1b" not in out
    html = (tmp_path / "data-check" / "report.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;x&amp;␛[31m.jsonl" in html and "<b>x" not in html


def test_what_is_trained_on_is_green(tmp_path, tiny_folder, capsys):
    rows = [{"prompt": "What is red?", "chosen": "A fine colour.", "rejected": "Not at all."},
            {"prompt": "What is blue?", "completions": ["Another fine colour.", "Nothing.", "No " * 200], "ranks": [1, 2, 3]}]
    rows[0] = {"prompt": rows[0]["prompt"], "completions": [rows[0]["chosen"], rows[0]["rejected"]], "ranks": [1, 2]}
    rows.append({"prompt": "What is up?", "completions": ["Lonely winner.", "Yes " * 200], "ranks": [1, 2]})  # no pair is left
    run(capsys, write(tmp_path / "mine.jsonl", rows), "--tokenizer", tiny_folder)
    page = Page((tmp_path / "data-check" / "report.html").read_text(encoding="utf-8"))
    assert "A fine colour.<|end|>" in page.inside["good"] and "Not at all." not in page.inside["good"]
    assert "Not at all.<|end|>" in page.inside["bad"] and "No No No" in page.inside["unused"]
    assert "<|user|>What is red?<|assistant|>" in page.inside["message"]
    assert "Another fine colour." in page.inside["good"] and "Nothing." in page.inside["bad"]
    assert "Lonely winner." in page.inside["unused"] and "Lonely winner." not in page.inside["good"]
    assert page.inside["marker"].startswith("<|user|><|assistant|><|end|>")


def test_rows_are_shown_when_asked_and_only_then(tmp_path, capsys):
    path = write(tmp_path / "mine.jsonl", clean_rows(3))
    assert "chosen: " not in run(capsys, path, "--show", "0")[1].split("lengths")[0]
    assert len(re.findall(r"^    chosen: \w+ ", run(capsys, path, "--show", "2")[1], re.M)) == 2
    assert not re.findall(r"^    chosen: \w+ ", run(capsys, path, "--show", "0")[1], re.M)


def test_the_same_file_gives_the_same_page_whatever_the_order_of_its_rows_shows(tmp_path, capsys):
    rows = clean_rows(60)
    run(capsys, write(tmp_path / "mine.jsonl", rows), "--out", "one")
    run(capsys, write(tmp_path / "mine.jsonl", rows), "--out", "two")
    assert (tmp_path / "one" / "report.html").read_bytes() == (tmp_path / "two" / "report.html").read_bytes()
    shown = {row["completions"][0] for row in facts_of(tmp_path / "mine.jsonl").shown}
    backwards = facts_of(write(tmp_path / "backwards.jsonl", rows[::-1]))
    assert {row["completions"][0] for row in backwards.shown} == shown and len(shown) == 8


def test_every_warning_stands_on_the_page(tmp_path, capsys):
    rows = clean_rows(40) * 2
    path = write(tmp_path / "mine.jsonl", rows)
    run(capsys, path)
    page = Page((tmp_path / "data-check" / "report.html").read_text(encoding="utf-8"))
    warnings = warnings_of(facts_of(path))
    assert len(warnings) == 2 and all(isinstance(w, Finding) and w.text in page.text and w.remedy in page.text for w in warnings)


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    (tmp_path / "taken").write_text("a file")
    code, _, err = run(capsys, write(tmp_path / "mine.jsonl", clean_rows(20)), "--out", "taken")
    assert code == 2 and "--out taken" in err


# --- the data sets of README ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "usable", "longer"),
    [("hh_rlhf/helpful-base", 1744 - 12, 0.61), ("hh_rlhf/harmless-base", None, 0.43), ("llmbar/llmbar", None, 0.27),
     ("oasst1/ranked_en", None, 0.67)],
)
def test_known_data_sets_come_out_as_their_readme_says(name, usable, longer, capsys):
    """Rows and "longer wins" (within 3 points: README counts characters) as measured by others; no row of these files is printed here."""
    path = SHARED / f"{name}.jsonl.gz"
    if not path.is_file():
        pytest.skip(f"{path} is not on this machine")
    with gzip.open(path) as file:
        total = sum(1 for _ in file)
    facts = facts_of(path)
    assert facts.report.read == total and facts.rows + sum(facts.report.drops().values()) == total
    assert usable is None or facts.rows == usable
    assert abs(facts.longer.value - longer) < 0.03
    assert facts.words.accuracy.value < 0.75
    code, out, _ = run(capsys, path, "--rows", "30", "--show", "0")
    assert code == 1
    texts = {text for row in facts.shown for text in row["completions"] if len(text) > 40}
    assert not any(text[:40] in out for text in texts)


def test_a_margin_below_zero_is_warned_of(tmp_path):
    rows = [{"prompt": f"Question number {n}?", "chosen": f"good {n}", "rejected": f"bad {n}", "margin": margin}
            for n, margin in enumerate((0, -1, 0.5, -2))]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    [warning] = [w for w in warnings_of(facts_of(path)) if "margin" in w.text]
    assert warning.text == "2 rows have a margin below 0 (first: line 2): the reward model may then score the rejected answer higher by as much"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[::2]))
    assert not [w for w in warnings_of(facts_of(path)) if "margin" in w.text]
