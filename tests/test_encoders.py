"""Encoders with WordPiece (BERT, DeBERTa) as reward models: CLS and SEP around what they read, scores where they pool (CANON B2, B3, R2, R5, S4)."""

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from rlhf.config import config_from_tree
from rlhf.encoding import PAIR_TEMPLATE, Encoder
from rlhf.errors import InputError
from rlhf.jsonl import write_jsonl
from rlhf.models import add_lora, load_encoder, load_reward_model, longest_row, new_gpt, save_model
from rlhf.runs import file_digest
from rlhf.scoring import load_scorer, raw_scores
from stages import reward
from tests.helpers import rough, tiny_encoder

THINGS = ["red", "blue", "green", "gold", "grey", "pink"]
KINDS = ["bert", "deberta"]
POSITIONS = 48
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48, "num_labels": 1}


def wordpiece(**special):
    """A lower-casing WordPiece as BERT has it: PAD, UNK, CLS, SEP and MASK, and no EOS."""
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]", **special}
    pieces.train_from_iterator([f"Say {a} and {b} thanks please !" for a in THINGS for b in THINGS],
                               trainers.WordPieceTrainer(vocab_size=120, special_tokens=list(names.values()), show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=pieces, clean_up_tokenization_spaces=False, **names)


ENCODER = Encoder(wordpiece())


def user(text):
    return [{"role": "user", "content": text}]


def tokens(ids):
    return ENCODER.tokenizer.convert_ids_to_tokens(ids)


def classifier(kind):
    """A sequence classifier with random weights rough enough that scores differ."""
    torch.manual_seed(0)
    if kind == "bert":
        return rough(BertForSequenceClassification(bert_config()), 0).eval()
    return rough(DebertaV2ForSequenceClassification(deberta_config()), 0).eval()


def bert_config(positions=POSITIONS):
    """Learned positions, and few of them."""
    return BertConfig(max_position_embeddings=positions, vocab_size=len(ENCODER.tokenizer), pad_token_id=ENCODER.pad_id, **TINY)


def deberta_config():
    """Attention by relative positions alone, as DeBERTa v3 has it."""
    return DebertaV2Config(relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], position_biased_input=False, type_vocab_size=0,
                           vocab_size=len(ENCODER.tokenizer), pad_token_id=ENCODER.pad_id, **TINY)


# B3: what an encoder reads

def test_B3_an_encoder_reads_cls_prompt_sep_completion_sep():
    assert tokens(ENCODER.prompt_ids(user("Say red"))) == ["[CLS]", "say", "red", "[SEP]"]
    assert tokens(ENCODER.completion_ids("Red thanks")) == ["red", "thanks", "[SEP]"]
    turns = [*user("Say red"), {"role": "assistant", "content": "red"}, *user("and blue")]
    assert tokens(ENCODER.prompt_ids(turns)) == ["[CLS]", "say", "red", "[SEP]", "red", "[SEP]", "and", "blue", "[SEP]"]


def test_B2_sep_ends_a_completion_and_is_not_the_pad():
    assert tokens([ENCODER.eos_id, ENCODER.pad_id]) == ["[SEP]", "[PAD]"]
    assert ENCODER.ended(ENCODER.completion_ids("red")) and not ENCODER.ended(ENCODER.text_ids("red"))
    assert ENCODER.decode(ENCODER.completion_ids("say red")) == "say red"


def test_B3_sep_and_cls_written_by_a_user_are_text():
    ids = ENCODER.prompt_ids(user("red [SEP] blue [CLS]")) + ENCODER.completion_ids("[SEP] gold")
    special = [t for t in tokens(ids) if t in ("[CLS]", "[SEP]")]
    assert special == ["[CLS]", "[SEP]", "[SEP]"] and tokens(ids)[-1] == "[SEP]"


def test_a_tokenizer_with_an_end_or_a_template_of_its_own_keeps_it():
    encoder = Encoder(wordpiece(eos_token="[END]"))
    assert encoder.tokenizer.convert_ids_to_tokens(encoder.eos_id) == "[END]"
    assert encoder.tokenizer.chat_template == PAIR_TEMPLATE
    own = wordpiece()
    own.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert Encoder(own).prompt_ids(user("say red")) == ENCODER.text_ids("say red")


def test_an_encoders_tokenizer_survives_saving_and_loading(tmp_path):
    ENCODER.tokenizer.save_pretrained(tmp_path)
    again = load_encoder(str(tmp_path))
    assert again.fingerprint() == ENCODER.fingerprint()
    assert again.prompt_ids(user("Say red")) == ENCODER.prompt_ids(user("Say red"))


# R2: where an encoder's reward is read

