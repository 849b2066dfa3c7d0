"""A recipe by name or from a YAML file: read, overridden, validated as a whole. What is wrong is one line with the key and the mend."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sd3core.errors import RecipeError
from sd3core.recipe import Recipe

NO_SPACES = "; in `make SET=...` a value has no spaces inside"
RECIPE_ENDINGS = (".yaml", ".yml")  # of a path; anything else is a name


def shipped_recipes() -> list[str]:
    folder = resources.files("infra") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a shipped recipe by name, or a YAML file, applies `section.key=value` overrides and validates the whole.

    Raises RecipeError: one line with the key and the mend.
    """
    fields = _read_yaml(name_or_path)
    for override in overrides or []:
        _apply_override(fields, override)
    try:
        recipe = Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"recipe {name_or_path}: {_first_problem(error)}") from None
    return recipe


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    if name_or_path.endswith(RECIPE_ENDINGS):
        path = Path(name_or_path)
        try:
            if not path.is_file():
                raise RecipeError(f"recipe {name_or_path}: no such file; shipped: {', '.join(shipped_recipes())}")
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"recipe {name_or_path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
        except OSError as error:
            raise RecipeError(f"recipe {name_or_path}: cannot be read ({error.strerror or error})") from None
    else:
        if name_or_path not in shipped_recipes():
            beside = [f"{name_or_path}{ending}" for ending in RECIPE_ENDINGS if Path(f"{name_or_path}{ending}").is_file()]
            meant = f"; for the file write {beside[0]}" if beside else _meant(name_or_path, shipped_recipes())
            raise RecipeError(
                f"recipe {name_or_path!r}: no recipe of that name{meant};"
                f" shipped: {', '.join(shipped_recipes())}; or give a path that ends in .yaml"
            )
        text = (resources.files("infra") / "recipes" / f"{name_or_path}.yaml").read_text(encoding="utf-8")
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name_or_path}: not YAML: {_yaml_problem(error)}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {name_or_path}: a recipe is a mapping of sections, this file is not")
    text_section = fields.get("text")
    if isinstance(text_section, dict) and None in text_section:
        text_section["null"] = text_section.pop(None)  # YAML reads the bare key `null:` as nothing
    return fields


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where and what, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _apply_override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"override {override!r}: write it as section.key=value{NO_SPACES}")
    *sections, last = key.split(".")
    target: Any = fields
    for section in sections:
        if isinstance(target, list):
            target = target[_list_position(target, section, override)]
            continue
        if not isinstance(target.get(section), dict | list):
            target[section] = {}
        target = target[section]
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"override {override!r}: the value is not YAML; put it in quotes{NO_SPACES}") from None
    if isinstance(target, list):
        target[_list_position(target, last, override)] = parsed
    else:
        target[last] = parsed


def _list_position(items: list, text: str, override: str) -> int:
    if not text.isdigit() or int(text) >= len(items):
        raise RecipeError(f"override {override!r}: {text!r} is not one of the positions 0 to {len(items) - 1}")
    return int(text)


def _first_problem(error: ValidationError) -> str:
    """The first of pydantic's findings as one line: the key, what is wrong, the nearest valid key.

    Unknown keys come first, and then nothing is said to be missing: it may be what a misspelt key was meant to be.
    """
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        problems = unknown + [problem for problem in problems if problem["type"] not in ("extra_forbidden", "missing")]
    problem = problems[0]
    key = ".".join(str(part) for part in problem["loc"])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        siblings = _valid_keys(problem["loc"][:-1])
        return f"unknown key {key}{_nearest(str(problem['loc'][-1]), siblings)}{more}"
    if problem["type"] == "missing":
        return f"{key} is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = f" (it is {problem['input']!r})" if isinstance(problem["input"], str | int | float | bool) else ""
    return f"{key + ': ' if key else ''}{message}{shown}{more}"


def _valid_keys(location: tuple[Any, ...]) -> list[str]:
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return list(model.model_fields)


def _nearest(word: str, known: list[str]) -> str:
    return _meant(word, known) or f"; valid here: {', '.join(known)}"


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
