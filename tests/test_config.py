"""Settings: what is accepted, what is refused, and that a refusal names the key, what was found, what was wanted."""

import dataclasses

import pytest
import yaml

from rlhf.config import CHOICES, NOT_NEGATIVE, POSITIVE, RANGES, Config, config_from_tree, config_to_tree, describe_settings, load_config
from rlhf.errors import InputError
from rlhf.paths import shipped


def load(*overrides, text=""):
    return config_from_tree(yaml.safe_load(text) or {}, "file.yaml") if text else load_config("configs/quickstart.yaml", list(overrides))


def dotted_names():
    return {f"{section.name}.{spec.name}" for section in dataclasses.fields(Config) if dataclasses.is_dataclass(section.type)
            for spec in dataclasses.fields(section.type)} | {"seed"}


# What is read

def test_overrides_stand_above_the_file_and_the_file_above_the_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("seed: 7\nppo: {lr: 0.5, clip: 0.3}\n")
    config = load_config(str(file), ["ppo.lr=0.25"])
    assert (config.seed, config.ppo.lr, config.ppo.clip, config.ppo.lam) == (7, 0.25, 0.3, Config().ppo.lam)


@pytest.mark.parametrize(("override", "section", "key", "value"), [
    ("ppo.lr=1e-4", "ppo", "lr", 1e-4),  # text to YAML
    ("ppo.lr=1", "ppo", "lr", 1.0),
    ("world.documents=1e3", "world", "documents", 1000),
    ("world.documents=20.0", "world", "documents", 20),
    ("ppo.target_kl=null", "ppo", "target_kl", None),
    ("ppo.target_kl=0.05", "ppo", "target_kl", 0.05),
    ("ppo.whiten_rewards=true", "ppo", "whiten_rewards", True),
    ("data.text=[a.jsonl, b.jsonl]", "data", "text", ["a.jsonl", "b.jsonl"]),
    ("data.text=a.jsonl", "data", "text", ["a.jsonl"]),
    ("data.mapping={prompt: question}", "data", "mapping", {"prompt": "question"}),
    ("model.init=some/model", "model", "init", "some/model"),
    ("ppo.mix={my_module:f: 0.5, some/folder: -2, other:g: 1e-1}", "ppo", "mix", {"my_module:f": 0.5, "some/folder": -2.0, "other:g": 0.1}),
])
def test_values_take_the_type_of_their_setting(override, section, key, value):
    found = getattr(getattr(load(override), section), key)
    assert found == value and type(found) is type(value)


def test_a_path_may_begin_with_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load("run.dir=~/runs/x", "model.init=~/models/a", "reward.init=~/b", "compare.judge=~/runs/y/reward/model",
                  "ppo.mix={~/c: 1, m:f: 2, o/d: 3}")
    assert (config.run.dir, config.model.init, config.reward.init) == ("/home/me/runs/x", "/home/me/models/a", "/home/me/b")
    assert config.compare.judge == "/home/me/runs/y/reward/model" and config.ppo.mix == {"/home/me/c": 1, "m:f": 2, "o/d": 3}
    assert load("run.dir=runs/~x", "model.init=a/~").run.dir == "runs/~x" and load().model.init is None


