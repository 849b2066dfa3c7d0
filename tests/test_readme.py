"""The READMEs against the code: their size, trees, paths, names and commands.

A ```sh block holds commands and what they print: a line that begins with "$ " is a command. A ```text tree block is a file
tree, a line for each path: the path below the README's folder, two spaces or more, and what stands in the file, by its own
first sentence where it has one. `python tests/test_readme.py` writes the trees of the packages anew.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import typer

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("flows", "workers", "sd3core", "infra")
MADE_BY_USE = (".venv/", "local/")  # in the tree, not in git
MOST_LINES = {"README.md": 170}
MOST_LINES_OF_OTHERS = 150
WIDTH, SENTENCE = 120, 80
PROGRAMS = ("make", "sd3", "prefect", "tensorboard")  # whose calls are parsed below

# A command of a README, as a pattern of its words -> the test that runs it.
COMMANDS_RUN_BY = {
    r"make demo.*|sd3 demo.*": "tests/end_to_end/test_chain.py::test_the_same_command_goes_on",
    r"make test": "tests/test_makefile.py::test_the_python_that_runs_here_is_taken",
    r"sd3 up|eval SUBSTITUTED|sd3 env": "tests/end_to_end/test_chain.py::test_prefects_own_commands_list_what_is_there",
    r"sd3 down": "tests/end_to_end/test_homes.py::test_a_server_that_nobody_wrote_down_is_found",
    r"sd3 ui": "tests/end_to_end/test_ui.py::test_the_pages_of_a_stage_at_work",
    r"sd3 status": "tests/flows/cli/test_cli_errors.py::test_status_and_down_where_nothing_was_started",
    r"prefect deployment ls": "tests/end_to_end/test_chain.py::test_prefects_own_commands_list_what_is_there",
    r"prefect deployment run .*": "tests/end_to_end/test_chain.py::test_the_kill_came_in_the_middle_of_pretraining",
    r"sd3 sample .*--checkpoint.*": "tests/flows/cli/test_convert_commands.py::"
    "test_sample_takes_a_checkpoint_and_towers_of_ones_own",
    r"sd3 sample .*--run.*": "tests/flows/cli/test_trained_runs.py::test_sample_and_the_line_that_the_demo_prints",
    r"sd3 sample (?!.*--(checkpoint|run)).*": "tests/end_to_end/test_chain.py::"
    "test_the_terminal_ends_with_scores_pictures_ui_and_a_command",
    r"sd3 import .*": "tests/flows/cli/test_convert_commands.py::"
    "test_import_says_what_it_found_and_what_it_took_for_granted",
    r"sd3 export .*": "tests/flows/cli/test_convert_commands.py::test_export_in_both_formats",
    r"(mkdir|mv|cp|printf|tee) .*": "tests/flows/cli/test_plan_source.py::"
    "test_class_folders_a_table_and_a_mask_as_the_readme_shows_them",
    r"sd3 plan.*": "tests/flows/cli/test_sd3_plan.py::test_the_plan_of_every_recipe_says_what_it_costs",
    r"sd3 deploy .*": "tests/flows/cli/test_cli_errors.py::test_a_prefect_server_that_is_not_there_is_named",
    r"sd3 clean.*": "tests/flows/cli/test_clean_command.py::test_it_removes_what_is_named_and_refuses_what_is_in_use",
    r"sd3 inspect .*": "tests/workers/test_data_stages.py::test_every_object_of_the_chain_can_be_inspected",
    r"sd3 photographs .*--as.*": "tests/workers/test_sources_seen.py::"
    "test_tars_and_a_parquet_of_a_bucket_as_the_readme_shows_them",
    r"sd3 photographs (?!.*--as).*": "tests/sd3core/data/test_photographs.py::test_writes_pictures_with_captions",
    r"sd3 bench model.*": "tests/sd3core/bench/test_bench_model.py::"
    "test_the_command_prints_a_table_and_writes_the_figures",
    r"sd3 bench encode.*": "tests/flows/cli/test_bench_encode.py::test_the_command_prints_tables_and_writes_the_figures",
    r"sd3 bench duplicates.*": "tests/sd3core/bench/test_bench_duplicates.py::"
    "test_the_command_prints_recall_and_precision_by_kind",
    r"sd3 bench data.*": "tests/sd3core/bench/test_bench_data.py::"
    "test_the_command_prints_a_table_and_writes_the_figures",
}


@dataclass(frozen=True)
class Block:
    kind: str
    line: int  # of its opening fence, from 1
    lines: list[str]


def readmes() -> list[Path]:
    return [
        PROJECT / "README.md",
        *(path for package in PACKAGES for path in sorted((PROJECT / package).rglob("README.md"))),
    ]


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=path.relative_to(PROJECT).as_posix()) for path in paths]


every_readme = pytest.mark.parametrize("readme", named(readmes()))
every_whole_tree = pytest.mark.parametrize("readme", named(readmes()[1:]))  # the root one shows folders only


def blocks(readme: Path) -> list[Block]:
    found: list[Block] = []
    inside = False
    for number, line in enumerate(readme.read_text().splitlines(), 1):
        if line.startswith("```"):
            if not inside:
                found.append(Block(line.removeprefix("```").strip(), number, []))
            inside = not inside
        elif inside:
            found[-1].lines.append(line)
    assert not inside, f"{readme}: a fence is not closed"
    return found


def prose(readme: Path) -> str:
    return re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.MULTILINE | re.DOTALL)


def code_spans(readme: Path) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(readme))]


# ---- trees


def first_sentence(path: Path) -> str | None:
    """What a file says of itself: its docstring's first sentence, or its first comment's; a folder's stands in __init__.py."""
    if path.is_dir():
        return first_sentence(path / "__init__.py") if (path / "__init__.py").is_file() else None
    if path.suffix == ".py":
        said = ast.get_docstring(ast.parse(path.read_text())) or ""
    elif path.suffix in (".yaml", ".txt"):
        said = path.read_text().partition("\n")[0]
        said = said.removeprefix("#") if said.startswith("#") else ""
    else:
        return None
    words = " ".join(said.split())
    return re.split(r"(?<=[.?!])\s", words, maxsplit=1)[0] or None


