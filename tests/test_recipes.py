"""Recipes: the shipped ones, the words of their errors, overrides, and which fields change which stage's fingerprint."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from sd3core import specs
from sd3core.errors import DataError, RecipeError
from sd3core.format_changes import format_changes
from sd3core.formulation_names import EDM_RF_WEIGHT, FORMULATION_NAMES
from sd3core.recipe import Buckets, Compute, Evaluate, Recipe, ReleasedTowers
from sd3core.recipe_compute import ACTOR_STAGES
from sd3core.recipe_file import load_recipe, shipped_recipes
from sd3core.recipe_filter import Filter
from sd3core.specs import fingerprint

RECIPES = Path(__file__).resolve().parent.parent / "infra/recipes"
PAPER = {  # depth, and parameters without and with QK-norm: sd3-facts, counted on the released architecture
    "sd3-2b": (24, 2_028_328_000, 2_028_334_144),
    "sd3-8b": (38, 8_056_617_792, 8_056_627_520),
}


def problem(name: str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(name, list(overrides))
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_shipped_recipes():
    assert set(shipped_recipes()) >= {"mini", "tiny-test", "small", "sd3-2b", "sd3-8b"}


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads_under_its_own_name(name):
    recipe = load_recipe(name)
    assert (recipe.name, recipe.run) == (name, name)
    assert Recipe.model_validate(recipe.model_dump(mode="json")) == recipe  # as it is stored with a checkpoint


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_models(name):
    from sd3core.mmdit import count_parameters

    recipe = load_recipe(name)
    depth, plain, normed = PAPER[name]
    assert recipe.model.depth == depth
    assert [phase.side_px for _, phase in recipe.phases()] == [256, 512, 1024]
    counts = [count_parameters(recipe.model_config_for(phase)) for _, phase in recipe.phases()]
    assert counts == [normed if phase.qk_norm else plain for _, phase in recipe.phases()]
    assert count_parameters(recipe.model_config_for(recipe.pretrain.model_copy(update={"qk_norm": None}))) == plain
    assert count_parameters(recipe.model_config_for(recipe.pretrain.model_copy(update={"qk_norm": "rms"}))) == normed


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrain.sample=9", "recipe tiny-test: unknown key pretrain.sample; did you mean 'samples'?"),
        ("pretrian.samples=9", "recipe tiny-test: unknown key pretrian; did you mean 'pretrain'?"),
        (
            "finetune.0.learning_rat=1",
            "recipe tiny-test: unknown key finetune.0.learning_rat; did you mean 'learning_rate'?",
        ),
        ("towers.small.vae.stpes=1", "recipe tiny-test: unknown key towers.small.vae.stpes; did you mean 'steps'?"),
        ("evaluate.weights=live", "recipe tiny-test: evaluate.weights: Input should be 'both' or 'ema' (it is 'live')"),
        ("text.zzz=1", "recipe tiny-test: unknown key text.zzz; valid here: clip_tokens, t5_tokens, padding, null"),
        (
            "text.clip_tokens=78",
            "recipe tiny-test: text.clip_tokens: Input should be less than or equal to 77 (it is 78)",
        ),
        (
            "data.held_out_fraction=1.5",
            "recipe tiny-test: data.held_out_fraction: Input should be less than or equal to 1 (it is 1.5)",
        ),
        (
            "pretrain.zero_stage=0",
            "recipe tiny-test: pretrain: zero_stage 0 trains bf16 wrongly (first update off by a quarter); take zero_stage 1 or more, or precision fp32",
        ),
        ("pretrain.micro_batch=3", "recipe tiny-test: pretrain: global_batch 8 is not a multiple of micro_batch 3"),
        (
            "compute.train_ranks=3",
            "recipe tiny-test: pretrain.global_batch 8 is not a multiple of pretrain.micro_batch 4 x compute.train_ranks 3",
        ),
        ("finetune.0.side_px=40", "recipe tiny-test: finetune.0.side_px 40 is not a multiple of 16 (VAE 8 x patch 2)"),
        (
            "data.source=folder",
            "recipe tiny-test: data: data.folder must name the folder of images when data.source is 'folder'",
        ),
        (
            "towers.small=null",
            "recipe tiny-test: towers: towers needs exactly one of towers.released (paths) and towers.small (made by the towers stage)",
        ),
        (
            "finetune.0.formulation=rf/lognorm(0,-1)",
            "recipe tiny-test: finetune.0.formulation: formulation 'rf/lognorm(0,-1)': its standard deviation of logit t, -1, is not between 0.05 and 5 (it is 'rf/lognorm(0,-1)')",
        ),
        (
            "finetune.0.formulation=eps/linear",
            "recipe tiny-test: finetune.0: eps/linear has a fixed table of noise levels, which shift 2 would leave; take shift 1",
        ),
        (
            "finetune.0.formulation=edm/rf",
            "recipe tiny-test: finetune.0.formulation edm/rf cannot go on from pretrain.formulation rf/lognorm(0.00,1.00): their networks predict different things, or are told time differently",
        ),
        (
            "data.aspect_ratios=[]",
            "recipe tiny-test: data.aspect_ratios: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            "finetune.0.aspect_ratios=[]",
            "recipe tiny-test: finetune.0.aspect_ratios: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            "pretrain.aspect_ratios=[]",
            "recipe tiny-test: pretrain.aspect_ratios: Tuple should have at least 1 item after validation, not 0",
        ),
        (
            "evaluate.sampler=ddim",
            "recipe tiny-test: evaluate.sampler: Input should be 'euler', 'heun', 'dpm++2m' or 'dpm++2m-sde' (it is 'ddim')",
        ),
        ("evaluate.shift=0", "recipe tiny-test: evaluate.shift: Input should be greater than 0 (it is 0)"),
        ("data.aspect_ratios.1=0", "recipe tiny-test: data.aspect_ratios.1: Input should be greater than 0 (it is 0)"),
        (
            "finetune.0.aspect_ratios.1=-1.5",
            "recipe tiny-test: finetune.0.aspect_ratios.1: Input should be greater than 0 (it is -1.5)",
        ),
        (
            "finetune.0.aspect_ratios.1=.inf",
            "recipe tiny-test: finetune.0.aspect_ratios.1: Input should be a finite number (it is inf)",
        ),
        (
            "finetune.0.aspect_ratios=[1.0, 0.1, 8.0]",
            "recipe tiny-test: finetune.0: its bucket 208x16 px is longer than model.max_side_px 128; raise that, or leave out the aspect ratio",
        ),
        (
            "pretrain.side_px=144",
            "recipe tiny-test: pretrain: its bucket 144x144 px is longer than model.max_side_px 128; raise that, or leave out the aspect ratio",
        ),
        (
            "towers.small.clip_g.seed=1",
            "recipe tiny-test: towers.small: clip_g.seed and clip_l.seed are both 1, so the two would learn alike; give them different seeds",
        ),
        (
            "towers.small.t5.width=48",
            "recipe tiny-test: towers.small: t5.width 48 is less than clip_l.width 32 + clip_g.width 32; take a T5 as wide as both CLIPs together or wider",
        ),
        (
            "towers.small.vae.channels=[8, 8, 16]",
            "recipe tiny-test: towers.small.vae.channels: Tuple should have at least 4 items after validation, not 3",
        ),
        (
            "towers.small.vae.crop_px=20",
            "recipe tiny-test: towers.small.vae.crop_px: Input should be a multiple of 8 (it is 20)",
        ),
        (
            "pretrain.side_px=8",
            "recipe tiny-test: pretrain.side_px: Input should be greater than or equal to 16 (it is 8)",
        ),
        ("seed=-1", "recipe tiny-test: seed: Input should be greater than or equal to 0 (it is -1)"),
        (
            "pretrain.learning_rate=.inf",
            "recipe tiny-test: pretrain.learning_rate: Input should be a finite number (it is inf)",
        ),
        ("pretrain.betas=[0.9, 1.5]", "recipe tiny-test: pretrain.betas.1: Input should be less than 1 (it is 1.5)"),
        (
            "data.images=1000000000000",
            "recipe tiny-test: data.images: Input should be less than or equal to 100000000 (it is 1000000000000)",
        ),
        (
            "model.architecture=vit",
            "recipe tiny-test: model.architecture: Input should be 'mmdit', 'dit', 'cross_dit' or 'uvit' (it is 'vit')",
        ),
        (
            "model={depth: 1, architecture: dit, streams: 3}",
            "recipe tiny-test: model: streams 3 is for architecture 'mmdit'; leave it out for 'dit'",
        ),
        (
            "model={depth: 1, architecture: uvit, dual_attention_blocks: 1}",
            "recipe tiny-test: model: dual_attention_blocks 1 is for architecture 'mmdit'; leave it out for 'uvit'",
        ),
        (
            "model.dual_attention_blocks=2",
            "recipe tiny-test: model: dual_attention_blocks 2 is more than depth 1",
        ),
        (
            "finetune.0.buckets={}",
            "recipe tiny-test: finetune.0: buckets makes its own aspect ratios; leave out aspect_ratios or buckets",
        ),
        (
            "pretrain.buckets={}",
            "recipe tiny-test: pretrain.buckets must be left out: pretraining is on square crops",
        ),
        (
            "pretrain.buckets={multiple_px: 48}",
            "recipe tiny-test: pretrain: buckets: no two multiples of 48 px have an area between buckets.min_area 0.9 and 1 of side_px 32 squared; take a smaller one of the two",
        ),
        (
            "finetune.0.buckets.multiple_px=24",
            "recipe tiny-test: finetune.0.buckets.multiple_px: Input should be a multiple of 16 (it is 24)",
        ),
        (
            "finetune.0={side_px: 96, buckets: {}, samples: 32, global_batch: 4, micro_batch: 2, checkpoint_every_samples: 32}",
            "recipe tiny-test: finetune.0: its bucket 192x48 px is longer than model.max_side_px 128; raise that, or lower buckets.max_ratio",
        ),
        (
            "model.depth=100000",
            "recipe tiny-test: model.depth: Input should be less than or equal to 256 (it is 100000)",
        ),
        ("towers.small.clip_l.heads=3", "recipe tiny-test: towers.small.clip_l: width 32 is not a multiple of heads 3"),
        ("towers.small.t5.heads=3", "recipe tiny-test: towers.small.t5: width 64 is not a multiple of heads 3"),
        (
            "towers.small.judge.patch_px=64",
            "recipe tiny-test: towers.small.judge: image_px 32 is not a multiple of patch_px 64",
        ),
        (
            "pretrain",
            "override 'pretrain': write it as section.key=value; in `make SET=...` a value has no spaces inside",
        ),
        ("finetune.1.samples=8", "override 'finetune.1.samples=8': '1' is not one of the positions 0 to 0"),
        ("finetune.first.samples=8", "override 'finetune.first.samples=8': 'first' is not one of the positions 0 to 0"),
        (
            "run=[a",
            "override 'run=[a': the value is not YAML (line 1, column 3: expected ',' or ']', but got '<stream end>'); put it in quotes; in `make SET=...` a value has no spaces inside",
        ),
    ],
)
def test_errors_name_the_key_and_the_mend(override, message):
    assert problem("tiny-test", override) == message


def test_errors_of_the_file_itself(tmp_path):
    assert problem("mimi").startswith("recipe 'mimi': no recipe of that name; did you mean 'mini'?; shipped: mini, ")
    assert problem("mimi").endswith("; or give a path that ends in .yaml")
    assert problem("zzzz").startswith("recipe 'zzzz': no recipe of that name; shipped: mini, ")
    missing = tmp_path / "mine.yaml"
    assert problem(str(missing)).startswith(f"recipe {missing}: no such file; shipped: mini, ")
    missing.write_text("a: [1\n")
    assert (
        problem(str(missing))
        == f"recipe {missing}: not YAML: line 2, column 1: expected ',' or ']', but got '<stream end>'"
    )
    missing.write_text("- a\n")
    assert problem(str(missing)) == f"recipe {missing}: a recipe is a mapping of sections, this file is not"
    missing.write_bytes(b"name: \xff\n")
    assert problem(str(missing)) == f"recipe {missing}: not UTF-8 text (byte 6); save it as UTF-8"
    fields = load_recipe("tiny-test").model_dump(mode="json", exclude={"model"})
    missing.write_text(yaml.safe_dump(fields))
    assert problem(str(missing)) == f"recipe {missing}: model is missing"


def test_a_file_that_is_named_without_its_ending(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my-recipe.yaml").write_text("")
    assert problem("my-recipe").startswith(
        "recipe 'my-recipe': no recipe of that name; for the file write my-recipe.yaml; "
    )


def test_a_misspelt_key_is_named_before_the_one_that_is_missing_for_it(tmp_path):
    fields = load_recipe("tiny-test").model_dump(mode="json")
    fields["pretrain"]["sampels"] = fields["pretrain"].pop("samples")
    mine = tmp_path / "mine.yaml"
    mine.write_text(yaml.safe_dump(fields))
    assert problem(str(mine)) == f"recipe {mine}: unknown key pretrain.sampels; did you mean 'samples'?"
    mine.write_text(yaml.safe_dump(fields | {"sed": 1, "seed": -1}))
    assert problem(str(mine)) == f"recipe {mine}: unknown key pretrain.sampels; did you mean 'samples'? (and 2 more)"


def test_a_file_that_cannot_be_read(tmp_path, monkeypatch):
    locked = tmp_path / "locked.yaml"
    locked.write_text("name: x\n")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(locked), "read_text", refused)  # file modes do not stop root
    assert problem(str(locked)) == f"recipe {locked}: cannot be read (Permission denied)"


def test_reading_a_recipe_loads_no_torch():
    script = (
        "import sys; from sd3core.recipe_file import load_recipe; load_recipe('mini'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_bf16_needs_zero_and_fp32_does_not():
    changed = load_recipe("tiny-test", ["pretrain.zero_stage=0", "pretrain.precision=fp32"])
    assert (changed.pretrain.zero_stage, changed.pretrain.precision) == (0, "fp32")


@pytest.mark.parametrize("override", ["model.start_from=models/sd3", "store=local/store"])
def test_a_path_that_workers_would_look_for_elsewhere_is_refused(override):
    key, _, path = override.rpartition(".")[2].partition("=")
    with pytest.raises(RecipeError, match=f"{key} {path} is relative, .*: give the whole path"):
        load_recipe("tiny-test", [override])
    with pytest.raises(RecipeError, match="folder photos is relative"):
        load_recipe("tiny-test", ["data.source=folder", "data.folder=photos"])


@pytest.mark.parametrize("key", ["caption.model", *(f"towers.released.{name}" for name in ReleasedTowers.model_fields)])
def test_a_folder_of_released_weights_is_named_by_its_whole_path(key):
    """A relative one is of the shell's folder in `sd3 plan`, and of another in a run's process."""
    for path in ("models/x", "./x", "x"):
        with pytest.raises(RecipeError, match=f"{key.rpartition('.')[2]} {path} is relative, .*: give the whole path"):
            load_recipe("sd3-2b", [f"{key}={path}"])
    load_recipe("sd3-2b", [f"{key}=/models/x"])
    load_recipe("sd3-2b", ["towers.released.vae=~/models/vae"])


def test_overrides_reach_every_place():
    changed = load_recipe(
        "tiny-test",
        [
            "pretrain.learning_rate=3e-4",
            "finetune.0.samples=64",
            "finetune.0.aspect_ratios.1=0.5",
            "data.aspect_ratios=[1.0]",
            'run="2026"',
            "store=s3://bucket/a=b",
            "evaluate.precision=fp32",
            "towers.small.vae.steps=9",
        ],
    )
    assert changed.pretrain.learning_rate == 3e-4
    assert changed.finetune[0].samples == 64
    assert changed.finetune[0].aspect_ratios == (1.0, 0.5)
    assert changed.data.aspect_ratios == (1.0,)
    assert (changed.run, changed.store, changed.evaluate.precision) == ("2026", "s3://bucket/a=b", "fp32")
    assert changed.towers.small.vae.steps == 9
    assert load_recipe("tiny-test").finetune[0].samples == 32  # the file is read anew


def test_what_phases_share_stands_once(tmp_path):
    """`training:` in every phase that does not say otherwise: the same recipe as one that is written out."""
    fields = yaml.safe_load((RECIPES / "tiny-test.yaml").read_text())
    shared = fields.pop("training")
    fields["finetune"].append(
        {"side_px": 96, "samples": 8, "global_batch": 8, "micro_batch": 4, "qk_norm": "rms", "ema_decay": 0.5}
    )
    for phase in (fields["pretrain"], *fields["finetune"]):
        phase |= shared | phase
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(fields))
    for phase in (fields["pretrain"], *fields["finetune"]):
        for key in shared:
            if phase[key] == shared[key]:
                del phase[key]
    (tmp_path / "short.yaml").write_text(yaml.safe_dump(fields | {"training": shared}))
    short, whole = (load_recipe(str(tmp_path / f"{name}.yaml")) for name in ("short", "whole"))
    assert short == whole and [phase.ema_decay for _, phase in short.phases()] == [0.9, 0.9, 0.5]
    assert fingerprint(short.model_dump(mode="json")) == fingerprint(whole.model_dump(mode="json"))


@pytest.mark.parametrize(("overrides", "said"), [
    (["training.learning_rat=1"], "unknown key training.learning_rat; did you mean 'learning_rate'?"),
    (["trainin.learning_rate=1"], "unknown key trainin; did you mean 'training'?"),
    (["training.ema_decay=2"], "training.ema_decay: Input should be less than 1"),
    (["training.ema_decay=2", "pretrain.ema_decay=0.5"], "training.ema_decay: Input should be less than 1"),
    (["training.ema_decay=0.5", "finetune.0.ema_decay=2"], "finetune.0.ema_decay: Input should be less than 1"),
    (["training.buckets={max_ratio: 0.5}"], "training.buckets.max_ratio: Input should be greater than or equal to 1"),
    (["training=5"], "training: give it as keys of a phase and their values"),
])  # fmt: skip
def test_what_is_wrong_in_the_shared_part_is_named_there(overrides, said):
    with pytest.raises(RecipeError) as raised:
        load_recipe("tiny-test", overrides)
    assert said in str(raised.value)


def test_a_phases_own_value_wins_and_an_override_reaches_all_phases():
    recipe = load_recipe("tiny-test", ["training.precision=fp32", "finetune.0.precision=bf16"])
    assert [phase.precision for _, phase in recipe.phases()] == ["fp32", "bf16"]
    with pytest.raises(
        RecipeError, match="training.learning_rate reaches no phase, since each has its own; set pretrain"
    ):
        load_recipe("tiny-test", ["training.learning_rate=0.5"])
    # nothing of the shared one is left
    both = load_recipe("tiny-test", ["pretrain.ema_decay=0.5", "finetune.0.ema_decay=0.6"])
    assert [phase.ema_decay for _, phase in both.phases()] == [0.5, 0.6]


def test_every_formulation_of_the_paper_can_be_asked_for():
    for name in (*FORMULATION_NAMES, EDM_RF_WEIGHT):
        phases = ("pretrain", "finetune.0")
        recipe = load_recipe("tiny-test", ["finetune.0.shift=1", *(f"{phase}.formulation={name}" for phase in phases)])
        assert {phase.formulation for _, phase in recipe.phases()} == {name}
    of_one_family = ["pretrain.formulation=edm(-1.20,1.20)", "finetune.0.formulation=edm/cos"]
    assert load_recipe("tiny-test", of_one_family).finetune[0].shift == 2


def test_pictures_may_be_drawn_at_another_shift_where_the_formulation_has_one():
    evaluate = load_recipe("tiny-test", ["evaluate.shift=3"]).evaluate
    assert {evaluate.shift_for(phase) for _, phase in load_recipe("tiny-test").phases()} == {3}
    fixed = ["finetune.0.shift=1", "pretrain.formulation=eps/linear", "finetune.0.formulation=eps/linear"]
    with pytest.raises(
        RecipeError, match="evaluate.shift: eps/linear has a fixed table of noise levels, which shift 3"
    ):
        load_recipe("tiny-test", [*fixed, "evaluate.shift=3"])


def under(*prefixes: str, **values: Any) -> dict[str, Any]:
    return {f"{prefix}.{key}": value for prefix in prefixes for key, value in values.items()}


# Which stages a field changes. Every field of the tiny-test recipe stands here: a new one has to say where it belongs.
TRAINED = {"pretrain", "finetune"}
LATENTS = {"latents.pretrain", "latents.finetune"}
EVERYTHING = {"raw", "towers", "captions", "text", *LATENTS, *TRAINED}
CLIP = {
    "width": 48,
    "layers": 3,
    "heads": 1,
    "projection": 40,
    "image_px": 48,
    "patch_px": 8,
    "batch": 4,
    "steps": 9,
    "learning_rate": 0.1,
    "seed": 9,
}
T5 = {"width": 32, "layers": 2, "heads": 4, "batch": 4, "steps": 9, "learning_rate": 0.1, "seed": 9}
VAE = {
    "channels": (8, 16, 16, 16),
    "layers_per_block": 2,
    "crop_px": 16,
    "batch": 8,
    "steps": 9,
    "learning_rate": 0.1,
    "kl_weight": 0.1,
}
READ = {
    "image_side_px": 48,
    "aspect_ratios": (1.0,),
    "max_objects": 1,
    "min_side_px": 16,
    "max_image_pixels": 10_000,
    "max_caption_chars": 100,
    "rows_per_shard": 16,
    "held_out_fraction": 0.1,
}
LEARNED = {
    "seed": 9,
    "global_batch": 16,
    "learning_rate": 1.0,
    "warmup_samples": 8,
    "schedule": "cosine",
    "optimizer": "muon",
    "matrix_rate": 2.0,
    "betas": (0.9, 0.95),
    "adam_eps": 1e-15,
    "weight_decay": 0.1,
    "grad_clip": 2.0,
    "formulation": "rf",
    "shift": 3.0,
    "text_dropout": 0.1,
    "text_dropout_together": 0.1,
    "original_caption_fraction": 0.1,
    "ema_decay": 0.5,
    "ema_every_steps": 2,
    "precision": "fp32",
}
HOW = {
    "micro_batch": 1,
    "max_epochs": 3,  # what it leaves of the samples counts, where those do
    "checkpoint_every_samples": 16,
    "activation_checkpointing": True,
    "zero_stage": 1,
}  # never what comes out
EVALUATE = dict.fromkeys(Evaluate.model_fields, 3) | {
    "sampler": "heun",
    "precision": "fp32",
    "checkpoints": "last",
    "weights": "ema",
}
COMPUTE = dict.fromkeys(
    (
        *(key for key in Compute.model_fields if key not in ACTOR_STAGES),
        *(f"{stage}.{key}" for stage in ACTOR_STAGES for key in type(getattr(Compute(), stage)).model_fields),
    ),
    3,
) | {
    "ray_address": "ray.internal:6379",
    "autoscaling": True,
    "train_ranks": 1,
}
CHANGES: list[tuple[set[str], dict[str, Any]]] = [
    (EVERYTHING, {"seed": 1, **under("data", **READ)}),
    ({"towers", *LATENTS, *TRAINED}, under("towers.small.vae", **VAE)),
    ({"towers", "text", *TRAINED}, under("towers.small.clip_l", "towers.small.clip_g", **CLIP)),
    ({"towers", "text", *TRAINED}, under("towers.small.t5", **T5)),
    ({"towers"}, under("towers.small.judge", **CLIP)),  # it judges, nothing is trained on it
    ({"towers", "text", *LATENTS, *TRAINED}, under("towers.small", vocabulary=700, images=32)),
    (
        {"captions", "text", *TRAINED},
        under("caption", captioner="none", model="/models/x", prompt="What?", max_new_tokens=9),
    ),
    (
        {"text", *TRAINED},
        under("text", clip_tokens=8, t5_tokens=12, padding="trimmed") | under("encode", text_dtype="float32"),
    ),
    ({"text", *TRAINED}, under("encode", text_precision="bf16")),
    ({*LATENTS, *TRAINED}, under("encode", latent_dtype="float16", latent_precision="bf16", flip=True)),
    # the small world's captioner has no model, and no rules
    (set(), under("caption", precision="bf16", image_side_px=64, temperature=1.0, seed=1, max_share=0.5)),
    (set(), under("caption", endpoint="http://a/v1", revision="1", api_key_env="KEY")),
    (set(), under("caption", requests_in_flight=4, request_timeout_s=1.0, retry_s=1.0)),
    (TRAINED, under("text", null="empty") | under("model", depth=2, base_side_px=64, max_side_px=256)),
    (TRAINED, under("model", architecture="dit", streams=3, dual_attention_blocks=1)),
    ({"latents.pretrain", *TRAINED}, under("pretrain", side_px=48)),
    ({"latents.finetune", "finetune"}, under("finetune.0", side_px=48, aspect_ratios=(1.0,), buckets=Buckets())),
    ({"latents.pretrain", *TRAINED}, under("pretrain", buckets=Buckets())),
    ({"finetune"}, under("finetune.0", qk_norm_start="one")),
    (set(), under("pretrain", qk_norm_start="one")),  # it inserts no norm
    (TRAINED, under("model", start_from="models/sd3")),
    (TRAINED, under("pretrain", qk_norm="rms", **LEARNED)),
    ({"finetune"}, under("finetune.0", qk_norm=None, **LEARNED)),
    (
        {"finetune"},
        under("pretrain", samples=192),
    ),  # it goes on under its constant rate, and the next phase starts later
    (set(), under("finetune.0", samples=192)),
    (
        set(),
        under("pretrain", "finetune.0", min_scale=0.9),
    ),  # it chooses rows, and the shards that lose some are named by that
    (set(), {"filter": Filter(min_side_px=50)}),  # rows are no setting: shards are named by those that stay
    (set(), {"name": "other", "run": "other", "store": "s3://bucket/x"}),
    (set(), under("data", folder="/other", images=960)),  # more shards of the same kind
    # of what is read
    (set(), under("data", caption="first_line", background="black", image_field="path", caption_fields=("text",))),
    (set(), under("data", class_caption="{class}", class_names="/names.json", sidecars="take", table="/t.csv")),
    (set(), under("data", urls=("/x.tar",))),
    (set(), under("caption", "encode", batch=1) | under("pretrain", "finetune.0", **HOW)),
    (set(), under("evaluate", **EVALUATE) | under("compute", **COMPUTE)),
    (set(), under("export", checkpoint="best:validation_loss")),  # the export names the checkpoint that it takes
]
OF_A_FOLDER = ["data.source=folder", "data.folder=/pictures", "caption.captioner=none"]
# Names are in paths, not in fingerprints; the rest cannot be changed alone.
NOT_ALONE = {"data.name", "data.source", "towers.name", "towers.released", "pretrain.aspect_ratios"}
CASES = [(key, value, stages) for stages, fields in CHANGES for key, value in fields.items()]


def stage_specs(recipe: Recipe) -> dict[str, str]:
    """Every stage's fingerprint, each stage's bytes being named by what they are made from, as in a run that makes them all."""
    small = recipe.towers.small
    shared = {"raw": specs.raw_fields(recipe), "vocabulary": small.vocabulary, "images": small.images}
    digests = {
        name: fingerprint(shared | {"tower": getattr(small, name).model_dump(mode="json")})
        for name in ("vae", "clip_l", "clip_g", "t5")
    }
    found = {
        "raw": fingerprint(specs.raw_fields(recipe)),
        "towers": fingerprint(specs.towers_fields(recipe)),
        "captions": fingerprint(specs.captions_fields(recipe)),
        "text": fingerprint(specs.text_fields(recipe, digests)),
    }
    init = recipe.model.start_from  # its content stands under the path
    for key, phase in recipe.phases():
        name = key.partition(".")[0]
        found[f"latents.{name}"] = fingerprint(specs.latents_fields(recipe, phase, digests))
        found[name] = fingerprint(
            specs.train_fields(recipe, phase, latents=found[f"latents.{name}"], text=found["text"], init=init)
        )
        init = f"{found[name]} after {phase.last_samples}"
    return found


def leaves(fields: Any, path: str = "") -> set[str]:
    if isinstance(fields, dict):
        parts = fields.items()
    elif isinstance(fields, list) and fields and isinstance(fields[0], dict):
        parts = enumerate(fields)
    else:
        return {path.removeprefix(".")}
    return {leaf for key, value in parts for leaf in leaves(value, f"{path}.{key}")}


def changed(part: Any, key: str, value: Any) -> Any:
    """A recipe with one field changed and nothing validated: a fingerprint is asked, not a run."""
    head, _, rest = key.partition(".")
    if isinstance(part, tuple):
        position = int(head)
        return (*part[:position], changed(part[position], rest, value), *part[position + 1 :])
    return part.model_copy(update={head: changed(getattr(part, head), rest, value) if rest else value})


def test_the_table_has_every_field():
    known = {key for key, _, _ in CASES}
    assert leaves(load_recipe("tiny-test").model_dump(mode="json")) - known == NOT_ALONE
    assert len(known) == len(CASES)


@pytest.mark.parametrize(("key", "value", "stages"), CASES, ids=[key for key, _, _ in CASES])
def test_a_field_changes_exactly_the_stages_that_depend_on_it(key, value, stages):
    recipe = load_recipe("tiny-test")
    before, after = stage_specs(recipe), stage_specs(changed(recipe, key, value))
    assert {stage for stage in before if before[stage] != after[stage]} == stages


def test_the_length_counts_where_the_schedule_depends_on_it():
    def spec(*overrides: str) -> str:
        return stage_specs(load_recipe("tiny-test", list(overrides)))["pretrain"]

    cosine, longer = "pretrain.schedule=cosine", "pretrain.samples=192"
    assert spec() == spec(longer)
    assert len({spec(), spec(cosine), spec(cosine, longer)}) == 3


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export.checkpoint=best"], "'best' is neither last nor best:SCORE"),
        (["export.checkpoint=best:fids"], "no score 'fids' chooses a checkpoint; did you mean fid?"),
        (["export.checkpoint=best:fid", "evaluate.checkpoints=last"], "take evaluate.checkpoints all"),
        (["export.checkpoint=best:shapes_bench", "evaluate.earlier_bench_prompts_per_task=1"], "over 1 prompts a task"),
        (["export.checkpoint=best:shapes_bench/colors", *OF_A_FOLDER], "is of the small world alone"),
    ],
)
def test_a_best_checkpoint_that_no_score_will_name_is_refused_before_anything_starts(overrides, said):
    with pytest.raises(RecipeError, match="export.checkpoint") as refused:
        load_recipe("tiny-test", overrides)
    assert said in str(refused.value)


def test_a_best_checkpoint_is_chosen_by_a_known_score():
    assert load_recipe("tiny-test").export.score is None
    same = ["evaluate.earlier_bench_prompts_per_task=2"]  # as many as the last one's
    assert load_recipe("tiny-test", ["export.checkpoint=best:shapes_bench", *same]).export.score == "shapes_bench"
    assert load_recipe("tiny-test", ["export.checkpoint=best:fid", *OF_A_FOLDER]).export.score == "fid"


def test_a_bound_on_epochs_counts_as_the_length_that_it_leaves():
    def spec(*overrides: str, samples: int | None = None) -> str:
        recipe = load_recipe("tiny-test", list(overrides))
        digests = {"latents": "0", "text": "0", "init": None}
        return fingerprint(specs.train_fields(recipe, recipe.pretrain, samples=samples, **digests))

    cosine, bound = "pretrain.schedule=cosine", "pretrain.max_epochs=2"
    assert spec(bound, samples=48) == spec()  # under a constant rate a longer training goes on from it
    assert spec(cosine, bound, samples=48) == spec(cosine, "pretrain.samples=48") != spec(cosine)


def test_a_training_seed_is_the_phases_own_or_that_of_the_one_before():
    def seeds(*overrides: str) -> list[int]:
        recipe = load_recipe("tiny-test", ["seed=5", *overrides])
        return [recipe.training_seed(phase) for _, phase in recipe.phases()]

    assert seeds() == [5, 5]
    assert seeds("pretrain.seed=1") == [1, 1]
    assert seeds("pretrain.seed=0", "finetune.0.seed=2") == [0, 2]
    as_it_is = stage_specs(load_recipe("tiny-test"))
    assert stage_specs(load_recipe("tiny-test", ["pretrain.seed=0"])) == as_it_is  # the recipe's seed by name
    other = stage_specs(load_recipe("tiny-test", ["pretrain.seed=1"]))
    assert {stage for stage in as_it_is if other[stage] != as_it_is[stage]} == TRAINED


def test_fields_that_came_later_leave_fingerprints_as_they_were(monkeypatch):
    """Golden: from before there were other architectures, a rule of buckets, and fitted scales of QK-norm. The small world had no
    number then; training's format 1 had the length in every fingerprint.
    """
    for kind, number in (("train", 2), ("latents", 1)):
        monkeypatch.setitem(specs.FORMATS, kind, number)
    raw_fields = specs.raw_fields
    monkeypatch.setattr(specs, "raw_fields", lambda r: {k: v for k, v in raw_fields(r).items() if k != "world"})
    recipe = load_recipe("tiny-test", ["finetune.0.qk_norm_start=one"])
    fields = {"latents": "0", "text": "0", "init": None}
    trained = [specs.train_fields(recipe, phase, **fields) for _, phase in recipe.phases()]
    found = [fingerprint(made) for made in trained]
    for made, (_, phase) in zip(trained, recipe.phases(), strict=True):
        made["format"], made["training"]["samples"] = 1, phase.samples
    found += [fingerprint(made) for made in trained]
    found += [fingerprint(specs.latents_fields(recipe, phase, {"vae": "0"})) for _, phase in recipe.phases()]
    assert found[:2] == ["f63697300ede", "264b8c208169"]
    assert found[2:] == ["a875bcf22aa4", "22066f934c56", "4c1cf6ccef01", "996f973eedb4"]


def test_a_folder_read_as_before_has_the_fingerprint_of_before():
    """Golden: from before a source named its fields."""

    def spec(*more: str) -> str:
        folder = ["data.source=folder", "data.folder=/photos", "caption.captioner=none"]
        return fingerprint(specs.raw_fields(load_recipe("tiny-test", [*folder, *more])))

    assert spec() == "5bcd69704cc3"
    assert spec("data.caption=first_line", "data.background=black") == "0dd6368e6311"
    classes = "class_caption='a {class}'"
    settings = ["image_field=path", "caption_fields=[text]", "caption_fields=[a]", classes, "sidecars=take"]
    assert len({spec(), *(spec(f"data.{setting}") for setting in settings)}) == 1 + len(settings)
    # a path: its words are in the shards
    assert spec(f"data.{classes}", "data.class_names=/names.json") == spec(f"data.{classes}")


def test_fields_of_a_source_are_names_each_once():
    folder = ["data.source=folder", "data.folder=/photos", "caption.captioner=none"]
    assert load_recipe("tiny-test", [*folder, "data.caption_fields=text"]).data.caption_fields == ("text",)
    for settings, words in (
        (["data.image_field=path"], "data: image_field is of a source that is read; leave it out for 'small_world'"),
        ([*folder, "data.caption_fields=[a,b,a]"], "data: caption_fields names a field twice; name each once"),
        ([*folder, "data.caption_fields=[]"], "data.caption_fields: "),
        ([*folder, "data.image_field=''"], "data.image_field: "),
        (
            [*folder, "data.table=/t.csv"],
            "data.table must name the table of images when data.source is 'table', and only",
        ),
        (
            [*folder, "data.source=table"],
            "data.table must name the table of images when data.source is 'table', and only",
        ),
        (
            [*folder, "data.source=table", "data.table=t.csv"],
            "data: table t.csv is relative, and workers run in folders",
        ),
        (
            [*folder, "data.source=table", "data.table=s3://a/t.csv"],
            "data: table s3://a/t.csv is a URL, and table lies on",
        ),
        ([*folder, "data.class_names=/names.json"], "data: class_names is for class_caption; give that, too"),
        ([*folder, "data.class_caption=a photo"], "data: class_caption has the class as {class} and no other braces"),
        ([*folder, "data.class_caption='{class} {x}'"], "class_caption has the class as {class} and no other braces"),
        (["data.class_caption='{class}'"], "data: class_caption is of source 'folder'; leave it out for 'small_world'"),
        ([*folder, "data.class_caption='{class}'", "data.class_names=n.json"], "data: class_names n.json is relative"),
    ):
        with pytest.raises(RecipeError, match=re.escape(words)):
            load_recipe("tiny-test", settings)


def test_a_folders_first_lines_are_another_data_set_and_whole_captions_are_the_one_from_before():
    folder = ["data.source=folder", "data.folder=/photos", "caption.captioner=none"]
    fields = [
        specs.raw_fields(load_recipe("tiny-test", [*folder, *more])) for more in ([], ["data.caption=first_line"])
    ]
    assert "caption" not in fields[0]["data"] and fields[1]["data"]["caption"] == "first_line"


def test_a_phase_inserts_qk_norm_where_the_one_before_has_none():
    tiny = load_recipe("tiny-test")
    both = load_recipe("tiny-test", ["pretrain.qk_norm=rms"])
    assert [tiny.inserts_qk_norm(phase) for _, phase in tiny.phases()] == [False, True]
    assert [both.inserts_qk_norm(phase) for _, phase in both.phases()] == [False, False]


@pytest.mark.parametrize("architecture", ["mmdit", "dit", "cross_dit", "uvit"])
def test_every_architecture_has_the_recipes_sizes(architecture):
    recipe = load_recipe("tiny-test", [f"model.architecture={architecture}"])
    config = recipe.model_config_for(recipe.finetune[0])
    assert (config.architecture, config.depth, config.hidden_size, config.qk_norm) == (architecture, 1, 64, "rms")
    assert (config.context_dim, config.pooled_dim, config.position_side, config.position_max) == (64, 80, 4, 8)


def test_three_streams_split_where_the_clip_tokens_end():
    recipe = load_recipe("tiny-test", ["model.streams=3"])
    assert recipe.model_config_for(recipe.pretrain).clip_tokens == recipe.text.clip_tokens == 16


def test_names_are_in_the_paths():
    recipe = load_recipe("tiny-test")
    other = load_recipe("tiny-test", ["data.name=other"])
    assert specs.raw_folder(recipe).replace("tiny-world", "other") == specs.raw_folder(other)
    assert specs.captions_folder(recipe).replace("tiny-world", "other") == specs.captions_folder(other)
    assert specs.towers_folder(recipe) != specs.towers_folder(other)  # small towers are trained on that data set
    renamed = load_recipe("tiny-test", ["towers.name=other"])
    assert specs.towers_folder(recipe).replace("tiny-world", "other") == specs.towers_folder(renamed)
    fields = {"any": "fields"}
    assert (
        specs.checkpoints_folder(recipe, "pretrain", fields)
        == f"runs/tiny-test/checkpoints/pretrain/{fingerprint(fields)}"
    )


def test_a_captioning_model_counts_by_its_files_and_not_by_its_path(tmp_path):
    def spec(folder) -> str:
        overrides = ["caption.captioner=vision_language_model", f"caption.model={folder}"]
        return fingerprint(specs.captions_fields(load_recipe("tiny-test", overrides)))

    first, second = tmp_path / "first", tmp_path / "second"
    header = b'{"w":{"dtype":"U8","shape":[100000],"data_offsets":[0,100000]}}'
    weights = len(header).to_bytes(8, "little") + header + bytes(100_000)
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "llava"}')
        (folder / "model.safetensors").write_bytes(weights)
    (second / "README.md").write_text("downloaded on a Monday")
    found = spec(first)
    assert spec(second) == found
    for name, content in (
        ("config.json", b'{"model_type": "git"}'),
        ("model.safetensors", weights[:-1] + b"\1"),
        ("model.safetensors", weights + b"\0"),
        ("chat_template.jinja", b"{{ messages }}"),
        ("more.safetensors", weights),
    ):
        before = (second / name).read_bytes() if (second / name).exists() else None
        (second / name).write_bytes(content)
        assert spec(second) != found, name
        (second / name).unlink() if before is None else (second / name).write_bytes(before)
    assert spec(second) == found
    with pytest.raises(DataError, match="^caption.model '/nowhere': no config.json there; give a model's folder"):
        spec("/nowhere")
    (second / "model.safetensors").unlink()
    with pytest.raises(DataError, match="^caption.model .*: no .safetensors file there$"):
        spec(second)


def test_released_towers_depend_on_no_data():
    recipe = load_recipe("sd3-2b")
    assert specs.towers_folder(recipe) == specs.towers_folder(load_recipe("sd3-2b", ["seed=1", "data.min_side_px=512"]))


def test_a_fingerprint_is_of_the_values_and_not_of_their_order():
    """The golden value: another one would put every stored byte out of date."""
    assert (
        fingerprint({"b": [1, 2.5, None], "a": "ü"}) == fingerprint({"a": "ü", "b": [1, 2.5, None]}) == "703dceec79c3"
    )


@pytest.mark.parametrize(
    "override, said",
    [
        (
            "data.folder=https://host/images",
            "folder https://host/images is a URL, and folder lies on this machine: download",
        ),
        ("data.folder=s3://bucket/images", "data: folder s3://bucket/images is a URL"),
        ("data.folder=hf://datasets/x", "data: folder hf://datasets/x is a URL"),
        ("data.folder=file:///images", "give the path alone"),
        ("towers.released.vae=hf://x/vae", "towers.released: vae hf://x/vae is a URL"),
        ("caption.model=https://host/model", "caption: model https://host/model is a URL"),
        ("store=gs://bucket/x", "store gs://bucket/x is a URL of another kind: take a whole path, file:// or s3://"),
        ("model.start_from=hf://x", "model: start_from hf://x is a URL of another kind"),
    ],
)
def test_a_url_where_a_folder_belongs_is_refused_by_name(override, said):
    with pytest.raises(RecipeError) as refused:
        load_recipe("sd3-2b", [override])
    assert said in str(refused.value)


def test_stores_and_starts_may_be_urls():
    for override in ("store=s3://bucket/x", "store=file:///x", "model.start_from=s3://bucket/x", "data.folder=/a://b"):
        load_recipe("sd3-2b", [override])


def test_how_files_become_pixels_stands_in_what_is_made_from_files_alone(monkeypatch):
    monkeypatch.setattr(specs, "model_identity", lambda model, key: "0")
    captioned = [*OF_A_FOLDER, "caption.captioner=vision_language_model", "caption.model=/model"]
    for recipe, expected in ((load_recipe("tiny-test"), None), (load_recipe("tiny-test", captioned), 2)):
        assert specs.raw_fields(recipe).get("pixels") == expected
        assert specs.latents_fields(recipe, recipe.pretrain, {"vae": "0"}).get("pixels") == expected
        assert specs.captions_fields(recipe).get("pixels") == expected
    assert "pixels" not in specs.captions_fields(load_recipe("tiny-test", OF_A_FOLDER))  # no image is looked at


def test_how_a_folders_files_are_dealt_to_shards_is_no_concern_of_the_drawn_world():
    """Golden: the data sets of drawn worlds that stand are good, and a folder's are told to be made again."""
    drawn, of_files = (specs.raw_fields(load_recipe("tiny-test", more)) for more in ([], OF_A_FOLDER))
    assert "slices" not in drawn and fingerprint(drawn) == "56db052fda2c"
    before = {key: value for key, value in of_files.items() if key != "slices"}
    assert format_changes(before, of_files) == ["slices 1 -> 2"] and fingerprint(of_files) == "5bcd69704cc3"


def test_the_background_counts_where_it_is_another_and_a_colour_has_one_name():
    def spec(background: str) -> str:
        return fingerprint(
            specs.raw_fields(load_recipe("tiny-test", [*OF_A_FOLDER, f"data.background='{background}'"]))
        )

    usual = fingerprint(specs.raw_fields(load_recipe("tiny-test", OF_A_FOLDER)))
    assert spec("white") == spec("#FFFFFF") == spec("White") == usual
    assert len({usual, spec("black"), spec("grey"), spec("#0a0B0c")}) == 4
    assert spec("#000000") == spec("black") and spec("#0A0B0C") == spec("#0a0b0c")
    for wrong in ("pink", "#fff", "#ggg000", "rgb(0,0,0)", ""):
        with pytest.raises(RecipeError, match=r"data\.background.*give white, black, grey, or #rrggbb"):
            spec(wrong)
