"""Backbones: the small GPT and its tokenizer, and any causal LM of `transformers`; loading, saving, LoRA, the head of a reward model.

Everything is loaded in fp32 (the master weights) with dropout off (CANON B4); precision of the passes is accelerate's business.
"""

import contextlib
import math
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.pytorch_utils import Conv1D

from rlhf.encoding import ASSISTANT, END, PAD, SMALL_TEMPLATE, SYSTEM, USER, Encoder
from rlhf.errors import InputError, first_line
from rlhf.progress import say

# DEPARTS: B1's 1024 positions do not come with the size gpt2; model.context sets them (256), because rows here are short (GPT-2, section 2.3)
SIZES = {  # name: (layers, width, heads); parameters with a 2,048-token vocabulary: 0.2M, 2.2M, 11.5M, 87M
    "nano": (2, 64, 2),
    "micro": (4, 192, 6),
    "mini": (6, 384, 6),
    "gpt2": (12, 768, 12),
}
GRAPHS = 64  # of one block, in all modes together (with and without gradients, adapters on and off); torch gives up after 8
COMPILE = {"dynamic": True}


def attention_kernel(wanted: str, device: torch.device | str) -> str:
    """The attention implementation to ask `transformers` for.

    On CPUs the backward of the fused kernel took 43 % of a training step at rows of 24 tokens (configs/EXPERIMENTS.md): plain products win.
    """
    if wanted != "auto":
        return wanted
    return "eager" if torch.device(device).type == "cpu" else "sdpa"


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's kind) of `vocab_size` tokens made from `texts`, with the small template's five markers."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    markers = [PAD, END, USER, ASSISTANT, SYSTEM]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=markers, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token=PAD, eos_token=END, extra_special_tokens=[USER, ASSISTANT, SYSTEM],
                                        clean_up_tokenization_spaces=False)
    tokenizer.chat_template = SMALL_TEMPLATE
    return tokenizer


def new_gpt(size: str, encoder: Encoder, context: int, attention: str) -> GPT2LMHeadModel:
    """A GPT-2 of a named size with fresh weights (CANON B1: pre-norm blocks, residual projections N(0, 0.02/sqrt(2 n_layer)), tied embeddings)."""
    layers, width, heads = SIZES[size]
    config = GPT2Config(
        vocab_size=len(encoder.tokenizer), n_positions=context, n_embd=width, n_layer=layers, n_head=heads,
        activation_function="gelu",  # exact; GPT-2's tanh approximation of it takes three times as long on CPUs (configs/EXPERIMENTS.md)
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=encoder.eos_id, eos_token_id=encoder.eos_id, pad_token_id=encoder.pad_id, attn_implementation=attention)
    return GPT2LMHeadModel(config)


def backbone(config) -> str:
    """Where the run's backbone lies: model.init, or the model that pretrain left."""
    return config.model.init or str(Path(config.run.dir) / "pretrain" / "model")


def load_encoder(source: str, trust_remote_code: bool = False) -> Encoder:
    """The encoder of a model: a folder, hub id or .gguf file. Raises InputError when there is none."""
    return Encoder(_load(AutoTokenizer, source, trust_remote_code=trust_remote_code))


def load_policy(source: str, encoder: Encoder, attention: str, trust_remote_code: bool = False):
    """A causal LM in fp32 without dropout, its embeddings as long as the encoder's vocabulary. Raises InputError.

    One without a fused attention kernel (Gemma 2, which caps what attention makes of two tokens) gets plain products.
    """
    config = _without_dropout(source, trust_remote_code)
    model = _load(AutoModelForCausalLM, source, dtype=torch.float32, attn_implementation=_that_it_has(attention, config, MODEL_FOR_CAUSAL_LM_MAPPING),
                  trust_remote_code=trust_remote_code, config=config)
    return _fit(model, encoder)


def untrained_policy(source: str, encoder: Encoder, attention: str, seed: int, trust_remote_code: bool = False):
    """A causal LM of the shape of the one at `source` with weights drawn anew: what learning nothing looks like (CANON E5)."""
    config = _load(AutoConfig, source, trust_remote_code=trust_remote_code)
    torch.manual_seed(seed)
    return _fit(AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code,
                                                 attn_implementation=_that_it_has(attention, config, MODEL_FOR_CAUSAL_LM_MAPPING)), encoder)


def load_reward_model(source: str, encoder: Encoder, attention: str, trust_remote_code: bool = False):
    """A sequence classifier with one output in fp32 without dropout; its head stays in fp32 under autocast. Raises InputError.

    A causal model or an encoder. One without a fused attention kernel (DeBERTa, whose scores depend on distance) gets plain products.
    """
    config = _without_dropout(source, trust_remote_code, num_labels=1)
    attention = _that_it_has(attention, config, MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING)
    model = _load(AutoModelForSequenceClassification, source, dtype=torch.float32, attn_implementation=attention,
                  trust_remote_code=trust_remote_code, config=config)
    fp32_head(model)
    return _fit(model, encoder)