def test_a_heading_with_nothing_below_it_is_an_empty_section(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("ppo:\nrun:\n")
    assert load_config(str(file), ["ppo.lr=0.5"]).ppo.lr == 0.5


def test_a_config_survives_being_written_and_read():
    config = load("seed=3", "ppo.target_kl=0.1", "data.text=[x]", "data.mapping={a: b}", "ppo.mix={m:f: 2}")
    assert [type(weight) for weight in config.ppo.mix.values()] == [float]
    assert config_from_tree(yaml.safe_load(yaml.safe_dump(config_to_tree(config))), "there") == config


def test_defaults_are_not_shared_between_configs():
    first = Config()
    first.data.text.append("changed")
    assert Config().data.text == []


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        load().ppo.lr = 1.0


def test_help_lists_every_setting_with_default_and_meaning():
    lines = {line.split("=")[0].strip(): line for line in describe_settings().splitlines()}
    assert lines.keys() == dotted_names()
    for name, line in lines.items():
        assert len(line.split("  ")[-1].strip()) > 4, name
    assert "ppo.lam=0.95" in lines["ppo.lam"]


def test_checks_name_settings_that_exist():
    names = {line.split("=")[0].strip() for line in describe_settings().splitlines()}
    assert {*CHOICES, *RANGES, *POSITIVE, *NOT_NEGATIVE} <= names


def test_the_defaults_and_every_shipped_file_pass_their_own_checks():
    config_from_tree({}, "defaults")
    for file in shipped("configs").glob("*.yaml"):
        load_config(str(file))


def test_the_gold_score_exists_only_for_prompts_of_the_world():
    assert load().uses_world and load("data.text=[x]").uses_world
    assert not load("data.preferences=[x]").uses_world and not load("data.prompts=[x]").uses_world


# What is refused

def refusal(*overrides, **how):
    with pytest.raises(InputError) as caught:
        load(*overrides, **how)
    return str(caught.value)


@pytest.mark.parametrize(("override", "names", "nearest"), [
    ("ppo.learning_rte=1", "ppo.learning_rte", ""), ("ppo.clp=1", "ppo.clp", "ppo.clip"), ("ppo.kl_coeff=1", "ppo.kl_coeff", "ppo.kl_coef"),
    ("sede=1", "sede", "seed"), ("reward.member=2", "reward.member", "reward.members"), ("sft.ppo.lr=1", "sft.ppo", ""),
])
def test_an_unknown_setting_is_named_with_the_nearest_legal_one(override, names, nearest):
    message = refusal(override)
    assert names in message and (f"Did you mean {nearest}?" if nearest else "--help") in message


@pytest.mark.parametrize(("override", "words"), [
    ("ppo.lr=fast", ["ppo.lr", "'fast'", "float"]),
    ("ppo.rollouts=1.5", ["ppo.rollouts", "1.5", "int"]),
    ("ppo.rollouts=true", ["ppo.rollouts", "True", "int"]),
    ("ppo.rollouts=null", ["ppo.rollouts", "None", "int"]),
    ("ppo.whiten_rewards=1", ["ppo.whiten_rewards", "1", "bool"]),
    ("ppo.target_kl=high", ["ppo.target_kl", "'high'", "float or null"]),
    ("data.text=[a, 2]", ["data.text[1]", "2", "str"]),
    ("data.text={a: b}", ["data.text", "{'a': 'b'}", "list[str]"]),
    ("compare.shots=[0, few]", ["compare.shots[1]", "'few'", "int"]),
    ("compare.shots=[0, 17]", ["compare.shots", "[0, 17]", "from 0 to 16"]),
    ("compare.shots=-1", ["compare.shots", "[-1]", "from 0 to 16"]),
    ("data.mapping=x", ["data.mapping", "'x'", "dict"]),
    ("ppo.mix=my_module:f", ["ppo.mix", "'my_module:f'", "dict[str, float]"]),
    ("ppo.mix=[my_module:f]", ["ppo.mix", "dict[str, float]"]),
    ("ppo.mix={m:f: half}", ["ppo.mix[m:f]", "'half'", "float"]),
    ("ppo.mix={m:f: true}", ["ppo.mix[m:f]", "True", "float"]),
    ("ppo.mix={m:f: }", ["ppo.mix[m:f]", "None", "float"]),
    ("ppo.mix={m:f: 1, n:g: .nan}", ["ppo.mix[n:g]", "nan", "finite"]),
    ("ppo.mix={m:f: 0}", ["ppo.mix[m:f]", "0", "leave the source out"]),
    ("run.dir=[a]", ["run.dir", "['a']", "str"]),
    ("ppo=3", ["ppo", "3", "section"]),
    ("ppo.clip", ["'ppo.clip'", "section.key=value"]),
    ("=3", ["'=3'", "section.key=value"]),
    ("ppo.lr.x=3", ["ppo.lr"]),
    ("ppo.lr={", ["ppo.lr", "YAML"]),
])
def test_a_wrong_value_is_named_with_what_was_wanted(override, words):
    message = refusal(override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize("override", [
    "ppo.lr=0", "ppo.lr=-1", "ppo.lr=.nan", "ppo.lr=.inf", "ppo.clip=0", "ppo.kl_coef=-0.1", "ppo.kl_coef=.nan", "ppo.kl_target=0", "ppo.target_kl=0",
    "ppo.lam=1.1", "ppo.gamma=-0.1", "ppo.ema_decay=2", "ppo.epochs=0", "ppo.temperature=0", "collect.k=1", "collect.k=10", "world.agreement=0.4",
    "data.test_fraction=0.9", "reward.members=0", "reward.ties=none", "ppo.value_model=both", "ppo.ensemble=best", "model.size=huge",
    "run.precision=fp16", "model.lora_rank=-1", "run.threads=-1", "model.vocab_size=100", "ppo.max_grad_norm=0", "ppo.missing_eos_score=.inf",
    "model.lora_alpha=0", "pretrain.block=1",
])
def test_values_out_of_range_are_refused_by_name(override):
    assert override.split("=")[0] in refusal(override)


def test_a_batch_that_does_not_divide_is_refused_with_both_numbers():
    message = refusal("ppo.batch_size=100", "ppo.minibatches=3")
    assert "ppo.batch_size=100" in message and "ppo.minibatches=3" in message


def test_an_adaptive_kl_coefficient_needs_a_start_and_a_horizon_that_keeps_it_above_0():
    """LHP section 2.2: the coefficient is multiplied by 1 + error·completions/horizon, the error no less than -0.2."""
    assert "ppo.kl_coef=0" in refusal("ppo.kl_target=6", "ppo.kl_coef=0")
    message = refusal("ppo.kl_target=6", "ppo.batch_size=500", "ppo.minibatches=1", "ppo.kl_horizon=100")  # 1 - 0.2·500/100 = 0
    assert "ppo.kl_horizon=100" in message and "ppo.batch_size=500" in message
    assert load_config("configs/tiny.yaml", ["ppo.kl_target=6", "ppo.batch_size=500", "ppo.minibatches=1", "ppo.kl_horizon=101"])
    assert load_config("configs/tiny.yaml", ["ppo.kl_coef=0", "ppo.kl_horizon=1"])  # no matter where nothing adapts


def test_a_context_too_short_for_the_data_is_refused_unless_the_backbone_is_given():
    assert "model.context" in refusal("model.context=64")
    load("model.context=64", "model.init=some/model")
    data = ["data.max_prompt_tokens=70", "data.max_completion_tokens=58", "pretrain.block=64"]
    load("model.context=128", *data)
    refusal("model.context=130", "data.max_prompt_tokens=72", *data[1:])  # 130 tokens, in batches 136 wide


def test_a_file_that_is_not_there_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"no-such\.yaml.*configs/quickstart\.yaml"):
        load_config("no-such.yaml")


@pytest.mark.parametrize(("text", "says"), [("- a\n- b\n", "list"), ("ppo: [", "YAML"), ("just text", "str"), ("ppo: []", "section"), ("1: 2", "1")])
def test_a_file_that_is_no_mapping_of_sections_is_refused_by_name(tmp_path, text, says):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=says) as caught:
        load_config(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(("text", "key", "line", "first"), [
    ("ppo: {lr: 0.1}\nsft: {}\nppo: {clip: 0.3}\n", "ppo", 3, 1),
    ("ppo:\n  lr: 0.1\n  clip: 0.3\n\n  # again\n  'lr': 0.2\n", "lr", 6, 2),
    ("data:\n  mapping: {prompt: a, chosen: b,\n    prompt: c}\n", "prompt", 3, 2)])
def test_what_stands_twice_is_refused_with_its_lines(tmp_path, text, key, line, first):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=f"line {line}: {key} stands in line {first} already") as caught:
        load_config(str(file))
    assert str(caught.value).startswith(f"{file}: ") and caught.value.exit_code == 2


def test_what_stands_twice_in_an_override_is_refused():
    assert "m:f stands in line 1 already" in (said := refusal("ppo.mix={m:f: 1, n:g: 2, m:f: 3}")) and "'ppo.mix=" in said


def test_two_merges_are_merged(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("sft: &a {lr: 0.1}\nreward: &b {epochs: 2}\nppo:\n  <<: *a\n  <<: *b\n")
    assert (load_config(str(file)).ppo.lr, load_config(str(file)).ppo.epochs) == (0.1, 2)


def test_a_key_may_stand_beside_the_one_that_a_merge_brings(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("sft: &common {lr: 0.1, epochs: 2}\nreward: {<<: *common, lr: 0.2}\n")
    reward = load_config(str(file)).reward
    assert (reward.lr, reward.epochs) == (0.2, 2)


def test_a_folder_or_bytes_in_place_of_a_file_are_refused(tmp_path):
    (tmp_path / "x.yaml").write_bytes(b"\xff\xfe\x00")
    for path in (str(tmp_path / "x.yaml"), "configs"):
        with pytest.raises(InputError):
            load_config(path)
