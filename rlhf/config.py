"""Settings: typed frozen defaults, one YAML file per experiment, dotted overrides on the command line.

Every setting is a field with its default, unit and meaning; unknown keys fail and name the nearest legal one. Library functions take
values, not this object: only `stages/` and the orchestration read it.
"""

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from rlhf.errors import InputError
from rlhf.paths import from_home, shipped


def setting(default, help: str):  # noqa: A002 - "help" is the word --help uses
    """A field with its default and the line that `--help` prints for it."""
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Run:
    dir: str = setting("runs/quickstart", "the run folder, RUN in these texts; every stage writes into a folder of its own below it")
    threads: int = setting(0, "CPU threads per process; 0: the cores this process may use, shared out among the processes of this machine")
    precision: str = setting("auto", "auto, bf16 or fp32: of the passes; weights and optimizer are always fp32. auto: bf16 where the hardware has it")
    save_every: int = setting(200, "optimizer steps between checkpoints in pretrain, sft and reward; ppo has ppo.save_every")
    keep_checkpoints: int = setting(1, "checkpoints kept per stage; older ones are deleted")


@dataclass(frozen=True)
class Model:
    init: str | None = setting(None, "backbone: a hub id, a local folder or a .gguf file; null: a small GPT-2 of model.size is pretrained")
    size: str = setting("micro", "nano, micro, mini or gpt2: the shape of the small GPT when model.init is null")
    vocab_size: int = setting(2048, "tokens of the byte-level BPE made from the run's own text when model.init is null")
    context: int = setting(256, "positions of the small GPT, tokens")
    attention: str = setting("auto", "attention kernel of transformers; auto: sdpa on accelerators, eager on CPUs (measured faster for short rows)")
    compile: bool = setting(False, "training passes by torch.compile: after a minute or two a stage, those of a model of 100M parameters take two "
                            "thirds of the time on CPUs; needs a C++ compiler; a resumed run may differ in rounding")
    lora_rank: int = setting(0, "rank of LoRA adapters in sft, reward and ppo; 0: all weights are trained")
    lora_alpha: int = setting(16, "scale of the LoRA update, divided by the rank")
    trust_remote_code: bool = setting(False, "run Python code that comes with model.init; only for code you have read")


@dataclass(frozen=True)
class Data:
    text: list[str] = setting([], "files or hub ids for pretraining; empty: the demonstrations, or the embedded world")
    demonstrations: list[str] = setting([], "files or hub ids for SFT; empty: the best answers of the preferences, or the embedded world")
    preferences: list[str] = setting([], "files or hub ids for the reward model; empty: `collect` samples and ranks answers of the SFT model")
    prompts: list[str] = setting([], "files or hub ids for PPO and compare; empty: those of preferences or demonstrations, or of the embedded world")
    mapping: dict[str, str] = setting({}, "canonical field -> column of your files, where the schema is not recognised")
    max_prompt_tokens: int = setting(96, "tokens; rows with a longer prompt are dropped and counted")
    max_completion_tokens: int = setting(64, "tokens with the end token; rows with a longer completion are dropped and counted")
    eval_fraction: float = setting(0.05, "share of prompts (by hash) kept for evaluation while training")
    test_fraction: float = setting(0.1, "share of prompts (by hash) kept for compare alone")
    judge_fraction: float = setting(0.0, "share of the training preferences (by prompt hash) that only compare's judge model is trained on")


@dataclass(frozen=True)
class World:
    documents: int = setting(80_000, "pretraining documents the simulator writes")
    demonstrations: int = setting(8_000, "demonstrations by writers of mixed skill")
    prompts: int = setting(20_000, "training prompts for collect and ppo")
    test_prompts: int = setting(500, "held-out prompts for compare")
    flaw_rate: float = setting(0.5, "share of the demonstrations that have a flaw, 0 to 1; more where writers share a habit, less elsewhere")
    text_flaw_rate: float = setting(0.05, "share of the pretraining documents that state something wrong, 0 to 1")
    agreement: float = setting(0.73, "share of pairs on which two simulated raters agree (InstructGPT reports 0.73)")


