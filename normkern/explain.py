"""explain.py: what a call would do, without doing it.

The call is made on meta tensors with a backend that only writes down what it is asked for, so what is explained is what
would run. Launches come from the planner that the CUDA library uses; for a tensor on the CPU they are those of a named
GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normkern import functional
from normkern.backends import BACKENDS, forced_backend, run_on
from normkern.problem import Act, Domain, Moments, Problem

_host: Any
try:
    _host = importlib.import_module("normkern._host")
except ImportError:  # not built
    _host = None

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    name: getattr(functional, name)
    for name in (
        "batch_norm",
        "group_norm",
        "layer_norm",
        "instance_norm",
        "rms_norm",
        "add_layer_norm",
        "add_rms_norm",
        "moments",
        "filter_response_norm",
        "weight_standardize",
        "weight_norm",
    )
}
_DTYPES = {torch.float32: "f32", torch.float64: "f64", torch.float16: "f16", torch.bfloat16: "bf16"}
_MOMENTS = {Moments.mean_var: "mean and variance", Moments.second: "second moment", Moments.given: "given"}


@dataclass(frozen=True)
class Chip:
    """What the planner must know of a GPU, and the peak of its memory in bytes per second (the maker's figure)."""

    name: str
    sms: int
    smem_per_block: int
    smem_per_sm: int
    l2_bytes: int
    max_cluster: int
    bandwidth: float | None

    def described(self) -> Any:
        """The same as the planner's own type."""
        return _host.Gpu(self.sms, self.smem_per_block, self.smem_per_sm, self.l2_bytes, self.max_cluster)


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("H200", 132, 232448, 233472, 60 << 20, 16, 4.8e12),
        Chip("H100", 132, 232448, 233472, 50 << 20, 16, 3.35e12),
        Chip("A100", 108, 166912, 167936, 40 << 20, 1, 2.04e12),
        Chip("L4", 58, 101376, 102400, 48 << 20, 1, 0.30e12),
        Chip("B200", 148, 232448, 233472, 126 << 20, 16, 8.0e12),
    )
}


@dataclass(frozen=True)
class PlannedPass:
    """One pass on a GPU: "forward", "backward" or "moments", and _host's Plan of it."""

    name: str
    plan: Any
    chip: Chip
    masked: bool = False

    def __str__(self) -> str:
        plan = self.plan
        launches = [
            _launch(name, launch)
            for name, launch in (
                ("fused", plan.fused),
                (f"reduce {plan.reduce.walk.name}", plan.reduce.launch),
                (f"weights {plan.affine.walk.name}", plan.affine.launch),
                ("map", plan.map),
            )
            if launch.blocks > 0
        ]
        moved = plan.bytes_read + plan.bytes_written
        text = (
            f"{self.name:8}  strategy {plan.strategy.name}{_team(plan)}: {'; '.join(launches)}\n"
            f"          reads {_bytes(plan.bytes_read)}, writes {_bytes(plan.bytes_written)}, "
            f"workspace {_bytes(plan.workspace_bytes)}"
        )
        if self.masked:
            does = "leaves" if self.name == "forward" else "reads"
            text += f"; {does} a bit for each element in place of the residual"
        if self.chip.bandwidth is not None:
            text += f"; at least {moved / self.chip.bandwidth * 1e6:.3g} us at {self.chip.bandwidth / 1e12:g} TB/s"
        return text


@dataclass(frozen=True)
class Explanation:
    """Which backend a call takes and why not the others, as which problem, and how a GPU runs it."""

    call: str
    backend: str | None
    why_not: dict[str, str]
    problem: Problem | None
    copied: bool
    chip: Chip | None = None
    passes: tuple[PlannedPass, ...] = ()
    no_plan: str | None = None
    on_gpu: bool = False

    def __str__(self) -> str:
        lines = [self.call, f"  backend   {self.backend}"]
        lines += [f"  not       {name}: {why}" for name, why in self.why_not.items()]
        if self.problem is None:
            return "\n".join([*lines, "  nothing to compute: the input has no elements"])
        problem = self.problem
        kind = _MOMENTS[problem.moments]
        lines.append(f"  moments   {_domain(problem.stats)}; {kind}")
        lines.append(f"  weights   {_domain(problem.affine)}")
        if problem.act != Act.none:
            lines.append(f"  then      {problem.act.name}")
        if self.copied:
            lines.append("  copies    input is copied once: its strides are not dense or do not fit this norm")
        if self.no_plan is not None:
            lines.append(f"  GPU plan  {self.no_plan}")
        elif self.chip is not None:
            where = "" if self.on_gpu else "would run like this on an "
            lines.append(f"  {where}{self.chip.name}:")
            lines += [f"    {line}" for planned in self.passes for line in str(planned).splitlines()]
        return "\n".join(lines)

    __repr__ = __str__


def _domain(domain: Domain) -> str:
    return (
        f"batch {domain.batch}, rows {domain.rows}, keep {domain.keep}, cols {domain.cols}: "
        f"{domain.groups} groups of {domain.count}"
    )


def _team(plan: Any) -> str:
    """Who shares a group, where it is more or less than a block."""
    team = plan.team
    if plan.fused.blocks == 0:
        return ""
    what = "group" if team.walk == _host.Walk.rows else "slab of groups"
    if team.blocks > 1:
        return f", {team.blocks} blocks to a {what}"
    threads = team.width * team.lanes
    return f", {threads} {'thread' if threads == 1 else 'threads'} to a {what}"


