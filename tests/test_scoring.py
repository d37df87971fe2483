"""Scores: read at the end token wherever padding is, normalised, from other tokenizers, callables, ensembles, mixes (CANON R2, R5, R7, S2, S4)."""

import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2ForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from rlhf.config import config_from_tree
from rlhf.encoding import Encoder
from rlhf.errors import InputError
from rlhf.learner import scorer_of
from rlhf.models import load_encoder, load_reward_model, save_model, train_tokenizer
from rlhf.scoring import CallableScorer, EnsembleScorer, MixScorer, RewardModelScorer, combine, load_scorer, raw_scores, with_missing_eos, with_mix
from rlhf.workers import ALONE, Workers
from tests.helpers import CONTEXT, rough, some_prompts, tiny_encoder

ENCODER = tiny_encoder()
PROMPTS = some_prompts(ENCODER, 5)
MESSAGES = [[{"role": "user", "content": t}] for t in ("Hi", "What is hot?", "Name three fruits, please.")]
TEXTS = ["cold", "Apples, pears and plums.", ""]
COMPLETIONS = [ENCODER.completion_ids(t) for t in TEXTS]


def reward_model(encoder=ENCODER, kind="gpt2", seed=0):
    torch.manual_seed(seed)
    common = {"vocab_size": len(encoder.tokenizer), "num_labels": 1, "pad_token_id": encoder.pad_id, "attn_implementation": "eager"}
    if kind == "gpt2":
        config = GPT2Config(n_positions=CONTEXT, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **common)
        return rough(GPT2ForSequenceClassification(config), seed).eval()
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=CONTEXT, **common)
    return rough(LlamaForSequenceClassification(config), seed).eval()


# R2: where the reward is read

@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_R2_the_reward_is_the_head_at_the_end_token_for_an_end_first_middle_and_missing(kind):
    model = reward_model(kind=kind)
    completions = [[ENCODER.eos_id], [40, 41, ENCODER.eos_id], [40, 41, 42, 43, 44, 45], [ENCODER.pad_id, 50, ENCODER.eos_id], [40, ENCODER.eos_id]]
    rows = [p + c for p, c in zip(PROMPTS, completions, strict=True)]
    with torch.no_grad():
        expected = [(model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, -1] @ model.score.weight[0]).item() for row in rows]
    assert raw_scores(model, rows, ENCODER.pad_id).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@pytest.mark.parametrize("budget", [1, 30, 10_000])
def test_R2_scores_do_not_depend_on_padding_batch_or_order(kind, budget):
    model = reward_model(kind=kind)
    rows = [p + c for p in PROMPTS for c in COMPLETIONS]
    alone = [raw_scores(model, [row], ENCODER.pad_id).item() for row in rows]
    order = random.Random(1).sample(range(len(rows)), len(rows))
    found = raw_scores(model, [rows[i] for i in order], ENCODER.pad_id, budget)
    assert found.tolist() == pytest.approx([alone[i] for i in order], abs=1e-5)
    assert found.std() > 0.05


# R5: normalisation

def test_R5_gain_and_bias_are_applied_and_survive_saving_and_loading(tmp_path):
    model = reward_model()
    plain = RewardModelScorer(model, ENCODER)(MESSAGES, COMPLETIONS, ENCODER)
    model.config.reward_gain, model.config.reward_bias = 2.5, -0.75
    save_model(model, ENCODER, tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["reward_gain"], saved["reward_bias"]) == (2.5, -0.75)
    loaded = load_scorer([tmp_path], "mean", 0.0, "eager", "cpu")
    assert loaded(MESSAGES, COMPLETIONS, ENCODER).tolist() == pytest.approx((2.5 * plain - 0.75).tolist(), abs=1e-5)


def test_R2_an_answer_that_was_cut_off_is_scored_at_an_end_token_in_place_of_its_last_one():
    model, messages, cut = reward_model(), MESSAGES[:2], [c[:-1] for c in COMPLETIONS[:2]]
    rows = [ENCODER.prompt_ids(m) + c[:-1] + [ENCODER.eos_id] for m, c in zip(messages, cut, strict=True)]
    assert torch.equal(RewardModelScorer(model, ENCODER)(messages, cut, ENCODER), raw_scores(model, rows, ENCODER.pad_id))


