# The norm family on scikit-learn's digits, after Lubana et al. 2021, "Beyond BatchNorm".
#   python examples/beyond_batchnorm.py [--quick] [--out DIR] [--seeds N] [--epochs N]
#
# Three experiments. At initialization, in residual networks: the variance of activations by block. In plain networks of
# group norm, by group size: similarity of activations and growth of gradients by layer, against what
# normkern.probes.predict says, and how fast they then train. And a small ResNet with every layer of the family,
# trained by one recipe: training accuracy by epoch, test accuracy. Every number goes to beyond_batchnorm.csv, means to
# the terminal, and with matplotlib a figure to beyond_batchnorm.png.
#
# The family trains by one recipe: SGD with momentum on standardized images, a rate that rises over the first quarter
# (as the paper has it for filter response norm) and falls to 0 along a cosine. SkipInit, a factor of every residual
# branch that begins at 0, is the paper's remedy for weight norm and scaled weight standardization; both are shown with
# it and without.
#
# The paper finds: variance grows linearly with depth under norms of activations and doubles per block without (scaled
# weight standardization and weight norm need a remedy in residual networks); similarity grows with group size;
# gradients of early layers grow as groups shrink; so training is fastest in between.
#
# What comes out here (--seeds 5; examples/results/beyond_batchnorm.csv). As in the paper: after 20 residual blocks the
# variance is 5 to 8 times that of the first with norms of activations, 9e4 times and more without, 1 with SkipInit;
# similarity grows and the squared gradient of early layers shrinks with the group size (16 times the last layer's for
# groups of 1, 0.8 for groups of 32); networks with groups of 2 and 4 train fastest. Theory has the order of the curves
# and, for gradients, their slope at groups of 1 and near the output; similarity of small groups it overestimates.
# After 20 epochs every layer but one is within 1 point of batch norm's test accuracy, 0.988: from 0.980 (filter
# response norm) to 0.991 (scaled weight standardization). Instance norm ends at 0.924: it fixes the mean and variance
# of every image's channels, whose mean over positions the head reads, and trains slowly. Not as in the paper: three
# blocks are too few for weight norm, scaled weight standardization or no norm at all to need a remedy; the first two
# train fastest, and SkipInit slows them down.
from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from conv_norm import Images, Results, accuracy, digits, figures, save, show
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn

from normkern import nn as layers
from normkern import probes

BATCH = 64
BLOCKS = 20
WIDTH, DEPTH = 32, 10  # of the plain networks
SIZES = (1, 2, 4, 8, 16, 32)  # channels to a group
RATE = 0.05  # the largest, of all networks
WARM_UP = 0.25  # of the training; the paper warms up for filter response norm alone, for 5 epochs
SPEED_EPOCHS = 3  # of the plain networks, at a constant rate

Norm = Callable[[int], nn.Module]
SKIP_INIT = ", SkipInit"  # ends the names of methods whose residual branches have a factor that begins at 0
# What stands before a convolution, norm and activation, and the kind of convolution.
METHODS: dict[str, tuple[Norm, type[nn.Conv2d]]] = {
    "batch norm": (lambda c: layers.BatchNorm2d(c, act="relu"), nn.Conv2d),
    "layer norm": (lambda c: layers.GroupNorm(1, c, act="relu"), nn.Conv2d),
    "instance norm": (lambda c: layers.InstanceNorm2d(c, affine=True, act="relu"), nn.Conv2d),
    "group norm": (lambda c: layers.GroupNorm(8, c, act="relu"), nn.Conv2d),
    "filter response": (layers.FilterResponseNorm2d, nn.Conv2d),
    "variance norm": (lambda c: layers.VarianceNorm2d(c, act="relu"), nn.Conv2d),
    "EvoNorm-S0": (lambda c: layers.EvoNorm2dS0(c, 8), nn.Conv2d),
    "EvoNorm-B0": (layers.EvoNorm2dB0, nn.Conv2d),
    "weight norm": (lambda _: layers.ScaledReLU(), layers.WeightNormConv2d),
    "scaled WS": (lambda _: nn.ReLU(), layers.ScaledWSConv2d),
    "none": (lambda _: nn.ReLU(), nn.Conv2d),
}
METHODS |= {f"{name}{SKIP_INIT}": METHODS[name] for name in ("weight norm", "scaled WS")}


def convolution(kind: type[nn.Conv2d], cin: int, cout: int, stride: int = 1) -> nn.Conv2d:
    conv = kind(cin, cout, 3, stride=stride, padding=1)
    nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
    nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
    return conv


class Block(nn.Module):
    def __init__(self, method: str, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        norm, kind = METHODS[method]
        self.first, self.second = convolution(kind, cin, cout, stride), convolution(kind, cout, cout)
        self.before, self.between = norm(cin), norm(cout)
        same = cin == cout and stride == 1
        self.short = nn.Identity() if same else convolution(kind, cin, cout, stride)
        self.factor = nn.Parameter(torch.zeros(())) if method.endswith(SKIP_INIT) else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.between(self.first(self.before(x))))
        return (y if self.factor is None else y * self.factor) + self.short(x)  # type: ignore[no-any-return]


