"""Prefect's database lies in this home, whatever stands in its name."""

from __future__ import annotations

import pytest
from sqlalchemy.engine import make_url

from flows.local.home import home, run_store
from flows.local.prefect_environment import database_url, server_settings
from sd3core.recipe_file import load_recipe


@pytest.mark.parametrize("name", ["plain", "a b", "a%20b é", "#", "a?b=c&d", "😀", "100%"])
def test_store_and_database_lie_in_the_home(tmp_path, monkeypatch, name):
    monkeypatch.setenv("SD3_HOME", str(tmp_path / name))
    assert server_settings(4200)["PREFECT_SERVER_DATABASE_CONNECTION_URL"] == database_url()
    assert make_url(database_url()).database == str(tmp_path / name / "prefect" / "prefect.db")
    assert not make_url(database_url()).query
    store = run_store(load_recipe("tiny-test"))
    assert store.local_path("x") == home() / "store" / "x" == tmp_path / name / "store" / "x"
