# A training step with SAM-ON against plain SGD and SAM of all parameters, ours and pytorch_optimizer's where that is
# installed: time, and memory kept between the passes.
#   python bench/bench_sam.py [--quick] [--threads 1] [--csv FILE]
#
# A small ResNet with batch norm and a small vision transformer, every rival with a copy of its own, steps in turn. One
# thread and process CPU time by default, so that a busy machine changes little; ratios are of medians over the rounds.
from __future__ import annotations

import argparse
import copy
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent.parent / "examples")]

from models import ResNet, ViT  # noqa: E402

from normkern.bench.sheet import Row, Sheet, device_name  # noqa: E402
from normkern.optim import SAM  # noqa: E402

NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet-14 with batch norm, 32-64-128 channels": (lambda: ResNet(2, (32, 64, 128), 10), (32, 3, 32, 32)),
    "ViT, 6 layers of width 192, patches of 4": (lambda: ViT(32, 4, 192, 6, 3, 10), (32, 3, 32, 32)),
}
RIVALS = {"SGD": None, "SAM-ON": "norm", "SAM-no-norm": "no_norm", "SAM-all": "all"}
OTHER = "pytorch_optimizer's SAM"  # of all parameters, where it is installed
BASE = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 5e-4}


def stepper(model: nn.Module, perturb: str | None, x: Tensor, y: Tensor) -> tuple[Callable[[], None], SAM | None]:
    base = torch.optim.SGD(model.parameters(), **BASE)
    sam = None if perturb is None else SAM(model, base, rho=0.1, perturb=perturb)  # type: ignore[arg-type]

    def closure() -> Tensor:
        base.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        if sam is None:
            closure()
            base.step()
        else:
            sam.step(closure)

    return step, sam


def kept_bytes(sam: SAM, model: nn.Module, x: Tensor, y: Tensor) -> int:
    """What is held while the weights are perturbed, beside what is held before and after."""
    with sam.first_pass():
        F.cross_entropy(model(x), y).backward()
    sam.first_step(zero_grad=True)
    assert sam._saved is not None
    kept = sum(t.untyped_storage().nbytes() for t in sam._saved[1])
    sam.restore()
    return kept


def other_stepper(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Callable[[], None], int]:
    """A step of pytorch_optimizer's SAM, and the bytes that it keeps."""
    import pytorch_optimizer

    sam = pytorch_optimizer.SAM(model.parameters(), torch.optim.SGD, rho=0.1, **BASE)

    def closure() -> Tensor:
        sam.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    def step() -> None:
        closure()
        sam.step(closure)

    closure()
    sam.first_step()
    kept = sum(state["old_p"].nbytes for state in sam.state.values() if "old_p" in state)
    sam.second_step()
    return step, kept


def main() -> None:
    parser = argparse.ArgumentParser(description="Steps of SGD, SAM-ON and SAM on the CPU")
    parser.add_argument("--quick", action="store_true", help="5 rounds instead of 15")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sheet, rounds = Sheet(arguments.csv), 5 if arguments.quick else 15
    print("| network | rival | CPU ms of a step | SGD = 1 | kept between the passes, of the parameters |")
    print("|---|---|---:|---:|---:|")
    for network, (make, shape) in NETWORKS.items():
        torch.manual_seed(0)
        original, x, y = make(), torch.randn(shape), torch.arange(shape[0]) % 10
        size = sum(p.numel() * p.element_size() for p in original.parameters())
        steps, kept = {}, {}
        for name, perturb in RIVALS.items():
            model = copy.deepcopy(original)
            steps[name], sam = stepper(model, perturb, x, y)
            kept[name] = 0 if sam is None else kept_bytes(sam, model, x, y)
        if importlib.util.find_spec("pytorch_optimizer"):
            steps[OTHER], kept[OTHER] = other_stepper(copy.deepcopy(original), x, y)
        else:
            print("not here: pytorch_optimizer is not installed", file=sys.stderr)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(-2, rounds):
            for name in [*steps][number % len(steps) :] + [*steps][: number % len(steps)]:
                start = time.process_time_ns()
                steps[name]()
                if number >= 0:
                    times[name].append((time.process_time_ns() - start) * 1e-6)
        sgd = statistics.median(times["SGD"])
        for name, values in times.items():
            middle = statistics.median(values)
            low, high = (sorted(values)[round(q * (len(values) - 1))] for q in (0.2, 0.8))
            for metric, found in (("cpu_ms", (low, middle, high)), ("kept_bytes", (float(kept[name]),) * 3)):
                row = Row("training step", name, "", metric, "network", network, *found)
                row.dtype, row.device = "float32", device_name(torch.device("cpu"))
                if name == OTHER:
                    row.provider_version = importlib.metadata.version("pytorch_optimizer")
                if metric == "cpu_ms":
                    row.ratio_to_torch = sgd / middle
                else:
                    row.bytes = size
                sheet.add(row)
            print(f"| {network} | {name} | {middle:.1f} | {middle / sgd:.2f} | {kept[name] / size:.2%} |", flush=True)


if __name__ == "__main__":
    main()