class ResNet(nn.Module):
    def __init__(self, method: str, widths: tuple[int, ...]) -> None:
        super().__init__()
        norm, kind = METHODS[method]
        self.stem = convolution(kind, 1, widths[0])
        pairs = zip((widths[0], *widths), widths, strict=False)
        self.blocks = nn.Sequential(*(Block(method, a, b, 1 if a == b else 2) for a, b in pairs))
        self.last, self.head = norm(widths[-1]), nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.blocks(self.stem(x))).mean((2, 3)))  # type: ignore[no-any-return]


class Plain(nn.Sequential):
    """Convolutions and group norm; `size` channels to a group."""

    def __init__(self, size: int) -> None:
        for_each = [
            (convolution(nn.Conv2d, 1 if i == 0 else WIDTH, WIDTH), layers.GroupNorm(WIDTH // size, WIDTH, act="relu"))
            for i in range(DEPTH)
        ]
        pooled = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTH, 10))
        super().__init__(*(layer for pair in for_each for layer in pair), *pooled)


def train(model: nn.Module, data: Images, epochs: int, seed: int, *, constant: bool = False) -> list[float]:
    """The training accuracy of every epoch, over its own batches; nan from where the loss is not finite.

    The rate rises over WARM_UP and falls to 0, both along a cosine, unless it is `constant`.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9, weight_decay=1e-4)
    steps = epochs * (len(data.y) // BATCH)
    schedule = (
        torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
        if constant
        else torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps, pct_start=WARM_UP, cycle_momentum=False)
    )
    found = []
    model.train()
    for _ in range(epochs):
        order, right = torch.randperm(len(data.y), generator=generator), 0
        for index in order[: len(order) // BATCH * BATCH].split(BATCH):
            optimizer.zero_grad()
            logits = model(data.x[index])
            loss = F.cross_entropy(logits, data.y[index])
            if not loss.isfinite():
                return found + [float("nan")] * (epochs - len(found))
            loss.backward()
            optimizer.step()
            schedule.step()
            right += int((logits.argmax(1) == data.y[index]).sum())
        found.append(right / (len(order) // BATCH * BATCH))
    model.eval()
    return found


def variances(method: str, data: Images, seed: int, out: Results) -> None:
    """Behind every residual block, at initialization."""
    torch.manual_seed(seed)
    model = ResNet(method, (WIDTH,) * BLOCKS)
    x = data.x[:BATCH]
    chosen = {f"blocks.{i}" for i in range(BLOCKS)}
    with (
        torch.no_grad(),
        probes.record_activations(model, at=lambda name, _: name in chosen, gradients_at=()) as recorder,
    ):
        model((x - x.mean()) / x.std())
    first = None
    for block, row in enumerate(recorder.result.layers, start=1):
        first = first or row.variance
        assert row.variance is not None
        assert first is not None
        out.add(data.name, method, f"block {block}", "variance to that of block 1", seed, row.variance / first)


def by_group_size(size: int, data: Images, seed: int, out: Results) -> None:
    torch.manual_seed(seed)
    model, method = Plain(size), f"group size {size}"
    x, y = data.x[:BATCH], data.y[:BATCH]
    x = (x - x.mean()) / x.std()
    rows = probes.activations(model, lambda: F.cross_entropy(model(x), y)).layers
    slopes = [row.gradient_norm for row in rows if row.gradient_norm is not None]
    similar = [row.similarity for row in rows if row.similarity is not None]
    for layer, (similarity, slope) in enumerate(zip(similar, slopes, strict=True), start=1):
        out.add(data.name, method, f"layer {layer}", "similarity", seed, similarity)
        out.add(
            data.name,
            method,
            f"layer {layer}",
            "squared gradient to the last layer's",
            seed,
            slope**2 / slopes[-1] ** 2,
        )
    curve = train(model, data, SPEED_EPOCHS, seed, constant=True)
    out.add(data.name, method, "mean over epochs", "training accuracy", seed, sum(curve) / len(curve))


def family(method: str, data: Images, seed: int, epochs: int, out: Results) -> None:
    torch.manual_seed(seed)
    model = ResNet(method, (16, 16, 32))
    for epoch, right in enumerate(train(model, data, epochs, seed), start=1):
        out.add(data.name, method, f"epoch {epoch}", "training accuracy", seed, right)
    out.add(data.name, method, "trained", "test accuracy", seed, accuracy(model, data.test_x, data.test_y))


def run(arguments: argparse.Namespace, console: Console) -> Results:
    out, data = Results(), digits()
    mean, std = data.x.mean(), data.x.std()
    data.x, data.test_x = (data.x - mean) / std, (data.test_x - mean) / std
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=arguments.seeds * (2 * len(METHODS) + len(SIZES)))
        for seed in range(arguments.seeds):
            for method in METHODS:
                progress.update(task, description=f"variance, {method}, seed {seed}")
                variances(method, data, seed, out)
                progress.advance(task)
                progress.update(task, description=f"training, {method}, seed {seed}")
                family(method, data, seed, arguments.epochs, out)
                progress.advance(task)
            for size in SIZES:
                progress.update(task, description=f"group size {size}, seed {seed}")
                by_group_size(size, data, seed, out)
                progress.advance(task)
    return out


def draw(out: Results, path: Path) -> bool:
    """The figure; False where matplotlib is missing."""
    pyplot = figures()
    if pyplot is None:
        return False
    means = out.summary()
    figure, axes = pyplot.subplots(2, 3, figsize=(16, 9), constrained_layout=True)
    (variance, similarity, slope), (curves, bars, trade) = axes
    colors = dict(zip(METHODS, pyplot.get_cmap("tab20").colors, strict=False))

    def line(axis: Any, method: str, metric: str, **style: Any) -> None:
        values = [v[0] for k, v in means.items() if k[1] == method and k[3] == metric and k[2] != "mean over epochs"]
        axis.plot(range(1, len(values) + 1), values, **style)

    for method, color in colors.items():
        dashes = "--" if method in ("none", "scaled WS", "weight norm") else "-"
        line(variance, method, "variance to that of block 1", color=color, label=method, linestyle=dashes)
        line(curves, method, "training accuracy", color=color, label=method, linestyle=dashes, marker=".")
    shades = pyplot.get_cmap("viridis")
    for i, size in enumerate(SIZES):
        color, method = shades(i / len(SIZES)), f"group size {size}"
        line(similarity, method, "similarity", color=color, marker="o", linestyle="", label=f"{size}")
        predicted = probes.predict(size, DEPTH).layers
        # What the images have in common shows in the first layer; theory goes on from there.
        first = means["digits", method, "layer 1", "similarity"][0]
        if size > 1:
            theory = [first, *(row.similarity for row in probes.predict(size, DEPTH - 1, similarity=first).layers)]
            similarity.plot(range(1, DEPTH + 1), theory, color=color, linewidth=1)
        line(
            slope,
            method,
            "squared gradient to the last layer's",
            color=color,
            marker="o",
            linestyle="",
            label=f"{size}",
        )
        grown = [1.0]
        for _ in range(DEPTH - 1):
            grown.append(grown[-1] * predicted[-1].gradient_growth)
        slope.plot(range(DEPTH, 0, -1), grown, color=color, linewidth=1)
    speed = [means["digits", f"group size {s}", "mean over epochs", "training accuracy"] for s in SIZES]
    trade.errorbar(range(len(SIZES)), [v[0] for v in speed], [v[1] for v in speed], marker="o", capsize=3)
    trade.set_xticks(range(len(SIZES)), SIZES)
    tests = [means["digits", method, "trained", "test accuracy"] for method in METHODS]
    bars.barh(
        range(len(METHODS)), [v[0] for v in tests], xerr=[v[1] for v in tests], color=list(colors.values()), capsize=3
    )
    bars.set_yticks(range(len(METHODS)), list(METHODS))
    bars.invert_yaxis()
    bars.axvspan(tests[0][0] - 0.01, tests[0][0] + 0.01, color="black", alpha=0.15, label="batch norm, 1 point around")
    bars.set_xlim(max(0, min(v[0] for v in tests) - 0.03), 1)
    for axis in (variance, slope):
        axis.set_yscale("log")
    for axis, title, below in (
        (variance, "variance at initialization, to that of block 1", "residual block"),
        (similarity, "similarity at initialization (lines: theory)", "layer"),
        (
            slope,
            "squared gradient, to that of the last layer\n(lines: theory, many positions, far from the input)",
            "layer",
        ),
        (curves, "training accuracy", "epoch"),
        (bars, "test accuracy", ""),
        (trade, "training accuracy, mean over epochs", "group size"),
    ):
        axis.set_title(title)
        axis.set_xlabel(below)
        axis.grid(alpha=0.3)
    variance.legend(fontsize=8)
    bars.legend(fontsize=8, loc="lower left")
    similarity.legend(title="group size", fontsize=8)
    slope.legend(title="group size", fontsize=8)
    figure.savefig(path, dpi=80)
    return True


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ten norms and what predicts how they train, on small real images")
    parser.add_argument("--quick", action="store_true", help="one seed, two epochs: under two minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("examples/results"), help="directory of the CSV and the figure"
    )
    parser.add_argument("--seeds", type=int, help="default 5, with --quick 1")
    parser.add_argument(
        "--epochs", type=int, help="of the family, default 20, with --quick 2; an epoch is 22 steps of 64 images"
    )
    arguments = parser.parse_args(given)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 5)
    arguments.epochs = arguments.epochs or (2 if arguments.quick else 20)
    console = Console()
    out = run(arguments, console)
    show(out, console)
    save(out, draw, arguments.out / "beyond_batchnorm.csv", console)


if __name__ == "__main__":
    main()
