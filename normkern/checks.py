"""checks.py: what a call must satisfy, in sentences a user can act on.

Every failed check raises the exception type that torch.nn.functional raises for the same mistake. Each message names
the function, the fact and the values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from normkern.problem import Act

FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16, torch.float64))
ACTS: dict[str | None, Act] = {
    None: Act.none,
    "relu": Act.relu,
    "silu": Act.silu,
    "gelu": Act.gelu,
    "leaky_relu": Act.leaky_relu,
}


def shape_of(t: Tensor) -> str:
    return str(tuple(t.shape))


def check_input(name: str, x: Tensor, least_dims: int) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: input must be a Tensor; got {type(x).__name__}")
    if x.dtype not in FLOATS:
        raise NotImplementedError(f"{name}: input must be float64, float32, float16 or bfloat16; got {x.dtype}")
    if x.dim() < least_dims:
        raise RuntimeError(f"{name}: input must have at least {least_dims} dimensions; got shape {shape_of(x)}")
    if x.layout is not torch.strided:
        raise RuntimeError(f"{name}: input must be a strided tensor; got layout {x.layout}")


def _check_tensor(name: str, what: str, t: Tensor, x: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {what} must be a Tensor or None; got {type(t).__name__}")
    # Cheaper than making two device objects to compare.
    if t.is_cpu != x.is_cpu or t.get_device() != x.get_device():
        raise RuntimeError(f"{name}: {what} must be on the device of input; got {t.device} and {x.device}")


def check_parameter(name: str, what: str, t: Tensor | None, shape: Sequence[int], x: Tensor) -> Tensor | None:
    """t, contiguous. `shape` is what torch asks of a weight of this norm."""
    if t is None:
        return None
    _check_tensor(name, what, t, x)
    if t.dtype not in FLOATS:
        raise RuntimeError(f"{name}: {what} must be float64, float32, float16 or bfloat16; got {t.dtype}")
    if t.shape != shape:
        raise RuntimeError(
            f"{name}: {what} must have shape {tuple(shape)}; got {shape_of(t)} with input of shape {shape_of(x)}"
        )
    return t.contiguous()


def check_residual(name: str, residual: Tensor | None, x: Tensor) -> None:
    if residual is None:
        return
    _check_tensor(name, "residual", residual, x)
    if residual.shape != x.shape:
        raise ValueError(f"{name}: residual must have the shape of input; got {shape_of(residual)} and {shape_of(x)}")
    if residual.dtype != x.dtype:
        raise ValueError(f"{name}: residual must have the dtype of input; got {residual.dtype} and {x.dtype}")


def check_running(
    name: str, mean: Tensor | None, var: Tensor | None, channels: int, used: str | None, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Running statistics, contiguous where they are read (`used` says when). They are written through the originals."""
    if used is not None and (mean is None or var is None):
        missing = "running_mean" if mean is None else "running_var"
        raise RuntimeError(f"{name}: {missing} must be given where {used}; got None")
    if (mean is None) != (var is None):
        given, missing = ("running_mean", "running_var") if var is None else ("running_var", "running_mean")
        raise ValueError(
            f"{name}: running_mean and running_var must both be given or both be None; got {given} and no {missing}"
        )
    return _check_statistic(name, "running_mean", mean, channels, used, x), _check_statistic(
        name, "running_var", var, channels, used, x
    )


def _check_statistic(
    name: str, what: str, t: Tensor | None, channels: int, used: str | None, x: Tensor
) -> Tensor | None:
    contiguous = check_parameter(name, what, t, (channels,), x)
    if t is not None and t.requires_grad:
        raise RuntimeError(f"{name}: {what} must not require gradients; got requires_grad=True")
    if t is not None and used is None and t is not contiguous and t.stride(0) == 0:
        raise RuntimeError(f"{name}: {what} must have memory for {channels} elements; got an expanded tensor")
    return contiguous


def check_flag(name: str, what: str, value: bool) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name}: {what} must be a bool; got {value!r}")


def check_float(name: str, what: str, value: float) -> float:
    if type(value) is float:
        return value
    if isinstance(value, int | float | torch.SymFloat | torch.SymInt) or (
        isinstance(value, Tensor) and value.dim() == 0
    ):
        return float(value)
    raise TypeError(f"{name}: {what} must be a float; got {value!r}")


def check_eps(name: str, eps: float) -> float:
    eps = check_float(name, "eps", eps)
    if not eps >= 0:
        raise ValueError(f"{name}: eps must be at least 0; got eps={eps}")
    return eps


def check_act(name: str, act: str | None) -> Act:
    if act is not None and not isinstance(act, str):
        raise TypeError(f"{name}: act must be a string or None; got {act!r}")
    if act not in ACTS:
        raise ValueError(f"{name}: act must be one of None, relu, silu, gelu, leaky_relu; got {act!r}")
    return ACTS[act]


def check_groups(name: str, num_groups: int, x: Tensor) -> None:
    if isinstance(num_groups, bool) or not isinstance(num_groups, int | torch.SymInt):
        raise TypeError(f"{name}: num_groups must be an int; got {num_groups!r}")
    if num_groups <= 0:
        raise RuntimeError(f"{name}: num_groups must be positive; got num_groups={num_groups}")
    if x.shape[1] % num_groups != 0:
        raise RuntimeError(
            f"{name}: num_groups must divide the channels; got num_groups={num_groups} and input of shape {shape_of(x)}"
        )


def check_normalized_shape(name: str, normalized_shape: Sequence[int], x: Tensor) -> tuple[int, ...]:
    if not isinstance(normalized_shape, tuple | list):
        raise TypeError(f"{name}: normalized_shape must be a tuple or list of ints; got {normalized_shape!r}")
    for size in normalized_shape:
        if type(size) is not int and not isinstance(size, int | torch.SymInt):
            raise TypeError(f"{name}: normalized_shape must hold ints; got {normalized_shape!r}")
    shape = tuple(normalized_shape)
    if shape and x.shape[-len(shape) :] == shape:
        return shape
    if not shape:
        raise RuntimeError(f"{name}: normalized_shape must have at least one dimension; got {normalized_shape!r}")
    # torch's rms_norm has a type of its own for this.
    error = ValueError if name.endswith("rms_norm") and x.dim() < len(shape) else RuntimeError
    raise error(
        f"{name}: normalized_shape must be the last dimensions of input; got {shape} and input of shape {shape_of(x)}"
    )


def check_enough_values(name: str, count: int, unit: str, x: Tensor) -> None:
    """One value has no variance: torch refuses to normalize it."""
    if count == 1:
        raise ValueError(f"{name}: Expected more than 1 {unit} when training, got input size {list(x.shape)}")


def spatial_count(x: Tensor) -> int:
    return math.prod(x.shape[2:])
