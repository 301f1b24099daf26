"""aten.py: the norms as torch's own operators, for programs that leave this process.

What torch.export, torch.onnx.export and torch.jit.trace record must run where normkern is not installed, and ONNX knows
no operators but torch's. So while one of them records, calls come here, after all checks; what torch's functions cannot
say (statistics of another dtype that move, a momentum that is a tensor) is recorded as the formulas of
backends/eager.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from normkern.backends.eager import activate
from normkern.problem import Act

_tracing: Any = torch._C._get_tracing_state


def exporting() -> bool:
    """Whether a program is being recorded for elsewhere; torch.compile is none of that."""
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting()
    return _tracing() is not None or torch.onnx.is_in_onnx_export()


def _like_input(parameter: Tensor | None, x: Tensor) -> Tensor | None:
    """torch takes parameters of x's dtype, or float32 ones where x is a half."""
    if parameter is None or parameter.dtype is x.dtype:
        return parameter
    return parameter.to(x.dtype if x.dtype in (torch.float32, torch.float64) else torch.float32)


def takes_statistics(mean: Tensor | None, x: Tensor, training: bool, momentum: object) -> bool:
    """Whether torch's function does with these running statistics what ours does."""
    return not training or (isinstance(momentum, float) and _like_input(mean, x) is mean)


def finish(y: Tensor, act: Act, residual: Tensor | None) -> Tensor:
    """What follows the affine step."""
    return activate(act, y if residual is None else y + residual)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.group_norm(x, groups, _like_input(weight, x), _like_input(bias, x), eps)


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float, second: bool
) -> Tensor:
    if second:
        return F.rms_norm(x, list(shape), _like_input(weight, x), eps)
    return F.layer_norm(x, list(shape), _like_input(weight, x), _like_input(bias, x), eps)


def batch_norm(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    instance: bool,
) -> Tensor:
    """Batch norm, or instance norm; in training running statistics, where given, move."""
    weight, bias = _like_input(weight, x), _like_input(bias, x)
    mean, var = _like_input(mean, x), _like_input(var, x)
    if instance:
        return F.instance_norm(x, mean, var, weight, bias, training, momentum, eps)
    return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
