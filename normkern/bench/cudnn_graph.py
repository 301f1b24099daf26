"""cudnn_graph.py: layer norm through cuDNN's Python front end, forward and backward, one pair of graphs per shape.

Imported only where the package nvidia-cudnn-frontend and a GPU are.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor


@functools.cache
def _cudnn() -> Any:
    return importlib.import_module("cudnn")


@functools.cache
def _handle() -> Any:
    return _cudnn().create_handle()


def _built(graph: Any) -> Tensor:
    """Plans for a graph; the workspace that it needs."""
    cudnn = _cudnn()
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8)


def _new_graph() -> Any:
    cudnn = _cudnn()
    of = cudnn.data_type.FLOAT
    return cudnn.pygraph(intermediate_data_type=of, compute_data_type=of, handle=_handle())


def _input(graph: Any, name: str, like: Tensor, **options: Any) -> Any:
    return graph.tensor(name=name, dim=like.size(), stride=like.stride(), data_type=like.dtype, **options)


class _Graphs:
    """The two graphs for rows of (M, 1, D), a weight of (1, 1, D) and moments of (M, 1, 1)."""

    def __init__(self, x: Tensor, weight: Tensor, eps: float) -> None:
        phase = _cudnn().norm_forward_phase.TRAINING
        self.eps = torch.full((1, 1, 1), eps)
        moment = torch.empty((x.shape[0], 1, 1), device=x.device)

        self.forward_graph = _new_graph()
        given = [_input(self.forward_graph, name, t) for name, t in (("x", x), ("weight", weight), ("bias", weight))]
        epsilon = _input(self.forward_graph, "eps", self.eps, is_pass_by_value=True)
        got = self.forward_graph.layernorm(
            name="layer_norm", norm_forward_phase=phase, input=given[0], scale=given[1], bias=given[2], epsilon=epsilon
        )
        for tensor, dtype in zip(got, (x.dtype, torch.float32, torch.float32), strict=True):
            tensor.set_output(True).set_data_type(dtype)
        self.forward_space = _built(self.forward_graph)
        self.forward_names = [*given, epsilon, *got]

        self.backward_graph = _new_graph()
        likes = (("dy", x), ("x", x), ("weight", weight), ("mean", moment), ("rstd", moment))
        dy, x_, weight_, mean, rstd = saved = [_input(self.backward_graph, name, t) for name, t in likes]
        made = self.backward_graph.layernorm_backward(
            name="layer_norm_backward", grad=dy, input=x_, scale=weight_, mean=mean, inv_variance=rstd
        )
        for tensor, dtype in zip(made, (x.dtype, weight.dtype, weight.dtype), strict=True):
            tensor.set_output(True).set_data_type(dtype)
        self.backward_space = _built(self.backward_graph)
        self.backward_names = [*saved, *made]


@functools.cache
def _graphs(rows: int, width: int, dtype: torch.dtype, parameters: torch.dtype, eps: float) -> _Graphs:
    x = torch.empty((rows, 1, width), device="cuda", dtype=dtype)
    return _Graphs(x, torch.empty((1, 1, width), device="cuda", dtype=parameters), eps)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.graphs = graphs = _graphs(x.shape[0], x.shape[2], x.dtype, weight.dtype, eps)
        y = torch.empty_like(x)
        mean, rstd = torch.empty((2, x.shape[0], 1, 1), device=x.device).unbind()
        tensors = (x, weight, bias, graphs.eps, y, mean, rstd)
        _cudnn().set_stream(handle=_handle(), stream=torch.cuda.current_stream().cuda_stream)
        named = dict(zip(graphs.forward_names, tensors, strict=True))
        graphs.forward_graph.execute(named, graphs.forward_space, handle=_handle())
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        dx, dweight, dbias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        tensors = (dy.contiguous(), x, weight, mean, rstd, dx, dweight, dbias)
        _cudnn().set_stream(handle=_handle(), stream=torch.cuda.current_stream().cuda_stream)
        named = dict(zip(ctx.graphs.backward_names, tensors, strict=True))
        ctx.graphs.backward_graph.execute(named, ctx.graphs.backward_space, handle=_handle())
        return dx, dweight, dbias, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Layer norm over the last dimension; x is copied where it is not contiguous."""
    assert bias is not None
    width = x.shape[-1]
    rows = x.contiguous().view(-1, 1, width)
    y: Tensor = _LayerNorm.apply(rows, weight.view(1, 1, width), bias.view(1, 1, width), eps)  # type: ignore[no-untyped-call]
    return y.view(x.shape)