def _launch(name: str, launch: Any) -> str:
    shared = f", {_bytes(launch.shared)} shared" if launch.shared else ""
    return f"{name} {launch.blocks} x {launch.threads} threads{shared}"


def _bytes(count: int) -> str:
    if count < 10_000:
        return f"{count} B"
    return f"{count / 1e3:.1f} kB" if count < 1e6 else f"{count / 1e6:.1f} MB"


class _Recorder:
    """A backend that computes nothing and keeps the last problem."""

    name = "explain"
    seen: tuple[Problem, Tensor] | None = None
    is_moments = False
    is_sum = False
    has_parameters = False
    has_residual = False

    def why_not(self, x: Tensor) -> str | None:
        return None

    def forward(
        self, problem: Problem, x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Any = None, *_: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        self.seen = problem, x
        self.has_residual = residual is not None
        self.has_parameters = weight is not None or bias is not None
        moments = x.new_empty(problem.stats.groups, dtype=torch.float64)
        return torch.empty_like(x), moments, moments.clone()

    def backward(self, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        raise AssertionError("explain calls no backward")

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.is_sum = True
        y, mean, var = self.forward(problem, x, weight, bias)
        return y, torch.empty_like(x), mean, var

    def add_backward(self, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        raise AssertionError("explain calls no backward")

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        self.seen = problem, x
        self.is_moments = True
        moments = x.new_empty(problem.stats.groups, dtype=torch.float64)
        return moments, moments.clone()


def _on_meta(value: Any) -> Any:
    """A tensor of the same sizes and strides that has no memory: nothing of the user's is read or written."""
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _chip_of(x: Tensor, gpu: str | Chip | None) -> Chip | None:
    if isinstance(gpu, Chip):
        return gpu
    if gpu is not None:
        if gpu not in CHIPS:
            raise ValueError(f"explain: gpu must be one of {', '.join(CHIPS)}; got {gpu!r}")
        return CHIPS[gpu]
    if x.device.type != "cuda":
        return CHIPS["H200"]
    found: Any = torch.cuda.get_device_properties(x.device)
    known = next((chip for chip in CHIPS.values() if chip.name in found.name.split()), None)
    return Chip(
        found.name,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.shared_memory_per_multiprocessor,
        found.L2_cache_size,
        16 if found.major >= 9 else 1,
        None if known is None else known.bandwidth,
    )


def _planned(name: str, problem: Problem, x: Tensor, chip: Chip, recorder: _Recorder) -> PlannedPass:
    mask = recorder.has_residual and problem.can_mask(x.element_size())
    domains = [_host.Domain(d.batch, d.rows, d.keep, d.cols) for d in (problem.stats, problem.affine)]
    dtype = getattr(_host.DType, _DTYPES[x.dtype])
    described = _host.Problem(*domains, problem.moments, problem.act, dtype, problem.eps)
    request = _host.Request(
        pass_=getattr(_host.Pass, name),
        aligned=True,
        affine_grads=recorder.has_parameters,
        strategy=_host.Strategy.automatic,
        add=recorder.is_sum,
        mask=mask,
    )
    return PlannedPass(name, _host.make_plan(described, request, chip.described()), chip, mask)


def explain(op: str, input: Tensor, *args: Any, gpu: str | Chip | None = None, **kwargs: Any) -> Explanation:
    """What `normkern.<op>(input, ...)` with the same arguments would do; print it.

    `gpu` names the chip to plan for: "H200", "H100", "A100", "L4", "B200". The default is the GPU that
    holds input, or an H200.
    """
    if op not in _FUNCTIONS:
        raise ValueError(f"explain: op must be one of {', '.join(_FUNCTIONS)}; got {op!r}")
    recorder = _Recorder()
    meta_args, meta_kwargs = pytree.tree_map(_on_meta, (args, kwargs))
    with torch.no_grad(), run_on(recorder):
        _FUNCTIONS[op](_on_meta(input), *meta_args, **meta_kwargs)

    chosen, why_not = _choice(input)
    dtype = str(input.dtype).removeprefix("torch.")
    call = f"{op} on {dtype} {tuple(input.shape)}, strides {tuple(input.stride())}, {input.device}"
    if recorder.seen is None:
        return Explanation(call, chosen, why_not, None, False)
    problem, x = recorder.seen
    copied = op not in ("add_layer_norm", "add_rms_norm") and x.stride() != input.stride()
    chip = _chip_of(input, gpu)
    on_gpu = gpu is None and input.device.type == "cuda"
    if _host is None or chip is None:
        reason = "the planner is not built (normkern._host is missing)"
        return Explanation(call, chosen, why_not, problem, copied, chip, no_plan=reason, on_gpu=on_gpu)
    names = ("moments",) if recorder.is_moments else ("forward", "backward")
    passes = tuple(_planned(name, problem, x, chip, recorder) for name in names)
    return Explanation(call, chosen, why_not, problem, copied, chip, passes, on_gpu=on_gpu)


def _choice(x: Tensor) -> tuple[str | None, dict[str, str]]:
    """The backend for x, and a sentence for each of the others."""
    forced = forced_backend()
    chosen: str | None = None
    why_not: dict[str, str] = {}
    for backend in BACKENDS.values():
        why = backend.why_not(x)
        if why is not None:
            why_not[backend.name] = why
        elif forced is not None and backend is not forced:
            why_not[backend.name] = f"{forced.name} is asked for"
        elif chosen is None:
            chosen = backend.name
        else:
            why_not[backend.name] = f"{chosen} comes first"
    return chosen, why_not