class Fp32Linear(nn.Linear):
    """A linear layer that autocast leaves alone: bf16 would round values near 3 to steps of 0.016, above many differences they tell."""

    def forward(self, input):  # noqa: A002 - nn.Linear's name for it
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(input.float(), self.weight.float(), None if self.bias is None else self.bias.float())  # FSDP gathers it in bf16


def fp32_head(reward_model) -> nn.Linear:
    """Makes the scalar head of a sequence classifier an Fp32Linear, in place and under the same weights; returns it."""
    head = [m for m in reward_model.modules() if isinstance(m, nn.Linear) and m.out_features == 1][-1]
    head.__class__ = Fp32Linear
    return head


def init_reward_head(reward_model, generator: torch.Generator | None = None) -> nn.Linear:
    """Draws the scalar head from N(0, 1/sqrt(d + 1)), d its inputs, with bias 0 where it has one (CANON R1; N+ 11); returns it."""
    head = fp32_head(reward_model)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(head.in_features + 1))
        if head.bias is not None:
            head.bias.zero_()
    return head


def save_model(model, encoder: Encoder, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """A plain Hugging Face folder (safetensors, tokenizer with chat template) that the Auto classes load. `weights`: those of a sharded model."""
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    if model.can_generate():  # transformers' Trainer switches it off, and whoever generates would read everything anew for every token
        model.config.use_cache = model.generation_config.use_cache = True
    model.save_pretrained(folder, state_dict=weights)
    encoder.tokenizer.save_pretrained(folder)


def add_lora(model, rank: int, alpha: int, task: str):
    """`model` with LoRA adapters on its linear layers (rank 0: unchanged); task: CAUSAL_LM or SEQ_CLS (whose head is trained whole)."""
    if rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    whole = ["pre_classifier"] if task == "SEQ_CLS" else None  # part of DistilBERT's head, trained as it is: PEFT takes it for both
    adapted = get_peft_model(model, LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules="all-linear", exclude_modules=whole,
                                               task_type=task))
    for layer in adapted_layers(adapted):
        layer.cast_input_dtype_enabled = False  # to fp32, from which autocast casts back: the same numbers, two copies of every input later
    return adapted


def adapted_layers(model) -> list:
    """The layers of a model that LoRA adapts; none of any other."""
    if not hasattr(model, "disable_adapter"):
        return []
    from peft.tuners.lora import LoraLayer

    return [layer for layer in model.modules() if isinstance(layer, LoraLayer)]


@contextlib.contextmanager
def adapters_merged(model):
    """LoRA's adapters inside the weights, in the precision of the passes, while the block runs: for passes without gradients.

    A pass is then one of the plain model, up to rounding. The frozen weights come back as they were, to the bit: nothing is subtracted again.
    """
    layers = adapted_layers(model)
    frozen = [layer.get_base_layer().weight.data for layer in layers]
    try:
        for layer in layers:
            weight = layer.get_base_layer().weight
            device = weight.device.type
            dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
            with torch.no_grad(), torch.autocast(device, enabled=False):
                merged = sum((layer.get_delta_weight(adapter) for adapter in layer.active_adapters), start=weight)
            weight.data = merged.to(dtype)
        with model.disable_adapter() if layers else contextlib.nullcontext():
            yield
    finally:
        for layer, weight in zip(layers, frozen, strict=True):
            layer.get_base_layer().weight.data = weight


def hold_for_products(model) -> None:
    """Puts frozen weights that only matrix products read into the dtype of the autocast around this call, in place, for passes under it alone.

    The same numbers, for autocast would cast them in every pass; half the memory, and no copies. An output layer that is tied to the embeddings,
    whose rows are looked up in fp32, gets weights of its own. Does nothing without autocast.
    """
    device = next(model.parameters()).device.type
    if not torch.is_autocast_enabled(device):
        return
    dtype, embeddings = torch.get_autocast_dtype(device), model.get_input_embeddings().weight
    for layer in model.modules():
        if type(layer) not in (nn.Linear, Conv1D) or layer.weight.requires_grad:  # a head in fp32 is a class of its own
            continue
        if layer.weight is embeddings:
            layer.weight = nn.Parameter(embeddings.to(dtype), requires_grad=False)
        for weight in (layer.weight, layer.bias):
            if weight is not None:
                weight.data = weight.data.to(dtype)
    for weight in model.parameters():
        if not weight.requires_grad and weight.dtype != dtype:
            weight.data = weight.data.clone()  # what was loaded is a view of its file, which would stay in memory whole


