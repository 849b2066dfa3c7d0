"""The recipe's caption section: what it refuses, and what stands in a fingerprint."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sd3core import specs
from sd3core.errors import RecipeError
from sd3core.format_changes import format_changes
from sd3core.recipe_file import load_recipe
from sd3core.specs import captions_fields, fingerprint

README = Path(specs.__file__).parent / "captions" / "README.md"
FOLDER = ["data.source=folder", "data.folder=/images"]
MODEL = [*FOLDER, "caption.captioner=vision_language_model", "caption.model=/model"]
SERVED = [*FOLDER, "caption.captioner=endpoint", "caption.endpoint=http://a:8000/v1", "caption.model=m"]


@pytest.fixture(autouse=True)
def any_model(monkeypatch):
    monkeypatch.setattr(specs, "model_identity", lambda *_: "0" * 12)


@pytest.mark.parametrize(
    "override, said",
    [
        ("caption.endpoint=null", "endpoint must name the server, as http://host:8000/v1"),
        ("caption.model=null", "model must be the model's name at the endpoint"),
        ("caption.endpoint=a:8000/v1", "a:8000/v1 is no http:// or https:// address"),
        ("caption.endpoint=ftp://a/v1", "ftp://a/v1 is no http:// or https:// address"),
        ("caption.endpoint=http://a:port/v1", "endpoint is no URL"),
        ("caption.endpoint=http://a/v1?x=1", "endpoint has more after its path"),
        (
            "caption.endpoint=http://a/v1/chat/completions",
            "names one of the server's calls; give the server's address as",
        ),
        (
            "caption.retry_s=500",
            "compute.stall_timeout_s 600 is not more than caption.retry_s 500 and twice caption.request_timeout_s",
        ),
        ("caption.request_timeout_s=200", "caption.retry_s 300 and twice caption.request_timeout_s 200 together"),
        ("caption.requests_in_flight=1", "requests_in_flight 1 is less than the 2 actors that share them"),
        ("caption.temperature=3", "caption.temperature: Input should be less than or equal to 2"),
        ("caption.max_share=0", "caption.max_share: Input should be greater than 0"),
        ("caption.captioner=none", "endpoint is for captioner 'endpoint'; leave it out"),
        ("caption.endpont=x", "unknown key caption.endpont; did you mean 'endpoint'?"),
    ],
)
def test_what_cannot_be_is_one_line(override, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny-test", [*SERVED, override])
    assert said in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("override", ["caption.api_key_env=sk-se3ret", "caption.endpoint=http://me:sk-se3ret@a/v1"])
def test_a_key_in_a_recipe_is_refused_and_not_said_again(override):
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny-test", [*SERVED, override])
    assert "se3ret" not in str(refused.value) and "api_key_env" in str(refused.value)


def spec(*overrides: str) -> str:
    return fingerprint(captions_fields(load_recipe("tiny-test", list(overrides))))


def test_captions_of_the_drawn_world_and_of_none_have_the_fingerprints_that_they_had():
    """Golden, of the version before there were rules."""
    drawn, none = spec(), spec(*FOLDER, "caption.captioner=none")
    assert (drawn, none) == ("b99450bf3824", "a58672ad37df")
    assert drawn == spec("caption.max_share=0.5", "caption.image_side_px=64", "caption.temperature=1", "caption.seed=3")


def test_what_changes_a_models_words_is_in_their_fingerprint_and_nothing_else_is():
    usual = spec(*SERVED)
    for same in (
        ["caption.endpoint=http://b:1/v1"],  # it may move
        ["caption.batch=1", "caption.precision=bf16", "caption.max_share=0.5", "caption.requests_in_flight=9"],
        ["caption.retry_s=1", "caption.request_timeout_s=1", "caption.api_key_env=KEY"],
        ["caption.seed=3"],  # nothing is drawn
    ):
        assert spec(*SERVED, *same) == usual, same
    others = [
        ["caption.model=n"], ["caption.revision=v2"], ["caption.prompt=What?"], ["caption.max_new_tokens=9"],
        ["caption.image_side_px=512"], ["caption.temperature=0.5"], ["caption.temperature=0.5", "caption.seed=3"],
    ]  # fmt: skip
    assert len({usual, *(spec(*SERVED, *other) for other in others)}) == 1 + len(others)
    assert spec(*MODEL, "caption.precision=bf16") != spec(*MODEL)


def test_a_models_captions_of_before_the_rules_are_told_to_be_of_another_version():
    now = captions_fields(load_recipe("tiny-test", MODEL))
    before = {key: value for key, value in now.items() if key != "rules"}
    before["caption"] = {key: value for key, value in now["caption"].items() if key != "image_side_px"}
    assert format_changes(before, now) == ["rules 1 -> 2"]


def test_the_readmes_settings_are_valid():
    blocks = re.findall(r"```yaml\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        for section, keys in yaml.safe_load(block).items():
            assert keys, section
        given = yaml.safe_load(block)
        overrides = [f"{section}.{key}={value!r}" for section, keys in given.items() for key, value in keys.items()]
        loaded = load_recipe("sd3-2b", overrides)
        assert loaded.caption.by_model
