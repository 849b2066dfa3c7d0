"""What stands of a run whose data another run has made again, of a recipe whose captioner is elsewhere, and what asking costs."""

from __future__ import annotations

import pytest
from counting_store import CountingStore

from flows.standing import standing_parts
from flows.upgrade import RemakeNeeded, check_upgrade
from sd3core import specs
from sd3core.data.manifest import Manifest, commit_manifest, read_manifest
from sd3core.data.store import FileStore
from sd3core.recipe_file import load_recipe
from sd3core.specs import fingerprint
from sd3core.towers.artifact import TowersManifest, read_towers
from workers.stage import remember_stage

DATA = ["ingest", "towers", "caption", "text", "latents.pretrain", "latents.finetune.0"]
ABSENT = ("caption.captioner=vision_language_model", "caption.model=/no/such/captioner")


@pytest.fixture
def store(tmp_path, write_records):
    store = FileStore(tmp_path)
    write_records(store)
    return store


def recipe(*overrides: str):
    return load_recipe("tiny-test", list(overrides))


def make_again(store, recipe, times: int = 1) -> None:
    """What another run leaves that has had the data made again where a format rose, or grown: `times` as many shards."""
    notes = {name: store.get_json(f"runs/tiny-test/stages/{name}.json") for name in DATA}

    def data(name: str, folder: str, fields, **inputs: str) -> str:
        old = read_manifest(store, notes[name]["folder"], notes[name]["digest"])
        if (old.folder, old.inputs, times) == (folder, inputs, 1):
            return old.digest
        made = old.model_dump() | {"spec": fingerprint(fields), "fields": fields, "folder": folder, "inputs": inputs}
        made["shards"] = [entry | {"rows": entry["rows"] + 1} for entry in made["shards"]] * times
        return commit_manifest(store, folder, Manifest.model_validate(made)).digest

    raw = data("ingest", specs.raw_folder(recipe), specs.raw_fields(recipe))
    old = read_towers(store, notes["towers"]["folder"])
    folder, fields = specs.towers_folder(recipe), specs.towers_fields(recipe)
    digests = old.digests
    if folder != old.folder:
        digests = {name: fingerprint([digest]) for name, digest in digests.items()}
        towers = {name: entry.model_copy(update={"digest": digests[name]}) for name, entry in old.towers.items()}
        made = TowersManifest(spec=fingerprint(fields), fields=fields, folder=folder, towers=towers)
        for name in ("MANIFEST", f"MANIFEST.{made.digest[:12]}"):
            store.put(f"{folder}/{name}.json", made.to_bytes())
    captions = data("caption", specs.captions_folder(recipe), specs.captions_fields(recipe), raw=raw)
    text = specs.text_folder(recipe, digests), specs.text_fields(recipe, digests)
    data("text", *text, raw=raw, captions=captions)
    for key, phase in recipe.phases():
        latents = specs.latents_folder(recipe, phase, digests), specs.latents_fields(recipe, phase, digests)
        data(f"latents.{key}", *latents, raw=raw)


def note_today(store, recipe) -> None:
    """The notes of a run that has used the data as they stand today."""
    digests = read_towers(store, specs.towers_folder(recipe)).digests
    made = {
        "ingest": specs.raw_fields(recipe),
        "caption": specs.captions_fields(recipe),
        "text": specs.text_fields(recipe, digests),
        **{f"latents.{key}": specs.latents_fields(recipe, phase, digests) for key, phase in recipe.phases()},
    }
    kinds = {"ingest": "raw", "caption": "captions", "text": "text"}
    for name, fields in made.items():
        folder = f"datasets/{recipe.data.name}/{kinds.get(name, 'latents')}/{fingerprint(fields)}"
        remember_stage(store, recipe.run, name, folder, read_manifest(store, folder).digest, fields)


