# ConvNorm against batch norm and spectral norm on real images that ship inside Python packages.
#   python examples/conv_norm.py [--quick] [--out DIR] [--seeds N] [--epochs N]
#
# A small ResNet on scikit-learn's digits and, where scikit-image is installed, on patches of its brick, grass and
# gravel textures, with batch norm and with ConvNorm: accuracy clean, with wrong labels, with less data and under
# PGD-20, and the exact spectral norm and condition number of every layer. Then a small GAN on digits whose
# discriminator is held by ConvNorm or by spectral norm, by a Frechet distance in the features of a classifier trained
# here. Every number goes to conv_norm.csv, means and spreads over seeds to the terminal, and with matplotlib a figure
# to conv_norm.png.
from __future__ import annotations

import argparse
import csv
import statistics
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

import normkern
from normkern.nn import ConvNorm2d

BATCH = 64
NOISES = (0.0, 0.2, 0.4, 0.6)  # share of training labels that are drawn anew (the new one may be right)
SHARES = (0.1, 0.25, 0.5, 1.0)  # of the training images, per class
ATTACKS = (8 / 255, 0.1)  # radius of PGD in the maximum norm; pixels are in [0, 1]
ATTACK_STEPS = 20
LATENT = 32
TEXTURES = ("brick", "grass", "gravel")
PATCH = 16


# ---- data


@dataclass
class Images:
    name: str
    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


def digits() -> Images:
    data = load_digits()
    x = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    y = torch.from_numpy(data.target).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2024))
    x, y = x[order], y[order]
    return Images("digits", x[360:], y[360:], x[:360], y[:360], 10)


def textures() -> Images | None:
    """Patches of three textures; training and test patches come from different halves of the photographs."""
    try:
        from skimage import data  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        return None
    generator = torch.Generator().manual_seed(2024)
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for label, name in enumerate(TEXTURES):
        photo = torch.from_numpy(getattr(data, name)().copy()).float() / 255
        half = photo.shape[1] // 2
        for part, area, count in (("train", photo[:, :half], 480), ("test", photo[:, half:], 160)):
            top = torch.randint(area.shape[0] - PATCH, (count,), generator=generator).tolist()
            left = torch.randint(area.shape[1] - PATCH, (count,), generator=generator).tolist()
            for i, j in zip(top, left, strict=True):
                parts[part].append(area[i : i + PATCH, j : j + PATCH])
                parts[f"{part} labels"].append(torch.tensor(label))
    x, y, test_x, test_y = (torch.stack(parts[k]) for k in ("train", "train labels", "test", "test labels"))
    return Images("textures", x.unsqueeze(1), y, test_x.unsqueeze(1), test_y, len(TEXTURES))


def less(data: Images, share: float) -> tuple[Tensor, Tensor]:
    """The first images of every class."""
    kept = []
    for label in range(data.classes):
        index = (data.y == label).nonzero().flatten()
        kept.append(index[: max(1, round(share * len(index)))])
    chosen = torch.cat(kept).sort().values
    return data.x[chosen], data.y[chosen]


def mislabeled(y: Tensor, noise: float, classes: int, generator: torch.Generator) -> Tensor:
    """A random part of the labels, drawn anew."""
    y = y.clone()
    wrong = torch.randperm(len(y), generator=generator)[: round(noise * len(y))]
    y[wrong] = torch.randint(classes, (len(wrong),), generator=generator)
    return y


# ---- networks

Layer = Callable[..., nn.Module]


