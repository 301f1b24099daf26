"""convert.py: hand a model's norm layers to normkern, and back.

A converted module is the same object with another class: parameters, buffers, hooks, dtype, device, flags and every
reference to it stay as they are, and revert only has to restore the class. Classes are matched exactly, since a
subclass may do more in its forward than its parent; norms of other libraries are known by name (foreign.py) and users
add theirs with register_converter.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, overload

import torch
from torch import nn

from normkern.nn import foreign, fusion, norm
from normkern.nn.fusion import Fused
from normkern.nn.sync import SyncBatchNorm

logger = logging.getLogger("normkern")
M = TypeVar("M", bound=nn.Module)

# What takes the place of a module's class, or why nothing does.
Converter = Callable[[nn.Module], "type[nn.Module] | str"]

_STOCK: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: norm.BatchNorm1d,
    nn.BatchNorm2d: norm.BatchNorm2d,
    nn.BatchNorm3d: norm.BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
    nn.GroupNorm: norm.GroupNorm,
    nn.LayerNorm: norm.LayerNorm,
    nn.RMSNorm: norm.RMSNorm,
    nn.InstanceNorm1d: norm.InstanceNorm1d,
    nn.InstanceNorm2d: norm.InstanceNorm2d,
    nn.InstanceNorm3d: norm.InstanceNorm3d,
}
_OURS = frozenset(_STOCK.values())
_OUR_MODULES = ("normkern.nn.conv", "normkern.nn.family", "normkern.nn.weights")  # layers that torch.nn has not
_BATCH_NORMS = frozenset((norm.BatchNorm1d, norm.BatchNorm2d, norm.BatchNorm3d))
_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)
_converters: dict[type[nn.Module] | str, Converter] = {}
_ORIGINAL = "_normkern_original"  # the attribute with what revert() needs
_ALREADY = "already normkern's"


def full_name(kind: type) -> str:
    """As register_converter takes it."""
    return f"{kind.__module__}.{kind.__qualname__}"


def register_converter(kind: type[nn.Module] | str, fn: Converter) -> None:
    """Let convert() handle modules of class `kind`: a class, or its full name ("package.module.Class") where that
    package should not be imported for it.

    fn(module) returns the class that takes the place of the module's own, or a sentence why not. The module stays the
    object it is, so the new class must find what its forward needs among the attributes that are already there; best
    it is a subclass of `kind` with another forward. A later registration replaces an earlier or a built-in one.

    Raises TypeError where `kind` is no nn.Module class and no name, or fn cannot be called.
    """
    if not (isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, nn.Module))):
        raise TypeError(f"register_converter: kind must be a subclass of nn.Module or its full name; got {kind!r}")
    if not callable(fn):
        raise TypeError(f"register_converter: fn must be callable; got {fn!r}")
    _converters[kind] = fn


# ---- the report


@dataclass(frozen=True)
class Row:
    """One module: its first name in the model, its class, the class it gets (None: it is left alone) and a remark."""

    name: str
    kind: str
    target: str | None
    remark: str = ""


@dataclass(frozen=True)
class Report:
    """What convert() does to a model; print it for a table."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.target is not None)

    @property
    def skipped(self) -> tuple[Row, ...]:
        return tuple(row for row in self.rows if row.target is None)

    def __str__(self) -> str:
        cells = [("module", "class", "becomes", "remark")]
        cells += [(row.name or "(the model)", row.kind, row.target or "-", row.remark) for row in self.rows]
        closing = f"{len(self.converted)} converted, {len(self.skipped)} skipped"
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
            lines = ("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)
            return "\n".join([*lines, closing])
        table = Table(box=box.SIMPLE_HEAD)
        for head in cells[0]:
            table.add_column(head, overflow="fold")
        for row in cells[1:]:
            table.add_row(*row)
        text = io.StringIO()
        Console(file=text, width=120).print(table)
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines() if line.strip()) + f"\n{closing}"


# ---- the swap and its way back


@dataclass(frozen=True)
class _Original:
    """What revert() needs: the class, the class it was given (by name), and attributes that were set on the way."""

    kind: type[nn.Module]
    target: str
    replaced: dict[str, Any]
    added: tuple[str, ...]


def _swap(module: nn.Module, target: type[nn.Module], **attributes: Any) -> None:
    """Give the module another class and attributes; a second swap still reverts to what was before the first."""
    state = module.__dict__
    first: _Original | None = state.get(_ORIGINAL)
    kind = type(module) if first is None else first.kind
    replaced = {} if first is None else dict(first.replaced)
    added = set() if first is None else set(first.added)
    for name in attributes.keys() - replaced.keys() - added:
        if name in state:
            replaced[name] = state[name]
        else:
            added.add(name)
    module.__class__ = target  # raises, before anything else changed, where the layouts of the classes differ
    state.update(attributes)
    state[_ORIGINAL] = _Original(kind, full_name(target), replaced, tuple(sorted(added)))


def revert(model: M) -> M:
    """Undo every convert() of the model, which is returned: classes as before, values bit for bit as they are.

    Raises RuntimeError, before anything changes, where something else (fully_shard, a parametrization) has changed the
    class of a converted module since.
    """
    found = [(name, m) for name, m in model.named_modules() if _ORIGINAL in m.__dict__]
    for name, module in found:
        original: _Original = module.__dict__[_ORIGINAL]
        if full_name(type(module)) != original.target:
            raise RuntimeError(
                f"revert: {name or 'the model'} must be the {original.target} that convert made of it; "
                f"got {full_name(type(module))}"
            )
    for _, module in found:
        original = module.__dict__.pop(_ORIGINAL)
        module.__class__ = original.kind
        module.__dict__.update(original.replaced)
        for attribute in original.added:
            module.__dict__.pop(attribute, None)
    return model