@pytest.mark.parametrize("kind", ["raw", "towers", "captions", "text", "latents"])
@pytest.mark.parametrize("noted", [False, True])
def test_training_is_asked_about_though_another_run_has_had_the_data_made_again(store, rise, kind, noted):
    rise(kind, "train")
    make_again(store, recipe())
    if noted:  # this run too, its encode stage alone
        note_today(store, recipe())
    parts = {part.name: part for part in standing_parts(recipe(), store)}
    assert [name for name in DATA if parts[name].status != "stands"] == []
    assert parts["pretrain"].status == parts["finetune.0"].status == "upgrade"
    number = {"raw": 3}.get(kind, 1)
    assert parts["pretrain"].changes == (f"{kind} format {number} -> {number + 5}", "train format 1 -> 6")
    with pytest.raises(RemakeNeeded, match=f"{kind} format"):
        check_upgrade(recipe(), store, remake=False)
    other = {part.name: part.status for part in standing_parts(recipe("pretrain.learning_rate=0.01"), store)}
    assert other["pretrain"] == "other"


def test_a_users_growth_of_the_data_is_not_taken_for_a_version(store, rise):
    rise()
    make_again(store, recipe(), times=2)
    note_today(store, recipe())
    assert {part.name: part.status for part in standing_parts(recipe(), store)}["pretrain"] == "other"


def test_without_its_captioner_only_what_needs_it_is_not_known(store, rise):
    rise("train")
    statuses = {part.name: part.status for part in standing_parts(recipe(*ABSENT), store)}
    assert [name for name, status in statuses.items() if status == "stands"] == [
        "ingest",
        "towers",
        *DATA[-2:],
        "export",
    ]
    assert [part.name for part in standing_parts(recipe(*ABSENT), store, up_to="ingest")] == ["ingest"]


@pytest.mark.parametrize("kind", ["raw", "captions"])
def test_without_a_captioner_no_captions_are_spoken_of_and_their_version_still_counts(store, rise, kind):
    bare = recipe("caption.captioner=none")
    rise()
    note = store.get_json("runs/tiny-test/stages/text.json")
    fields = note["fields"] | {"captions": fingerprint(specs.captions_fields(bare))}
    raw = store.get_json("runs/tiny-test/stages/ingest.json")["digest"]
    old = read_manifest(store, note["folder"], note["digest"]).model_dump()
    folder = f"datasets/tiny-world/text/{fingerprint(fields)}"
    old |= {"fields": fields, "spec": fingerprint(fields), "folder": folder, "inputs": {"raw": raw}}
    commit_manifest(store, folder, Manifest.model_validate(old))
    assert "caption" not in [part.name for part in standing_parts(bare, store)]
    assert {part.name: part.status for part in standing_parts(bare, store)}["text"] == "stands"
    rise(kind)
    parts = {part.name: part for part in standing_parts(bare, store)}
    assert parts["text"].status == "upgrade" and f"{kind} format" in " ".join(parts["text"].changes)
    assert "caption" not in parts
    with pytest.raises(RemakeNeeded) as stopped:
        check_upgrade(bare, store, remake=False)
    assert "caption," not in str(stopped.value) and "caption;" not in str(stopped.value)


def test_asking_of_a_large_data_set_for_which_there_is_nothing_to_do_costs_little(store, rise, train_today, tmp_path):
    """5,000 shards of each kind: the heads of their manifests are read, once each, and nothing of another spec."""
    make_again(store, recipe(), times=1_700)
    note_today(store, recipe())
    train_today(recipe(), store)
    counting = CountingStore(tmp_path)
    assert [part.status for part in standing_parts(recipe(), counting)][:8] == ["stands"] * 8
    manifests = [path for path in counting.whole if path.startswith("datasets/")]
    assert manifests == []
    assert counting.asked["list"] == 2 and counting.asked["folders"] == 3, counting.asked
    assert counting.asked["get_range"] == 5 and counting.asked.total() <= 40, counting.asked
    sizes = sum(path.stat().st_size for path in tmp_path.glob("datasets/*/*/*/MANIFEST.json"))
    assert counting.bytes < 500_000 < sizes / 10, (counting.bytes, sizes)
