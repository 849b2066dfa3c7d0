"""The README against the code: its tree names what is there, its commands exist. A ```sh block holds commands and what they print:
a line that begins with "$ " is a command. The tree is the ```text block with a line for sd3core/, "path  comment", two spaces a level.
"""

from __future__ import annotations

import argparse
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer

PROJECT = Path(__file__).resolve().parent.parent
README = PROJECT / "README.md"
PACKAGES = ("sd3core", "workers", "flows")
MADE_BY_USE = (".venv/", "local/")  # in the tree, not in git


@dataclass(frozen=True)
class Block:
    kind: str
    line: int
    lines: list[str]


def blocks() -> list[Block]:
    found: list[Block] = []
    inside = False
    for number, line in enumerate(README.read_text().splitlines(), 1):
        if line.startswith("```"):
            if not inside:
                found.append(Block(line.removeprefix("```").strip(), number, []))
            inside = not inside
        elif inside:
            found[-1].lines.append(line)
    assert not inside, "a fence is not closed"
    return found


def tree_paths() -> list[str]:
    """Every path of the tree, from the project's folder; folders end in a slash."""
    tree = next(
        block for block in blocks() if block.kind == "text" and any(line.startswith("sd3core/") for line in block.lines)
    )
    paths, parents = [], {0: ""}
    for line in filter(str.strip, tree.lines):
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0, f"README tree: {line!r} is not indented by twos"
        assert indent in parents, f"README tree: {line!r} is deeper than the folder above it"
        path = parents[indent] + re.split(r"\s{2,}", line.strip())[0]
        parents = {depth: parent for depth, parent in parents.items() if depth <= indent}
        if path.endswith("/"):
            parents[indent + 2] = path
        paths.append(path)
    return paths


def commands() -> list[tuple[int, list[str]]]:
    """(line, words) of every simple command, those inside $(...) and after &&, | and ; too."""
    found = []
    for block in blocks():
        if block.kind not in ("sh", "bash", "console"):
            continue
        text, started = "", 0
        for number, line in enumerate(block.lines, block.line + 1):
            if not text and not line.startswith("$ "):
                continue
            started = started if text else number
            text += line.removeprefix("$ ") if not text else line.strip()
            if text.endswith("\\"):
                text = text[:-1]
                continue
            found += [(started, words) for words in simple_commands(text)]
            text = ""
    return found


