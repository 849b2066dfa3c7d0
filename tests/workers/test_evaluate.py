"""Evaluation over real data stages, towers and a checkpoint, with the workers called in this process instead of on
Ray.
"""

from __future__ import annotations

import io
import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_chain import encode_all
from in_process import without_ray
from PIL import Image
from safetensors.torch import save_file

import workers.evaluate
import workers.shard_stage
import workers.towers
from sd3core.buckets import bucket_sides
from sd3core.checkpoint_record import CheckpointDone, checkpoint_folder
from sd3core.data.checked_files import CheckedFiles
from sd3core.data.manifest import read_manifest
from sd3core.data.phase_images import phase_images
from sd3core.data.provenance import device_kind, provenance_of
from sd3core.data.records import record_bytes, record_file, sealed
from sd3core.data.split_rows import read_rows
from sd3core.data.store import Store, open_store
from sd3core.errors import DataError
from sd3core.mmdit import MMDiT
from sd3core.pictures import read_settings
from sd3core.precision import CPU, has_bf16_arithmetic, resolve_precision
from sd3core.progress import Progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.specs import DONE_FILE, fingerprint
from sd3core.towers.artifact import read_towers
from sd3core.training_checkpoint import piece_name, rank_file
from workers.evaluate import EvaluationFailed, _chosen, _read_part, _to_be_of_one_precision, evaluate_stage
from workers.evaluate_rises import rise_lines
from workers.evaluate_tasks import COMPARISON, EvaluationInputs, ScoredCheckpoint, plan_tasks
from workers.evaluate_worker import EvaluationWorker
from workers.ingest import ingest_stage
from workers.towers import towers_stage

SETTINGS = [
    "data.images=60", "data.held_out_fraction=0.3", "towers.small.vae.steps=2", "towers.small.clip_l.steps=2",
    "towers.small.clip_g.steps=2", "towers.small.t5.steps=2", "towers.small.judge.steps=2", "evaluate.bench_prompts_per_task=2",
    "evaluate.earlier_bench_prompts_per_task=1", "evaluate.scored_images=8", "evaluate.grid_prompts=4",
    "evaluate.bucket_grid_prompts=2", "evaluate.num_steps=2", "evaluate.validation_images=10", "text.null=empty",
]  # fmt: skip


def write_checkpoint(store: Store, recipe: Recipe, phase_key: str, samples: int, seed: int) -> ScoredCheckpoint:
    """A training checkpoint of random weights, the live ones further out than the EMA."""
    phase = dict(recipe.phases())[phase_key]
    torch.manual_seed(seed)
    model = MMDiT(recipe.model_config_for(phase))
    folder = checkpoint_folder(f"runs/{recipe.run}/checkpoints/{phase_key}/spec", samples)
    local = store.local_path(folder)
    local.mkdir(parents=True)
    trained = {name: torch.randn_like(p) * 0.05 for name, p in model.named_parameters()}
    kinds = {"weights": 1.5, "ema": 1.0}
    pieces = {
        piece_name(kind, name, 0): (p * scale).flatten() for kind, scale in kinds.items() for name, p in trained.items()
    }
    save_file(pieces, local / rank_file(0, 1))
    done = CheckpointDone(
        samples=samples,
        steps=1,
        attempt=1,
        optimizer_step=1,
        config=model.config.to_dict(),
        training=phase.model_dump(mode="json"),
        parameters={name: list(p.shape) for name, p in trained.items()},
        files={rank_file(0, 1): record_file(local / rank_file(0, 1))},
        specs={},
        null=recipe.text.null,
        recipe=recipe.model_dump(mode="json"),
    )
    store.put_json(f"{folder}/{DONE_FILE}", done.model_dump(mode="json"))
    return ScoredCheckpoint(folder, samples, done.digest)


@dataclass
class World:
    recipe: Recipe
    store: Store
    inputs: EvaluationInputs


@pytest.fixture(scope="module")
def patched():
    with pytest.MonkeyPatch.context() as patch:
        without_ray(patch, workers.evaluate, workers.shard_stage, workers.towers)
        yield patch


