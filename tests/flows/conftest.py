from __future__ import annotations

import sys

import pytest

from flows.cli import main


@pytest.fixture
def sd3(monkeypatch, capsys):
    """Runs the command in this process: (exit code, stdout, stderr)."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["sd3", *arguments])
        monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # else usage lines name `python -m pytest`
        code = 0
        try:
            main()
        except SystemExit as ended:
            code = ended.code or 0
        return code, *capsys.readouterr()

    return run
