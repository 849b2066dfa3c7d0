"""Which manifests a later stage reads: those that its own run has used, not those another run has added since."""

from __future__ import annotations

from collections import Counter
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from counting_store import CountingStore

from flows import finetune
from flows.standing import standing_parts
from flows.upstream import NoRoomError, NotFinishedError, Upstream
from sd3core.checkpoint import save_model
from sd3core.checkpoint_record import CheckpointRef
from sd3core.data.manifest import Manifest, commit_manifest, read_manifest
from sd3core.data.records import sealed
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError, DataError
from sd3core.mmdit import make_model
from sd3core.recipe_compute import GPU_STAGES
from sd3core.recipe_file import load_recipe
from sd3core.specs import MANIFEST, captions_folder, fingerprint, latents_folder, raw_fields, raw_folder
from workers.evaluate_tasks import plan_tasks
from workers.ray_room import Node
from workers.stage import remember_stage


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def recipe_of(run: str, images: int):
    return load_recipe("tiny-test", [f"run={run}", f"data.images={images}"])


def commit(store, recipe, stage: str, folder: str, inputs: dict[str, str], rows: int):
    """What a stage leaves: the manifest, and the run's note of it."""
    fields = raw_fields(recipe)
    shard = {"number": 0, "stem": "00000.0123456789ab", "rows": rows, "bytes": 1, "digest": "0" * 64}
    made = Manifest(stage=stage, spec=fingerprint(fields), fields=fields, inputs=inputs, folder=folder, shards=[shard])
    ref = commit_manifest(store, folder, made)
    remember_stage(store, recipe.run, stage, folder, ref.digest, fields)
    return ref


def ingest(store, recipe, rows: int):
    return commit(store, recipe, "ingest", raw_folder(recipe), {}, rows)


def test_each_run_reads_what_it_has_ingested_itself(store):
    ours, theirs = recipe_of("a", 100), recipe_of("b", 200)
    small = ingest(store, ours, 100)
    described = commit(store, ours, "caption", captions_folder(ours), {"raw": small.digest}, 100)
    large = ingest(store, theirs, 200)
    assert small.folder == large.folder
    assert Upstream(ours, store).raw == small and Upstream(theirs, store).raw == large
    assert Upstream(ours, store).captions == described
    with pytest.raises(DataError, match="caption: what it made is older than raw"):
        _ = Upstream(theirs, store).captions


@pytest.mark.parametrize("damage", [None, b"", b"{}"])
def test_a_lost_copy_of_the_manifest_is_found_in_the_newest(store, damage):
    ours = recipe_of("a", 100)
    used = ingest(store, ours, 100)
    whole = store.get(used.path)
    store.delete(used.path)
    if damage is not None:
        store.put(used.path, damage)
    assert Upstream(ours, store).raw == used and store.get(used.path) == whole
    store.delete(used.path)
    newest = ingest(store, recipe_of("b", 200), 200)  # then the stages after it say that they stand behind
    assert Upstream(ours, store).raw == newest


def test_without_a_note_of_this_folder_the_newest_counts(store):
    ours = recipe_of("a", 100)
    first, newest = ingest(store, ours, 100), ingest(store, recipe_of("b", 200), 200)
    assert Upstream(recipe_of("c", 200), store).raw == newest
    remember_stage(store, "a", "ingest", "datasets/other/raw/0", first.digest, {})
    assert Upstream(ours, store).raw == newest
    remember_stage(store, "a", "ingest", first.folder, "f" * 64, {})  # a manifest that is gone
    assert Upstream(ours, store).raw == newest


def test_a_stage_that_was_taken_back_is_not_found_by_its_note(store):
    ours = recipe_of("a", 100)
    store.delete(f"{ingest(store, ours, 100).folder}/{MANIFEST}")
    with pytest.raises(DataError, match="ingest is not finished"):
        _ = Upstream(ours, store).raw


def test_the_first_phase_starts_from_a_model_of_ones_own_and_its_content_counts(store, tmp_path):
    from sd3core.checkpoint import open_checkpoint
    from sd3core.mmdit import MMDiT, MMDiTConfig

    fresh, own = recipe_of("a", 100), load_recipe("tiny-test", [f"model.start_from={tmp_path}/model"])
    assert Upstream(fresh, store).start_of("pretrain") is None
    url = Upstream(own, store).start_of("pretrain")
    assert url == (tmp_path / "model").as_uri()
    config, digests = MMDiTConfig.from_depth(1, context_dim=16, pooled_dim=16, position_max=4), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        save_model(url, MMDiT(config))
        digests.append(open_checkpoint(url).digest)
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(CheckpointError, match="no config.json"):
        _ = open_checkpoint(tmp_path / "none").digest


