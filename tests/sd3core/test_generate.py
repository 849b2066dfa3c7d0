from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from small_models import randomise

from sd3core.backbone_config import CONFIGS
from sd3core.checkpoint import load_model, open_checkpoint, save_model
from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.checkpoint_record import CheckpointDone
from sd3core.conditioning import ENCODERS, join_features
from sd3core.data.store import open_store
from sd3core.errors import CheckpointError, UserError, described_os_error
from sd3core.formulations import find_formulation
from sd3core.generate import Generator, grid_columns, prompt_notes, sample_to_files
from sd3core.mmdit import MMDiT, MMDiTConfig, make_model
from sd3core.pictures import read_settings
from sd3core.recipe import Text
from sd3core.sample_settings import SampleSettings
from sd3core.sampling import SAMPLERS, guided, sigma_schedule, solve

FACTS = CheckpointFacts("zeros", Text(clip_tokens=12, t5_tokens=10), side_px=32, shift=2.0, digest="")
SETTINGS = SampleSettings(32, 48, num_steps=3, guidance_scale=3.0, shift=2.0)
PROMPTS = ["a red square on the left", "a blue bar on the right", ""]


def write_checkpoint(folder: Path, facts: CheckpointFacts = FACTS) -> str:
    """A plain model folder for the tiny towers of conftest."""
    sizes = {"hidden_size": 128, "num_heads": 2, "context_dim": 64, "pooled_dim": 80}
    config = MMDiTConfig.from_depth(2, **sizes, position_base=2, position_side=2, position_max=4)
    save_model(folder, randomise(MMDiT(config)), facts.to_extra())
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> str:
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def generator(checkpoint, towers_folder) -> Generator:
    return Generator.load(checkpoint, towers_folder)


def test_facts_come_back_from_a_model_folder(checkpoint, tmp_path):
    facts = open_checkpoint(checkpoint).facts
    assert replace(facts, digest="") == FACTS and len(facts.digest) == 64
    assert facts.settings(num_steps=4) == SampleSettings(32, 32, num_steps=4, shift=2.0)
    with pytest.raises(CheckpointError, match="no config.json .* and no DONE.json"):
        _ = open_checkpoint(tmp_path).facts
    with pytest.raises(CheckpointError, match="extra.null: Field required; save it with"):
        save_model(tmp_path, MMDiT(MMDiTConfig.from_depth(1, context_dim=8, pooled_dim=8, position_max=4)))
        _ = open_checkpoint(tmp_path).facts


@pytest.mark.parametrize(("evaluate", "shift"), [({"shift": 3.0}, 3.0), ({"shift": None}, 1.25), ({}, 1.25)])
def test_a_training_checkpoint_is_sampled_at_its_recipes_shift(tmp_path, evaluate, shift):
    """The last recipe is of a time before evaluate had the field."""
    recipe = {"text": FACTS.text.model_dump(mode="json"), "evaluate": evaluate}
    training = {"side_px": 64, "shift": 1.25, "formulation": "rf"}
    counts = {"samples": 8, "steps": 1, "attempt": 1, "optimizer_step": 1}
    nothing = dict.fromkeys(("config", "parameters", "files", "specs"), {})
    done = CheckpointDone(**counts, **nothing, training=training, null="zeros", recipe=recipe)
    open_store(str(tmp_path)).put_json("DONE.json", done.model_dump(mode="json"))
    assert open_checkpoint(tmp_path).facts.settings() == SampleSettings(64, 64, shift=shift)


@pytest.mark.parametrize("architecture", ["mmdit", "dit", "cross_dit", "uvit"])
def test_every_architecture_draws(architecture, generator, tmp_path):
    sizes = {"hidden_size": 64, "num_heads": 1, "context_dim": 64, "pooled_dim": 80, "position_max": 4}
    streams = {"clip_tokens": FACTS.text.clip_tokens} if architecture == "mmdit" else {}
    save_model(
        tmp_path, randomise(make_model(CONFIGS[architecture].from_depth(1, **sizes, **streams))), FACTS.to_extra()
    )
    drawer = Generator(load_model(tmp_path), generator.encoders, generator.autoencoder, "zeros")
    pictures = drawer.sample(PROMPTS[:2], [5, 5], SETTINGS)
    assert pictures.shape == (2, 32, 48, 3) and (pictures[0] != pictures[1]).any()