@dataclass(frozen=True)
class Pretrain:
    steps: int = setting(2100, "optimizer steps")
    batch_tokens: int = setting(1536, "tokens in a step, padding included, all processes together")
    block: int = setting(128, "longest row, tokens; longer documents are cut into pieces")
    lr: float = setting(3e-3, "peak learning rate of embeddings, norms and biases (AdamW); warm-up over 2 percent, then linear to 0")
    matrix_lr: float = setting(0.02, "peak learning rate of the blocks' matrices (Muon)")
    weight_decay: float = setting(0.0, "weight decay of the matrices")


@dataclass(frozen=True)
class Sft:
    epochs: float = setting(1.0, "passes over the demonstrations")
    batch_size: int = setting(32, "demonstrations in an optimizer step, all processes together")
    microbatch: int = setting(32, "demonstrations in memory at once, per process")
    lr: float = setting(5e-4, "peak learning rate; warm-up over 3 percent, then cosine to 0")
    lm_loss_weight: float = setting(0.0, "weight of the language-model loss on prompt tokens (GPT-1: 0.5)")


@dataclass(frozen=True)
class Collect:
    prompts: int = setting(7_000, "training prompts that get ranked answers")
    eval_prompts: int = setting(400, "held-out prompts that get ranked answers, for the reward model's evaluation")
    k: int = setting(4, "answers sampled and ranked per prompt, 2 to 9")
    temperature: float = setting(1.0, "sampling temperature")
    batch_size: int = setting(1024, "completions sampled together")


@dataclass(frozen=True)
class Reward:
    init: str = setting("sft", "sft: starts from the SFT model; or a hub id or folder of any model with a sequence-classification head")
    members: int = setting(1, "reward models in the ensemble, each with its own seed")
    epochs: float = setting(1.0, "passes over the rankings")
    batch_size: int = setting(32, "prompts in an optimizer step, all processes together; each brings all its answers")
    microbatch: int = setting(32, "prompts in memory at once, per process")
    lr: float = setting(2e-4, "peak learning rate; warm-up over 3 percent, then linear to 0")
    normalise_prompts: int = setting(256, "prompts whose SFT samples set the normalisation to mean 0, standard deviation 1")
    ties: str = setting("drop", "drop, or half: a tied pair counts with label one half")
    flip_rate: float = setting(0.0, "share of the training rankings turned round before training, 0 to 1: label noise for experiments")


