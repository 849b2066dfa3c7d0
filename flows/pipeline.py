"""The whole chain, from images to an exported checkpoint. Each stage is a flow of its own; the store decides what is done."""

from __future__ import annotations

from typing import Any

from prefect import flow
from prefect.logging import get_run_logger

from flows.caption import caption
from flows.encode import encode
from flows.evaluate import evaluate
from flows.export import export
from flows.filter import filter as filter_rows
from flows.finetune import finetune
from flows.ingest import ingest
from flows.pretrain import pretrain
from flows.session import session
from flows.stage import FLOW_OPTIONS
from flows.summary import write_summary
from flows.towers import towers
from flows.upgrade import check_upgrade
from flows.upstream import Upstream
from sd3core.data.begun import begin, end
from sd3core.moving_average import short_average_warnings
from sd3core.specs import run_folder, scores_path
from workers.ray_session import living_nodes

STAGE_FLOWS = (ingest, towers, filter_rows, caption, encode, pretrain, finetune, evaluate, export)


@flow(name="pipeline", **FLOW_OPTIONS)
def pipeline(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """A retry, a new run and a run on another machine all do the same: they go on where the work stopped.

    `remake`: what stands may be made again where a format rose with this version.
    """
    with session(recipe, overrides) as opened:
        check_upgrade(opened.recipe, opened.store, remake)
        # each stage makes its own: it finds what those before it have made
        before = Upstream(opened.recipe, opened.store)
        before.check_room(living_nodes)
        before.check_start_from()
        before.check_vae()
        before.check_captioner()
        run, folder = opened.recipe.run, run_folder(opened.recipe.run)
        begin(opened.store, run, "pipeline", folder, needs=[opened.recipe.model.start_from])
        for warning in short_average_warnings(opened.recipe):
            get_run_logger().warning(warning)
        outcomes: list[dict[str, Any]] = []
        for stage_flow in STAGE_FLOWS:
            if stage_flow is filter_rows and opened.recipe.filter is None:
                continue
            # now that it stands, what follows it may show another version's
            if outcomes and outcomes[-1]["state"] == "done":
                check_upgrade(opened.recipe, opened.store, remake)
            outcomes.append(stage_flow(recipe, overrides))
        scores = opened.store.get_json(scores_path(run))
        summary = write_summary(opened.store, opened.recipe, outcomes, scores, overrides)
        end(opened.store, run, "pipeline", folder)
        return summary
