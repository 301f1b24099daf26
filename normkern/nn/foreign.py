"""foreign.py: norm classes of timm, transformers and diffusers, with normkern's forward.

None of these packages is imported: a class is known by its full name, or because its forward is, instruction for
instruction, that of a class known by name (transformers copies its RMS norms from model to model). Before a module is
converted, both forwards see one small random input and must agree, so that a later version of such a package that
changes a forward makes a line in the report and no silent error.

Half-precision results are rounded once, after the weight, where some of these classes round before it as well; results
have the dtype that the original's have.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normkern import functional as F
from normkern.nn import norm, sync
from normkern.nn.fusion import act_of

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Rule:
    """The forward that takes over, sizes of an input to try it on, its twin for sync=True, and an objection."""

    forward: Callable[..., Any]
    sample: Callable[[Any], tuple[int, ...]]
    synchronized: Callable[..., Any] | None = None
    why_not: Callable[[Any], str | None] | None = None


# ---- forwards; `self` is a module of the other library


def _followers(self: nn.Module) -> tuple[str | None, tuple[nn.Module, ...]]:
    """The activation to fuse, and the modules to call after the norm: timm's drop and act, BiT's activation."""
    found = [m for m in map(self._modules.get, ("drop", "act", "activation")) if m is not None]
    after = tuple(m for m in found if type(m) is not nn.Identity)
    if len(after) == 1 and (act := act_of(after[0])) is not None:
        return act, ()
    return None, after


def _follow(y: Tensor, after: tuple[nn.Module, ...]) -> Tensor:
    for module in after:
        y = module(y)
    return y


def _layer_norm(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, act=act), after)


def _layer_norm_2d(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    y = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, self.weight, self.bias, self.eps, act=act)
    return _follow(y.permute(0, 3, 1, 2), after)


def _layer_norm_either(self: Any, features: Tensor) -> Tensor:
    """ConvNeXt of transformers: the layout is an attribute."""
    return (_layer_norm_2d if self.data_format == "channels_first" else _layer_norm)(self, features)


def _group_norm(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, act=act), after)


def _batch_norm(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(norm.normalize_batch(self, x, act=act), after)


def _sync_batch_norm(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(sync.normalize_batch(self, x, act=act), after)


def _frozen_batch_norm(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=1e-5)


def _wide(x: Tensor, weight: Tensor | None) -> Tensor:
    """x in the dtype that x times the weight has in torch."""
    return x if weight is None else x.to(torch.promote_types(x.dtype, weight.dtype))


def _rms_norm(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(F.rms_norm(_wide(x, self.weight), self.normalized_shape, self.weight, self.eps, act=act), after)


def _rms_norm_2d(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    y = F.rms_norm(_wide(x.permute(0, 2, 3, 1), self.weight), self.normalized_shape, self.weight, self.eps, act=act)
    return _follow(y.permute(0, 3, 1, 2), after)


def _rms_norm_fp32(self: Any, x: Tensor) -> Tensor:
    """As _rms_norm, with x's own dtype at the end."""
    act, after = _followers(self)
    return _follow(F.rms_norm(x, self.normalized_shape, self.weight, self.eps, act=act), after)


def _llama(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(_wide(hidden_states, self.weight), self.weight.shape, self.weight, self.variance_epsilon)


def _t5(self: Any, hidden_states: Tensor) -> Tensor:
    y = _llama(self, hidden_states)
    return y.to(self.weight.dtype) if self.weight.dtype in _HALVES else y


def _gpt_oss(self: Any, hidden_states: Tensor) -> Tensor:
    return F.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)


def _gemma(self: Any, x: Tensor) -> Tensor:
    # In float32 at least: 1 + weight in half precision would round small weights away.
    weight = 1.0 + self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
    return F.rms_norm(x, weight.shape, weight, self.eps)


def _moshi(self: Any, x: Tensor) -> Tensor:
    weight = getattr(self, "weight", None)
    return F.rms_norm(x, x.shape[-1:], weight, self.eps)


def _diffusers_rms(self: Any, hidden_states: Tensor) -> Tensor:
    weight = self.weight
    y = F.rms_norm(_wide(hidden_states, weight), hidden_states.shape[-1:], weight, self.eps)
    if weight is None:
        return y
    y = y.to(weight.dtype) if weight.dtype in _HALVES else y
    return y if self.bias is None else y + self.bias