@dataclass(frozen=True)
class Ppo:
    rollouts: int = setting(30, "PPO steps: rollouts sampled and learned from")
    batch_size: int = setting(256, "prompts in a rollout, all processes together")
    minibatches: int = setting(4, "optimizer steps per epoch over a rollout")
    epochs: int = setting(1, "passes over each rollout")
    microbatch_tokens: int = setting(8192, "tokens in memory at once in training passes, per process; scoring takes twice, sampling 16 times as many")
    lr: float = setting(2e-4, "peak learning rate of the policy, linear to 0 over the run")
    last_norm_lr: float | None = setting(None, "peak learning rate of the length of the gain in the policy's last norm, trained as one number: how "
                                         "sure it is; 0.08 changes it by up to 8 % a step; null: its entries at ppo.lr; no matter with LoRA")
    value_lr: float = setting(3e-4, "peak learning rate of the value model, linear to 0")
    warmup_rollouts: int = setting(2, "rollouts in which only the value model learns")
    # DEPARTS: P7's fixed price is 0.05; at 0.1 a weaker base's PPO over-optimised, and today's gains nothing by it (configs/EXPERIMENTS.md)
    kl_coef: float = setting(0.15, "price of one nat of KL to the SFT policy, in units of the normalised score")
    likelihood_coef: float = setting(0.0, "added to the reward for each nat of a completion's log-probability under the SFT policy: it makes the "
                                     "policy surer of what SFT finds likely; 0: the score and KL alone")
    kl_target: float | None = setting(None, "nats per completion; set: the KL coefficient adapts to it (horizon kl_horizon)")
    kl_horizon: int = setting(10_000, "completions, time constant of the adaptive KL coefficient")
    gamma: float = setting(1.0, "discount")
    lam: float = setting(0.95, "lambda of generalised advantage estimation")
    clip: float = setting(0.2, "half-width of the ratio clip")
    value_clip: float = setting(0.2, "half-width of the value clip around the old value")
    value_coef: float = setting(0.1, "weight of the value loss")
    value_model: str = setting("separate", "separate: its own network on the reward model's trunk; shared: a head on the policy's trunk")
    whiten_rewards: bool = setting(False, "scale the per-token rewards to variance 1, keeping their mean")
    max_grad_norm: float = setting(1.0, "gradient clipping, each network by itself")
    target_kl: float | None = setting(None, "stop the epochs of a rollout when approximate KL to the old policy passes this; null: never")
    temperature: float = setting(1.0, "divides the logits in sampling and in every log-probability")
    missing_eos_score: float = setting(-1.0, "score of a completion that does not end, in place of the reward model's")
    ptx_coef: float = setting(0.0, "weight of the language-model loss on SFT batches in the same step (InstructGPT: 27.8 on pretraining text)")
    ema_decay: float = setting(0.0, "decay of the moving average of the weights that is saved in place of the last ones; 0: off (InstructGPT: 0.992)")
    ensemble: str = setting("mean", "mean, worst or uncertainty: how an ensemble's scores combine")
    uncertainty_coef: float = setting(1.0, "weight of the members' variance with ppo.ensemble=uncertainty")
    score: str | None = setting(None, "module:function, a callable f(prompts, completions) -> list of float in place of the reward model")
    mix: dict[str, float] = setting({}, "source -> weight, added to that score: a callable's module:function, or a reward model's folder or hub id")
    hand_over: str = setting("last", "last or best: which weights become ppo/model, those after the last rollout or those of the best evaluation")
    save_every: int = setting(10, "rollouts between checkpoints")
    eval_every: int = setting(10, "rollouts between evaluations on held-out prompts")
    eval_prompts: int = setting(128, "held-out prompts of these evaluations")
    stop_on_alarm: bool = setting(False, "stop (exit code 3) when an alarm of rlhf/alarms.py rings, instead of warning and going on")


@dataclass(frozen=True)
class Compare:
    policies: list[str] = setting(["pretrained", "sft", "best_of_4", "ppo"],
                                  "who answers; best_of_N: of N SFT answers the reward model's choice; sft_at_T: SFT at the temperature T, such as "
                                  "sft_at_0.5; besides sft_again (a second draw), untrained (SFT's shape, fresh weights), ppo_last (the last "
                                  "weights where ppo.ema_decay is set), round_N/ppo (that of an earlier round)")
    prompts: int = setting(500, "held-out prompts")
    judge: str = setting("auto", "gold, judge (a reward model of its own on kept-apart prompts), proxy, a reward model's folder, or "
                               "module:function, a judge f(prompt, first, second) -> above 0 where first is better, below 0 where second is; "
                               "auto: the first at hand")
    temperature: float = setting(1.0, "sampling temperature of every policy but sft_at_T")
    batch_size: int = setting(500, "completions sampled together")
    shots: list[int] = setting([], "solved examples in front of tasks of the embedded world, such as [0, 1, 4]: how each policy learns in context")
    shot_tasks: int = setting(200, "tasks for compare.shots")


@dataclass(frozen=True)
class Pipeline:
    rounds: int = setting(1, "rounds of collect, reward and ppo; from the second on, answers of the last policy are ranked too (iterated RLHF)")
    early_rollouts: int = setting(15, "PPO rollouts in every round but the last")


@dataclass(frozen=True)
class Config:
    """All settings of an experiment."""

    seed: int = setting(1, "every random draw of the run follows from it")
    run: Run = field(default_factory=Run)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    world: World = field(default_factory=World)
    pretrain: Pretrain = field(default_factory=Pretrain)
    sft: Sft = field(default_factory=Sft)
    collect: Collect = field(default_factory=Collect)
    reward: Reward = field(default_factory=Reward)
    ppo: Ppo = field(default_factory=Ppo)
    compare: Compare = field(default_factory=Compare)
    pipeline: Pipeline = field(default_factory=Pipeline)

    @property
    def uses_world(self) -> bool:
        """True when the prompts come from the embedded world, so that a gold score exists."""
        return not (self.data.prompts or self.data.preferences or self.data.demonstrations)


