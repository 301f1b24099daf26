"""result.py: what every probe returns: a frozen dataclass over rows, with `.to_pandas()` and `.plot()`.

pandas and matplotlib are imported where they are used: the probes themselves need neither.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any


class Result(ABC):
    """A frozen dataclass whose `table()` is a sequence of rows, each a dataclass of plain values."""

    @abstractmethod
    def table(self) -> Iterable[Any]:
        """The rows of to_pandas()."""

    @abstractmethod
    def plot(self, ax: Any = None) -> Any:
        """Draw into the matplotlib axes `ax`, or into new ones, and return them. ImportError without matplotlib."""

    def to_pandas(self) -> Any:
        """A pandas DataFrame with a row for every row of table(). ImportError where pandas is missing."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas: pandas is not installed; pip install pandas") from error
        return pandas.DataFrame([dataclasses.asdict(row) for row in self.table()])


def axes(ax: Any, count: int = 1) -> Any:
    """`ax`, or new axes of matplotlib: one, or a list of `count` side by side. Of given axes as many are expected."""
    if ax is not None:
        given = list(ax) if count > 1 else [ax]
        if len(given) != count:
            raise ValueError(f"plot: ax must hold {count} axes; got {len(given)}")
        return given if count > 1 else ax
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError("plot: matplotlib is not installed; pip install matplotlib, or read to_pandas()") from error
    _figure, made = pyplot.subplots(1, count, figsize=(5.0 * count, 3.6), constrained_layout=True)
    return list(made) if count > 1 else made
