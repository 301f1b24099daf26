# The Triton backend beyond the table of cases: when it runs and what it says when it cannot, its operators under
# torch.compile, offsets beyond 32 bits, tuning; and the interpreter that the table runs in.
from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case, smoke
from conftest import Setup
from test_backends import Spy, python
from test_compile import operator_calls, operator_of
from test_norms import check
from torch import Tensor

import normkern
from normkern import backends
from normkern.backends import BACKENDS, triton_plan, triton_tuning
from normkern.backends import triton_launch as backend
from normkern.backends.triton import Triton
from normkern.backends.triton_plan import DEFAULT, TUNINGS

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- when it runs


def test_importing_normkern_does_not_import_triton() -> None:
    done = python("import sys, normkern; print('triton' in sys.modules)")
    assert (done.returncode, done.stdout.strip()) == (0, "False"), done.stderr


def test_without_triton_it_says_how_to_get_it() -> None:
    code = (
        "import importlib.util, torch\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "import normkern\n"
        "normkern.layer_norm(torch.ones(2, 4), (4,))\n"
        "with normkern.use_backend('triton'): normkern.layer_norm(torch.ones(2, 4), (4,))\n"
    )
    done = python(code, TRITON_INTERPRET="1")
    assert "backend 'triton' is asked for but cannot run: Triton is not installed; `pip install triton`" in done.stderr


@needs_triton
def test_a_triton_that_does_not_load_is_a_sentence() -> None:
    code = (
        "import sys, torch, normkern\n"
        "import triton\n"
        "sys.modules['triton.language'] = None\n"
        "with normkern.use_backend('triton'): normkern.layer_norm(torch.ones(2, 4), (4,))\n"
    )
    done = python(code, TRITON_INTERPRET="1")
    assert "cannot run: Triton does not load (" in done.stderr


def test_on_a_cpu_it_says_that_it_needs_a_gpu() -> None:
    code = "import torch, normkern; normkern.layer_norm(torch.ones(2, 4), (4,))"
    done = python(code, NORMKERN_BACKEND="triton")
    assert done.returncode != 0
    assert "backend 'triton' is asked for but cannot run: Triton kernels need a GPU" in done.stderr
    assert "the tensor is on cpu" in done.stderr


@needs_triton
def test_environment_forces_it() -> None:
    code = "import torch, normkern; from normkern.backends import select; print(select(torch.ones(1)).name)"
    done = python(code, NORMKERN_BACKEND="triton", TRITON_INTERPRET="1")
    assert (done.returncode, done.stdout.strip()) == (0, "triton"), done.stderr


@needs_triton
def test_auto_takes_it_where_compiled_kernels_are_missing_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert list(BACKENDS)[:3] == ["native", "triton", "eager"]
    native = Spy("_C_cuda.so is missing")
    native.name = "native"
    monkeypatch.setitem(BACKENDS, "native", native)
    monkeypatch.setattr(backends, "_announced", set())
    x = torch.randn(2, 4, device=DEVICE)
    with caplog.at_level(logging.WARNING, "normkern"):
        assert [backends.select(x).name for _ in range(3)] == ["triton"] * 3
    assert [r.getMessage() for r in caplog.records] == [
        "normkern: running without the native backend: _C_cuda.so is missing"
    ]


def test_devices_of_others_are_refused() -> None:
    assert "the tensor is on meta" in str(Triton().why_not(torch.empty(1, device="meta")))


# ---- torch.compile


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck(layout: str, dtype: torch.dtype) -> None:
    """Schema, autograd registration, fake tensors, and tracing with symbolic sizes."""
    for name, arguments in operator_calls(layout, dtype).items():
        operator = operator_of(torch.ops.normkern_triton, name)
        moved = [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]
        done = torch.library.opcheck(operator, tuple(moved))
        assert set(done.values()) == {"SUCCESS"}, (name, done)