def _wan(self: Any, x: Tensor) -> Tensor:
    """The RMS norm of video autoencoders, written as a unit vector times sqrt(channels): no eps, a norm of at least
    1e-12."""
    dim = 1 if self.channel_first else -1
    channels = x.shape[dim]
    x = _wide(x, self.gamma).movedim(dim, -1)
    y = F.rms_norm(x, (channels,), self.gamma.reshape(channels), 1e-24 / channels).movedim(-1, dim)
    return y if isinstance(self.bias, float) else y + self.bias


def _response_tlu(self: Any, x: Tensor) -> Tensor:
    return F.filter_response_norm(x, self.weight, self.bias, self.tau, self.eps)


def _response(self: Any, x: Tensor) -> Tensor:
    act, after = _followers(self)
    return _follow(F.filter_response_norm(x, self.weight, self.bias, None, self.eps, act=act), after)


def _evo_norm_s0(self: Any, x: Tensor) -> Tensor:
    return F.evo_norm_s0(x, self.groups, self.weight, self.bias, self.v, self.eps)


def _evo_norm_b0(self: Any, x: Tensor) -> Tensor:
    return F.evo_norm_b0(x, self.running_var, self.weight, self.bias, self.v, self.training, self.momentum, self.eps)


def _standardized_conv(self: Any, x: Tensor) -> Tensor:
    return self._conv_forward(x, F.weight_standardize(self.weight, None, self.eps), self.bias)  # type: ignore[no-any-return]


def _scaled_standardized_conv(self: Any, x: Tensor) -> Tensor:
    weight = F.weight_standardize(self.weight, self.gain * self.scale, self.eps)
    return self._conv_forward(x, weight, self.bias)  # type: ignore[no-any-return]


# ---- which class has which


def _rows(self: Any) -> tuple[int, ...]:
    return 2, 3, *self.normalized_shape


def _weighted_rows(self: Any) -> tuple[int, ...]:
    return 2, 3, *(self.weight.shape if getattr(self, "weight", None) is not None else (8,))


def _image(self: Any) -> tuple[int, ...]:
    return 2, self.normalized_shape[0], 3, 2


def _either(self: Any) -> tuple[int, ...]:
    return _image(self) if self.data_format == "channels_first" else (2, 3, 2, *self.normalized_shape)


def _channels(self: Any) -> tuple[int, ...]:
    return 2, getattr(self, "num_channels", None) or self.running_mean.shape[0], 3, 2


def _weighted_image(self: Any) -> tuple[int, ...]:
    return 2, self.weight.shape[0], 3, 2


def _under_kernel(self: Any) -> tuple[int, ...]:
    return 2, self.in_channels, *(d * (k - 1) + 2 for d, k in zip(self.dilation, self.kernel_size, strict=True))


def _wan_sample(self: Any) -> tuple[int, ...]:
    return (
        (2, *self.gamma.shape[:1], *[3] * (self.gamma.dim() - 1)) if self.channel_first else (2, 3, *self.gamma.shape)
    )


def _one_dimension(self: Any) -> str | None:
    weight = getattr(self, "weight", None)
    return None if weight is None or weight.dim() == 1 else "it normalizes over one dimension with weights for several"


def _one_normalized(self: Any) -> str | None:
    return None if len(self.normalized_shape) == 1 else "it normalizes over several dimensions"


_LAYER, _LAYER_2D = Rule(_layer_norm, _rows), Rule(_layer_norm_2d, _image, why_not=_one_normalized)
_WEIGHTED: dict[str, Any] = {"sample": _weighted_rows, "why_not": _one_dimension}
_RMS, _RMS_2D = Rule(_rms_norm, _rows), Rule(_rms_norm_2d, _image)
_GROUP = Rule(_group_norm, _channels)
_BATCH = Rule(_batch_norm, _channels, synchronized=_sync_batch_norm)
_WAN = Rule(_wan, _wan_sample)

