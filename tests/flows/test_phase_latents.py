"""When a run makes which latents: pretraining's with the text, each fine-tuning phase's right before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
from counting_models import DIGESTS, TOWERS, Seen, count_models

from flows import encode, evaluate, finetune, pretrain, training
from flows.standing import standing_parts
from flows.upstream import NotFinishedError, Upstream
from sd3core import specs
from sd3core.data.begun import all_begun
from sd3core.data.store import Store, open_store
from sd3core.progress import ignore_progress
from sd3core.recipe import Recipe
from sd3core.recipe_file import load_recipe
from sd3core.specs import MANIFEST
from workers.caption import caption_stage
from workers.encode import encode_phase
from workers.ingest import ingest_stage
from workers.stage import StageResult, recall_stage

IMAGES, ROWS = 24, 8
PHASES = ["finetune.0", "finetune.1", "finetune.2"]  # the last one at the first one's sizes


class Killed(BaseException):
    """The process ends here."""


@dataclass
class Run:
    """The stages of a run, without Prefect and without steps."""

    recipe: Recipe
    store: Store
    seen: Seen
    finish_checkpoint: Callable[..., None]
    stood: dict[str, tuple[list[str], int]] = field(default_factory=dict)  # phase -> latents there, images shown
    killed_in: str = ""

    def call(self, module: Any) -> StageResult:
        flow = getattr(module, module.__name__.rpartition(".")[2])
        return flow.fn("tiny-test")

    @contextmanager
    def stage(self, *_: Any):
        yield SimpleNamespace(
            recipe=self.recipe,
            store=self.store,
            report=ignore_progress,
            warn=print,
            log=logging.getLogger(),
            upstream=Upstream(self.recipe, self.store),
            finish=lambda result, *shown: result,
        )

    def train(self, run: SimpleNamespace, key: str) -> StageResult:
        """Takes a look at what stands before the phase's first step, and ends it."""
        if key == self.killed_in:
            raise Killed
        folder = specs.checkpoints_folder(self.recipe, key, run.upstream.phase_inputs(key).fields)
        last = f"{folder}/{dict(self.recipe.phases())[key].last_samples:012d}"
        stands = self.store.exists(f"{last}/DONE.json")
        if not stands:
            self.stood[key] = self.latents(), self.seen.encoded
            self.finish_checkpoint(self.store, last, self.recipe)
        return StageResult(key, f"{last}/DONE.json", "d" * 64, skipped=stands, reason="")

    def latents(self) -> list[str]:
        """The phases whose latents are whole."""
        folders = {key: specs.latents_folder(self.recipe, phase, DIGESTS) for key, phase in self.recipe.phases()}
        return [key for key, folder in folders.items() if self.store.exists(f"{folder}/{MANIFEST}")]

    def files(self) -> dict[str, bytes]:
        """What the data stages made, but who made it."""
        paths = (entry.path for entry in self.store.list("datasets"))
        return {path: self.store.get(path) for path in paths if "/PROVENANCE." not in path}


@pytest.fixture
def start(tmp_path, monkeypatch, finish_checkpoint):
    """Starts a run whose images and captions stand, in a store of that name."""
    seen = count_models(monkeypatch, tmp_path)
    recipe = load_recipe("tiny-test", [f"data.images={IMAGES}", f"data.rows_per_shard={ROWS}"])
    phase = recipe.finetune[0]
    recipe = recipe.model_copy(update={"finetune": (phase, phase.model_copy(update={"side_px": 80}), phase)})
    towers = SimpleNamespace(digests=DIGESTS, folder=TOWERS.folder, digest=TOWERS.digest)
    monkeypatch.setattr(Upstream, "towers_manifest", towers)

    def made(name: str) -> Run:
        run = Run(recipe, open_store(str(tmp_path / name)), seen, finish_checkpoint)
        raw = ingest_stage(recipe, run.store, ignore_progress)
        caption_stage(recipe, run.store, raw.manifest, ignore_progress)
        for module in (encode, pretrain, finetune, evaluate):
            monkeypatch.setattr(module, "stage", run.stage)
        for module in (pretrain, finetune):
            monkeypatch.setattr(module, "train_phase", run.train)
            monkeypatch.setattr(module, "loss_pictures", lambda *_: {})
        return run

    return made


def whole_run(run: Run) -> list[StageResult]:
    return [run.call(module) for module in (encode, pretrain, finetune)]


