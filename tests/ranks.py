"""Runs functions on several gloo ranks, processes of this machine."""

from __future__ import annotations

import datetime
import functools
import json
import multiprocessing
import os
import socket
import tempfile
import traceback
import unittest
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Body = Callable[[int, int], None]
SKIPPED = "skipped: "

# What ranks import for seconds each, imported once by the process that they are forked from.
multiprocessing.set_forkserver_preload(
    ["tests.ranks", "fusedopt", "torch.distributed.checkpoint", "torch.distributed.fsdp"]
)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


def _rank(rank: int, ranks: int, port: int, folder: str, bodies: dict[str, Body]) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    # A rank that failed leaves the others in a collective.
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", rank=rank, world_size=ranks, timeout=timeout)
    outcomes = {}
    for name, body in bodies.items():
        try:
            body(rank, ranks)
            outcomes[name] = ""
            dist.barrier()
        except unittest.SkipTest as reason:  # on all ranks alike, before they have spoken
            outcomes[name] = f"{SKIPPED}{reason}"
            dist.barrier()  # one that leaves early would break the others' connections
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the ranks are no longer in step
    Path(folder, f"{rank}.json").write_text(json.dumps(outcomes))
    dist.destroy_process_group()


def run(ranks: int, bodies: dict[str, Body]) -> dict[str, str]:
    """Runs each body(rank, ranks) on all ranks, one after the other. For each: "" or what went
    wrong on which rank; after a failure the others are not run."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank,
            (ranks, free_port(), folder, bodies),
            nprocs=ranks,
            start_method="forkserver",
        )
        found = [json.loads(Path(folder, f"{r}.json").read_text()) for r in range(ranks)]
    return {
        name: "\n".join(
            f"rank {r}: {outcomes.get(name, 'not run')}"
            for r, outcomes in enumerate(found)
            if outcomes.get(name, "not run")
        )
        for name in bodies
    }


def judge(outcome: str) -> None:
    """Skips the test where the ranks did, and fails it where one of them failed."""
    if outcome.startswith(f"rank 0: {SKIPPED}"):
        pytest.skip(outcome.splitlines()[0])
    assert not outcome, outcome


def run_one(ranks: int, body: Body) -> None:
    """Runs one body.

    Raises:
        AssertionError: what went wrong on which rank.
    """
    judge(run(ranks, {"body": body})["body"])


class Registry:
    """Bodies that are run together: starting ranks takes longer than most of them."""

    def __init__(self) -> None:
        self._bodies: dict[int, dict[str, Body]] = {}
        self.names: list[tuple[int, str]] = []
        self.outcomes = functools.cache(self._outcomes)

    def on(self, *ranks: int) -> Callable[[Body], Body]:
        """Decorator: run this body on so many ranks."""

        def register(body: Body) -> Body:
            self.add(body.__name__, body, *ranks)
            return body

        return register

    def add(self, name: str, body: Body, *ranks: int) -> None:
        for n in ranks:
            self._bodies.setdefault(n, {})[name] = body
            self.names.append((n, name))

    def _outcomes(self, ranks: int) -> dict[str, str]:
        return run(ranks, self._bodies[ranks])
