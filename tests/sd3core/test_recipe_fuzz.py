"""Hostile recipes and overrides, drawn with fixed seeds: a recipe, or a RecipeError of one line, in little time and memory."""

from __future__ import annotations

import random
import time
from importlib import resources
from pathlib import Path

import pytest
import yaml

from sd3core.errors import RecipeError
from sd3core.recipe_file import load_recipe

SECONDS = 10.0  # of one recipe, on a machine that has other work
TINY = (resources.files("infra") / "recipes" / "tiny-test.yaml").read_text()
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
MERGES = "m0: &m0 {k: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 12))
VALUES = [
    "2020-13-45", "2020-01-01", "2020-01-01T99:00:00", "!!int x", "!!int ''", "!!float x", "!!bool x", "!!timestamp x", "!!binary é",
    "!!binary AAAA", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!python/object/apply:os.system [id]", "!x y", "!!null x",
    "9" * 5000, "9" * 4000, "0x" + "f" * 5000, "0b" + "_" * 9, "0o777", "190:20:30", "1e999", "-1e999", ".inf", "-.inf", ".nan", "1e308",
    "5e-324", "-0", "~", "null", "true", "no", "''", "' '", "{}", "[]", "[[]]", "{a: {b: c}}", "{[]: 1}", "{{}: 1}", "? [a]\n: b",
    "*nothing", "&a [*a]", "&a {b: *a}", "[" * 3000, "[" * 3000 + "]" * 3000, "{a: " * 3000, "- " * 3000 + "x", "\t1", "a\tb", "\x00", "\x1b[2J",
    "\ufeff", "\u202e", "\x85", "\ud800", "\"\\ud800\"", "\"\\x00\"", "\"\\u202e\"", "\"" + "x" * 100_000 + "\"", "x" * 400_000, "'",
    "|\n  a\n", ">-\n  a", "%YAML 9", "---\n---", "...", "@a", "`a", "%", "18446744073709551616", "-9223372036854775809", "9223372036854775807",
]  # fmt: skip
KEYS = [
    "seed", "run", "name", "store", "data.images", "data.folder", "data.aspect_ratios", "data.aspect_ratios.0", "towers.small.vae.channels",
    "towers.small.clip_l.width", "pretrain.samples", "pretrain.side_px", "pretrain.buckets", "pretrain.betas", "pretrain.betas.0", "pretrain",
    "finetune", "finetune.0", "finetune.0.side_px", "finetune.0.aspect_ratios.0", "finetune.0.aspect_ratios.0.x", "finetune.0.buckets.max_ratio",
    "finetune.0.buckets.multiple_px", "finetune.0.buckets.min_area", "finetune.²", "finetune.-1", "finetune.1", "finetune.٣", "finetune.0x0",
    f"finetune.{'9' * 20}", f"finetune.{'9' * 5000}", "a..b", ".", "..", "", " ", "a", "text.null", "text.~", "evaluate.shift", "evaluate.seed",
    "model.depth", "model.max_side_px", "model.start_from", "compute.cache_gb", "compute.train_ranks", "seed.x", "seed.x.y.z", "x" * 5000,
    "\x1b[2J", "pretrain.\u202e", "__class__", "pretrain.__dict__", "model_config", ".".join("a" * 2000),
]  # fmt: skip


def loads_or_is_one_line(name: str, overrides: list[str] | None = None) -> str:
    """ "" for a recipe that loads, else the line."""
    begun = time.monotonic()
    try:
        load_recipe(name, overrides)
        line = ""
    except RecipeError as error:
        line = str(error)
        assert line and line.isprintable() and len(line) < 6000, line[:300]
    assert time.monotonic() - begun < SECONDS
    return line


@pytest.mark.parametrize("value", VALUES, ids=range(len(VALUES)))
def test_hostile_values_of_overrides(value):
    for key in ("seed", "pretrain.betas", "evaluate"):
        loads_or_is_one_line("tiny-test", [f"{key}={value}"])


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_hostile_keys_of_overrides(key):
    for value in ("1", "x", "[1]", "9223372036854775807", "1e308", "5e-324"):
        loads_or_is_one_line("tiny-test", [f"{key}={value}"])


@pytest.mark.parametrize("text", [LAUGHS, MERGES, *VALUES], ids=range(2 + len(VALUES)))
def test_hostile_files(tmp_path, text):
    path = tmp_path / "r.yaml"
    for content in (text, f"name: {text}\n", f"{text}: 1\n", f"{TINY}\n{text}\n"):
        path.write_bytes(content.encode("utf-8", "surrogatepass"))
        loads_or_is_one_line(str(path))


