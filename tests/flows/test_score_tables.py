from __future__ import annotations

from flows.scores import PICTURES_SHOWN, score_rows, thumbnails
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
