# Which backends there are on this machine, and which cases each of them runs. A test that asks for `backend` runs on
# all of them; one that also asks for `case` runs the table: a backend listed in SETUPS inherits every test.
from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import CASES, Case, small, subset
from ranks import Ranks

# Without a GPU the Triton kernels run in its interpreter, which must be turned on before anything imports Triton.
if not torch.cuda.is_available() and importlib.util.find_spec("triton") is not None:
    import triton_interpreter  # noqa: F401

import normkern
from normkern.backends import BACKENDS
from normkern.backends.triton import Triton

STRATEGIES = ("automatic", "warp", "block", "cluster", "subgrid", "split")
# Emulated kernels run a fiber per CUDA thread under an access checker: so many cases by default, the rest with --slow.
EMULATED_CASES = {"automatic": 250, "warp": 80, "block": 100, "cluster": 100, "subgrid": 100, "split": 100}
# Likewise Triton's interpreter, whose time goes by programs: kernels on small tensors.
TRITON_CASES = {"triton": 200, "triton-split": 120}
TRITON_LIMIT = 6_000
# The largest share of its error bound that each backend used, for --bounds.
USED: dict[tuple[str, str, str], float] = defaultdict(float)


@dataclass(frozen=True)
class Setup:
    """A backend as the tests use it: its name in BACKENDS, where tensors live, and why it is missing, if it is."""

    name: str
    device: str = "cpu"
    missing: str | None = None

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name}-{self.device}"

    @property
    def emulated(self) -> bool:
        return self.name.startswith("emulated")

    @property
    def simulated(self) -> bool:
        """What is meant for a GPU runs on the CPU, some thousand times slower."""
        return self.emulated or self.interpreted

    @property
    def interpreted(self) -> bool:
        return self.name.startswith("triton") and self.device == "cpu"

    def cases(self) -> tuple[list[Case], list[Case]]:
        """Cases of the table that always run, and those for --slow."""
        if self.interpreted:
            always = subset(small(TRITON_LIMIT), TRITON_CASES[self.name], self.name)
            return always, [c for c in small() if c not in always]
        if not self.emulated:
            return CASES, []
        strategy = self.name.removeprefix("emulated-")
        always = subset(small(), EMULATED_CASES[strategy], strategy)
        return always, [c for c in small() if c not in always]


def emulated_backend(strategy: str, **options: Any) -> Any:
    """The CUDA sources compiled for the CPU, with every memory access checked."""
    from emulator.backend import EmulatedBackend

    return EmulatedBackend(mode="checked", strategy=strategy, **options)


def or_skip(make: Callable[..., Any], **options: Any) -> Any:
    """What `make` compiles for the emulator; the test is skipped where there is no compiler for it."""
    try:
        return make(**options)
    except RuntimeError as error:
        if "not found" not in str(error):
            raise  # kernels that do not compile are no reason to skip
        return pytest.skip(str(error))


def setups() -> Iterator[Setup]:
    yield Setup("eager")
    yield Setup("native", missing=BACKENDS["native"].why_not(torch.empty(1)) if "native" in BACKENDS else "not there")
    for strategy in STRATEGIES:
        name, missing = f"emulated-{strategy}", None
        try:
            BACKENDS[name] = emulated_backend(strategy)
        except RuntimeError as error:
            if "not found" not in str(error):
                raise  # kernels that do not compile are no reason to skip
            missing = str(error)
        yield Setup(name, missing=missing)
    BACKENDS["triton-split"] = Triton(split=True)
    if torch.cuda.is_available():
        yield Setup("native", "cuda", missing=BACKENDS["native"].why_not(torch.empty(1, device="cuda")))
        yield Setup("eager", "cuda")
    for name in sorted(set(BACKENDS) - {"eager", "native"}):
        if not name.startswith("emulated"):
            device = "cuda" if torch.cuda.is_available() else "cpu"
            yield Setup(name, device, BACKENDS[name].why_not(torch.empty(1, device=device)))


SETUPS = list(setups())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow; so does any -m")
    parser.addoption("--schedules", action="store_true", help="also every emulated strategy on 34 random schedules")
    parser.addoption("--large", action="store_true", help="also the tests that need 16 GiB of memory")
    parser.addoption(
        "--bounds", action="store_true", help="print how much of its error bound every backend used (not with -n)"
    )


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("NORMKERN_REQUIRE_NATIVE") == "1":
        absent = [f"{s}: {s.missing}" for s in SETUPS if s.missing]
        if absent:
            raise pytest.UsageError("NORMKERN_REQUIRE_NATIVE=1, but these backends cannot run:\n" + "\n".join(absent))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" not in metafunc.fixturenames:
        return
    rows: list[Any] = []
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    with_case = "case" in metafunc.fixturenames and "case" not in own
    for setup in SETUPS:
        if setup.missing:  # test_norms.test_backend_is_there shows it, once
            continue
        if with_case:
            for cases, marks in zip(setup.cases(), ((), pytest.mark.slow), strict=True):
                rows += [pytest.param(setup, c, id=f"{setup}-{c}", marks=marks) for c in cases]
        else:
            rows.append(pytest.param(setup, id=str(setup)))
    metafunc.parametrize("backend,case" if with_case else "backend", rows, indirect=["backend"])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    off = {name for name in ("slow", "large", "schedules") if not config.getoption(f"--{name}")}
    if config.getoption("-m"):
        off.discard("slow")
    unwanted = [item for item in items if any(item.get_closest_marker(name) for name in off)]
    config.hook.pytest_deselected(items=unwanted)
    items[:] = [item for item in items if not any(item.get_closest_marker(name) for name in off)]


@pytest.fixture
def backend(request: pytest.FixtureRequest) -> Iterator[Setup]:
    """The backend that every call in the test goes to."""
    setup: Setup = request.param
    with normkern.use_backend(setup.name):
        yield setup


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--bounds"):
        return
    terminalreporter.section("largest error in units of u*S, beyond half an ulp of the result (bound: 16)")
    for (setup, dtype, name), used in sorted(USED.items()):
        terminalreporter.write_line(f"{setup:20} {dtype:9} {name:13} {used:6.2f}")


@pytest.fixture(scope="module")
def started_ranks() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for one in started:
        if one.alive:
            one.close()


@pytest.fixture
def ranks(started_ranks: list[Ranks]) -> Ranks:
    """Two processes for the tests of a module; new ones where a test left them dead."""
    if not started_ranks or not started_ranks[0].alive:
        started_ranks[:] = [Ranks()]
    return started_ranks[0]