@pytest.mark.parametrize("seed", range(5))
def test_damaged_files(tmp_path, seed):
    rng, path = random.Random(seed), tmp_path / "r.yaml"
    for _ in range(20):
        data = bytearray(TINY.encode())
        for _ in range(rng.randrange(1, 6)):
            at = rng.randrange(len(data))
            part = rng.choice(
                [
                    b"",
                    bytes([rng.randrange(256)]),
                    b"&a ",
                    b"*a",
                    b"<<: ",
                    b"\n",
                    b": ",
                    b"- ",
                    b"'",
                    b"{",
                    b"]",
                    b"!!int ",
                ]
            )
            data[at : at + rng.randrange(3)] = part
        path.write_bytes(data)
        loads_or_is_one_line(str(path))


@pytest.mark.parametrize("seed", range(2))
def test_every_field_with_hostile_values(seed):
    """Fields from the file itself: so those of later versions too."""
    rng, keys = random.Random(seed), list(leaves(yaml.safe_load(TINY)))
    assert len(keys) > 60
    for key in keys:
        for value in rng.sample(VALUES, 1):
            loads_or_is_one_line("tiny-test", [f"{key}={value}"])


def leaves(value, key=""):
    if isinstance(value, dict | list):
        for part, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inside, f"{key}.{part}" if key else f"{part}")
    else:
        yield key


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("name: 2020-13-45", "line 1, column 7: '2020-13-45' is no timestamp; put it in quotes if it is text"),
        ("a: 1\nseed: !!int x", "line 2, column 7: 'x' is no int; put it in quotes if it is text"),
        ("a:\n  b: 1\n  b: 2", "line 3, column 3: the key 'b' stands twice; keep one of them"),
        ("seed: 18446744073709551616", "line 1, column 7: '18446744073709551616' is larger than a number of 64 bits"),
        ("a: &a [*a]", "line 1, column 4: an alias stands within what it names"),
        (LAUGHS, "more than 50,000 values, with those that aliases repeat"),
        ("[" * 3000, "line 1, column 42: nested deeper than 40 levels"),
    ],
)
def test_what_is_said(tmp_path, content, said):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    assert said in loads_or_is_one_line(str(path))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("finetune.²=1", "'²' is not one of the positions 0 to 0"),
        ("a..b=1", "override 'a..b=1': write it as section.key=value"),
        (".=1", "override '.=1': write it as section.key=value"),
        ("seed=2020-13-45", "the value is not YAML (line 1, column 1: '2020-13-45' is no timestamp"),
        ("pretrain.betas.0.x=1", "pretrain.betas: "),
        ("pretrain.samples=9223372036854775808", "is larger than a number of 64 bits"),
        ("pretrain.samples='9223372036854775808'", "pretrain.samples: "),
    ],
)
def test_what_is_said_of_overrides(override, said):
    assert said in loads_or_is_one_line("tiny-test", [override])


def test_an_alias_may_repeat_a_section(tmp_path):
    """What anchors are for stays possible: a phase like the one before, with a key of its own."""
    path = tmp_path / "r.yaml"
    fields = yaml.safe_load(TINY)
    phase = yaml.safe_dump(fields.pop("finetune")[0], default_flow_style=True, width=10_000).strip()
    path.write_text(f"{yaml.safe_dump(fields)}\nfinetune:\n- &first {phase}\n- {{<<: *first, learning_rate: 0.5}}\n")
    first, second = load_recipe(str(path)).finetune
    assert second == first.model_copy(update={"learning_rate": 0.5})


def test_a_recipe_that_is_no_file(tmp_path):
    for name in (
        "\x00.yaml",
        "x" * 5000 + ".yaml",
        "/dev/zero.yaml",
        "x" * 5000,
        "\x1b[2J",
        "",
        str(tmp_path / ("x" * 300 + ".yaml")),
    ):
        assert loads_or_is_one_line(name)
    (tmp_path / "folder.yaml").mkdir()
    assert loads_or_is_one_line(str(tmp_path / "folder.yaml"))
    Path(tmp_path / "big.yaml").write_bytes(b"#" * 2_000_000)
    assert "larger than 1,000,000 bytes" in loads_or_is_one_line(str(tmp_path / "big.yaml"))
