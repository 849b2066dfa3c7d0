"""`sd3 sample`: which pictures are asked for, and that every option arrives where pictures are drawn."""

from __future__ import annotations

import io
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from flows.cli import commands, main, sample
from sd3core.data.store import open_store
from sd3core.errors import UserError
from sd3core.recipe_file import load_recipe
from sd3core.sample_settings import SampleSettings
from sd3core.specs import scores_path, towers_folder

PROMPTS = ["a red circle", "ein grüner Kreis"]


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Runs `sd3 sample ARGUMENTS` without a run's files and without drawing: what it was asked to draw."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    monkeypatch.setattr(sample, "last_checkpoint", lambda recipe: "file:///store/runs/r/checkpoints/last")
    manifest = property(lambda upstream: SimpleNamespace(folder=towers_folder(upstream.recipe)))
    monkeypatch.setattr(sample.Upstream, "towers_manifest", manifest)
    monkeypatch.setattr(sample, "fetch_towers", lambda store, folder, cache: folder)
    asked: dict[str, object] = {}
    screen = io.StringIO()
    monkeypatch.setattr(commands, "console", Console(file=screen, force_terminal=True, width=100, markup=False))

    def draw(checkpoint, towers, draws, out, *, on_step, on_note, **options):
        asked.update(checkpoint=checkpoint, towers=towers, draws=list(draws), out=out, **options)
        on_note("the text encoders do not know, only spell: [grüner], Kreis")
        for done in range(9):
            on_step(done, 8)
        return [out / "00000.png"]

    monkeypatch.setattr(sample, "sample_to_files", draw)

    def run(*arguments: str) -> dict[str, object]:
        monkeypatch.setattr(sys, "argv", ["sd3", "sample", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        return asked | {"screen": screen.getvalue()}

    return run


def test_without_options_the_recipe_decides(drawn, tmp_path):
    asked, evaluate = drawn(*PROMPTS), load_recipe("mini").evaluate
    assert asked["draws"] == [(PROMPTS[0], 0), (PROMPTS[1], 1)]
    of_recipe = (evaluate.num_steps, evaluate.guidance_scale, evaluate.sampler)
    assert (asked["num_steps"], asked["guidance_scale"], asked["sampler"]) == of_recipe
    assert "height" not in asked and "negative_prompt" not in asked  # the checkpoint's
    assert asked["shift"] == evaluate.shift
    assert drawn(*PROMPTS, "--set", "evaluate.shift=null")["shift"] == load_recipe("mini").finetune[-1].shift
    assert (asked["weights"], asked["precision"], asked["columns"]) == (None, "fp32", None)
    assert asked["checkpoint"] == "file:///store/runs/r/checkpoints/last"
    assert "8/8" in asked["screen"] and "2 pictures in" in asked["screen"]
    assert "note: the text encoders do not know, only spell: [grüner], Kreis" in asked["screen"]


def test_every_option_arrives(drawn, tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS), encoding="utf-8")
    options = (
        "--seed 3 --images 2 --height 80 --width 112 --steps 9 --guidance 2.5 --sampler dpm++2m --schedule textbook"
        " --shift 1.5 --without t5 --without clip_l --weights live --precision bf16 --device cpu --batch 5"
    )
    asked = drawn("--file", str(tmp_path / "prompts.txt"), *options.split(), "--negative", "")
    assert asked["draws"] == [(PROMPTS[0], 3), (PROMPTS[0], 4), (PROMPTS[1], 5), (PROMPTS[1], 6)]
    expected = {"weights": "live", "precision": "bf16", "device": "cpu", "batch": 5, "columns": 2}
    assert asked | expected == asked
    fields = {name: asked[name] for name in SampleSettings.__dataclass_fields__}
    assert SampleSettings(**fields) == SampleSettings(
        80, 112, 9, 2.5, 1.5, ("clip_l", "t5"), "textbook", sampler="dpm++2m", negative_prompt=""
    )


def test_a_checkpoint_brings_the_towers_it_was_trained_with(drawn, tmp_path, finish_checkpoint):
    trained, folder = load_recipe("tiny-test"), tmp_path / "checkpoint"
    finish_checkpoint(open_store(str(folder)), "", trained)
    of_checkpoint = drawn(*PROMPTS, "--checkpoint", str(folder))
    assert of_checkpoint["towers"] == towers_folder(trained) and "shift" not in of_checkpoint
    assert drawn(*PROMPTS)["towers"] == towers_folder(load_recipe("mini")) != towers_folder(trained)


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Makes towers of tiny-test stand in a store; what is fetched then is told as (store's URL, folder)."""

    @property
    def towers_manifest(upstream):
        folder = towers_folder(upstream.recipe)
        if not upstream.store.exists(f"{folder}/x"):
            raise sample.NotFinishedError("towers")
        return SimpleNamespace(folder=folder)

    def make(store):
        monkeypatch.setattr(sample.Upstream, "towers_manifest", towers_manifest)
        monkeypatch.setattr(sample, "fetch_towers", lambda store, folder, cache: (store.url, folder))
        store.put(f"{towers_folder(load_recipe('tiny-test'))}/x", b"")

    return make


@pytest.mark.parametrize("overrides", [[], ["--set", "store={store}"]])
def test_a_run_brings_the_towers_of_the_store_that_it_was_found_in(
    drawn, fetched, tmp_path, finish_checkpoint, overrides
):
    """Its checkpoint's recipe names no store: that of the home that trained it."""
    store, trained = open_store(str(tmp_path / ("another" if overrides else "store"))), load_recipe("tiny-test")
    fetched(store)
    finish_checkpoint(store, f"runs/tiny-test/checkpoints/pretrain/aaaa/{trained.pretrain.samples:012d}", trained)
    asked = drawn(*PROMPTS, "--run", "tiny-test", *(word.format(store=store.url) for word in overrides))
    assert asked["towers"] == (store.url, towers_folder(trained))


@pytest.mark.parametrize("where", ["named", "beside", "of the recipe"])
def test_a_checkpoint_brings_its_towers_from_another_store(drawn, fetched, tmp_path, finish_checkpoint, where):
    holds = open_store(str(tmp_path / "holds"))
    lies_in = holds if where == "beside" else open_store(str(tmp_path / "copy"))
    trained = load_recipe("tiny-test", [f"store={holds.url}"] if where == "of the recipe" else [])
    fetched(holds)
    folder = "runs/tiny-test/checkpoints/pretrain/aaaa/000000000008"
    finish_checkpoint(lies_in, folder, trained)
    named = ["--set", f"store={holds.url}"] if where == "named" else []
    assert drawn(*PROMPTS, "--checkpoint", lies_in.uri(folder), *named)["towers"] == (holds.url, towers_folder(trained))


def test_named_seeds_are_those_of_every_prompt(drawn):
    assert drawn(*PROMPTS, "--seeds", "17, 3")["draws"] == [(p, seed) for p in PROMPTS for seed in (17, 3)]


@pytest.mark.parametrize("seeds", ["", "3,", "3;4", "-1", "1.5", str(2**63)])
def test_seeds_that_are_none_are_named(seeds):
    with pytest.raises(UserError, match=f"^--seeds {seeds}: give whole numbers from 0 to "):
        sample.draws_of(PROMPTS, seeds=seeds)


def test_the_best_checkpoint_is_that_of_the_named_score_and_says_what_the_figure_is_worth(drawn, monkeypatch, tmp_path):
    store = open_store(str(tmp_path / "store"))
    folders = [f"runs/mini/checkpoints/finetune.0/s/{samples:012d}" for samples in (10, 20, 30)]
    for folder in folders:
        store.put_json(f"{folder}/DONE.json", {})
    losses, fids = (1.2, 1.5, 0.1), (9.0, 5.0, 1.0)  # the third is of a longer run
    rows = [
        {"checkpoint": folder, "weights": "ema", "protocol": "p", "metric": metric, "value": value, "count": 9}
        for metric, values in (("validation_loss", losses), ("clip_fid", fids))
        for folder, value in zip(folders, values, strict=True)
    ]
    store.put_json(scores_path("mini"), {"scores": rows, "left_out": [], "shown": ["p"]})
    monkeypatch.setattr(sample, "last_checkpoint", lambda recipe: store.uri(folders[1]))
    asked = drawn("a", "--best")
    assert asked["checkpoint"] == store.uri(folders[0]) and "best of 2 by validation_loss (1.200" in asked["screen"]
    assert drawn("a", "--best-by", "fid")["checkpoint"] == store.uri(folders[1])
    assert drawn("a", "--best", "--set", "export.checkpoint=best:fid")["checkpoint"] == store.uri(folders[1])
    assert drawn("a")["checkpoint"] == store.uri(folders[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--best-by", "fids"], "--best-by: no score 'fids' chooses a checkpoint; did you mean fid?"),
        (["--best", "--checkpoint", "x"], "--checkpoint x: leave out --best"),
    ],
)
def test_a_best_that_cannot_be_is_one_line(sd3, arguments, said):
    code, _, complained = sd3("sample", "a", *arguments)
    assert code == 1 and said in complained and complained.count("\n") == 1
