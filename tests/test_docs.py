# The documentation's examples run, and so do the README's and the norm that CONTRIBUTING adds.
from __future__ import annotations

import doctest
import re
import textwrap
from pathlib import Path

import pytest
import torch

from normkern import functional, problem

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in sorted((ROOT / "docs").rglob("*.md")) if ">>>" in page.read_text(encoding="utf-8")]
LAYERS = sorted((ROOT / "docs" / "layers").glob("*.md"))

in_sources = pytest.mark.skipif(not PAGES, reason="not in a source tree")


@in_sources
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_examples(page: Path) -> None:
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert found.attempted > 0
    assert found.failed == 0


@in_sources
@pytest.mark.parametrize("page", [p for p in LAYERS if "support" not in p.stem and p.stem != "index"], ids=str)
def test_pages_of_layers_are_whole(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert "$$" in text
    for part in ("## Dtypes, layouts, memory", "## Numerics", "## Example", "## Reference"):
        assert part in text or (page.stem == "instance_norm" and part == "## Numerics")


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a source tree")
def test_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(import torch\n.*?)```", text, re.DOTALL)
    assert example is not None
    exec(compile(example[1], "README.md", "exec"), {})
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert (ROOT / target).exists(), f"README.md links to {target}"


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="not in a source tree")
def test_readme_shows_the_numbers_of_the_results() -> None:
    pytest.importorskip("matplotlib")
    from normkern.bench.report import read, summary

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [line for line in text.splitlines() if re.match(r"\| (\w+_norm[\w+]*, \w+|all) \| \d+ \|", line)]
    lines = summary(read([ROOT / "bench" / "results" / "xeon" / "grid_2_threads.csv"]))
    # Where it differs: python bench/summary.py bench/results/xeon/grid_2_threads.csv, into the README.
    assert shown == [f"| {' | '.join(line)} |" for line in lines]


@pytest.mark.skipif(not (ROOT / "CONTRIBUTING.md").exists(), reason="not in a source tree")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_contributing_adds_a_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = re.findall(
        r"   ```python\n(.*?)\n   ```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL
    )
    for module, name, step in zip((problem, functional), ("pixel", "pixel_norm"), steps, strict=True):
        here = dict(vars(module))
        exec(textwrap.dedent(step), here)
        monkeypatch.setattr(module, name, here[name], raising=False)
    wide = torch.randn(2, 6, 4, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, dtype=torch.float64, requires_grad=True)
    for x, w in (
        (wide, weight),
        (wide.contiguous(memory_format=torch.channels_last), weight),
        (wide[:, ::2], weight[::2]),
    ):
        got = functional.pixel_norm(x, w)  # type: ignore[attr-defined]
        want = x / (x.square().mean(1, keepdim=True) + 1e-8).sqrt() * w.view(1, -1, 1, 1)
        torch.testing.assert_close(got, want)
        dx = (torch.autograd.grad(y.sin().sum(), (wide, weight), retain_graph=True) for y in (got, want))
        torch.testing.assert_close(*dx)
    assert functional.pixel_norm(torch.empty(0, 3, 2, 2)).shape == (0, 3, 2, 2)  # type: ignore[attr-defined]
    with pytest.raises((ValueError, RuntimeError), match="weight"):
        functional.pixel_norm(wide, torch.ones(4))  # type: ignore[attr-defined]
