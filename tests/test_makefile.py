"""The first `make` on a machine: which Python it takes, what it says is missing, and where torch comes from."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parent.parent
SHELL = ("sh", "tail", "grep", "touch", "echo", "mkdir", "cp", "dirname", "cat")
# A Python that writes down how it is called; `-m venv` makes one more, and pip fails where the index does not answer.
STUB = """#!/bin/sh
echo "$(basename "$0") $*" >> "$CALLS"
case "$*" in
  *import\\ sys*) exit ${WRONG_VERSION:-0} ;;
  *ensurepip*) exit ${NO_VENV:-0} ;;
  "-m venv --clear .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *--index-url*) exit ${NO_CPU_INDEX:-0} ;;
esac
"""


@pytest.fixture
def machine(tmp_path):
    """run(*programs, make's arguments, variables) -> (exit code, what it says, how Python was called)."""
    checkout, programs = tmp_path / "checkout", tmp_path / "bin"
    (checkout / "infra/locks").mkdir(parents=True)
    programs.mkdir()
    for name in ("Makefile", "pyproject.toml", "infra/locks/cpu.txt"):
        shutil.copy(PROJECT / name, checkout / name)
    for name in (*SHELL, "basename"):
        (programs / name).symlink_to(shutil.which(name))

    def run(*have: str, arguments: tuple[str, ...] = (), **variables: str) -> tuple[int, str, list[str]]:
        for name in have:
            (programs / name).write_text(STUB)
            (programs / name).chmod(0o755)
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environment = {"PATH": str(programs), "CALLS": str(calls), "HOME": os.environ.get("HOME", "/")} | variables
        made = subprocess.run(
            [shutil.which("make"), "--no-print-directory", "setup", *arguments],
            cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=60,
        )  # fmt: skip
        return made.returncode, made.stdout + made.stderr, calls.read_text().splitlines() if calls.exists() else []

    return run


def downloads(calls: list[str]) -> list[str]:
    return [call for call in calls if "pip install" in call]


@pytest.mark.parametrize(("have", "variables", "said"), [
    (("git", "g++"), {}, "make: python3.11 is missing; install the package python3.11 (3.12 and 3.13 do as well; PYTHON=/path/to/python names one)"),
    (("python3.11", "g++"), {}, "make: git is missing; install the package git"),
    (("python3.11", "git"), {}, "make: g++ is missing; install the package g++"),
    (("python3.11", "git", "g++"), {"NO_VENV": "1"}, "make: python3.11 lacks its venv module; install the package python3-venv (Debian, Ubuntu), or python3.N-venv of its version"),
    (("python3.11", "git", "g++"), {"WRONG_VERSION": "1"}, "make: python3.11 is no Python 3.11, 3.12 or 3.13; name one with PYTHON=/path/to/python"),
])  # fmt: skip
def test_what_is_missing_is_one_line_before_anything_is_downloaded(machine, have, variables, said):
    code, output, calls = machine(*have, **variables)
    assert code != 0 and said in output.splitlines() and not downloads(calls)


@pytest.mark.parametrize(("have", "taken"), [
    (("python3.13", "python3.12", "python3.11"), "python3.11"),
    (("python3.13", "python3.12"), "python3.12"),
    (("python3.13",), "python3.13"),
])  # fmt: skip
def test_the_python_that_runs_here_is_taken(machine, have, taken):
    code, _, calls = machine(*have, "git", "g++")
    assert code == 0 and f"{taken} -m venv --clear .venv" in calls


def test_torch_comes_from_the_index_of_cpu_builds_else_from_pips_own(machine):
    torch = next(
        line for line in (PROJECT / "infra/locks/cpu.txt").read_text().splitlines() if line.startswith("torch==")
    )
    code, output, calls = machine("python3.11", "git", "g++", NO_CPU_INDEX="1")
    first, whole, own = downloads(calls)
    assert code == 0 and first.endswith(f"--index-url https://download.pytorch.org/whl/cpu {torch}")
    assert whole.endswith("-r infra/locks/cpu.txt") and "--index-url" not in whole and own.endswith("--editable .")
    assert "PyTorch's CPU index gives no torch==" in output


def test_an_index_of_ones_own_is_the_only_one_asked(machine):
    _, output, calls = machine("python3.11", "git", "g++", arguments=("PIP_ARGS=--index-url https://mirror",))
    assert len(downloads(calls)) == 2 and not any("download.pytorch.org" in call for call in calls)
    assert "CPU index" not in output