def tree(readme: Path) -> list[tuple[str, str]]:
    """(path, what is said of it) of every line, the path from the README's folder; folders end in a slash."""
    block = next((block for block in blocks(readme) if block.kind == "text tree"), None)
    found, parents = [], {0: ""}
    for line in filter(str.strip, block.lines if block else []):
        indent = len(line) - len(line.lstrip())
        assert indent % 2 == 0, f"{readme}: {line!r} is not indented by twos"
        assert indent in parents, f"{readme}: {line!r} is deeper than the folder above it"
        name, *said = re.split(r"\s{2,}", line.strip(), maxsplit=1)
        path = parents[indent] + name
        parents = {depth: parent for depth, parent in parents.items() if depth <= indent}
        if path.endswith("/"):
            parents[indent + 2] = path
        found.append((path, said[0] if said else ""))
    return found


def whole_tree(folder: Path, depth: int = 0) -> Iterator[tuple[int, Path]]:
    """Every file and folder, files first; what has a README of its own is one line."""
    inside = sorted(path for path in folder.iterdir() if path.name not in ("__init__.py", "__pycache__", "README.md"))
    for path in [path for path in inside if path.is_file() and path.suffix != ".pyc"]:
        yield depth, path
    for path in [path for path in inside if path.is_dir() and holds_files(path)]:
        yield depth, path
        if not (path / "README.md").is_file():
            yield from whole_tree(path, depth + 1)


def holds_files(folder: Path) -> bool:
    """False of a folder whose files have moved: git leaves what Python compiled there."""
    return any(path.is_file() and path.suffix != ".pyc" for path in folder.rglob("*"))


def as_named(path: Path, readme: Path) -> str:
    return path.relative_to(readme.parent).as_posix() + ("/" if path.is_dir() else "")


