"""Finds recipes by name: the shipped ones, and files that were added.

`sd3 deploy` and `sd3 demo --recipe FILE` add one.
"""

from __future__ import annotations

import json
from pathlib import Path

from flows.local.home import ensure, home, local_command, one_at_a_time, write_whole
from sd3core.errors import RecipeError
from sd3core.recipe import Recipe
from sd3core.recipe_file import RECIPE_ENDINGS, load_recipe, shipped_recipes
from sd3core.shown_text import is_utf8

DEFAULT_RECIPE = "mini"


def known_recipes() -> dict[str, str]:
    """Name -> what load_recipe takes."""
    return {**_added(), **{name: name for name in shipped_recipes()}}


def add_recipe(path: Path) -> Recipe:
    """Takes a recipe file in under the name that it gives itself. RecipeError if a shipped recipe has that name, or the file one
    that Prefect's server does not take.
    """
    recipe, whole = load_recipe(str(path)), str(path.resolve())
    if not is_utf8(whole):
        raise RecipeError(
            f"recipe {whole}: its name is not UTF-8, which Prefect's server wants; rename it, or its folder"
        )
    if recipe.name in shipped_recipes():
        raise RecipeError(
            f"recipe {path}: the name {recipe.name!r} is that of a shipped recipe; give it another `name:`"
        )
    with one_at_a_time("recipes", lambda line: None):  # for a moment: nobody need hear of it
        write_whole(ensure(home()) / "recipes.json", json.dumps({**_added(), recipe.name: whole}, indent=1))
    return recipe


def find_recipe(name_or_path: str) -> tuple[str, str]:
    """(deployment name, what load_recipe takes). A file is added first, so that it has deployments."""
    if name_or_path.endswith(RECIPE_ENDINGS):
        return add_recipe(Path(name_or_path)).name, str(Path(name_or_path).resolve())
    return name_or_path, known_recipes().get(name_or_path, name_or_path)


def _added() -> dict[str, str]:
    """The recipes whose file is named in recipes.json. RecipeError where that is damaged: it cannot be made again from anything."""
    path = home() / "recipes.json"
    try:
        added = json.loads(path.read_text(errors="replace"))
    except FileNotFoundError:
        return {}
    except ValueError:
        added = None
    if not (isinstance(added, dict) and all(isinstance(value, str) and is_utf8(value) for value in added.values())):
        raise RecipeError(
            f"{path}: damaged; delete it and add your recipes again with `{local_command('sd3 deploy')} FILE`"
        )
    return added
