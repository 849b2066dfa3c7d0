"""A recipe by name or from a YAML file: read, overridden, validated as a whole. What is wrong is one line with the key and the mend."""

from __future__ import annotations

import difflib
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from sd3core.errors import RecipeError
from sd3core.recipe import Recipe, Training
from sd3core.recipe_yaml import parse_yaml
from sd3core.shown_text import shortened

NO_SPACES = "; in `make SET=...` a value has no spaces inside"
RECIPE_ENDINGS = (".yaml", ".yml")  # of a path; anything else is a name
LARGEST_BYTES = 1_000_000
SHARED = "training"  # the section with what all phases share
KEY_CHARS, VALUE_CHARS = 200, 100  # of what a message repeats


def shipped_recipes() -> list[str]:
    folder = resources.files("infra") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Reads a shipped recipe by name, or a YAML file, applies `section.key=value` overrides and validates the whole.

    Raises RecipeError: one line with the key and the mend.
    """
    return recipe_of(_read_yaml(name_or_path), overrides, f"recipe {name_or_path}")


def recipe_of(fields: dict[str, Any], overrides: list[str] | None, where: str) -> Recipe:
    """The recipe of the fields of a file, or of a checkpoint that keeps its run's. RecipeError begins with `where`."""
    for override in overrides or []:
        _apply_override(fields, override)
    _check_reach(fields, overrides or [], where)
    try:
        return Recipe.model_validate(_with_shared_training(fields, where))
    except ValidationError as error:
        raise RecipeError(f"{where}: {_first_problem(error, fields)}") from None


def _check_reach(fields: dict[str, Any], overrides: list[str], where: str) -> None:
    """An override of `training:` that every phase's own value stands before would change nothing, in silence."""
    phases = [fields.get("pretrain"), *(fields["finetune"] if isinstance(fields.get("finetune"), list) else [])]
    for override in overrides:
        section, _, key = override.partition("=")[0].partition(".")
        if section == SHARED and all(isinstance(phase, dict) and key.partition(".")[0] in phase for phase in phases):
            raise RecipeError(
                f"{where}: {SHARED}.{key} reaches no phase, since each has its own; set pretrain.{key}, finetune.0.{key}"
            )


def _with_shared_training(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields with what `training:` says in every phase that does not say otherwise. A phase's own key replaces it whole."""
    shared = fields.get(SHARED, {})
    if not isinstance(shared, dict):
        raise RecipeError(f"{where}: {SHARED}: give it as keys of a phase and their values")
    if unknown := next((key for key in shared if key not in Training.model_fields), None):
        raise RecipeError(
            f"{where}: unknown key {SHARED}.{shortened(unknown, KEY_CHARS)}{_nearest(unknown, _valid_keys((SHARED,)))}"
        )
    whole = {key: value for key, value in fields.items() if key != SHARED}
    if isinstance(whole.get("pretrain", {}), dict) and shared:
        whole["pretrain"] = shared | whole.get("pretrain", {})
    if isinstance(whole.get("finetune"), list):
        whole["finetune"] = [shared | phase if isinstance(phase, dict) else phase for phase in whole["finetune"]]
    return whole


def _as_written(location: tuple[Any, ...], fields: dict[str, Any]) -> tuple[Any, ...]:
    """The place of a value in the file: below `training:` where its phase has it from there."""
    match location:
        case ("pretrain", key, *_):
            phase, inside = fields.get("pretrain", {}), location[1:]
        case ("finetune", int(number), key, *_):
            phase, inside = fields["finetune"][number], location[2:]
        case _:
            return location
    return (SHARED, *inside) if key not in phase and key in fields.get(SHARED, {}) else location


def _read_yaml(name_or_path: str) -> dict[str, Any]:
    text = _read_file(name_or_path) if name_or_path.endswith(RECIPE_ENDINGS) else _read_shipped(name_or_path)
    try:
        fields = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"recipe {name_or_path}: not YAML: {_yaml_problem(error)}") from None
    if not isinstance(fields, dict):
        raise RecipeError(f"recipe {name_or_path}: a recipe is a mapping of sections, this file is not")
    text_section = fields.get("text")
    if isinstance(text_section, dict) and None in text_section:
        text_section["null"] = text_section.pop(None)  # YAML reads the bare key `null:` as nothing
    return fields


