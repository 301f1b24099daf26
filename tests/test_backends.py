# Which backend runs a call: priority, switching, the environment, falling back, and explain's account of it.
from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import normkern
from normkern import backends
from normkern.backends import BACKENDS, select, use_backend
from normkern.backends.eager import Eager
from normkern.explain import CHIPS, _host
from normkern.problem import Act, Domain, Moments, Problem

PACKAGE = Path(normkern.__file__).parent
X = torch.arange(48.0).view(2, 6, 4)


class Spy(Eager):
    """Counts its calls; computes as eager does."""

    name = "spy"

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason
        self.calls: list[str] = []

    def why_not(self, x: Tensor) -> str | None:
        return self.reason

    def forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("forward")
        return super().forward(*args)

    def backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.calls.append("backward")
        return super().backward(*args)

    def moments(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls.append("moments")
        return super().moments(*args)

    def add_forward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        self.calls.append("add_forward")
        return Eager.add_forward(Eager(), *args)

    def add_backward(self, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
        self.calls.append("add_backward")
        return Eager.add_backward(Eager(), *args)


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> Spy:
    found = Spy()
    monkeypatch.setitem(BACKENDS, "spy", found)
    return found


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    # A new process is a user's: without the interpreter that conftest.py may have turned on.
    environment = {**os.environ, "TRITON_INTERPRET": "", "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=environment,
        cwd=environment["PYTHONPATH"],
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_every_program_goes_to_the_forced_backend(spy: Spy) -> None:
    x = X.clone().requires_grad_()
    with use_backend("spy"):
        y = normkern.group_norm(x, 2)
        normkern.moments(x, 1)
    y.sum().backward()  # outside the block: backward stays where forward ran
    assert spy.calls == ["forward", "moments", "backward"]
    normkern.group_norm(x, 2)
    assert len(spy.calls) == 3


def test_only_what_is_needed_is_asked_for(spy: Spy) -> None:
    seen: list[int] = []
    spy.backward = lambda *args: (seen.append(args[-1]), Eager.backward(spy, *args))[1]  # type: ignore[method-assign]
    weight, bias = torch.ones(6), torch.ones(6)
    with use_backend("spy"):
        for x_grad, w_grad, b_grad in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)):
            tensors = [
                t.clone().requires_grad_(bool(want))
                for t, want in zip((X, weight, bias), (x_grad, w_grad, b_grad), strict=True)
            ]
            normkern.group_norm(tensors[0], 2, tensors[1], tensors[2]).sum().backward()
            assert [t.grad is not None for t in tensors] == [bool(x_grad), bool(w_grad), bool(b_grad)]
        residual = X.clone().requires_grad_()
        normkern.group_norm(X, 2, residual=residual).sum().backward()
        assert torch.equal(residual.grad, torch.ones_like(X))  # type: ignore[arg-type]
    # The last call needs no kernel at all: without an activation the residual's gradient is dy.
    assert seen == [1, 2, 4, 7]


def test_blocks_nest_and_unwind(spy: Spy) -> None:
    with use_backend("eager"):
        assert select(X).name == "eager"
        with use_backend("spy"):
            assert select(X).name == "spy"
            with use_backend("eager"):
                assert select(X).name == "eager"
            assert select(X).name == "spy"
            # What compiled code looks at: the innermost block is the last.
            assert [b.name for b in backends._forced_anywhere] == ["eager", "spy"]
        assert select(X).name == "eager"
        with pytest.raises(ZeroDivisionError), use_backend("spy"):
            _ = 1 // 0
        assert select(X).name == "eager"


def test_a_block_is_its_threads_own(spy: Spy) -> None:
    names: list[str] = []
    entered, leave = threading.Event(), threading.Event()

    def elsewhere() -> None:
        with use_backend("eager"):
            entered.set()
            leave.wait(10)
            names.append(select(X).name)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    assert entered.wait(10)
    with use_backend("spy"):
        leave.set()
        thread.join(10)
        names.append(select(X).name)
    assert names == ["eager", "spy"]
    assert not backends._forced_anywhere


def test_unknown_names_list_what_exists() -> None:
    with pytest.raises(ValueError, match=r"use_backend: name must be one of native, triton, eager.*; got 'cudnn'"):
        use_backend("cudnn")
    done = python("import torch, normkern; normkern.layer_norm(torch.ones(2, 4), (4,))", NORMKERN_BACKEND="cudnn")
    assert done.returncode != 0
    assert "ValueError: NORMKERN_BACKEND: name must be one of native, triton, eager; got 'cudnn'" in done.stderr


def test_a_forced_backend_that_cannot_run_says_why(spy: Spy) -> None:
    spy.reason = "the moon is in the wrong house"
    with use_backend("spy"), pytest.raises(RuntimeError, match="backend 'spy' is asked for but cannot run: the moon"):
        normkern.layer_norm(X, (4,))


def test_auto_takes_the_first_that_can_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = Spy("it is not built; rebuild it"), Spy()
    first.name, second.name = "first", "second"
    monkeypatch.setattr(backends, "BACKENDS", {"first": first, "second": second})
    monkeypatch.setattr(backends, "_announced", set())
    with caplog.at_level(logging.WARNING, "normkern"):
        for _ in range(3):
            normkern.layer_norm(X, (4,))
    assert second.calls == ["forward"] * 3
    assert first.calls == []
    assert [r.getMessage() for r in caplog.records] == [
        "normkern: running without the first backend: it is not built; rebuild it"
    ]


def test_environment_forces_a_backend() -> None:
    done = python(
        "import torch, normkern; from normkern.backends import select; print(select(torch.ones(1)).name)",
        NORMKERN_BACKEND="eager",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "eager"), done.stderr


def test_without_compiled_libraries_eager_runs_and_says_so_once(tmp_path: Path) -> None:
    """The package as a machine without a compiler has it: the Python files alone."""
    shutil.copytree(PACKAGE, tmp_path / "normkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = (
        "import sys; sys.modules['normkern._host'] = None\n"  # an editable install would find it all the same
        "import torch, normkern, pathlib\n"
        "x = torch.randn(2, 6, 4, dtype=torch.float64)\n"
        "y = [normkern.group_norm(x, 2) for _ in range(2)][-1]\n"
        "torch.testing.assert_close(y, torch.nn.functional.group_norm(x, 2))\n"
        "print(pathlib.Path(normkern.__file__).parent.parent)\n"
        "print(normkern.explain('group_norm', x, 2))\n"
        "with normkern.use_backend('native'): normkern.group_norm(x, 2)\n"
    )
    done = python(code, PYTHONPATH=str(tmp_path), NORMKERN_BACKEND="")
    lines = done.stdout.splitlines()
    assert lines[0] == str(tmp_path)
    assert (
        done.stderr.count("running without the native backend: no compiled kernels found (_C_cpu.so is missing)") == 1
    )
    assert "rebuild with" in done.stderr
    assert any(line.split() == ["backend", "eager"] for line in lines)
    assert "the planner is not built" in done.stdout
    # Forced, it is an error with the same sentence.
    assert done.returncode != 0
    assert "RuntimeError: normkern: backend 'native' is asked for but cannot run: no compiled kernels" in done.stderr


def test_a_library_that_does_not_load_is_a_sentence(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "normkern", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "normkern" / "_C_cpu.so").write_bytes(b"not a library")
    done = python("import torch, normkern; normkern.layer_norm(torch.ones(2, 4), (4,))", PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "running without the native backend: _C_cpu.so does not load" in done.stderr


def test_explain_names_backend_problem_and_reasons(spy: Spy) -> None:
    x = torch.randn(2, 64, 8, 8).to(memory_format=torch.channels_last)
    with use_backend("spy"):
        found = normkern.explain("group_norm", x, 32, act="silu")
    assert found.backend == "spy"
    assert found.why_not == {b.name: "spy is asked for" for b in BACKENDS.values() if b.name != "spy"} | {
        b.name: why for b in BACKENDS.values() if (why := b.why_not(x)) is not None
    }
    assert found.problem == Problem(Domain(2, 64, 32, 2), Domain(1, 128, 64, 1), Moments.mean_var, Act.silu, 1e-5)
    assert not found.copied
    text = str(found)
    assert "group_norm on float32 (2, 64, 8, 8), strides (4096, 1, 512, 64), cpu" in text
    assert "batch 2, rows 64, keep 32, cols 2: 64 groups of 128; mean and variance" in text
    assert "silu" in text
    assert spy.calls == []


def test_explain_changes_nothing_and_says_when_it_copies() -> None:
    mean, var = torch.zeros(6), torch.ones(6)
    found = normkern.explain("batch_norm", X[:, :, ::2], mean, var, training=True)
    assert found.copied
    assert "copied once" in str(found)
    assert torch.equal(mean, torch.zeros(6))
    assert torch.equal(var, torch.ones(6))
    assert "no elements" in str(normkern.explain("layer_norm", X[:0], (4,)))


def test_explain_checks_like_the_call() -> None:
    with pytest.raises(RuntimeError, match="group_norm: num_groups must divide"):
        normkern.explain("group_norm", X, 5)
    with pytest.raises(ValueError, match=r"explain: op must be one of batch_norm, .*; got 'conv'"):
        normkern.explain("conv", X)
    with pytest.raises(ValueError, match=r"explain: gpu must be one of H200, .*; got 'GTX'"):
        normkern.explain("group_norm", X, 2, gpu="GTX")


@pytest.mark.skipif(_host is None, reason="normkern._host is not built")
@pytest.mark.parametrize("gpu", sorted(CHIPS))
def test_explain_plans_for_every_gpu(gpu: str) -> None:
    x = torch.randn(2, 64, 8, 8)
    found = normkern.explain("group_norm", x, 32, torch.ones(64), gpu=gpu)
    assert [p.name for p in found.passes] == ["forward", "backward"]
    assert [p.name for p in normkern.explain("moments", x, 1, gpu=gpu).passes] == ["moments"]
    for planned in found.passes:
        least = x.nbytes * (1 if planned.name == "forward" else 2)
        assert planned.plan.bytes_read >= least
        assert planned.plan.bytes_written >= x.nbytes
        assert f"strategy {planned.plan.strategy.name}" in str(found)
    assert f"would run like this on an {gpu}" in str(found)
    assert "at least" in str(found)
    # Weights have gradients of their own only in the backward pass of a call that has weights.
    without = normkern.explain("group_norm", x, 32, gpu=gpu)
    assert without.passes[1].plan != found.passes[1].plan
    assert without.passes[0].plan == found.passes[0].plan


def test_a_sum_and_its_norm_are_one_call(spy: Spy) -> None:
    """Where both lie alike in memory; else the sum is torch's."""
    x, residual = (torch.randn(5, 8, requires_grad=True) for _ in range(2))
    with normkern.use_backend("spy"):
        y, total = normkern.add_layer_norm(x, residual, (8,))
        (y + total).sum().backward()
        assert spy.calls == ["add_forward", "add_backward"]
        spy.calls.clear()
        normkern.add_rms_norm(x, residual.detach().t().contiguous().t(), (8,))
        assert spy.calls == ["forward"]


@pytest.mark.skipif(_host is None, reason="normkern._host is not built")
def test_explain_tells_of_a_mask() -> None:
    x = torch.randn(4, 16, 8, 8).bfloat16()
    for residual, act, masked in ((x, "relu", True), (x, "silu", False), (None, "relu", False)):
        found = normkern.explain("batch_norm", x, None, None, training=True, residual=residual, act=act)
        plain = normkern.explain("batch_norm", x, None, None, training=True, act=act)
        assert ("leaves a bit for each element in place of the residual" in str(found)) == masked
        assert ("reads a bit for each element in place of the residual" in str(found)) == masked
        forward, backward = (a.plan for a in found.passes)
        assert forward.bytes_written - plain.passes[0].plan.bytes_written == masked * x.numel() // 8
        assert backward.bytes_read - plain.passes[1].plan.bytes_read == masked * x.numel() // 8


def test_explain_counts_the_streams_of_a_sum() -> None:
    x, weight = torch.randn(64, 768), torch.ones(768)
    alone, of_sum = (
        normkern.explain("rms_norm", x, (768,), weight),
        normkern.explain("add_rms_norm", x, x, (768,), weight),
    )
    for a, b, written in zip(alone.passes, of_sum.passes, (1, 0), strict=True):
        assert b.plan.bytes_read - a.plan.bytes_read == x.nbytes
        assert b.plan.bytes_written - a.plan.bytes_written == written * x.nbytes
