"""Talk to any stage's model in the terminal, or to two side by side on the same prompt.

    rlhf chat                            # the furthest stage of runs/quickstart
    rlhf chat --model ppo --against sft  # two models answer the same prompt
    echo "What is seven plus five?" | rlhf chat

/help lists the commands, such as /reset, which forgets the conversation. Ctrl-C stops an answer that is being written.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
import yaml
from transformers.utils import logging

from rlhf.cli import guarded
from rlhf.config import config_from_tree
from rlhf.cores import threads_per_process
from rlhf.errors import EXIT_INTERRUPTED, InputError
from rlhf.jsonl import read_jsonl
from rlhf.models import attention_kernel, load_encoder, load_policy, parameter_count
from rlhf.sampling import draw_uniforms, sample
from rlhf.terminal import Help, cells, printable, wrapped

SPEAKING = ("ppo", "sft", "pretrain")  # stages whose models write, the furthest first
SMALL = 50_000_000  # parameters; below, a second thread costs more than it gives (an answer of 30 tokens: 0.08 s, with two 0.5 s, on a busy machine)
HELP = """\
/reset  forgets the conversation
/quit   ends it, as Ctrl-D does
/help   says this
//...   sends a message that begins with a /: //hi becomes /hi"""
WIDE = 80  # columns of a terminal from which two answers stand side by side


def main(argv: list[str] | None = None) -> int:
    """The command `rlhf chat`; returns the exit code."""
    arguments = parser().parse_args(argv)
    interrupted = False

    def talk():
        nonlocal interrupted
        try:
            _chat(arguments)
        except KeyboardInterrupt:  # a chat has nothing to go on from, so it ends without the stages' advice
            interrupted = True
            print()
        except BrokenPipeError:  # whoever read the answers has left
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    code = guarded(talk)
    return EXIT_INTERRUPTED if interrupted else code


def parser() -> argparse.ArgumentParser:
    """The options of `rlhf chat`."""
    options = argparse.ArgumentParser(prog="rlhf chat", description=__doc__, formatter_class=Help)
    options.add_argument("--run", default="runs/quickstart", help="run folder (default: runs/quickstart)")
    options.add_argument("--model", help="pretrained, sft, ppo or ppo/best of the run, a model folder or a hub id (default: the furthest stage)")
    options.add_argument("--against", metavar="MODEL", help="a second model that answers the same prompts")
    options.add_argument("--temperature", type=_number(float, 0.001, 100), default=1.0,
                         help="divides the logits: 1 is what compare measures, 0.001 nearly always the likeliest token (default: 1)")
    options.add_argument("--max-tokens", type=_number(int, 1, 1 << 20), default=128, help="longest answer, tokens (default: 128)")
    options.add_argument("--seed", type=int, default=1, help="the same seed and the same prompts give the same answers (default: 1)")
    options.add_argument("--history", choices=("auto", "keep", "none"), default="auto",
                         help="keep: a model reads the turns before; auto: unless the run was trained on single questions alone (default: auto)")
    options.add_argument("--trust-remote-code", action="store_true",
                         help="run Python code that comes with a model, as model.trust_remote_code does in training; only for code you have read")
    return options


def _number(kind, low, high):
    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"found {text!r}, wanted a number from {low} to {high}")
        return value
    return parse


