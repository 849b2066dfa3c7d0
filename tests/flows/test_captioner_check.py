"""What a pipeline says of its captioner before its first stage."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from vision_language_models import write_llava, write_qwen2_vl

from flows.upstream import Upstream
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.recipe_file import load_recipe

FOLDER = ["data.source=folder", "data.folder=/images"]


def check(store, *overrides: str, stands: bool = False) -> None:
    upstream = Upstream(load_recipe("tiny-test", [*FOLDER, *overrides]), store)
    if stands:
        vars(upstream)["captions"] = SimpleNamespace(digest="0" * 64)
    upstream.check_captioner()


def test_a_package_that_the_model_needs_is_named_before_the_first_stage(tmp_path):
    store = open_store(str(tmp_path / "store"))
    for name, write in (("qwen", write_qwen2_vl), ("llava", write_llava)):
        (tmp_path / name).mkdir()
        write(tmp_path / name)
    model = ["caption.captioner=vision_language_model", f"caption.model={tmp_path / 'qwen'}"]
    with pytest.raises(DataError, match="needs the package torchvision"):
        check(store, *model)
    check(store, *model, stands=True)
    check(store, model[0], f"caption.model={tmp_path / 'llava'}")
    check(store, "caption.captioner=none")


def test_a_key_that_is_not_there_is_named_before_the_first_stage(tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"))
    served = ["caption.captioner=endpoint", "caption.endpoint=http://a/v1", "caption.model=m"]
    keyed = [*served, "caption.api_key_env=CAPTION_KEY"]
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    with pytest.raises(DataError, match=r"caption.api_key_env: \$CAPTION_KEY is empty where the stage runs"):
        check(store, *keyed)
    check(store, *served)
    check(store, *keyed, stands=True)
    check(store, *keyed, "compute.ray_address=ray:6379")  # its nodes may have it
    monkeypatch.setenv("CAPTION_KEY", "sk-1")
    check(store, *keyed)
