"""Every command and option of `sd3` with hostile values: an exit code, one line on stderr and no traceback, in little time.

Commands and options are found from the program itself, so that later ones are covered. What would start services, load weights or time
a model is replaced by an end of its own: all that is said of arguments is said before. What is left out is what those say.
"""

from __future__ import annotations

import itertools
import random
import time
from pathlib import Path

import pytest
import typer.main

from flows.cli import commands, demo, sample
from flows.local import deployments, services
from sd3core.bench import data as bench_data
from sd3core.bench import duplicates as bench_duplicates
from sd3core.bench import model as bench_model
from sd3core.errors import UserError

SECONDS = 20.0  # of one command, on a machine that has other work
COMMANDS = typer.main.get_command(commands.app)
NUMBERS = [
    "0",
    "-1",
    "-4",
    "1",
    "7",
    "1e9",
    "10**18",
    "1000000000000000000",
    str(2**63),
    str(2**63 - 1),
    "9" * 400,
    "inf",
    "-inf",
    "nan",
    "0x10",
    "²",
    "1_0",
    "",
]
PATHS = [
    "", "~nobody-of-that-name/x", "~", "/proc/none/x", "/proc/self/mem", "/dev/null", "/dev/full", "/dev/null/x", "/sys/x", "x" * 300, "x\x00y",
    "\udcff", "a b", "%20", "%zz", "#", "?", "\n", "\x1b[2J", "\u202e", "😀", "s3://", "s3://b", "s3://b/../x", "s3:///x", "file://", "file://x/y",
    "file:///%00", "file:///%ff", "http://127.0.0.1:9/x", "://", ":", "..", "-",
]  # fmt: skip
WORDS = [
    "",
    " ",
    "x" * 100_000,
    "\x00",
    "\x1b]0;title\x07",
    "\u202e",
    "\udcff",
    "[/]",
    "[bold]",
    ":smile:",
    "{}",
    "%s",
    "'",
    '"',
    "$(x)",
    "😀",
    "\n\n",
    "=",
    "a=b=c",
]
HOSTILE = [*NUMBERS, *PATHS, *WORDS]


class Reached(UserError):
    """What a command does once its arguments are taken."""