def test_a_start_that_cannot_be_is_told_before_the_first_stage(store, tmp_path):
    own = load_recipe("tiny-test", [f"model.start_from={tmp_path}/model"])
    with pytest.raises(CheckpointError, match="no config.json"):
        Upstream(own, store).check_start_from()
    config = own.model_config_for(own.pretrain)
    save_model(tmp_path / "model", make_model(config))
    Upstream(own, store).check_start_from()
    save_model(tmp_path / "model", make_model(type(config).from_depth(1, position_base=config.position_base)))
    with pytest.raises(
        CheckpointError, match="^pretrain starts from .*model: context_embedder.weight is .64, 4096. there"
    ):
        Upstream(own, store).check_start_from()
    Upstream(recipe_of("a", 100), store).check_start_from()  # fresh weights


def test_a_start_that_is_gone_is_not_needed_once_training_has_ended(store, tmp_path, finish_checkpoint):
    own = load_recipe("tiny-test", [f"model.start_from={tmp_path}/gone"])
    trained = "runs/r/checkpoints/pretrain/spec"
    finish_checkpoint(store, f"{trained}/{8:012d}", own)
    with pytest.raises(CheckpointError, match="no config.json"):
        Upstream(own, store).start_digest("pretrain")
    remember_stage(store, own.run, "pretrain", trained, "f" * 64, {"init": "d" * 64})
    assert Upstream(own, store).start_digest("pretrain") == "d" * 64
    Upstream(own, store).check_start_from()
    other = load_recipe("tiny-test", [f"model.start_from={tmp_path}/mistyped"])
    with pytest.raises(CheckpointError, match="mistyped: no config.json"):
        Upstream(other, store).check_start_from()


def test_without_a_fine_tuning_phase_the_stage_names_the_pretrained_checkpoint(monkeypatch, store):
    """The stage's own module, with the run around it replaced: Prefect is not needed for this."""
    recipe = load_recipe("tiny-test", ["finetune=[]"])

    @contextmanager
    def stage(name, path, overrides, remake=False):
        upstream = Upstream(recipe, store)
        yield SimpleNamespace(recipe=recipe, store=store, upstream=upstream, finish=lambda result: result)

    monkeypatch.setattr(finetune, "stage", stage)
    monkeypatch.setattr(Upstream, "last_checkpoint", lambda *_: CheckpointRef(8, "runs/r/checkpoints/pretrain/s/8"))
    monkeypatch.setattr(Upstream, "last_digest", lambda upstream, key: f"of {key}")
    result = finetune.finetune.fn("tiny-test")
    assert result.skipped and (result.path, result.digest) == ("runs/r/checkpoints/pretrain/s/8", "of pretrain")


def test_what_no_node_holds_is_said_before_the_first_stage_but_not_of_work_that_is_done(
    store, write_records, train_today, rise
):
    """A finished run, or one whose training ran elsewhere, goes on a machine without a GPU."""
    laptop, no_ranks, no_actors = (
        [Node("127.0.0.1", 8, 0)],
        "^compute.train_ranks 2 x .* the 0 GPUs",
        "^compute.gpus_per_actor 1 ",
    )
    rise("train")
    recipe = load_recipe("tiny-test")
    trains, encodes = (load_recipe("tiny-test", [f"compute.gpus_per_{process}=1"]) for process in ("rank", "actor"))
    write_records(store)  # a run that was trained, with scores and notes, by other fields than today's
    store.put_json("runs/tiny-test/summary.json", {})
    Upstream(recipe, store).check_room(lambda: laptop)
    with pytest.raises(NoRoomError, match=no_ranks):
        Upstream(trains, store).check_room(lambda: laptop)
    with pytest.raises(NoRoomError, match=no_actors):
        Upstream(encodes, store).check_room(lambda: laptop)
    train_today(recipe, store)
    Upstream(trains, store).check_room(lambda: laptop)
    with pytest.raises(NoRoomError, match=no_actors):  # evaluation is still to come
        Upstream(encodes, store).check_room(lambda: laptop)
    of_one = {stage: load_recipe("tiny-test", [f"compute.{stage}.gpus_per_actor=1"]) for stage in GPU_STAGES}
    for stage in ("caption", "encode"):  # what they make stands
        Upstream(of_one[stage], store).check_room(lambda: laptop)
    with pytest.raises(NoRoomError, match="^compute.evaluate.gpus_per_actor 1 is more than the 0 GPUs"):
        Upstream(of_one["evaluate"], store).check_room(lambda: laptop)
    for task in plan_tasks(recipe, Upstream(recipe, store).to_be_scored()):
        store.put_json(task.settled("fp32").path, sealed({"precision": "fp32", "pictures": []}))
    Upstream(encodes, store).check_room(lambda: pytest.fail("all stands: no Ray is asked for"))
    longer = load_recipe("tiny-test", ["pretrain.samples=960", "compute.gpus_per_rank=1"])
    with pytest.raises(NoRoomError, match=no_ranks):
        Upstream(longer, store).check_room(lambda: laptop)
    changed = load_recipe("tiny-test", ["evaluate.num_steps=3", "compute.gpus_per_actor=1"])
    with pytest.raises(NoRoomError, match=no_actors):
        Upstream(changed, store).check_room(lambda: laptop)


