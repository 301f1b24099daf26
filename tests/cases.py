# The one table of cases: which norm, which shape, layout, dtypes, parameters, activation and data. Tests, benches and
# the demo all draw from it, and inputs are a pure function of a case's id. Nothing here imports normkern.
from __future__ import annotations

import math
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

NORMS = ("batch", "group", "layer", "instance", "rms")
RESPONSE = "response"  # filter response norm, which torch has no function for
ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    None: lambda z: z,
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "leaky_relu": F.leaky_relu,
}
DENSE_LAYOUTS = ("contiguous", "channels_last", "offset", "channels_last_offset", "transposed", "swapped")
CONSTANT = 0.1  # not a binary fraction: a mean that rounds shows


@dataclass(frozen=True)
class Case:
    norm: str
    shape: tuple[int, ...]
    groups: int = 1  # group norm
    dims: int = 1  # layer and rms: trailing dimensions that are normalized
    layout: str = "contiguous"
    dtype: str = "float32"
    params: str = "wb"  # "w", "b", "wb" or ""
    param_dtype: str | None = None  # None: that of x; running statistics have it too
    act: str | None = None
    residual: str | None = None  # "like": in x's layout, "unlike": in another one
    training: bool = True  # batch: training; instance: use_input_stats
    running: bool = True  # batch and instance: running statistics are passed
    data: str = "mixed"
    eps: float | None = 1e-5

    def __str__(self) -> str:
        parts = [self.norm, "x".join(map(str, self.shape))]
        if self.norm == "group":
            parts.append(f"g{self.groups}")
        if self.norm in ("layer", "rms"):
            parts.append(f"d{self.dims}")
        parts += [self.layout, self.dtype, self.params or "plain"]
        if self.param_dtype:
            parts[-1] += f"_{self.param_dtype}"
        if self.norm in ("batch", "instance"):
            parts.append(("train" if self.training else "eval") + ("" if self.running else "_nostats"))
        if self.act:
            parts.append(self.act)
        if self.residual:
            parts.append(f"res_{self.residual}")
        parts.append(self.data)
        if self.eps != 1e-5:
            parts.append(f"eps_{self.eps}")
        return "-".join(parts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def torch_param_dtype(self) -> torch.dtype:
        return getattr(torch, self.param_dtype or self.dtype)

    @property
    def param_shape(self) -> tuple[int, ...]:
        return self.shape[-self.dims :] if self.norm in ("layer", "rms") else self.shape[1:2]

    @property
    def second(self) -> bool:
        """Divided by the root mean square, with no mean taken off."""
        return self.norm in ("rms", RESPONSE)

    @property
    def given(self) -> bool:
        """The moments come from outside (the running statistics)."""
        return not self.training

    @property
    def dense(self) -> bool:
        return self.layout in DENSE_LAYOUTS

    # The next four know what the norm means in logical dimensions, and nothing of memory.
    def grouped(self, x: Tensor) -> Tensor:
        """[groups, count]: a row for every set of elements that share moments."""
        n, c = self.shape[:2]
        if self.norm == "batch" or self.given:
            return x.transpose(0, 1).reshape(c, -1)
        if self.norm in ("layer", "rms"):
            count = math.prod(self.param_shape)
            return x.reshape(self.numel // count if count else math.prod(self.shape[: -self.dims]), count)
        groups = n * (c if self.norm in ("instance", RESPONSE) else self.groups)
        return x.reshape(groups, self.numel // groups if groups else 0)

    def ungrouped(self, m: Tensor) -> Tensor:
        if self.norm == "batch" or self.given:
            n, c, *rest = self.shape
            return m.reshape(c, n, *rest).transpose(0, 1)
        return m.reshape(self.shape)

    def broadcast(self, p: Tensor) -> Tensor:
        """A parameter, shaped to multiply x."""
        return p if self.norm in ("layer", "rms") else p.reshape(1, -1, *[1] * (len(self.shape) - 2))

    def unbroadcast(self, t: Tensor) -> Tensor:
        """The sum of t over all elements that share a parameter."""
        dims = range(t.dim() - self.dims) if self.norm in ("layer", "rms") else [d for d in range(t.dim()) if d != 1]
        return t.sum(tuple(dims)) if dims else t  # torch reads "no dimension" as "all"


@dataclass
class Inputs:
    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    dy: Tensor

    def to(self, device: str | torch.device) -> Inputs:
        return Inputs(**{k: None if v is None else v.to(device) for k, v in vars(self).items()})


def in_layout(values: Tensor, layout: str) -> Tensor:
    """The same values (those of one sample, if expanded) with the strides that `layout` names."""
    rank = values.dim()
    order = list(range(rank))
    if layout.startswith("channels_last"):
        order = [0, *range(2, rank), 1]
    if layout == "swapped":  # channels outermost
        order[:2] = 1, 0
    if layout == "transposed":
        order[-2:] = order[:-3:-1]
    if layout in ("sliced", "cropped"):
        dim = rank - 1 if layout == "sliced" else 1
        sizes = [2 * s + 2 if d == dim else s for d, s in enumerate(values.shape)]
        every = torch.full(sizes, float("nan"), dtype=values.dtype)
        view = every.narrow(dim, 1, 2 * values.shape[dim])
        view = view[..., ::2] if layout == "sliced" else view.narrow(1, 0, values.shape[1])
        return view.copy_(values)
    if layout == "expanded":
        return values[:1].contiguous().expand(values.shape)
    start = 1 if layout.endswith("offset") else 0
    flat = torch.empty(values.numel() + start, dtype=values.dtype)
    out = flat[start:].view([values.shape[d] for d in order]).permute([order.index(d) for d in range(rank)])
    return out.copy_(values)


def data(case: Case, generator: torch.Generator) -> Tensor:
    """float64 values of x, planned by statistics group, so that every shape has groups that hurt."""
    half = case.dtype in ("float16", "bfloat16")
    far = 100.0 if half else 1e4
    m = case.grouped(torch.randn(case.shape, dtype=torch.float64, generator=generator)).clone()
    row = torch.arange(m.shape[0]).unsqueeze(1)
    if case.data == "mixed":  # plain, except one constant group and one with a large mean
        if m.shape[0] > 1:
            m[0] = CONSTANT
        m[1:2] += far
        m[5:6] -= far / 10
    elif case.data == "offset":
        m += far * (1 - 2 * (row % 2)) * 10.0 ** -(row % 3)
    elif case.data == "scaled":  # every group has a size of its own, from 1e-3 to 1e3
        m *= 10.0 ** (row % 7 - 3)
    elif case.data == "wide":  # sizes vary inside a group
        m *= 10.0 ** torch.empty(m.shape, dtype=torch.float64).uniform_(-3, 1 if half else 3, generator=generator)
    elif case.data == "constant":
        m = torch.full_like(m, CONSTANT) * (1 + row % 5)
    else:
        raise ValueError(f"unknown data kind {case.data!r}")
    return case.ungrouped(m)


def build(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(zlib.crc32(str(case).encode()))

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=g)

    dtype, param_dtype = case.torch_dtype, case.torch_param_dtype
    stats = case.norm in ("batch", "instance") and case.running
    x = in_layout(data(case, g).to(dtype), case.layout)
    dy = in_layout(normal(case.shape).to(dtype), case.layout if case.dense else "contiguous")
    weight = (1 + normal(case.param_shape) / 2).to(param_dtype) if "w" in case.params else None
    bias = normal(case.param_shape).to(param_dtype) if "b" in case.params else None
    residual = None
    if case.residual:
        other = "contiguous" if case.layout.startswith("channels_last") or not case.dense else "sliced"
        residual = in_layout(normal(case.shape).to(dtype), case.layout if case.residual == "like" else other)
    mean = normal(case.shape[1:2]).to(param_dtype) if stats else None
    var = (normal(case.shape[1:2]) ** 2 + 0.5).to(param_dtype) if stats else None
    return Inputs(x, weight, bias, residual, mean, var, dy)


MOMENTUM = 0.3


def call(case: Case, inputs: Inputs, functions: Any = F, **extra: Any) -> Tensor:
    """The case through torch's functions (activation and residual apart) or through normkern's (fused)."""
    i = inputs
    fused = functions is not F
    if fused:
        extra = {"residual": i.residual, "act": case.act, **extra}
    if case.norm in ("batch", "instance"):
        norm = functions.batch_norm if case.norm == "batch" else functions.instance_norm
        y = norm(i.x, i.running_mean, i.running_var, i.weight, i.bias, case.training, MOMENTUM, case.eps, **extra)
    elif case.norm == "group":
        y = functions.group_norm(i.x, case.groups, i.weight, i.bias, case.eps, **extra)
    elif case.norm == "layer":
        y = functions.layer_norm(i.x, case.param_shape, i.weight, i.bias, case.eps, **extra)
    elif case.norm == RESPONSE:
        y = functions.filter_response_norm(i.x, i.weight, i.bias, None, case.eps, **extra)
    else:
        y = functions.rms_norm(i.x, case.param_shape, i.weight, case.eps, **extra)
    if not fused:
        y = ACTIVATIONS[case.act](y if i.residual is None else y + i.residual)
    return y


# ---- the table ---------------------------------------------------------------------------------------------------

# Each shape, and the groups of group norm or the normalized dimensions of layer and rms norm. Odd sizes on purpose:
# 3, 5, 7, 49, 65, 193, 1000, 2049.
SHAPES: dict[str, tuple[tuple[tuple[int, ...], int], ...]] = {
    "batch": tuple(
        (shape, 1)
        for shape in (
            (4, 3), (65, 7), (2049, 5), (2, 1000),
            (3, 8, 49), (1, 5, 193), (2, 64, 3),
            (2, 3, 5, 7), (8, 64, 1, 1), (1, 49, 7, 7), (3, 193, 3, 3), (2, 10, 28, 28), (5, 1, 2, 2), (2, 32, 16, 16),
            (2, 5, 3, 4, 5), (1, 16, 2, 7, 7),
        )
    ),
    "group": (
        ((4, 6), 2), ((3, 193), 1), ((2, 65), 65),
        ((2, 12, 49), 4), ((1, 1000, 3), 8),
        ((2, 32, 8, 8), 8), ((2, 6, 5, 7), 6), ((1, 10, 7, 7), 2), ((3, 30, 3, 3), 10), ((2, 64, 1, 1), 8),
        ((1, 320, 5, 5), 32), ((2, 16, 28, 28), 2), ((2, 7, 3, 5), 1), ((5, 40, 2, 3), 5),
        ((2, 9, 3, 4, 5), 3), ((1, 32, 2, 7, 7), 4),
    ),
    "layer": (
        ((7, 1), 1), ((5, 3), 1), ((65, 49), 1), ((3, 2049), 1), ((1, 1000), 1), ((300, 64), 1), ((2, 9000), 1),
        ((2, 3, 193), 1), ((4, 5, 7), 2), ((3, 65, 8), 1), ((6, 7, 5), 3),
        ((2, 6, 5, 7), 1), ((2, 3, 8, 10), 3), ((3, 5, 4, 16), 2),
        ((2, 3, 2, 5, 7), 1), ((2, 3, 2, 4, 9), 3),
    ),
    "instance": tuple(
        (shape, 1)
        for shape in (
            (3, 5, 7), (1, 65, 49), (2, 3, 2049), (4, 193, 2),
            (2, 3, 5, 7), (1, 8, 16, 16), (3, 49, 3, 3), (1, 1, 28, 28), (2, 10, 1, 2), (2, 64, 7, 7), (5, 5, 8, 5),
            (2, 5, 3, 4, 5), (1, 16, 2, 7, 7), (2, 3, 4, 8, 8),
        )
    ),
    RESPONSE: tuple(
        (shape, 1)
        for shape in (
            (3, 5, 7), (2, 3, 2049), (4, 193, 2), (2, 3, 5, 7), (3, 49, 3, 3), (2, 10, 1, 1), (2, 64, 7, 7),
            (2, 5, 3, 4, 5),
        )
    ),
    "rms": (
        ((7, 1), 1), ((5, 3), 1), ((65, 49), 1), ((3, 2049), 1), ((1, 1000), 1), ((300, 64), 1), ((2, 9000), 1),
        ((2, 3, 193), 1), ((4, 5, 7), 2), ((3, 65, 8), 1),
        ((2, 6, 5, 7), 1), ((2, 3, 8, 10), 3), ((3, 5, 4, 16), 2),
        ((2, 3, 2, 5, 7), 1),
    ),
}  # fmt: skip

PARAMS = (
    ("wb", None),
    ("wb", "float32"),
    ("wb", "float64"),
    ("wb", "bfloat16"),
    ("w", None),
    ("b", None),
    ("", None),
    ("w", "float16"),
)


def valid(row: dict[str, Any], norm: str) -> bool:
    """Whether a combination means anything; a partial row is asked about what it already holds."""
    rank = len(row["shape"][0]) if "shape" in row else 4
    if row.get("layout", "").startswith("channels_last") and rank == 2:
        return False
    params = row.get("params")
    if params and params[1] == row.get("dtype", ""):
        return False  # the same as None
    # No running statistics in eval mode: nothing to normalize by.
    return row.get("mode") != (False, False)


def pairwise(
    factors: dict[str, tuple[Any, ...]], norm: str, skip: Callable[[str, Any, str, Any], bool]
) -> Iterator[dict[str, Any]]:
    """Rows that hold every valid pair of values of two factors (but those `skip` waves through) at least once."""
    rng = random.Random(norm)
    names = list(factors)
    open_pairs = {
        (a, va, b, vb): None
        for a, b in combinations(names, 2)
        for va in factors[a]
        for vb in factors[b]
        if valid({a: va, b: vb}, norm) and not skip(a, va, b, vb)
    }
    while open_pairs:
        a, va, b, vb = next(iter(open_pairs))
        row = {a: va, b: vb}
        for name in sorted(set(names) - {a, b}, key=names.index):
            options = [v for v in factors[name] if valid({**row, name: v}, norm)]
            rng.shuffle(options)

            def gain(v: Any, name: str = name, row: dict[str, Any] = row) -> int:
                both = (
                    (k, row[k], name, v) if names.index(k) < names.index(name) else (name, v, k, row[k]) for k in row
                )
                return sum(pair in open_pairs for pair in both)

            row[name] = max(options, key=gain)
        for p, q in combinations(names, 2):
            open_pairs.pop((p, row[p], q, row[q]), None)
        yield row


def table() -> list[Case]:
    cases: list[Case] = []
    for norm in (*NORMS, RESPONSE):
        rms = norm == "rms"
        factors: dict[str, tuple[Any, ...]] = {
            "shape": SHAPES[norm],
            "layout": (
                "contiguous",
                "channels_last",
                "transposed",
                "swapped",
                "offset",
                "channels_last_offset",
                "sliced",
                "cropped",
                "expanded",
            ),
            "dtype": ("float32", "float16", "bfloat16", "float64"),
            "params": tuple(p for p in PARAMS if not (rms and "b" in p[0])) + ((("w", "float32"),) if rms else ()),
            "act": tuple(ACTIVATIONS),
            "residual": (None, "like", "unlike"),
            "data": ("mixed", "offset", "scaled", "wide"),
            "eps": (1e-5, 1e-3) if not rms else (1e-5, None),
        }
        if norm in ("batch", "instance"):
            factors["mode"] = ((True, True), (True, False), (False, True))  # training, running

        # Shapes meet every layout that kernels see; copies of odd layouts made in Python need not meet every shape.
        def skip(a: str, va: Any, b: str, vb: Any) -> bool:
            return a == "shape" and b == "layout" and vb not in ("contiguous", "channels_last", "transposed")

        for row in pairwise(factors, norm, skip):
            shape, option = row["shape"]
            options = {"groups": option} if norm == "group" else {"dims": option}
            training, running = row.get("mode", (True, True))
            params, param_dtype = row["params"]
            cases.append(
                Case(
                    norm,
                    shape,
                    layout=row["layout"],
                    dtype=row["dtype"],
                    params=params,
                    param_dtype=param_dtype if params else None,
                    act=row["act"],
                    residual=row["residual"],
                    training=training,
                    running=running,
                    data=row["data"],
                    eps=row["eps"],
                    **options,
                )
            )
    return cases + list(core()) + list(edges()) + list(large())


def core() -> Iterator[Case]:
    """What networks run, on data that hurts."""
    for norm in NORMS:
        for layout in ("contiguous", "channels_last"):
            for dtype, param_dtype in (("float32", None), ("bfloat16", "float32")):
                for data in ("mixed", "offset"):
                    params = "w" if norm == "rms" else "wb"
                    yield Case(norm, (3, 32, 6, 9), 8, 2, layout, dtype, params, param_dtype, data=data)


def edges() -> Iterator[Case]:
    """What no pair of factors reaches: nothing there, one element, everything constant."""
    for training in (True, False):
        for shape in ((0, 5, 4, 4), (2, 5, 0), (0, 3)):
            yield Case("batch", shape, training=training)
        for shape in ((0, 5, 4, 4), (2, 5, 0, 3)):
            yield Case("instance", shape, training=training, running=not training)
    for shape in ((0, 6, 4, 4), (2, 6, 0), (2, 0, 3)):
        yield Case("group", shape, groups=3, residual="like", act="silu")
    for norm in ("layer", "rms"):
        for shape, dims in (((0, 5), 1), ((2, 0), 1), ((2, 0, 3), 2)):
            yield Case(norm, shape, dims=dims, params="w")
    yield Case("group", (2, 1), groups=1)
    yield Case("group", (2, 3, 1, 1), groups=3)
    yield Case("layer", (1, 1))
    yield Case("rms", (1, 1), params="w")
    yield Case("batch", (1, 3), training=False)
    yield Case("instance", (1, 1, 1, 2))
    for norm in ("batch", "group", "layer", "instance"):
        for layout in ("contiguous", "channels_last"):
            for dtype in ("float32", "bfloat16"):
                yield Case(norm, (3, 8, 5, 7), groups=4, layout=layout, dtype=dtype, data="constant")


def large() -> Iterator[Case]:
    """Larger than what one block or one core holds."""
    for layout in ("contiguous", "channels_last"):
        for dtype in ("float32", "bfloat16"):
            yield Case("batch", (2, 48, 40, 40), layout=layout, dtype=dtype, act="relu", residual="like")
            yield Case("group", (2, 64, 32, 32), groups=32, layout=layout, dtype=dtype, act="silu")
        yield Case("instance", (2, 3, 24, 24, 24), layout=layout, act="leaky_relu")
    for norm in ("layer", "rms"):
        for dtype in ("float32", "bfloat16"):
            yield Case(norm, (2100, 96), dtype=dtype, params="w")
        yield Case(norm, (5, 33000), dtype="bfloat16", param_dtype="float32", params="w")


def added() -> list[Case]:
    """For add_layer_norm and add_rms_norm: the residual is added to x before the norm."""
    rows = (
        ((7, 1), 1, "contiguous", "like"),
        ((65, 49), 1, "contiguous", "like"),
        ((70, 64), 1, "contiguous", "like"),
        ((3, 2049), 1, "offset", "like"),
        ((2, 9000), 1, "contiguous", "like"),
        ((2, 3, 193), 1, "transposed", "like"),
        ((2, 6, 5, 7), 1, "channels_last", "like"),
        ((3, 5, 4, 16), 2, "channels_last_offset", "like"),
        ((6, 7, 5), 3, "contiguous", "like"),
        ((4, 5, 7), 2, "contiguous", "unlike"),
        ((5, 33), 1, "sliced", "like"),
        ((1, 1), 1, "contiguous", "like"),
        ((0, 5), 1, "contiguous", "like"),
        ((2, 0, 3), 2, "contiguous", "like"),
    )
    kinds = (("float32", None, "mixed"), ("bfloat16", "float32", "offset"), ("float16", "bfloat16", "scaled"))
    kinds += (("float64", None, "offset"), ("bfloat16", None, "wide"), ("float32", "float64", "offset"))
    cases = []
    for number, (shape, dims, layout, residual) in enumerate(rows):
        for turn, norm in enumerate(("layer", "rms")):
            dtype, param_dtype, data = kinds[(5 * number + 3 * turn) % len(kinds)]
            params = "w" if norm == "rms" else ("wb", "b", "w", "")[number % 4]
            options = {"dtype": dtype, "param_dtype": param_dtype if params else None, "data": data}
            cases.append(Case(norm, shape, dims=dims, layout=layout, params=params, residual=residual, **options))
    return cases


CASES = table()
ADDED = added()


def subset(cases: list[Case], count: int, seed: str = "") -> list[Case]:
    """A fixed sample: whoever has the smallest hash, so that adding a case hardly changes who is in."""
    return sorted(cases, key=lambda c: zlib.crc32((seed + str(c)).encode()))[:count]


def smoke() -> list[Case]:
    """One plain case of each norm in both layouts."""
    shape = (2, 6, 5, 7)
    return [
        Case(norm, shape, groups=3, layout=layout, params="w" if norm == "rms" else "wb")
        for norm in NORMS
        for layout in ("contiguous", "channels_last")
    ]


def small(limit: int = 20_000) -> list[Case]:
    """Small enough for kernels that run in an emulator; the largest of these still need several blocks."""
    return [c for c in CASES if c.numel <= limit]