def test_workers_score_under_the_autocast_of_who_calls_them():
    model, rows = reward_model(), [PROMPTS[0] + [40 + i] * 3 for i in range(24)]
    plain = raw_scores(model, rows, ENCODER.pad_id)
    with torch.autocast("cpu", torch.bfloat16):
        alone, shared = (raw_scores(model, rows, ENCODER.pad_id, workers=workers) for workers in (ALONE, Workers(2)))
    assert (shared - alone).abs().max() < 0.1 * (plain - alone).abs().max()  # bf16 is further from fp32 than one way to cut rows from another
    assert raw_scores(model, rows, ENCODER.pad_id, workers=Workers(2)).tolist() == pytest.approx(plain.tolist(), abs=1e-5)


def test_a_reward_model_without_normalisation_gives_its_raw_scores():
    model = reward_model()
    rows = [ENCODER.prompt_ids(m) + c for m, c in zip(MESSAGES, COMPLETIONS, strict=True)]
    assert torch.equal(RewardModelScorer(model, ENCODER)(MESSAGES, COMPLETIONS, ENCODER), raw_scores(model, rows, ENCODER.pad_id))


# R7: ensembles

def test_R7_rules_by_hand():
    scores = torch.tensor([[1.0, 2.0, -1.0], [3.0, 2.0, 5.0]])
    assert combine(scores, "mean", 9.0).tolist() == [2.0, 2.0, 2.0]
    assert combine(scores, "worst", 9.0).tolist() == [1.0, 2.0, -1.0]
    assert combine(scores, "uncertainty", 0.5).tolist() == [2.0 - 0.5 * 1.0, 2.0, 2.0 - 0.5 * 9.0]