def _read_file(path: str) -> str:
    try:
        if "\0" in path or not Path(path).is_file():
            raise RecipeError(f"recipe {path}: no such file; shipped: {', '.join(shipped_recipes())}")
        if Path(path).stat().st_size > LARGEST_BYTES:
            raise RecipeError(
                f"recipe {path}: larger than {LARGEST_BYTES:,} bytes, so it is no recipe; name another file"
            )
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise RecipeError(f"recipe {path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"recipe {path}: cannot be read ({error.strerror or error})") from None


def _read_shipped(name: str) -> str:
    if name not in shipped_recipes():
        beside = [f"{name}{ending}" for ending in RECIPE_ENDINGS if _is_file(f"{name}{ending}")]
        meant = f"; for the file write {beside[0]}" if beside else _meant(name, shipped_recipes())
        raise RecipeError(
            f"recipe {shortened(name, KEY_CHARS)!r}: no recipe of that name{meant};"
            f" shipped: {', '.join(shipped_recipes())}; or give a path that ends in .yaml"
        )
    return (resources.files("infra") / "recipes" / f"{name}.yaml").read_text(encoding="utf-8")


def _is_file(path: str) -> bool:
    """False also for what can be no path, as one with a NUL or a name of 5,000 letters."""
    try:
        return Path(path).is_file()
    except (OSError, ValueError):
        return False


def _yaml_problem(error: yaml.YAMLError) -> str:
    """Where the problem is and what, in one line."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
        return f"line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())


def _apply_override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    shown = repr(shortened(override, KEY_CHARS))
    *sections, last = key.split(".")
    if not equals or not all((*sections, last)):
        raise RecipeError(f"override {shown}: write it as section.key=value{NO_SPACES}")
    target: dict | list = fields
    for section in sections:
        at = _place(target, section, shown)
        inside = target[at] if isinstance(target, list) else target.get(at)
        if not isinstance(inside, dict | list):  # absent, or a value, whose place validation then names
            target[at] = inside = {}
        target = inside
    try:
        target[_place(target, last, shown)] = parse_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"override {shown}: the value is not YAML ({_yaml_problem(error)}); put it in quotes{NO_SPACES}"
        ) from None


def _place(target: dict | list, part: str, shown: str) -> str | int:
    """The key, or the position in a list, that a part of an override's key names."""
    if isinstance(target, dict):
        return part
    if part.isdecimal() and part.isascii() and len(part) < 9 and int(part) < len(target):
        return int(part)
    there = f"not one of the positions 0 to {len(target) - 1}" if target else "no position of a list that has none"
    raise RecipeError(f"override {shown}: {shortened(part, KEY_CHARS)!r} is {there}")


def _first_problem(error: ValidationError, fields: dict[str, Any]) -> str:
    """The first of pydantic's findings as one line: the key, what is wrong, the nearest valid key.

    Unknown keys come first, and then nothing is said to be missing: it may be what a misspelt key was meant to be.
    """
    problems = error.errors()
    unknown = [problem for problem in problems if problem["type"] == "extra_forbidden"]
    if unknown:
        problems = unknown + [problem for problem in problems if problem["type"] not in ("extra_forbidden", "missing")]
    problem = problems[0]
    key = shortened(".".join(str(part) for part in _as_written(problem["loc"], fields)), KEY_CHARS)
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    if problem["type"] == "extra_forbidden":
        siblings = _valid_keys(problem["loc"][:-1])
        return f"unknown key {key}{_nearest(str(problem['loc'][-1]), siblings)}{more}"
    if problem["type"] == "missing":
        return f"{key} is missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    plain = isinstance(problem["input"], str | int | float | bool)
    shown = f" (it is {shortened(repr(problem['input']), VALUE_CHARS)})" if plain else ""
    return f"{key + ': ' if key else ''}{message}{shown}{more}"


def _valid_keys(location: tuple[Any, ...]) -> list[str]:
    if location[:1] == (SHARED,):
        return list(Training.model_fields)
    model: Any = Recipe
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        candidates = [annotation, *getattr(annotation, "__args__", ())]
        model = next(c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel))
    return [*model.model_fields, *([] if location else [SHARED])]


def _nearest(word: str, known: list[str]) -> str:
    return _meant(word, known) or f"; valid here: {', '.join(known)}"


def _meant(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else ""
