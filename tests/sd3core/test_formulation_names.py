"""Names of formulations: any numbers, one name for equal ones, versions held by golden numbers, a new one by one line."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sd3core import specs
from sd3core.errors import RecipeError, UserError
from sd3core.formulation_names import (
    FORMULATION_KINDS,
    FORMULATION_NAMES,
    PAPER,
    FormulationKind,
    canonical_name,
    family,
    formulation_version,
    shift_problem,
)
from sd3core.formulations import FORMULATIONS, find_formulation
from sd3core.recipe_file import load_recipe
from sd3core.specs import fingerprint
from sd3core.timestep_sampling import CosMap, LogitNormal, Mode

GOLDEN = Path(__file__).with_name("golden_formulations.json")
CORNERS = [
    f"{kind}({m},{s})" if len(of.numbers) == 2 else f"{kind}({m})"
    for kind, of in FORMULATION_KINDS.items()
    if of.numbers
    for m in (of.numbers[0].low, of.numbers[0].high)
    for s in ((of.numbers[1].low, of.numbers[1].high) if len(of.numbers) == 2 else (None,))
]


def numbers_of(name: str) -> list[float]:
    """What training and sampling see of a formulation: draws, levels, weights, inputs, targets, the grid, with a shift too."""
    one, noise = torch.ones(3, 1, dtype=torch.float64), torch.full((3, 1), -0.5, dtype=torch.float64)
    found: list[float] = []
    for shift in (1.0,) if shift_problem(name, 2.0) else (1.0, 2.0):
        formulation = find_formulation(name).shifted(shift)
        t = formulation.quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64))
        z_in, t_in = formulation.network_inputs(formulation.add_noise(one, noise, t), t)
        loss = formulation.loss(lambda z, s: 0 * z, one, noise, t)
        grid = formulation.rf_time(formulation.sampling_grid(4))
        for part in (t, formulation.log_snr(t), formulation.weight(t), z_in.flatten(), t_in, loss, grid):
            found += part.double().tolist()
        found.append(formulation.prior_scale)
    return found


def test_a_changed_formulation_has_another_version():
    """One of each kind. Where the numbers of a kind are meant to change, raise its version in KINDS and write this file anew."""
    golden = json.loads(GOLDEN.read_text())
    assert {name.partition("(")[0] for name in golden} <= FORMULATION_KINDS.keys()
    for name, known in golden.items():
        assert formulation_version(name) == known["version"], (
            f"{name}: {GOLDEN.name} has the numbers of another version"
        )
        assert numbers_of(name) == pytest.approx(known["numbers"], rel=1e-5, abs=1e-8), (
            f"{name}: raise its version in KINDS"
        )


def test_the_papers_61_are_all_there_and_canonical():
    assert set(FORMULATION_NAMES) == set(FORMULATIONS) and len(FORMULATION_NAMES) == 61
    assert [canonical_name(name) for name in FORMULATION_NAMES] == list(FORMULATION_NAMES)


@pytest.mark.parametrize(
    ("written", "canonical", "density"),
    [
        ("rf/lognorm(0,1)", "rf/lognorm(0.00,1.00)", LogitNormal(0.0, 1.0)),
        ("rf/lognorm( -0.0 , 1.000 )", "rf/lognorm(0.00,1.00)", LogitNormal(0.0, 1.0)),
        ("rf/lognorm(0.3,+.8e0)", None, None),
        ("rf/lognorm(0.3,0.8)", "rf/lognorm(0.30,0.80)", LogitNormal(0.3, 0.8)),
        ("rf/lognorm(0.305,1e0)", "rf/lognorm(0.305,1.00)", LogitNormal(0.305, 1.0)),
        ("rf/mode(1.29)", "rf/mode(1.29)", Mode(-1 + 2.75 * 5 / 6)),
        ("rf/mode(1.2900)", "rf/mode(1.29)", Mode(-1 + 2.75 * 5 / 6)),  # the paper's, as it prints it
        ("rf/mode(1.2901)", "rf/mode(1.2901)", Mode(1.2901)),
        ("rf/mode(0.375)", "rf/mode(0.38)", Mode(0.375)),  # the paper's by its number
        ("rf/mode(1.5)", "rf/mode(1.50)", Mode(1.5)),
        ("rf/cosmap", "rf/cosmap", CosMap()),
    ],
)
def test_equal_formulations_have_one_name(written, canonical, density):
    if canonical is None:
        with pytest.raises(
            ValueError, match="cannot be read; write rf/lognorm.m,s. with m from -5 to 5 and s from 0.05 to 5"
        ):
            canonical_name(written)
        return
    assert canonical_name(written) == canonical
    formulation = find_formulation(written)
    assert (formulation.name, formulation.timestep_density) == (canonical, density)
    assert formulation is find_formulation(canonical)


def test_numbers_of_edm_are_those_of_ln_sigma():
    formulation = find_formulation("edm(-0.4, 1)")
    assert (formulation.name, formulation.trajectory.levels) == ("edm(-0.40,1.00)", LogitNormal(-0.4, 1.0))
    assert family(formulation.name) == "edm" and formulation.name not in PAPER


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("rf/lognorm(9,1)", "formulation 'rf/lognorm(9,1)': its mean of logit t, 9, is not between -5 and 5"),
        ("rf/mode(1.76)", "formulation 'rf/mode(1.76)': its scale, 1.76, is not between -1 and 1.75"),
        ("edm(0,0)", "formulation 'edm(0,0)': its standard deviation of ln sigma, 0, is not between 0.3 and 3"),
        ("edm(1e999,1)", "formulation 'edm(1e999,1)': its mean of ln sigma, inf, is not between -3 and 3"),
        (
            "edm(nan,1)",
            "formulation 'edm(nan,1)' cannot be read; write edm(m,s) with m from -3 to 3 and s from 0.3 to 3",
        ),
        ("rf/mode", "formulation 'rf/mode' cannot be read; write rf/mode(s) with s from -1 to 1.75"),
        ("rf(1)", "formulation 'rf(1)' cannot be read; write rf"),
        (
            "rf/lognorm(0,1",
            "formulation 'rf/lognorm(0,1' cannot be read; write rf/lognorm(m,s) with m from -5 to 5 and s from 0.05 to 5",
        ),
        ("rf/lognrm(0,1)", "formulation 'rf/lognrm(0,1)' is not known; did you mean 'rf/lognorm(m,s)'?"),
        ("v/cosine", "formulation 'v/cosine' is not known; did you mean 'v/cos'?"),
    ],
)
def test_what_cannot_be_is_told_with_the_bounds(written, message):
    with pytest.raises(UserError) as caught:
        find_formulation(written)
    assert str(caught.value) == message
    with pytest.raises(RecipeError, match="pretrain.formulation: formulation"):
        load_recipe("tiny-test", [f"pretrain.formulation={json.dumps(written)}"])


@pytest.mark.parametrize("name", CORNERS)
def test_formulations_hold_at_their_bounds(name):
    """Losses are finite to the last draw, weights are positive, and sampling's grid reaches from its first level to the data."""
    for shift in (1.0, 3.0):
        formulation = find_formulation(name).shifted(shift)
        u = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1 - 2**-53], dtype=torch.float64)
        x0, noise = torch.ones(len(u), 4), torch.full((len(u), 4), -0.5)
        losses = formulation.loss(lambda z, s: z + s[:, None], x0, noise, formulation.quantile(u).float())
        assert losses.isfinite().all()
        assert formulation.weight(formulation.quantile(torch.tensor([0.3, 0.7], dtype=torch.float64))).min() > 0
        sigmas = formulation.sigmas(25, "textbook").double()
        assert torch.equal(sigmas.sort(descending=True).values.unique(), sigmas.flip(0)) and sigmas[-1] == 0
        assert math.isfinite(formulation.prior_scale)
        if name.startswith("edm"):  # Karras' second-to-last level, whatever the density of training is
            level = sigmas[-2] / (1 - sigmas[-2])
            assert float(level) == pytest.approx(0.002 * shift, rel=1e-4)


