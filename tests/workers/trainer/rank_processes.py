"""Rank processes without Ray: a function run on each rank of a gloo group, results and errors handed back."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from multiprocessing import forkserver
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# The ranks are forked from a process that has loaded DeepSpeed, once for all tests: each would load it for three seconds.
LOADED = ["deepspeed", "workers.trainer.loop"]


def run_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """[work(rank, world, *arguments) of every rank]; `work` is a function of a test module."""
    forkserver.set_forkserver_preload(LOADED)
    with patch.dict(os.environ, DS_ACCELERATOR="cpu"):  # DeepSpeed looks for it when it is loaded
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (world, folder, dict(os.environ), work, arguments), nprocs=world, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _rank(
    rank: int,
    world: int,
    folder: str,
    environment: dict[str, str],
    work: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    os.environ.clear()  # it is that in which the process forked from was started
    os.environ |= environment | {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.save(work(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
