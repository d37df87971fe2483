"""The compare stage on models made here: every kind of policy and judge, in-context learning, and what the report shows of them."""

import gc
import json
import shutil
import weakref

import numpy as np
import pytest

from rlhf import in_context, world
from rlhf.comparison import caveats
from rlhf.config import config_from_tree
from rlhf.errors import InputError
from rlhf.jsonl import read_jsonl, write_json, write_jsonl
from rlhf.models import load_encoder, load_policy, load_reward_model, save_model
from stages import compare
from tests.helpers import greedy, naive_logprobs, rough

PROMPTS = world.sample_prompts(12, "test", 5)


@pytest.fixture
def run(tmp_path, tiny_folder):
    """A run folder as the stages before compare leave it; PPO's average and last weights differ."""
    encoder = load_encoder(str(tiny_folder))
    for place, seed in (("ppo/model", 1), ("ppo/model_last", 2)):
        save_model(rough(load_policy(str(tiny_folder), encoder, "eager"), seed, 0.02), encoder, tmp_path / place)
    save_model(rough(load_reward_model(str(tiny_folder), encoder, "eager"), 3, 0.05), encoder, tmp_path / "reward" / "model")
    shutil.copytree(tiny_folder, tmp_path / "sft" / "model")
    for stage in ("prepare", "sft", "reward", "ppo"):
        write_json(tmp_path / stage / "DONE", {"stage": stage})
    rows = [{"prompt": [{"role": "user", "content": p}], "id": str(i), "family": world.family_of(p)} for i, p in enumerate(PROMPTS)]
    write_jsonl(tmp_path / "data" / "prompts" / "test.jsonl", rows)
    return tmp_path


def compared(run, judge="auto", ppo=None, **settings):
    """summary.json, samples.jsonl and report.md of a comparison with these settings of compare and of ppo."""
    tree = {"seed": 3, "run": {"dir": str(run), "threads": 1, "precision": "fp32"}, "model": {"init": str(run / "sft" / "model")},
            "data": {"max_completion_tokens": 6}, "compare": {"policies": ["sft", "ppo"], "judge": judge, **settings}, "ppo": ppo or {}}
    compare.main(config_from_tree(tree, "here"))
    folder = run / "compare"
    return json.loads((folder / "summary.json").read_text()), list(read_jsonl(folder / "samples.jsonl")), (folder / "report.md").read_text()


def likes_commas(prompt, first, second):
    """A judge for the tests: more commas are better; it knows that it is shown prompts of these tests."""
    assert prompt in PROMPTS
    return first.count(",") - second.count(",")


def likes_the_first(prompt, first, second):
    return 1


def says_words(prompt, first, second):
    return "the first"


def says_whether(prompt, first, second):
    return len(first) > len(second)


def says_nan(prompt, first, second):
    return float("nan")


def says_it_in_numpy(prompt, first, second):
    return np.float64(len(first)) > len(second)


def says_two(prompt, first, second):
    return np.array([1.0, 2.0])


def test_E1_E5_the_average_the_last_weights_a_second_draw_and_an_untrained_model_answer_the_same_prompts(run):
    summary, samples, report = compared(run, policies=["sft", "ppo", "ppo_last", "sft_again", "untrained"])
    rows = {(row["a"], row["b"]): row for row in summary["comparisons"]}
    assert list(rows) == [("ppo", "sft"), ("ppo_last", "sft"), ("ppo", "ppo_last"), ("sft", "untrained"), ("sft_again", "sft"), ("sft", "sft")]
    assert set(summary["sanity"]) == {"sft_vs_untrained", "sft_again_vs_sft", "sft_vs_sft"}
    assert all(set(row["answers"]) == {"sft", "ppo", "ppo_last", "sft_again", "untrained"} for row in samples)
    texts = {name: [row["answers"][name]["text"] for row in samples] for name in samples[0]["answers"]}
    assert texts["sft_again"] != texts["sft"], "the second draw is another one"
    assert texts["ppo"] != texts["ppo_last"]
    kl = {name: figures["kl_mean"] for name, figures in summary["policies"].items()}
    assert kl["sft"] == 0 and kl["sft_again"] == pytest.approx(0, abs=1e-4) and kl["untrained"] != 0 and kl["ppo"] != kl["ppo_last"]
    assert "**PPO, last weights**" in report and "**SFT, drawn again**" not in report and "SFT, drawn again against SFT" in report
    # nano models answer with noise, so the row against the untrained model fails, and the report says so
    assert any("SFT against Untrained" in text for text in caveats(summary))


