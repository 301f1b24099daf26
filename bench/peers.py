# Who is benchmarked: each rival computes a case of tests/cases.py, or says why it cannot. An absent rival is left out
# of the results and never fails a run.
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import Case, Inputs, call
from torch import Tensor

import normkern.functional
from normkern.backends import BACKENDS


@dataclass(frozen=True)
class Peer:
    name: str
    forward: Callable[[Case, Inputs], Tensor]
    why_not: Callable[[Case, torch.device], str | None] = lambda case, device: None
    around: Callable[[], AbstractContextManager[object]] = nullcontext


def cudnn(enabled: bool) -> Callable[[], AbstractContextManager[object]]:
    return lambda: torch.backends.cudnn.flags(enabled=enabled)


def cudnn_why_not(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "cuDNN needs a GPU"
    return None if case.norm in ("batch", "instance") else "torch has no path to cuDNN for this norm"


def triton_why_not(case: Case, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "the interpreter is no rival"
    return BACKENDS["triton"].why_not(torch.empty(1, device=device))


PEERS = (
    Peer("torch", lambda case, inputs: call(case, inputs, F), around=cudnn(False)),
    Peer("cudnn", lambda case, inputs: call(case, inputs, F), cudnn_why_not, cudnn(True)),
    Peer("normkern", lambda case, inputs: call(case, inputs, normkern.functional)),
    Peer(
        "normkern_triton",
        lambda case, inputs: call(case, inputs, normkern.functional),
        triton_why_not,
        lambda: normkern.use_backend("triton"),
    ),
)


def peers(case: Case, device: torch.device) -> list[Peer]:
    return [peer for peer in PEERS if peer.why_not(case, device) is None]
