"""SD3_HOME: one folder of this machine, for commands, flows and workers alike."""

from __future__ import annotations

from flows.local.home import home
from sd3core.files import local_paths
from sd3core.files.local_paths import sd3_home
from workers.caches import towers_cache


def test_every_command_and_worker_has_one_home(tmp_path, monkeypatch):
    """SD3_HOME, else the checkout's local/, else a folder of the user's where the packages are installed alone."""
    monkeypatch.setenv("SD3_HOME", str(tmp_path / "a" / ".." / "home"))
    assert home() == sd3_home() == tmp_path / "home" and towers_cache() == tmp_path / "home" / "cache"
    monkeypatch.delenv("SD3_HOME")
    assert home() == local_paths.PROJECT / "local" and towers_cache() == local_paths.PROJECT / "local" / "cache"
    monkeypatch.setattr(local_paths, "PROJECT", tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert home() == tmp_path / ".cache" / "sd3" and towers_cache() == tmp_path / ".cache" / "sd3" / "cache"
