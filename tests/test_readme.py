"""Every document is tested: paths in it exist, commands name real stages with legal settings, and no setting is there for nothing."""

import ast
import dataclasses
import re
import shlex
from pathlib import Path

import pytest

from rlhf import bench, chat, errors
from rlhf.cli import STAGES, TOOLS
from rlhf.config import Config, load_config
from rlhf.data import KINDS, check

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "configs").rglob("*.md"))]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SOURCES = sorted(p for folder in ("rlhf", "stages") for p in (ROOT / folder).rglob("*.py"))
OURS = r"(?:rlhf|stages|tests|configs|data|samples|world|\.ci)/[\w./-]*|pyproject\.toml|README\.md"


def _names(paths):
    return [str(p.relative_to(ROOT)) for p in paths]


def mentioned_paths(text: str) -> set[str]:
    """Paths of this repository in backticks or links, and files named in the comments of configs."""
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)\)", text)
    return {*links, *re.findall(rf"(?<=`)(?:{OURS})(?=`)", text), *re.findall(r"(?<![\w./])configs/[\w./-]*\w\.(?:yaml|md)", text)}


def commands(text: str) -> list[list[str]]:
    """Every command of a shell block or in backticks that starts a stage or a tool, as its words from the name on."""
    text = re.sub(r"\s*\\\n\s*", " ", text)
    lines = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) for line in block.splitlines()]
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines += re.findall(r"`([^`\n]+)`", prose) + re.findall(r"^ {4}(\S.*)$", prose, re.M)
    found = []
    for line in lines:
        for part in re.split(r"&&|\||;", line):
            words = part.split() if part.count('"') % 2 or part.count("'") % 2 else shlex.split(part, comments=True)
            started = _started(words)
            if started:
                found.append(started)
    return found


def _started(words: list[str]) -> list[str]:
    names = [word.removeprefix(".venv/bin/") for word in words]
    if names[:1] == ["rlhf"] and len(names) > 1:
        return names[1:]
    if "-m" in names[:-1] and names[0] in ("python", "python3", "accelerate"):
        launch, module, rest = names[: names.index("-m")], names[names.index("-m") + 1], names[names.index("-m") + 2 :]
        if "--config_file" in launch:
            assert (ROOT / launch[launch.index("--config_file") + 1]).is_file(), words
        if module.startswith("stages."):
            return [module.removeprefix("stages."), *rest]
        if module == "rlhf":
            return rest
    return []


def check_command(words: list[str]) -> None:
    """Parses a command as the program would. Raises what the program would."""
    name, rest = words[0], [word.strip("[]") for word in words[1:] if not re.search(r"\.\.\.|section\.key=", word)]
    assert name in (*STAGES, *TOOLS, "NAME"), words
    if name == "chat":
        chat.parser().parse_args(rest)
    elif name == "bench":
        bench.parser().parse_intermixed_args(rest)
    elif name == "data":
        check.parser().parse_args(rest if rest != ["check"] else [*rest, "mine.jsonl"])  # prose may name it without a file
    elif "--help" not in rest:
        file = rest[rest.index("--config") + 1] if "--config" in rest[:-1] else None
        assert file is None or (ROOT / file).is_file(), words
        load_config(file and str(ROOT / file), [word for word in rest if "=" in word])


@pytest.mark.parametrize("document", DOCUMENTS, ids=_names(DOCUMENTS))
def test_paths_in_documents_exist(document):
    text = document.read_text(encoding="utf-8")
    missing = [path for path in mentioned_paths(text) if not (ROOT / path).exists() and not (document.parent / path).exists()]
    assert missing == []


def test_paths_are_found_at_all():
    assert len(mentioned_paths((ROOT / "README.md").read_text(encoding="utf-8"))) > 30
    assert mentioned_paths("see [x](a/b.md) and `rlhf/no.py`, configs/none.yaml") == {"a/b.md", "rlhf/no.py", "configs/none.yaml"}


@pytest.mark.parametrize("file", SOURCES + CONFIGS, ids=_names(SOURCES + CONFIGS))
def test_files_named_in_sources_exist(file):
    text = file.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w./{])(?:configs|stages|rlhf|tests)/[\w./-]*\w\.(?:py|yaml|md|json|jsonl)\b", text)
    assert [path for path in named if not (ROOT / path).is_file()] == []