def load_config(path: str | None, overrides: list[str] | None = None) -> Config:
    """The experiment at `path` (None: configs/quickstart.yaml) with dotted overrides such as ``ppo.lr=1e-4`` applied and checked.

    A relative path is looked up in the working directory, then among the shipped files. Raises InputError.
    """
    file = _find_config(path or "configs/quickstart.yaml")
    try:
        tree = _read_yaml(file.read_text(encoding="utf-8")) or {}
    except _Repeated as error:
        raise InputError(f"{file}: {error}") from None
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: not readable as YAML: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{file}: found a {type(tree).__name__}, wanted a mapping of sections such as `ppo:`")
    for override in overrides or []:
        _apply_override(tree, override)
    return config_from_tree(tree, str(file))


class _Repeated(yaml.YAMLError):
    """A key that stands twice in one mapping."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, where YAML itself would take the last value and forget the others."""

    def compose_mapping_node(self, anchor):  # before a merge (<<) adds keys, which may stand here as well
        node, lines = super().compose_mapping_node(anchor), {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"):
            line = key.start_mark.line + 1
            if key.value in lines:
                raise _Repeated(f"line {line}: {key.value} stands in line {lines[key.value]} already; keep one of the two, only the last would count")
            lines[key.value] = line
        return node


def _read_yaml(text: str):
    return yaml.load(text, _Loader)


def config_from_tree(tree: dict, where: str) -> Config:
    """A checked Config from nested dicts; `where` names their origin in messages."""
    config = _build(Config, tree, "", where)
    _check(config)
    return config


def config_to_tree(config) -> dict:
    """The nested dicts of a Config, as `config.yaml` holds them."""
    return dataclasses.asdict(config)


def replace_section(config: Config, section: str, **values) -> Config:
    """`config` with some settings of one section changed."""
    return dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **values)})


def describe_settings() -> str:
    """One line per setting: dotted name, default, meaning with unit (what --help prints)."""
    lines = []
    for name, spec, default in _walk(Config(), ""):
        lines.append(f"  {name + '=' + yaml.safe_dump(default, default_flow_style=True).splitlines()[0]:<29}  {spec.metadata['help']}")
    return "\n".join(lines)


def _walk(section, prefix):
    for spec in dataclasses.fields(section):
        value = getattr(section, spec.name)
        if dataclasses.is_dataclass(value):
            yield from _walk(value, f"{prefix}{spec.name}.")
        else:
            yield prefix + spec.name, spec, value


def _find_config(path: str) -> Path:
    if Path(path).is_file():
        return Path(path)
    try:
        return shipped(path)
    except FileNotFoundError:
        found = sorted(p.name for p in shipped("configs").glob("*.yaml"))
        raise InputError(f"--config {path}: no such file. Shipped: {', '.join('configs/' + n for n in found)}") from None


def _apply_override(tree: dict, override: str) -> None:
    name, equals, text = override.partition("=")
    if not equals or not name:
        raise InputError(f"{override!r}: found no '=', wanted section.key=value, such as ppo.lr=1e-4")
    *sections, key = name.split(".")
    for section in sections:
        if tree.get(section) is None:  # absent, or a heading in the file with nothing below it
            tree[section] = {}
        tree = tree[section]
        if not isinstance(tree, dict):
            raise InputError(f"{override!r}: {section} is not a section of settings")
    try:
        tree[key] = _read_yaml(text)
    except _Repeated as error:
        raise InputError(f"{override!r}: {error}") from None
    except yaml.YAMLError:
        raise InputError(f"{override!r}: the value is not readable as YAML") from None


def _build(cls, tree, prefix: str, where: str):
    if not isinstance(tree, dict):
        raise InputError(f"{where}: {prefix.rstrip('.') or 'the file'}: found {tree!r}, wanted a section of settings")
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in tree.items():
        if key not in hints:
            raise InputError(f"{where}: unknown setting {prefix}{key}. {_nearest(prefix + str(key))} `--help` lists all settings.")
        if dataclasses.is_dataclass(hints[key]):
            values[key] = _build(hints[key], {} if value is None else value, f"{prefix}{key}.", where)
        else:
            values[key] = _coerce(value, hints[key], prefix + key, where)
    return cls(**values)