@pytest.fixture(scope="module")
def world(patched, tmp_path_factory) -> World:
    root = tmp_path_factory.mktemp("evaluate")
    patched.setenv("SD3_HOME", str(root / "home"))
    recipe, store = load_recipe("tiny-test", SETTINGS), open_store(str(root / "store"))
    raw = ingest_stage(recipe, store, ignore).manifest
    towers = towers_stage(recipe, store, raw, ignore).manifest
    encoded = encode_all(recipe, store, raw, None, towers, ignore)
    checkpoints = {
        "pretrain": [write_checkpoint(store, recipe, "pretrain", samples, samples) for samples in (32, 64)],
        "finetune.0": [write_checkpoint(store, recipe, "finetune.0", 32, 5)],
    }
    latents = {key: encoded[f"latents.{key}"].manifest for key, _ in recipe.phases()}
    digests = read_towers(store, towers.folder).digests
    inputs = EvaluationInputs(checkpoints, raw, encoded["text"].manifest, latents, towers.folder, digests)
    return World(recipe, store, inputs)


@pytest.fixture(scope="module")
def result(world):
    return evaluate(world)


def ignore(progress: Progress) -> None:
    pass


def evaluate(world: World, recipe: Recipe | None = None, report=ignore) -> SimpleNamespace:
    """The stage's result, with the tables of scores.json as they stand then."""
    result = evaluate_stage(recipe or world.recipe, world.store, world.inputs, report)
    return SimpleNamespace(**vars(result) | {"warnings": result.notes}, **world.store.get_json(result.path))


def planned(world: World, recipe: Recipe | None = None):
    """The tasks, in what this machine computes in."""
    precision = resolve_precision("auto", bf16=has_bf16_arithmetic(CPU))
    tasks = plan_tasks(recipe or world.recipe, world.inputs)
    return [task.settled(precision) for task in tasks]


def test_every_checkpoint_has_every_score_for_both_weights(world, result):
    for phase, checkpoints in world.inputs.checkpoints.items():
        for folder in (checkpoint.folder for checkpoint in checkpoints):
            for weights in ("ema", "live"):
                rows = {r["metric"]: r for r in result.scores if (r["checkpoint"], r["weights"]) == (folder, weights)}
                assert rows["validation_loss"]["count"] == 10 and rows["clip_score"]["count"] == 8
                tasks = [name for name in rows if name.startswith("shapes_bench/") and name != "shapes_bench/overall"]
                assert len(tasks) == (6 if phase == "finetune.0" else 0)
                if tasks:
                    assert all(rows[task]["count"] == 2 for task in tasks)
                    assert rows["shapes_bench/overall"]["value"] == pytest.approx(
                        np.mean([rows[t]["value"] for t in tasks])
                    )
    live, ema = (
        [r["value"] for r in result.scores if r["metric"] == "validation_loss" and r["weights"] == w]
        for w in ("live", "ema")
    )
    assert all(a != b for a, b in zip(live, ema, strict=True))


def test_a_validation_loss_is_the_mean_of_its_images_which_are_the_same_for_all_checkpoints(world, result):
    scores = {(r["checkpoint"], r["weights"]): r["value"] for r in result.scores if r["metric"] == "validation_loss"}
    losses = {
        (task.checkpoint, task.weights): np.array(world.store.get_json(task.path)["details"]["loss_by_image"])
        for task in planned(world)
        if task.part == "validation"
    }
    assert {key: found.mean() for key, found in losses.items()} == pytest.approx(scores)
    live, ema = (losses[world.inputs.checkpoints["pretrain"][0].folder, weights] for weights in ("live", "ema"))
    assert np.corrcoef(live, ema)[0, 1] > 0.9  # a hard image is hard for both


