"""Before stage 3, filter: which images are kept, where the recipe says so.

Paper section 5.3.1 and appendix E.2. No bytes are moved: later stages read the lists of keys that stay.
"""

from __future__ import annotations

from typing import Any

from prefect import flow

from flows.stage import FLOW_OPTIONS, stage
from flows.ui.filter_page import funnel_table, left_out_pictures, rules_table
from workers.filter import filter_stage


@flow(name="filter", **FLOW_OPTIONS)
def filter(recipe: str, overrides: list[str] | None = None, remake: bool = False) -> dict[str, Any]:
    """With no filter in the recipe there is nothing to make: all images are kept then."""
    with stage("filter", recipe, overrides, remake) as run:
        result = filter_stage(run.recipe, run.store, run.upstream.raw, run.report)
        if run.recipe.filter is None:
            return run.finish(result)
        tables = [funnel_table(run.store, result.manifest), rules_table(run.recipe.filter)]
        pictures = {} if result.skipped else left_out_pictures(run.recipe, run.store, run.upstream.raw, result.manifest)
        return run.finish(result, tables, pictures)