def test_no_latents_of_a_phase_are_made_before_the_phase_before_it_has_ended(start):
    run = start("store")
    assert [*run.call(encode).parts] == ["text", "latents.pretrain"]
    whole_run(run)
    assert run.stood == {
        "pretrain": (["pretrain"], IMAGES),
        "finetune.0": (["pretrain", "finetune.0", "finetune.2"], 2 * IMAGES),  # the last phase takes the same
        "finetune.1": (["pretrain", *PHASES], 3 * IMAGES),
        "finetune.2": (["pretrain", *PHASES], 3 * IMAGES),
    }
    before = run.files()
    again = whole_run(run)
    assert all(result.skipped for result in again) and run.files() == before and run.seen.encoded == 3 * IMAGES
    noted = {key: recall_stage(run.store, run.recipe.run, specs.latents_part(key)) for key in PHASES}
    assert noted["finetune.0"] == noted["finetune.2"] != noted["finetune.1"]
    assert Upstream(run.recipe, run.store).latents("finetune.2").digest == noted["finetune.2"].digest
    assert not all_begun(run.store)


def test_a_run_whose_latents_were_all_made_before_the_first_step_has_the_same_bytes_and_makes_none_again(start):
    """As versions before this one left it."""
    ours = start("ours")
    whole_run(ours)
    before = start("before")
    text = before.call(encode).parts["text"].manifest
    raw = Upstream(before.recipe, before.store).raw
    for key in PHASES:
        encode_phase(before.recipe, before.store, key, raw, text, TOWERS, ignore_progress)
    shown = before.seen.encoded
    assert before.files() == ours.files()
    encoded, _, tuned = whole_run(before)
    assert encoded.skipped and before.seen.encoded == shown and before.files() == ours.files()
    assert all(part.skipped for name, part in tuned.parts.items() if name.startswith("latents."))


def test_what_a_kill_between_leaves_is_gone_on_with(start):
    run, batches = start("store"), []
    run.call(encode)
    run.call(pretrain)

    def kill() -> None:
        batches.append(run.seen.encoded)
        if len(batches) == 5:
            raise Killed

    run.seen.before_encoding = kill
    with pytest.raises(Killed):
        run.call(finetune)
    (begun,) = all_begun(run.store)
    assert begun.stage == "latents.finetune.0" and run.latents() == ["pretrain"]
    run.seen.before_encoding = lambda: None
    shards = [entry for entry in run.store.list(begun.folder) if entry.path.endswith(specs.DONE)]
    assert 0 < len(shards) < IMAGES / ROWS
    shown = run.seen.encoded

    run.killed_in = "finetune.0"
    with pytest.raises(Killed):
        run.call(finetune)
    assert run.seen.encoded == shown + IMAGES - ROWS * len(shards) and not all_begun(run.store)
    shown, run.killed_in = run.seen.encoded, "finetune.2"
    with pytest.raises(Killed):
        run.call(finetune)
    assert run.seen.encoded == shown + IMAGES  # of the other size
    run.killed_in = ""
    result = run.call(finetune)
    assert run.seen.encoded == shown + IMAGES and result.parts["latents.finetune.2"].skipped
    undisturbed = start("undisturbed")
    whole_run(undisturbed)
    assert run.files() == undisturbed.files()


def test_a_stage_that_would_encode_in_vain_says_first_what_is_to_come_before_it(start):
    run = start("store")
    with pytest.raises(NotFinishedError, match="^encode is not finished .*'encode/tiny-test'"):
        run.call(finetune)
    run.call(encode)
    with pytest.raises(NotFinishedError, match="^pretrain is not finished .*'pretrain/tiny-test'"):
        run.call(finetune)
    assert run.seen.encoded == IMAGES
    run.call(pretrain)
    with pytest.raises(NotFinishedError, match="^finetune is not finished .*'finetune/tiny-test'"):
        run.call(evaluate)
    assert not run.call(finetune).skipped


def test_what_a_phase_should_know_of_its_latents_is_told_before_its_first_step(start):
    run, said = start("store"), []
    whole_run(run)
    with run.stage() as opened:
        opened.warn = said.append
        training.make_latents(opened, "finetune.1")
    assert [line.partition(":")[0] for line in said] == ["finetune.1 (80 px)"]


def test_a_stage_alone_is_asked_of_the_latents_that_it_makes(start):
    run = start("store")
    whole_run(run)
    towers_too = lambda up_to: [part.name for part in standing_parts(run.recipe, run.store, up_to)][3:]
    assert towers_too("encode") == ["text", "latents.pretrain"]
    assert towers_too("pretrain") == ["text", "latents.pretrain", "pretrain"]
    later = [name for key in PHASES for name in (specs.latents_part(key), key)]
    assert towers_too("finetune") == ["text", "latents.pretrain", "pretrain", *later]