def rewritten(readme: Path) -> str:
    """The README with its tree made anew; what is said of files that say nothing of themselves stays."""
    kept = dict(tree(readme))
    rows = [
        (
            "  " * depth + path.name + ("/" if path.is_dir() else ""),
            first_sentence(path) or kept.get(as_named(path, readme), ""),
        )
        for depth, path in whole_tree(readme.parent)
    ]
    width = max(len(path) for path, _ in rows) + 2
    lines = "\n".join(f"{path:{width}}{said}".rstrip() for path, said in rows)
    return re.sub(
        r"^```text tree\n.*?^```",
        lambda _: f"```text tree\n{lines}\n```",
        readme.read_text(),
        flags=re.MULTILINE | re.DOTALL,
    )


@every_readme
def test_every_path_of_a_tree_exists_and_folders_are_folders(readme):
    wrong = []
    for path, _ in tree(readme):
        found = list(readme.parent.glob(path.rstrip("/")))
        if not path.startswith(MADE_BY_USE) and (not found or any(p.is_dir() != path.endswith("/") for p in found)):
            wrong.append(path)
    assert not wrong


@every_readme
def test_a_tree_says_of_a_file_what_its_first_sentence_says(readme):
    wrong = {}
    for path, said in tree(readme):
        sentence = first_sentence(readme.parent / path) if (readme.parent / path).exists() else None
        if sentence and said != sentence:
            wrong[path] = sentence
        assert said and len(said) <= SENTENCE, f"{path}: {said!r} is empty or longer than {SENTENCE} characters"
    assert not wrong, "run `python tests/test_readme.py`"


@every_whole_tree
def test_a_packages_tree_names_every_file(readme):
    files = [as_named(path, readme) for _, path in whole_tree(readme.parent)]
    assert [path for path, _ in tree(readme)] == files, "run `python tests/test_readme.py`"


def test_the_root_tree_names_every_folder_of_the_packages():
    inside = {path.parent for package in PACKAGES for path in (PROJECT / package).glob("*/__init__.py")}
    assert {path.relative_to(PROJECT).as_posix() + "/" for path in inside} <= dict(tree(PROJECT / "README.md")).keys()


def test_the_first_sentence_is_whole(tmp_path):
    (tmp_path / "a.py").write_text('"""Reads a file (Raffel) of any\nkind: as it is. Not this."""\n')
    assert first_sentence(tmp_path / "a.py") == "Reads a file (Raffel) of any kind: as it is."
    (tmp_path / "a.yaml").write_text("# The demo: at 2.5 px. Not this.\nname: a\n")
    assert first_sentence(tmp_path / "a.yaml") == "The demo: at 2.5 px."


# ---- size, paths, names


@every_readme
def test_a_readme_is_short_narrow_and_finished(readme):
    lines = readme.read_text().splitlines()
    name = readme.relative_to(PROJECT).as_posix()
    assert len(lines) <= MOST_LINES.get(name, MOST_LINES_OF_OTHERS)
    assert not [f"{number}: {len(line)}" for number, line in enumerate(lines, 1) if len(line) > WIDTH]
    assert "@@" not in readme.read_text(), "a placeholder is left"


@every_readme
def test_what_a_readme_links_to_exists(readme):
    links = re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose(readme))
    missing = []
    for link in (one or other for one, other in links):
        path, _, anchor = link.partition("#")
        target = readme.parent / path if path else readme
        if not link.startswith("https://") and not (target.exists() and (not anchor or anchor in anchors(target))):
            missing.append(link)
    assert not missing


