"""info.py: what is installed, what the kernels were built for, and which backend each norm takes here."""

from __future__ import annotations

import importlib
import platform
import shutil
import subprocess

import torch

import normkern
from normkern import direct
from normkern.backends import forced_backend

# What each norm is asked about, with an input of shape (2, 8, 8, 8).
CALLS: dict[str, tuple[object, ...]] = {
    "batch_norm": (None, None, None, None, True),
    "group_norm": (4,),
    "layer_norm": ((8,),),
    "instance_norm": (),
    "rms_norm": ((8,),),
}


def driver() -> str:
    """The NVIDIA driver's version, or that there is none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "none found"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi does not answer ({type(error).__name__})"
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
        ("autograd node", direct.node_why_not or f"for torch {build_info['torch']}"),
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
    """For every norm: the backend that a call takes on a device; then why not the others."""
    x = torch.empty(2, 8, 8, 8, device=device)
    found = {op: normkern.explain(op, x, *arguments) for op, arguments in CALLS.items()}
    reasons = dict.fromkeys(reason for one in found.values() for reason in one.why_not.items())
    return [
        f"on {device}",
        *(f"  {op:<14} {one.backend or 'none'}" for op, one in found.items()),
        *(f"  not {name}: {why}" for name, why in reasons),
    ]


def info() -> str:
    """What is installed here and who would compute what."""
    forced = forced_backend()
    lines = [
        ("normkern", normkern.__version__),
        ("Python", platform.python_version()),
        ("torch", torch.__version__),
        ("CUDA of torch", torch.version.cuda or "none (a CPU build)"),
        ("NVIDIA driver", driver()),
        *build_lines(),
        *device_lines(),
        ("forced backend", "none" if forced is None else forced.name),
    ]
    text = [f"{name:<16} {value}" for name, value in lines]
    for device in ["cpu"] + (["cuda"] if torch.cuda.is_available() else []):
        text += ["", *backend_lines(device)]
    return "\n".join(text)