BY_NAME: dict[str, Rule] = {
    **{f"timm.layers.norm.{name}": _LAYER for name in ("LayerNorm", "LayerNormFp32")},
    **{f"timm.layers.norm.{name}": _LAYER_2D for name in ("LayerNorm2d", "LayerNorm2dFp32", "LayerNormExp2d")},
    **{f"timm.layers.norm.{name}": _GROUP for name in ("GroupNorm", "GroupNorm1")},
    "timm.layers.norm.RmsNorm": _RMS,
    "timm.layers.norm.RmsNormFp32": Rule(_rms_norm_fp32, _rows),
    "timm.layers.norm.RmsNorm2d": _RMS_2D,
    **{f"timm.layers.norm_act.{name}": _LAYER for name in ("LayerNormAct", "LayerNormActFp32")},
    **{f"timm.layers.norm_act.{name}": _LAYER_2D for name in ("LayerNormAct2d", "LayerNormAct2dFp32")},
    **{f"timm.layers.norm_act.{name}": _GROUP for name in ("GroupNormAct", "GroupNorm1Act")},
    "timm.layers.norm_act.BatchNormAct2d": _BATCH,
    "timm.layers.filter_response_norm.FilterResponseNormTlu2d": Rule(_response_tlu, _weighted_image),
    "timm.layers.filter_response_norm.FilterResponseNormAct2d": Rule(_response, _weighted_image),
    **{f"timm.layers.evo_norm.{name}": Rule(_evo_norm_s0, _weighted_image) for name in ("EvoNorm2dS0", "EvoNorm2dS0a")},
    "timm.layers.evo_norm.EvoNorm2dB0": Rule(_evo_norm_b0, _weighted_image),
    "timm.layers.std_conv.StdConv2d": Rule(_standardized_conv, _under_kernel),
    "timm.layers.std_conv.ScaledStdConv2d": Rule(_scaled_standardized_conv, _under_kernel),
    "timm.layers.norm_act.RmsNormAct": _RMS,
    "timm.layers.norm_act.RmsNormAct2d": _RMS_2D,
    "transformers.models.bit.modeling_bit.BitGroupNormActivation": _GROUP,
    "diffusers.models.normalization.FP32LayerNorm": _LAYER,
    "diffusers.models.normalization.RMSNorm": Rule(_diffusers_rms, **_WEIGHTED),
}
# Classes that stand for their copies in the same package.
ALIKE: dict[str, Rule] = {
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": Rule(_llama, **_WEIGHTED),
    "transformers.models.t5.modeling_t5.T5LayerNorm": Rule(_t5, **_WEIGHTED),
    "transformers.models.gpt_oss.modeling_gpt_oss.GptOssRMSNorm": Rule(
        _gpt_oss, _weighted_rows, why_not=_one_dimension
    ),
    "transformers.models.gemma.modeling_gemma.GemmaRMSNorm": Rule(_gemma, **_WEIGHTED),
    "transformers.models.gemma3n.modeling_gemma3n.Gemma3nRMSNorm": Rule(_moshi, **_WEIGHTED),
    "transformers.models.moshi.modeling_moshi.MoshiRMSNorm": Rule(_moshi, **_WEIGHTED),
    "transformers.models.llama4.modeling_llama4.Llama4TextL2Norm": Rule(_moshi, _weighted_rows),
    "transformers.models.convnext.modeling_convnext.ConvNextLayerNorm": Rule(
        _layer_norm_either, _either, why_not=_one_normalized
    ),
    "transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d": Rule(_frozen_batch_norm, _channels),
    "diffusers.models.autoencoders.autoencoder_kl_wan.WanRMS_norm": Rule(_wan, _wan_sample),
    "diffusers.pipelines.wuerstchen.modeling_wuerstchen_common.WuerstchenLayerNorm": _LAYER_2D,
}


# ---- finding the rule of a class


def converter_of(kind: type[nn.Module]) -> Callable[[nn.Module], type[nn.Module] | str] | None:
    """How modules of this class are converted, or None where the class is unknown."""
    rule = _rule_of(kind)  # type: ignore[arg-type]
    return None if rule is None else functools.partial(_convert, rule)