@given(st.lists(st.lists(st.floats(-5, 5, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_R7_worst_is_never_above_mean_and_members_that_agree_agree_with_every_rule(rows):
    scores = torch.tensor(rows)
    assert (combine(scores, "worst", 0.0) <= combine(scores, "mean", 0.0) + 1e-5).all()
    same = scores[:1].expand(4, 3)
    for rule in ("mean", "worst", "uncertainty"):
        torch.testing.assert_close(combine(same, rule, 3.0), scores[0])


def test_R7_an_ensemble_asks_every_member(tmp_path):
    folders = []
    for seed in range(3):
        save_model(reward_model(seed=seed), ENCODER, tmp_path / str(seed))
        folders.append(tmp_path / str(seed))
    single = torch.stack([load_scorer([f], "mean", 0.0, "eager", "cpu")(MESSAGES, COMPLETIONS, ENCODER) for f in folders])
    ensemble = load_scorer(folders, "worst", 0.0, "eager", "cpu")
    assert isinstance(ensemble, EnsembleScorer)
    torch.testing.assert_close(ensemble(MESSAGES, COMPLETIONS, ENCODER), single.min(0).values)


# S4: scores from anywhere

def test_S4_a_reward_model_with_another_tokenizer_reads_the_text_anew():
    other = Encoder(train_tokenizer(["Other words entirely, cut in other places: hot, cold, plums."] * 5, 280))
    assert other.fingerprint() != ENCODER.fingerprint()
    model = reward_model(other, "llama")
    rows = [other.prompt_ids(m) + other.completion_ids(t) for m, t in zip(MESSAGES, TEXTS, strict=True)]
    found = RewardModelScorer(model, other)(MESSAGES, COMPLETIONS, ENCODER)
    assert found.tolist() == pytest.approx(raw_scores(model, rows, other.pad_id).tolist(), abs=1e-6)


def test_S4_a_reward_model_with_the_same_tokenizer_reads_the_sampled_ids_themselves():
    """The ids of a sampled text need not be those the tokenizer would choose; the model reads what was sampled."""
    spelled = [ENCODER.text_ids(c)[0] for c in "cold"] + [ENCODER.eos_id]
    assert spelled != COMPLETIONS[0] and ENCODER.decode(spelled) == "cold"
    model = reward_model()
    found = RewardModelScorer(model, ENCODER)(MESSAGES[:1], [spelled], ENCODER)
    assert torch.equal(found, raw_scores(model, [ENCODER.prompt_ids(MESSAGES[0]) + spelled], ENCODER.pad_id))


MODULE = """
def words(prompts, completions):
    return [len(p) + 100 * len(c.split()) for p, c in zip(prompts, completions)]

def too_few(prompts, completions):
    return [1.0]

def nothing(prompts, completions):
    return None

def names(prompts, completions):
    return ["high"] * len(completions)

def minus_length(prompts, completions):
    return [-len(c) for c in completions]
"""


@pytest.fixture
def callables(tmp_path, monkeypatch):
    (tmp_path / "my_scores.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("callables")
def test_S4_a_callable_gets_the_last_user_turns_and_the_completions_as_text():
    earlier = [[{"role": "user", "content": "ignored"}, {"role": "assistant", "content": "x"}, *m] for m in MESSAGES]
    scores = CallableScorer("my_scores:words")(earlier, COMPLETIONS, ENCODER)
    assert scores.tolist() == [2 + 100, 12 + 400, 26 + 0] and scores.dtype == torch.float32


@pytest.mark.usefixtures("callables")
@pytest.mark.parametrize(("name", "says"), [("my_scores", "module:function"), ("my_scores:missing", "missing"),
                                            ("no_such_module:f", "no_such_module")])
def test_S4_a_callable_that_is_not_there_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        CallableScorer(name)


@pytest.mark.usefixtures("callables")
@pytest.mark.parametrize(("name", "says"), [("too_few", "1 scores for 3"), ("nothing", "NoneType"), ("names", "high")])
def test_S4_a_callable_that_returns_something_else_is_refused(name, says):
    with pytest.raises(InputError, match=says):
        CallableScorer(f"my_scores:{name}")(MESSAGES, COMPLETIONS, ENCODER)


def fixed(*scores):
    return lambda prompts, completions, encoder: torch.tensor(scores)


def test_S4_a_mix_is_the_weighted_sum_by_hand():
    mixed = MixScorer([(1.0, fixed(1.0, 2.0, -3.0)), (0.5, fixed(4.0, -2.0, 0.0)), (-2.0, fixed(0.25, 0.0, 1.0))])
    assert mixed(MESSAGES, COMPLETIONS, ENCODER).tolist() == [1 + 2 - 0.5, 2 - 1, -3 - 2]


@pytest.mark.usefixtures("callables")
def test_S4_the_mix_of_the_settings_adds_callables_and_reward_models_to_the_main_score(tmp_path):
    judge = reward_model(seed=4)
    judge.config.reward_gain, judge.config.reward_bias = 2.0, 1.0
    save_model(judge, ENCODER, tmp_path / "judge")
    rows = [ENCODER.prompt_ids(m) + c for m, c in zip(MESSAGES, COMPLETIONS, strict=True)]
    second = 2.0 * raw_scores(judge, rows, ENCODER.pad_id) + 1.0
    mixed = with_mix(fixed(1.0, 2.0, 3.0), {"my_scores:minus_length": 0.25, str(tmp_path / "judge"): 3.0}, "eager", "cpu")
    # lengths of "cold", "Apples, pears and plums." and "": 4, 24, 0 characters
    expected = [1 - 0.25 * 4 + 3 * second[0], 2 - 0.25 * 24 + 3 * second[1], 3 + 3 * second[2]]
    assert mixed(MESSAGES, COMPLETIONS, ENCODER).tolist() == pytest.approx([float(e) for e in expected], abs=1e-5)


def test_S4_an_empty_mix_leaves_the_main_score_as_it_is():
    main = fixed(1.0)
    assert with_mix(main, {}, "eager", "cpu") is main


@pytest.mark.usefixtures("callables")
@pytest.mark.parametrize(("source", "says"), [("my_scores:missing", "ppo.mix names 'my_scores:missing'.*missing"), ("no_such:f", "ppo.mix.*no_such"),
                                              ("no/such/folder", "ppo.mix names 'no/such/folder', neither a module:function nor a reward model")])
def test_S4_a_source_of_the_mix_that_is_not_there_is_refused(source, says):
    with pytest.raises(InputError, match=says):
        with_mix(fixed(1.0), {source: 0.5}, "eager", "cpu")


@pytest.mark.usefixtures("callables")
def test_S4_a_callable_of_the_mix_that_returns_something_else_is_named_by_its_setting():
    with pytest.raises(InputError, match="ppo.mix names 'my_scores:too_few', which returned 1 scores for 3"):
        with_mix(fixed(1.0, 2.0, 3.0), {"my_scores:too_few": 0.5}, "eager", "cpu")(MESSAGES, COMPLETIONS, ENCODER)


@pytest.mark.usefixtures("callables")
def test_S4_the_ppo_stage_scores_by_its_settings(tmp_path):
    """Main callable alone, then with the mix; a run without a reward model has no folder for the value model to start from."""
    tree = {"ppo": {"score": "my_scores:words", "mix": {"my_scores:minus_length": 0.5}}}
    scorer, folders = scorer_of(config_from_tree(tree, "test"), tmp_path, "eager", "cpu", ALONE)
    # words: characters of the prompt + 100 a word; then half a character less a character
    assert scorer(MESSAGES, COMPLETIONS, ENCODER).tolist() == [2 + 100 - 2, 12 + 400 - 12, 26] and folders == []
    save_model(reward_model(seed=2), ENCODER, tmp_path / "reward" / "model")
    scorer, folders = scorer_of(config_from_tree({"ppo": {"mix": {"my_scores:minus_length": 0.5}}}, "test"), tmp_path, "eager", "cpu", ALONE)
    plain = load_scorer(folders, "mean", 1.0, "eager", "cpu")(MESSAGES, COMPLETIONS, ENCODER)
    assert folders == [tmp_path / "reward" / "model"]
    assert scorer_of(config_from_tree({"ppo": {"microbatch_tokens": 50}}, "test"), tmp_path, "eager", "cpu", ALONE)[0].budget == 100
    assert scorer(MESSAGES, COMPLETIONS, ENCODER).tolist() == pytest.approx((plain - torch.tensor([2.0, 12.0, 0.0])).tolist(), abs=1e-5)


def test_rows_longer_than_the_models_positions_are_refused_with_the_remedy():
    row = PROMPTS[0] + [40] * (CONTEXT - len(PROMPTS[0]))
    assert raw_scores(reward_model(), [row], ENCODER.pad_id).isfinite().all()
    with pytest.raises(InputError, match=rf"{CONTEXT + 1} tokens.*{CONTEXT} positions; lower data.max_prompt_tokens"):
        raw_scores(reward_model(), [PROMPTS[1], row + [40]], ENCODER.pad_id)


# S2

def test_S2_completions_that_do_not_end_get_the_penalty_in_place_of_their_score():
    assert with_missing_eos(torch.tensor([3.0, 2.0, -5.0]), [True, False, False], -1.0).tolist() == [3.0, -1.0, -1.0]


def test_a_folder_without_a_model_is_refused_with_what_was_wanted(tmp_path):
    for load in (load_encoder, lambda source: load_reward_model(source, ENCODER, "eager")):
        with pytest.raises(InputError, match="config.json"):
            load(str(tmp_path / "nothing"))


def divides(prompts, completions):
    return [1 / 0 for _ in completions]


def test_what_a_function_of_the_users_raises_is_said_with_its_line():
    with pytest.raises(InputError, match=r"ppo.score names .* raised ZeroDivisionError: division by zero \(.*test_scoring.py:\d+\)"):
        CallableScorer("tests.test_scoring:divides")(MESSAGES, COMPLETIONS, ENCODER)


def test_a_module_of_the_users_that_cannot_be_imported_is_named(tmp_path, monkeypatch):
    (tmp_path / "half_written.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="half_written:f.*SyntaxError"):
        CallableScorer("half_written:f")