@needs_triton
def test_compiled_without_a_graph_break() -> None:
    def run(x: Tensor, weight: Tensor) -> Tensor:
        return normkern.group_norm(x, 2, weight, residual=x + 1, act="silu")

    torch._dynamo.reset()
    results = []
    for function in (torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager"), run):
        for n in (2, 3):
            generator = torch.Generator().manual_seed(n)
            x = torch.randn(n, 6, 5, generator=generator).to(DEVICE).requires_grad_()
            weight = torch.linspace(0.5, 2, 6, device=DEVICE).requires_grad_()
            with normkern.use_backend("triton"):
                y = function(x, weight)
            y.square().sum().backward()
            results.append((y, x.grad, weight.grad))
    torch._dynamo.reset()
    for mine, theirs in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- kernels


@needs_triton
@pytest.mark.parametrize("name", ["triton", "triton-split"])
def test_offsets_of_64_bits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the tensor were too large for 32-bit offsets."""
    monkeypatch.setattr(backend, "WIDE_FROM", 0)
    with normkern.use_backend(name):
        for case in smoke():
            check(case, Setup(name, DEVICE))


# Sums that need every step, part and tile of a program.
SPLIT = [
    Case("layer", (3, 5000), params="wb"),
    Case("rms", (300, 40), dtype="bfloat16", params="w"),
    Case("group", (2, 4, 40, 41), groups=2, act="silu", residual="like"),
    Case("group", (1, 48, 13, 13), groups=4, layout="channels_last", dtype="float16", act="gelu"),
    Case("batch", (4, 3, 30, 31), dtype="float64"),
    Case("batch", (3, 40, 13, 17), layout="channels_last", act="relu"),
    Case("instance", (2, 3, 50, 33), act="leaky_relu"),
]


@needs_triton
@pytest.mark.parametrize("tuning", TUNINGS[1:], ids=lambda t: f"{t.forward}-{t.reduce}-{t.waves}-{t.column_warps}")
def test_every_tuning_is_right(tuning: triton_plan.Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_tuning, "choose", lambda *_: tuning)
    for name, cases in (("triton", smoke()[::3]), ("triton-split", SPLIT[::3])):
        with normkern.use_backend(name):
            for case in cases:
                check(case, Setup(name, DEVICE))


@needs_triton
@pytest.mark.parametrize("case", SPLIT, ids=str)
@pytest.mark.parametrize("processors", [1, 24])
def test_any_number_of_processors(case: Case, processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs with many steps each, and many partial results."""
    monkeypatch.setattr(backend, "chip_of", lambda device: triton_plan.Chip(processors))
    for name in ("triton", "triton-split"):
        with normkern.use_backend(name):
            check(case, Setup(name, DEVICE))


# ---- tuning


@needs_triton
def test_tuning_measures_once_and_remembers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMKERN_TRITON_AUTOTUNE", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton_tuning, "_known", {})
    monkeypatch.setattr(triton_tuning, "_read", set())
    timed: list[triton_plan.Tuning] = []

    def milliseconds(run: Any, tuning: triton_plan.Tuning, x: Tensor) -> float:
        run(tuning)
        timed.append(tuning)
        return float(tuning != TUNINGS[2])

    monkeypatch.setattr(triton_tuning, "milliseconds", milliseconds)
    x = torch.randn(6, 40, device=DEVICE)
    with normkern.use_backend("triton"):
        first = normkern.layer_norm(x, (40,))
        assert timed == list(TUNINGS)
        second = normkern.layer_norm(x, (40,))
        normkern.layer_norm(torch.randn(7, 40, device=DEVICE), (40,))  # the same power of two
        assert len(timed) == len(TUNINGS)
        torch.testing.assert_close(first, second)
        # Another process: the file is all it has.
        monkeypatch.setattr(triton_tuning, "_known", {})
        monkeypatch.setattr(triton_tuning, "_read", set())
        normkern.layer_norm(x, (40,))
        assert len(timed) == len(TUNINGS)
        assert list(triton_tuning._known.values()) == [TUNINGS[2]]
        normkern.layer_norm(torch.randn(6, 80, device=DEVICE), (80,))
        assert len(timed) == 2 * len(TUNINGS)
    assert len(json.loads((tmp_path / "normkern_tunings.json").read_text())) == 2


def test_tuning_is_off_by_default_and_survives_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NORMKERN_TRITON_AUTOTUNE", raising=False)

    def never(tuning: triton_plan.Tuning) -> None:
        raise AssertionError("nothing is to be measured")

    p = normkern.problem.layer((6, 40), (40, 1), 1)
    assert p is not None
    assert triton_tuning.choose("forward", p, torch.empty(6, 40), never) == DEFAULT
    for text in ("", "[1, 2]", '{"key": {"no_such_field": 1}}', "\x00"):
        (tmp_path / "file").write_text(text)
        assert triton_tuning.load(tmp_path / "file") == {}


# ---- the interpreter of the tests


@pytest.mark.skipif(
    "triton_interpreter" not in sys.modules, reason="runs on the GPU itself, or Triton is not installed"
)
class TestInterpreter:
    def test_bfloat16_rounds_like_torch(self) -> None:
        from triton_interpreter import to_bfloat16

        bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).int()
        edges = [0.0, -0.0, 3.4e38, -3.4e38, float("inf"), -float("inf"), 1e-40, -1e-45, 1.00390625, 65280.0]
        values = torch.cat([bits.view(torch.float32), torch.tensor(edges)])
        got = torch.from_numpy(to_bfloat16(values.numpy()).view("int16"))
        want = values.to(torch.bfloat16)
        assert torch.equal(got.view(torch.bfloat16).isnan(), want.isnan())
        number = ~want.isnan()
        assert torch.equal(got[number], want.view(torch.int16)[number])

    def prepare(self, var: Tensor, out: Tensor, each: int) -> None:
        """A kernel whose programs read `each` elements of var and write as many of out, up to 8."""
        import triton.language as tl

        kernel = backend.kernels().prepare[(8 // each,)]
        kernel(None, var, None, None, out, groups=8, EPS=0.0, A=tl.float32, G=each)

    def test_accesses_out_of_bounds_are_errors(self) -> None:
        self.prepare(torch.ones(8), torch.empty(8), 8)
        with pytest.raises(Exception, match="out of bounds: load of 1 of 8 elements"):
            self.prepare(torch.ones(7), torch.empty(8), 8)
        with pytest.raises(Exception, match="out of bounds: store of 1 of 8 elements"):
            self.prepare(torch.ones(8), torch.empty(7), 8)

    def test_programs_that_meet_are_errors(self) -> None:
        buffer = torch.ones(12)
        self.prepare(buffer[:8], buffer[:8], 4)  # each program in its own place
        with pytest.raises(Exception, match="race: load of what another program wrote"):
            self.prepare(buffer[:8], buffer[4:], 4)
        with pytest.raises(Exception, match="race: store of what another program read"):
            self.prepare(buffer[4:], buffer[:8], 4)

    def test_an_element_written_twice_is_an_error(self) -> None:
        from triton.runtime.interpreter import interpreter_builder
        from triton_interpreter import Memory

        interpreter_builder.set_grid_dim(2, 1, 1)
        target = torch.empty(4)
        memory = Memory([target])
        places = target.data_ptr() + 4 * torch.tensor([0, 1, 1, 2]).numpy()
        interpreter_builder.set_grid_idx(0, 0, 0)
        with pytest.raises(RuntimeError, match="one store writes an element twice"):
            memory.check("store", places, True)
        memory.check("store", places[:2], True)
        interpreter_builder.set_grid_idx(1, 0, 0)
        with pytest.raises(RuntimeError, match="race: store of what another program wrote"):
            memory.check("store", places[1:2], True)