@pytest.mark.parametrize("document", DOCUMENTS + CONFIGS + SOURCES, ids=_names(DOCUMENTS + CONFIGS + SOURCES))
def test_commands_in_documents_are_legal(document):
    text = document.read_text(encoding="utf-8")
    if document.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    for words in commands(text):
        check_command(words)


def test_commands_are_found_at_all():
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert ["pipeline"] in found and {words[0] for words in found} >= {*STAGES, "chat"}
    with pytest.raises(errors.InputError):
        check_command(["ppo", "ppo.learning=1"])
    with pytest.raises(AssertionError):
        check_command(["train"])


def test_settings_in_documents_are_legal():
    sections = "|".join(spec.name for spec in dataclasses.fields(Config))
    for document in DOCUMENTS:
        for section, key in re.findall(rf"`({sections})\.(\w+)(?:=[^`]*)?`", document.read_text(encoding="utf-8")):
            assert hasattr(getattr(Config(), section), key), f"{document}: {section}.{key}"


def test_ci_runs_the_readmes_test_command():
    block = next(b for b in re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S) if "pytest" in b)
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert script.endswith("\n" + block)
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "not executable"


def test_readme_names_the_stages_in_order():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert tuple(re.findall(r"^\| `rlhf (\w+)` \|", text, re.M)) == tuple(STAGES)


def test_readme_names_every_exit_code():
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## How it ends")[1].split("##")[0]
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", table, re.M)} == {v for name, v in vars(errors).items() if name.startswith("EXIT_")}


def test_readme_names_every_module():
    """A file that nobody finds might as well not be there."""
    table = (ROOT / "README.md").read_text(encoding="utf-8").split("## Where things are")[1]
    plumbing = {"__init__", "__main__", "cli", "errors", "jsonl", "paths", "progress", "prompts", "quiet"}
    modules = {p.stem for p in (ROOT / "rlhf").glob("*.py")} - plumbing
    assert modules - set(re.findall(r"`rlhf/(\w+)\.py`", table)) == set()


@pytest.mark.parametrize("file", CONFIGS, ids=_names(CONFIGS))
def test_every_config_loads(file):
    assert load_config(str(file)).run.dir.startswith("runs/")


def read_settings(sources: dict[str, str], sections: list[str]) -> set[tuple[str, str]]:
    """(section, key) of every `config.SECTION.KEY` in the sources, through names that stand for a section too."""
    found = set()
    for source in sources.values():
        tree = ast.parse(source)
        stands_for = {name: {name} for name in sections} | {f"{name}_settings": {name} for name in sections}
        for node in ast.walk(tree):
            for name, section in _bound(node, sections):
                stands_for.setdefault(name, set()).add(section)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                found |= {(section, node.attr) for section in stands_for.get(_last_name(node.value), ())}
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr" and ast.unparse(node.args[0]) == "config.data":
                found |= {("data", kind) for kind in KINDS}  # getattr(config.data, kind)
    return found


def _last_name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _bound(node: ast.AST, sections: list[str]):
    """(name, section) for `name = config.section`, alone or in a tuple."""
    if isinstance(node, ast.Assign) and len(node.targets) == 1:
        target, value = node.targets[0], node.value
        pairs = zip(target.elts, value.elts) if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) else [(target, value)]
        for name, given in pairs:
            if isinstance(name, ast.Name) and isinstance(given, ast.Attribute) and given.attr in sections and _last_name(given.value) == "config":
                yield name.id, given.attr


def test_every_setting_is_read_somewhere():
    sections = {spec.name: getattr(Config(), spec.name) for spec in dataclasses.fields(Config)}
    wanted = {(s, f.name) for s, value in sections.items() if dataclasses.is_dataclass(value) for f in dataclasses.fields(value)}
    sources = {str(p): p.read_text(encoding="utf-8") for p in SOURCES if p != ROOT / "rlhf" / "config.py"}
    assert wanted - read_settings(sources, list(sections)) == set()


def test_the_finder_of_unread_settings_finds_them():
    source = "def main(config):\n    settings, x = config.ppo, 1\n    print(settings.lr, config.sft.epochs, run_settings.dir, other.clip)\n"
    assert {("ppo", "lr"), ("sft", "epochs"), ("run", "dir")} <= (found := read_settings({"x": source}, ["ppo", "sft", "run"]))
    assert ("ppo", "clip") not in found and ("sft", "lr") not in found