def batch_normed(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Module:
    return nn.Sequential(nn.Conv2d(cin, cout, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(cout))


def conv_normed(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Module:
    return ConvNorm2d(cin, cout, kernel, stride, kernel // 2)


METHODS: dict[str, Layer] = {"batch norm": batch_normed, "ConvNorm": conv_normed}


class Block(nn.Module):
    def __init__(self, layer: Layer, cin: int, cout: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = layer(cin, cout, 3, stride), layer(cout, cout, 3)
        self.short = nn.Identity() if cin == cout and stride == 1 else layer(cin, cout, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))) + self.short(x))


class ResNet(nn.Module):
    def __init__(self, layer: Layer, classes: int) -> None:
        super().__init__()
        self.stem = layer(1, 16, 3)
        self.blocks = nn.Sequential(Block(layer, 16, 16, 1), Block(layer, 16, 32, 2))
        self.head = nn.Linear(32, classes)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(F.relu(self.stem(x))).mean((2, 3))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))  # type: ignore[no-any-return]


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int, generator: torch.Generator) -> None:
    """The same number of steps whatever the number of images."""
    batch = min(BATCH, len(y))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    order = torch.empty(0, dtype=torch.long)
    model.train()
    for _ in range(steps):
        if len(order) < batch:
            order = torch.cat((order, torch.randperm(len(y), generator=generator)))
        index, order = order[:batch], order[batch:]
        optimizer.zero_grad()
        F.cross_entropy(model(x[index]), y[index]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def attacked(model: nn.Module, x: Tensor, y: Tensor, radius: float, generator: torch.Generator) -> Tensor:
    """PGD in the maximum norm from a random start, steps of radius / 4."""
    worst = (x + radius * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    for _ in range(ATTACK_STEPS):
        worst.requires_grad_()
        (slope,) = torch.autograd.grad(F.cross_entropy(model(worst), y), worst)
        worst = (worst.detach() + radius / 4 * slope.sign()).clamp(x - radius, x + radius).clamp(0, 1)
    return worst


# ---- singular values of a layer on its torus


def frequencies(spectrum: Tensor, stride: int) -> Tensor:
    """(Cout, Cin, h, w) on all frequencies to matrices (h/s * w/s, Cout, s * s * Cin) with the layer's singular values:
    what a stride leaves of neighbouring outputs adds up over aliases."""
    out, depth, h, w = spectrum.shape
    parts = spectrum.reshape(out, depth, stride, h // stride, stride, w // stride) / stride
    return parts.permute(3, 5, 0, 1, 2, 4).reshape(h // stride * (w // stride), out, depth * stride * stride)


def singular_values(layer: nn.Module, size: tuple[int, int], whole: bool) -> Tensor:
    """Of the convolution on the torus of its full output, exactly: an SVD of the transfer matrix at every frequency
    (Sedghi et al. 2019). `whole`: with what follows in eval mode, the affine map r and batch norm."""
    conv = layer if isinstance(layer, ConvNorm2d) else layer[0]  # type: ignore[index]
    norm = layer.norm if isinstance(layer, ConvNorm2d) else layer[1]  # type: ignore[index]
    weight = conv.weight.detach().double()
    stride, kernel = conv.stride[0], weight.shape[2]
    torus = size[0] + kernel - 1, size[1] + kernel - 1
    torus = torus[0] - torus[0] % -stride, torus[1] - torus[1] % -stride  # aliases need a multiple of the stride
    scale = torch.ones(len(weight), *torus, dtype=torch.complex128)
    if isinstance(layer, ConvNorm2d):
        half = normkern.preconditioner(weight, torus, eps=layer.eps)
        rows, cols = torch.meshgrid(torch.arange(torus[0]), torch.arange(torus[1]), indexing="ij")
        mirrored = cols > torus[1] // 2
        rows, cols = torch.where(mirrored, -rows % torus[0], rows), torch.where(mirrored, torus[1] - cols, cols)
        scale = scale * half[:, rows, cols]
        if whole and layer.r is not None:
            if stride > 1 and kernel > 1:
                raise ValueError("r runs on the strided map")
            scale = scale * torch.fft.fft2(layer.r.weight.detach().double(), s=torus)[:, 0]
    if whole:
        gain = norm.weight.detach().double() / (norm.running_var.double() + norm.eps).sqrt()
        scale = scale * gain[:, None, None]
    spectrum = torch.fft.fft2(weight, s=torus) * scale[:, None]
    return torch.linalg.svdvals(frequencies(spectrum, stride))


def layers_of(model: ResNet, size: int) -> list[tuple[str, nn.Module, int]]:
    """Name, layer and side of its input, of the 3x3 layers."""
    first, second = model.blocks[0], model.blocks[1]
    half = (size + 1) // 2
    return [
        ("stem 1-16", model.stem, size),
        ("block 1, 16-16 a", first.first, size),  # type: ignore[list-item]
        ("block 1, 16-16 b", first.second, size),  # type: ignore[list-item]
        ("block 2, 16-32 a, stride 2", second.first, size),  # type: ignore[list-item]
        ("block 2, 32-32 b", second.second, half),  # type: ignore[list-item]
    ]


# ---- the GAN


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Linear(LATENT, 64 * 2 * 2)
        self.one = nn.Sequential(nn.Conv2d(64, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.two = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32))
        self.last = nn.Conv2d(32, 1, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        y = F.relu(self.start(z)).reshape(-1, 64, 2, 2)
        y = F.relu(self.one(F.interpolate(y, scale_factor=2)))
        y = F.relu(self.two(F.interpolate(y, scale_factor=2)))
        return torch.sigmoid(self.last(y))


def discriminator(method: str) -> nn.Module:
    def conv(cin: int, cout: int, stride: int) -> nn.Module:
        if method == "ConvNorm":
            return ConvNorm2d(cin, cout, 3, stride, 1, bias=True, affine=False, bn=False)
        return spectral_norm(nn.Conv2d(cin, cout, 3, stride, 1))

    linear = spectral_norm(nn.Linear(64 * 4, 1))
    slope = nn.LeakyReLU(0.1)
    return nn.Sequential(
        conv(1, 16, 1), slope, conv(16, 32, 2), slope, conv(32, 64, 2), slope, nn.Flatten(), linear
    )  # fmt: skip


def train_gan(method: str, data: Images, steps: int, seed: int) -> Generator:
    torch.manual_seed(seed)
    generator, judge = Generator(), discriminator(method)
    make = torch.optim.Adam(generator.parameters(), lr=1e-3, betas=(0.5, 0.9))
    tell = torch.optim.Adam(judge.parameters(), lr=1e-3, betas=(0.5, 0.9))
    for _ in range(steps):
        real = data.x[torch.randint(len(data.x), (BATCH,))]
        fake = generator(torch.randn(BATCH, LATENT))
        tell.zero_grad()
        (F.relu(1 - judge(real)).mean() + F.relu(1 + judge(fake.detach())).mean()).backward()
        tell.step()
        make.zero_grad()
        (-judge(fake).mean()).backward()
        make.step()
    return generator.eval()


def square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a: Tensor, b: Tensor) -> float:
    """The Frechet distance of two normal distributions with the means and covariances of the features a and b."""
    a, b = a.double(), b.double()
    one, two = torch.cov(a.T), torch.cov(b.T)
    root = square_root(one)
    cross = torch.linalg.eigvalsh(root @ two @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + one.trace() + two.trace() - 2 * cross)


# ---- the runs


@dataclass
class Results:
    rows: list[tuple[str, str, str, str, int, float]] = field(default_factory=list)

    def add(self, data: str, method: str, condition: str, metric: str, seed: int, value: float) -> None:
        self.rows.append((data, method, condition, metric, seed, value))

    def summary(self) -> dict[tuple[str, str, str, str], tuple[float, float]]:
        """Mean and standard deviation over seeds."""
        values = defaultdict(list)
        for *key, _, value in self.rows:
            values[tuple(key)].append(value)
        return {
            key: (statistics.mean(v), statistics.stdev(v) if len(v) > 1 else 0.0)  # type: ignore[misc]
            for key, v in values.items()
        }

    def write(self, path: Path) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(("data", "method", "condition", "metric", "seed", "value"))
            writer.writerows((*row[:-1], f"{row[-1]:.5g}") for row in self.rows)


def conditions() -> list[tuple[str, float, float]]:
    """Name, noise, share of the images. The clean run is both the first of the noises and the last of the shares."""
    found = [(f"{noise:.0%} noise", noise, 1.0) for noise in NOISES]
    return found + [(f"{share:.0%} data", 0.0, share) for share in SHARES if share < 1]


def classify(
    data: Images, method: str, name: str, noise: float, share: float, seed: int, steps: int, out: Results
) -> ResNet:
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    model = ResNet(METHODS[method], data.classes)
    x, y = less(data, share)
    train(model, x, mislabeled(y, noise, data.classes, generator), steps, generator)
    out.add(data.name, method, name, "accuracy", seed, accuracy(model, data.test_x, data.test_y))
    if noise == 0 and share == 1:
        for radius in ATTACKS:
            worst = attacked(model, data.test_x, data.test_y, radius, generator)
            out.add(data.name, method, f"PGD-20, {radius:.3f}", "accuracy", seed, accuracy(model, worst, data.test_y))
        for layer_name, layer, size in layers_of(model, data.x.shape[-1]):
            values = singular_values(layer, (size, size), whole=False)
            out.add(data.name, method, layer_name, "spectral norm", seed, float(values.max()))
            out.add(data.name, method, layer_name, "condition number", seed, float(values.max() / values.min()))
            if "stride" not in layer_name:
                values = singular_values(layer, (size, size), whole=True)
                out.add(
                    data.name, method, layer_name, "spectral norm with affine and batch norm", seed, float(values.max())
                )
    return model


def run(arguments: argparse.Namespace, console: Console) -> Results:
    out = Results()
    sets = [digits()]
    extra = None if arguments.quick else textures()
    if extra is not None:
        sets.append(extra)
    elif not arguments.quick:
        console.print("scikit-image is not installed: no textures")
    steps = arguments.epochs * 22
    chosen = conditions()
    columns = (TextColumn("{task.description:44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    total = arguments.seeds * (len(sets) * len(METHODS) * len(chosen) + 2)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=total)
        judge: ResNet | None = None
        for data in sets:
            for seed in range(arguments.seeds):
                for name, noise, share in chosen:
                    for method in METHODS:
                        progress.update(task, description=f"{data.name}, {name}, {method}, seed {seed}")
                        model = classify(data, method, name, noise, share, seed, steps, out)
                        if judge is None:
                            judge = model
                        progress.advance(task)
        assert judge is not None
        gan(sets[0], judge, arguments, out, progress, task)
    return out


def gan(data: Images, judge: ResNet, arguments: argparse.Namespace, out: Results, progress: Any, task: Any) -> None:
    with torch.no_grad():
        real, held = judge.features(data.x), judge.features(data.test_x)
    out.add(data.name, "test images", "GAN", "Frechet distance", 0, frechet(held, real))
    for seed in range(arguments.seeds):
        for method in ("spectral norm", "ConvNorm"):
            progress.update(task, description=f"GAN, {method}, seed {seed}")
            maker = train_gan(method, data, 100 * arguments.epochs, seed)
            with torch.no_grad():
                made = maker(torch.randn(2000, LATENT, generator=torch.Generator().manual_seed(seed)))
                out.add(data.name, method, "GAN", "Frechet distance", seed, frechet(judge.features(made), real))
            progress.advance(task)


# ---- what is shown


def show(out: Results, console: Console) -> None:
    means = out.summary()
    for data in dict.fromkeys(key[0] for key in means):
        for metric in dict.fromkeys(key[3] for key in means if key[0] == data):
            methods = list(dict.fromkeys(key[1] for key in means if (key[0], key[3]) == (data, metric)))
            table = Table(title=f"{data}: {metric}, mean ± standard deviation over seeds", title_justify="left")
            table.add_column("")
            for method in methods:
                table.add_column(method, justify="right")
            for condition in dict.fromkeys(key[2] for key in means if (key[0], key[3]) == (data, metric)):
                cells = []
                for method in methods:
                    found = means.get((data, method, condition, metric))
                    digits = 3 if metric == "accuracy" else 2
                    cells.append("" if found is None else f"{found[0]:.{digits}f} ± {found[1]:.{digits}f}")
                table.add_row(condition, *cells)
            console.print(table)


def figures() -> Any:
    """matplotlib's pyplot, which draws into files; None where it is missing."""
    try:
        import matplotlib  # type: ignore[import-not-found, unused-ignore]

        matplotlib.use("Agg")
        from matplotlib import pyplot  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return None
    return pyplot


def save(out: Results, draw: Callable[[Results, Path], bool], path: Path, console: Console) -> None:
    """The CSV at `path` and the figure beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    out.write(path)
    figure = path.with_suffix(".png")
    console.print(f"written: {path}" + (f", {figure.name}" if draw(out, figure) else " (no matplotlib: no figure)"))


def draw(out: Results, path: Path) -> bool:
    """The figure; False where matplotlib is missing."""
    pyplot = figures()
    if pyplot is None:
        return False
    means = out.summary()
    sets = list(dict.fromkeys(key[0] for key in means))
    figure, axes = pyplot.subplots(len(sets), 4, figsize=(17, 4 * len(sets)), squeeze=False, constrained_layout=True)
    for row, data in zip(axes, sets, strict=True):
        for method in METHODS:

            def line(
                axis: Any, names: list[str], metric: str, ticks: list[str], method: str = method, data: str = data
            ) -> None:
                pairs = [means[data, method, name, metric] for name in names]
                axis.errorbar(
                    range(len(pairs)), [p[0] for p in pairs], [p[1] for p in pairs], marker="o", capsize=3, label=method
                )
                axis.set_xticks(range(len(ticks)), ticks)

            line(row[0], [f"{n:.0%} noise" for n in NOISES], "accuracy", [f"{n:.0%}" for n in NOISES])
            shares = [f"{s:.0%} data" if s < 1 else "0% noise" for s in SHARES]
            line(row[1], shares, "accuracy", [f"{s:.0%}" for s in SHARES])
            attacks = ["0% noise", *(f"PGD-20, {radius:.3f}" for radius in ATTACKS)]
            line(row[2], attacks, "accuracy", ["none", *(f"{radius:.3f}" for radius in ATTACKS)])
            names = [key[2] for key in means if key[0] == data and key[1] == method and key[3] == "spectral norm"]
            line(row[3], names, "spectral norm", [name.replace(", stride 2", "").replace(", ", "\n") for name in names])
        for axis, title in zip(
            row,
            (
                "test accuracy, wrong labels",
                "test accuracy, share of the data",
                "test accuracy, radius of PGD-20",
                "spectral norm of the convolution",
            ),
            strict=True,
        ):
            axis.set_title(f"{data}: {title}")
            axis.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(path, dpi=80)
    return True


def main(given: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="ConvNorm against batch norm and spectral norm on small real images")
    parser.add_argument("--quick", action="store_true", help="digits only, one seed, few epochs: under two minutes")
    parser.add_argument(
        "--out", type=Path, default=Path("examples/results"), help="directory of the CSV and the figure"
    )
    parser.add_argument("--seeds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--epochs", type=int, help="default 6, with --quick 3; an epoch is 22 steps of 64 images")
    arguments = parser.parse_args(given)
    arguments.seeds = arguments.seeds or (1 if arguments.quick else 3)
    arguments.epochs = arguments.epochs or (3 if arguments.quick else 6)
    console = Console()
    out = run(arguments, console)
    show(out, console)
    save(out, draw, arguments.out / "conv_norm.csv", console)


if __name__ == "__main__":
    main()