def test_a_loss_that_turns_up_is_told_with_its_images_and_epochs(world, result):
    assert "rising" not in world.store.get_json(result.path)
    first, last = (t for t in planned(world) if (t.part, t.phase, t.weights) == ("validation", "pretrain", "ema"))
    before, part = world.store.get(last.path), world.store.get_json(last.path)
    part["details"]["loss_by_image"] = [x + 1 for x in world.store.get_json(first.path)["details"]["loss_by_image"]]
    world.store.put_json(last.path, sealed({key: value for key, value in part.items() if key != "sha256"}))
    [row] = evaluate(world).rising
    manifests = world.inputs.latents["pretrain"], world.inputs.text
    images = phase_images(world.store, *manifests, world.recipe.pretrain.global_batch)
    assert (row["since"], row["samples"], row["images"], row["count"]) == (32, 64, images, 10)
    assert row["last"] - row["lowest"] == pytest.approx(1)
    [line] = rise_lines([row], [row["protocol"]])
    assert line.startswith("pretrain: validation loss rises since the checkpoint of 32 samples (")
    assert rise_lines([row], []) == []

    del part["details"]["loss_by_image"]  # as an earlier version left it
    world.store.put_json(last.path, sealed({key: value for key, value in part.items() if key != "sha256"}))
    again = evaluate(world)
    assert "rising" not in world.store.get_json(again.path)
    [told] = [line for line in again.warnings if "is not looked at" in line]
    assert told.startswith("pretrain: whether the validation loss rises")
    world.store.put(last.path, before)
    assert evaluate(world).digest == result.digest


def test_a_phase_whose_images_nobody_counted_is_scored_all_the_same(monkeypatch):
    def nobody_counted(*_):
        raise DataError("UNCAPTIONED.json: not there or damaged")

    monkeypatch.setattr(workers.evaluate, "phase_images", nobody_counted)
    inputs = SimpleNamespace(latents={"pretrain": None}, text=None)
    assert workers.evaluate._images_of(load_recipe("tiny-test"), None, inputs, "pretrain") is None


def test_every_record_names_what_it_was_made_with_and_no_digest_covers_it(world, result):
    parts = [world.store.get_json(task.path) for task in planned(world)]
    assert {part["made_by"]["device"] for part in parts} == {device_kind()}
    makers = provenance_of(world.store, result.path)
    assert [maker.device for maker in makers] == [device_kind()]
    told = world.store.get_json(result.path)
    told.pop("made_by")
    assert result.digest == fingerprint(told)


def test_earlier_checkpoints_get_fewer_bench_prompts(world):
    tasks = planned(world)
    counts = {
        (task.samples, task.protocol["prompts_per_task"])
        for task in tasks
        if task.part == "bench-colors" and task.phase == "pretrain"
    }
    assert counts == {(32, 1), (64, 2)}


def test_bench_pictures_take_the_phases_sizes_in_turn(world, result):
    tasks = planned(world)
    sizes = next(task for task in tasks if task.part == "bench-colors" and task.phase == "finetune.0").protocol["sizes"]
    phase = dict(world.recipe.phases())["finetune.0"]
    assert [tuple(size) for size in sizes] == [
        size for size in bucket_sides(phase.side_px, phase.aspect_ratios) if min(size) >= 48
    ]
    assert len(sizes) > 1
    for row in result.bench:
        pictures = [row["sizes"][f"{height}x{width}"]["pictures"] for height, width in sizes]
        assert pictures == [len(range(turn, 2, len(sizes))) for turn in range(len(sizes))]


def test_bench_below_the_detectors_size_is_left_out(result):
    assert {(row["phase"], row["reason"]) for row in result.left_out if row["metric"] == "shapes_bench"} == {
        ("pretrain", "its detector needs pictures of at least 48 px; this phase makes 32 px")
    }


def test_scores_name_their_protocol(result):
    assert {row["protocol"] for row in result.scores} <= result.protocols.keys()
    pretrain = [r for r in result.scores if r["phase"] == "pretrain" and r["metric"] == "clip_score"]
    assert len({row["protocol"] for row in pretrain}) == 1  # checkpoints and weights of a phase can be compared
    protocol = result.protocols[pretrain[0]["protocol"]]
    assert (
        protocol["settings"] | {"sampler": "euler", "num_steps": 2, "height": 32, "shift": 1.0} == protocol["settings"]
    )
    assert len(protocol["reference_set"]) == 12 and protocol["reference"]["limit"] == 5_000


