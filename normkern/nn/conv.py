"""conv.py: the ConvNorm layer, and a model's convolutions turned into it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from normkern import spectrum
from normkern.checks import check_eps, check_flag
from normkern.conv_norm import _check_call, _pair, convolve
from normkern.nn.norm import BatchNorm2d

_EVAL_MODES = ("current", "ema")
_AFFINE_INITS = ("paper", "delta")
_ANNEALED_BATCHES = 40000
_LEAST_SHARE = 0.01


class ConvNorm2d(torch.nn.Conv2d):
    """A convolution with preconditioned channels, a depth-wise affine map, then batch norm (Liu et al. 2021).

    In order: `normkern.conv_norm` with `weight`, and `bias` where there is one; `r`, a depth-wise convolution with a
    bias and the kernel's size, which keeps the map's size (not with affine=False); `norm`, a normkern BatchNorm2d
    (not with bn=False) with weight and bias if `affine`.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias: as of torch.nn.Conv2d, with
            padding of 0 to dilation * (k - 1). bias is False by default: batch norm would take it off again.
        affine: whether there are `r` and the weight and bias of `norm`.
        bn: whether there is `norm`.
        eps: lower bound of the power spectrum, relative to its mean (see normkern.preconditioner); norm has its own.
        eval_mode: what V is made of in eval mode: "current", the kernel as it is, or "ema", the buffer running_lags.
            The paper averages V over the steps; here the lags of the kernel, from which S comes, are averaged, with the
            paper's annealed momentum max((cos(pi n / 40000) + 1) / 2, 0.01). That is the average of S and not of
            S^(-1/2), it has 13 numbers a channel for 3x3, and it holds for any size of the input: the state dict never
            depends on the resolution. Before the first step it is that of the initial kernel.
        affine_init: how `r` starts: "paper", as torch initializes a Conv2d, or "delta", as the identity.
        through_preconditioner: whether the gradient of weight includes that of V; not in the paper.
        device, dtype: of the parameters.

    Shapes: input (N, Cin, H, W), any H and W that conv_norm takes, in training and in eval; output as of Conv2d.

    Raises:
        ValueError: eval_mode, affine_init, eps or a size is not valid. In forward: what conv_norm raises.
    """

    running_lags: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = False,
        *,
        affine: bool = True,
        bn: bool = True,
        eps: float = 1e-6,
        eval_mode: str = "current",
        affine_init: str = "paper",
        through_preconditioner: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        name = type(self).__name__
        if eval_mode not in _EVAL_MODES:
            raise ValueError(f"{name}: eval_mode must be one of {', '.join(_EVAL_MODES)}; got {eval_mode!r}")
        if affine_init not in _AFFINE_INITS:
            raise ValueError(f"{name}: affine_init must be one of {', '.join(_AFFINE_INITS)}; got {affine_init!r}")
        check_flag(name, "through_preconditioner", through_preconditioner)
        kernel, spread = _pair(name, "kernel_size", kernel_size, 1), _pair(name, "dilation", dilation, 1)
        edge = _pair(name, "padding", padding, 0)
        reach = max(edge[i] - spread[i] * (kernel[i] - 1) for i in (0, 1))
        if reach > 0:
            raise ValueError(
                f"{name}: padding must be at most dilation * (kernel_size - 1); got padding={padding}, "
                f"kernel_size={kernel_size} and dilation={dilation}"
            )
        self.eps = check_eps(name, eps)
        self.eval_mode, self.affine_init = eval_mode, affine_init
        self.through_preconditioner = through_preconditioner
        where = {"device": device, "dtype": dtype}
        strides = _pair(name, "stride", stride, 1)
        super().__init__(in_channels, out_channels, kernel, strides, edge, spread, groups, bias, **where)
        self.r: torch.nn.Conv2d | None = None
        self.norm: torch.nn.Module | None = None
        self._extra = 1 - kernel[0] % 2, 1 - kernel[1] % 2
        if affine:
            middle = kernel[0] // 2, kernel[1] // 2  # an even kernel makes a point more, which forward takes off
            self.r = torch.nn.Conv2d(out_channels, out_channels, kernel, padding=middle, groups=out_channels, **where)
        if bn:
            self.norm = BatchNorm2d(out_channels, affine=affine, **where)
        average = count = None
        if eval_mode == "ema":
            average = torch.empty(
                out_channels, spectrum.lag_count(self.weight.shape[2:]), dtype=torch.float64, device=device
            )
            count = torch.zeros((), dtype=torch.long, device=device)
        self.register_buffer("running_lags", average)
        self.register_buffer("num_batches_tracked", count)
        self.reset_running_lags()
        if self.r is not None and affine_init == "delta":
            self._make_identity(self.r)

    @staticmethod
    def _make_identity(r: torch.nn.Conv2d) -> None:
        rows, cols = r.weight.shape[2:]
        with torch.no_grad():
            r.weight.zero_()
            r.weight[:, :, (rows - 1) // 2, (cols - 1) // 2] = 1
            if r.bias is not None:
                r.bias.zero_()

    def reset_running_lags(self) -> None:
        """Start the average (eval_mode "ema") at the lags of the kernel as it is."""
        if self.running_lags is None or self.num_batches_tracked is None:
            return
        with torch.no_grad():
            if not self.running_lags.is_meta:
                self.running_lags.copy_(spectrum.lags(self.weight.detach()))
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if "r" not in self.__dict__.get("_modules", {}):
            return  # the constructor of Conv2d: there are no parts of ours yet
        if self.r is not None:
            self.r.reset_parameters()
            if self.affine_init == "delta":
                self._make_identity(self.r)
        if isinstance(self.norm, torch.nn.BatchNorm2d):
            self.norm.reset_parameters()
        self.reset_running_lags()

    def _lags(self) -> Tensor | None:
        """What V is made of; None: the kernel as it is."""
        running, count = self.running_lags, self.num_batches_tracked
        if running is None or count is None:
            return None
        if not self.training:
            return running.double()  # a module that is cast casts its buffers
        lags = spectrum.lags(self.weight if self.through_preconditioner else self.weight.detach())
        with torch.no_grad():
            count.add_(1)
            share = (torch.cos(math.pi * count.clamp(max=_ANNEALED_BATCHES).double() / _ANNEALED_BATCHES) + 1) / 2
            running.lerp_(lags.detach().to(running.dtype), share.clamp(min=_LEAST_SHARE).to(running.dtype))
        return lags

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        shape: Any = (self.stride, self.padding, self.dilation, self.groups)
        _check_call(type(self).__name__, input, weight, bias, *shape)
        options: Any = (self.eps, self._lags(), self.through_preconditioner)
        r = self.r
        if r is not None and self.kernel_size == (1, 1):
            options = (*options, r.weight.flatten(), r.bias)
        y = convolve(input, weight, bias, *shape, *options)
        if r is not None and self.kernel_size != (1, 1):
            y = r(y)[:, :, self._extra[0] :, self._extra[1] :]
        return y if self.norm is None else self.norm(y)

    def extra_repr(self) -> str:
        stock = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{stock}, eps={self.eps}, eval_mode={self.eval_mode!r}"


def _why_not(conv: torch.nn.Conv2d) -> str | None:
    """None where ConvNorm2d can take the place of conv, else why it cannot."""
    if type(conv) is not torch.nn.Conv2d:
        return f"it is a {type(conv).__name__}"
    if conv.padding_mode != "zeros":
        return f"its padding_mode is {conv.padding_mode!r}"
    if isinstance(conv.padding, str) and conv.padding != "valid":
        return f"its padding is {conv.padding!r}"
    if isinstance(conv.padding, tuple) and any(
        conv.padding[i] > conv.dilation[i] * (conv.kernel_size[i] - 1) for i in (0, 1)
    ):
        return "its padding is larger than dilation * (kernel_size - 1)"
    return None


def convert_conv_norm(
    model: torch.nn.Module,
    *,
    affine: bool = True,
    bn: bool = True,
    eps: float = 1e-6,
    eval_mode: str = "current",
    affine_init: str = "paper",
    through_preconditioner: bool = False,
    skip: Callable[[str, torch.nn.Conv2d], bool] | None = None,
) -> torch.nn.Module:
    """Replace the Conv2d of a model, with the BatchNorm2d after each, by ConvNorm2d.

    A Conv2d and a BatchNorm2d make a pair where the one is the module registered next after the other in the same
    parent, of its number of channels. The kernel, the bias and the batch norm with its parameters and statistics move
    into the ConvNorm2d by identity (an optimizer that holds them stays right), and an Identity takes the place of the
    batch norm. A Conv2d that stands alone gets no batch norm. With bn=False batch norms stay where they are.

    Left alone: subclasses of Conv2d, other padding modes, padding="same", padding larger than dilation * (k - 1), and
    what `skip(name, conv)` is true for.

    Args:
        affine, eps, eval_mode, affine_init, through_preconditioner: of ConvNorm2d.

    Returns:
        model, changed in place (or the new layer where model is a Conv2d itself).
    """
    layers: dict[int, ConvNorm2d] = {}  # a module may be registered under more than one name

    def converted(conv: torch.nn.Conv2d) -> ConvNorm2d:
        padding: Any = 0 if isinstance(conv.padding, str) else conv.padding
        layer = ConvNorm2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, padding, conv.dilation, conv.groups,  # type: ignore[arg-type]
            conv.bias is not None, affine=affine, bn=False, eps=eps, eval_mode=eval_mode, affine_init=affine_init,
            through_preconditioner=through_preconditioner, device=conv.weight.device, dtype=conv.weight.dtype,
        )  # fmt: skip
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.reset_running_lags()
        return layer.train(conv.training)

    def wanted(name: str, module: torch.nn.Module) -> bool:
        if not isinstance(module, torch.nn.Conv2d) or _why_not(module) is not None:
            return False
        return skip is None or not skip(name, module)

    def visit(parent: torch.nn.Module, path: str) -> None:
        # Not named_children, which leaves out what it has met: shared layers have a place each.
        children = [(name, child) for name, child in parent._modules.items() if child is not None]
        for i, (name, child) in enumerate(children):
            full = f"{path}{name}"
            if not wanted(full, child):
                if not isinstance(child, ConvNorm2d):
                    visit(child, f"{full}.")
                continue
            assert isinstance(child, torch.nn.Conv2d)
            layer = layers.setdefault(id(child), converted(child))
            setattr(parent, name, layer)
            after = children[i + 1] if i + 1 < len(children) else None
            if bn and after is not None and isinstance(after[1], torch.nn.BatchNorm2d):
                norm = after[1]
                if norm.num_features == child.out_channels:
                    layer.norm = norm
                    setattr(parent, after[0], torch.nn.Identity())

    if wanted("", model):
        assert isinstance(model, torch.nn.Conv2d)
        return converted(model)
    visit(model, "")
    return model
