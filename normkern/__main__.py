"""python -m normkern info | demo | bench | report | explain."""

from __future__ import annotations

import sys


def main() -> None:
    try:
        from normkern.cli import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich", "rich.console"):
            raise
        if sys.argv[1:] == ["info"]:  # what a report of a problem begins with must need nothing
            from normkern.info import info

            print(info())
            return
        sys.exit(
            f"the command line needs {missing.name.partition('.')[0]}, which is not installed: "
            "pip install 'normkern[cli]' (only `python -m normkern info` works without it)"
        )
    app(prog_name="python -m normkern")


if __name__ == "__main__":
    main()
