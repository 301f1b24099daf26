"""demo.py: what `python -m normkern demo` runs: the same small networks trained with torch's norms and with
normkern's, then every norm's error against float64 and its time, side by side.

Everything is computed on the spot and repeatable: fixed seeds, own generators, no global state left changed.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from types import ModuleType

import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn

import normkern
import normkern.functional
import normkern.nn
from normkern.info import build_lines, device_lines
from normkern.measure import Call, Stopwatch, Times, interleaved, largest_error

SEED = 2024
BATCH = 64
TEST_IMAGES = 360
OFFSETS = (0.0, 1000.0)  # mean/std of the inputs in the table of errors


# --------------------------------------------------------------------------------------------------- training


# The norm of one stage of the network: (library of modules, channels, height and width) -> module.
NormMaker = Callable[[ModuleType, int, int], nn.Module]

NORMS: dict[str, NormMaker] = {
    "BatchNorm2d": lambda library, channels, size: library.BatchNorm2d(channels),
    "GroupNorm": lambda library, channels, size: library.GroupNorm(8, channels),
    "InstanceNorm2d": lambda library, channels, size: library.InstanceNorm2d(channels, affine=True),
    "LayerNorm": lambda library, channels, size: library.LayerNorm((channels, size, size)),
    "RMSNorm": lambda library, channels, size: library.RMSNorm((channels, size, size)),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One network trained twice. Accuracies are fractions of the test images, steps are seconds."""

    norm: str
    accuracy: dict[str, float]
    step: dict[str, Times]
    same_answers: int