def test_a_picture_is_a_function_of_its_prompt_and_seed_alone(generator):
    whole = generator.sample(PROMPTS, [5, 6, 7], SETTINGS)
    assert whole.shape == (3, 32, 48, 3) and whole.dtype == np.uint8
    single = np.concatenate([generator.sample([p], [s], SETTINGS) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)])
    assert np.abs(whole.astype(int) - single).max() <= 1  # other sums in other batches
    other = generator.sample(PROMPTS[:1], [6], SETTINGS)
    assert (other != whole[:1]).mean() > 0.3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_batch_of_mixed_prompts_gives_each_the_latent_it_gets_alone(generator, sampler):
    settings = replace(SETTINGS, num_steps=5, sampler=sampler, negative_prompt="a green bar")
    with torch.inference_mode():
        whole = generator.latents(PROMPTS, [5, 6, 7], settings)
        single = [generator.latents([p], [s], settings) for p, s in zip(PROMPTS, (5, 6, 7), strict=True)]
    assert torch.allclose(whole, torch.cat(single), atol=1e-5)


def test_one_batch_for_both_halves_equals_the_guidance_of_two(generator):
    cond, null = generator.conditioning(PROMPTS)
    own = [torch.Generator() for _ in range(3)]
    model = generator.model

    def fresh():
        return torch.stack([torch.randn(16, 4, 6, generator=g) for g in own])

    with torch.inference_mode():
        for scale, sampler in ((0.0, "heun"), (1.0, "dpm++2m"), (3.0, "euler"), (3.0, "dpm++2m-sde")):
            for g, seed in zip(own, (1, 2, 3), strict=True):
                g.manual_seed(seed)
            predict = guided(lambda z, t: model(z, t, *cond), lambda z, t: model(z, t, *null), scale)
            schedule = sigma_schedule(5, shift=2.0, convention="textbook" if "2m" in sampler else "reference")
            expected = solve(sampler, predict, fresh(), schedule, fresh=fresh)
            settings = replace(SETTINGS, num_steps=5, guidance_scale=scale, sampler=sampler)
            assert torch.allclose(generator.latents(PROMPTS, [1, 2, 3], settings), expected, atol=1e-4)


def test_no_prompt_is_what_the_checkpoint_says(checkpoint, towers_folder):
    zeros = Generator.load(checkpoint, towers_folder)
    empty = Generator(zeros.model, zeros.encoders, zeros.autoencoder, "empty")
    _, (context, pooled) = zeros.conditioning(PROMPTS)
    assert not context.any() and not pooled.any()
    (cond, cond_pooled), (context, pooled) = empty.conditioning(PROMPTS)
    assert torch.allclose(context[0], cond[2], atol=1e-5) and torch.allclose(pooled[0], cond_pooled[2], atol=1e-5)


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_a_dropped_encoder_is_replaced_as_in_training(generator, null):
    chosen = Generator(generator.model, generator.encoders, generator.autoencoder, null)
    (context, _pooled), (null_context, _) = chosen.conditioning(PROMPTS, drop=("t5",))
    features = generator.encoders.encode(PROMPTS)
    keep = torch.tensor([[True, True, False]]).expand(3, -1)
    expected, _ = join_features(features, keep, generator.encoders.null() if null == "empty" else None, 64)
    assert torch.allclose(context, expected, atol=1e-5)
    assert torch.allclose(context[:, 12:], null_context[:, 12:]) and context[:, :12].any()


@pytest.mark.parametrize("count", range(4))
def test_any_encoders_may_be_left_out(generator, count):
    """Where no prompt is zeros: zeros in the encoder's place, and all else untouched."""
    (whole, whole_pooled), _ = generator.conditioning(PROMPTS)  # CLIPs of 32 channels in 12 tokens, then 10 of T5
    places = {"clip_l": (slice(0, 12), slice(0, 32)), "clip_g": (slice(0, 12), slice(32, 64)), "t5": (slice(12, 22),)}
    for drop in combinations(ENCODERS, count):
        expected, expected_pooled = whole.clone(), whole_pooled.clone()
        for name in drop:
            expected[:, *places[name]] = 0
            if name != "t5":
                expected_pooled[:, slice(0, 32) if name == "clip_l" else slice(32, 80)] = 0
        cond, null = generator.conditioning(PROMPTS, drop)
        assert torch.allclose(cond[0], expected, atol=1e-6) and torch.allclose(cond[1], expected_pooled, atol=1e-6)
        assert not null[0].any() and not null[1].any()
        (negative, negative_pooled) = generator.conditioning(PROMPTS, drop, PROMPTS[0])[1]
        assert torch.allclose(negative, expected[:1].expand(3, -1, -1), atol=1e-5)
        assert torch.allclose(negative_pooled, expected_pooled[:1].expand(3, -1), atol=1e-5)


