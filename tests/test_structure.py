"""The rules of the layout: flows -> workers -> sd3core, and each framework behind the few files that may know it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
PACKAGES = ("sd3core", "workers", "flows")
MAY_IMPORT = {"sd3core": {"sd3core"}, "workers": {"workers", "sd3core"}, "flows": {"flows", "workers", "sd3core"}}
FLOWS_FLOORS = (("flows.local",), ("flows", "flows.ui"), ("flows.cli",))  # a room imports those of its floor and below
ONLY_IN = {  # a framework, and the files or folders that may import it
    "ray": ("workers/pool.py", "workers/ray_session.py", "workers/trainer/launch.py", "workers/trainer/actor.py"),
    "deepspeed": ("workers/trainer/engine.py",),
    "prefect": ("flows/",),
    "faiss": ("sd3core/filters/near_duplicates.py",),
    "boto3": ("sd3core/data/store/s3.py", "sd3core/bench/data.py"),
    "botocore": ("sd3core/data/store/s3.py",),
    "typer": ("flows/cli/commands.py", "flows/cli/bench.py", "flows/cli/options.py"),
}


def sources(*packages: str) -> list[Path]:
    return [path for package in packages for path in sorted((PROJECT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(PROJECT).as_posix()


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, top package) of every import, also those inside functions, in TYPE_CHECKING and by import_module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.partition(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, (node.module or "").partition(".")[0] if not node.level else "(relative)"
        elif isinstance(node, ast.Call) and called(node) in ("import_module", "__import__"):
            wanted = node.args[0] if node.args else None
            yield node.lineno, wanted.value.partition(".")[0] if isinstance(wanted, ast.Constant) else "(computed)"


def called(node: ast.Call) -> str:
    return node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")


def run_at_import(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node that is executed when the module is imported: bodies of functions and lambdas are not."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            continue
        yield node
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            waiting += [*node.decorator_list, *node.args.defaults]
        elif not isinstance(node, ast.Lambda):
            waiting += ast.iter_child_nodes(node)


def test_the_walk_sees_every_kind_of_import():
    source = "import a.b\nif x:\n    from c.d import e\ndef f():\n    import g, h as i\n    __import__('j')\n    importlib.import_module(k)\nfrom . import l"
    assert {package for _, package in imports(ast.parse(source))} == {
        "a",
        "c",
        "g",
        "h",
        "j",
        "(computed)",
        "(relative)",
    }


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    found = {name_of(path): ast.parse(path.read_text(), filename=str(path)) for path in sources(*PACKAGES)}
    assert len(found) > 50
    return found


def test_imports_go_from_flows_to_workers_to_sd3core(trees):
    wrong = [
        f"{name}:{line} imports {package}"
        for name, tree in trees.items()
        for line, package in imports(tree)
        if package in (*PACKAGES, "tests") and package not in MAY_IMPORT[name.partition("/")[0]]
    ]
    assert not wrong


def imported_modules(tree: ast.AST, modules: set[str]) -> set[str]:
    """The project's modules that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (whole & modules) or {node.module}
    return found & modules


def module_of(name: str) -> str:
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every edge whose end leads back to its beginning."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - seen
            seen |= new
            waiting += new
        return seen

    return [f"{a} -> {b}" for a, ends in graph.items() for b in ends if a in reached(b)]


@pytest.fixture(scope="module")
def module_graph(trees) -> dict[str, set[str]]:
    modules = {module_of(name) for name in trees}
    return {module_of(name): imported_modules(tree, modules) - {module_of(name)} for name, tree in trees.items()}


