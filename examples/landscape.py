# How batch norm changes the loss around the weights, on scikit-learn's digits, after Santurkar et al. 2018, "How Does
# Batch Normalization Help Optimization?".
#   python examples/landscape.py [--quick] [--out DIR] [--seeds N] [--steps N]
#
# A small VGG without norm, with batch norm, with batch norm and noise behind it, with the noise alone, and with batch
# norms by L1, L2 and maximum; and a deep linear network on synthetic data, with and without batch norm. Along training:
# the loss range, gradient predictiveness and effective beta-smoothness on the way of one step, and the internal
# covariate shift of the steps (normkern.probes.landscape, covariate_shift). Every number goes to landscape.csv, means
# over steps to the terminal, and with matplotlib a figure to landscape.png.
#
# The paper finds: batch norm makes loss range, gradient distance and beta-smoothness smaller, by orders of magnitude
# early in training of a large VGG; it does not make the covariate shift smaller; noise behind it hardly slows training,
# but stops that of the network without it; the other norms do about as well.
#
# What comes out here, means over steps and 3 seeds (examples/results/landscape.csv). As in the paper: with batch norm
# the loss range is 0.6 (without a norm 3.0), the gradient's distance 3.8 (16.7), beta-smoothness 6.0 (11.9), though
# factors of 2 to 5, not orders of magnitude; noise behind it costs little (training accuracy 0.98, 0.999 without) and
# alone slows the network most (mean loss 1.16, 0.98 without noise or norm); L1 and L2 norms do as well as batch norm.
# Not as in the paper: the relative covariate shift is smaller with batch norm, if only a little (0.39, 0.46 without);
# the cosine of gradients along a step is no better (-0.44, -0.40: at four times the rate they turn round in any
# network); the maximum norm trains about as slowly as no norm; and the deep linear network learns faster without batch
# norm, though it is smoother with it.
from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from conv_norm import Results, digits, figures, save
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn

import normkern
from normkern import nn as layers
from normkern import probes

BATCH = 64
RATE = 0.2
GRID = (0.5, 1.0, 2.0, 4.0)  # times the learning rate: steps along one gradient at which the loss is looked at
WIDTHS = (16, 16, 32, 32)
LINEAR_LAYERS, LINEAR_WIDTH, LINEAR_RATE = 25, 16, 0.01


class Noise(nn.Module):
    """That of NoisyBatchNorm2d, alone."""

    def forward(self, x: Tensor) -> Tensor:
        return normkern.batch_noise(x, 0.5, 1.25, 0.1) if self.training else x


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "batch norm": layers.BatchNorm2d,
    "noisy batch norm": layers.NoisyBatchNorm2d,
    "noise alone": lambda _: Noise(),
    "L1 norm": lambda c: layers.LpBatchNorm2d(c, 1),
    "L2 norm": lambda c: layers.LpBatchNorm2d(c, 2),
    "max norm": lambda c: layers.LpBatchNorm2d(c, math.inf),
}
LINEAR_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda _: nn.Identity(),
    "batch norm": layers.BatchNorm1d,
}


