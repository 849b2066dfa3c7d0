"""`auto` of encoders and captioner: settled once for a data set, by what stands before anything else."""

from __future__ import annotations

import pytest

from sd3core import specs
from sd3core.data.settled_precision import NOTES, PLACES, settle_precisions
from sd3core.data.store import open_store
from sd3core.errors import DataError
from sd3core.recipe_file import load_recipe
from sd3core.specs import data_folder, precision_path

AUTO = ["caption.precision=auto", "encode.text_precision=auto", "encode.latent_precision=auto"]
GPUS = [*AUTO, "compute.gpus_per_actor=1"]
DIGESTS = dict.fromkeys(("clip_l", "clip_g", "t5", "vae"), "0")


@pytest.fixture
def store(tmp_path):
    return open_store(str(tmp_path))


def settled(store, overrides, able: bool | None) -> dict[str, str]:
    """`able`: what the GPUs are said to be; None: nobody looks at any."""
    recipe = settle_precisions(load_recipe("tiny-test", overrides), store, None if able is None else lambda: able)
    return {kind: getattr(getattr(recipe, section), key) for kind, (section, key, _) in PLACES.items()}


def all_of(precision: str) -> dict[str, str]:
    return dict.fromkeys(PLACES, precision)


def never() -> bool:
    raise AssertionError("nobody has to look at the GPUs")


def test_what_a_recipe_says_is_not_asked_of_anyone(store):
    recipe = load_recipe("tiny-test")
    assert settle_precisions(recipe, store, never) is recipe and not store.list()
    recipe = load_recipe("tiny-test", ["encode.text_precision=bf16"])
    assert settle_precisions(recipe, store, never) == recipe
    assert settled(store, GPUS, False) == {"captions": "fp32", "text": "bf16", "latents": "fp32"}  # as it has been made


def test_on_cpus_it_is_fp32_and_leaves_nothing(store):
    recipe = load_recipe("tiny-test", AUTO)
    assert settle_precisions(recipe, store, never) == load_recipe("tiny-test") and not store.list()


def test_gpus_decide_once_and_later_machines_follow(store):
    assert settled(store, GPUS, True) == all_of("bf16")
    assert store.get_json(precision_path("tiny-world")) == all_of("bf16")
    for later, able in ((GPUS, False), (AUTO, False), (GPUS, None), (AUTO, None)):
        assert settled(store, later, able) == all_of("bf16")
    assert settled(store, [*GPUS, "data.name=other"], False) == all_of("fp32")
    assert settled(store, ["compute.gpus_per_actor=1"], True) == all_of("fp32")  # the recipe says it


def test_a_stage_on_cpus_stays_in_fp32_beside_one_on_gpus(store):
    overrides = [*AUTO, "compute.caption.gpus_per_actor=1"]
    assert settled(store, overrides, True) == {"captions": "bf16", "text": "fp32", "latents": "fp32"}


@pytest.mark.parametrize("kind", PLACES)
def test_what_stands_in_fp32_is_not_made_again(store, kind):
    store.put(f"{data_folder('tiny-world', kind)}/0123456789ab/00000.0123456789ab.done.json", b"{}")
    assert settled(store, GPUS, True) == all_of("bf16") | {kind: "fp32"}


def test_what_a_run_was_trained_on_is_made_as_it_was_where_it_was_removed(store):
    """Else its training would begin anew."""
    store.put_json("runs/tiny-test/stages/text.json", {})
    assert settled(store, GPUS, True) == all_of("bf16") | {"text": "fp32"}


@pytest.mark.parametrize("kind", PLACES)
def test_a_run_that_names_bf16_changes_no_other_run(store, kind):
    """What stands in fp32 is not made again because somebody tries bf16 beside it; the trial itself goes on in bf16."""
    store.put(f"{data_folder('tiny-world', kind)}/0123456789ab/00000.0123456789ab.done.json", b"{}")
    section, key, _ = PLACES[kind]
    trial = [*GPUS, "run=trial"]
    assert settled(store, [*trial, f"{section}.{key}=bf16"], True)[kind] == "bf16"
    assert kind not in store.get_json(precision_path("tiny-world"))
    assert settled(store, GPUS, True)[kind] == "fp32"
    fields = {"precision": "bf16"} if kind != "captions" else {"caption": {"precision": "bf16"}}
    store.put_json(f"runs/trial/stages/{NOTES[kind]}.json", {"fields": fields})
    assert settled(store, trial, True)[kind] == "bf16" and settled(store, GPUS, True)[kind] == "fp32"


def test_who_makes_nothing_writes_nothing(store):
    assert settled(store, GPUS, None) == all_of("bf16") and not store.list()
    assert settled(store, GPUS, False) == all_of("fp32") and not store.list()


def test_a_note_that_says_something_else_is_named(store):
    for wrong in ([], {"text": "fp16"}, {"raw": "bf16"}, {"text": ["bf16"]}, "bf16"):
        store.put_json(precision_path("tiny-world"), wrong)
        with pytest.raises(DataError, match=r"PRECISION.json: does not say .*encode.text_precision"):
            settled(store, GPUS, True)


def test_only_what_is_settled_names_bytes():
    """fp32 stands in no fingerprint, bf16 in the one of what is made with it."""
    plain = load_recipe("tiny-test")
    for key, fields in (
        ("encode.text_precision", lambda recipe: specs.text_fields(recipe, DIGESTS)),
        ("encode.latent_precision", lambda recipe: specs.latents_fields(recipe, recipe.pretrain, DIGESTS)),
    ):
        assert "precision" not in fields(plain)
        assert fields(load_recipe("tiny-test", [f"{key}=bf16"])) == fields(plain) | {"precision": "bf16"}
        with pytest.raises(ValueError, match="settled_precision settles it"):
            fields(load_recipe("tiny-test", [f"{key}=auto"]))


def test_a_captioning_models_precision_is_in_its_captions_fingerprint(monkeypatch):
    monkeypatch.setattr(specs, "model_identity", lambda *_: "0")
    captioned = ["caption.captioner=vision_language_model", "caption.model=/model"]
    plain, other = (
        specs.captions_fields(load_recipe("tiny-test", [*captioned, f"caption.precision={name}"]))
        for name in ("fp32", "bf16")
    )
    assert other["caption"] == plain["caption"] | {"precision": "bf16"} and "precision" not in plain["caption"]
