"""Near-duplicates are found among pictures that the threshold was not tuned on, as often as is promised."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import binomtest
from typer.testing import CliRunner

from flows.cli.commands import app
from sd3core.bench.duplicates import DuplicatesBench, Share, measure_duplicates
from sd3core.bench.planted import ALTERATIONS, distinct_pictures


@pytest.fixture(scope="module")
def measured():
    return measure_duplicates(DuplicatesBench())


def test_rescaled_and_recompressed_pictures_are_found_and_hardly_any_other_goes(measured):
    assert measured.distinct >= 2_000
    found = {of_kind.kind: of_kind for of_kind in measured.found}
    assert list(found) == list(ALTERATIONS)
    for kind in ("rescaled", "recompressed", "mirrored"):
        assert found[kind].recall.interval[0] >= 0.95 and found[kind].precision.value >= 0.98, found[kind]
    assert found["cropped"].recall.value >= 0.3 and found["cropped"].precision.value >= 0.95, found["cropped"]


def test_a_lower_threshold_finds_more_and_takes_distinct_pictures_for_alike(measured):
    """So the measure can fail: of a threshold that is too low, precision falls; of one that finds nothing, recall."""
    bench = DuplicatesBench(planted=300)
    loose, strict = (measure_duplicates(replace(bench, threshold=value)) for value in (0.95, 0.9999))
    assert all(of_kind.precision.value < 0.9 for of_kind in loose.found)
    assert loose.found[2].recall.value > measured.found[2].recall.value > strict.found[2].recall.value
    assert strict.found[1].recall.value < 0.9


def test_tuning_and_test_pictures_share_none(tmp_path):
    first, second = (list(distinct_pictures(40, seed, tmp_path, odd)) for seed, odd in ((11, False), (12, True)))
    photographs = [{p.key.split("-")[1] for p in pictures if p.key.startswith("photo")} for pictures in (first, second)]
    assert not photographs[0] & photographs[1] and all(len(names) > 4 for names in photographs)
    of = [{np.asarray(picture.image).tobytes() for picture in pictures} for pictures in (first, second)]
    assert not of[0] & of[1] and len(of[0]) == len(first)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (297, 300), (1, 3)])
def test_the_interval_is_wilsons(right, total):
    wanted = binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert Share(right, total).interval == pytest.approx((wanted.low, wanted.high), abs=1e-6)
    assert Share(0, 0).interval == (0.0, 1.0)


def test_the_command_prints_recall_and_precision_by_kind(tmp_path):
    out = Path(tmp_path, "figures.json")
    done = CliRunner().invoke(app, ["bench", "duplicates", "--scenes", "30", "--planted", "10", "--json", str(out)])
    assert done.exit_code == 0, done.output
    assert [line.split()[0] for line in done.output.splitlines()[-4:]] == list(ALTERATIONS)
    assert [of_kind["kind"] for of_kind in json.loads(out.read_text())["result"]["found"]] == list(ALTERATIONS)
    refused = CliRunner().invoke(app, ["bench", "duplicates", "--scenes", "30", "--planted", "31"])
    assert str(refused.exception) == "--planted 31 is more than the 30 scenes; lower it, or raise --scenes"
