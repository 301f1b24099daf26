"""python -m normkern demo | info."""

from __future__ import annotations

import argparse
import importlib
import platform
import shutil
import subprocess
import sys

import torch

import normkern
from normkern.backends import BACKENDS, forced_backend, select

OPS = ("batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm")
DTYPES = ("float32", "float64", "float16", "bfloat16")


def driver() -> str:
    """The NVIDIA driver's version, or that there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return answer.stdout.split("\n")[0].strip() or "nvidia-smi does not answer"


def build_lines() -> list[tuple[str, str]]:
    """What the compiled part knows of itself."""
    try:
        host = importlib.import_module("normkern._host")
    except ImportError as error:
        return [("kernels", f"not built ({error})")]
    build_info = host.build_info
    built = f"{build_info['compiler']}, {build_info['build_type']}, for torch {build_info['torch_target']} and later"
    cuda = f"CUDA {build_info['cuda']} for sm {', '.join(build_info['cuda_architectures'])}"
    sets = ", ".join(build_info["instruction_sets"])
    return [
        ("kernels", built),
        ("CPU kernels", f"{host.cpu_instruction_set()}, chosen from {sets}"),
        ("CUDA kernels", cuda if build_info["cuda"] else "not built"),
    ]


def device_lines() -> list[tuple[str, str]]:
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    lines = [("CPU", f"{platform.machine()}, {capability}, {threads} threads")]
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        chip = f"sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, {gpu.total_memory / 2**30:.0f} GiB"
        lines.append((f"GPU {index}", f"{gpu.name}, {chip}"))
    return lines


def backend_lines(device: str) -> list[str]:
    """For every norm: the backend that a call takes on a device, and why not the others."""
    lines = [f"on {device}"]
    x = torch.empty(8, 8, device=device)
    for op in OPS:
        try:
            taken = select(x).name
        except RuntimeError as error:
            taken = f"none: {error}"
        lines.append(f"  {op:<14} {taken}")
    for name, backend in BACKENDS.items():
        why = backend.why_not(x)
        if why:
            lines.append(f"  not {name}: {why}")
    return lines


def info() -> None:
    """What is installed here and who would compute what."""
    lines = [
        ("normkern", normkern.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none (a CPU build)"),
        ("NVIDIA driver", driver()),
        *build_lines(),
        *device_lines(),
        ("forced backend", forced_backend() or "none"),
    ]
    for name, value in lines:
        print(f"{name:<16} {value}")
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        print("\n".join(["", *backend_lines(device)]))


def demo(arguments: argparse.Namespace) -> None:
    try:
        from normkern.demo import run
    except ModuleNotFoundError as missing:
        needed = {"rich": "rich", "sklearn": "scikit-learn"}.get((missing.name or "").partition(".")[0])
        if needed is None:
            raise
        sys.exit(f"the demo needs {needed}, which is not installed: pip install 'normkern[demo]'")
    run(arguments.epochs, arguments.quick, arguments.device, getattr(torch, arguments.dtype))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m normkern", description="normalization kernels for PyTorch")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | info")
    shown = commands.add_parser("demo", help="train with torch's norms and with these, then compare every norm")
    shown.add_argument("--epochs", type=int, help="epochs of each training (default 8, with --quick 2)")
    shown.add_argument("--quick", action="store_true", help="everything smaller: a few seconds")
    shown.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    shown.add_argument("--dtype", choices=DTYPES, default="float32", help="of the norms compared (default float32)")
    commands.add_parser("info", help="what is installed, and which backend each norm takes and why")
    arguments = parser.parse_args()
    if arguments.command == "info":
        info()
        return
    if (arguments.device or "").startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    demo(arguments)


if __name__ == "__main__":
    main()
