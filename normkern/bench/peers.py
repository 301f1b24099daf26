"""peers.py: who is benchmarked, each behind one signature, or the reason why it is absent.

An absent rival is left out of the results and never fails a run. Rivals that take only rows (M, D), or only contiguous
tensors, get what they take and pay for the copy, as their users do; residual and activation are torch's where a rival
takes none.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import normkern.functional
from normkern.backends import BACKENDS, use_backend
from normkern.bench.layers import EPS, Layer, Tensors, call, finish
from normkern.measure import Around

Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Peer:
    """A rival. `make` returns its forward call on these tensors, differentiable in x, weight, bias and residual;
    `why_not` is a sentence where it cannot compute a layer on a device; `around` holds while it is called, and is not
    timed."""

    name: str
    make: Callable[[Layer, Tensors], Forward]
    why_not: Callable[[Layer, torch.device], str | None] = lambda layer, device: None
    around: Around = nullcontext
    package: str = "torch"
    default: bool = True

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:  # run from the sources, not installed
            return str(getattr(importlib.import_module(self.package), "__version__", ""))


def _missing(module: str, package: str, device: torch.device) -> str | None:
    """Why a library of GPU kernels is absent."""
    if importlib.util.find_spec(module) is None:
        return f"{package} is not installed"
    return None if device.type == "cuda" else f"{package} needs a GPU"


def _cudnn(enabled: bool) -> Around:
    def around() -> AbstractContextManager[object]:
        context: AbstractContextManager[object] = torch.backends.cudnn.flags(enabled=enabled)
        return context

    return around


def _torch(layer: Layer, t: Tensors) -> Forward:
    return lambda: call(F, layer, t, fused=False)


def _compiled(layer: Layer, t: Tensors) -> Forward:
    return torch.compile(lambda: call(F, layer, t, fused=False), dynamic=False)


def _normkern(layer: Layer, t: Tensors) -> Forward:
    return lambda: call(normkern.functional, layer, t, fused=True)


def _cudnn_why_not(layer: Layer, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "cuDNN needs a GPU"
    return None if layer.op in ("batch_norm", "instance_norm") else "torch has no path to cuDNN for this norm"


def _triton_why_not(layer: Layer, device: torch.device) -> str | None:
    if device.type != "cuda":
        return "Triton's interpreter is no rival"
    return BACKENDS["triton"].why_not(torch.empty(1, device=device))


# ---- libraries that may be installed; imported when a race with them begins


def _liger_why_not(layer: Layer, device: torch.device) -> str | None:
    if layer.op not in ("layer_norm", "rms_norm", "group_norm"):
        return "Liger has no such norm"
    return _missing("liger_kernel", "liger-kernel", device)


def _liger(layer: Layer, t: Tensors) -> Forward:
    functional: Any = importlib.import_module("liger_kernel.transformers.functional")

    def forward() -> Tensor:
        if layer.op == "layer_norm":
            y = functional.liger_layer_norm(t.x, t.weight, t.bias, EPS)
        elif layer.op == "rms_norm":
            # In place its backward would write over dy, which every round needs again.
            y = functional.liger_rms_norm(t.x, t.weight, EPS, 0.0, "llama", False)
        else:  # takes (N, C, S) alone
            channels = layer.shape[1]
            flat = t.x.reshape(*layer.shape[:2], -1)
            y = functional.liger_group_norm(flat, t.weight, t.bias, channels, layer.groups, EPS).reshape(layer.shape)
        return finish(layer, t, y)

    return forward


def _quack_why_not(layer: Layer, device: torch.device) -> str | None:
    if layer.op != "rms_norm":
        return "quack differentiates RMS norm only"
    return _missing("quack", "quack-kernels", device)


def _quack(layer: Layer, t: Tensors) -> Forward:
    quack: Any = importlib.import_module("quack")
    return lambda: finish(layer, t, quack.rmsnorm(t.x, t.weight, eps=EPS))


def _apex_why_not(layer: Layer, device: torch.device) -> str | None:
    if layer.op not in ("layer_norm", "rms_norm"):
        return "not compared: apex's other norms take chosen shapes only"
    return _missing("fused_layer_norm_cuda", "apex with its CUDA extensions", device)


def _apex(layer: Layer, t: Tensors) -> Forward:
    apex: Any = importlib.import_module("apex.normalization.fused_layer_norm")

    def forward() -> Tensor:
        if layer.op == "layer_norm":
            y = apex.fused_layer_norm_affine(t.x, t.weight, t.bias, layer.parameter_shape, EPS)
        else:
            y = apex.fused_rms_norm_affine(t.x, t.weight, layer.parameter_shape, EPS)
        return finish(layer, t, y)

    return forward


def _cudnn_frontend_why_not(layer: Layer, device: torch.device) -> str | None:
    if layer.op != "layer_norm":
        return "not compared: cuDNN's graphs are held against layer norm alone"
    if layer.dtype == "float64":
        return "cuDNN normalizes no float64"
    return _missing("cudnn", "nvidia-cudnn-frontend", device)


def _cudnn_frontend(layer: Layer, t: Tensors) -> Forward:
    from normkern.bench.cudnn_graph import layer_norm

    return lambda: finish(layer, t, layer_norm(t.x, t.weight, t.bias, EPS))


PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", _torch, around=_cudnn(False)),
        Peer("torch_compile", _compiled, around=_cudnn(False), default=False),  # compiles for seconds, layer by layer
        Peer("cudnn", _torch, _cudnn_why_not, _cudnn(True)),
        Peer("normkern", _normkern, package="normkern"),
        Peer("normkern_triton", _normkern, _triton_why_not, lambda: use_backend("triton"), package="normkern"),
        Peer("cudnn_frontend", _cudnn_frontend, _cudnn_frontend_why_not, package="nvidia-cudnn-frontend"),
        Peer("liger", _liger, _liger_why_not, package="liger-kernel"),
        Peer("quack", _quack, _quack_why_not, package="quack-kernels"),
        Peer("apex", _apex, _apex_why_not, package="apex"),
    )
}
OURS = ("normkern", "normkern_triton")
DEFAULT = tuple(name for name, peer in PEERS.items() if peer.default)


def on_backend(backend: str) -> Peer:
    """normkern on one of its backends."""
    return Peer("normkern", _normkern, around=lambda: use_backend(backend), package="normkern")


def peers(layer: Layer, device: torch.device, names: tuple[str, ...] = DEFAULT) -> list[Peer]:
    """Those of `names` that can compute the layer on the device."""
    return [PEERS[name] for name in names if PEERS[name].why_not(layer, device) is None]


def absent(layer: Layer, device: torch.device, names: tuple[str, ...] = DEFAULT) -> dict[str, str]:
    """Those of `names` that cannot, and why."""
    reasons = {name: PEERS[name].why_not(layer, device) for name in names}
    return {name: reason for name, reason in reasons.items() if reason is not None}
