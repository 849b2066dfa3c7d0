"""`sd3 bench encode` without encoders: what it asks for, prints and writes."""

from __future__ import annotations

import json

import pytest

from sd3core.data.manifest import ManifestRef
from sd3core.towers.precision_difference import PrecisionDifference
from workers import encode_bench
from workers.encode_bench import KINDS, WAYS, EncodeRates


@pytest.fixture
def measured(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    monkeypatch.setattr("flows.upstream.Upstream.towers", ManifestRef("towers/t/0", "0" * 64))

    def encoding(settings, recipe, store, towers, on_round, say):
        asked.append((settings, recipe.encode.text_precision, towers.folder))
        on_round(1)
        return [EncodeRates(kind, dict(zip(WAYS, ([2.0, 2.0], [3.0, 3.0], [5.1, 5.1]), strict=True))) for kind in KINDS]

    monkeypatch.setattr(encode_bench, "measure_encoding", encoding)
    difference = PrecisionDifference(0.99998, 0.9995, 0.004, 0.02)
    monkeypatch.setattr(encode_bench, "measure_differences", lambda *_: {"t5": difference, "latents": difference})
    return asked


def test_the_command_prints_tables_and_writes_the_figures(sd3, measured, tmp_path):
    figures = tmp_path / "figures.json"
    settings = ("--shards", "8", "--rows", "16", "--rounds", "2", "--set", "encode.text_precision=auto")
    code, out, _ = sd3("bench", "encode", "--recipe", "tiny-test", *settings, "--json", str(figures))
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    assert ["t5", "0.99998", "0.99950", "0.40%", "2.00%"] in lines
    assert ["text", "2.00", "3.00", "5.10", "1.50", "1.70"] in lines
    assert "shards of 16 rows a second; text in fp32" in out
    ((asked, precision, towers),) = measured
    assert (asked.shards, asked.rows, asked.rounds, precision, towers) == (8, 16, 2, "fp32", "towers/t/0")
    written = json.loads(figures.read_text())
    assert written["rates"]["latents"]["two actors"] == [5.1, 5.1] and written["bf16"]["t5"]["least_cosine"] == 0.9995


def test_towers_that_were_not_made_are_asked_for(sd3, monkeypatch, tmp_path):
    monkeypatch.setenv("SD3_HOME", str(tmp_path))
    code, _, error = sd3("bench", "encode", "--recipe", "tiny-test")
    assert code == 1 and "towers is not finished for this recipe" in error and len(error.splitlines()) == 1