@pytest.fixture(autouse=True)
def nothing_starts(tmp_path, monkeypatch):
    def end(*_, **__):
        raise Reached("the arguments are taken")

    monkeypatch.setenv("SD3_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "none")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "none")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr("sd3core.data.store.s3.S3_ATTEMPTS", 1)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    for module in (services, demo):
        monkeypatch.setattr(module, "start_services", end)
    monkeypatch.setattr(deployments, "apply_deployments", end)
    monkeypatch.setattr(bench_model, "measure", end)
    monkeypatch.setattr(bench_data, "measure_data", end)
    monkeypatch.setattr(bench_duplicates, "measure_duplicates", end)
    monkeypatch.setattr(sample, "sample_to_files", end)
    monkeypatch.setattr("torch.set_num_threads", lambda _: None)


def all_commands(group=COMMANDS, name=()):
    for word, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from all_commands(command, (*name, word))
        else:
            yield (*name, word), command


def parameters(kind: str):
    """(command's words, option) or (command's words, number of the argument)."""
    for name, command in all_commands():
        for parameter in command.params:
            if parameter.param_type_name == kind and "--help" not in parameter.opts:
                yield name, parameter


def ends_well(sd3, *arguments: str) -> str:
    begun = time.monotonic()
    code, out, err = sd3(*arguments)
    said = f"{arguments!r}: {code} {err[:300]}"
    assert code in (0, 1, 2), said
    assert "Traceback" not in out + err, said
    assert err.count("\n") == (1 if err else 0) and err.rstrip("\n").isprintable(), said
    assert bool(err) or code == 0 or out, said
    assert len(err) < 6000, said
    assert time.monotonic() - begun < SECONDS, said
    return err


def needed(name: tuple[str, ...], command) -> list[str]:
    """Arguments that a command cannot do without."""
    if name == ("sample",):
        return ["a circle"]
    return ["none"] * sum(p.param_type_name == "argument" and (p.required or p.default is ...) for p in command.params)


OPTIONS = list(parameters("option"))


@pytest.mark.parametrize(
    ("name", "option"), OPTIONS, ids=[" ".join((*name, option.opts[0])) for name, option in OPTIONS]
)
def test_every_option(sd3, name, option):
    command = dict(all_commands())[name]
    rng = random.Random(f"{name} {option.opts[0]}")
    values = [None] if option.is_flag else [*rng.sample(NUMBERS, 3), *rng.sample(PATHS, 3), *rng.sample(WORDS, 2)]
    for value in values:
        ends_well(
            sd3, *name, *needed(name, command), *([option.opts[0]] if value is None else [f"{option.opts[0]}={value}"])
        )


@pytest.mark.parametrize("name", [name for name, _ in all_commands()], ids=" ".join)
def test_every_argument(sd3, name):
    takes = any(parameter.param_type_name == "argument" for parameter in dict(all_commands())[name].params)
    rng = random.Random(str(name))
    for value in [*rng.sample(PATHS, 8), *rng.sample(WORDS, 4), ""] if takes else ["x"]:
        ends_well(sd3, *name, "--", *[value] * rng.randrange(1, 3))


@pytest.mark.parametrize("seed", range(3))
def test_several_at_once(sd3, seed):
    rng = random.Random(seed)
    by_command = {
        name: [option for _, option in found] for name, found in itertools.groupby(OPTIONS, key=lambda pair: pair[0])
    }
    for _ in range(25):
        name = rng.choice(list(by_command))
        options = rng.sample(by_command[name], rng.randrange(1, 1 + min(4, len(by_command[name]))))
        words = [
            f"{option.opts[0]}" if option.is_flag else f"{option.opts[0]}={rng.choice(HOSTILE)}" for option in options
        ]
        ends_well(sd3, *name, *words, *(rng.choice(HOSTILE) for _ in range(rng.randrange(2))))


HUGE = ["9223372036854775807", "1e308", "5e-324", "1000000000", "100000"]
FIELDS = [
    "data.images", "data.image_side_px", "data.rows_per_shard", "text.t5_tokens", "model.depth", "model.max_side_px", "model.base_side_px",
    "pretrain.samples", "pretrain.side_px", "pretrain.global_batch", "pretrain.learning_rate", "pretrain.checkpoint_every_samples",
    "finetune.0.side_px", "finetune.0.aspect_ratios.0", "finetune.0.shift", "evaluate.num_steps", "evaluate.scored_images", "compute.train_ranks", "compute.cache_gb",
]  # fmt: skip


@pytest.mark.parametrize("field", FIELDS)
def test_plan_of_numbers_out_of_measure(sd3, field):
    for value in HUGE:
        ends_well(sd3, "plan", "-r", "tiny-test", "-s", f"{field}={value}")


def test_plan_of_buckets_out_of_measure(sd3):
    for buckets in (
        "{max_ratio: 1e308}",
        "{multiple_px: 16, min_area: 0.5, max_ratio: 64}",
        "{multiple_px: 1000000000}",
    ):
        for side in ("64", "65536", "1000000000"):
            settings = (
                f"finetune.0.buckets={buckets}",
                f"finetune.0.side_px={side}",
                "finetune.0.aspect_ratios=[1.0]",
                "model.max_side_px=65536",
            )
            ends_well(sd3, "plan", "-r", "tiny-test", *(word for setting in settings for word in ("-s", setting)))


def test_the_commands_are_found():
    assert {("plan",), ("sample",), ("bench", "model")} < {name for name, _ in all_commands()}
    assert len(OPTIONS) > 40


def test_what_an_empty_path_would_be(sd3):
    """Every option that is a path refuses an empty one, which pathlib takes for the folder one is in."""
    paths = [(name, option) for name, option in OPTIONS if option.type_descriptor.annotation is Path]
    assert len(paths) > 4
    for name, option in paths:
        err = ends_well(sd3, *name, *needed(name, dict(all_commands())[name]), f"{option.opts[0]}=")
        assert f"'{option.opts[-1]}'" in err and "a path that is empty" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["sample", "x", "--images", "1000000000000000000"],
            "--images 1000000000000000000: 1,000,000,000,000,000,000 pictures;",
        ),
        (["sample", "x", "--images", "2", "--seed", str(2**63 - 1)], "with 2 pictures the last seed is above"),
        (["sample", "\udcff"], "a prompt '\\udcff': not UTF-8 text"),
        (["sample", "x", "--negative", "\udcff"], "--negative '\\udcff': not UTF-8 text"),
        (["sample", "x", "--file", "/dev/zero"], "--file /dev/zero: more than 10,000,000 bytes"),
        (["sample", "x", "--checkpoint", "a\x00b"], "a\\x00b: no path has a NUL in it"),
        (["photographs", "/proc/none/x"], "/proc/none: No such file or directory; name another"),
        (["export", "/none", "\x1b[2J"], "file:///none: no config.json"),
    ],
)
def test_what_is_said(sd3, arguments, said):
    assert said in ends_well(sd3, *arguments)


def test_nothing_is_left_behind():
    assert Path.cwd().name == "folder" and not list(Path.cwd().iterdir())