def _nearest(name: str) -> str:
    legal = [n for n, _, _ in _walk(Config(), "")]
    close = difflib.get_close_matches(name, legal, 1, 0.5) or difflib.get_close_matches(name.split(".")[-1], legal, 1, 0.3)
    return f"Did you mean {close[0]}?" if close else ""


def _coerce(value, wanted, name: str, where: str):
    """YAML reads 1e-4 as text and 1 as int: accept what the type allows, refuse everything else."""
    options = typing.get_args(wanted) if isinstance(wanted, types.UnionType) else (wanted,)
    if value is None and type(None) in options:
        return None
    kind = next(o for o in options if o is not type(None))
    if typing.get_origin(kind) is list and isinstance(value, (list, str, int)):
        entries = value if isinstance(value, list) else [value]
        return [_coerce(v, typing.get_args(kind)[0], f"{name}[{i}]", where) for i, v in enumerate(entries)]
    if typing.get_origin(kind) is dict and isinstance(value, dict):
        values_kind = typing.get_args(kind)[1]
        path = from_home if name in PATHS else str
        return {path(str(k)): str(v) if values_kind is str else _coerce(v, values_kind, f"{name}[{k}]", where) for k, v in value.items()}
    try:
        if kind is float and not isinstance(value, bool) and isinstance(value, (int, float, str)):
            return float(value)
        if kind is int and not isinstance(value, bool) and (isinstance(value, int) or float(value).is_integer()):
            return value if isinstance(value, int) else int(float(value))
    except (TypeError, ValueError, OverflowError):
        pass  # falls through to the one message below
    if kind in (str, bool) and isinstance(value, kind):
        return from_home(value) if name in PATHS else value
    label = getattr(kind, "__name__", str(kind)) if typing.get_origin(kind) is None else str(kind)
    raise InputError(f"{where}: {name}: found {value!r}, wanted {label}{' or null' if type(None) in options else ''}")


PATHS = ("run.dir", "model.init", "reward.init", "ppo.mix", "compare.judge")  # may begin with ~; those of `data` are looked up where they are read
CHOICES = {
    "run.precision": ("auto", "bf16", "fp32"),
    "model.size": ("nano", "micro", "mini", "gpt2"),
    "model.attention": ("auto", "eager", "sdpa", "flash_attention_2"),
    "reward.ties": ("drop", "half"),
    "ppo.value_model": ("separate", "shared"),
    "ppo.ensemble": ("mean", "worst", "uncertainty"),
    "ppo.hand_over": ("last", "best"),
}
RANGES = {  # lowest and highest legal value
    "seed": (0, 2**32 - 1), "collect.k": (2, 9), "world.flaw_rate": (0, 1), "world.text_flaw_rate": (0, 1), "world.agreement": (0.5, 1),
    "data.eval_fraction": (0, 0.5), "data.test_fraction": (0, 0.5), "data.judge_fraction": (0, 0.9), "ppo.lam": (0, 1), "ppo.gamma": (0, 1),
    "ppo.ema_decay": (0, 1), "ppo.temperature": (1e-3, 100), "compare.temperature": (1e-3, 100), "collect.temperature": (1e-3, 100),
    "reward.members": (1, 16), "reward.flip_rate": (0, 1), "pretrain.block": (2, 1 << 20), "model.lora_alpha": (1, 1 << 20),
    "pipeline.rounds": (1, 10), "model.context": (8, 1 << 20), "model.vocab_size": (261, 1 << 20),
    "data.max_prompt_tokens": (1, 1 << 20), "data.max_completion_tokens": (2, 1 << 20),
}
POSITIVE = (
    "pretrain.steps", "pretrain.batch_tokens", "pretrain.lr", "pretrain.matrix_lr",
    "sft.epochs", "sft.batch_size", "sft.microbatch", "sft.lr",
    "collect.prompts", "collect.eval_prompts", "collect.batch_size", "reward.epochs", "reward.batch_size", "reward.microbatch", "reward.lr",
    "reward.normalise_prompts", "ppo.rollouts", "ppo.batch_size", "ppo.minibatches", "ppo.epochs", "ppo.microbatch_tokens", "ppo.lr",
    "ppo.last_norm_lr", "ppo.value_lr", "ppo.eval_every", "ppo.save_every", "ppo.eval_prompts", "ppo.kl_horizon", "compare.prompts",
    "compare.batch_size", "run.save_every", "run.keep_checkpoints", "ppo.clip", "ppo.value_clip", "ppo.max_grad_norm", "ppo.kl_target",
    "ppo.target_kl", "pipeline.early_rollouts", "compare.shot_tasks",
)
MOST_SHOTS = 16  # the smallest families of the world have few more arguments
NOT_NEGATIVE = (
    "run.threads", "model.lora_rank", "world.documents", "world.demonstrations", "world.prompts", "world.test_prompts", "pretrain.weight_decay",
    "sft.lm_loss_weight", "ppo.warmup_rollouts", "ppo.kl_coef", "ppo.likelihood_coef", "ppo.value_coef", "ppo.ptx_coef", "ppo.uncertainty_coef",
)