def test_circles_are_seen():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b -> c", "c -> b"]
    assert circles({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_module_imports_in_a_circle(module_graph):
    assert circles(module_graph) == []


def test_no_room_imports_in_a_circle(module_graph):
    """A room is a folder or a module beside it: sd3core.data, sd3core.recipe, workers.trainer, flows.ui."""

    def room(module: str) -> str:
        return ".".join(module.split(".")[:2])

    rooms: dict[str, set[str]] = {}
    for module, imported in module_graph.items():
        rooms.setdefault(room(module), set()).update({room(other) for other in imported} - {room(module)})
    assert circles(rooms) == []


def test_rooms_of_flows_import_downwards(module_graph):
    def floor(module: str) -> int:
        parts = module.split(".")
        name = ".".join(parts[:2]) if (PROJECT / "/".join(parts[:2])).is_dir() else "flows"
        return next(number for number, names in enumerate(FLOWS_FLOORS) if name in names)

    assert not [
        f"{module} -> {other}"
        for module, imported in module_graph.items()
        for other in imported
        if module.startswith("flows.") and other.startswith("flows.") and floor(other) > floor(module)
    ]


@pytest.mark.parametrize("framework", ONLY_IN)
def test_a_framework_stays_in_its_files(trees, framework):
    users = {name for name, tree in trees.items() if framework in {package for _, package in imports(tree)}}
    assert users, f"nobody imports {framework}: is the rule still right?"
    assert not {name for name in users if not name.startswith(ONLY_IN[framework])}


def test_imports_can_be_read(trees):
    """Absolute, and by a name that stands in the source: otherwise the rules above could be walked around."""
    unreadable = ("(relative)", "(computed)")
    assert not [
        f"{n}:{line} {package}" for n, tree in trees.items() for line, package in imports(tree) if package in unreadable
    ]


def test_the_library_does_not_print(trees):
    printing = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and called(node) == "print" and not name.startswith("flows/")
    ]
    assert not printing


def test_no_environment_variable_is_read_at_import_and_only_rays_is_set(trees):
    touching = [
        f"{name}:{node.lineno}"
        for name, tree in trees.items()
        for node in run_at_import(tree)
        if isinstance(node, ast.Attribute | ast.Name)
        and ast.unparse(node) in ("os.environ", "environ", "os.getenv", "getenv")
    ]
    # Ray reads these when it is imported itself
    assert [place.partition(":")[0] for place in touching] == ["workers/__init__.py"] * 2, touching


def test_nothing_runs_at_import(trees):
    """A bare call at the top of a module does something; a call whose result has a name makes something.

    Hanging one group of commands under another is neither.
    """
    working = [
        f"{name}:{node.lineno} {ast.unparse(node)[:80]}"
        for name, tree in trees.items()
        for node in run_at_import(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and called(node.value) != "add_typer"
    ]
    assert not working


STORE_PATH = re.compile(r"(runs|datasets|towers|references|begun)/|runs$|datasets$|references$")
STORE_MARKER = re.compile(r"MANIFEST\.|DONE\.json|\.done\.json|\.index\.parquet|scores\.json|NULL\.(json|safetensors)")


def written_strings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of every string but docstrings; of an f-string each written part. Sentences for people have a space."""
    docs = {
        node.body[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node not in docs
            and " " not in node.value
        ):
            yield node.lineno, node.value


def test_paths_and_markers_of_the_store_are_spelt_in_one_file(trees):
    owners = ("sd3core/specs.py", "sd3core/data/encoded_shards.py")
    assert not [
        f"{name}:{line} {text!r}"
        for name, tree in trees.items()
        for line, text in written_strings(tree)
        if name not in owners and (STORE_PATH.match(text) or STORE_MARKER.search(text))
    ]


def public_names(tree: ast.Module) -> set[str]:
    """What a module defines at its top and gives no underscore: functions, classes, constants."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {name for name in names if not name.startswith("_")}


def test_a_public_name_stands_for_one_thing(trees):
    places: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for name in public_names(tree):
            places.setdefault(name, []).append(module)
    assert not {name: where for name, where in places.items() if len(where) > 1}


def test_names_of_test_files_are_unique():
    """Without __init__.py pytest tells test modules apart by their names alone."""
    files = [path for path in sources("tests") if path.name != "conftest.py"]
    assert not [name_of(path) for path in sources("tests") if path.name == "__init__.py"]
    names = [path.name for path in files]
    assert not [name_of(path) for path in files if names.count(path.name) > 1]


def test_top_level_folders_of_the_tests_mirror_the_packages():
    folders = {
        path.name for path in (PROJECT / "tests").iterdir() if path.is_dir() and not path.name.startswith((".", "_"))
    }
    assert folders == {*PACKAGES, "end_to_end"}
