"""What becomes of captions that are thrown out: in the stage's words, in the text that is trained on, and when settings change."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from counting_models import DIGESTS, TOWERS, count_models
from PIL import Image

from flows.ui.captions import caption_tables
from flows.upstream import Upstream
from sd3core.captions.repeated import find_repeated
from sd3core.captions.said import Said
from sd3core.data.encoded_shards import ORIGINAL, SYNTHETIC, WITHOUT_CAPTION
from sd3core.data.manifest import ManifestRef, read_manifest
from sd3core.data.shards import read_shard_index, read_table
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from sd3core.specs import MANIFEST
from workers.caption import caption_stage
from workers.encode import encode_stage
from workers.ingest import ingest_stage
from workers.stage import NOTHING_TO_DO

IMAGES, COMMON = 200, 30
REFUSED, LOOPED, NEITHER = 3, 4, 5  # images


@pytest.fixture
def seen(monkeypatch, tmp_path):
    """Image n is grey n: every image below COMMON has the same caption; three are of no use."""
    seen = count_models(monkeypatch, tmp_path)
    special = {
        REFUSED + COMMON: Said("I'm sorry, I can't."),
        LOOPED + COMMON: Said("a cat " * 9, tokens=64, cut_off=True),
        NEITHER + COMMON: Said("", tokens=1),
    }
    common = Said("The image shows a picture.", tokens=6)
    seen.say = lambda colour: common if colour[0] < COMMON else special.get(colour[0], Said(f"shade {colour[0]}", 3))
    return seen


def recipe_of(folder, *overrides: str):
    settings = [
        "data.source=folder", f"data.folder={folder}", "data.name=ruled", "data.rows_per_shard=32", "finetune=[]",
        "caption.captioner=vision_language_model", "caption.model=/model", "caption.max_share=0.1",
    ]  # fmt: skip
    return load_recipe("tiny-test", [*settings, *overrides])


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(IMAGES):
        Image.new("RGB", (32, 32), (number,) * 3).save(folder / f"{number:03d}.png")
        if number != NEITHER + COMMON:
            (folder / f"{number:03d}.txt").write_text(f"number {number}")
    return folder


class Run:
    """The stages up to encode, on what stands."""

    def __init__(self, recipe, store) -> None:
        self.raw = ingest_stage(recipe, store, ignore_progress)
        self.captions = caption_stage(recipe, store, self.raw.manifest, ignore_progress)
        made = encode_stage(recipe, store, self.raw.manifest, self.captions.manifest, TOWERS, ignore_progress)
        self.text = made.parts["text"]
        self.store = store

    def kinds(self) -> dict[str, set[str]]:
        """By key, which captions have features."""
        manifest = read_manifest(self.store, self.text.manifest.folder, self.text.manifest.digest)
        raw = read_manifest(self.store, self.raw.manifest.folder, self.raw.manifest.digest)
        found: dict[str, set[str]] = {}
        for entry in raw.shards:
            index = read_shard_index(self.store, raw.folder, entry.stem, entry.index_digest)
            found |= {key: set() for key in index["key"].to_pylist()}
        for entry in manifest.shards:
            for row in read_shard_index(self.store, manifest.folder, entry.stem, entry.index_digest).to_pylist():
                found[row["key"]].add(row["kind"])
        return found


def upstream_of(recipe, store) -> Upstream:
    """What later stages see. The towers' manifest is of no towers that stand."""
    found = Upstream(recipe, store)
    vars(found)["towers_manifest"] = SimpleNamespace(digests=DIGESTS)
    return found


def taken(seen) -> tuple[int, int]:
    """(images captioned, captions encoded) since the last look."""
    found = seen.captioned, len([text for text in seen.texts if text])
    seen.captioned = 0
    seen.texts.clear()
    return found


def test_a_caption_that_is_thrown_out_leaves_the_original(seen, folder, tmp_path):
    store, recipe = open_store(str(tmp_path / "store")), recipe_of(folder)
    run = Run(recipe, store)
    kinds = sorted(map(sorted, run.kinds().values()))
    both, original = [ORIGINAL, SYNTHETIC], [ORIGINAL]
    assert kinds == sorted([[]] + [original] * (COMMON + 2) + [both] * (IMAGES - COMMON - 3))
    manifest = read_manifest(store, run.text.manifest.folder, run.text.manifest.digest)
    assert manifest.buckets[WITHOUT_CAPTION] == 1 and manifest.buckets["captions on too many images"] == COMMON
    used = "; the original captions are used there"
    assert run.captions.warnings == [
        f"0.5 % of 200 captions thrown out, 1: empty{used}",
        f"0.5 % of 200 captions thrown out, 1: the same words again and again{used}",
        f"0.5 % of 200 captions thrown out, 1: the model refuses{used}",
        "15 % of the images have one of 1 caption that stand on too many images (caption.max_share); those are thrown out"
        + used,
    ]