def vgg(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    net, cin = nn.Sequential(), 1
    for i, cout in enumerate(WIDTHS):
        conv = nn.Conv2d(cin, cout, 3, stride=2 if i == 2 else 1, padding=1)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        net.extend([conv, norm(cout), nn.ReLU()])
        cin = cout
    return net.extend([nn.Flatten(), nn.Linear(cin * 16, 10)])  # 4 x 4 positions are left of 8 x 8


def deep_linear(norm: Callable[[int], nn.Module]) -> nn.Sequential:
    net = nn.Sequential()
    for _ in range(LINEAR_LAYERS):
        linear = nn.Linear(LINEAR_WIDTH, LINEAR_WIDTH, bias=False)
        nn.init.orthogonal_(linear.weight)
        net.extend([linear, norm(LINEAR_WIDTH)])
    return net.append(nn.Linear(LINEAR_WIDTH, LINEAR_WIDTH))


def measured(
    model: nn.Module,
    batches: Callable[[int], Callable[[], Tensor]],
    rate: float,
    steps: int,
    every: int,
    add: Callable[[int, str, float], None],
) -> None:
    """Train by plain SGD, and look around at every `every`-th step, on that step's batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    model.train()
    for step in range(steps):
        loss = batches(step)
        looks = step % every == 0
        if looks:
            found = probes.landscape(model, loss, [rate * a for a in GRID])
            low, high = found.loss_range
            add(step, "loss", found.loss)
            add(step, "loss range", high - low)
            add(step, "gradient distance", found.gradient_predictiveness[1])
            add(step, "gradient cosine", found.gradient_cosine[0])
            add(step, "beta-smoothness", found.beta_smoothness)

        def move(loss: Callable[[], Tensor] = loss) -> bool:
            optimizer.zero_grad()
            value = loss()
            value.backward()
            optimizer.step()
            return bool(value.isfinite())

        if looks and all(p.isfinite().all() for p in model.parameters()):
            with probes.covariate_shift(model, loss, layers=(nn.Conv2d, nn.Linear)) as shift:
                move()
            rows = shift.result.layers[1:]  # nothing is below the first
            add(step, "shift, cosine", sum(row.cosine for row in rows) / len(rows))
            add(step, "shift, relative", sum(row.relative for row in rows) / len(rows))
        elif not move():
            return


def run(arguments: argparse.Namespace, console: Console) -> Results:
    out, data = Results(), digits()
    data.x = (data.x - data.x.mean()) / data.x.std()
    columns = (TextColumn("{task.description:36}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=arguments.seeds * (len(NORMS) + len(LINEAR_NORMS)))
        for seed in range(arguments.seeds):
            order = torch.cat(
                [torch.randperm(len(data.y), generator=torch.Generator().manual_seed(k)) for k in range(40)]
            )
            for name, norm in NORMS.items():
                progress.update(task, description=f"digits, {name}, seed {seed}")
                torch.manual_seed(seed)
                model = vgg(norm)

                def batches(step: int, model: nn.Module = model, order: Tensor = order) -> Callable[[], Tensor]:
                    index = order[BATCH * step : BATCH * (step + 1)]
                    return lambda: F.cross_entropy(model(data.x[index]), data.y[index])

                def add(step: int, metric: str, value: float, name: str = name, seed: int = seed) -> None:
                    out.add("digits", name, str(step), metric, seed, value)

                measured(model, batches, RATE, arguments.steps, arguments.every, add)
                right = model(data.x).argmax(1) == data.y  # by the batch's own statistics, and noise
                out.add("digits", name, "trained", "training accuracy", seed, float(right.float().mean()))
                progress.advance(task)
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(256, LINEAR_WIDTH, generator=generator)
            y = x @ torch.randn(LINEAR_WIDTH, LINEAR_WIDTH, generator=generator) / LINEAR_WIDTH**0.5
            for name, norm in LINEAR_NORMS.items():
                progress.update(task, description=f"deep linear, {name}, seed {seed}")
                torch.manual_seed(seed)
                model = deep_linear(norm)

                def full(_: int, model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Callable[[], Tensor]:
                    return lambda: F.mse_loss(model(x), y)

                def note(step: int, metric: str, value: float, name: str = name, seed: int = seed) -> None:
                    out.add("deep linear", name, str(step), metric, seed, value)

                measured(model, full, LINEAR_RATE, arguments.steps, 2 * arguments.every, note)
                progress.advance(task)
    return out


def averages(out: Results) -> dict[tuple[str, str, str], float]:
    """Over steps and seeds."""
    values: dict[tuple[str, str, str], list[float]] = {}
    for data, method, _step, metric, _seed, value in out.rows:
        values.setdefault((data, method, metric), []).append(value)
    return {key: sum(v) / len(v) for key, v in values.items()}


def show(out: Results, console: Console) -> None:
    means = averages(out)
    for data in dict.fromkeys(key[0] for key in means):
        metrics = list(dict.fromkeys(key[2] for key in means if key[0] == data))
        table = Table(title=f"{data}: means over steps and seeds", title_justify="left")
        table.add_column("")
        for metric in metrics:
            table.add_column(metric, justify="right")
        for method in dict.fromkeys(key[1] for key in means if key[0] == data):
            table.add_row(method, *(f"{means.get((data, method, metric), math.nan):.3g}" for metric in metrics))
        console.print(table)


def draw(out: Results, path: Path) -> bool:
    """The figure; False where matplotlib is missing."""
    pyplot = figures()
    if pyplot is None:
        return False
    means = out.summary()
    figure, axes = pyplot.subplots(2, 4, figsize=(19, 8.5), constrained_layout=True)
    colors = dict(zip(NORMS, pyplot.get_cmap("tab10").colors, strict=False))
    panels = (
        ("digits", "loss", "training loss", True),
        ("digits", "loss range", "range of the loss along a step", True),
        ("digits", "gradient distance", "largest l2 distance of the gradient\nalong a step", True),
        ("digits", "beta-smoothness", "effective beta-smoothness", True),
        ("digits", "shift, cosine", "covariate shift: cosine of G and G'", False),
        ("digits", "shift, relative", "covariate shift: ||G - G'|| / ||G||", True),
        ("deep linear", "loss", "deep linear network: training loss", True),
        ("deep linear", "shift, cosine", "deep linear network: cosine of G and G'", False),
    )
    for axis, (data, metric, title, logarithmic) in zip(axes.flat, panels, strict=True):
        for method in NORMS if data == "digits" else LINEAR_NORMS:
            rows = [(int(k[2]), v[0]) for k, v in means.items() if (k[0], k[1], k[3]) == (data, method, metric)]
            axis.plot([r[0] for r in rows], [r[1] for r in rows], color=colors[method], label=method, linewidth=1.3)
        axis.set(title=title, xlabel="step")
        if logarithmic:
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter("{x:g}")
            low, high = axis.get_ylim()
            axis.yaxis.set_minor_formatter("{x:.1g}" if high < 10 * low else "")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(NORMS))
    figure.savefig(path, dpi=75)
    return True


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The loss around the weights, with and without batch norm")
    parser.add_argument("--quick", action="store_true", help="one seed, 40 steps: under two minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("examples/results"), help="directory of the CSV and the figure"
    )
    parser.add_argument("--seeds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--steps", type=int, help="of training; default 60, with --quick 40")
    arguments = parser.parse_args(given)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    arguments.steps = arguments.steps or (40 if arguments.quick else 60)
    arguments.every = max(1, arguments.steps // (8 if arguments.quick else 10))
    console = Console()
    out = run(arguments, console)
    show(out, console)
    save(out, draw, arguments.out / "landscape.csv", console)


if __name__ == "__main__":
    main()
