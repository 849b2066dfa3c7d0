"""Lays out scores as tables: a row a checkpoint and weights, a column a metric."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from sd3core.comparison_grid import READING
from sd3core.data.store import Store
from sd3core.words import counted
from workers.evaluate_tasks import COMPARISON

PICTURES_SHOWN = 6


def shown_of(rows: list[dict[str, Any]], shown: list[str] | None) -> list[dict[str, Any]]:
    """The scores of the protocols that are shown; files of an earlier version have these alone, and do not say so."""
    return rows if shown is None else [row for row in rows if row.get("protocol") in shown]


def score_rows(scores: list[dict[str, Any]]) -> list[dict[str, object]]:
    """Long rows (one a metric) into wide ones, in the order they come; a score that was left out is a dash.

    Scores in bf16 and in fp32 are rows of their own, and then a column says which is which.
    """
    metrics = list(dict.fromkeys(row["metric"] for row in scores))
    several = len({row.get("precision") for row in scores}) > 1
    wide: dict[tuple[Any, ...], dict[str, object]] = {}
    for row in scores:
        place = (row["phase"], row["samples"], row["weights"], row.get("precision"))
        fixed = {"phase": row["phase"], "samples": f"{row['samples']:,}", "weights": row["weights"]}
        fixed |= {"precision": row.get("precision") or "not said"} if several else {}
        entry = wide.setdefault(place, {**fixed, **{metric: "-" for metric in metrics}})
        entry[row["metric"]] = _cell(row)
    return list(wide.values())


def _cell(row: dict[str, Any]) -> str:
    interval = " ({:.1f} to {:.1f})".format(*row["interval"]) if "interval" in row else ""
    return f"{row['value']:.3f}{interval}{', ranks nothing' if row.get('ranks_nothing') else ''}"


def score_notes(
    scores: list[dict[str, Any]], protocols: dict[str, dict[str, Any]], shown: list[str] | None
) -> list[str]:
    """What a reader of the table must know: by which protocol, what the distances are worth, what real pictures score."""
    rows, notes = shown_of(scores, shown), []
    settings = [protocols[fp] for fp in protocols if shown is None or fp in shown]
    drawn = {_drawn(protocol) for protocol in settings if "settings" in protocol}
    precisions = sorted({protocol["precision"] for protocol in settings})
    others = len(protocols) - len(settings)
    if rows:
        more = f"; scores.json has those of {counted(others, 'other protocol')} too" if others else ""
        notes.append(f"scores: {'; '.join(sorted(drawn)) or 'no pictures'}; {' and '.join(precisions)}{more}")
    for row in rows:
        if row["metric"] == "clip_fid" and "dimensions" in row:
            of = f"{row['count']} pictures for {row['dimensions']} dimensions"
            head = f"{row['phase']} clip_fid: "
            notes.append(head + (f"ranks nothing: {of}" if row["ranks_nothing"] else of) + _real(row))
        elif row["metric"] == "clip_score" and "real" in row:
            real = row["real"]
            notes.append(
                f"{row['phase']} clip_score: the real pictures of {real['count']} prompts score {real['value']:.3f}"
            )
    return list(dict.fromkeys(notes))


def _drawn(protocol: dict[str, Any]) -> str:
    settings = protocol["settings"]
    return f"{settings['sampler']}, {settings['num_steps']} steps, guidance {settings['guidance_scale']:g}"


def _real(row: dict[str, Any]) -> str:
    if "real" not in row:
        return "; too few pictures are held out to compare real ones with real ones"
    real = row["real"]
    return f"; as many real pictures against the others score {real['value']:.1f} +- {real['spread']:.1f} ({real['sets']} sets)"


def shapes_bench_rows(tasks: list[dict[str, Any]]) -> list[dict[str, object]]:
    """ShapesBench of the newest EMA weights: a row a task, right pictures of all and by kind and size, beside what chance gives."""
    ema = [row for row in tasks if row["weights"] == "ema"]
    newest = [row for row in ema if row["checkpoint"] == ema[-1]["checkpoint"]]
    if not newest:
        return []
    tallies = {
        "right": [row["all"] for row in newest],
        "seen combinations": [row["seen"] for row in newest],
        "unseen": [row["unseen"] for row in newest],
    }
    sizes = newest[0]["sizes"]
    if len(sizes) > 1:  # height x width
        tallies |= {f"{size} px": [row["sizes"][size] for row in newest] for size in sizes}
    rows = [
        {"task": row["task"]}
        | {column: _share(of_tasks[place]) for column, of_tasks in tallies.items()}
        | {"chance": f"{row['chance']:.3f}"}
        for place, row in enumerate(newest)
    ]
    means = {column: _mean_share(of_tasks) for column, of_tasks in tallies.items()}
    chance = fmean(row["chance"] for row in newest)
    return [*rows, {"task": "mean of the tasks"} | means | {"chance": f"{chance:.3f}"}]


def left_out_lines(scores: list[dict[str, Any]], left_out: list[dict[str, Any]]) -> list[str]:
    """What is left out and why; where there is no score at all one line says it, by the reason of the plainest."""
    found = {(row["metric"], row["reason"]) for row in left_out}
    plainest = {("every score", reason) for metric, reason in found if metric == "validation_loss"}
    if plainest and not scores:
        found = plainest | {(metric, reason) for metric, reason in found if metric == "grid"}
    return sorted(f"{metric} is left out: {reason}" for metric, reason in found)


def _mean_share(tallies: list[dict[str, int]]) -> str:
    shares = [tally["right"] / tally["pictures"] for tally in tallies if tally["pictures"]]
    return f"{fmean(shares):.3f}" if shares else "-"


def _share(tally: dict[str, int]) -> str:
    """ "0.900 (54 of 60)"; a dash where the task has no such prompt."""
    right, pictures = tally["right"], tally["pictures"]
    return f"{right / pictures:.3f} ({right} of {pictures})" if pictures else "-"


def thumbnails(store: Store, pictures: list[dict[str, Any]]) -> dict[str, bytes]:
    """The newest EMA grids, small enough to stand in the UI."""
    newest = [picture for picture in pictures if picture["weights"] == "ema"][-PICTURES_SHOWN:]
    return {
        f"{READING if p['name'] == COMPARISON else p['name']}, {p['phase']}, {p['samples']:,} samples": store.get(
            p["thumbnail"]
        )
        for p in newest
    }