def test_beside_sft_one_policy_is_in_memory_at_a_time(run, monkeypatch):
    plain, loaded, alive = compare.load_policy, [], []

    def load(*how):
        gc.collect()
        alive.append(sum(model() is not None for model in loaded))
        policy = plain(*how)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(compare, "load_policy", load)
    compared(run, policies=["ppo", "ppo_last", "sft"])
    assert alive == [0, 1, 1]


def test_a_family_in_peoples_own_rows_is_a_label_and_no_gold_score(run):
    rows = [{"prompt": [{"role": "user", "content": f"Tell me about fox {i}."}], "id": str(i), "family": "animals"} for i in range(6)]
    write_jsonl(run / "data" / "prompts" / "test.jsonl", rows)
    summary, samples, _ = compared(run)
    assert summary["judge"] == "proxy" and {row["family"] for row in samples} == {"animals"}
    assert {a["gold"] for row in samples for a in row["answers"].values()} == {None}


def test_an_error_of_the_rubric_is_not_taken_for_prompts_of_another_world(run, monkeypatch):
    def broken(prompt, completion):
        raise ValueError("a rubric that cannot read this")

    monkeypatch.setattr(world, "gold_score", broken)
    with pytest.raises(ValueError, match="a rubric that cannot read this"):
        compared(run)


@pytest.mark.parametrize("judge, said", [("gold", "no gold score exists"), ("judge", "is not there")])
def test_a_judge_that_cannot_judge_is_refused_before_anything_is_sampled(run, judge, said, monkeypatch):
    write_jsonl(run / "data" / "prompts" / "test.jsonl", [{"prompt": [{"role": "user", "content": "Tell me about a fox."}], "id": "0"}])
    (run / "judge").mkdir()
    monkeypatch.setattr(compare, "_answers", lambda *words: pytest.fail("sampled"))
    with pytest.raises(InputError, match=said):
        compared(run, judge=judge)


