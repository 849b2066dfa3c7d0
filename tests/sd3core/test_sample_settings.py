from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest

from sd3core.sample_settings import Sampler, SampleSettings
from sd3core.sampling import SAMPLERS
from sd3core.specs import fingerprint

EULER = SampleSettings(64, 48)
FULL = SampleSettings(32, 32, 2, 2.0, 1.5, ("t5", "clip_l"), "textbook")


def test_scores_made_with_euler_keep_their_fingerprint():
    """The golden values: others would have every score made again."""
    assert fingerprint(EULER.to_dict()) == "98fd01a33042"
    assert fingerprint(FULL.to_dict()) == "44f8f6499fa3"


@pytest.mark.parametrize(
    "change", [{"sampler": "heun"}, {"sampler": "dpm++2m"}, {"sampler": "dpm++2m-sde"}, {"negative_prompt": ""}]
)
def test_another_way_to_draw_is_another_protocol(change):
    changed = replace(FULL, **change)
    assert fingerprint(changed.to_dict()) != fingerprint(FULL.to_dict())
    assert changed.to_dict() | change == changed.to_dict()
    assert SampleSettings.from_dict(changed.to_dict()) == replace(changed, drop=("clip_l", "t5"))


def test_every_sampler_has_a_name():
    assert set(SAMPLERS) == set(get_args(Sampler))
