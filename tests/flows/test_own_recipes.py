"""Recipe files of one's own: found by path or name, never in the place of a shipped one."""

from __future__ import annotations

from importlib import resources

import pytest

from flows.recipes import add_recipe, find_recipe, known_recipes
from sd3core.errors import RecipeError


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    text = (resources.files("infra") / "recipes" / "tiny-test.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("name: tiny-test", "name: mine", 1))
    return path


def test_a_file_is_deployed_under_its_own_name(own):
    assert find_recipe(str(own)) == ("mine", str(own))
    assert known_recipes()["mine"] == str(own)
    assert find_recipe("mine") == ("mine", str(own))


def test_a_shipped_name_is_not_taken(own):
    own.write_text(own.read_text().replace("name: mine", "name: mini", 1))
    with pytest.raises(RecipeError, match="the name 'mini' is that of a shipped recipe"):
        add_recipe(own)
    assert known_recipes()["mini"] == "mini"


def test_a_shipped_recipe_is_itself(own):
    assert find_recipe("mini") == ("mini", "mini")


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"mine": 3}'])
def test_a_damaged_list_is_named_with_the_mend(own, tmp_path, damage):
    add_recipe(own)
    (tmp_path / "home" / "recipes.json").write_text(damage)
    for use in (known_recipes, lambda: add_recipe(own), lambda: find_recipe("mini")):
        with pytest.raises(RecipeError, match="/recipes.json: damaged; delete it and add your recipes again with `.venv/bin/sd3 deploy FILE`$"):
            use()