def anchors(readme: Path) -> set[str]:
    """Of its headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(readme), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_readme
def test_the_paths_of_the_project_that_a_readme_names_exist(readme):
    spans = [span for span in code_spans(readme) if re.match(rf"({'|'.join(PACKAGES)}|tests|\.ci)/[\w./*-]*$", span)]
    assert not [span for span in spans if not list(PROJECT.glob(span.rstrip("/")))]


@every_readme
def test_the_python_names_of_the_project_that_a_readme_names_exist(readme):
    for span in code_spans(readme):
        if re.match(rf"({'|'.join(PACKAGES)})(\.\w+)+$", span):
            assert exists(span), span


def exists(dotted: str) -> bool:
    parts = dotted.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for name in parts[end:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("readme", named([path for path in readmes() if "```python" in path.read_text()]))
def test_the_python_of_a_readme_runs(readme):
    for block in blocks(readme):
        if block.kind == "python":
            exec(compile("\n" * block.line + "\n".join(block.lines), str(readme), "exec"), {})


# ---- commands


def commands() -> list[tuple[str, list[str]]]:
    """(where it stands, words) of every simple command, those inside $(...) and after &&, | and ; too."""
    found = []
    for readme in readmes():
        name = readme.relative_to(PROJECT).as_posix()
        for block in blocks(readme):
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
                found += [(f"{name}:{started}", words) for words in simple_commands(text)]
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
        pytest.param(words[1:], id=f"{where} {' '.join(words)}") for where, words in commands() if words[0] == program
    ]


def spans_of(program: str) -> list:
    """The same of commands that stand in a sentence, which may leave out what is not their point."""
    texts = [span for readme in readmes() for span in code_spans(readme)]
    found = [words for text in texts if re.match(rf"\S*\b{program} ", text) for words in simple_commands(text)]
    return [pytest.param(words[1:], id=" ".join(words)) for words in found if words[0] == program]


@cache
def sd3_commands() -> dict[str, typer.core.TyperCommand]:
    from flows.cli.commands import app

    return typer.main.get_command(app).commands


@cache
def deployed() -> set[str]:
    """STAGE/RECIPE of the shipped recipes, and of those that the READMEs themselves deploy."""
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


def test_the_readmes_show_every_way_in():
    root = [words for where, words in commands() if where.startswith("README.md:")]
    assert {"make", "sd3"} <= {words[0] for words in root}
    assert {"demo", "test"} <= {words[1] for words in root if words[0] == "make"}
    assert "prefect" in {words[0] for _, words in commands()}


def test_every_command_is_run_by_a_test_or_parsed_by_one():
    neither = [
        (where, " ".join(words))
        for where, words in commands()
        if words[0] not in PROGRAMS and not any(re.fullmatch(p, " ".join(words)) for p in COMMANDS_RUN_BY)
    ]
    assert not neither


@pytest.mark.parametrize("pattern", COMMANDS_RUN_BY)
def test_the_test_that_runs_a_command_exists_and_the_command_stands_in_a_readme(pattern):
    path, _, name = COMMANDS_RUN_BY[pattern].partition("::")
    tests = ast.parse((PROJECT / path).read_text()).body
    assert name in {node.name for node in tests if isinstance(node, ast.FunctionDef)}
    assert any(re.fullmatch(pattern, " ".join(words)) for _, words in commands())


@pytest.mark.parametrize("arguments", calls_of("make") + spans_of("make"))
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


@pytest.mark.parametrize("arguments", spans_of("sd3"))
def test_sd3_commands_in_sentences_have_their_options(arguments):
    command = sd3_commands()[arguments[0]]
    options = {option for parameter in command.params for option in parameter.opts} | {"--help"}
    assert {word for word in arguments[1:] if word.startswith("--")} <= options


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
        own_images = ["data.source=folder", "data.folder=/images", "caption.captioner=none"] * ("--data" in arguments)
        overrides = [value.replace("$PWD", str(PROJECT)) for option, value in given if option in ("--set", "-s")]
        load_recipe(recipe, [*own_images, *overrides])


@pytest.mark.parametrize("arguments", calls_of("make") + spans_of("make"))
def test_recipes_and_overrides_of_make_are_valid(arguments):
    from sd3core.recipe_file import load_recipe

    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if not given.get("RECIPE", "mini").endswith(".yaml"):
        load_recipe(given.get("RECIPE", "mini"), given.get("SET", "").split())


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


if __name__ == "__main__":
    for page in readmes()[1:]:
        page.write_text(rewritten(page))