def test_one_name_is_one_fingerprint():
    def spec(*overrides: str) -> str:
        recipe = load_recipe("tiny-test", list(overrides))
        return fingerprint(specs.train_fields(recipe, recipe.pretrain, latents="0", text="0", init=None))

    assert spec() == spec("pretrain.formulation=rf/lognorm(0,1)") == spec("pretrain.formulation=rf/lognorm(0.000,1.)")
    assert spec() != spec("pretrain.formulation=rf/lognorm(0.001,1)")


def test_a_raised_version_is_trained_again_and_nothing_else(monkeypatch):
    recipe = load_recipe("tiny-test", ["pretrain.formulation=rf/cosmap"])

    def fields():
        return [specs.train_fields(recipe, phase, latents="0", text="0", init=None) for _, phase in recipe.phases()]

    before = fields()
    assert not any("formulation_version" in phase for phase in before)
    monkeypatch.setitem(FORMULATION_KINDS, "rf/cosmap", replace(FORMULATION_KINDS["rf/cosmap"], version=2))
    after = fields()
    assert after[0] == before[0] | {"formulation_version": 2} and after[1] == before[1]


def test_a_new_formulation_is_one_line(monkeypatch):
    """It is known to recipes, trains, and is sampled; the paper's 61 stay what they are."""
    monkeypatch.setitem(
        FORMULATION_KINDS, "v/cos-mode", FormulationKind("cosine", "v", "mode", FORMULATION_KINDS["rf/mode"].numbers)
    )
    added = load_recipe("tiny-test", ["finetune=[]", "pretrain.formulation=v/cos-mode(0.5)"])
    assert added.pretrain.formulation == "v/cos-mode(0.50)"
    formulation = find_formulation(added.pretrain.formulation)
    assert formulation.timestep_density == Mode(0.5) and family(formulation.name) == formulation.name
    assert all(map(math.isfinite, numbers_of(formulation.name)))
    assert len(FORMULATIONS) == 61 and formulation.name not in FORMULATIONS
