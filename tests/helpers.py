"""Tiny tokenizers, models and rollouts for the tests of the core. Everything is made here, in memory, from fixed seeds."""

import functools
import math

import torch
from accelerate import Accelerator
from transformers import TrainerCallback

from rlhf.compute import my_share
from rlhf.encoding import Encoder
from rlhf.models import add_lora, new_gpt, train_tokenizer
from rlhf.passes import PolicyAndValue, ValueModel
from rlhf.ppo import UpdateSettings
from rlhf.rollout import Rollout, evaluate_tokens, make_rollout, reference
from rlhf.sampling import draw_uniforms, sample

CORPUS = ["What is seven plus five?", "Seven plus five is twelve.", "The opposite of hot is cold.", "Name three fruits, please.",
          "Apples, pears and plums.", "I do not know what that is."] * 20
CONTEXT = 64


@functools.cache
def tiny_tokenizer_parts() -> str:
    """The trained tokenizer as JSON, so that every caller gets an object of its own."""
    return train_tokenizer(CORPUS, 300).backend_tokenizer.to_str()


def tiny_encoder() -> Encoder:
    """A byte-level BPE of 300 tokens with the small template."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    from rlhf.encoding import ASSISTANT, END, PAD, SMALL_TEMPLATE, SYSTEM, USER

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tiny_tokenizer_parts()), pad_token=PAD, eos_token=END,
                                        extra_special_tokens=[USER, ASSISTANT, SYSTEM], clean_up_tokenization_spaces=False)
    tokenizer.chat_template = SMALL_TEMPLATE
    return Encoder(tokenizer)


def rough(model, seed: int, scale: float = 0.15):
    """`model` with seeded noise on every weight: fresh GPTs are nearly uniform, and much goes unnoticed on those."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model


def nano(encoder: Encoder, seed: int = 0, scale: float = 0.15, attention: str = "eager"):
    """A GPT-2 of 2 layers with weights far from uniform."""
    torch.manual_seed(seed)
    return rough(new_gpt("nano", encoder, CONTEXT, attention), seed, scale)


def llama(encoder: Encoder, seed: int = 0):
    """A tiny Llama: rotary positions, grouped keys, untied output."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=len(encoder.tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=CONTEXT, pad_token_id=encoder.pad_id, eos_token_id=encoder.eos_id,
                         bos_token_id=encoder.eos_id, attn_implementation="eager")
    return rough(LlamaForCausalLM(config), seed)


def linear_head(width: int, seed: int = 3, scale: float = 0.1) -> torch.nn.Linear:
    """A value head that is not zero."""
    return rough(torch.nn.Linear(width, 1), seed, scale)


def policy_and_value(encoder: Encoder, kind: str = "separate", lora: bool = False, seed: int = 0) -> PolicyAndValue:
    """A PolicyAndValue on nano GPTs; `kind` as ppo.value_model."""
    policy = nano(encoder, seed)
    if lora:
        torch.manual_seed(seed)
        policy = add_lora(policy, 4, 8, "CAUSAL_LM")
    trunk = nano(encoder, seed + 1).base_model if kind == "separate" else None
    return PolicyAndValue(policy, ValueModel(trunk, linear_head(64)))


def cpu() -> Accelerator:
    """One process in fp32."""
    return Accelerator(cpu=True, mixed_precision="no")


def settings(**changes) -> UpdateSettings:
    """UpdateSettings with the canon's values."""
    usual = {"epochs": 1, "minibatches": 2, "microbatch_tokens": 200, "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1, "policy_coef": 1.0,
             "ptx_coef": 0.0, "max_grad_norm": 1e9, "target_kl": None, "temperature": 1.0}
    return UpdateSettings(**{**usual, **changes})


def some_prompts(encoder: Encoder, count: int) -> list[list[int]]:
    """Prompts of different lengths."""
    texts = ["Hi", "What is seven plus five?", "Name three fruits, please.", "The opposite of hot is", "I do not know"]
    return [encoder.prompt_ids([{"role": "user", "content": texts[i % len(texts)] + " now" * (i % 3)}]) for i in range(count)]


def collect(accelerator, model, ref_policy, encoder, prompts, score, seed=1, limit=8, temperature=1.0, kl_coef=0.05, lam=0.95,
            budget=200) -> Rollout:
    """A rollout as stages/ppo.py makes it, all processes together; `score` is a function of the completions' ids."""
    inner, uniforms_BC = accelerator.unwrap_model(model), my_share(accelerator, draw_uniforms(len(prompts), limit, seed))
    prompts = my_share(accelerator, prompts)
    completions = sample(inner.policy, prompts, uniforms_BC, encoder, temperature, len(prompts))
    ref_logprobs = reference(ref_policy, inner.policy, temperature, accelerator.autocast)
    pairs = list(zip(prompts, completions, strict=True))
    tokens = evaluate_tokens(model, ref_logprobs, pairs, encoder.pad_id, temperature, budget, accelerator.device)
    scores_B = torch.tensor([float(score(c)) for c in completions])
    return make_rollout(accelerator, prompts, completions, scores_B, tokens, kl_coef, 1.0, lam, False)


def naive_logprobs(policy, prompt: list[int], completion: list[int], temperature: float) -> list[float]:
    """Log-probabilities of a completion, one unpadded row, one plain forward, softmax written out in float64."""
    with torch.no_grad():
        logits = policy(input_ids=torch.tensor([prompt + completion])).logits[0].double() / temperature
    found = []
    for place, token in enumerate(completion, len(prompt)):
        row = logits[place - 1].tolist()
        top = max(row)
        found.append(row[token] - top - math.log(sum(math.exp(x - top) for x in row)))
    return found


def greedy(policy, encoder: Encoder, prompt: list[int], room: int) -> list[int]:
    """The likeliest token after the likeliest token, until the end or `room`."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + room and ids[-1:] != [encoder.eos_id]:
            ids.append(int(policy(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(prompt):]


def snapshot(model) -> dict[str, torch.Tensor]:
    """Copies of all weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class KeepsFigures:
    """In place of a Stage: the figures that a trainer logs."""

    main = True

    def __init__(self):
        self.lines = []

    def log(self, step, **figures):
        self.lines.append({"step": step, **figures})


def gradients_of_steps(trainer) -> tuple[torch.Tensor, list[dict]]:
    """(gradients of all weights by optimizer step, logged lines) of one of rlhf/trl_trainers.py's trainers, run to its end."""
    gradients, log = [], KeepsFigures()

    class Keeps(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).clone())

    trainer.add_callback(Keeps())
    trainer.follow(log, 1, "test")
    trainer.run()
    return torch.stack(gradients), log.lines
