"""backend.py: the CUDA kernels, compiled as C++ and run on the CPU, as a normkern backend.

`EmulatedBackend` has the Backend protocol of normkern.backends, so whatever the tests ask of a backend they ask of the
kernel sources. Mode "checked" holds every memory access against CUDA's rules, "plain" is the fastest, "asan" needs
AddressSanitizer loaded first (asan_environment).
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from normkern.problem import MASKED, NEED_DBIAS, NEED_DRESIDUAL, NEED_DWEIGHT, NEED_DX, Moments, Problem

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
MODES = ("plain", "checked", "asan")
STRATEGIES = ("automatic", "warp", "block", "cluster", "subgrid", "split")
WALKS = ("rows", "columns")
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}

Fields = list[tuple[str, Any]]

# ---- mirrors of csrc/core/{problem,arguments,plan}.h


class Struct(ctypes.Structure):
    """Prints and compares by its fields."""

    def values(self) -> dict[str, Any]:
        pairs = [(field[0], getattr(self, field[0])) for field in self._fields_]
        return {name: value.values() if isinstance(value, Struct) else value for name, value in pairs}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.values().items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.values() == other.values()  # type: ignore[attr-defined]

    __hash__ = None  # type: ignore[assignment]


class CDomain(Struct):
    _fields_: ClassVar[Fields] = [(name, ctypes.c_int64) for name in ("batch", "rows", "keep", "cols")]


class CProblem(Struct):
    _fields_: ClassVar[Fields] = [
        ("stats", CDomain),
        ("affine", CDomain),
        ("moments", ctypes.c_int32),
        ("act", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("eps", ctypes.c_double),
    ]


class CVector(Struct):
    """Param and Grad: a pointer and its element type."""

    _fields_: ClassVar[Fields] = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]


class CRunning(Struct):
    _fields_: ClassVar[Fields] = [
        ("mean", CVector),
        ("var", CVector),
        ("keep", ctypes.c_double),
        ("mean_share", ctypes.c_double),
        ("var_share", ctypes.c_double),
    ]

    @classmethod
    def of(cls, mean: Tensor, var: Tensor, count: int, momentum: float) -> CRunning:
        return cls(_vector(mean), _vector(var), 1 - momentum, momentum, momentum * (count / (count - 1)))


class CForwardArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("x", ctypes.c_void_p),
        ("add", ctypes.c_void_p),
        ("weight", CVector),
        ("bias", CVector),
        ("residual", ctypes.c_void_p),
        ("mean", CVector),
        ("var", CVector),
        ("y", ctypes.c_void_p),
        ("total", ctypes.c_void_p),
        ("mean_out", ctypes.c_void_p),
        ("var_out", ctypes.c_void_p),
        ("running", CRunning),
        ("mask_out", ctypes.c_void_p),
    ]


class CBackwardArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("dy", ctypes.c_void_p),
        ("dtotal", ctypes.c_void_p),
        ("x", ctypes.c_void_p),
        ("weight", CVector),
        ("bias", CVector),
        ("residual", ctypes.c_void_p),
        ("mean", CVector),
        ("var", CVector),
        ("dx", ctypes.c_void_p),
        ("dweight", CVector),
        ("dbias", CVector),
        ("dresidual", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
    ]


class CMomentsArgs(Struct):
    _fields_: ClassVar[Fields] = [(name, ctypes.c_void_p) for name in ("x", "mean_out", "var_out")]


class CRunningArgs(Struct):
    _fields_: ClassVar[Fields] = [
        ("running", CRunning),
        ("batch_mean", ctypes.c_void_p),
        ("batch_var", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("channels", ctypes.c_int64),
    ]


class Gpu(Struct):
    _fields_: ClassVar[Fields] = [
        ("sms", ctypes.c_int),
        ("smem_per_block", ctypes.c_int64),
        ("smem_per_sm", ctypes.c_int64),
        ("l2_bytes", ctypes.c_int64),
        ("max_cluster", ctypes.c_int),
    ]


class CRequest(Struct):
    _fields_: ClassVar[Fields] = [
        ("pass_", ctypes.c_int32),
        ("aligned", ctypes.c_bool),
        ("affine_grads", ctypes.c_bool),
        ("strategy", ctypes.c_int32),
        ("add", ctypes.c_bool),
        ("mask", ctypes.c_bool),
    ]


class Launch(Struct):
    _fields_: ClassVar[Fields] = [("blocks", ctypes.c_int64), ("threads", ctypes.c_int), ("shared", ctypes.c_int64)]


class Reduce(Struct):
    _fields_: ClassVar[Fields] = [
        ("walk", ctypes.c_int32),
        ("parts", ctypes.c_int64),
        ("launch", Launch),
        ("workspace_bytes", ctypes.c_int64),
    ]


class Team(Struct):
    _fields_: ClassVar[Fields] = [
        ("walk", ctypes.c_int32),
        ("weights", ctypes.c_int32),
        ("weight_sums", ctypes.c_bool),
        ("blocks", ctypes.c_int),
        ("by_lines", ctypes.c_bool),
        ("cluster", ctypes.c_bool),
        ("width", ctypes.c_int),
        ("lanes", ctypes.c_int),
        ("seats", ctypes.c_int),
        ("stages", ctypes.c_int),
        ("columns", ctypes.c_int64),
        ("teams", ctypes.c_int64),
    ]


class Plan(Struct):
    _fields_: ClassVar[Fields] = [
        ("strategy", ctypes.c_int32),
        ("vec", ctypes.c_int),
        ("team", Team),
        ("fused", Launch),
        ("map", Launch),
        ("reduce", Reduce),
        ("affine", Reduce),
        ("workspace_bytes", ctypes.c_int64),
        ("bytes_read", ctypes.c_int64),
        ("bytes_written", ctypes.c_int64),
    ]

    @property
    def strategy_name(self) -> str:
        return STRATEGIES[self.strategy]


# In the order of nk_sizes().
MIRRORS = [
    CDomain, CProblem, CVector, CVector, CForwardArgs, CBackwardArgs, CMomentsArgs, Gpu, CRequest, Launch, Reduce, Team,
    Plan, CRunning, CRunningArgs,
]  # fmt: skip

H200 = Gpu(132, 232448, 233472, 60 << 20, 16)
# Few multiprocessors with little shared memory: blocks must go round their loops, whose later turns are where the
# hazards are. A block may still have as much as on a real chip.
TINY = Gpu(1, 232448, 16384, 0, 4)
SMALL = Gpu(5, 232448, 49152, 0, 8)
# Enough of them for sums that are merged in two rounds.
MEDIUM = Gpu(20, 232448, 233472, 0, 16)
CHIPS = (MEDIUM, TINY, SMALL, TINY)

# ---- the libraries


def build_directory() -> Path:
    return Path(os.environ.get("NORMKERN_EMULATOR_DIR") or ROOT / "build" / "emulator")


def run_tool(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"emulator: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-4000:]}")


@functools.cache
def built(target: str) -> Path:
    """The file of a CMake target, brought up to date first unless NORMKERN_EMULATOR_DIR names a build that is done."""
    directory = build_directory()
    if not os.environ.get("NORMKERN_EMULATOR_DIR"):
        compiler = os.environ.get("CXX", "g++")
        for tool, remedy in ((compiler, "install g++ or set CXX"), ("cmake", "pip install cmake")):
            if shutil.which(tool) is None:
                raise RuntimeError(f"emulator: {tool} was not found, to compile the CUDA sources for the CPU; {remedy}")
        directory.mkdir(parents=True, exist_ok=True)
        with open(directory / "lock", "w") as lock:  # pytest-xdist: one worker builds, the others wait
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (directory / "CMakeCache.txt").exists():
                generator = ["-G", "Ninja"] if shutil.which("ninja") else []
                run_tool("cmake", "-S", str(HERE), "-B", str(directory), f"-DCMAKE_CXX_COMPILER={compiler}", *generator)
            jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
            run_tool("cmake", "--build", str(directory), "--target", target, "--parallel", jobs)
    path = directory / (f"{target}.so" if target.startswith("normkern") else target)
    if not path.exists():
        raise RuntimeError(f"emulator: {path} is missing; unset NORMKERN_EMULATOR_DIR to have it built")
    return path


def build(mode: str) -> None:
    """Everything that the tests want of a mode: the emulator's own tests and, but for asan, the kernels."""
    built(f"emulator_self_test_{mode}")
    if mode != "asan":
        built(f"normkern_emulated_{mode}")


