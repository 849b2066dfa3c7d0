from __future__ import annotations

import io

import pytest
from rich.console import Console
from typer.testing import CliRunner

from flows.cli.commands import app
from flows.cli.plan import print_rare_sizes
from sd3core.costs.phases import compare_backbones, phase_cost, text_bytes, zero_bytes
from sd3core.data.ingest import RAW_SCHEMA
from sd3core.data.manifest import Manifest, ShardEntry, commit_manifest
from sd3core.data.shards import Sample, write_shard
from sd3core.data.store import open_store
from sd3core.recipe_file import load_recipe, shipped_recipes
from sd3core.specs import INDEX, fingerprint, raw_fields, raw_folder


def test_training_state_shrinks_with_the_zero_stage():
    """bf16: 2 + 2 + 16 bytes a parameter, of which stage 1 shards 16, stage 2 18, stage 3 all 20. fp32: 4 + 4 + 12."""
    assert [zero_bytes(1_000, stage, 4, "bf16") for stage in range(4)] == [20_000, 8_000, 6_500, 5_000]
    assert [zero_bytes(1_000, stage, 4, "fp32") for stage in range(4)] == [20_000, 11_000, 8_000, 5_000]
    assert {zero_bytes(1_000, stage, 1, "bf16") for stage in range(4)} == {20_000}


def test_the_papers_pretraining():
    recipe = load_recipe("sd3-2b")
    plan = phase_cost(recipe, "pretrain", recipe.pretrain)
    assert plan.steps == 500_000
    assert plan.tokens == 16 * 16 + 77 + 77
    assert plan.latent_bytes == 32 * 32 * 16 * 4
    assert text_bytes(recipe) == 2 * (77 * (768 + 1280) + 768 + 1280 + 77 * 4096)
    # a byte a channel and two for every 128 of them; the pooled vectors have 16 bits
    assert text_bytes(load_recipe("sd3-2b", ["encode.text_dtype=int8"])) == 77 * (
        768 + 1280 + 4096
    ) * 130 // 128 + 2 * (768 + 1280)
    assert plan.checkpoint_bytes == 4 * 4 * plan.parameters
    assert plan.flops == plan.steps * plan.step_flops


def test_the_papers_backbones_side_by_side():
    """Depth 24 at 256 px: three streams cost parameters and no FLOPs to speak of, one set of weights the other way round."""
    recipe = load_recipe("sd3-2b")
    plans = {plan.name: plan for plan in compare_backbones(recipe, recipe.pretrain)}
    assert list(plans) == ["mmdit, 2 streams", "mmdit, 3 streams", "dit", "cross_dit", "uvit"]
    two, three, one = (plans[name] for name in ("mmdit, 2 streams", "mmdit, 3 streams", "dit"))
    assert (two.parameters, one.parameters) == (2_028_328_000, 1_039_245_376)
    own = phase_cost(recipe, "pretrain", recipe.pretrain)
    assert two.flops * 4 * recipe.pretrain.global_batch == own.step_flops  # with activations computed again
    assert two.flops < three.flops < 1.01 * two.flops and two.flops < one.flops < 1.02 * two.flops
    assert three.parameters - two.parameters == 23 * (18 * 1536**2 + 15 * 1536) + 5 * 1536**2 + 5 * 1536
    for architecture in ("dit", "cross_dit", "uvit"):
        chosen = load_recipe("sd3-2b", [f"model.architecture={architecture}"])
        assert phase_cost(chosen, "pretrain", chosen.pretrain).parameters == plans[architecture].parameters


def test_steps_and_checkpoints_are_rounded_up():
    recipe = load_recipe("tiny-test", ["pretrain.samples=97", "pretrain.checkpoint_every_samples=32"])
    plan = phase_cost(recipe, "pretrain", recipe.pretrain)
    assert (plan.steps, plan.checkpoints) == (13, 4)


def test_the_plan_says_epochs_and_what_a_bound_leaves():
    def rows(*more: str) -> tuple[list[list[str]], str]:
        sets = [part for setting in ("data.images=1000", *more) for part in ("--set", setting)]
        output = CliRunner().invoke(app, ["plan", "--recipe", "tiny-test", *sets], catch_exceptions=False).output
        return [line.split() for line in output.splitlines() if line.startswith("pretrain ")], output

    (training, _, cost, epochs), output = rows("pretrain.samples=20000")
    assert epochs[1:] == ["about", "800", "20,000", "25.0", "-"] and "warning" not in output
    (training, _, cost, epochs), output = rows("pretrain.samples=80000")
    assert "warning: pretrain: 100 epochs of 800 images" in output and training[3] == "80,000"
    (training, _, cost, epochs), output = rows("pretrain.samples=80000", "pretrain.max_epochs=10")
    assert epochs[1:] == ["about", "800", "8,000", "instead", "of", "80,000", "10.0", "10"] and "warning" not in output
    assert training[3] == cost[1] == "8,000"  # what it costs is what is left