def test_bad_requests_are_named(generator):
    for settings, message in (
        (replace(SETTINGS, height=40), "height 40 px: this model makes multiples of 16 px up to 64"),
        (replace(SETTINGS, width=80), "width 80 px"),
        (replace(SETTINGS, drop=("clip",)), "no encoder 'clip'"),
        (replace(SETTINGS, sampler="ddim"), r"no sampler 'ddim'; there are euler, heun, dpm\+\+2m"),
        (
            replace(SETTINGS, negative_prompt="", guidance_scale=1.0),
            "a negative prompt does nothing at guidance scale 1",
        ),
    ):
        with pytest.raises(UserError, match=message):
            generator.sample(PROMPTS, [0, 1, 2], settings)
    with pytest.raises(UserError, match="3 prompts and 1 seeds"):
        generator.sample(PROMPTS, [0], SETTINGS)


def test_steps_are_counted_over_all_batches(generator):
    seen = []
    generator.sample(PROMPTS, [0, 1, 2], SETTINGS, batch=2, on_step=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(7)]


def test_what_was_drawn_before_a_stop_is_there(checkpoint, towers_folder, tmp_path):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    draws = [(prompt, 0) for prompt in PROMPTS]
    with pytest.raises(KeyboardInterrupt):
        sample_to_files(checkpoint, towers_folder, draws, tmp_path, batch=1, num_steps=2, on_step=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.png"]
    assert read_settings((tmp_path / "00000.png").read_bytes())["prompt"] == PROMPTS[0]


def test_a_file_where_the_folder_is_to_be_is_told_before_anything_is_loaded(checkpoint, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(FileExistsError) as error:
        sample_to_files(checkpoint, "/none", [("x", 0)], tmp_path / "out")
    assert described_os_error(error.value) == f"{tmp_path}/out: File exists; name another, or move what is there"


def test_what_the_encoders_do_not_take_in_is_told(generator):
    notes = [*prompt_notes(generator.encoders, ["zq" * 300 + " 東京", "a red bar"], ())]
    assert [note.partition(":")[0] for note in notes] == [
        "the text encoders do not know, only spell",
        "longer than all text encoders read, its end says nothing",
    ]
    assert all(len(note) < 300 for note in notes)


def test_files_carry_their_settings(checkpoint, towers_folder, tmp_path):
    draws = [(PROMPTS[0], 3), (PROMPTS[0], 4), (PROMPTS[1], 3), (PROMPTS[1], 2**63 - 1)]
    settings = {"num_steps": 2, "height": None, "sampler": "heun", "negative_prompt": "ein grünes Dreieck"}
    paths = sample_to_files(checkpoint, towers_folder, draws, tmp_path / "new" / "out", columns=2, **settings)
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png", "00003.png", "00000-grid.png"]
    inside = read_settings(paths[3].read_bytes())
    assert (inside["prompt"], inside["seed"]) == (PROMPTS[1], str(2**63 - 1))
    assert "weights" not in inside  # a model folder does not say whose weights it has
    assert json.loads(inside["settings"]) == replace(FACTS.settings(), **settings | {"height": 32}).to_dict()
    of_grid = read_settings(paths[-1].read_bytes())
    assert list(zip(json.loads(of_grid["prompts"]), json.loads(of_grid["seeds"]), strict=True)) == draws
    alone = sample_to_files(checkpoint, towers_folder, draws[:1], tmp_path / "alone", num_steps=1)
    assert alone == [*(tmp_path / "alone").iterdir()] and alone[0].name == "00000.png"
    before = alone[0].read_bytes()
    more = sample_to_files(checkpoint, towers_folder, draws[:2], tmp_path / "alone", num_steps=1)
    assert [path.name for path in more] == ["00001.png", "00002.png", "00001-grid.png"]
    assert alone[0].read_bytes() == before  # what is there is kept


@pytest.mark.parametrize("name", ["eps/linear", "v/cos", "edm(-1.20,1.20)"])
def test_a_checkpoint_is_sampled_by_its_own_formulation(name, towers_folder, tmp_path):
    """From its own prior over its own grid, in its own coordinates: z_s = a_s x0 + b_s noise with what is predicted at z_t."""
    shift = 1.0 if "linear" in name else 2.0
    checkpoint = write_checkpoint(tmp_path / "model", replace(FACTS, formulation=name, shift=shift))
    assert open_checkpoint(checkpoint).facts.formulation == name
    generator = Generator.load(checkpoint, towers_folder)
    found = generator.latents(PROMPTS, [1, 2, 3], replace(SETTINGS, shift=shift))

    formulation = find_formulation(name).shifted(shift)
    cond, null = generator.conditioning(PROMPTS)
    noise = torch.stack([torch.randn(16, 4, 6, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)])
    grid = formulation.sampling_grid(3)
    a, b = (part.tolist() for part in formulation.a_b(grid))
    z = formulation.prior_scale * noise
    for i in range(3):
        z_in, t_in = formulation.network_inputs(z, grid[i].expand(3))
        with torch.inference_mode():
            of_cond, of_null = (generator.model(z_in, t_in, *part) for part in (cond, null))
        x0 = formulation.x0(of_null + 3.0 * (of_cond - of_null), z, grid[i].expand(3))
        z = a[i + 1] * x0 + b[i + 1] * (z - a[i] * x0) / b[i]
    torch.testing.assert_close(found, z, rtol=1e-3, atol=1e-3)
    if "linear" in name:
        with pytest.raises(UserError, match="take shift 1, not 3"):
            generator.sample(PROMPTS, [1, 2, 3], replace(SETTINGS, shift=3.0))
    pictures = sample_to_files(checkpoint, towers_folder, [(PROMPTS[0], 1)], tmp_path / "out", num_steps=1)
    assert read_settings(pictures[0].read_bytes())["formulation"] == name


def test_a_folder_without_a_formulation_is_rectified_flow_and_an_unknown_one_is_named(tmp_path):
    extra = FACTS.to_extra()
    model = MMDiT(MMDiTConfig.from_depth(1, context_dim=8, pooled_dim=8, position_max=4))
    save_model(tmp_path, model, {key: value for key, value in extra.items() if key != "formulation"})
    assert open_checkpoint(tmp_path).facts.formulation == "rf"
    save_model(tmp_path, model, extra | {"formulation": "edm"})
    with pytest.raises(CheckpointError, match="formulation 'edm' cannot be read"):
        _ = open_checkpoint(tmp_path).facts


def test_grid_columns():
    assert [grid_columns(n) for n in (1, 2, 4, 5, 16, 17)] == [1, 2, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"formulation": 3}, "extra.formulation"),
        ({"formulation": "rf/lognorm"}, r"write rf/lognorm\(m,s\)"),
        ({"side_px": "x"}, "extra.side_px"),
        ({"null": "bogus"}, "extra.null"),
    ],
)
def test_facts_that_cannot_be_are_named(checkpoint, tmp_path, extra, message):
    save_model(tmp_path, load_model(checkpoint), FACTS.to_extra() | extra)
    with pytest.raises(CheckpointError, match=message):
        _ = open_checkpoint(tmp_path).facts