def asan_environment() -> dict[str, str]:
    """What a process needs that loads the asan library into Python."""
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    return {**os.environ, "LD_PRELOAD": library.stdout.strip(), "ASAN_OPTIONS": "detect_leaks=0"}


@functools.cache
def load(mode: str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(built(f"normkern_emulated_{mode}")))
    library.nk_last_error.restype = ctypes.c_char_p
    for name in ("nk_forward", "nk_backward", "nk_moments"):
        getattr(library, name).argtypes = [ctypes.c_void_p] * 5
    library.nk_update_running.argtypes = [ctypes.c_void_p]
    library.nk_occupy.argtypes = [ctypes.c_int64, ctypes.c_int]
    library.nk_options.argtypes = [ctypes.c_uint64, ctypes.c_int, ctypes.c_int, ctypes.c_int]
    sizes = (ctypes.c_int64 * 64)()
    count = library.nk_sizes(sizes, 64)
    mirrored = [ctypes.sizeof(mirror) for mirror in MIRRORS]
    if list(sizes[:count]) != mirrored:
        raise RuntimeError(f"emulator: structs of csrc/core changed: {sizes[:count]} bytes; mirrors have {mirrored}")
    return library


# ---- the backend


def _poisoned(x: Tensor) -> Tensor:
    """Like x, with its strides, and NaN until a kernel writes it."""
    return torch.empty_like(x).fill_(float("nan"))