def simple_commands(text: str) -> list[list[str]]:
    inner = re.findall(r"\$\(([^()]*)\)", text)
    words: list[list[str]] = [[]]
    lexer = shlex.shlex(re.sub(r"\$\([^()]*\)", "SUBSTITUTED", text), posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    lexer.commenters = "#"
    for word in lexer:
        if word and set(word) <= set("|&;()<>"):
            words.append([])
        else:
            words[-1].append(word)
    simple = [without_assignments(command) for command in words] + [
        command for part in inner for command in simple_commands(part)
    ]
    return [[Path(command[0]).name, *command[1:]] for command in simple if command]


def without_assignments(words: list[str]) -> list[str]:
    while words and re.match(r"[A-Za-z_]\w*=", words[0]):
        words = words[1:]
    return words


def calls_of(program: str) -> list:
    """The words after a program's name, as a test's parameters."""
    return [
        pytest.param(words[1:], id=f"line {line}: {' '.join(words)}")
        for line, words in commands()
        if words[0] == program
    ]


@cache
def sd3_commands() -> dict[str, typer.core.TyperCommand]:
    from flows.cli.commands import app

    return typer.main.get_command(app).commands


@cache
def deployed() -> set[str]:
    """STAGE/RECIPE of the shipped recipes, and of those that the README itself deploys."""
    from flows.local.deployments import FLOWS
    from sd3core.recipe_file import shipped_recipes

    own = [Path(words[2]).stem for _, words in commands() if words[:2] == ["sd3", "deploy"]]
    return {f"{flow}/{recipe}" for flow in FLOWS for recipe in [*shipped_recipes(), *own]}


def test_commands_are_found():
    assert simple_commands('eval "$(sd3 env)" && A=1 .venv/bin/sd3 up | tee x  # why') == [
        ["eval", "SUBSTITUTED"],
        ["sd3", "up"],
        ["tee", "x"],
        ["sd3", "env"],
    ]
    assert simple_commands("""prefect deployment run 'a/b' --param 'overrides=["x=1"]'""") == [
        ["prefect", "deployment", "run", "a/b", "--param", 'overrides=["x=1"]']
    ]


def test_the_readme_is_finished():
    assert "@@" not in README.read_text(), "a placeholder is left"


def test_the_readme_shows_every_way_in():
    assert {"make", "sd3", "prefect"} <= {words[0] for _, words in commands()}
    assert {"demo", "test"} <= {words[1] for _, words in commands() if words[0] == "make"}


def test_every_path_of_the_tree_exists():
    missing = [
        path for path in tree_paths() if not path.startswith(MADE_BY_USE) and not list(PROJECT.glob(path.rstrip("/")))
    ]
    assert not missing


def test_folders_of_the_tree_are_folders():
    wrong = [
        path
        for path in tree_paths()
        if any(found.is_dir() != path.endswith("/") for found in PROJECT.glob(path.rstrip("/")))
    ]
    assert not wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_the_tree_names_every_file_of_a_package(package):
    named = set(tree_paths())
    files = {f"{package}/{path.name}" for path in (PROJECT / package).glob("*.py")} - {f"{package}/__init__.py"}
    folders = {f"{package}/{path.name}/" for path in (PROJECT / package).iterdir() if (path / "__init__.py").is_file()}
    assert not sorted((files | folders) - named)


@pytest.mark.parametrize("arguments", calls_of("make"))
def test_make_targets_exist(arguments):
    makefile = (PROJECT / "Makefile").read_text()
    targets = {target for line in re.findall(r"^([\w -]+):(?!=)", makefile, re.MULTILINE) for target in line.split()}
    for argument in arguments:
        variable = argument.partition("=")[0]
        assert (
            re.search(rf"\$\({variable}\)|^{variable}\b", makefile, re.MULTILINE)
            if "=" in argument
            else argument in targets
        )


@pytest.mark.parametrize("arguments", calls_of("sd3"))
def test_sd3_commands_and_their_options_exist(arguments):
    from flows.cli.commands import app

    name, *rest = arguments
    if name.startswith("-"):
        assert name == "--help"
        return
    assert name in sd3_commands()
    if "--help" not in rest:
        with typer.main.get_command(app).make_context("sd3", [name], resilient_parsing=True) as parent:
            sd3_commands()[name].make_context(name, list(rest), parent=parent)  # raises UsageError


@pytest.mark.parametrize("arguments", calls_of("sd3"))
def test_recipes_and_overrides_of_sd3_commands_are_valid(arguments):
    from sd3core.recipe_file import load_recipe

    given = [
        (arguments[i], arguments[i + 1])
        for i in range(len(arguments) - 1)
        if arguments[i] in ("--recipe", "-r", "--set", "-s")
    ]
    recipe = next((value for option, value in given if option in ("--recipe", "-r")), "mini")
    if not recipe.endswith((".yaml", ".yml")):
        load_recipe(recipe, [value for option, value in given if option in ("--set", "-s")])


@pytest.mark.parametrize("arguments", calls_of("tensorboard"))
def test_tensorboard_is_installed_and_takes_these_options(arguments):
    from tensorboard.plugins.core.core_plugin import CorePluginLoader

    parser = argparse.ArgumentParser(exit_on_error=False)
    CorePluginLoader().define_flags(parser)
    chosen, unknown = parser.parse_known_args(arguments)
    assert not unknown and chosen.logdir.startswith("local/logs/")


@pytest.mark.parametrize("arguments", calls_of("prefect"))
def test_prefect_commands_and_their_options_exist(arguments):
    from prefect.cli._app import _app

    _app.parse_args([word for word in arguments if word != "--no-prompt"], print_error=False, exit_on_error=False)


@pytest.mark.parametrize(
    "arguments", [case for case in calls_of("prefect") if case.values[0][:2] == ["deployment", "run"]]
)
def test_deployments_exist(arguments):
    assert arguments[2] in deployed()