def likeliest(run, samples, name, temperature) -> tuple[list[str], list[float]]:
    """What the policy in RUN/`name` answers to each prompt when it always takes the likeliest token, and how many nats SFT gives for that."""
    folders = [str(run / stage / "model") for stage in (name, "sft")]
    encoder = load_encoder(folders[0])
    policy, sft = (load_policy(folder, encoder, "eager").eval() for folder in folders)
    prompts = [encoder.prompt_ids(row["prompt"]) for row in samples]
    answers = [greedy(policy, encoder, prompt, 6) for prompt in prompts]
    return [encoder.decode(ids) for ids in answers], [sum(naive_logprobs(sft, p, c, temperature)) for p, c in zip(prompts, answers, strict=True)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_S1_sft_near_temperature_0_gives_its_likeliest_answers_and_their_kl_is_what_they_lack_in_likelihood(run, temperature):
    summary, samples, report = compared(run, policies=["sft", "ppo", "sft_at_0.001"], temperature=temperature)
    texts, nats = likeliest(run, samples, "sft", temperature)
    cooled = [row["answers"]["sft_at_0.001"] for row in samples]
    assert [a["text"] for a in cooled] == texts != [row["answers"]["sft"]["text"] for row in samples]
    # at that temperature they are all but certain, so log p_cooled - log p_sft is -log p_sft, at compare.temperature
    assert [a["kl"] for a in cooled] == pytest.approx([-n for n in nats], abs=0.02)
    assert [(r["a"], r["b"]) for r in summary["comparisons"]] == [("ppo", "sft"), ("ppo", "sft_at_0.001"), ("sft_at_0.001", "sft"), ("sft", "sft")]
    assert "SFT at temperature 0.001" in report


def test_S1_every_policy_answers_at_compare_temperature_and_kl_is_taken_there(run, monkeypatch):
    """Near 0 each gives its likeliest answer, is sure of it, and SFT's log-probability of it at that temperature is the whole KL."""
    plain, asked = in_context.sample, []
    monkeypatch.setattr(in_context, "sample", lambda *words: asked.append(words[4]) or plain(*words))
    summary, samples, _ = compared(run, policies=["sft", "best_of_2", "ppo"], temperature=0.001, shots=[0], shot_tasks=3)
    for name, source in (("sft", "sft"), ("best_of_2", "sft"), ("ppo", "ppo")):
        texts, nats = likeliest(run, samples, source, 0.001)
        assert [row["answers"][name]["text"] for row in samples] == texts
        if name != "best_of_2":
            assert [row["answers"][name]["kl"] for row in samples] == pytest.approx([-n for n in nats], rel=1e-3, abs=0.02)
    assert summary["policies"]["ppo"]["kl_mean"] > 10 and asked == [0.001, 0.001]


@pytest.mark.parametrize("judge", ["judge", "proxy", "reward/model", "gold"])
def test_what_the_judge_itself_got_right_stands_beside_its_verdict(run, judge):
    """As the reward stage measured it; the gold score is no reward model."""
    shutil.copytree(run / "reward", run / "judge")
    for folder, accuracy in (("judge", 0.4), ("reward", 0.6)):
        figures = {"accuracy": accuracy, "ci95": [accuracy - 0.2, accuracy + 0.2], "pairs": 21, "longer_wins_accuracy": 0.5, "loss": 0.7}
        write_json(run / folder / "metrics.json", {"eval": figures})
    summary, _, report = compared(run, judge=str(run / judge) if "/" in judge else judge)
    wanted = {"judge": "0.40 of 21", "proxy": "0.60 of 21", "reward/model": "0.60 of 21", "gold": None}[judge]
    assert (summary["judge_held_out"] is None) == (wanted is None)
    assert summary["proxy_held_out"]["accuracy"] == 0.6
    assert report.count("The reward model orders 0.60 of 21 held-out pairs right") == (judge in ("judge", "gold")), "said once, whoever judges"
    if wanted:
        assert report.count(f"orders {wanted} held-out pairs right (95 % interval") == 2  # as a caveat, and how it was measured


def test_a_judge_that_nothing_was_measured_of_has_no_such_line(run):
    write_json(run / "reward" / "metrics.json", {"eval": None})
    assert compared(run, judge="proxy")[0]["judge_held_out"] is None


def test_best_of_n_is_the_answer_with_the_highest_reward_of_n_different_ones(run):
    """The first of the four draws is that of best_of_1 at the same place among the policies."""
    def rewards(name):
        _, samples, _ = compared(run, policies=["sft", name])
        shutil.rmtree(run / "compare")
        return [row["answers"][name]["proxy"] for row in samples]

    one, four = rewards("best_of_1"), rewards("best_of_4")
    assert all(b >= a for a, b in zip(one, four, strict=True)) and sum(b > a for a, b in zip(one, four, strict=True)) > len(one) / 3


def test_a_best_of_none_and_no_policies_at_all_are_refused(run):
    with pytest.raises(InputError, match="best_of_0"):
        compared(run, policies=["sft", "best_of_0"])
    with pytest.raises(InputError, match="compare.policies: found none"):
        compared(run, policies=[])


@pytest.mark.parametrize("name", ["sft_at_0", "sft_at_1000"])
def test_a_temperature_out_of_range_is_refused(run, name):
    with pytest.raises(InputError, match=f"compare.policies names {name}: found temperature"):
        compared(run, policies=["sft", name])


def test_E1_last_weights_of_a_run_without_an_average_are_refused(run):
    shutil.rmtree(run / "ppo" / "model_last")
    with pytest.raises(InputError, match="ppo.ema_decay was 0"):
        compared(run, policies=["sft", "ppo_last"])


def test_E2_the_training_reward_is_known_by_its_folder_too(run):
    summary, _, report = compared(run, judge=str(run / "ppo" / ".." / "reward" / "model"))
    assert summary["proxy_is_judge"] and report.startswith("# Judged by the very reward that PPO was trained on")
    assert summary["policies"]["ppo"]["judge_mean"] == pytest.approx(summary["policies"]["ppo"]["proxy_mean"])


@pytest.mark.parametrize(("ppo", "judge", "paid"), [({"score": "tests.test_compare:likes_the_first"}, "proxy", False), ({}, "proxy", True),
                                                    ({"mix": {"ppo/../other": 0.5}}, "other", True), ({}, "other", False)])
def test_E2_a_judge_counts_as_the_training_reward_only_if_ppo_was_paid_by_it(run, ppo, judge, paid):
    """A function of the user's may have taken the reward model's place, or another model been added to it."""
    shutil.copytree(run / "reward" / "model", run / "other")
    ppo = {**ppo, "mix": {str(run / name): weight for name, weight in ppo.get("mix", {}).items()}}
    summary, _, report = compared(run, "proxy" if judge == "proxy" else str(run / judge), ppo)
    assert summary["proxy_is_judge"] == paid and ("Judged by the very reward" in report) == paid
    assert ("PPO was trained on it." in report) == paid != ("No stage was trained on it." in report)
    assert ("| Judge |" in report) == (judge == "other")


@pytest.mark.parametrize("mixed_in", [True, False])
def test_E2_the_runs_own_judge_is_no_independent_one_where_its_score_was_mixed_into_ppos(run, mixed_in):
    shutil.copytree(run / "reward" / "model", run / "judge" / "model")
    summary, _, report = compared(run, "judge", {"mix": {str(run / "judge" / "model"): 0.5}} if mixed_in else {})
    assert (summary["judge"], summary["proxy_is_judge"]) == ("judge", mixed_in)
    assert ("Judged by the very reward" in report) == mixed_in


def test_E3_a_function_judges_pairs_in_both_orders(run):
    summary, samples, report = compared(run, policies=["sft", "ppo", "best_of_2"], judge="tests.test_compare:likes_commas")
    commas = [[row["answers"][name]["text"].count(",") for row in samples] for name in ("ppo", "sft")]
    wins, losses = sum(a > b for a, b in zip(*commas)), sum(a < b for a, b in zip(*commas))
    row = summary["comparisons"][0]
    assert (row["a"], row["b"], row["wins"], row["losses"], row["order_flips"]) == ("ppo", "sft", wins, losses, 0)
    assert row["judge"] == summary["judge"] == "tests.test_compare:likes_commas"
    assert summary["policies"]["ppo"]["judge_mean"] == row["win_rate"] and summary["policies"]["sft"]["judge_mean"] == 0.5
    assert "by the judge" in report


def test_E3_a_function_that_likes_the_first_place_decides_nothing(run):
    summary, _, _ = compared(run, judge="tests.test_compare:likes_the_first")
    assert (summary["comparisons"][0]["ties"], summary["comparisons"][0]["order_flips"]) == (12, 12)


@pytest.mark.parametrize(("judge", "said"), [("says_words", "'the first'"), ("says_whether", "(True|False)"), ("says_nan", "nan"),
                                               ("says_it_in_numpy", "(np.True_|np.False_)"), ("says_two", "array.*")])
def test_E3_a_judge_that_says_no_number_is_refused(run, judge, said):
    """A bool would be a tie whatever it is: the order decides each."""
    with pytest.raises(InputError, match=f"compare.judge names .* returned {said}; wanted a number, above 0 .* and below 0"):
        compared(run, judge=f"tests.test_compare:{judge}")


def test_E6_policies_answer_tasks_after_examples(run):
    summary, _, report = compared(run, policies=["sft", "best_of_2", "ppo", "sft_again"], shots=[0, 2], shot_tasks=9)
    found = summary["in_context"]
    assert 0 < found["tasks"] <= 9
    assert [(row["policy"], row["shots"]) for row in found["rows"]] == [("sft", 0), ("sft", 2), ("ppo", 0), ("ppo", 2)]
    sft, ppo = found["rows"][1], found["rows"][3]
    assert ppo["against_sft"] == pytest.approx(ppo["gold_mean"] - sft["gold_mean"])
    assert "## In-context learning" in report and f"| SFT | 2 | {sft['gold_mean']:.3f} |" in report
    html = (run / "compare" / "report.html").read_text()
    assert 'id="in-context"' in html


def test_E6_without_shots_nothing_of_it_is_shown(run):
    summary, _, report = compared(run)
    assert "in_context" not in summary and "In-context" not in report


def test_E6_more_examples_than_the_policy_has_room_for_are_refused(run):
    with pytest.raises(InputError, match="compare.shots=.* no task has room for 16 examples among the policy's 256 positions"):
        compared(run, shots=[16], shot_tasks=3)