def by_definition(model, kind, row):
    """The classifier on the pooled first token: BERT pools with tanh, DeBERTa with GELU; one row, no padding, no mask."""
    with torch.no_grad():
        hidden = model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0, 0]
        dense = model.bert.pooler.dense if kind == "bert" else model.pooler.dense
        squashed = torch.tanh(dense(hidden)) if kind == "bert" else torch.nn.functional.gelu(dense(hidden))
        return model.classifier(squashed).item()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_R2_an_encoder_is_read_where_it_pools_whatever_the_padding(kind, budget):
    model = classifier(kind)
    rows = [ENCODER.prompt_ids(user("Say " + " and ".join(THINGS[:n]))) + ENCODER.completion_ids(" ".join(THINGS[n:])) for n in (1, 5, 2, 6)]
    rows += [ENCODER.prompt_ids(user("Say pink")) + ENCODER.completion_ids("!" * n) for n in (0, 1, 19, 20)]
    expected = [by_definition(model, kind, row) for row in rows]
    found = raw_scores(model, rows, ENCODER.pad_id, budget)
    assert len({len(row) for row in rows}) > 3 and found.std() > 0.05
    assert found.tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_R2_a_saved_encoder_scores_as_before_with_every_kernel(kind, attention, tmp_path):
    """DeBERTa has no fused kernel; asked for one, as GPUs ask, it must still load."""
    model, rows = classifier(kind), [ENCODER.prompt_ids(user("Say red")) + ENCODER.completion_ids(t) for t in ("red", "blue and gold thanks", "")]
    save_model(model, ENCODER, tmp_path)
    loaded = load_reward_model(str(tmp_path), ENCODER, attention).eval()
    assert raw_scores(loaded, rows, ENCODER.pad_id).tolist() == pytest.approx(raw_scores(model, rows, ENCODER.pad_id).tolist(), abs=1e-5)


def test_B4_every_dropout_of_an_encoder_is_off(tmp_path):
    """A classifier in training mode gives the same scores twice, so nothing in it is left to chance."""
    for kind in KINDS:
        save_model(classifier(kind), ENCODER, tmp_path / kind)
        config = json.loads((tmp_path / kind / "config.json").read_text())
        (tmp_path / kind / "config.json").write_text(json.dumps({**config, "cls_dropout": 0.5, "hidden_dropout_prob": 0.5}))
        model = load_reward_model(str(tmp_path / kind), ENCODER, "eager").train()
        row = ENCODER.prompt_ids(user("Say red")) + ENCODER.completion_ids("red")
        assert torch.equal(raw_scores(model, [row], ENCODER.pad_id), raw_scores(model, [row], ENCODER.pad_id)), kind


def test_room_for_rows_by_hand():
    roberta = RobertaForSequenceClassification(RobertaConfig(vocab_size=30, max_position_embeddings=66, pad_token_id=1, **TINY))
    assert longest_row(classifier("bert")) == POSITIONS
    assert longest_row(roberta) == 64, "positions 0 and 1 stand before and on the pad id"
    assert longest_row(classifier("deberta")) is None, "relative positions"
    with torch.no_grad():
        roberta(input_ids=torch.full((1, 64), 5))
        with pytest.raises((IndexError, RuntimeError)):
            roberta(input_ids=torch.full((1, 65), 5))


# The reward stage from an encoder, and the policy's text through it

def ranking(rng, number):
    """The rule: an answer that says thanks beats one that does not."""
    answers = [f"{rng.choice(THINGS)}{' thanks' * polite} {rng.choice(THINGS)}" + " please" * rng.randrange(2)
               for polite in (0, 1, 1, 0)[: 2 + number % 3]]
    return {"prompt": user(f"Say {rng.choice(THINGS)}" + "!" * rng.randrange(3)), "completions": answers,
            "ranks": [1 if "thanks" in a else 2 for a in answers], "id": f"{number:016x}"}


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """A run folder with preferences, a random GPT with our BPE as the SFT model, and a tiny BERT and DeBERTa without heads beside it."""
    run, rng = tmp_path_factory.mktemp("start"), random.Random(1)
    torch.manual_seed(1)
    save_model(new_gpt("nano", tiny_encoder(), 64, "eager"), tiny_encoder(), run / "sft" / "model")
    BertModel(bert_config(), add_pooling_layer=False).save_pretrained(run / "bert")
    DebertaV2Model(deberta_config()).save_pretrained(run / "deberta")
    for kind in KINDS:
        wordpiece().save_pretrained(run / kind)
    for split, size in (("train", 256), ("eval", 40)):
        rows = [ranking(rng, i) for i in range(size)]
        write_jsonl(run / "data" / "preferences" / f"{split}.jsonl", rows)
        write_jsonl(run / "data" / "prompts" / f"{split}.jsonl", [{"prompt": r["prompt"], "id": r["id"]} for r in rows])
    for stage in ("prepare", "sft", "collect"):
        (run / stage).mkdir(exist_ok=True)
        (run / stage / "DONE").write_text("{}")
    return run


def config(run, **settings):
    return config_from_tree({"run": {"dir": str(run), "threads": 1, "precision": "fp32"}, "model": {"size": "nano", "context": 256},
                             "data": {"max_completion_tokens": 12, "max_prompt_tokens": 24},
                             "reward": {"init": str(run / "bert"), "batch_size": 16, "microbatch": 16, "lr": 3e-3, "normalise_prompts": 16,
                                        "epochs": 4, **settings}}, "test")


