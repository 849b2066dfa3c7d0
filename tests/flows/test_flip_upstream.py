"""What stands of latents with flips: they follow from the captions too, so they are behind where those are made again."""

from __future__ import annotations

import pytest

from flows.standing import standing_parts
from flows.upstream import Upstream
from sd3core.data.manifest import Manifest, commit_manifest, read_manifest
from sd3core.data.store import FileStore
from sd3core.errors import DataError
from sd3core.recipe_file import load_recipe
from sd3core.specs import fingerprint, latents_fields, latents_folder
from workers.stage import remember_stage


@pytest.fixture
def store(tmp_path, write_records):
    store = FileStore(tmp_path)
    write_records(store)
    return store


def make_latents(store, recipe, captions: str) -> str:
    """What the encode stage leaves of pretraining's latents, made by these captions."""
    upstream = Upstream(recipe, store)
    digests = upstream.towers_manifest.digests
    fields, folder = (make(recipe, recipe.pretrain, digests) for make in (latents_fields, latents_folder))
    plain = Upstream(load_recipe("tiny-test"), store).latents("pretrain")
    made = read_manifest(store, plain.folder, plain.digest).model_dump()
    made |= {"spec": fingerprint(fields), "fields": fields, "folder": folder}
    made["inputs"] = {"raw": upstream.raw.digest, "captions": captions}
    ref = commit_manifest(store, folder, Manifest.model_validate(made))
    remember_stage(store, recipe.run, "latents.pretrain", folder, ref.digest, fields)
    return ref.digest


def test_they_stand_by_their_captions_and_are_behind_others(store, rise):
    rise()
    recipe = load_recipe("tiny-test", ["encode.flip=true"])
    with pytest.raises(DataError, match="encode is not finished"):
        Upstream(recipe, store).latents("pretrain")
    captions = Upstream(recipe, store).captions.digest
    digest = make_latents(store, recipe, captions)
    assert Upstream(recipe, store).latents("pretrain").digest == digest
    parts = {part.name: part.status for part in standing_parts(recipe, store)}
    assert (parts["latents.pretrain"], parts["latents.finetune.0"], parts["pretrain"]) == ("stands", "other", "other")
    make_latents(store, recipe, "0" * 64)
    with pytest.raises(DataError, match="encode: what it made is older than captions"):
        Upstream(recipe, store).latents("pretrain")


def test_without_flips_captions_are_no_concern_of_latents(store, rise):
    rise()
    recipe = load_recipe("tiny-test")
    fields = latents_fields(recipe, recipe.pretrain, {"vae": "0"})
    assert not {"flip", "captions"} & fields.keys()
    assert Upstream(recipe, store).latents("pretrain")
