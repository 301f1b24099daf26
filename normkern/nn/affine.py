"""affine.py: which parameters of a model are the affine parameters (weights and biases) of its norm layers.

Layers are known by their class, whatever a model calls them: torch's norms and normkern's with all their subclasses,
norms of other libraries by the full names of their classes, which are not imported for it, and what users register.
"""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase

from torch import nn
from torch.nn import Parameter

from normkern.nn import family, foreign

logger = logging.getLogger("normkern")

_AFFINE = ("weight", "bias")
_CLASSES = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, family._Channels)

# Full names of classes, with * for any characters, and which of their parameters count; none named: all of their own.
# What a layer learns beside scale and shift (a threshold, an eps, the slope of a gate) is left out.
_NAMED: dict[str, tuple[str, ...]] = {
    "timm.layers.evo_norm.EvoNorm2d*": _AFFINE,
    "timm.layers.filter_response_norm.FilterResponseNorm*": _AFFINE,
    "timm.layers.norm.*Norm*": _AFFINE,
    "timm.layers.norm_act.*Norm*": _AFFINE,
    "timm.layers.inplace_abn.InplaceAbn": _AFFINE,
    "transformers.*RMSNorm": (),
    "transformers.*RMSNormGated": (),
    "transformers.*LayerNorm": (),
    "transformers.*LayerNorm?d": (),
    "diffusers.*RMSNorm": (),
    "diffusers.*RMS_norm": (),
    "diffusers.*LayerNorm": (),
    "apex.normalization.*Fused*Norm": (),
}
_registered: dict[type[nn.Module] | str, tuple[str, ...]] = {}
_mentioned: set[type] = set()


def register_norm(kind: type[nn.Module] | str, *names: str) -> None:
    """Let norm_parameters() (and normkern.optim.SAM) take modules of class `kind` and of its subclasses for norms.

    Args:
        kind: a class, or its full name ("package.module.Class", * for any characters) where that package should not be
            imported for it.
        names: which parameters of the module count; none given, all that it holds itself, not in its children.

    A later registration replaces an earlier or a built-in one. Raises TypeError where `kind` is no nn.Module class and
    no name.
    """
    if not (isinstance(kind, str) or (isinstance(kind, type) and issubclass(kind, nn.Module))):
        raise TypeError(f"register_norm: kind must be a subclass of nn.Module or its full name; got {kind!r}")
    _registered.pop(kind, None)  # the latest comes last
    _registered[kind] = names


def norm_parameters(model: nn.Module) -> list[Parameter]:
    """The affine parameters of all norm layers of the model, each once, in the order of its modules.

    Norms are torch's and normkern's batch, group, layer, instance and RMS norms, every subclass of them, the norms of
    timm, transformers and diffusers, and what register_norm() added. A layer that holds parameters and is called a
    norm without being known is mentioned once in the log ("normkern", level WARNING).

    Raises TypeError where model is no nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"norm_parameters: model must be an nn.Module; got {type(model).__name__}")
    found: dict[Parameter, None] = {}
    for module in model.modules():
        names = _names_of(module)
        if names is None:
            _mention(module)
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None and (not names or name in names):
                found[parameter] = None
    return list(found)


def _names_of(module: nn.Module) -> tuple[str, ...] | None:
    """Which parameters count, () for all of the module's own; None where it is no norm."""
    kinds = type(module).__mro__
    full = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    for kind, names in reversed(_registered.items()):
        if kind in kinds if isinstance(kind, type) else any(fnmatchcase(name, kind) for name in full):
            return names
    if isinstance(module, _CLASSES):
        return _AFFINE
    for pattern, names in _NAMED.items():
        if any(fnmatchcase(name, pattern) for name in full):
            return names
    return () if foreign.converter_of(type(module)) is not None else None


def _mention(module: nn.Module) -> None:
    kind = type(module)
    if "norm" in kind.__name__.lower() and kind not in _mentioned and not kind.__module__.startswith("normkern."):
        holds = [name for name, parameter in module._parameters.items() if parameter is not None]
        if holds and not isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
            _mentioned.add(kind)
            logger.warning(
                "normkern: norm_parameters leaves out %s of %s.%s, which no one registered; see normkern.register_norm",
                ", ".join(holds), kind.__module__, kind.__qualname__,
            )  # fmt: skip