def test_a_phase_ends_where_its_epochs_do_and_data_that_grow_make_a_training_of_their_own(
    store, write_records, train_today, rise
):
    rise("train")
    write_records(store)
    whole, bounded = (load_recipe("tiny-test", more) for more in ([], ["pretrain.max_epochs=0.5"]))
    images = Upstream(bounded, store).images("pretrain")
    training = Upstream(bounded, store).phase_inputs("pretrain").training
    assert training.samples == images // 2 < training.last_samples + 8 < whole.pretrain.samples
    train_today(bounded, store)
    assert Upstream(bounded, store).last_checkpoint("pretrain").samples == training.last_samples
    parts = {part.name: part.status for part in standing_parts(bounded, store)}
    assert parts["pretrain"] == parts["finetune.0"] == "stands"
    with pytest.raises(NotFinishedError, match="pretrain is not finished"):  # which goes on from there
        Upstream(whole, store).last_checkpoint("pretrain")

    latents = Upstream(bounded, store).latents("pretrain")
    old = read_manifest(store, latents.folder, latents.digest)
    shards = [*old.shards, *(shard.model_copy(update={"number": 90 + shard.number}) for shard in old.shards)]
    grown = commit_manifest(store, latents.folder, old.model_copy(update={"shards": shards}))
    assert Upstream(bounded, store).latents("pretrain") == latents  # what this run has used
    fields = read_manifest(store, latents.folder).fields
    remember_stage(store, bounded.run, "latents.pretrain", latents.folder, grown.digest, fields)
    later = Upstream(bounded, store)
    assert later.images("pretrain") == 2 * images
    assert later.phase_inputs("pretrain").training.samples == images
    with pytest.raises(NotFinishedError, match="pretrain is not finished"):
        later.checkpoints("pretrain")


def test_a_bound_of_epochs_is_not_taken_for_a_users_change_where_a_format_rises(
    store, write_records, train_today, rise
):
    """The schedule goes by the length that the bound leaves, so that length stands among the phase's fields."""
    rise("train")
    write_records(store)
    recipe = load_recipe("tiny-test", ["pretrain.max_epochs=0.5", "pretrain.schedule=cosine"])
    folder, _ = train_today(recipe, store)
    fields = Upstream(recipe, store).phase_inputs("pretrain").fields
    remember_stage(store, recipe.run, "pretrain", folder, "d" * 64, fields)
    assert {part.name: part.status for part in standing_parts(recipe, store)}["pretrain"] == "stands"
    rise("train", "latents")
    parts = {part.name: part.status for part in standing_parts(recipe, store)}
    assert parts["latents.pretrain"] == parts["pretrain"] == "upgrade"


@pytest.fixture
def finish_phases(store, write_records, train_today, rise):
    """A run of tiny-test with so many phases, each with latents of its own, finished as far as evaluation needs it."""

    def finish(phases: int):
        rise("train")
        recipe = load_recipe("tiny-test")
        more = [recipe.finetune[0].model_copy(update={"side_px": 64 + 16 * n}) for n in range(phases - 1)]
        recipe = recipe.model_copy(update={"finetune": tuple(more)})
        write_records(store)
        raw, towers = Upstream(recipe, store).raw, Upstream(recipe, store).towers_manifest
        for key, phase in recipe.phases():
            folder = latents_folder(recipe, phase, towers.digests)
            if not store.exists(f"{folder}/{MANIFEST}"):
                commit(store, recipe, f"latents.{key}", folder, {"raw": raw.digest}, 8)
        train_today(recipe, store)
        return recipe

    return finish


@pytest.mark.parametrize("phases", [2, 4, 8])
def test_what_evaluation_asks_of_the_stages_before_it_is_read_once(finish_phases, tmp_path, phases):
    """Each manifest, note and done record one time, and a listing a phase: the requests grow with the phases, not with
    their square.
    """
    recipe = finish_phases(phases)
    counting = CountingStore(tmp_path)
    inputs = Upstream(recipe, counting).to_be_scored()
    assert [len(found) for found in inputs.checkpoints.values()] == [1] * phases and len(inputs.latents) == phases
    planned = dict(counting.asked)
    assert plan_tasks(recipe, inputs) and counting.asked == planned  # what is scored follows from these alone
    assert max(Counter(counting.whole).values()) == 1
    assert counting.asked == {"get": 7 + 3 * phases, "size": 5 + phases, "list": phases}  # 22 in all of two phases


def test_what_was_found_is_kept_and_what_was_missing_is_looked_for_again(finish_phases, finish_checkpoint, store):
    """A stage of two phases asks for the first one's checkpoints when it has trained it."""
    recipe = finish_phases(3)
    first = Upstream(recipe, store).checkpoints("finetune.0")[-1]
    done = store.get(f"{first.folder}/DONE.json")
    store.delete(f"{first.folder}/DONE.json")
    upstream = Upstream(recipe, store)
    with pytest.raises(NotFinishedError, match="finetune is not finished"):
        upstream.phase_inputs("finetune.1")
    store.put(f"{first.folder}/DONE.json", done)
    assert upstream.phase_inputs("finetune.1").start == store.uri(first.folder)
