"""Captions by a server that is a process of its own, asked by actors of a real Ray."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import ray
from chat_server import MODEL, ChatServer
from PIL import Image

from sd3core.data.manifest import read_manifest
from sd3core.data.shards import finished_stems, read_table
from sd3core.data.store import open_store
from sd3core.progress import ignore_progress
from sd3core.recipe_file import load_recipe
from sd3core.specs import captions_folder
from workers.caption import caption_stage
from workers.ingest import ingest_stage
from workers.pool import PoolFailed

pytestmark = pytest.mark.slow
IMAGES = 96
KEY = "sk-only-in-the-drivers-environment"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number in range(IMAGES):
        Image.new("RGB", (64, 48), (2 * number,) * 3).save(folder / f"{number:03d}.png")
        (folder / f"{number:03d}.txt").write_text(f"number {number}")
    return folder


def recipe_of(images: Path, url: str, *overrides: str):
    settings = [
        "data.source=folder", f"data.folder={images}", "data.name=served", "data.rows_per_shard=8",
        "caption.captioner=endpoint", f"caption.endpoint={url}", f"caption.model={MODEL}", "caption.image_side_px=32",
        "caption.requests_in_flight=6", "caption.retry_s=1", "compute.actors=2", "compute.object_store_mb=80",
    ]  # fmt: skip
    return load_recipe("tiny-test", [*settings, *overrides])


def captioned(recipe, store, report=ignore_progress):
    raw = ingest_stage(recipe, store, ignore_progress)
    return caption_stage(recipe, store, raw.manifest, report)


def rows_of(store, result) -> dict[str, dict]:
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    tables = [read_table(store, manifest.folder, entry.stem, entry.digest) for entry in manifest.shards]
    return {row["key"]: row for table in tables for row in table.to_pylist()}


def test_a_key_reaches_the_workers_and_is_stored_nowhere(local_ray, images, tmp_path, monkeypatch):
    """Ray was started without it, so the actors' environment has it not."""
    monkeypatch.setenv("CAPTION_KEY", KEY)
    store = open_store(str(tmp_path / "store"))
    with ChatServer() as server:
        server.tell(key=KEY, delay_s=0.05)
        result = captioned(
            recipe_of(images, server.url, "caption.api_key_env=CAPTION_KEY", "caption.revision=v1"), store
        )
        seen = server.seen()
        assert {asked["authorization"] for asked in seen["asked"]} == {f"Bearer {KEY}"}
        assert len(seen["asked"]) == IMAGES and 1 < seen["most_at_once"] <= 6
        assert {tuple(asked["size"]) for asked in seen["asked"]} == {(32, 24)}
        server.tell(key="another")
        with pytest.raises(PoolFailed, match=r"refuses the key \(401.*provided: \$CAPTION_KEY") as said:
            captioned(recipe_of(images, server.url, "caption.api_key_env=CAPTION_KEY", "caption.prompt=Other."), store)
    rows = rows_of(store, result)
    assert len(rows) == IMAGES and all(row["caption"].startswith("a picture of shade ") for row in rows.values())
    assert {(row["model"], row["revision"], row["tokens"]) for row in rows.values()} == {(MODEL, "v1", 5)}
    folders = [tmp_path, Path(ray._private.worker._global_node.get_session_dir_path())]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 50 and not [path for path in files if KEY.encode() in path.read_bytes()]
    assert KEY not in str(said.value)


def test_a_key_that_is_not_there_is_named_before_anything_is_asked(local_ray, images, tmp_path, monkeypatch):
    monkeypatch.delenv("CAPTION_KEY", raising=False)
    store = open_store(str(tmp_path / "store"))
    with ChatServer() as server:
        with pytest.raises(
            PoolFailed, match=r"caption.api_key_env: \$CAPTION_KEY is empty where the stage runs; export it"
        ):
            captioned(recipe_of(images, server.url, "caption.api_key_env=CAPTION_KEY"), store)
        assert not server.asked


def test_a_server_that_goes_stops_the_stage_and_the_same_command_goes_on(local_ray, images, tmp_path):
    store = open_store(str(tmp_path / "store"))
    with ChatServer() as server:
        server.tell(delay_s=0.3)
        recipe = recipe_of(images, server.url)
        folder = captions_folder(recipe)

        killed: list[float] = []

        def kill_in_the_middle() -> None:
            while len(finished_stems(store, folder)) < 3:
                time.sleep(0.05)
            server.kill()
            killed.append(time.monotonic())

        killer = threading.Thread(target=kill_in_the_middle)
        killer.start()
        with pytest.raises(PoolFailed) as said:
            captioned(recipe, store)
        killer.join()
        stood = finished_stems(store, folder)
        line = str(said.value)
        assert line.startswith(f"caption.endpoint {server.url}: ") and "\n" not in line
        assert time.monotonic() - killed[0] < 60, "caption.retry_s is 1"
        assert "what is captioned stays, and the same command goes on" in line
        assert 3 <= len(stood) < IMAGES / 8
        with ChatServer(server.port) as again:
            result = captioned(recipe, store)
            asked = len(again.asked)
    assert finished_stems(store, folder).items() >= stood.items(), "none is written again"
    captioned_before = sum(read_table(store, folder, stem).num_rows for stem in stood)
    assert asked == IMAGES - captioned_before and result.rows == IMAGES
    assert result.done_before == len(stood)


def test_answers_of_every_kind_become_captions_rules_and_reasons(local_ray, images, tmp_path):
    """By the grey of the image: a refusal, an empty answer, one cut off, one that says "!!!!", an error, and 429 now and then."""
    store = open_store(str(tmp_path / "store"))
    faults = {
        0: "refusal",
        2: "empty",
        4: "length",
        6: "say:!!!!!!!!",
        8: "status:400",
        10: "status:500*",
        12: "filtered",
        14: "say:a cat a cat a cat a cat a cat a cat",
        16: "say:\ud800\ud800",  # half characters, which no file can hold
        18: "say:a \ud800cat",
    }
    with ChatServer() as server:
        server.tell(shades={str(shade): [fault] for shade, fault in faults.items()}, every=["status:429,0.2"] * 5)
        result = captioned(recipe_of(images, server.url, "caption.retry_s=30"), store)
    by_rule: dict[str, int] = {}
    rows = rows_of(store, result)
    for row in rows.values():
        by_rule[row["rule"]] = by_rule.get(row["rule"], 0) + 1
    assert by_rule == {"": IMAGES - 8, "refusing": 2, "empty": 2, "one_character": 1, "looping": 1}
    assert {row["said"] for row in rows.values() if row["rule"] == "empty"} == {"", "\\ud800\\ud800"}
    assert "a cat" in {row["caption"] for row in rows.values()}
    manifest = read_manifest(store, result.manifest.folder, result.manifest.digest)
    assert manifest.failed_reasons == {
        "captioner: the server answers 400: told so for shade #": 1,
        "captioner: the server answers 500: told so for shade #": 1,
    }
    assert manifest.buckets["shortened to whole sentences"] == 1
    assert sum("thrown out" in warning for warning in result.warnings) == 4
