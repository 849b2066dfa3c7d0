"""Recipe files of one's own: found by path or name, never in the place of a shipped one."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources

import pytest

from flows.local.recipes import add_recipe, find_recipe, known_recipes
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


def test_a_name_that_a_later_version_ships_is_that_of_the_shipped_recipe(own, tmp_path):
    """As its deployments have it."""
    add_recipe(own)
    listed = tmp_path / "home" / "recipes.json"
    listed.write_text(json.dumps({"mini": str(own)}))
    assert known_recipes()["mini"] == "mini" and find_recipe("mini") == ("mini", "mini")


def test_a_file_whose_name_is_no_text_is_named_and_not_added(own, tmp_path):
    """Prefect's server takes no such name: once in the list it would stop every later `up`."""
    for path in (tmp_path / "\udcff.yaml", tmp_path / "\udcff" / "mine.yaml"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(own.read_text())
        with pytest.raises(
            RecipeError, match=r"^recipe /.*\\xff.*: its name is not UTF-8, .*; rename it, or its folder$"
        ):
            find_recipe(str(path))
    assert "mine" not in known_recipes()


def test_files_that_are_added_at_once_are_all_added(own, tmp_path):
    names = [f"mine-{number}" for number in range(3)]
    for name in names:
        (tmp_path / f"{name}.yaml").write_text(own.read_text().replace("name: mine", f"name: {name}", 1))
    script = (
        "import sys, time; from pathlib import Path; from flows.local import recipes; added = recipes._added;"
        " recipes._added = lambda: (added(), time.sleep(0.2))[0]; recipes.add_recipe(Path(sys.argv[1]))"
    )
    running = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / f"{name}.yaml")]) for name in names]
    assert [each.wait(120) for each in running] == [0] * len(names)
    assert set(names) <= set(known_recipes())


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"mine": 3}', '{"mine": "/\\udcff.yaml"}'])
def test_a_damaged_list_is_named_with_the_mend(own, tmp_path, damage):
    add_recipe(own)
    (tmp_path / "home" / "recipes.json").write_text(damage)
    for use in (known_recipes, lambda: add_recipe(own), lambda: find_recipe("mini")):
        with pytest.raises(
            RecipeError,
            match="/recipes.json: damaged; delete it and add your recipes again with `.venv/bin/sd3 deploy FILE`$",
        ):
            use()
