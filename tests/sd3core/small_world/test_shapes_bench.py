"""The bench: fixed prompts, verdicts on right and wrong pictures, scores and chance."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scene_pictures import at_64, reconstructed, scene_of

from sd3core.small_world import shapes_bench
from sd3core.small_world.detector import detect
from sd3core.small_world.scenes import draw_scene, render
from sd3core.small_world.shapes_bench import (
    BenchPrompt,
    Required,
    Tally,
    Verdict,
    judge,
    judge_detections,
    load_prompts,
    score,
)
from sd3core.small_world.world import (
    COLOURS,
    RELATIONS,
    SHAPES,
    TASKS,
    count_is_reserved,
    pair_is_reserved,
    relation_holds,
)

LAYOUTS = {
    1: [(32, 32, 26)],
    2: [(16, 30, 18), (46, 34, 18)],
    3: [(16, 16, 16), (46, 18, 17), (30, 46, 16)],
    4: [(16, 16, 16), (46, 18, 17), (16, 46, 16), (48, 46, 15)],
}
PAIRS = {  # places of the first and second object
    "left of": [(16, 30, 18), (46, 34, 18)], "right of": [(48, 30, 18), (18, 34, 18)],
    "above": [(30, 16, 18), (34, 46, 18)], "below": [(30, 46, 18), (34, 16, 18)],
}  # fmt: skip


def picture_for(prompt: BenchPrompt, colours=("red", "blue"), relation: str | None = None) -> np.ndarray:
    """A picture of what the prompt asks for, drawn from its fields; free colours are taken from `colours`."""
    kinds = [(r.shape, r.colour or colours[i]) for i, r in enumerate(prompt.objects) for _ in range(r.count)]
    places = PAIRS[relation or prompt.relation] if prompt.relation else LAYOUTS[len(kinds)]
    return at_64(render(scene_of(*[(*kind, *place) for kind, place in zip(kinds, places)])))


def test_regenerating_the_prompts_gives_the_same_bytes(tmp_path):
    for path in shapes_bench.write_prompts(tmp_path):
        assert path.read_bytes() == (shapes_bench.PROMPTS / path.name).read_bytes()


@pytest.mark.parametrize("task", TASKS)
def test_prompts_are_sixty_distinct_and_honest(task):
    prompts = load_prompts(task)
    assert len(prompts) >= 60 and len({prompt.text for prompt in prompts}) == len(prompts)
    for prompt in prompts:
        assert prompt.task == task and len(prompt.text.split()) <= 14
        for item in prompt.objects:
            assert item.shape in prompt.text and (item.colour or "") in prompt.text
        if not prompt.coloured:
            assert not any(colour in prompt.text.split() for colour in COLOURS)
        assert (prompt.relation or "") in prompt.text and (prompt.relation is not None) == (task == "position")
        first, *others = [(item.shape, item.colour) for item in prompt.objects]
        reserved = prompt.coloured and (
            pair_is_reserved(first, others[0]) if others else count_is_reserved(*first, prompt.objects[0].count)
        )
        assert prompt.seen is not reserved
    unseen = sum(not prompt.seen for prompt in prompts)
    assert unseen == {"counting": 12, "position": 20, "color_attribution": 30}.get(task, 0)


def test_prompts_are_balanced():
    counts = [prompt.objects[0].count for prompt in load_prompts("counting")]
    assert {count: counts.count(count) for count in (2, 3, 4)} == {2: 20, 3: 20, 4: 20}
    relations = [prompt.relation for prompt in load_prompts("position")]
    assert all(relations.count(relation) == 15 for relation in RELATIONS)


@pytest.mark.parametrize("task", TASKS)
def test_right_pictures_count_and_wrong_ones_do_not(task):
    for index, prompt in enumerate(load_prompts(task)):
        picture = reconstructed(picture_for(prompt), index)
        assert judge(picture, prompt) == Verdict(True, "as asked"), prompt.text
        first = prompt.objects[0]
        other_shape = next(shape for shape in SHAPES if shape not in [item.shape for item in prompt.objects])
        wrong = replace(prompt, objects=(replace(first, shape=other_shape), *prompt.objects[1:]))
        assert "asked for" in judge(picture_for(wrong), prompt).reason
        colours = picture_for(prompt, ("yellow", "cyan"))
        assert judge(colours, prompt).correct  # free colours stay free, asked colours are drawn all the same
        if first.colour:
            other = next(colour for colour in COLOURS if colour not in [item.colour for item in prompt.objects])
            wrong = replace(prompt, objects=(replace(first, colour=other), *prompt.objects[1:]))
            assert not judge(picture_for(wrong), prompt).correct
        if first.count > 1:
            for count in {2, 3, 4} - {first.count}:
                assert not judge(picture_for(replace(prompt, objects=(replace(first, count=count),))), prompt).correct
        if prompt.relation:
            for relation in set(RELATIONS) - {prompt.relation}:
                assert not judge(picture_for(prompt, relation=relation), prompt).correct


def test_swapped_colours_do_not_count():
    prompt = next(prompt for prompt in load_prompts("color_attribution"))
    a, b = prompt.objects
    swapped = replace(prompt, objects=(replace(a, colour=b.colour), replace(b, colour=a.colour)))
    assert judge(picture_for(swapped), swapped).correct and not judge(picture_for(swapped), prompt).correct


def test_nothing_more_and_nothing_less():
    prompt = BenchPrompt("a circle", "single_object", (Required("circle", None, 1),), None, True)
    circle, square = ("circle", "red", 18, 30, 20), ("square", "blue", 48, 34, 18)
    assert judge(render(scene_of(circle)), prompt).correct
    assert (
        judge(render(scene_of(circle, square)), prompt).reason == "asked for 1 x circle, shows 1 x circle, 1 x square"
    )
    assert judge(render(scene_of()), prompt).reason == "asked for 1 x circle, shows nothing"
    picture = render(scene_of(circle, square))
    picture[:, 96:] = picture[0, 0]  # half of the square wiped away
    assert "no whole object" in judge(picture, prompt).reason


def test_a_relation_needs_a_margin():
    """Half the mean width along the axis, however exact the direction: two bars that nearly touch are not one above the
    other. And within 60 degrees of it, however far apart.
    """
    kinds = Required("bar", "red", 1), Required("bar", "blue", 1)
    prompt = BenchPrompt("", "position", kinds, "above", True)
    place = lambda x, y: render(scene_of(("bar", "red", x, y, 20), ("bar", "blue", 40, 40, 20)))
    reasons = [judge(place(x, y), prompt).reason for x, y in ((40, 31), (40, 28), (14, 28), (24, 28))]
    assert reasons == ["the bar is not above the bar", "as asked", "the bar is not above the bar", "as asked"]
    prompt = BenchPrompt("", "position", (Required("circle", None, 1), Required("square", None, 1)), "above", True)
    place = lambda y: render(scene_of(("circle", "red", 16, y, 18), ("square", "blue", 46, 40, 18)))
    assert not judge(place(36), prompt).correct and not judge(place(30), prompt).correct
    assert judge(place(14), prompt).correct
    assert not relation_holds("left of", (30, 32), (40, 32), (20, 20)) and relation_holds(
        "left of", (29, 32), (40, 32), (20, 20)
    )


def test_a_swapped_relation_is_found_in_fresh_scenes():
    """All of them, and all right ones count, blurred and noisy at 64 px."""
    scenes = [scene for scene in (draw_scene(203, index) for index in range(700)) if scene.relation]
    assert len(scenes) >= 100
    right = {relation: [] for relation in ("asked", *RELATIONS)}
    for index, scene in enumerate(scenes):
        found = detect(reconstructed(at_64(render(scene)), index, 0.7, 4.0))
        objects = tuple(Required(item.shape, item.colour, 1) for item in scene.objects)
        for relation in RELATIONS:
            kind = "asked" if relation == scene.relation else relation
            right[kind].append(judge_detections(found, BenchPrompt("", "position", objects, relation, True)).correct)
    assert np.mean(right.pop("asked")) >= 0.99
    assert not any(any(verdicts) for verdicts in right.values())


def test_score_counts_all_and_splits_coloured_prompts_into_seen_and_unseen():
    found = {task: score((prompt, Verdict(prompt.seen, "")) for prompt in load_prompts(task)) for task in TASKS}
    assert {task: share.all.right for task, share in found.items()} == {
        "single_object": 60,
        "two_objects": 60,
        "counting": 48,
        "colors": 60,
        "position": 40,
        "color_attribution": 30,
    }
    assert found["counting"].seen == Tally(24, 24) and found["counting"].unseen == Tally(0, 12)
    assert found["two_objects"].seen == found["two_objects"].unseen == Tally(0, 0)  # no colours are asked for
    assert all(share.all.pictures == 60 for share in found.values())


def test_a_limit_spreads_over_the_file():
    few = load_prompts("position", 6)
    assert len(few) == 6 and not few[-1].seen and few[0].seen
    assert load_prompts("position", 1000) == load_prompts("position")
    with pytest.raises(ValueError, match="unknown task"):
        load_prompts("colour")


def test_chance_levels():
    """Measured; the shape tasks agree with what the scene distribution gives: 1/3 lone objects of 4 shapes, half pairs
    of 6 kinds.
    """
    levels = shapes_bench.chance_levels(seed=5, n=200)
    stored = shapes_bench.chance()
    assert set(stored) == set(levels)
    assert all(stored[task] == pytest.approx(levels[task], abs=0.03) for task in levels)
    assert levels["single_object"] == pytest.approx(1 / 12, abs=0.03) and levels["two_objects"] == pytest.approx(
        1 / 12, abs=0.03
    )
    assert all(levels[task] < 0.03 for task in ("counting", "colors", "position", "color_attribution"))
