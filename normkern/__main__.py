"""python -m normkern demo | info."""

from __future__ import annotations

import argparse
import sys

import torch

from normkern.info import info

DTYPES = ("float32", "float64", "float16", "bfloat16")


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
        print(info())
        return
    if (arguments.device or "").startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    demo(arguments)


if __name__ == "__main__":
    main()