def test_a_score_of_too_few_is_left_out_with_its_bound(result):
    reasons = {row["reason"] for row in result.left_out if row["metric"] == "clip_fid"}
    assert reasons == {"FID needs at least 33 generated images (the judge's features have 32 dimensions); there are 8"}
    assert not any(row["metric"] == "clip_fid" for row in result.scores)


def test_pictures_carry_their_settings_and_buckets_have_grids_of_their_own(world, result):
    names = {(p["phase"], p["name"]) for p in result.pictures}
    grids = {("pretrain", "32x32"), ("finetune.0", "64x64"), ("finetune.0", "80x48")}
    assert names == grids | {("pretrain", COMPARISON), ("finetune.0", COMPARISON)}
    for picture in result.pictures:
        if picture["name"] == COMPARISON:
            continue
        png = world.store.get(picture["path"])
        settings = read_settings(png)
        assert (
            len(json.loads(settings["prompts"]))
            == len(json.loads(settings["seeds"]))
            == (2 if picture["name"] == "80x48" else 4)
        )
        assert settings["weights"] == picture["weights"]
        assert len(world.store.get(picture["thumbnail"])) < 20_000
        assert Image.open(io.BytesIO(png)).width == (
            32 * 2 + 2 if picture["name"] == "32x32" else Image.open(io.BytesIO(png)).width
        )


def test_training_captions_stand_beside_held_out_ones_the_same_for_all_checkpoints(world, result):
    raw = read_manifest(world.store, world.inputs.raw.folder, world.inputs.raw.digest)
    of_split = {
        split: {row.caption for row in read_rows(world.store, raw, split, 100)} for split in ("train", "held_out")
    }
    inside = []
    for picture in (picture for picture in result.pictures if picture["name"] == COMPARISON):
        assert picture["weights"] == "ema"
        png = world.store.get(picture["path"])
        settings = read_settings(png)
        inside.append((settings["prompts"], settings["seeds"], settings["splits"]))
        prompts, splits = json.loads(settings["prompts"]), json.loads(settings["splits"])
        assert splits == ["train"] * 4 + ["held_out"] * 4
        assert all(prompt in of_split[split] for prompt, split in zip(prompts, splits, strict=True))
        assert len(world.store.get(picture["thumbnail"])) < 60_000
    assert len(inside) == 3 and len(set(inside)) == 1
    assert len({world.store.get(p["path"]) for p in result.pictures if p["name"] == COMPARISON}) == 3  # other weights


def test_a_comparison_can_be_left_out_and_where_nothing_is_held_out_it_has_one_half(world, result):
    none = {"compared_captions": 0}
    recipe = world.recipe.model_copy(update={"evaluate": world.recipe.evaluate.model_copy(update=none)})
    assert not [task for task in plan_tasks(recipe, world.inputs) if task.part == COMPARISON]
    data = world.recipe.data.model_copy(update={"held_out_fraction": 0.0})
    worker = EvaluationWorker(world.store.url, world.recipe.model_copy(update={"data": data}), world.inputs)
    task = next(task for task in planned(world) if task.part == COMPARISON)
    task = replace(task, folder="elsewhere")
    worker(task)
    [picture] = world.store.get_json(task.path)["pictures"]
    assert set(json.loads(read_settings(world.store.get(picture["path"]))["splits"])) == {"train"}
    width_of = lambda path: Image.open(io.BytesIO(world.store.get(path))).width
    both = next(p for p in result.pictures if p["name"] == COMPARISON and p["phase"] == task.phase)
    assert 2 * width_of(picture["path"]) + 10 == width_of(both["path"])
    for entry in world.store.list("elsewhere"):
        world.store.delete(entry.path)


def test_a_second_call_changes_nothing(world, result):
    before = {entry.path: world.store.local_path(entry.path).stat().st_mtime_ns for entry in world.store.list("")}
    again = evaluate(world)
    assert again.skipped and again.digest == result.digest and again.scores == result.scores
    assert before == {
        entry.path: world.store.local_path(entry.path).stat().st_mtime_ns for entry in world.store.list("")
    }