def _check(config: Config) -> None:
    """Ranges, choices and combinations; the message carries the remedy. Raises InputError."""
    values = {name: value for name, _, value in _walk(config, "")}
    for name, choices in CHOICES.items():
        if values[name] not in choices:
            raise InputError(f"{name}: found {values[name]!r}, wanted one of {', '.join(choices)}")
    for name, (low, high) in RANGES.items():
        if not low <= values[name] <= high:
            raise InputError(f"{name}: found {values[name]}, wanted a value from {low} to {high}")
    for name in POSITIVE:
        if values[name] is not None and not values[name] > 0:
            raise InputError(f"{name}: found {values[name]}, wanted more than 0")
    for name in NOT_NEGATIVE:
        if not values[name] >= 0:
            raise InputError(f"{name}: found {values[name]}, wanted 0 or more")
    entries = {f"{name}[{key}]": entry for name, value in values.items() if isinstance(value, dict) for key, entry in value.items()}
    for name, value in {**values, **entries}.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name}: found {value}, wanted a finite number")
    if not all(0 <= shots <= MOST_SHOTS for shots in config.compare.shots):
        raise InputError(f"compare.shots: found {config.compare.shots}, wanted numbers from 0 to {MOST_SHOTS}")
    if not config.compare.policies:
        raise InputError("compare.policies: found none, wanted at least one, say [sft, ppo]")
    for source, weight in config.ppo.mix.items():
        if weight == 0:
            raise InputError(f"ppo.mix[{source}]: found weight 0, which scores for nothing; leave the source out or give it a weight")
    if config.ppo.batch_size % config.ppo.minibatches:
        raise InputError(f"ppo.batch_size={config.ppo.batch_size} is not a multiple of ppo.minibatches={config.ppo.minibatches}; change one of them")
    if config.ppo.kl_target is not None:  # a rollout changes the coefficient by a share of 0.2·batch_size/kl_horizon at most
        if config.ppo.kl_coef == 0:
            raise InputError("ppo.kl_target: found ppo.kl_coef=0, which stays 0, for adapting multiplies it; give it a start, say 0.1")
        if config.ppo.batch_size >= 5 * config.ppo.kl_horizon:
            raise InputError(f"ppo.kl_horizon={config.ppo.kl_horizon}: found ppo.batch_size={config.ppo.batch_size}, with which a rollout could take "
                             "the price of KL to 0 or below; raise ppo.kl_horizon above a fifth of the batch")
    if config.model.init is None:
        wanted = config.data.max_prompt_tokens + config.data.max_completion_tokens
        if max(wanted, config.pretrain.block) > config.model.context // 8 * 8:  # widths of batches are rounded up to multiples of 8
            raise InputError(f"model.context={config.model.context} is shorter than a prompt with its completion ({wanted} tokens) "
                             f"or pretrain.block={config.pretrain.block}; raise model.context")
