# Two processes joined by gloo, which run functions for the tests: started once for a test module, since starting costs
# more than most of what they do.
from __future__ import annotations

import datetime
import io
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

PATIENCE = 300  # seconds for one function; machines that share their cores pause


def _packed(done: bool, result: Any) -> bytes:
    """By value: tensors in shared memory would be lost with the process."""
    stream = io.BytesIO()
    torch.save((done, result), stream)
    return stream.getvalue()


def _serve(rank: int, world: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # workers of a pool would outlive this process
    # A file to meet at and the loopback device: no host name has to be resolved, which can take minutes.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group(
        "gloo", f"file://{meeting}", datetime.timedelta(seconds=PATIENCE), rank=rank, world_size=world
    )
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = job
        try:
            torch.manual_seed(0)
            pipe.send_bytes(_packed(True, function(rank, *arguments)))
        except Exception:
            pipe.send_bytes(_packed(False, traceback.format_exc()))
    dist.destroy_process_group()


class Ranks:
    """Processes 0 to world - 1; run(f, ...) is [f(0, ...), f(1, ...), ...], each in its own process."""

    def __init__(self, world: int = 2) -> None:
        context = mp.get_context("spawn")
        meeting = tempfile.mktemp(prefix="normkern-ranks-")
        self.pipes, self.processes = [], []
        for rank in range(world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, world, meeting, theirs), daemon=True)
            process.start()
            self.pipes.append(mine)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(PATIENCE):
                self.stop()
                raise AssertionError(f"process {rank} did not finish {function.__name__}")
            done, result = torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False)
            if not done:
                self.stop()  # the others may wait for it
                raise AssertionError(f"process {rank}:\n{result}")
            results.append(result)
        return results

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self.processes)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()

    def close(self) -> None:
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(20)
        self.stop()