class Speaker:
    """A model with its own memory of the conversation."""

    def __init__(self, label: str, source: str, keeps_history: bool, trust_remote_code: bool = False):
        torch.backends.cuda.enable_cudnn_sdp(False)  # as rlhf.compute.start has it
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.label, self.keeps_history = label, keeps_history
        self.encoder = load_encoder(source, trust_remote_code)
        self.policy = load_policy(source, self.encoder, attention_kernel("auto", device), trust_remote_code).to(device).eval()
        self.context: int = getattr(self.policy.config.get_text_config(), "max_position_embeddings", 2048)
        self.messages: list[dict] = []

    def answer(self, text: str, max_tokens: int, temperature: float, *seeds: int) -> str:
        """The model's reply to the conversation with `text` as its next turn, made safe to print. Raises InputError when it does not fit."""
        messages, prompt = self._fitting([*self.messages, {"role": "user", "content": text}], min(max_tokens, self.context // 2))
        uniforms_BC = draw_uniforms(1, min(max_tokens, self.context - len(prompt)), *seeds)
        completion = sample(self.policy, [prompt], uniforms_BC, self.encoder, temperature, 1)[0]
        said, ended = self.encoder.decode(completion), self.encoder.ended(completion)
        if not ended:
            said = said.rstrip("\N{REPLACEMENT CHARACTER}")  # the limit may have cut a character of several tokens
        if self.keeps_history:
            self.messages = [*messages, {"role": "assistant", "content": said}]
        return printable(said) + ("" if ended else " [...]")

    def _fitting(self, messages: list[dict], room: int) -> tuple[list[dict], list[int]]:
        """The newest turns whose ids leave `room` for an answer; the oldest question leaves first, with its answer."""
        while len(prompt := self.encoder.prompt_ids(messages)) + room > self.context and len(messages) > 1:
            messages = messages[2:]
        if len(prompt) >= self.context:
            raise InputError(f"that is {len(prompt)} tokens, and {self.label} reads {self.context} at most; say it shorter")
        return messages, prompt


def _chat(arguments) -> None:
    logging.disable_progress_bar()
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # bytes that are no text, letters that the terminal lacks: no reason to end
    run = Path(arguments.run)
    named = [find_model(name, run) for name in (arguments.model, arguments.against)[: 1 if arguments.against is None else 2]]
    keeps = arguments.history == "keep" or (arguments.history == "auto" and not _single_questions(run))
    labels = [label for label, _ in named]
    speakers = [Speaker(label if labels.count(label) == 1 else source, source, keeps, arguments.trust_remote_code) for label, source in named]
    torch.set_num_threads(1 if max(parameter_count(s.policy) for s in speakers) < SMALL else threads_per_process(0))
    typed = sys.stdin.isatty()
    if typed:
        print(f"You are talking to {' and '.join(s.label for s in speakers)}. /help lists the commands, /quit or Ctrl-D ends it."
              + ("" if keeps else "\nEvery question starts anew: this run was trained on single questions (--history keep changes that)."))
    for number, text in enumerate(_turns(speakers, typed)):
        answers = _answers(speakers, text, arguments, number, typed)
        if answers is not None:
            print(layout(answers, shutil.get_terminal_size().columns) if sys.stdout.isatty() else plain(answers), flush=True)


def _turns(speakers: list[Speaker], typed: bool) -> Iterator[str]:
    """What the person says, line by line, commands carried out. Raises InputError for an unknown one when nobody types."""
    if typed:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            line = input("\nyou: " if typed else "").strip()
        except EOFError:
            if typed:
                print()
            return
        command = line.partition(" ")[0]
        if command == "/quit":
            return
        if command == "/reset":
            for speaker in speakers:
                speaker.messages = []
            if typed:
                print("The conversation is forgotten.")
        elif command == "/help":
            print(HELP)
        elif command.startswith("/") and not command.startswith("//"):
            unknown = f"{command}: no such command, wanted /reset, /quit or /help (/{command} sends it)"
            if not typed:
                raise InputError(unknown)
            print(printable(unknown))
        elif line:
            yield line.removeprefix("/")


def _answers(speakers: list[Speaker], text: str, arguments, number: int, typed: bool) -> list[tuple[str, str]] | None:
    """Everyone's answer by label; None when the person stopped it or it could not be given. Raises InputError when nobody types."""
    live = typed and sys.stdout.isatty()
    before = [speaker.messages for speaker in speakers]
    if live:
        print("...", end="", flush=True)
    try:
        return [(s.label, s.answer(text, arguments.max_tokens, arguments.temperature, arguments.seed, number)) for s in speakers]
    except (KeyboardInterrupt, InputError) as stopped:
        if not typed:
            raise
        for speaker, messages in zip(speakers, before, strict=True):
            speaker.messages = messages
        print("\r" + (str(stopped) or "Stopped; that question is forgotten."))
        return None
    finally:
        if live:
            print("\r\033[K", end="")


def find_model(name: str | None, run: Path) -> tuple[str, str]:
    """(label, folder or hub id) of a model; `name` is a stage of the run, a folder, a .gguf file or a hub id. Raises InputError."""
    made = [stage for stage in SPEAKING if (run / stage / "model").is_dir()]
    if name is None and not made:
        raise InputError(f"{run} holds no model yet; `rlhf pipeline run.dir={run}` makes them; or name another --run or --model")
    name = name or made[0]
    for folder in (run / name / "model", run / name, Path(name) / "model", Path(name)):
        if folder.suffix == ".gguf" and folder.is_file():
            return folder.name, str(folder)
        if (folder / "config.json").is_file():
            _refuse_scorer(name, folder)
            return (folder.parent.name if folder.name == "model" else folder.name), str(folder)
    if name in ("pretrained", "pretrain"):
        return "pretrained", _pretrained(run)
    if name in SPEAKING:
        raise InputError(f"--model {name}: {run / name / 'model'} is not there; `rlhf {name} run.dir={run}` makes it after the stages before it, "
                         f"`rlhf pipeline run.dir={run}` makes all")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).parent.exists():
        return name, name
    raise InputError(f"--model {name}: no such model; {run} has {', '.join(made) or 'none yet'}; wanted a stage, a folder or a hub id")


def _refuse_scorer(name: str, folder: Path) -> None:
    """A reward model would load as a writer whose words mean nothing. Raises InputError."""
    kinds = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if any("SequenceClassification" in kind for kind in kinds):
        raise InputError(f"--model {name}: {folder} holds a reward model, which scores answers and writes none; wanted sft, ppo or another writer")


def _pretrained(run: Path) -> str:
    """The backbone that pretrain left, or that model.init names. Raises InputError."""
    if (run / "pretrain" / "model").is_dir():
        return str(run / "pretrain" / "model")
    for file in sorted(run.glob("*/config.yaml")):
        config = config_from_tree(yaml.safe_load(file.read_text(encoding="utf-8")), str(file))
        if config.model.init is not None:
            return config.model.init
    raise InputError(f"--model pretrained: {run / 'pretrain' / 'model'} is not there; `rlhf pretrain run.dir={run}` makes it, after `rlhf prepare`")


def _single_questions(run: Path) -> bool:
    """True when the run's demonstrations are known and hold no earlier turns: its models never saw a second question."""
    demonstrations = run / "data" / "demonstrations" / "train.jsonl"
    return demonstrations.is_file() and all(len(row["prompt"]) == 1 for row in islice(read_jsonl(demonstrations), 500))


def plain(answers: list[tuple[str, str]]) -> str:
    """Answers for a file or a pipe: one alone as it is, several each behind its label."""
    return answers[0][1] if len(answers) == 1 else "\n".join(f"{label}: {text}" for label, text in answers)


def layout(answers: list[tuple[str, str]], width: int) -> str:
    """Answers for a terminal of `width` columns: two side by side where there is room, else one under the other."""
    if len(answers) == 1 or width < WIDE:
        return "\n".join(line for label, text in answers for line in wrapped(f"{label}: {text}", width))
    column = (width - 3) // 2
    left, right = ([label, "-" * column, *wrapped(text, column)] for label, text in answers)
    rows = max(len(left), len(right))
    pairs = zip(left + [""] * (rows - len(left)), right + [""] * (rows - len(right)), strict=True)
    return "\n".join(f"{a}{' ' * (column - cells(a))} | {b}".rstrip() for a, b in pairs)
