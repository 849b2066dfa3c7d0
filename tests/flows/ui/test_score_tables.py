from __future__ import annotations

from flows.ui.scores import (
    PICTURES_SHOWN,
    left_out_lines,
    score_notes,
    score_rows,
    shapes_bench_rows,
    shown_of,
    thumbnails,
)
from sd3core.data.store import open_store


def score(phase, samples, weights, metric, value):
    return {
        "checkpoint": "c",
        "phase": phase,
        "samples": samples,
        "weights": weights,
        "protocol": "p",
        "metric": metric,
        "value": value,
        "count": 1,
    }


def test_a_row_for_each_checkpoint_and_kind_of_weights():
    rows = score_rows(
        [
            score("pretrain", 12800, "ema", "validation_loss", 0.81649),
            score("pretrain", 12800, "live", "validation_loss", 0.9),
            score("finetune.0", 640, "ema", "validation_loss", 0.7),
            score("finetune.0", 640, "ema", "clip_score", 0.25),
        ]
    )
    assert rows == [
        {"phase": "pretrain", "samples": "12,800", "weights": "ema", "validation_loss": "0.816", "clip_score": "-"},
        {"phase": "pretrain", "samples": "12,800", "weights": "live", "validation_loss": "0.900", "clip_score": "-"},
        {"phase": "finetune.0", "samples": "640", "weights": "ema", "validation_loss": "0.700", "clip_score": "0.250"},
    ]
    assert score_rows([]) == []


def bench(checkpoint, weights, task, seen, unseen, chance, **sizes):
    tally = dict(zip(("right", "pictures"), (a + b for a, b in zip(seen, unseen, strict=True)), strict=True))
    kinds = {"seen": {"right": seen[0], "pictures": seen[1]}, "unseen": {"right": unseen[0], "pictures": unseen[1]}}
    sizes = {size.strip("_"): {"right": right, "pictures": pictures} for size, (right, pictures) in sizes.items()}
    own = {"checkpoint": checkpoint, "weights": weights, "task": task, "all": tally, "chance": chance}
    return own | kinds | {"sizes": sizes or {"64x64": tally}}


def test_shapes_bench_beside_seen_unseen_and_chance():
    """Of the newest checkpoint's EMA alone; the mean is over tasks, and of unseen combinations over those that have any."""
    rows = shapes_bench_rows(
        [
            bench("old", "ema", "colors", (0, 20), (0, 0), 0.01),
            bench("new", "ema", "colors", (18, 20), (0, 0), 0.01),
            bench("new", "live", "colors", (1, 20), (0, 0), 0.01),
            bench("new", "ema", "counting", (4, 10), (1, 10), 0.03),
        ]
    )
    assert rows == [
        {
            "task": "colors",
            "right": "0.900 (18 of 20)",
            "seen combinations": "0.900 (18 of 20)",
            "unseen": "-",
            "chance": "0.010",
        },
        {
            "task": "counting",
            "right": "0.250 (5 of 20)",
            "seen combinations": "0.400 (4 of 10)",
            "unseen": "0.100 (1 of 10)",
            "chance": "0.030",
        },
        {
            "task": "mean of the tasks",
            "right": "0.575",
            "seen combinations": "0.650",
            "unseen": "0.100",
            "chance": "0.020",
        },
    ]
    assert shapes_bench_rows([]) == []


def test_shapes_bench_by_size_where_there_are_several():
    rows = shapes_bench_rows(
        [
            bench("new", "ema", "colors", (18, 20), (0, 0), 0.01, _96x96=(9, 10), _80x112=(5, 10)),
            bench("new", "ema", "counting", (4, 10), (1, 10), 0.03, _96x96=(1, 10), _80x112=(0, 0)),
        ]
    )
    assert [row["96x96 px"] for row in rows] == ["0.900 (9 of 10)", "0.100 (1 of 10)", "0.500"]
    assert [row["80x112 px"] for row in rows] == ["0.500 (5 of 10)", "-", "0.500"]


def test_the_newest_ema_pictures_are_shown(tmp_path):
    store = open_store(str(tmp_path))
    pictures = []
    for number in range(PICTURES_SHOWN + 2):
        for weights in ("ema", "live"):
            store.put(f"{number}-{weights}.jpg", f"{number}-{weights}".encode())
            pictures.append(
                {
                    "phase": "pretrain",
                    "samples": 1000 * number,
                    "weights": weights,
                    "name": "grid",
                    "thumbnail": f"{number}-{weights}.jpg",
                }
            )
    shown = thumbnails(store, pictures)
    assert list(shown.values()) == [f"{number}-ema".encode() for number in range(2, PICTURES_SHOWN + 2)]
    assert list(shown)[-1] == "grid, pretrain, 7,000 samples"


def test_without_any_score_one_line_says_why():
    left_out = [
        {"metric": "clip_fid", "reason": "FID needs at least 65 generated images; there is 1"},
        {"metric": "validation_loss", "reason": "validation loss needs at least 8 held-out images; there is 1"},
    ] * 2
    assert left_out_lines([], left_out) == [
        "every score is left out: validation loss needs at least 8 held-out images; there is 1"
    ]
    scored = [score("pretrain", 8, "ema", "clip_score", 0.5)]
    assert left_out_lines(scored, left_out[:1]) == [
        "clip_fid is left out: FID needs at least 65 generated images; there is 1"
    ]


def test_a_distance_stands_with_its_interval_and_what_it_is_worth():
    beside = {"interval": [9.12, 14.3], "dimensions": 64, "ranks_nothing": True, "count": 72}
    fid = score("pretrain", 8, "ema", "clip_fid", 11.7) | beside
    fid["real"] = {"value": 6.04, "spread": 0.51, "sets": 5, "count": 72}
    assert score_rows([fid])[0]["clip_fid"] == "11.700 (9.1 to 14.3), ranks nothing"
    protocol = {"precision": "bf16", "settings": {"sampler": "euler", "num_steps": 28, "guidance_scale": 4.0}}
    notes = score_notes([fid], {"p": protocol, "q": protocol | {"precision": "fp32"}}, ["p"])
    assert notes == [
        "scores: euler, 28 steps, guidance 4; bf16; scores.json has those of 1 other protocol too",
        "pretrain clip_fid: ranks nothing: 72 pictures for 64 dimensions; as many real pictures against the others score"
        " 6.0 +- 0.5 (5 sets)",
    ]


def test_scores_in_two_precisions_are_rows_of_their_own():
    rows = [
        score("pretrain", 8, "ema", "clip_score", value) | {"precision": p}
        for p, value in (("bf16", 0.5), ("fp32", 0.6))
    ]
    assert [(row["precision"], row["clip_score"]) for row in score_rows(rows)] == [("bf16", "0.500"), ("fp32", "0.600")]
    assert "precision" not in score_rows(rows[:1])[0]


def test_only_the_shown_protocols_are_in_the_table_and_older_files_show_all():
    rows = [
        score("pretrain", 8, "ema", "clip_score", 0.5),
        score("pretrain", 8, "ema", "clip_score", 0.9) | {"protocol": "q"},
    ]
    assert shown_of(rows, ["q"]) == rows[1:] and shown_of(rows, None) == rows