@pytest.fixture(scope="module", params=KINDS)
def trained(start, request, tmp_path_factory) -> Path:
    """The reward stage's folder, from a BERT and from a DeBERTa."""
    run = tmp_path_factory.mktemp(request.param) / "run"
    shutil.copytree(start, run, ignore=shutil.ignore_patterns("reward"))
    reward.main(config(run, init=str(run / request.param)))
    return run / "reward"


def test_R6_S4_a_reward_model_from_an_encoder_learns_the_rule(trained):
    assert json.loads((trained / "metrics.json").read_text())["eval"]["accuracy"] > 0.9


def test_R5_S4_a_trained_encoder_scores_the_text_of_a_policy_with_our_bpe(trained):
    policy_encoder, folder = tiny_encoder(), trained / "model"
    texts, prompts = ["red thanks", "blue", "gold and pink thanks please"], [user("Say red"), user("Say blue!"), user("Say gold")]
    model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and model.config.num_labels == 1
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.eos_token == tokenizer.sep_token == "[SEP]"
    expected = []
    for prompt, text in zip(prompts, texts):
        row = tokenizer.encode(f"[CLS]{prompt[0]['content']}[SEP]{text}[SEP]", add_special_tokens=False)
        with torch.no_grad():
            expected.append(model.eval()(input_ids=torch.tensor([row])).logits[0, 0].item())
    completions = [policy_encoder.completion_ids(t) for t in texts]
    found = load_scorer([folder], "mean", 0.0, "eager", "cpu")(prompts, completions, policy_encoder)
    # a random GPT's answers hardly differ to BERT, so the gain is large: what it rounds is taken out before comparing
    assert ((found.double() - model.config.reward_bias) / model.config.reward_gain).tolist() == pytest.approx(expected, abs=1e-5)
    assert min(found[0], found[2]) > found[1], "the rule it learned"


def test_what_a_checkpoint_lacks_follows_from_the_members_seed(start, tmp_path):
    """BERT's pooler, drawn where the checkpoint has none, is the same in a run that stopped between two members."""
    run = tmp_path / "run"
    shutil.copytree(start, run, ignore=shutil.ignore_patterns("reward"))
    reward.main(config(run, members=2, epochs=0.1))
    folders = [run / "reward" / name for name in ("model", "model_1")]
    before = [file_digest(f / "model.safetensors") for f in folders]
    assert before[0] != before[1]
    shutil.rmtree(folders[1])
    (run / "reward" / "DONE").unlink()
    reward.main(config(run, members=2, epochs=0.1))
    assert [file_digest(f / "model.safetensors") for f in folders] == before


def test_a_bert_too_short_for_the_rows_is_refused_with_the_remedy(start, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(start, run, ignore=shutil.ignore_patterns("reward"))
    BertModel(bert_config(positions=8)).save_pretrained(run / "bert")
    with pytest.raises(InputError, match="8 positions; lower data.max_prompt_tokens"):
        reward.main(config(run))


def distilbert(tmp_path):
    config = DistilBertConfig(vocab_size=len(ENCODER.tokenizer), dim=32, n_layers=2, n_heads=2, hidden_dim=48, max_position_embeddings=POSITIONS,
                              num_labels=1, seq_classif_dropout=0.5, pad_token_id=ENCODER.pad_id)
    DistilBertForSequenceClassification(config).save_pretrained(tmp_path)
    return load_reward_model(str(tmp_path), ENCODER, "eager")


def test_B4_dropouts_are_off_whatever_they_are_called(tmp_path):
    model = distilbert(tmp_path).train()
    row = ENCODER.prompt_ids(user("Say red")) + ENCODER.completion_ids("red")
    assert torch.equal(raw_scores(model, [row] * 8, ENCODER.pad_id), raw_scores(model, [row] * 8, ENCODER.pad_id))


def test_lora_leaves_distilberts_head_whole(tmp_path):
    adapted = add_lora(distilbert(tmp_path), 2, 4, "SEQ_CLS")
    trained = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert any("pre_classifier" in name and "lora" not in name for name in trained) and any("lora_A" in name for name in trained)
    adapted.merge_and_unload()


def test_a_reward_model_file_that_is_damaged_or_has_two_labels_is_named(tmp_path):
    distilbert(tmp_path / "good")
    shutil.copytree(tmp_path / "good", tmp_path / "cut")
    (tmp_path / "cut" / "model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="no model could be loaded"):
        load_reward_model(str(tmp_path / "cut"), ENCODER, "eager")
    two = BertForSequenceClassification(BertConfig(vocab_size=len(ENCODER.tokenizer), **{**TINY, "num_labels": 2}))
    two.save_pretrained(tmp_path / "two")
    with pytest.raises(InputError, match="no model could be loaded"):
        load_reward_model(str(tmp_path / "two"), ENCODER, "eager")
