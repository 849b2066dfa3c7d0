"""`sd3 import` and `sd3 export`: weights alone, in and out. (The stage `export` makes a whole pipeline folder.)"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from flows.cli.options import one_of
from flows.local.home import local_command
from sd3core.checkpoint_facts import CheckpointFacts
from sd3core.errors import UserError
from sd3core.exchange.convert import EXPORT_DTYPES, assumed_facts, export_model, import_model
from sd3core.exchange.diffusers_folder import check_exported
from sd3core.exchange.foreign_weights import ForeignWeights, open_foreign_weights
from sd3core.mmdit import count_parameters
from sd3core.shown_text import shell_word
from workers.caches import checked_here

TARGETS = ("diffusers", "single-file")


def import_weights(
    path: Path,
    out: str,
    *,
    dtype: str | None,
    null: str | None,
    t5_tokens: int | None,
    shift: float | None,
    side_px: int | None,
    prefix: str | None,
    console: Console,
) -> None:
    """Another system's weights as a plain model folder; says what they are, and what is taken for granted."""
    one_of("--dtype", dtype, EXPORT_DTYPES)
    one_of("--null", null, ("zeros", "empty"))
    check_exported(path, checked_here(), "transformer/")
    with open_foreign_weights(path, any_dtype=dtype is not None, prefix=prefix) as foreign:
        for note in foreign.notes:
            _say(console, f"note: {note}")
        facts = assumed_facts(foreign, null=null, t5_tokens=t5_tokens, shift=shift, side_px=side_px)
        with _bar(console, "importing") as show:
            extra = facts.to_extra() | {"imported": {"from": path.name, "as": foreign.form.name}}
            import_model(foreign, out, extra, dtype=dtype, on_bytes=show)
        _say(console, _described(foreign, facts))
    words = ["--checkpoint", out, "--towers", str(foreign.pipeline or "FOLDER")]
    _say(console, f"{out}: try `{local_command('sd3 sample')} {' '.join(map(shell_word, words))} 'a prompt'`")


def export_weights(
    checkpoint: str, out: str, target: str, *, weights: str | None, dtype: str | None, console: Console
) -> None:
    """A checkpoint's transformer in another system's format."""
    one_of("--format", target, TARGETS)
    one_of("--dtype", dtype, EXPORT_DTYPES)
    one_of("--weights", weights, ("ema", "live"))
    if "://" in out:
        raise UserError(f"{out}: name a path on this machine; copy what is written there from it")
    if target == "single-file" and not out.endswith(".safetensors"):
        raise UserError(f"{out}: name a file that ends in .safetensors")
    with _bar(console, "exporting") as show:
        export_model(checkpoint, out, target, weights=weights, dtype=dtype, on_bytes=show)
    _say(console, f"{out}: the transformer of {checkpoint}")


def _described(foreign: ForeignWeights, facts: CheckpointFacts) -> str:
    config = foreign.config
    kinds = [
        f"depth {config.depth}",
        f"{count_parameters(config):,} parameters",
        *(["QK-norm"] if config.qk_norm else []),
        *([f"dual attention in {config.dual_attention_blocks} blocks"] if config.dual_attention_blocks else []),
    ]
    return (
        f"{foreign.form.name}, {', '.join(kinds)}; to be sampled at {facts.side_px} px with shift {facts.shift:g},"
        f" {facts.text.clip_tokens} CLIP and {facts.text.t5_tokens} T5 tokens, no prompt = {facts.null}"
        " (--side, --shift, --t5-tokens, --null say otherwise)"
    )


def _say(console: Console, line: str) -> None:
    console.print(line, soft_wrap=True, highlight=False)


@contextmanager
def _bar(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