def digits_net(library: ModuleType, make_norm: NormMaker) -> nn.Module:
    """Three convolutions with a norm each, for 8x8 images."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1, bias=False),
        make_norm(library, 32, 8),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, bias=False),
        make_norm(library, 64, 8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        make_norm(library, 64, 4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 scanned digits, split into training and test images."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor

    @staticmethod
    def load(device: torch.device) -> Digits:
        data = load_digits()
        images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(data.target).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SEED))
        images, labels = images[order].to(device), labels[order].to(device)
        return Digits(images[TEST_IMAGES:], labels[TEST_IMAGES:], images[:TEST_IMAGES], labels[:TEST_IMAGES])


def train(norm: str, digits: Digits, epochs: int, device: torch.device, on_step: Callable[[], None]) -> Training:
    """Train with both libraries, a step of one and then the same step of the other, from the same initial weights."""
    torch.manual_seed(SEED)
    start = digits_net(nn, NORMS[norm])
    models: dict[str, nn.Module] = {"torch": start, "normkern": digits_net(normkern.nn, NORMS[norm])}
    models["normkern"].load_state_dict(copy.deepcopy(start.state_dict()))
    steps = epochs * (len(digits.labels) // BATCH)

    optimizers, schedules = {}, {}
    for name, model in models.items():
        model.to(device).train()
        optimizers[name] = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
        schedules[name] = torch.optim.lr_scheduler.OneCycleLR(optimizers[name], max_lr=0.1, total_steps=steps)

    def step_of(name: str, batch: Tensor) -> Call:
        def step() -> None:
            optimizers[name].zero_grad()
            scores = models[name](digits.images[batch])
            nn.functional.cross_entropy(scores, digits.labels[batch]).backward()  # type: ignore[no-untyped-call]
            optimizers[name].step()
            schedules[name].step()

        return step

    seconds: dict[str, list[float]] = {name: [] for name in models}
    generator = torch.Generator().manual_seed(SEED)
    watch = Stopwatch(device)
    for _ in range(epochs):
        order = torch.randperm(len(digits.labels), generator=generator).to(device)
        for number in range(len(order) // BATCH):
            batch = order[number * BATCH : (number + 1) * BATCH]
            for name, taken in watch.round({name: step_of(name, batch) for name in models}, number).items():
                seconds[name].append(taken)
            on_step()

    answers = {}
    with torch.no_grad():
        for name, model in models.items():
            answers[name] = model.eval()(digits.test_images).argmax(1)
    return Training(
        norm,
        accuracy={name: float((answer == digits.test_labels).float().mean()) for name, answer in answers.items()},
        step={name: Times(tuple(taken)) for name, taken in seconds.items()},
        same_answers=int((answers["torch"] == answers["normkern"]).sum()),
    )


# --------------------------------------------------------------------------------------------------- op by op


@dataclasses.dataclass(frozen=True)
class Row:
    """One norm on one kind of tensor, as both libraries spell it."""

    op: str
    shape: tuple[int, ...]
    layout: str

    def input(self, offset: float, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Standard normal values around `offset`, of this row's shape and memory layout."""
        generator = torch.Generator().manual_seed(SEED)
        if self.layout == "columns":  # (N, D, T) seen as (N, T, D): what flatten(2).transpose(1, 2) gives
            n, tokens, width = self.shape
            x = torch.randn((n, width, tokens), generator=generator, dtype=torch.float64).transpose(1, 2)
        else:
            x = torch.randn(self.shape, generator=generator, dtype=torch.float64)
        x = (x + offset).to(device, dtype)
        return x.contiguous(memory_format=torch.channels_last) if self.layout == "NHWC" else x

    def affine(self, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(SEED + 1)
        size = self.shape[-1] if len(self.shape) == 3 else self.shape[1]
        weight, bias = torch.randn((2, size), generator=generator, dtype=torch.float64).to(device, dtype)
        return weight + 1, bias

    def arguments(self, weight: Tensor, bias: Tensor) -> tuple[object, ...]:
        """What follows the input, for torch's function and normkern's alike."""
        width = self.shape[-1:]
        arguments: dict[str, tuple[object, ...]] = {
            "batch_norm": (None, None, weight, bias, True),
            "group_norm": (32, weight, bias),
            "instance_norm": (None, None, weight, bias),
            "layer_norm": (width, weight, bias),
            "rms_norm": (width, weight, 1e-6),  # the default depends on the dtype
        }
        return arguments[self.op]

    def call(self, library: ModuleType, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y: Tensor = getattr(library, self.op)(x, *self.arguments(weight, bias))
        return y


def rows(quick: bool, device: torch.device) -> list[Row]:
    """Real layers: ResNet-50's first stage, Stable Diffusion's first block, a 2-D U-Net, ViT-B/16 and a Llama block."""
    many = 8 if device.type == "cuda" else 1
    shapes = {
        "batch_norm": (8 * many, 64, 56, 56),
        "group_norm": (2 * many, 320, 64, 64),
        "instance_norm": (4 * many, 64, 96, 96),
        "layer_norm": (16 * many, 196, 768),
        "rms_norm": (1 * many, 512, 4096),
    }
    if quick:
        shapes = {"batch_norm": (4, 32, 14, 14), "group_norm": (2, 64, 14, 14), "instance_norm": (2, 32, 14, 14)}
        shapes |= {"layer_norm": (2, 49, 192), "rms_norm": (1, 64, 512)}
    layouts = {4: ("NCHW", "NHWC"), 3: ("rows", "columns")}
    return [Row(op, shape, layout) for op, shape in shapes.items() for layout in layouts[len(shape)]]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Largest errors of one row, in units of the root mean square of the exact result."""

    row: Row
    offset: float
    output: dict[str, float]
    gradients: dict[str, float]  # the worst of dx, dweight and dbias


@dataclasses.dataclass(frozen=True)
class Speed:
    """Times of one row; `training` is forward and backward together."""

    row: Row
    forward: dict[str, Times]
    training: dict[str, Times]


def outputs_and_gradients(row: Row, library: ModuleType, tensors: list[Tensor], dy: Tensor) -> list[Tensor]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = row.call(library, *leaves)
    wanted = leaves[:2] if row.op == "rms_norm" else leaves
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


def accuracy(row: Row, offset: float, dtype: torch.dtype, device: torch.device) -> Accuracy:
    x = row.input(offset, dtype, device)
    tensors = [x, *row.affine(dtype, device)]
    dy = torch.empty_like(x).copy_(row.input(0, dtype, device).flip(0))
    # The reference sees the rounded input, and contiguous: torch's float64 is not exact in channels_last either.
    exact = [tensor.double().contiguous() for tensor in tensors]
    truth = outputs_and_gradients(row, nn.functional, exact, dy.double().contiguous())
    output, gradients = {}, {}
    for name, library in {"torch": nn.functional, "normkern": normkern.functional}.items():
        y, *grads = outputs_and_gradients(row, library, tensors, dy)
        output[name] = largest_error(y, truth[0])
        gradients[name] = max(largest_error(got, want) for got, want in zip(grads, truth[1:], strict=True))
    return Accuracy(row, offset, output, gradients)


def speed(row: Row, rounds: int, dtype: torch.dtype, device: torch.device) -> Speed:
    x = row.input(0, dtype, device)
    tensors = [x, *row.affine(dtype, device)]
    dy = torch.ones_like(x)
    libraries = {"torch": nn.functional, "normkern": normkern.functional}
    if device.type == "cuda" and row.op in ("batch_norm", "instance_norm"):
        libraries["cudnn"] = nn.functional

    def rival(name: str, library: ModuleType, training: bool) -> Call:
        def call() -> None:
            with torch.backends.cudnn.flags(enabled=name == "cudnn"):
                if training:
                    outputs_and_gradients(row, library, tensors, dy)
                else:
                    row.call(library, *tensors)

        return call

    forward, training = (
        interleaved({name: rival(name, library, mode) for name, library in libraries.items()}, device, rounds, limit=2)
        for mode in (False, True)
    )
    return Speed(row, forward, training)


# --------------------------------------------------------------------------------------------------- what is shown


def table(title: str, note: str, *columns: str, left: int = 1) -> Table:
    made = Table(title=title, caption=note, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    made.title_style, made.caption_style, made.collapse_padding = "bold", "dim", True
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number < left else "right", no_wrap=True)
    return made


def without_repeats(rows: list[list[str]], columns: int) -> Iterator[list[str]]:
    """The rows, with the first `columns` cells blank where they repeat the row above."""
    above: list[str] = []
    for row in rows:
        same = 0
        while same < columns and row[: same + 1] == above[: same + 1]:
            same += 1
        above = row
        yield [""] * same + row[same:]


def error_text(value: float, dtype: torch.dtype) -> str:
    ulp = torch.finfo(dtype).eps
    style = "green" if value <= 100 * ulp else "yellow" if value <= max(1e-2, 1000 * ulp) else "bold red"
    return f"[{style}]{value:.1e}[/]"


def faster_text(rival: Times, ours: Times) -> str:
    ratio = rival.median / ours.median
    style = "green" if ratio >= 1.05 else "red" if ratio < 0.95 else "default"
    return f"[{style}]{ratio:.2f}x[/]"


def milliseconds(times: Times) -> str:
    return f"{times.median * 1e3:.2f}"


def training_table(trainings: list[Training], epochs: int) -> Table:
    made = table(
        f"A small network on real digits, {epochs} epoch{'s' * (epochs > 1)}, trained twice from the same seed",
        f"Accuracy on {TEST_IMAGES} test images; 'same answers': on which of them both networks agree; "
        "time per step: median.",
        "\nnorm",
        "accuracy\ntorch",
        "\nnormkern",
        "same\nanswers",
        "ms/step\ntorch",
        "\nnormkern",
        "\nfaster",
    )
    for one in trainings:
        made.add_row(
            one.norm,
            f"{one.accuracy['torch']:.1%}",
            f"{one.accuracy['normkern']:.1%}",
            f"{one.same_answers}/{TEST_IMAGES}",
            milliseconds(one.step["torch"]),
            milliseconds(one.step["normkern"]),
            faster_text(one.step["torch"], one.step["normkern"]),
        )
    return made


def accuracy_table(results: list[Accuracy], dtype: torch.dtype) -> Table:
    made = table(
        f"Largest error against float64, {str(dtype).removeprefix('torch.')}",
        "In units of the result's root mean square; gradients: the worst of dx, dweight and dbias.",
        "\nnorm",
        "\nlayout",
        "mean/std\nof x",
        "output\ntorch",
        "\nnormkern",
        "gradients\ntorch",
        "\nnormkern",
        left=2,
    )
    lines = []
    for one in results:
        errors = [errors[name] for errors in (one.output, one.gradients) for name in ("torch", "normkern")]
        lines.append([one.row.op, one.row.layout, f"{one.offset:g}", *(error_text(value, dtype) for value in errors)])
    for line in without_repeats(lines, 2):
        made.add_row(*line)
    return made


def speed_table(results: list[Speed], dtype: torch.dtype, rounds: int) -> Table:
    cudnn = any("cudnn" in one.forward for one in results)
    rivals = ["torch", "cudnn"] if cudnn else ["torch"]
    made = table(
        f"Milliseconds of a call, {str(dtype).removeprefix('torch.')}",
        f"Medians of up to {rounds} rounds in which the rivals take turns; 'faster': torch's time over normkern's."
        + (" torch runs without cuDNN; cudnn is torch with it." if cudnn else ""),
        "\nnorm",
        "\nlayout",
        *("forward\ntorch", *(f"\n{name}" for name in rivals[1:]), "\nnormkern", "\nfaster"),
        *("+ back\ntorch", *(f"\n{name}" for name in rivals[1:]), "\nnormkern", "\nfaster"),
        left=2,
    )
    lines = []
    for one in results:
        cells = [one.row.op, one.row.layout]
        for times in (one.forward, one.training):
            cells += [milliseconds(times[name]) if name in times else "" for name in (*rivals, "normkern")]
            cells.append(faster_text(times["torch"], times["normkern"]))
        lines.append(cells)
    for line in without_repeats(lines, 1):
        made.add_row(*line)
    return made


def backend_table(compared: list[Row], dtype: torch.dtype, device: torch.device) -> Table:
    """Who computed each row, as normkern.explain tells it, and how a GPU does or would do it."""
    found = []
    for row in compared:
        x = row.input(0, dtype, device)
        found.append(normkern.explain(row.op, x, *row.arguments(*row.affine(dtype, device))))
    chips = {one.chip.name for one in found if one.chip and one.passes}
    planned = f"plan on {'this GPU' if device.type == 'cuda' else '/'.join(chips)}" if chips else "GPU plan"
    made = table("What ran", "", "\nnorm", "\nshape", "\nlayout", "\nbackend", "\ngroups", left=4)
    made.caption = "'normkern.explain' says more of any call." + (
        "" if device.type == "cuda" else " The plan is what the CUDA kernels would do; nothing of it ran here."
    )
    for title in (f"{planned}\nforward", "\nbackward"):
        made.add_column(title, no_wrap=True)
    lines = []
    for row, one in zip(compared, found, strict=True):
        plans = [planned_pass.plan.strategy.name for planned_pass in one.passes] or ["not built"] * 2
        stats = one.problem.stats if one.problem else None
        shape, groups = "x".join(map(str, row.shape)), f"{stats.groups:,}" if stats else ""
        lines.append([row.op, shape, row.layout, one.backend or "none", groups, *plans])
    for line in without_repeats(lines, 2):
        made.add_row(*line)
    return made


# --------------------------------------------------------------------------------------------------- the whole


@dataclasses.dataclass(frozen=True)
class Report:
    trainings: list[Training]
    accuracies: list[Accuracy]
    speeds: list[Speed]


def progress_bar(console: Console) -> Progress:
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True)


def run(
    epochs: int | None = None,
    quick: bool = False,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    console: Console | None = None,
) -> Report:
    """Train, compare, print. `quick` shrinks everything to a few seconds."""
    console = console or Console()
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    epochs = epochs or (2 if quick else 8)
    rounds = 5 if quick else 25
    norms = list(NORMS)[:2] if quick else list(NORMS)
    compared = rows(quick, target)

    with torch.random.fork_rng():
        digits = Digits.load(target)
        with progress_bar(console) as progress:
            steps = epochs * (len(digits.labels) // BATCH)
            bar = progress.add_task("training", total=steps * len(norms))
            trainings = []
            for norm in norms:
                progress.update(bar, description=f"training with {norm}")
                trainings.append(train(norm, digits, epochs, target, lambda: progress.advance(bar)))
        console.print(training_table(trainings, epochs))

        with progress_bar(console) as progress:
            bar = progress.add_task("errors", total=len(compared) * len(OFFSETS))
            accuracies = []
            for row in compared:
                progress.update(bar, description=f"errors of {row.op}")
                for offset in OFFSETS:
                    accuracies.append(accuracy(row, offset, dtype, target))
                    progress.advance(bar)
        console.print(accuracy_table(accuracies, dtype))

        with progress_bar(console) as progress:
            bar = progress.add_task("times", total=len(compared))
            speeds = []
            for row in compared:
                progress.update(bar, description=f"times of {row.op}")
                speeds.append(speed(row, rounds, dtype, target))
                progress.advance(bar)
        console.print(speed_table(speeds, dtype, rounds))
    console.print()
    console.print(backend_table(compared, dtype, target))
    for name, value in (*build_lines(), *device_lines()):
        console.print(f"{name:<13} {value}", highlight=False)
    return Report(trainings, accuracies, speeds)
