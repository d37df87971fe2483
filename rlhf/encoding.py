"""One template and one end-of-completion rule for all stages (CANON B2, B3; STYLE 3).

Prompt and completion are encoded apart and their ids joined; a completion ends with the EOS id, and nowhere else is an id compared
with EOS or pad. What users write is encoded as text: a literal ``<|im_end|>`` inside a message cannot forge a turn.

Some tokenizers (Llama 2, TinyLlama, Mistral 7B) put a space before every text that they are given. What stands behind other text in a template is
given to them behind a newline, whose ids are then cut off, so that no space comes in that the template does not have.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

from jinja2 import TemplateError

from rlhf.errors import InputError

USER, ASSISTANT, SYSTEM, END, PAD = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|pad|>"

SMALL_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}"
    "{% elif m['role'] == 'assistant' %}<|assistant|>{{ m['content'] }}<|end|>"
    "{% else %}<|system|>{{ m['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
PLAIN_TEMPLATE = (  # for base models, whose tokenizer knows no turns
    # newlines stand inside expressions: the template engine drops one that follows a block
    "{% for m in messages %}{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(m['role'], 'System') }}: {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
PAIR_TEMPLATE = (  # for encoders (BERT, DeBERTa), which were pretrained on sentences between [CLS] and [SEP]
    "{{ cls_token }}{% for m in messages %}{{ m['content'] }}{% if not loop.last %}{{ sep_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ sep_token }}{% endif %}"
)
NEWLINE = "\n"
PROBE = "\ue000"  # a private-use character: no template contains it, no token begins or ends with it


class Slot(NamedTuple):
    """Where a message's content stands in a template, and what is encoded before it: spaces of the template, behind a newline that is cut off."""

    message: int
    lead: str


