"""Digests of what stands behind a setting's name and is not of the run's own making: the files of a local model, the code of a function.

They stand in a stage's manifest, so that a resumed stage notices other weights under the same path, or a reward function that was edited.
Hub ids have none; nor is a function followed into the modules that it imports.
"""

import contextlib
import hashlib
import inspect
import json
import sys
from pathlib import Path

from rlhf.config import Config
from rlhf.errors import InputError

JUDGES = ("auto", "gold", "judge", "proxy")  # what compare.judge knows by name
OURS = ("sft", *JUDGES)  # in reward.init and compare.judge, whatever folder has such a name
LOADED = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py")  # what of a model's folder decides what it says; no README, no log
WHOLE = 64 * 2**20  # bytes; of a larger file so many blocks are read, in milliseconds instead of the seconds that 15 GB take at every start
BLOCKS, BLOCK = 256, 16 * 2**10  # training moves all weights: another model of the same shape differs in every block but the header's


def is_function(name: str) -> bool:
    """True for module:function, false for a folder or hub id."""
    return ":" in name and not Path(name).is_dir()


def contents(stage: str, config: Config) -> dict[str, str]:
    """setting=name -> digest, of the local models and functions that a stage reads by name; what cannot be read has none (loading it will say so)."""
    found = {}
    for setting, name in _named(stage, config):
        with contextlib.suppress(OSError, InputError):
            digest = model_digest(Path(name)) or (_function_digest(name, setting) if is_function(name) else None)
            found |= {f"{setting}={name}": digest} if digest else {}
    return found


def model_digest(path: Path) -> str | None:
    """Of a model's folder or .gguf file, from names, sizes and contents alone, so that a copy has the same; None for anything else."""
    if path.is_file():
        return _sampled(path)
    if not path.is_dir():
        return None
    return _digest_of([(file.name, _sampled(file)) for file in sorted(path.iterdir()) if file.suffix in LOADED and file.is_file()])


def _named(stage: str, config: Config) -> list[tuple[str, str]]:
    """(setting, what it names) of the settings that make a stage read something of the user's."""
    init = [("model.init", config.model.init)]
    scores = [("ppo.score", config.ppo.score), *(("ppo.mix", source) for source in config.ppo.mix)]
    judge = [("compare.judge", config.compare.judge), *(init if "pretrained" in config.compare.policies else [])]
    reward = [("reward.init", config.reward.init)]
    named = {"sft": init, "reward": reward, "judge": reward, "ppo": scores, "compare": judge}.get(stage, [])
    return [(setting, name) for setting, name in named if name and name not in OURS]


def _function_digest(name: str, setting: str) -> str | None:
    """Of the file of the module that is named and, where the function comes from another, of that one's. Raises InputError when there is none."""
    from rlhf.scoring import CallableScorer  # torch, which not every command needs

    function = inspect.unwrap(CallableScorer(name, setting).function)
    files = {getattr(sys.modules[name.partition(":")[0]], "__file__", None)}
    with contextlib.suppress(TypeError):  # an object that can be called
        files.add(inspect.getsourcefile(function))
    return _digest_of(sorted(_sampled(Path(file)) for file in files if file)) if any(files) else None


def _sampled(path: Path) -> str:
    """Of a file's size and bytes; of a large one's size and of blocks spread evenly over it, from its first byte to its last."""
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size} ".encode())
    with open(path, "rb") as file:
        if size <= WHOLE:
            digest.update(file.read())
        else:
            for place in range(BLOCKS):
                file.seek((size - BLOCK) * place // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest()


def _digest_of(parts: list) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