@pytest.mark.parametrize("null", ["zeros", "empty"])
def test_a_folder_says_in_one_place_what_no_prompt_is(tmp_path, null):
    """Folders from before say it twice, the text settings perhaps otherwise: what counted then counts."""
    config = json.loads(Path(write_checkpoint(tmp_path / "a", replace(FACTS, null=null)), "config.json").read_bytes())
    assert config["extra"]["null"] == null and "null" not in config["extra"]["text"]
    assert json.dumps(config).count('"null"') == 1
    facts = open_checkpoint(tmp_path / "a").facts
    assert facts.null == facts.text.null == null
    other = {"zeros": "empty", "empty": "zeros"}[null]
    config["extra"]["text"]["null"] = other
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "a").facts == facts and replace(facts, null=other).text.null == other


def test_a_model_of_three_streams_divides_where_the_facts_say(tmp_path):
    config = MMDiTConfig.from_depth(1, context_dim=8, pooled_dim=8, position_max=4, clip_tokens=12)
    save_model(tmp_path, MMDiT(config), FACTS.to_extra())
    assert open_checkpoint(tmp_path).facts.text.clip_tokens == 12
    save_model(tmp_path, MMDiT(replace(config, clip_tokens=11)), FACTS.to_extra())
    with pytest.raises(CheckpointError, match="extra.text.clip_tokens 12, but the model's three streams divide at 11"):
        _ = open_checkpoint(tmp_path).facts


def test_a_diffusers_folder_is_told_from_a_model_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "SD3Transformer2DModel"}))
    with pytest.raises(CheckpointError, match="sd3 import .* OUT` makes a model folder of it"):
        _ = open_checkpoint(tmp_path).facts


def test_towers_of_other_widths_are_refused(generator):
    other = make_model(replace(generator.model.config, pooled_dim=generator.model.config.pooled_dim + 8))
    with pytest.raises(UserError, match="name the towers that it was trained with"):
        Generator(other, generator.encoders, generator.autoencoder, "zeros")


def test_the_schedule_follows_the_sampler_unless_one_is_asked_for(generator):
    assert SETTINGS.to_dict()["convention"] == "reference"
    for sampler in ("dpm++2m", "dpm++2m-sde"):
        assert replace(SETTINGS, sampler=sampler).to_dict()["convention"] == "textbook"
    assert replace(SETTINGS, sampler="dpm++2m", convention="reference").schedule == "reference"
    cosine = Generator(generator.model, generator.encoders, generator.autoencoder, "zeros", "v/cos")
    with pytest.raises(UserError, match="v/cos has one of its own"):
        cosine.sample(PROMPTS[:1], [0], replace(SETTINGS, convention="textbook"))