# ---- the decision


@dataclass(frozen=True)
class _Step:
    module: nn.Module
    target: type[nn.Module]
    attributes: dict[str, Any]


def _is_norm(module: nn.Module) -> bool:
    """Something whose absence from a report would surprise."""
    if isinstance(module, _NORMS):
        return True
    if type(module).__module__.startswith("torch.nn.utils"):  # weight_norm and its like
        return False
    name = module.original_name if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
    return "norm" in name.lower() and not any(_is_norm(m) for m in module.modules() if m is not module)


def _target_of(module: nn.Module) -> type[nn.Module] | str | None:
    """The class for a module, why there is none, or None where the module is no norm."""
    kind = type(module)
    fn = _converters.get(kind) or _converters.get(full_name(kind))
    if fn is None and kind in _STOCK:
        fn = _stock
    if fn is None:
        fn = foreign.converter_of(kind)
    if fn is None:
        if kind in _OURS or kind.__module__ in _OUR_MODULES or (_ORIGINAL in module.__dict__ and kind is not Fused):
            return _ALREADY
        return _why_unknown(module) if _is_norm(module) else None
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself"
    return fn(module)


def _stock(module: nn.Module) -> type[nn.Module]:
    return _STOCK[type(module)]


def _why_unknown(module: nn.Module) -> str:
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript"
    if isinstance(module, nn.modules.lazy.LazyModuleMixin):
        return "its size is not known before the first call"
    for stock in _STOCK:
        if isinstance(module, stock):
            return f"a subclass of {stock.__name__} that no converter knows"
    return "no converter knows it"


def _shared_between_processes(module: nn.Module, target: type[nn.Module] | str | None) -> type[nn.Module] | str | None:
    """The target under sync=True: for batch norms, the class that gathers statistics."""
    if target in _BATCH_NORMS or (target == _ALREADY and type(module) in _BATCH_NORMS):
        return SyncBatchNorm
    return foreign.synchronized(module, target) or target


def _plan(model: nn.Module, sync: bool, fuse_act: bool) -> tuple[list[_Step], Report]:
    targets: dict[nn.Module, type[nn.Module] | str] = {}
    for module in model.modules():
        target = _target_of(module)
        if sync:
            target = _shared_between_processes(module, target)
        if target is not None:
            targets[module] = target

    def can_fuse(module: nn.Module) -> bool:
        target = type(module) if targets.get(module) == _ALREADY else targets.get(module)
        return target in _OURS and getattr(module, "act", None) is None

    fusions = fusion.find(model, can_fuse) if fuse_act else fusion.Fusions()
    steps: list[_Step] = []
    rows: list[Row] = []
    for name, module in model.named_modules():
        if module not in targets:
            continue
        target, kind = targets[module], type(module)
        pair = fusions.pairs.get(id(module))
        if target == _ALREADY and pair is not None:
            target = kind
        if isinstance(target, str) or (target is kind and pair is None):
            rows.append(Row(name, _shown(kind), None, target if isinstance(target, str) else _ALREADY))
            continue
        attributes: dict[str, Any] = {"act": getattr(module, "act", None)} if target in _OURS else {}
        remark = f"activation not fused: {fusions.why_not[id(module)]}" if id(module) in fusions.why_not else ""
        if pair is not None:
            attributes["act"], remark = pair.act, f"with {pair.act} from {pair.name}"
            steps.append(_Step(pair.follower, Fused, {}))
        steps.append(_Step(module, target, attributes))
        rows.append(Row(name, _shown(kind), _shown(target), remark))
    return steps, Report(tuple(rows))


def _shown(kind: type) -> str:
    """Short for torch's and normkern's own classes."""
    if kind in _OURS:
        return f"normkern.nn.{kind.__name__}"
    return f"nn.{kind.__name__}" if kind in _STOCK else full_name(kind)


@overload
def convert(model: M, *, sync: bool = False, dry_run: Literal[False] = False, fuse_act: bool = False) -> M: ...
@overload
def convert(model: nn.Module, *, sync: bool = False, dry_run: Literal[True], fuse_act: bool = False) -> Report: ...
def convert(
    model: nn.Module, *, sync: bool = False, dry_run: bool = False, fuse_act: bool = False
) -> nn.Module | Report:
    """Give the norm layers of the model normkern's forward, in place; returns the model.

    Every converted module stays the object it is: parameters and buffers (so optimizers and tied weights), hooks,
    dtype, device, requires_grad and training flags, and the keys of the state dict. Converted are modules whose class
    is exactly one of torch.nn's norms, a norm of timm, transformers or diffusers that normkern knows, or has a
    converter registered; subclasses are not, since their forward may do more.

    Args:
        sync: batch norms gather their statistics from all processes (normkern.nn.SyncBatchNorm).
        dry_run: change nothing and return a Report: print it to see each norm, what becomes of it and, where nothing
            does, why. A conversion logs the same report to the logger "normkern" at level DEBUG.
        fuse_act: an activation module (ReLU, SiLU, GELU, LeakyReLU with slope 0.01) that is proved to follow a norm, as
            its neighbour in an nn.Sequential or in a torch.fx trace of the model, is computed by the norm, and hands
            its input through. The norm's output read in any other way (indexing into the Sequential) is then the
            activated one.

    Raises TypeError where model is no nn.Module. revert() undoes it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"convert: model must be an nn.Module; got {type(model).__name__}")
    steps, report = _plan(model, sync, fuse_act)
    if dry_run:
        return report
    for step in steps:
        _swap(step.module, step.target, **step.attributes)
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("normkern: convert\n%s", report)
    return model