def share_equal(model, with_model) -> None:
    """Frozen weights of `model`, which adapters may stand between, lie in memory once where they equal those of `with_model` at the same place."""
    for mine, theirs in zip((p for p in model.parameters() if not p.requires_grad), with_model.parameters(), strict=False):
        if mine.dtype == theirs.dtype and torch.equal(mine, theirs):
            mine.data = theirs.data


def unwrapped(model):
    """The model under LoRA's wrapper, its adapters inside; any other as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def compile_blocks(model, wanted: bool) -> None:
    """Puts a model's repeated blocks through torch.compile, in place: names and files of the weights stay as they are.

    One graph serves all blocks and, its sizes left open, all shapes of batches; a whole model would be compiled anew for each of them. Results
    change in rounding. Without a C++ compiler nothing is done, and said so.
    """
    if not wanted:
        return
    if not shutil.which(os.environ.get("CXX", "g++")):
        say("model.compile: found no C++ compiler (g++, or what the environment variable CXX names); training goes on without it")
        return
    import torch._dynamo  # takes a second or two

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    inner = unwrapped(model)
    for block in inner.modules():
        if type(block).__name__ in (getattr(inner, "_no_split_modules", None) or ()):
            block.compile(**COMPILE)


def as_written():
    """A context in which blocks that were put through torch.compile run as they are written, and nothing is compiled."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def longest_row(model) -> int | None:
    """Tokens that the table of learned positions has room for; None where positions are relative or rotary."""
    names = ("position_embeddings", "wpe", "embed_positions")
    tables = [m for name, m in model.named_modules() if isinstance(m, nn.Embedding) and name.endswith(names)]
    # RoBERTa counts positions from behind the pad id, OPT from its offset on: the first rows serve no token
    unused = [getattr(t, "offset", 0) if t.padding_idx is None else t.padding_idx + 1 for t in tables]
    return min((t.num_embeddings - n for t, n in zip(tables, unused, strict=True)), default=None)


def last_norm_gain(model) -> nn.Parameter | None:
    """The gain [D] of the norm between a causal LM's last block and its output layer; None where there is none."""
    trunk = unwrapped(model).base_model
    blocks = {id(p) for m in trunk.modules() if isinstance(m, nn.ModuleList) for p in m.parameters()}
    gains = [p for name, p in trunk.named_parameters() if p.ndim == 1 and name.endswith("weight") and id(p) not in blocks]
    return gains[-1] if gains else None


def parameter_count(model) -> int:
    """Weights of a model, tied ones once."""
    return sum(p.numel() for p in model.parameters())


def parameters_in_words(model) -> str:
    """How many weights there are (LoRA's adapters too), and how many are trained where those are fewer."""
    count, trained = parameter_count(model), sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{count / 1e6:.1f}M parameters" + (f", {trained / 1e6:.1f}M of them trained" if trained < count else "")


def _fit(model, encoder: Encoder):
    if model.get_input_embeddings().weight.shape[0] < len(encoder.tokenizer):
        model.resize_token_embeddings(len(encoder.tokenizer))
    model.config.pad_token_id, model.config.eos_token_id = encoder.pad_id, encoder.eos_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = encoder.pad_id, encoder.eos_id
    return model


def _that_it_has(attention: str, config: PreTrainedConfig, models_by_config) -> str:
    """`attention`, or plain products where it is the fused kernel and the model has none."""
    kind = type(config)
    return "eager" if attention == "sdpa" and kind in models_by_config and not models_by_config[kind]._supports_sdpa else attention


def _without_dropout(source: str, trust_remote_code: bool, **settings) -> PreTrainedConfig:
    """This model's configuration with every dropout that it knows at 0, those of the models inside it (a text_config) too."""
    config = _load(AutoConfig, source, trust_remote_code=trust_remote_code, **settings)
    for part in (config, *(value for value in vars(config).values() if isinstance(value, PreTrainedConfig))):
        for name in [name for name, value in vars(part).items() if "drop" in name and isinstance(value, float)]:
            setattr(part, name, 0.0)
    return config


def _load(auto_class, source: str, **settings):
    path = Path(source)
    if path.suffix == ".gguf":
        source, settings["gguf_file"] = str(path.parent), path.name
    elif "dtype" in settings:  # weights: of a folder that holds pickles (.bin) none is opened
        settings["use_safetensors"] = True
    try:
        return auto_class.from_pretrained(source, **settings)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise InputError(f"no model could be loaded from {source!r} ({first_line(error)}); wanted a folder with config.json, model.safetensors and "
                         "tokenizer.json, a .gguf file, or a hub id that is reachable or cached") from None
