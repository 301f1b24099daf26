"""triton_tuning.py: which Tuning a call takes: the default, or with NORMKERN_TRITON_AUTOTUNE=1 the fastest measured.

Off by default: the first call of each kind then costs many launches, and its choice depends on what else the GPU does.
A choice holds for the process and, in a file beside Triton's own cache, for those that follow. Every choice gives the
same result up to rounding; one choice gives the same bits.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normkern.backends.triton_plan import DEFAULT, TUNINGS, Tuning, power_from
from normkern.problem import Problem

logger = logging.getLogger("normkern")
Run = Callable[[Tuning], None]
_known: dict[str, Tuning] = {}
_read: set[Path] = set()


def wanted() -> bool:
    return os.environ.get("NORMKERN_TRITON_AUTOTUNE") == "1"


def cache_file() -> Path:
    folder = os.environ.get("TRITON_CACHE_DIR")
    return (Path(folder) if folder else Path.home() / ".triton" / "cache") / "normkern_tunings.json"


def key_of(name: str, problem: Problem, x: Tensor) -> str:
    """What shares a choice: extents count by their power of two, so that a new batch size is seldom a new case."""
    extents = [power_from(n) for domain in (problem.stats, problem.affine) for n in domain.sizes]
    device = torch.cuda.get_device_name(x.device) if x.is_cuda else x.device.type
    return " ".join([name, problem.moments.name, problem.act.name, str(x.dtype), *map(str, extents), device])


def choose(name: str, problem: Problem, x: Tensor, run: Run) -> Tuning:
    """The tuning of a call; `run` makes the call with one, as often as it is asked to."""
    if not wanted():
        return DEFAULT
    path, key = cache_file(), key_of(name, problem, x)
    if path not in _read:
        _read.add(path)
        _known.update(load(path))
    found = _known.get(key)
    if found is None:
        if x.is_cuda and torch.cuda.is_current_stream_capturing():
            return DEFAULT  # a graph cannot be timed while it is made
        times = [milliseconds(run, tuning, x) for tuning in TUNINGS]
        found = _known[key] = TUNINGS[times.index(min(times))]
        save(path, {**load(path), key: found})
    return found


def milliseconds(run: Run, tuning: Tuning, x: Tensor) -> float:
    if x.is_cuda:
        from triton.testing import do_bench

        return float(do_bench(lambda: run(tuning), warmup=5, rep=20, return_mode="median"))
    begin = time.perf_counter()
    run(tuning)
    return (time.perf_counter() - begin) * 1e3


def load(path: Path) -> dict[str, Tuning]:
    """What earlier processes chose; a file that cannot be read is one that is not there."""
    try:
        stored: dict[str, Any] = json.loads(path.read_text())
        return {key: Tuning(**fields) for key, fields in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def save(path: Path, tunings: dict[str, Tuning]) -> None:
    """Whole or not at all: other processes may read or write the file meanwhile."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump({key: asdict(tuning) for key, tuning in tunings.items()}, file, indent=1)
        os.replace(file.name, path)
    except OSError as error:
        logger.warning("normkern: tunings are not kept: %s", error)