@functools.lru_cache(maxsize=1024)
def _rule_of(kind: Any) -> Rule | None:
    name = f"{kind.__module__}.{kind.__qualname__}"
    if name in BY_NAME:
        return BY_NAME[name]
    package = name.partition(".")[0]
    for known, rule in ALIKE.items():
        if known.partition(".")[0] != package or package not in sys.modules:
            continue
        if name == known or ((model := _loaded(known)) is not None and _same_code(kind, model)):
            return rule
    return None


def _loaded(name: str) -> type | None:
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception:  # a model of a package that is there may need another package that is not
        return None
    return found if isinstance(found, type) else None


def _same_code(kind: type, model: type) -> bool:
    """Both classes compute the same, as far as their own code goes: equal instructions in equal methods."""
    methods = [name for name in ("forward", "_norm") if name in vars(model)]
    return kind.__bases__ == model.__bases__ and all(
        name in vars(kind) and _instructions(vars(kind)[name]) == _instructions(vars(model)[name]) for name in methods
    )


def _instructions(function: Any) -> list[tuple[str, Any]] | None:
    """What a function does, whatever its arguments and variables are called."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return None
    return [(i.opname, i.arg if "FAST" in i.opname else i.argval) for i in dis.get_instructions(code)]


def _convert(rule: Rule, module: nn.Module) -> type[nn.Module] | str:
    why = rule.why_not(module) if rule.why_not is not None else None
    return why or _disagreement(rule, module) or overlay(type(module), rule.forward)  # type: ignore[arg-type]


def synchronized(module: nn.Module, target: type[nn.Module] | str | None) -> type[nn.Module] | None:
    """The class that shares batch statistics between processes, for a module that is converted already or by now."""
    kind = target if isinstance(target, type) else type(module)
    if not issubclass(kind, Overlaid):
        return None
    rule = _rule_of(kind.original)  # type: ignore[arg-type]
    return None if rule is None or rule.synchronized is None else overlay(kind.original, rule.synchronized)  # type: ignore[arg-type]


# ---- trying a rule


def _disagreement(rule: Rule, module: nn.Module) -> str | None:
    """None where the two forwards agree on a small sample in evaluation mode and float32, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    twin = _twin(module, generator)
    try:
        with torch.no_grad():
            x = torch.randn(rule.sample(twin), generator=generator, device="cpu", dtype=torch.float32)
            theirs = twin(x.clone())  # some activations work in place
            ours = rule.forward(twin, x)
    except Exception as error:
        return f"could not be tried on a sample: {type(error).__name__}: {error}"
    if ours.shape != theirs.shape or not torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5):
        return "computes something else than the version that normkern knows"
    return None


def _twin(module: nn.Module, generator: torch.Generator) -> nn.Module:
    """A module of the same class and attributes, without hooks, with random values on the CPU."""
    twin: nn.Module = object.__new__(type(module))
    fresh = nn.Module()
    twin.__dict__.update(module.__dict__)
    twin.__dict__.update({k: v for k, v in fresh.__dict__.items() if k.endswith("hooks")})
    twin.__dict__["training"] = False
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: _randomized(t, generator) for name, t in module.__dict__[kind].items()}
    twin.__dict__["_modules"] = {name: m and _twin(m, generator) for name, m in module._modules.items()}
    return twin


def _randomized(t: Tensor | None, generator: torch.Generator) -> Tensor | None:
    if t is None:
        return None
    if not t.is_floating_point():
        return torch.zeros(t.shape, dtype=t.dtype, device="cpu")
    return torch.rand(t.shape, generator=generator, device="cpu", dtype=torch.float32) + 0.5


# ---- a class of the other library with another forward


class Overlaid:
    """Mark of the classes that `overlay` makes, which can be pickled and copied."""

    original: type[nn.Module]
    forward: Callable[..., Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _revive, (self.original, vars(type(self))["forward"]), self.__dict__


@functools.lru_cache(maxsize=1024)
def overlay(kind: Any, forward: Callable[..., Any]) -> type[nn.Module]:
    """A subclass of `kind` with this forward."""
    members = {"forward": forward, "original": kind, "__module__": __name__, "__doc__": kind.__doc__}
    return type(f"Normkern{kind.__name__}", (Overlaid, kind), members)


def _revive(kind: type[nn.Module], forward: Callable[..., Any]) -> nn.Module:
    module: nn.Module = object.__new__(overlay(kind, forward))  # type: ignore[arg-type]
    return module
