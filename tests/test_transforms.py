# What other parts of torch do with a call: torch.func, autocast, exporters, hooks on saved tensors, checkpoints,
# deterministic mode. torch's own norms are the model throughout.
from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import normkern
import normkern.nn

Norm = Callable[[Any, Tensor], Tensor]  # takes torch.nn.functional or normkern, and x of shape (N, 6, 4)


def weight() -> Tensor:
    return torch.linspace(0.5, 2, 6, dtype=torch.float64)


NORMS: dict[str, Norm] = {
    "group": lambda of, x: of.group_norm(x, 2, weight(), weight()),
    "layer": lambda of, x: of.layer_norm(x, (4,), weight()[:4]),
    "rms": lambda of, x: of.rms_norm(x, (6, 4), eps=1e-5),
    "instance": lambda of, x: of.instance_norm(x, weight=weight()),
    "batch": lambda of, x: of.batch_norm(x, None, None, weight(), training=True),
    "batch_eval": lambda of, x: of.batch_norm(x, weight(), weight(), weight()),
}
each_norm = pytest.mark.parametrize("norm", NORMS)


def data(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def agree(run: Callable[[Any], Any], **tolerance: float) -> None:
    """What `run` makes of our functions and of torch's."""
    torch.testing.assert_close(run(normkern), run(F), **({"rtol": 1e-9, "atol": 1e-10} | tolerance))


# ---- torch.func


@each_norm
def test_vmap(norm: str) -> None:
    f, x = NORMS[norm], data(5, 2, 6, 4)
    agree(lambda of: torch.func.vmap(lambda z: f(of, z))(x))
    agree(lambda of: torch.func.vmap(lambda z: f(of, z), in_dims=2, out_dims=1)(x.movedim(0, 2)))
    agree(lambda of: torch.func.vmap(torch.func.vmap(lambda z: f(of, z)))(x.expand(3, *x.shape)))
    agree(lambda of: torch.func.vmap(lambda z: f(of, z), chunk_size=2)(x))


@each_norm
def test_derivatives(norm: str) -> None:
    f, x, v = NORMS[norm], data(2, 6, 4), data(3, 2, 6, 4)[2]

    def value(of: Any) -> Callable[[Tensor], Tensor]:
        return lambda z: (f(of, z).pow(3) * v).sum()

    agree(lambda of: torch.func.grad(value(of))(x))
    agree(lambda of: torch.func.vjp(lambda z: f(of, z), x)[1](v))
    agree(lambda of: torch.func.jvp(lambda z: f(of, z), (x,), (v,)))
    agree(lambda of: torch.func.jacrev(lambda z: f(of, z))(x))
    agree(lambda of: torch.func.jacfwd(lambda z: f(of, z))(x))
    agree(lambda of: torch.func.hessian(value(of))(x), rtol=1e-7, atol=1e-8)
    agree(lambda of: torch.func.grad(lambda z: torch.func.grad(value(of))(z).square().sum())(x), rtol=1e-7, atol=1e-7)
    agree(lambda of: torch.func.vmap(torch.func.grad(value(of)))(torch.stack([x, 2 * x])))
    agree(lambda of: torch.func.linearize(lambda z: f(of, z), x)[1](v))


def test_gradients_per_sample() -> None:
    x = data(5, 6, 4)

    def loss(of: Any) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda w, z: of.group_norm(z[None], 2, w).pow(3).sum()

    agree(lambda of: torch.func.vmap(torch.func.grad(loss(of)), (None, 0))(weight(), x))


def step(of: Any, x: Tensor, mean: Tensor, var: Tensor, norm: str) -> Tensor:
    if norm == "batch":
        return of.batch_norm(x, mean, var, training=True)  # type: ignore[no-any-return]
    return of.instance_norm(x, mean, var)  # type: ignore[no-any-return]


@pytest.mark.parametrize("norm", ["batch", "instance"])
def test_running_statistics_under_transforms(norm: str) -> None:
    """Captured or passed, batched or not: they move, or the call is refused, as torch's."""
    x, v = data(2, 6, 4), data(3, 2, 6, 4)[1]

    def with_fresh(of: Any, run: Callable[..., Any]) -> Any:
        mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
        out = run(of, mean, var)
        assert not mean.requires_grad
        return out, mean, var

    runs: list[Callable[..., Any]] = [
        lambda of, m, s: torch.func.grad(lambda z: (step(of, z, m, s, norm) * v).sum())(x),
        lambda of, m, s: torch.func.jvp(lambda z: step(of, z, m, s, norm), (x,), (v,)),
        lambda of, m, s: torch.func.grad(
            lambda z: torch.func.grad(lambda y: (step(of, y, m, s, norm) * v).sum())(z).sum()
        )(x),
        lambda of, m, s: torch.func.grad(lambda z, a, b: (step(of, z, a, b, norm) * v).sum())(x, m, s),
    ]
    for run in runs:
        agree(lambda of, run=run: with_fresh(of, run))
    stacked = torch.stack([x, 2 * x])

    def batched(of: Any) -> Any:
        mean, var = torch.zeros(2, 6, dtype=torch.float64), torch.ones(2, 6, dtype=torch.float64)
        return torch.func.vmap(lambda z, m, s: step(of, z, m, s, norm))(stacked, mean, var), mean, var

    agree(batched)
    for of in (F, normkern):
        with pytest.raises(RuntimeError, match="Batch norm got a batched tensor as input while the running_mean"):
            with_fresh(of, lambda of, m, s: torch.func.vmap(lambda z: step(of, z, m, s, norm))(stacked))


def test_forward_mode_leaves_no_tangent_in_statistics() -> None:
    import torch.autograd.forward_ad as forward_ad

    mean, var = torch.zeros(6, dtype=torch.float64), torch.ones(6, dtype=torch.float64)
    with forward_ad.dual_level():
        x = forward_ad.make_dual(data(2, 6, 4).requires_grad_(), data(2, 6, 4))
        y = normkern.batch_norm(x, mean, var, training=True)
        assert forward_ad.unpack_dual(y).tangent is not None
        assert forward_ad.unpack_dual(mean).tangent is None
    assert y.requires_grad
    assert not mean.requires_grad


# ---- autocast


@pytest.fixture
def autocast_on_cuda() -> Iterator[None]:
    """The switch alone: torch.autocast("cuda") turns itself off where there is no GPU."""
    torch.set_autocast_enabled("cuda", True)
    yield
    torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_autocast_as_torchs_registry_has_it(autocast_on_cuda: None, dtype: torch.dtype) -> None:
    """Dtypes on a GPU, of output and of what comes back: tensors without memory, so no GPU is needed."""
    calls: dict[str, Norm] = {
        "group": lambda of, x: of.group_norm(x, 2, x.new_ones(6), x.new_ones(6)),
        "layer": lambda of, x: of.layer_norm(x, (4,), x.new_ones(4)),
        "rms": lambda of, x: of.rms_norm(x, (4,), x.new_ones(4)),
        "batch": lambda of, x: of.batch_norm(x, x.new_zeros(6), x.new_ones(6), x.new_ones(6)),
        "instance": lambda of, x: of.instance_norm(x, weight=x.new_ones(6)),
    }
    with FakeTensorMode():
        x = torch.empty(2, 6, 4, device="cuda", dtype=dtype)
        for name, f in calls.items():
            assert f(normkern, x).dtype == f(F, x).dtype, name
        if dtype.itemsize == 2:
            assert normkern.group_norm(x, 2, residual=x, act="silu").dtype == torch.float32
            y, total = normkern.add_rms_norm(x, x, (4,))
            assert (y.dtype, total.dtype) == (torch.float32, dtype)


def test_keep_half_casts_nothing(autocast_on_cuda: None) -> None:
    """And nests, ends with an error, and leaves a graph that was compiled outside of it."""

    def dtypes(x: Tensor) -> list[torch.dtype]:
        calls = (normkern.group_norm(x, 2), normkern.layer_norm(x, (4,), x.new_ones(4)), normkern.rms_norm(x, (4,)))
        return [y.dtype for y in calls]

    with FakeTensorMode():
        x = torch.empty(2, 6, 4, device="cuda", dtype=torch.bfloat16)
        with normkern.keep_half():
            with pytest.raises(KeyError), normkern.keep_half():
                raise KeyError
            assert dtypes(x) == [torch.bfloat16] * 3
        assert dtypes(x) == [torch.float32] * 3
        compiled = torch.compile(lambda x: normkern.layer_norm(x, (4,)), backend="eager")
        assert compiled(x).dtype == torch.float32
        with normkern.keep_half():
            assert compiled(x).dtype == torch.bfloat16
            y, total = normkern.add_rms_norm(x, x, (4,))
            assert (y.dtype, total.dtype) == (torch.bfloat16, torch.bfloat16)


def test_autocast_on_the_cpu_casts_nothing() -> None:
    x = torch.randn(2, 6, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        for of in (F, normkern):
            assert of.layer_norm(x, (4,)).dtype == torch.bfloat16  # type: ignore[attr-defined]
            assert of.layer_norm(x.float(), (4,)).dtype == torch.float32  # type: ignore[attr-defined]


# ---- exporters


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.group = normkern.nn.GroupNorm(3, 6, act="silu")
        self.batch = normkern.nn.BatchNorm2d(6, act="relu")
        self.instance = normkern.nn.InstanceNorm2d(6, affine=True, act="leaky_relu")
        self.layer = normkern.nn.LayerNorm(4, act="gelu")
        self.rms = normkern.nn.RMSNorm((5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.batch(self.group(x), residual=x)
        return self.rms(self.layer(self.instance(y)))  # type: ignore[no-any-return]


def image(n: int) -> Tensor:
    return torch.randn(n, 6, 5, 4, generator=torch.Generator().manual_seed(n))


def operators(program: Any) -> set[str]:
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_exported_programs_hold_torchs_operators_only(training: bool, strict: bool) -> None:
    net = Net().train(training)
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(net, (image(4),), dynamic_shapes=sizes, strict=strict)
    for stage in (program, program.run_decompositions()):
        assert operators(stage)
        assert all(name.startswith(("aten.", "<built-in function")) for name in operators(stage)), operators(stage)
    before = net.batch.running_mean.clone()  # type: ignore[union-attr,operator]
    exported = program.module()
    torch.testing.assert_close(exported(image(7)), net(image(7)), rtol=1e-4, atol=1e-5)
    if training:
        moved = dict(exported.named_buffers())["batch.running_mean"]
        assert not torch.equal(moved, before)
        torch.testing.assert_close(moved, net.batch.running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("param_dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exported_dtypes(dtype: torch.dtype, param_dtype: torch.dtype) -> None:
    """Parameters of any dtype, which torch's operators do not all take."""

    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Buffer(torch.linspace(0.5, 2, 4, dtype=param_dtype))

        def forward(self, x: Tensor) -> Tensor:
            y = normkern.group_norm(normkern.layer_norm(x, (4,), self.scale, self.scale), 2, self.scale, self.scale)
            y = normkern.batch_norm(y, self.scale, self.scale, self.scale, self.scale)
            return normkern.instance_norm(normkern.rms_norm(y, (4,), self.scale), weight=self.scale)

    x = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    one = One()
    exported = torch.export.export(one, (x,)).module()
    assert all(name.startswith("aten.") for name in operators(torch.export.export(one, (x,))))
    tolerance = 20 * torch.finfo(dtype).eps * (1e3 if dtype == torch.float64 and param_dtype != dtype else 1)
    y = exported(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, one(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", [normkern.nn.BatchNorm1d, normkern.nn.InstanceNorm1d])
def test_exported_statistics_that_torchs_functions_cannot_move(kind: Any) -> None:
    """Of another dtype, with a cumulative average, skipping what is not finite: formulas in torch's operators."""
    x = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    made = [
        kind(6, track_running_stats=True).double(),
        kind(6, track_running_stats=True, skip_nonfinite=True),
        kind(6, track_running_stats=True, momentum=None),
    ]
    for module in made:
        program = torch.export.export(module, (x,))
        assert all(name.startswith(("aten.", "<built-in")) for name in operators(program)), operators(program)
        exported = program.module()
        torch.testing.assert_close(exported(x), module(x), rtol=1e-5, atol=1e-5)
        moved = dict(exported.named_buffers())
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(moved[name], buffer)


def test_jit_trace() -> None:
    net = Net().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(net, (image(2),))
    torch.testing.assert_close(traced(image(5)), net(image(5)), rtol=1e-4, atol=1e-5)
    assert "normkern::" not in str(traced.inlined_graph)


def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    sizes = {"x": {0: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.onnx.export(Net().eval(), (image(4),), dynamo=True, dynamic_shapes=sizes, verbose=False)
    assert program is not None
    kinds = {node.op_type for node in program.model.graph}
    assert kinds & {"GroupNormalization", "InstanceNormalization"}
    assert all(node.domain in ("", "pkg.onnxscript.torch_lib") for node in program.model.graph)


# ---- autograd's machinery


@each_norm
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_hooks_on_saved_tensors(norm: str, layout: str) -> None:
    """Everything that is kept goes through the hooks, and comes back from them."""
    f = NORMS[norm]
    for shape in ((3, 6, 4), (40, 6, 400)):
        if norm in ("layer", "rms") and shape[0] == 40:
            continue
        x = data(*shape)
        if layout == "channels_last":
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        grads, seen = [], 0

        def pack(t: Tensor) -> tuple[Tensor, torch.Size]:
            nonlocal seen
            seen += 1
            return t.detach().clone(memory_format=torch.contiguous_format), t.size()

        for hooked in (False, False, True, True):
            leaf = x.detach().requires_grad_()
            context = torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed[0])
            if hooked:
                with context:
                    y = f(normkern, leaf)
            else:
                y = f(normkern, leaf)
            y.backward(x)
            grads.append(leaf.grad)
        assert seen > 0
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


@each_norm
def test_save_on_cpu(norm: str) -> None:
    f, x = NORMS[norm], data(3, 6, 4)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    f(normkern, a).pow(3).sum().backward()
    with torch.autograd.graph.save_on_cpu():
        y = f(normkern, b)
    y.pow(3).sum().backward()
    torch.testing.assert_close(a.grad, b.grad)


@each_norm
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(norm: str, reentrant: bool) -> None:
    f = NORMS[norm]
    for n in (3, 3, 700):  # the second is a call that is recognized, the third one too large for that
        x = data(n, 6, 4)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        f(normkern, a).pow(3).sum().backward()
        y = checkpoint(lambda z: f(normkern, z).pow(2) * z, b, use_reentrant=reentrant)
        y.sum().backward()
        c = x.clone().requires_grad_()
        (f(normkern, c).pow(2) * c).sum().backward()
        torch.testing.assert_close(b.grad, c.grad)


@each_norm
def test_deterministic_mode(norm: str) -> None:
    """Nothing refuses, and memory that torch fills in this mode changes nothing."""
    f, x = NORMS[norm], data(3, 6, 4)
    results = []
    for deterministic in (False, True, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            leaf = x.clone().requires_grad_()
            y = f(normkern, leaf)
            y.pow(3).sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        results.append((y, leaf.grad))
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad, results[0][1])  # type: ignore[arg-type]