class Encoder:
    """Text to ids and back with one tokenizer; makes the tokenizer fit CANON B2 (a pad token that is not EOS, a chat template).

    An encoder's tokenizer has no EOS: SEP closes its rows, and CLS, where its architecture pools, opens them. Raises InputError without either.
    """

    def __init__(self, tokenizer):
        if tokenizer.eos_token_id is None:
            if tokenizer.sep_token_id is None:
                raise InputError(f"the tokenizer of {tokenizer.name_or_path} has no EOS token and no SEP token, so no completion could end; "
                                 "set eos_token in its config")
            tokenizer.eos_token = tokenizer.sep_token
        if tokenizer.chat_template is None:
            tokenizer.chat_template = PAIR_TEMPLATE if _is_of_an_encoder(tokenizer) else _bos_of_texts(tokenizer) + PLAIN_TEMPLATE
        _give_pad_token(tokenizer)
        self.tokenizer = tokenizer
        self.eos_id: int = tokenizer.eos_token_id
        self.pad_id: int = tokenizer.pad_token_id
        self._newline = _newline_of_spaced(tokenizer)
        self._templates: dict[tuple[str, ...], list] = {}

    def prompt_ids(self, messages: list[dict]) -> list[int]:
        """Ids of a conversation that ends with a user turn, up to where the assistant's completion begins."""
        return self.prompts_ids([messages])[0]

    def prompts_ids(self, conversations: list[list[dict]]) -> list[list[int]]:
        """`prompt_ids` of several; their texts go through the tokenizer together."""
        templates = [self._template(tuple(m["role"] for m in messages)) for messages in conversations]
        slots = [(messages[part.message]["content"], part.lead) for messages, parts in zip(conversations, templates, strict=True)
                 for part in parts if isinstance(part, Slot)]
        contents = iter(self._texts_ids(*zip(*slots, strict=True)) if slots else [])
        return [[i for part in parts for i in (next(contents) if isinstance(part, Slot) else part)] for parts in templates]

    def completion_ids(self, text: str) -> list[int]:
        """Ids of a completion with the EOS that ends it."""
        return self.completions_ids([text])[0]

    def completions_ids(self, texts: list[str]) -> list[list[int]]:
        """`completion_ids` of several."""
        return [[*ids, self.eos_id] for ids in self._texts_ids(texts, [self._completion_lead] * len(texts))]

    def text_ids(self, text: str) -> list[int]:
        """Ids of text in which nothing is special: markers of the template inside it are spelled out as text."""
        return self.texts_ids([text])[0]

    def texts_ids(self, texts: list[str]) -> list[list[int]]:
        """`text_ids` of several."""
        return self._texts_ids(texts, [""] * len(texts))

    def _texts_ids(self, texts: Sequence[str], leads: Sequence[str]) -> list[list[int]]:
        """`texts_ids`, each text with its `Slot.lead`."""
        given = [lead + text for text, lead in zip(texts, leads, strict=True)]
        if not any(given):
            return [[] for _ in given]
        found = self.tokenizer(given, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]
        return [ids[len(self._newline) if lead[:1] == NEWLINE else 0:] if text else [] for text, lead, ids in zip(given, leads, found, strict=True)]

    def decode(self, ids: list[int]) -> str:
        """Text of a completion's ids, up to its EOS if it has one."""
        end = ids.index(self.eos_id) if self.eos_id in ids else len(ids)
        lead = self._completion_lead
        text = self.tokenizer.decode((self._newline if lead else []) + ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.removeprefix(NEWLINE).removeprefix(lead[1:]) if lead else text

    def until_end(self, ids: list[int]) -> list[int]:
        """A completion's ids up to and with its EOS; all of them where there is none."""
        return ids[: ids.index(self.eos_id) + 1] if self.eos_id in ids else ids

    def ended(self, ids: list[int]) -> bool:
        """True when the completion ends with EOS, as opposed to being cut at the length limit."""
        return bool(ids) and ids[-1] == self.eos_id

    def closed(self, completion: list[int]) -> list[int]:
        """A completion that ends with the EOS: of one that was cut off, the last token gives way to it, so that no row grows."""
        return completion if self.ended(completion) else [*completion[:-1], self.eos_id]

    def fingerprint(self) -> str:
        """Hash of vocabulary, template and end token: stages refuse models made with another one."""
        parts = [sorted(self.tokenizer.get_vocab().items()), self.tokenizer.chat_template, self.eos_id, self.pad_id]
        parts += [self._newline] if self._newline else []  # such tokenizers once encoded everything as the start of a text
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def _template(self, roles: tuple[str, ...]) -> list:
        """The template for these roles as a list of id lists (its own text) and slots (where the contents stand)."""
        if roles not in self._templates:
            marks = [f"{PROBE}{i}\ue001" for i in range(len(roles))]
            try:
                rest = self._rendered(zip(roles, marks, strict=True), add_generation_prompt=True)
            except TemplateError as error:  # Gemma's knows no system turn
                raise InputError(f"the chat template of {self.tokenizer.name_or_path} refuses turns of {', '.join(roles)}: {error}; leave rows with "
                                 "such turns out, or name another model") from None
            parts: list = []
            for index, mark in enumerate(marks):
                before, found, rest = rest.partition(mark)
                if not found:
                    raise InputError(f"the chat template of {self.tokenizer.name_or_path} does not show message {index} of roles {roles}")
                lead = self._lead(before, behind=index > 0)
                parts += [self._template_ids(before[: len(before) - lead.count(" ")], behind=index > 0), Slot(index, lead)]
            self._templates[roles] = [p for p in [*parts, self._template_ids(rest, behind=True)] if p != []]
        return self._templates[roles]

    def _rendered(self, turns: Iterable[tuple[str, str]], add_generation_prompt: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)

    def _template_ids(self, text: str, behind: bool = False) -> list[int]:
        """Ids of text of the template. `behind`: a content stands before it."""
        if self._newline and behind and text:
            ids = _plain_ids(self.tokenizer, NEWLINE + text)
            if ids[: len(self._newline)] == self._newline:  # else a special token has taken the newline in
                return ids[len(self._newline):]
        return _plain_ids(self.tokenizer, text)

    def _lead(self, before: str, behind: bool) -> str:
        """The `Slot.lead` of a content that follows `before`: found by trying, because a text starts anew behind some special tokens."""
        text = before.rstrip(" ")
        spaces = before[len(text):]
        for lead in (NEWLINE + spaces, spaces) if self._newline else ():
            if self._template_ids(before + PROBE, behind) == self._template_ids(text, behind) + self._texts_ids([PROBE], [lead])[0]:
                return lead
        return ""

    @cached_property
    def _completion_lead(self) -> str:
        """The `Slot.lead` of completions. Spaces that the template has in an assistant's turn but not before a completion go with it."""
        if not self._newline:
            return ""
        prompt = self._rendered([("user", "a")], add_generation_prompt=True)
        whole = self._rendered([("user", "a"), ("assistant", PROBE)], add_generation_prompt=False)
        spaces = whole.removeprefix(prompt).partition(PROBE)[0] if whole.startswith(prompt) else ""
        spaces = "" if spaces.strip(" ") else spaces
        apart = self._template_ids(prompt) + self._texts_ids([PROBE], [NEWLINE + spaces])[0]
        return NEWLINE + spaces if self._template_ids(prompt + spaces + PROBE) == apart else ""


def _plain_ids(tokenizer, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


def _newline_of_spaced(tokenizer) -> list[int]:
    """Ids of a newline where the tokenizer puts a space before every text, and a newline keeps that from the text behind it; none elsewhere."""
    newline, start = _plain_ids(tokenizer, NEWLINE), _plain_ids(tokenizer, "a")
    behind = {text: _plain_ids(tokenizer, NEWLINE + text) for text in ("a", " ", NEWLINE, PROBE)}
    if any(ids[: len(newline)] != newline or len(ids) == len(newline) for ids in behind.values()) or behind["a"][len(newline):] == start:
        return []
    return newline if tokenizer.decode(newline, clean_up_tokenization_spaces=False) == NEWLINE else []


def _is_of_an_encoder(tokenizer) -> bool:
    """True for tokenizers of masked language models; those of causal models may name a CLS or SEP token too, but none to guess at."""
    return None not in (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.mask_token_id)


def _bos_of_texts(tokenizer) -> str:
    """What opens the template where the tokenizer opens texts with BOS, as Llama's and Gemma's do (their models never saw one without)."""
    opens = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return "{{ bos_token }}" if opens else ""


def _give_pad_token(tokenizer) -> None:
    """CANON B2: pad is never EOS. A special token the tokenizer already has serves, so that no embedding is added."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id != tokenizer.eos_token_id:
        return
    for candidate in (PAD, "<pad>", "[PAD]", "<|endoftext|>", "<|finetune_right_pad_id|>", tokenizer.unk_token):
        if candidate is not None and candidate != tokenizer.eos_token and candidate in tokenizer.get_vocab():
            tokenizer.pad_token = candidate
            return
    tokenizer.add_special_tokens({"pad_token": PAD})