def test_only_missing_parts_are_made_again_and_give_the_same(world, result):
    tasks = planned(world)
    lost = [task for task in tasks if task.part in ("validation", "bench-colors") and task.weights == "ema"]
    for task in lost:
        world.store.delete(task.path)
    seen = []
    again = evaluate(world, report=seen.append)
    assert (again.made, again.done_before) == (len(lost), len(tasks) - len(lost))
    assert again.scores == result.scores and again.digest == result.digest
    assert seen[-1].done == seen[-1].total == len(tasks) and "colors" in " ".join(p.note for p in seen)


@pytest.mark.parametrize("change", [{"guidance_scale": 1.0}, {"sampler": "heun"}, {"shift": 3.0}])
def test_a_changed_setting_redoes_what_depends_on_it(world, result, change):
    """Another way to draw: pictures and bench, not the validation loss."""
    changed = world.recipe.model_copy(update={"evaluate": world.recipe.evaluate.model_copy(update=change)})
    before = planned(world)
    after = planned(world, changed)
    redone = {task.part.partition("-")[0] for old, task in zip(before, after, strict=True) if old.path != task.path}
    assert redone == {"pictures", COMPARISON, "bench", "grid"}
    for task in after:
        if "settings" in task.protocol:
            settings = task.protocol["settings"]
            assert change.items() <= settings.items()
            phase = dict(changed.phases())[task.phase]
            assert settings["shift"] == change.get("shift", phase.shift)


def test_only_the_last_checkpoints_on_request(world):
    last = world.recipe.model_copy(
        update={"evaluate": world.recipe.evaluate.model_copy(update={"checkpoints": "last"})}
    )
    assert {task.samples for task in plan_tasks(last, world.inputs) if task.phase == "pretrain"} == {64}


def test_only_the_averaged_weights_on_request(world):
    evaluate = world.recipe.evaluate.model_copy(update={"weights": "ema"})
    ema = world.recipe.model_copy(update={"evaluate": evaluate})
    every, chosen = (plan_tasks(r, world.inputs) for r in (world.recipe, ema))
    assert chosen == [task for task in every if task.weights == "ema"]  # the same scores at the same places
    alone = [task for task in every if task.part == COMPARISON]  # of the averaged weights in any case
    assert 2 * len(chosen) - len(alone) == len(every)


def test_held_out_rows_are_held_out_and_fixed(world):
    raw = read_manifest(world.store, world.inputs.raw.folder, world.inputs.raw.digest)
    held_out, train = (read_rows(world.store, raw, split, 1_000) for split in ("held_out", "train"))
    assert len(held_out) + len(train) == 60 and not {r.key for r in held_out} & {r.key for r in train}
    assert [r.key for r in read_rows(world.store, raw, "held_out", 5)] == [
        r.key for r in read_rows(world.store, raw, "held_out", 5)
    ]


def test_a_part_that_fails_is_named_and_the_others_stay(world, result):
    tasks = planned(world)
    damaged = world.store.local_path(f"{world.inputs.checkpoints['pretrain'][0].folder}/{rank_file(0, 1)}")
    lost = [task for task in tasks if task.part == "validation" and task.phase == "pretrain" and task.weights == "ema"]
    for task in lost:
        world.store.delete(task.path)
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-8])
    with pytest.raises(EvaluationFailed, match=r"1 of 2 parts .* pretrain 32 ema validation: .* is damaged"):
        evaluate(world)
    damaged.write_bytes(content)
    again = evaluate(world)
    assert again.made == 1 and again.digest == result.digest


