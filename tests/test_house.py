"""The rules of the house that no linter knows: sizes, words, commands in the docs, frozen options."""

import ast
import dataclasses
import inspect
import itertools
import re
import shlex
import tokenize
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import liam_scale
import loaders
from liam_scale import api
from liam_scale.cli import COMMANDS, command
from liam_scale.config import TrainConfig
from liam_scale.ingest import IngestConfig
from loaders.ingest import ingest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted([*(ROOT / "liam_scale").rglob("*.py"), *(ROOT / "loaders").rglob("*.py")])
KERNELS = [path for path in SOURCES if "numba" in path.read_text() or "compiled" in path.read_text()]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "docs" / "cluster").rglob("*") if path.is_file() and path.suffix != ".pyc")
OPTIONS = Path(__file__).with_name("options.txt")
WIDER = {"modality", "modalities", "batch_key", "continuous_key", "alphas", "weights"}
"""Options of train that Python takes in more forms."""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            first = node.body[0].end_lineno if ast.get_docstring(node) else node.lineno
            assert node.end_lineno is not None
            assert first is not None
            assert node.end_lineno - first <= 60, f"{node.name} is too long"


@pytest.mark.parametrize("path", KERNELS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_kernel_is_compiled_in_one_way(path: Path) -> None:
    """Numba's own decorator fails where neither the package nor the home can be written."""
    assert path.name == "csr.py" or not re.search(r"\bn?jit\(|@(numba\.)?n?jit\b", path.read_text())


def test_train_reads_as_a_table_of_contents() -> None:
    assert (ROOT / "liam_scale" / "train.py").read_text().count("\n") <= 100


@pytest.mark.parametrize(
    ("function", "kind", "wider"),
    [
        (api.train, TrainConfig, {*WIDER, "store", "out", "features"}),
        (ingest, IngestConfig, {"sources", "out", "features", "memory", "modality"}),
    ],
)
def test_a_function_of_python_takes_the_options_of_its_command(
    function: Callable[..., object], kind: type, wider: set[str]
) -> None:
    """Names, types and defaults stand in the function for completion, and in the dataclasses; they are the same."""
    sections = {f.name: f.default_factory for f in dataclasses.fields(kind) if callable(f.default_factory)}
    options: dict[str, object] = {}
    for part in (kind, *sections.values()):
        hints = typing.get_type_hints(part)
        own = [f for f in dataclasses.fields(part) if part is not kind or f.name not in sections]
        options |= {f.name: (hints[f.name], f.default) for f in own}
    hints = typing.get_type_hints(function)
    given = inspect.signature(function).parameters.values()
    taken = {p.name: (hints[p.name], dataclasses.MISSING if p.default is p.empty else p.default) for p in given}
    for of_python_alone in ("progress", "client", "callbacks"):
        taken.pop(of_python_alone, None)
    assert list(taken) == list(options)
    for name in options:
        assert taken[name][name in wider :] == options[name][name in wider :], name


def test_there_are_no_rooms_without_a_name() -> None:
    assert not [p for p in SOURCES if p.stem in ("utils", "helpers", "common", "misc")]
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_covariate_is_never_called_batch_alone(path: Path) -> None:
    """In names; `batch_key` is the field's option name, `batch_norm` another thing."""
    with path.open("rb") as file:
        names = {token.string for token in tokenize.tokenize(file.readline) if token.type == tokenize.NAME}
    assert not names & {"batch", "batches", "n_batch", "num_batches"}


def commands(script: str) -> list[list[str]]:
    """Command lines of this package in a shell script."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        for part in line.split("#")[0].split("&&"):
            if "liam" not in part:
                continue
            words = list(itertools.takewhile(lambda word: word not in ("|", ">"), shlex.split(part)))
            if "liam-scale" in words[:1]:
                found.append(words[1:])
            elif any(w.startswith("liam_scale.") for w in words) and "-m" in words:
                index = next(i for i, w in enumerate(words) if w.startswith("liam_scale."))
                found.append([words[index].removeprefix("liam_scale."), *words[index + 1 :]])
    return found


def bash_blocks(page: str) -> list[str]:
    return re.findall(r"```bash\n(.*?)```", page, flags=re.S)


def scripts(path: Path) -> list[str]:
    """The shell scripts and argument lists in an example file, with 1 in place of what is filled in."""
    text = path.read_text()
    if path.suffix in (".yaml", ".yml"):
        found = [*parts_of(yaml.safe_load(text))]
    elif path.suffix == ".py":
        lists = [node.elts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.List)]
        words = [[e.value if isinstance(e, ast.Constant) else "1" for e in elements] for elements in lists]
        found = [shlex.join(map(str, itertools.chain.from_iterable(words)))]
    else:
        text = text.replace("\\\\\n", "\\\n")
        blocks = re.findall(r'"""\n(.*?)"""', text, flags=re.S)
        found = blocks or [re.sub("^RUN ", "", text, flags=re.M)]
    return [re.sub(r"\$?\{\{.*?\}\}|\$?\{[^{}]*\}|\$\w+", "1", script) for script in found]


def parts_of(document: object) -> Iterator[str]:
    if isinstance(document, str):
        yield document
    elif isinstance(document, list) and all(isinstance(part, str) for part in document):
        yield from (shlex.join(document), *document)
    elif isinstance(document, dict | list):
        for part in document.values() if isinstance(document, dict) else document:
            yield from parts_of(part)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_the_commands_in_the_docs_parse(page: Path) -> None:
    for block in bash_blocks(page.read_text()):
        for name, *arguments in commands(block):
            command(name).parse(arguments)


def test_the_commands_in_the_examples_for_clusters_parse() -> None:
    found = {}
    for path in EXAMPLES:
        every = [words for script in scripts(path) for words in commands(script)]
        own = [words for words in every if words and words[0].isidentifier()]
        for name, *arguments in own:
            command(name).parse(arguments)
        found[path.name] = [name for name, *_ in own]
    assert {name: words for name, words in found.items() if words} == {
        "Snakefile": ["ingest", "train", "embed", "evaluate"],
        "main.nf": ["ingest", "train", "embed", "evaluate"],
        "pytorchjob.yaml": ["train"],
        "ray_train.py": ["train"],
        "skypilot.yaml": ["train"],
    }


EXECUTED = [page.stem for page in PAGES if "file_format: mystnb" in page.read_text()[:99]]
NARROW = [*EXECUTED, "from-scvi-tools", "from-liam", "faq", "clusters"]


@pytest.mark.parametrize("path", PAGES[1:], ids=lambda p: p.name)
def test_code_fits_a_page_of_1280_pixels(path: Path) -> None:
    """90 characters, as looked at in a browser; 86 on pages that keep a margin."""
    page, most = path.read_text(), 86 if path.stem in NARROW else 90
    shown = [*re.findall(r"^```(?!{eval-rst)[^\n]+\n(.*?)^```", page, flags=re.S | re.M)]
    shown += [(ROOT / "docs" / file).read_text() for file in re.findall(r"literalinclude\} (\S+)", page)]
    assert [line for text in shown for line in text.splitlines() if len(line) > most] == []


@pytest.mark.parametrize("package", [liam_scale, loaders])
def test_every_public_name_stands_on_the_page_of_reference(package: ModuleType) -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    shown = [name for line in re.findall(r":members: (.+)", page) for name in line.split(", ")]
    shown += [name.rpartition(".")[2] for name in re.findall(r"auto(?:class|function):: (\S+)", page)]
    assert set(package.__all__) <= set(shown)


OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*(?![\w.]*1)")
FOREIGN_OPTIONS = {
    "--help",
    "--version",
    "--print-completion",
    "--tyro-print-completion",
    "--job-name",
    "--array",
    "--signal",
    "--requeue",
    "--ntasks",
    "--output",
} | {
    "--standalone",
    "--local-addr",
    "--nproc-per-node",
    "--index-url",
}
LAUNCH = r"(?:liam-scale |(?:python|torchrun)[^`\n]*? -m liam_scale\.)"
COMMAND = re.compile(rf"(?:(?<=`)|(?<=: )){LAUNCH}([a-z_]+)([^`\n;)]*)")
"""A command to type: all between backticks, or what follows a colon up to the end of its line."""


def texts(path: Path) -> list[str]:
    """String literals of a source, 1 in place of what an f-string fills in."""
    tree = ast.parse(path.read_text())
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "1" for p in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
            found.append(node.value)
    return found


@pytest.mark.parametrize("path", [*SOURCES, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_commands_and_options_in_messages_docstrings_and_prose_exist(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {line.split()[1] for line in OPTIONS.read_text().splitlines()} | FOREIGN_OPTIONS
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.toml").write_text("store = 'atlas.zarr'")
    for text in texts(path) if path.suffix == ".py" else [path.read_text()]:
        for name, arguments in COMMAND.findall(text):
            assert name in COMMANDS, text
            if words := [word for word in shlex.split(arguments) if word != "..."]:
                command(name).parse(words)
        if path.suffix == ".py":
            is_section = re.fullmatch(r"--[a-z]+\.", text)
            assert is_section or set(OPTION.findall(text)) <= known, text
            assert not re.search(r"(^|[;:] )do: |^model\.\w+: got", text), f"a message in another dialect: {text}"


@pytest.mark.parametrize("path", [p for p in SOURCES if "loaders" in p.parts], ids=lambda p: str(p.relative_to(ROOT)))
def test_the_loaders_speak_no_word_of_the_command_line(path: Path) -> None:
    """They name options as arguments of their own functions, which a command translates; aliases of flags are alone."""
    for text in texts(path):
        assert not re.search(r"liam-scale [a-z]|liam_scale\.|python -m", text), text
        assert re.fullmatch(r"--[a-z-]+", text) or not re.search(r"(?<![\w-])--[a-z]", text), text


def test_the_options_are_those_that_were_agreed_on(capsys: pytest.CaptureFixture[str]) -> None:
    """A renamed or dropped option breaks scripts; a new one is added to tests/options.txt by hand."""
    found = []
    for name in COMMANDS:
        with pytest.raises(SystemExit):
            command(name)(["--help"])
        said = capsys.readouterr().out
        assert not re.search(r"\{None\}|\[\[|\bSTR\b", said), f"{name} --help names a value in words of the parser"
        options = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*(?:\.[a-z][a-z0-9-]*)*", said)) - {"--help"})
        found += [f"{name} {option}" for option in options]
    assert found == OPTIONS.read_text().split("\n")[:-1]