def test_the_stages_page_shows_rules_lengths_and_captions(seen, folder, tmp_path):
    store, recipe = open_store(str(tmp_path / "store")), recipe_of(folder)
    result = Run(recipe, store).captions
    rules, lengths, captions = caption_tables(recipe, store, result)
    told = {row["synthetic captions"]: (row["images"], row["share"]) for row in rules}
    assert told == {
        "kept": ("197", "98.50%"),
        "thrown out: empty": ("1", "0.50%"),
        "thrown out: the same words again and again": ("1", "0.50%"),
        "thrown out: the model refuses": ("1", "0.50%"),
        "of the kept, thrown out: on too many images": ("30", "15.00%"),
    }
    examples = {row["synthetic captions"]: row["example"] for row in rules}
    assert examples["thrown out: the model refuses"].endswith(""": "I'm sorry, I can't.\"""")
    assert examples["of the kept, thrown out: on too many images"] == "15.00% of the images: The image shows a picture."
    assert lengths == [{"length of what is kept": "1-7", "captions by words": 197, "by tokens": 197}]
    assert len(captions) == 8 and all(
        row["synthetic caption"] and row["by"] == "/model 000000000000" for row in captions
    )


def test_another_share_asks_no_model_and_encodes_what_comes_back(seen, folder, tmp_path):
    store = open_store(str(tmp_path / "store"))
    Run(recipe_of(folder), store)
    assert taken(seen)[0] == IMAGES
    lax = recipe_of(folder, "caption.max_share=0.2")
    with pytest.raises(DataError, match="encode is not finished"):
        _ = upstream_of(lax, store).text  # nobody has counted by this share
    run = Run(lax, store)
    captioned, texts = taken(seen)
    shards = read_manifest(store, run.text.manifest.folder, run.text.manifest.digest).shards
    # the caption that is used again is encoded once for each shard that has it
    assert captioned == 0 and 1 <= texts <= len(shards) and run.captions.reason == NOTHING_TO_DO
    assert sum(SYNTHETIC in kinds for kinds in run.kinds().values()) == IMAGES - 3
    assert run.text.digest == upstream_of(lax, store).text.digest
    with pytest.raises(DataError, match="encode: what it made leaves out other captions than caption.max_share"):
        _ = upstream_of(recipe_of(folder), store).text
    again = Run(recipe_of(folder), store)
    assert taken(seen) == (0, 0) and again.text.digest == upstream_of(recipe_of(folder), store).text.digest


def test_a_process_that_dies_before_the_count_is_written_costs_the_count(seen, folder, tmp_path):
    store, recipe = open_store(str(tmp_path / "store")), recipe_of(folder)
    first = Run(recipe, store)
    taken(seen)
    for entry in list(store.list(first.captions.manifest.folder)):
        if "REPEATED" in entry.path:
            store.delete(entry.path)
    again = Run(recipe, store)
    assert taken(seen) == (0, 0)
    assert again.captions.reason == again.text.reason == NOTHING_TO_DO and again.text.digest == first.text.digest
    assert again.captions.warnings == first.captions.warnings


def test_one_image_more_makes_its_shard_alone_again(seen, folder, tmp_path):
    """The captions that are thrown out are the same, though they are counted anew."""
    store, recipe = open_store(str(tmp_path / "store")), recipe_of(folder)
    first = Run(recipe, store)
    taken(seen)
    Image.new("RGB", (32, 32), (250,) * 3).save(folder / "new.png")
    (folder / "new.txt").write_text("new")
    again = Run(recipe, store)
    assert taken(seen) == (1, 2)
    old, new = (
        {entry.stem for entry in read_manifest(store, run.text.manifest.folder, run.text.manifest.digest).shards}
        for run in (first, again)
    )
    assert len(new - old) <= 2
    found = find_repeated(store, again.captions.manifest, 0.1)
    assert (found.images, [one.images for one in found.captions.values()]) == (IMAGES + 1, [COMMON])


def test_without_a_share_that_throws_out_nothing_of_it_stands_anywhere(seen, folder, tmp_path):
    """Text of captions that no rule concerns is what it was before there were rules."""
    store, recipe = open_store(str(tmp_path / "store")), recipe_of(folder, "caption.max_share=1")
    run = Run(recipe, store)
    manifest = read_manifest(store, run.text.manifest.folder, run.text.manifest.digest)
    assert manifest.inputs.keys() == {"raw", "captions"} and "captions on too many images" not in manifest.buckets
    assert not [entry for entry in store.list("datasets") if "REPEATED" in entry.path]
    table = read_table(store, run.captions.manifest.folder, _first_stem(store, run.captions.manifest))
    assert table.column_names[:9] == ["key", "caption", "model", "prompt", "revision", "seed", "tokens", "rule", "said"]
    assert store.exists(f"{run.captions.manifest.folder}/{MANIFEST}")


def _first_stem(store, ref: ManifestRef) -> str:
    return read_manifest(store, ref.folder, ref.digest).shards[0].stem