def _at_a_boundary(x: Tensor) -> Tensor:
    """As the binding has it: only whole accesses write masks."""
    return x if x.data_ptr() % 16 == 0 else torch.empty_like(x).copy_(x)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None or tensor.numel() == 0 else tensor.data_ptr()


def _vector(tensor: Tensor | None) -> CVector:
    return CVector() if tensor is None else CVector(_pointer(tensor), DTYPES[tensor.dtype])


class EmulatedBackend:
    """`gpu` is the chip to plan for and `seed` the schedule; None: one of several of each, by the problem, so that a
    table of cases meets them all and a case always meets the same. `plan` is that of the last call."""

    def __init__(
        self,
        mode: str = "checked",
        gpu: Gpu | None = None,
        strategy: str = "automatic",
        seed: int | None = None,
        preempt_ppm: int = 0,
    ) -> None:
        if mode not in MODES or strategy not in STRATEGIES:
            raise ValueError(
                f"EmulatedBackend: mode is one of {MODES}, strategy of {STRATEGIES}; got {mode}, {strategy}"
            )
        self.name = f"emulated-{strategy}"
        self.mode, self.gpu, self.strategy, self.seed, self.preempt_ppm = mode, gpu, strategy, seed, preempt_ppm
        self.plan = Plan()
        self.library = load(mode)

    def why_not(self, x: Tensor) -> str | None:
        if x.device.type != "cpu":
            return f"emulated kernels run on CPU tensors; x is on {x.device}"
        return None if x.dtype in DTYPES else f"there are no kernels for {x.dtype}"

    def forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._forward(problem, x, None, None, weight, bias, residual, mean, var, save)

    def batch_forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        running = CRunning.of(running_mean, running_var, problem.stats.count, momentum)
        got = self._forward(problem, x, None, None, weight, bias, residual, None, None, True, running)
        torch.autograd.graph.increment_version((running_mean, running_var))
        return got

    def masks(self, x: Tensor) -> bool:
        return True

    def masked_forward(
        self,
        problem: Problem,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        momentum: float | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, residual = _at_a_boundary(x), _at_a_boundary(residual)
        mask = torch.full((-(-x.numel() * x.element_size() // MASKED),), 0xAA, dtype=torch.uint8)
        running = None
        if momentum is not None and mean is not None and var is not None:
            running = CRunning.of(mean, var, problem.stats.count, momentum)
            torch.autograd.graph.increment_version((mean, var))
            mean = var = None
        got = self._forward(problem, x, None, None, weight, bias, residual, mean, var, True, running, mask)
        return *got, mask

    def add_forward(
        self, problem: Problem, x: Tensor, add: Tensor, weight: Tensor | None, bias: Tensor | None, save: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        total = _poisoned(x)
        y, mean, var = self._forward(problem, x, add, total, weight, bias, None, None, None, save)
        return y, total, mean, var

    def _forward(
        self,
        problem: Problem,
        x: Tensor,
        add: Tensor | None,
        total: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        save: bool,
        running: CRunning | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y = _poisoned(x)
        mean_out, var_out = self._moment_outputs(problem, save)
        args = CForwardArgs(
            _pointer(x), _pointer(add), _vector(weight), _vector(bias), _pointer(residual), _vector(mean), _vector(var),
            _pointer(y), _pointer(total), _pointer(mean_out), _pointer(var_out), running or CRunning(),
            _pointer(mask),
        )  # fmt: skip
        buffers = [x, add, residual, y, total]
        self._run("nk_forward", problem, x, args, buffers, add=add is not None, mask=mask is not None)
        return y, mean_out, var_out

    def backward(
        self,
        problem: Problem,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self._backward(problem, dy, None, x, weight, bias, residual, mean, var, needs)

    def add_backward(
        self,
        problem: Problem,
        dy: Tensor,
        dtotal: Tensor,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return self._backward(problem, dy, dtotal, x, weight, bias, None, mean, var, needs)[:3]

    def _backward(
        self,
        problem: Problem,
        dy: Tensor,
        dtotal: Tensor | None,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mean: Tensor | None,
        var: Tensor | None,
        needs: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        def gradient(like: Tensor | None, bit: int) -> Tensor:
            return _poisoned(x if like is None else like) if needs & bit else x.new_empty(0)

        def param_gradient(like: Tensor | None, bit: int) -> Tensor:
            groups = problem.affine.groups if needs & bit else 0
            return (x if like is None else like).new_full((groups,), float("nan"))

        mask = None
        if residual is not None and residual.dtype is torch.uint8:
            residual, mask = None, residual
        dx, dresidual = gradient(x, NEED_DX), gradient(residual, NEED_DRESIDUAL)
        dweight, dbias = param_gradient(weight, NEED_DWEIGHT), param_gradient(bias, NEED_DBIAS)
        args = CBackwardArgs(
            _pointer(dy), _pointer(dtotal), _pointer(x), _vector(weight), _vector(bias), _pointer(residual),
            _vector(mean), _vector(var), _pointer(dx), _vector(dweight), _vector(dbias), _pointer(dresidual),
            _pointer(mask),
        )  # fmt: skip
        buffers = [dy, dtotal, x, residual, dx, dresidual]
        affine_grads = bool(needs & (NEED_DWEIGHT | NEED_DBIAS))
        self._run("nk_backward", problem, x, args, buffers, affine_grads, dtotal is not None, mask is not None)
        return dx, dweight, dbias, dresidual

    def moments(self, problem: Problem, x: Tensor) -> tuple[Tensor, Tensor]:
        mean_out, var_out = self._moment_outputs(problem, True)
        args = CMomentsArgs(_pointer(x), _pointer(mean_out), _pointer(var_out))
        self._run("nk_moments", problem, x, args, [x])
        return mean_out, var_out

    def update_running(
        self, running_mean: Tensor, running_var: Tensor, mean: Tensor, var: Tensor, count: int, momentum: float
    ) -> None:
        channels = running_mean.numel()
        running = CRunning.of(running_mean, running_var, count, momentum)
        args = CRunningArgs(running, _pointer(mean), _pointer(var), mean.numel() // channels, channels)
        if self.library.nk_update_running(ctypes.byref(args)):
            raise RuntimeError(self.library.nk_last_error().decode())

    def _moment_outputs(self, problem: Problem, save: bool) -> tuple[Tensor, Tensor]:
        groups = problem.stats.groups if save else 0
        sizes = (
            groups if problem.moments == Moments.mean_var else 0,
            groups if problem.moments != Moments.given else 0,
        )
        mean, var = (torch.full((size,), float("nan"), dtype=torch.float64) for size in sizes)
        return mean, var

    def _run(
        self,
        function: str,
        problem: Problem,
        x: Tensor,
        args: Struct,
        buffers: list[Tensor | None],
        affine_grads: bool = False,
        add: bool = False,
        mask: bool = False,
    ) -> None:
        self._check_sizes(problem, x, buffers)
        draw = zlib.crc32(repr((problem, x.dtype, function)).encode())
        seed = draw % 8 if self.seed is None else self.seed
        gpu = CHIPS[draw >> 8 & 3] if self.gpu is None else self.gpu
        aligned = all((_pointer(tensor) or 0) % 16 == 0 for tensor in buffers)
        c_problem = CProblem(
            CDomain(*problem.stats.sizes), CDomain(*problem.affine.sizes),
            int(problem.moments), int(problem.act), DTYPES[x.dtype], problem.eps,
        )  # fmt: skip
        request = CRequest(0, aligned, affine_grads, STRATEGIES.index(self.strategy), add, mask)
        self.plan = Plan()
        self.library.nk_options(seed, 4, 25, self.preempt_ppm)
        structs = [ctypes.byref(struct) for struct in (c_problem, request, gpu, args, self.plan)]
        if getattr(self.library, function)(*structs):
            text = self.library.nk_last_error().decode()
            raise RuntimeError(f"{text}\n(schedule {seed}, {gpu}, {self.plan}, {c_problem})")

    def _check_sizes(self, problem: Problem, x: Tensor, buffers: list[Tensor | None]) -> None:
        """What the binding checks too: the kernels, and the checker, believe the problem."""
        sizes = {problem.stats.numel, problem.affine.numel} | {
            b.numel() for b in buffers if b is not None and b.numel()
        }
        if len(sizes) != 1:
            raise RuntimeError(f"emulated kernels: sizes of the domains and the buffers differ: {sorted(sizes)}")
        if any(b.dtype != x.dtype for b in buffers if b is not None and b.numel()):
            raise RuntimeError("emulated kernels: the buffers differ in dtype")