@pytest.mark.parametrize("damage", ["part", "truncated", "picture", "thumbnail"])
def test_a_damaged_part_or_picture_is_named_and_made_again(world, result, damage):
    task = next(task for task in planned(world) if task.part == "grid-80x48" and task.weights == "ema")
    part = world.store.get_json(task.path)
    path = {"picture": part["pictures"][0]["path"], "thumbnail": part["pictures"][0]["thumbnail"]}.get(
        damage, task.path
    )
    before = world.store.get(path)
    data = bytearray(before)
    if damage == "truncated":
        del data[len(data) // 2 :]
    elif damage == "part":
        place = data.index(b'"seed": ') + 8
        data[place] ^= 1
    else:
        data[-1] ^= 1
    world.store.put(path, bytes(data))
    again = evaluate(world)
    assert again.made == 1 and [line for line in again.warnings if path in line and "scored again" in line]
    assert world.store.get(path) == before or damage in ("part", "truncated")
    assert again.scores == result.scores and evaluate(world).skipped


def test_a_damaged_picture_of_a_store_elsewhere_is_found(s3_bucket, tmp_path):
    """Also where its size is right; one that was found whole is not read by every command."""
    store, checked = open_store(f"s3://{s3_bucket}"), CheckedFiles(tmp_path / "checked")
    files = {"e/grid.png": b"picture", "e/grid.jpg": b"small"}
    for path, data in files.items():
        store.put(path, data)
    records = {path: record_bytes(data).model_dump() for path, data in files.items()}
    picture = {"path": "e/grid.png", "thumbnail": "e/grid.jpg", "files": records}
    store.put_json("e/part.json", sealed({"pictures": [picture]}))
    assert _read_part(store, "e/part.json", checked)[1] is None
    get_range, store.get_range = store.get_range, None
    assert _read_part(store, "e/part.json", checked)[1] is None
    store.get_range = get_range
    store.put("e/grid.jpg", b"smell")
    assert _read_part(store, "e/part.json", checked) == (None, "e/grid.jpg")


def test_a_damaged_part_of_another_protocol_is_named_once_and_left_out(world, result):
    """Its scores would leave the table without a word."""
    settings = {
        "bench_prompts_per_task": 0,
        "checkpoints": "last",
        "weights": "ema",
        "seed": 99,
        "bucket_grid_prompts": 0,
    }
    recipe = world.recipe.model_copy(update={"evaluate": world.recipe.evaluate.model_copy(update=settings)})
    there = evaluate(world, recipe)
    others = {fingerprint(task.protocol): task for task in planned(world, recipe)}
    assert others.keys() == set(there.shown) and others.keys() <= evaluate(world).protocols.keys()
    [task] = [task for task in others.values() if task.part == "validation" and task.phase == "pretrain"]
    whole = world.store.get(task.path)
    world.store.put(task.path, whole[:-30])
    again = evaluate(world)
    [line] = again.warnings
    assert again.skipped and line.startswith(
        f"1 part by other settings damaged, whose scores are left out: {world.store.uri(task.path)};"
    )
    assert others.keys() - again.protocols.keys() == {fingerprint(task.protocol)}
    mended = evaluate(world, recipe)
    assert mended.made == 1 and any(f"{world.store.uri(task.path)} was damaged" in line for line in mended.warnings)
    assert not evaluate(world).warnings
    for task in planned(world, recipe):  # as the other tests found it
        world.store.delete(task.path)
    assert evaluate(world).digest == result.digest


def test_a_damaged_reference_is_named_and_made_again(world, result):
    [features] = [e.path for e in world.store.list("references") if e.path.endswith("features.safetensors")][:1]
    record = features.replace("features.safetensors", "DONE.json")
    for path in (features, record):
        before = bytearray(world.store.get(path))
        damaged = before[:-1] + bytes([before[-1] ^ 1]) if path == features else before[:-30]
        world.store.put(path, bytes(damaged))
        lost = [task for task in planned(world) if task.part == "pictures" and task.weights == "ema"]
        for task in lost:
            world.store.delete(task.path)
        again = evaluate(world)
        assert [line for line in again.warnings if path in line and "made again" in line]
        assert world.store.get(path) == bytes(before) and again.digest == result.digest


def test_a_part_of_an_earlier_version_counts_as_what_it_was_computed_in(world, result):
    """`auto` stood in its place and its protocol, what was settled beside it, and no digest."""
    [task] = [t for t in planned(world) if t.part == "validation" and t.phase == "finetune.0" and t.weights == "ema"]
    part = world.store.get_json(task.path)
    old = {key: value for key, value in part.items() if key != "sha256"} | {
        "protocol": task.protocol | {"precision": "auto"}
    }
    world.store.put_json(task.settled("auto").path, old)
    world.store.delete(task.path)
    again = evaluate(world)
    assert again.skipped and again.scores == result.scores
    world.store.put_json(task.path, part)
    world.store.delete(task.settled("auto").path)


def test_a_run_that_ended_before_its_parts_were_of_one_precision_goes_on(world, result, monkeypatch):
    """Nothing is missing then, and yet a row's parts stand in bf16 and in fp32."""
    [task] = [t for t in planned(world) if t.part == "validation" and t.phase == "finetune.0" and t.weights == "ema"]
    part = world.store.get_json(task.path)
    row = [t for t in planned(world) if (t.checkpoint, t.weights) == (task.checkpoint, task.weights)]
    other = {"fp32": "bf16", "bf16": "fp32"}[part["precision"]]
    relabelled = {key: value for key, value in part.items() if key != "sha256"} | {"precision": other}
    world.store.put_json(task.path, relabelled | {"protocol": task.protocol | {"precision": other}})
    asked = []

    def fp32_parts(recipe, store, inputs, tasks, meter):
        asked.extend(tasks)
        for wanted in tasks:
            [like] = [t for t in row if t.part == wanted.part]
            fields = {key: value for key, value in store.get_json(like.path).items() if key != "sha256"}
            store.put_json(wanted.path, sealed(fields | {"precision": "fp32", "protocol": wanted.protocol}))
        return []

    monkeypatch.setattr("workers.evaluate._run_tasks", fp32_parts)
    again = evaluate(world)
    assert [t.protocol["precision"] for t in asked] == ["fp32"] * (1 if other == "bf16" else len(row) - 1)
    assert any("of one precision" in warning for warning in again.warnings)
    for wanted in asked:
        if wanted.path != task.path:
            world.store.delete(wanted.path)
    world.store.put_json(task.path, part)


def test_scores_in_another_precision_are_of_another_protocol_and_stay(world, result):
    other = "fp32" if result.scores[0]["precision"] == "bf16" else "bf16"
    settings = {"precision": other, "bench_prompts_per_task": 0, "checkpoints": "last", "weights": "ema"}
    recipe = world.recipe.model_copy(update={"evaluate": world.recipe.evaluate.model_copy(update=settings)})
    there = evaluate(world, recipe)
    shown = [row for row in there.scores if row["protocol"] in there.shown]
    assert shown and {row["precision"] for row in shown} == {other}
    assert {row["precision"] for row in there.scores} == {"bf16", "fp32"}
    assert set(result.protocols) <= set(there.protocols) and not set(result.shown) & set(there.shown)
    back = evaluate(world)
    assert back.skipped and back.shown == result.shown and set(there.protocols) == set(back.protocols)
    for path in {entry.path for entry in world.store.list("runs/tiny-test/evaluations")}:  # as the other tests found it
        is_part = path.endswith(".json") and not path.endswith("scores.json")
        if is_part and world.store.get_json(path)["protocol"]["precision"] == other:
            world.store.delete(path)
    assert evaluate(world).digest == result.digest


def test_a_rows_parts_in_two_precisions_are_completed_in_fp32(world, result, monkeypatch):
    """As where some of the actors have arithmetic for bf16: no mean is taken over both."""
    tasks = [task for task in plan_tasks(world.recipe, world.inputs) if task.weights == "ema"]
    row = [task for task in tasks if task.checkpoint == tasks[-1].checkpoint]
    mixed = {task.place: {"fp32" if place == 0 else "bf16": {}} for place, task in enumerate(row)}
    assert _to_be_of_one_precision(row, mixed) == [task.settled("fp32") for task in row[1:]]
    for task in row[1:]:
        mixed[task.place]["fp32"] = {}
    assert not _to_be_of_one_precision(row, mixed)
    assert {task.protocol["precision"] for task, _ in _chosen(row, mixed)} == {"fp32"}