@pytest.mark.parametrize("name", shipped_recipes())
def test_the_plan_of_every_recipe_says_what_it_costs(name):
    printed = CliRunner().invoke(app, ["plan", "--recipe", name], catch_exceptions=False)
    assert printed.exit_code == 0
    recipe = load_recipe(name)
    plans = [phase_cost(recipe, key, phase) for key, phase in recipe.phases()]
    rows = [line.split() for line in printed.output.splitlines()]
    for plan in plans:
        training, memory, _, epochs = [row for row in rows if row[:1] == [plan.key]]
        assert training[1] == f"{plan.parameters:,}"
        assert training[5] == f"{plan.steps:,}"
        assert f"{plan.steps * dict(recipe.phases())[plan.key].global_batch:,}" in epochs
        assert memory[1:5] == [f"{plan.rank_state_bytes[stage] / 2**30:,.2f}" for stage in range(4)]
        assert ["latents", plan.key, f"{plan.latent_bytes / 1e3:,.1f}"] in [row[:3] for row in rows]
        checkpoints = next(row for row in rows if row[1:3] == ["checkpoint(s)", plan.key])
        assert (checkpoints[0], checkpoints[-1]) == (
            str(plan.checkpoints),
            f"{plan.checkpoints * plan.checkpoint_bytes / 1e9:,.3f}",
        )
    captions = 1 if recipe.caption.captioner == "none" else 2
    text = next(row for row in rows if row[:1] == ["text,"])
    assert (text[1], text[5]) == (str(captions), f"{captions * text_bytes(recipe) / 1e3:,.1f}")
    for plan in compare_backbones(recipe, recipe.pretrain):
        row = [*plan.name.split(), f"{plan.parameters:,}", f"{plan.flops:.2e}"]
        assert row in [found[: len(row)] for found in rows]
    (training,) = [line for line in printed.output.splitlines() if line.startswith("training:")]
    assert f"{sum(plan.flops for plan in plans):.2e} FLOPs" in training and " h " in training


def test_what_trimmed_captions_take_is_told_as_the_most():
    trimmed = ["plan", "--recipe", "tiny-test", "--set", "text.padding=trimmed"]
    printed = CliRunner().invoke(app, trimmed, catch_exceptions=False).output
    size = f"{2 * text_bytes(load_recipe('tiny-test')) / 1e3:,.1f}"
    assert ["text,", "2", "caption(s)", "an", "image,", "at", "most", size] in [
        line.split()[:8] for line in printed.splitlines()
    ]


def test_the_plan_says_where_an_export_would_hold_no_average():
    every = ("--set", "pretrain.ema_every_steps=100")
    short = "warning: pretrain: its 12 steps end before the first update of the EMA (pretrain.ema_every_steps 100): an export"
    runs = (
        CliRunner().invoke(app, ["plan", "--recipe", "tiny-test", *more], catch_exceptions=False)
        for more in ((), every)
    )
    assert [short in printed.output for printed in runs] == [False, True]


def test_sizes_that_lie_half_a_patch_off_the_others_are_told():
    odd = ("finetune.0.side_px=80", "finetune.0.aspect_ratios=[1.0,0.6667]")
    even, mixed = (
        CliRunner().invoke(app, ["plan", *(word for change in changes for word in ("--set", change))]).output
        for changes in ((), odd)
    )
    assert "half a patch" not in even
    assert "note: finetune.0: of its sizes 80x80 px lie half a patch off the others' positions" in mixed


def test_what_becomes_of_rare_sizes_is_told_once_images_are_ingested(tmp_path):
    """From the raw shards alone: before an image is encoded, and without a word in the store."""
    store = open_store(str(tmp_path))
    settings = [
        "finetune.0.side_px=256",
        "finetune.0.aspect_ratios=[1.0]",
        "model.max_side_px=512",
        "finetune.0.global_batch=8",
    ]
    recipe = load_recipe("tiny-test", [*settings, "finetune.0.buckets={multiple_px: 16, max_ratio: 2, min_area: 0.9}"])

    def said() -> str:
        shown = Console(file=io.StringIO(), width=100)
        print_rare_sizes(recipe, store, shown)
        return shown.file.getvalue()

    assert "are told here when the images are ingested" in said()

    sizes = [(64, 64)] * 90 + [(64, 60)] * 3 + [(60, 32)]
    rows = [{"width": w, "height": h, "caption": "", "source": "", "split": "train"} for w, h in sizes]
    samples = [Sample(f"k{number:03d}", {"png": b"x"}, row) for number, row in enumerate(rows)]
    folder, fields = raw_folder(recipe), raw_fields(recipe)
    made = write_shard(store, folder, "00000.0123456789ab", samples, [], RAW_SCHEMA)
    entry = ShardEntry(
        number=0, stem=made.stem, rows=made.rows, bytes=made.bytes, digest=made.digest, index_digest=made.files[INDEX]
    )
    raw = Manifest(stage="raw", spec=fingerprint(fields), fields=fields, inputs={}, folder=folder, shards=[entry])
    commit_manifest(store, folder, raw)
    before = [entry.path for entry in store.list("")]
    told = said()
    assert "finetune.0: 3 images of sizes with fewer images than a batch of 8 cropped" in told
    assert "(240x256 to 256x256 px)" in told
    assert "finetune.0: 1 image in buckets with fewer images than a batch of 8" in told
    assert "left out of training" in told and "pretrain" not in told  # which has one size
    assert [entry.path for entry in store.list("")] == before
    recipe = recipe.model_copy(update={"encode": recipe.encode.model_copy(update={"latent_precision": "auto"})})
    assert said() == told
    store.put(f"{folder}/{made.stem}{INDEX}", b"damaged")
    assert f"were not looked for: {store.uri(folder)}/{made.stem}{INDEX}: its bytes are not those" in said()
