# Malformed calls: each raises the exception type that torch.nn.functional raises for the same call, with a message that
# names function, fact and value, and changes nothing.
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import normkern
import normkern.nn


@dataclass(frozen=True)
class Bad:
    """A call that must fail. `torch_type` is for the few calls where torch's own type is an accident of its Python."""

    op: str
    arguments: Callable[[], dict[str, Any]]
    says: tuple[str, ...]
    torch_type: type[Exception] | None = field(default=None)
    ours: type[Exception] | None = None  # where torch has no such argument, or accepts the call


def image(*shape: int) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape)


def running(**changes: Any) -> dict[str, Any]:
    return {"running_mean": torch.zeros(6), "running_var": torch.ones(6), **changes}


X = image(2, 6, 4, 4)
W5, W6, W61 = torch.ones(5), torch.ones(6), torch.ones(6, 1)
META = torch.ones(6, device="meta")
LEARNED = torch.zeros(6, requires_grad=True)


def bad(op: str, *says: str, torch_type: Any = None, ours: Any = None, **arguments: Any) -> Bad:
    arguments.setdefault("input", X)
    return Bad(op, lambda: arguments, says, torch_type, ours)


def bad_group(*says: str, **arguments: Any) -> Bad:
    return bad("group_norm", *says, **{"num_groups": 2, **arguments})


def bad_layer(*says: str, **arguments: Any) -> Bad:
    return bad("layer_norm", *says, **{"normalized_shape": (4,), **arguments})


def bad_rms(*says: str, **arguments: Any) -> Bad:
    return bad("rms_norm", *says, **{"normalized_shape": (4,), **arguments})


def bad_batch(*says: str, **arguments: Any) -> Bad:
    return bad("batch_norm", *says, **running(**arguments))


def bad_instance(*says: str, **arguments: Any) -> Bad:
    return bad("instance_norm", *says, **arguments)


GROUP = [
    bad_group("num_groups must divide the channels", "num_groups=4", "(2, 6, 4, 4)", num_groups=4),
    bad_group("num_groups must divide the channels", "num_groups=12", num_groups=12),
    bad_group("num_groups must be positive", "num_groups=-2", num_groups=-2),
    bad_group("num_groups must be positive", "num_groups=0", num_groups=0, torch_type=ZeroDivisionError),
    bad_group("num_groups must be an int", "2.0", num_groups=2.0),
    bad_group("num_groups must be an int", "'2'", num_groups="2"),
    bad_group("num_groups must be an int", "None", num_groups=None),
    bad_group("num_groups must be an int", "True", num_groups=True),
    bad_group("weight must have shape (6,)", "(5,)", "(2, 6, 4, 4)", weight=W5),
    bad_group("weight must have shape (6,)", "(6, 1)", weight=W61),
    bad_group("bias must have shape (6,)", "(5,)", weight=W6, bias=W5),
    bad_group("weight must be a Tensor", "list", weight=[1.0] * 6),
    bad_group("bias must be a Tensor", "str", bias="b"),
    bad_group("weight must be float64", "torch.int64", weight=W6.long()),
    bad_group("weight must be on the device of input", "meta", "cpu", weight=META),
    bad_group("input must be float64", "torch.int64", input=X.long()),
    bad_group("input must be float64", "torch.bool", input=X.bool()),
    bad_group("input must be float64", "torch.complex64", input=X.to(torch.complex64)),
    bad_group("input must have at least 2 dimensions", "(6,)", input=image(6)),
    bad_group("input must have at least 2 dimensions", "()", input=image()),
    bad_group("Expected more than 1 value per channel", "[1, 6, 1, 1]", input=image(1, 6, 1, 1), num_groups=6),
    bad_group("Expected more than 1 value per channel", "[1, 6]", input=image(1, 6), num_groups=6),
    bad_group("eps must be a float", "'a'", eps="a"),
    bad_group("eps must be a float", "None", eps=None),
    bad_group("input must be a strided tensor", "torch.sparse_coo", input=X.to_sparse()),
]
LAYER = [
    bad_layer("normalized_shape must be the last dimensions", "(5,)", "(2, 6, 4, 4)", normalized_shape=(5,)),
    bad_layer("normalized_shape must be the last", "(2, 2, 6, 4, 4)", normalized_shape=(2, 2, 6, 4, 4)),
    bad_layer("normalized_shape must be the last dimensions", "(-1,)", normalized_shape=(-1,)),
    bad_layer("normalized_shape must be a tuple or list of ints", "4", normalized_shape=4),
    bad_layer("normalized_shape must be a tuple or list of ints", "'4'", normalized_shape="4"),
    bad_layer("normalized_shape must be a tuple or list of ints", "None", normalized_shape=None),
    bad_layer("normalized_shape must hold ints", "(4.0,)", normalized_shape=(4.0,)),
    bad_layer("normalized_shape must have at least one dimension", "()", normalized_shape=()),
    bad_layer("weight must have shape (4,)", "(5,)", weight=W5),
    bad_layer("weight must have shape (4, 4)", "(16,)", normalized_shape=(4, 4), weight=torch.ones(16)),
    bad_layer("bias must have shape (4,)", "(3,)", bias=torch.ones(3)),
    bad_layer("weight must be on the device of input", "meta", weight=META[:4]),
    bad_layer("weight must be float64", "torch.int64", weight=torch.ones(4).long()),
    bad_layer("input must be float64", "torch.int64", input=X.long()),
    bad_layer("input must be a Tensor", "list", input=[1.0]),
    bad_layer("normalized_shape must be the last", "()", "(1,)", input=image(), normalized_shape=(1,)),
    bad_layer("eps must be a float", "'a'", eps="a"),
    bad_layer("eps must be a float", "None", eps=None),
]
RMS = [
    bad_rms("normalized_shape must be the last dimensions", "(5,)", "(2, 6, 4, 4)", normalized_shape=(5,)),
    bad_rms("normalized_shape must be the last", "(2, 2, 6, 4, 4)", normalized_shape=(2, 2, 6, 4, 4)),
    bad_rms("normalized_shape must be a tuple or list of ints", "4", normalized_shape=4),
    bad_rms("normalized_shape must hold ints", "(4.0,)", normalized_shape=(4.0,)),
    bad_rms("normalized_shape must have at least one dimension", "()", normalized_shape=()),
    bad_rms("normalized_shape must be the last", "(1,)", input=image(), normalized_shape=(1,)),
    bad_rms("weight must have shape (4,)", "(5,)", weight=W5),
    bad_rms("weight must be on the device of input", "meta", weight=META[:4]),
    bad_rms("weight must be float64", "torch.int64", weight=torch.ones(4).long(), ours=RuntimeError),
    bad_rms("input must be float64", "torch.int64", input=X.long()),
    bad_rms("input must be a Tensor", "list", input=[1.0]),
    bad_rms("eps must be a float", "'a'", eps="a"),
]
BATCH = [
    bad_batch("running_mean must be given where training=False", running_mean=None, running_var=None),
    bad_batch("running_var must be given where training=False", running_var=None),
    bad_batch("must both be given or both be None", "no running_var", running_var=None, training=True),
    bad_batch("must both be given or both be None", "no running_mean", running_mean=None, training=True),
    bad_batch("running_mean must have shape (6,)", "(5,)", running_mean=W5),
    bad_batch("running_mean must have shape (6,)", "(6, 1)", running_mean=W61),
    bad_batch("running_var must have shape (6,)", "(5,)", running_var=W5, training=True),
    bad_batch("running_mean must be a Tensor", "list", running_mean=[0.0] * 6),
    bad_batch("running_mean must be float64", "torch.int64", running_mean=W6.long(), training=True),
    bad_batch("running_mean must not require gradients", "True", running_mean=LEARNED),
    bad_batch("running_mean must not require gradients", "True", running_mean=LEARNED, training=True),
    bad_batch("weight must have shape (6,)", "(5,)", weight=W5, training=True),
    bad_batch("bias must have shape (6,)", "(5,)", weight=W6, bias=W5, training=True),
    bad_batch("weight must be on the device of input", "meta", weight=META, training=True),
    bad_batch("eps must be positive in training", "0.0", eps=0.0, training=True),
    bad_batch("eps must be positive in training", "-1.0", eps=-1.0, training=True),
    bad_batch("eps must be at least 0", "-1.0", eps=-1.0),
    bad_batch("eps must be a float", "'a'", eps="a"),
    bad_batch("eps must be a float", "None", eps=None),
    bad_batch("momentum must be a float", "None", momentum=None, training=True),
    bad_batch("momentum must be a float", "'a'", momentum="a"),
    bad_batch("training must be a bool", "'yes'", training="yes"),
    bad_batch("training must be a bool", "1", training=1),
    bad_batch("Expected more than 1 value per channel", "[1, 6, 1, 1]", input=image(1, 6, 1, 1), training=True),
    bad_batch("Expected more than 1 value per channel", "[1, 6]", input=image(1, 6), training=True),
    bad_batch("input must have at least 2 dimensions", "(6,)", input=image(6)),
    bad_batch("input must be float64", "torch.int64", input=X.long(), training=True),
]
INSTANCE = [
    bad_instance("Expected more than 1 spatial element", "[2, 6, 1, 1]", input=image(2, 6, 1, 1)),
    bad_instance("Expected more than 1 spatial element", "[6, 4]", input=image(6, 4)),
    bad_instance("input must have at least 2", "(6,)", input=image(6), use_input_stats=False, **running()),
    bad_instance("running_mean must be given where use_input_stats=False", use_input_stats=False),
    bad_instance("running_var must be given where", running_mean=torch.zeros(6), use_input_stats=False),
    bad_instance("must both be given or both be None", running_mean=torch.zeros(6)),
    bad_instance("running_mean must have shape (6,)", "(5,)", **running(running_mean=W5)),
    bad_instance("running_var must have shape (6,)", "(5,)", **running(running_var=W5)),
    bad_instance("running_mean must not require gradients", **running(running_mean=LEARNED)),
    bad_instance("weight must have shape (6,)", "(5,)", weight=W5),
    bad_instance("weight must have shape (6,)", "(6, 1)", weight=W61),
    bad_instance("bias must have shape (6,)", "(5,)", weight=W6, bias=W5),
    bad_instance("momentum must be a float", "None", momentum=None),
    bad_instance("eps must be a float", "'a'", eps="a"),
    bad_instance("use_input_stats must be a bool", "'yes'", use_input_stats="yes"),
    bad_instance("input must be float64", "torch.int64", input=X.long()),
]
# Torch has nothing to compare with here, or reaches its type by accident: a list has no .dim().
OWN = [
    bad_group("input must be a Tensor", "list", input=[1.0, 2.0], torch_type=AttributeError, ours=TypeError),
    bad_batch("input must be a Tensor", "list", input=[1.0], torch_type=AttributeError, ours=TypeError, training=True),
    bad_group("residual must have the shape of input", "(2, 6, 4, 5)", residual=image(2, 6, 4, 5), ours=ValueError),
    bad_layer("residual must have the dtype of input", "torch.float64", residual=X.double(), ours=ValueError),
    bad_batch("residual must be a Tensor", "float", residual=1.0, training=True, ours=TypeError),
    bad_instance("act must be one of None, relu, silu, gelu, leaky_relu", "'tanh'", act="tanh", ours=ValueError),
    bad_rms("act must be a string or None", act=F.relu, ours=TypeError),
    bad("add_layer_norm", "residual must be", "None", residual=None, normalized_shape=(4,), ours=TypeError),
    bad("add_rms_norm", "residual must have the shape", residual=X[:1], normalized_shape=(4,), ours=ValueError),
    bad("moments", "dim must be in -4 to 3", "dim=4", dim=4, ours=IndexError),
    bad("moments", "dim must not name a dimension twice", "(0, -4)", dim=(0, -4), ours=RuntimeError),
    bad("moments", "dim must be an int", "1.0", dim=1.0, ours=TypeError),
]
# Extras of ours, on every norm: what follows the affine step.
for make in (bad_group, bad_layer, bad_rms, bad_batch, bad_instance):
    OWN += [
        make("residual must have the shape of input", "(2, 6, 4, 1)", residual=image(2, 6, 4, 1), ours=ValueError),
        make("residual must have the dtype of input", "torch.float16", residual=X.half(), ours=ValueError),
        make("residual must be on the device of input", "meta", residual=X.to("meta"), ours=RuntimeError),
        make("residual must be a Tensor", "list", residual=[0.0], ours=TypeError),
        make("act must be one of None, relu, silu, gelu, leaky_relu", "'RELU'", act="RELU", ours=ValueError),
        make("act must be a string or None", "1", act=1, ours=TypeError),
    ]
for make in (bad_batch, bad_instance):
    OWN += [
        make("skip_nonfinite must be a bool", "1", skip_nonfinite=1, ours=TypeError),
        make("running_mean must be on the device", **running(running_mean=META), ours=RuntimeError),
        make("running_var must not require gradients", **running(running_var=LEARNED), ours=RuntimeError),
    ]
for op in ("add_layer_norm", "add_rms_norm"):
    OWN += [
        bad(op, "normalized_shape must be the last", "(5,)", residual=X, normalized_shape=(5,), ours=RuntimeError),
        bad(op, "normalized_shape must hold ints", residual=X, normalized_shape=(4.0,), ours=TypeError),
        bad(op, "residual must have the dtype", residual=X.double(), normalized_shape=(4,), ours=ValueError),
        bad(
            op,
            "input must be float64",
            "int64",
            input=X.long(),
            residual=X,
            normalized_shape=(4,),
            ours=NotImplementedError,
        ),
        bad(op, "weight must have shape (4,)", residual=X, normalized_shape=(4,), weight=W5, ours=RuntimeError),
        bad(op, "eps must be a float", residual=X, normalized_shape=(4,), eps="a", ours=TypeError),
    ]
OWN += [
    bad("moments", "input must be a Tensor", "int", input=1, dim=0, ours=TypeError),
    bad("moments", "input must be float64", "torch.int64", input=X.long(), dim=0, ours=NotImplementedError),
    bad("moments", "dim must be in -4 to 3", "dim=-5", dim=(0, -5), ours=IndexError),
    bad("moments", "dim must be an int", "None", dim=None, ours=TypeError),
    bad("moments", "dim must be in -1 to 0", "dim=1", input=image(), dim=1, ours=IndexError),
]
TABLE = [*GROUP, *LAYER, *RMS, *BATCH, *INSTANCE]


def error_of(call: Callable[[], Any]) -> Exception | None:
    try:
        call()
    except Exception as error:  # the type is what is under test
        return error
    return None


def name_of(case: Bad) -> str:
    return f"{case.op}-{case.says[0]}-{case.says[-1]}".replace(" ", "_")


@pytest.mark.parametrize("case", TABLE + OWN, ids=name_of)
def test_message_and_no_trace(case: Bad) -> None:
    arguments = case.arguments()
    tensors = {k: (t, t.detach().clone(), t._version) for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    error = error_of(lambda: getattr(normkern, case.op)(**arguments))
    assert error is not None, "the call must fail"
    message = str(error)
    assert message.startswith(f"{case.op}: "), message
    for part in case.says:
        assert part in message
    for t, before, version in tensors.values():
        assert t._version == version
        if t.device.type == "cpu" and t.layout is torch.strided:
            assert torch.equal(t, before)


@pytest.mark.parametrize("case", TABLE, ids=name_of)
def test_type_is_torchs(case: Bad) -> None:
    arguments = case.arguments()
    mine = error_of(lambda: getattr(normkern, case.op)(**arguments))
    if case.ours is not None:
        assert type(mine) is case.ours
        return
    theirs = error_of(lambda: getattr(F, case.op)(**arguments))
    if case.torch_type is not None:
        assert type(theirs) is case.torch_type
        assert type(mine) is RuntimeError
        return
    assert type(mine) is type(theirs)


@pytest.mark.parametrize("case", OWN, ids=name_of)
def test_own_types(case: Bad) -> None:
    mine = error_of(lambda: getattr(normkern, case.op)(**case.arguments()))
    assert type(mine) is case.ours
    if case.torch_type is not None:
        assert type(error_of(lambda: getattr(F, case.op)(**case.arguments()))) is case.torch_type


def test_the_table_is_large_and_has_every_norm() -> None:
    assert len(TABLE) + len(OWN) + len(MODULE_CALLS) >= 150
    assert {case.op for case in TABLE} == {"batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm"}


@pytest.mark.parametrize("case", TABLE + OWN, ids=name_of)
def test_no_error_hides_behind_a_recognized_call(case: Bad) -> None:
    """Right calls of the same norms came before, and small calls like them are recognized (normkern/direct.py)."""
    for _ in range(2):
        for f in (normkern.batch_norm, normkern.instance_norm):
            f(X, torch.zeros(6), torch.ones(6), W6, W6)
        normkern.batch_norm(X, torch.zeros(6), torch.ones(6), W6, W6, True)
        normkern.instance_norm(X)
        normkern.group_norm(X, 2, W6, W6)
        normkern.layer_norm(X, (4,))
        normkern.rms_norm(X, (4,))
    again = error_of(lambda: getattr(normkern, case.op)(**case.arguments()))
    assert again is not None
    for part in case.says:
        assert part in str(again)


def call_module(name: str, *arguments: Any, on: torch.Tensor | None = None, **options: Any) -> Callable[[Any], Any]:
    """Make the layer of that name in torch.nn or normkern.nn, and call it, if `on` is given."""

    def call(layers: Any) -> Any:
        layer = getattr(layers, name)(*arguments, **options)
        return layer if on is None else layer(on)

    return call


# The same mistake with the stock layer raises the same type.
MODULE_CALLS = {
    "BatchNorm1d on 4-D": call_module("BatchNorm1d", 6, on=X),
    "BatchNorm2d on 3-D": call_module("BatchNorm2d", 6, on=X[0]),
    "BatchNorm3d on 4-D": call_module("BatchNorm3d", 6, on=X),
    "BatchNorm2d of other channels": call_module("BatchNorm2d", 5, on=X),
    "BatchNorm2d without weights, of other channels": call_module("BatchNorm2d", 5, on=X, affine=False),
    "BatchNorm1d on one value": call_module("BatchNorm1d", 6, on=image(1, 6)),
    "BatchNorm2d of ints": call_module("BatchNorm2d", 6, on=X.long()),
    "BatchNorm2d of negative size": call_module("BatchNorm2d", -1),
    "BatchNorm2d unknown keyword": call_module("BatchNorm2d", 6, nonsense=1),
    "InstanceNorm1d on 4-D": call_module("InstanceNorm1d", 6, on=X),
    "InstanceNorm2d on 2-D": call_module("InstanceNorm2d", 6, on=X[0, 0]),
    "InstanceNorm3d on 3-D": call_module("InstanceNorm3d", 6, on=X[0]),
    "InstanceNorm2d of other channels": call_module("InstanceNorm2d", 5, affine=True, on=X),
    "InstanceNorm2d on one element": call_module("InstanceNorm2d", 6, on=image(2, 6, 1, 1)),
    "GroupNorm that does not divide": call_module("GroupNorm", 4, 6),
    "GroupNorm of other channels": call_module("GroupNorm", 2, 8, on=X),
    "GroupNorm without a size": call_module("GroupNorm", 2),
    "GroupNorm of ints": call_module("GroupNorm", 2, 6, affine=False, on=X.long()),
    "LayerNorm of another width": call_module("LayerNorm", 5, on=X),
    "LayerNorm of more dimensions": call_module("LayerNorm", (1, 2, 6, 4, 4), on=X),
    "LayerNorm of a float": call_module("LayerNorm", 4.5),
    "RMSNorm of another width": call_module("RMSNorm", 5, on=X),
    "RMSNorm of ints": call_module("RMSNorm", 4, on=X.long()),
}


@pytest.mark.parametrize("name", MODULE_CALLS)
def test_modules(name: str) -> None:
    call = MODULE_CALLS[name]
    theirs, mine = error_of(lambda: call(torch.nn)), error_of(lambda: call(normkern.nn))
    assert theirs is not None
    assert type(mine) is type(theirs), mine


def test_a_failed_module_call_counts_no_batch() -> None:
    layer = normkern.nn.BatchNorm2d(6)
    before = {k: v.clone() for k, v in layer.state_dict().items()}
    for bad_input in (X[0], X.long(), image(1, 6, 1, 1), image(2, 5, 4, 4)):
        assert error_of(lambda bad_input=bad_input: layer(bad_input)) is not None
    assert error_of(lambda: layer(X, residual=X[:1])) is not None
    assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


OPERATOR_CALLS = {
    "channels": (torch.zeros(6), torch.ones(6), torch.zeros(7).double(), torch.zeros(7).double(), 4, 0.1),
    "moments apart": (torch.zeros(6), torch.ones(6), torch.zeros(12).double(), torch.zeros(6).double(), 4, 0.1),
    "var of another size": (torch.zeros(6), torch.ones(5), torch.zeros(6).double(), torch.zeros(6).double(), 4, 0.1),
    "float32 moments": (torch.zeros(6), torch.ones(6), torch.zeros(6), torch.zeros(6), 4, 0.1),
    "integers": (W6.long(), torch.ones(6), torch.zeros(6).double(), torch.zeros(6).double(), 4, 0.1),
    "strided": (torch.zeros(12)[::2], torch.ones(6), torch.zeros(6).double(), torch.zeros(6).double(), 4, 0.1),
    "no moments": (torch.zeros(6), torch.ones(6), torch.zeros(0).double(), torch.zeros(0).double(), 4, 0.1),
    "one value": (torch.zeros(6), torch.ones(6), torch.zeros(6).double(), torch.zeros(6).double(), 1, 0.1),
}


@pytest.mark.skipif(not hasattr(torch.ops.normkern, "update_running"), reason="the compiled library is not there")
@pytest.mark.parametrize("name", OPERATOR_CALLS)
def test_update_running_guards_memory(name: str) -> None:
    arguments = OPERATOR_CALLS[name]
    before = [t.clone() for t in arguments[:4]]  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="normkern: "):
        torch.ops.normkern.update_running(*arguments)
    for t, was in zip(arguments[:4], before, strict=True):
        assert torch.equal(t, was)  # type: ignore[arg-type]


BATCH_CALLS = {
    "channels": {"running_var": torch.ones(7)},
    "extents": {"channels": [1, 4, 7, 4]},
    "integers": {"running_mean": W6.long()},
    "strided": {"running_mean": torch.zeros(12)[::2]},
    "one value": {"x": torch.ones(1, 6), "channels": [1, 1, 6, 1]},
    "residual": {"residual": torch.ones(4, 6)},
    "weight": {"weight": torch.ones(5)},
    "act": {"act": 9},
}


@pytest.mark.skipif(not hasattr(torch.ops.normkern, "batch_forward"), reason="the compiled library is not there")
@pytest.mark.parametrize("name", BATCH_CALLS)
def test_batch_forward_guards_memory(name: str) -> None:
    arguments = {"x": torch.randn(4, 6, 4), "weight": None, "bias": None, "residual": None, "act": 0, "eps": 1e-5}
    arguments |= {"running_mean": torch.zeros(6), "running_var": torch.ones(6), "channels": [1, 4, 6, 4]}
    arguments |= {"momentum": 0.1, **BATCH_CALLS[name]}
    before = {k: t.clone() for k, t in arguments.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(RuntimeError, match="normkern: "):
        torch.ops.normkern.batch_forward(**arguments)
    for k, was in before.items():
        assert torch.equal(arguments[k], was), k  # type: ignore[arg-type]


@pytest.mark.parametrize("op", ["batch_norm", "group_norm", "layer_norm", "instance_norm", "rms_norm"])
def test_signature_is_torchs(op: str) -> None:
    """Names, order and defaults; our extras are keyword-only."""

    def positional(function: Callable[..., Any]) -> list[tuple[str, Any]]:
        every = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in every if p.kind is p.POSITIONAL_OR_KEYWORD]

    assert positional(getattr(normkern, op)) == positional(getattr(F, op))
    keyword_only = {
        p.name for p in inspect.signature(getattr(normkern, op)).parameters.values() if p.kind is p.KEYWORD_ONLY
    }
    tracks = op in ("batch_norm", "instance_norm")
    assert keyword_only == {"residual", "act"} | ({"skip_nonfinite"} if tracks else set())


@pytest.mark.parametrize("op", ["batch_norm", "instance_norm"])
def test_running_statistics_survive_a_failed_call(op: str) -> None:
    mean, var = torch.full((6,), 3.0), torch.full((6,), 7.0)
    extra = {"training": True} if op == "batch_norm" else {"use_input_stats": True}
    for wrong in ({"weight": W5}, {"act": "tanh"}, {"residual": X[:1]}, {"input": image(1, 6, 1, 1)}):
        with pytest.raises((RuntimeError, ValueError)):
            getattr(normkern, op)(**{"input": X, "running_mean": mean, "running_var": var, **extra, **wrong})
    # The second of the two cannot be written, so the first must not be either.
    locked = torch.tensor([7.0]).expand(6)
    with pytest.raises(RuntimeError):
        getattr(normkern, op)(X, mean, locked, **extra)
    assert torch.equal(mean, torch.full((6,), 3.0))
    assert torch.equal(var, torch.full((6,), 7.0))
    getattr(normkern, op)(X, mean, var, **extra)
    assert not torch.equal(mean, torch.full((6,), 3.0))
    assert not torch.equal(var, torch.full((6,), 7.0))


def test_a_module_counts_no_failed_batch() -> None:
    norm = normkern.nn.BatchNorm2d(6)
    for wrong in (image(1, 6, 1, 1), image(2, 5, 4, 4)):
        with pytest.raises((RuntimeError, ValueError)):
            norm(wrong)
    assert norm.num_batches_tracked == 0
    norm(X)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize(
    ("name", "arguments", "shape"),
    [
        ("BatchNorm1d", (6,), (2, 6, 4, 4)),
        ("BatchNorm2d", (6,), (2, 6)),
        ("BatchNorm3d", (6,), (2, 6, 4, 4)),
        ("InstanceNorm1d", (6,), (2, 6, 4, 4)),
        ("InstanceNorm2d", (6,), (2, 6)),
        ("InstanceNorm3d", (6,), (2, 6, 4)),
        ("InstanceNorm2d", (6, 1e-5, 0.1, True), (2, 5, 4, 4)),
        ("GroupNorm", (2, 6), (2, 8, 4)),
        ("LayerNorm", (6,), (2, 5)),
        ("RMSNorm", (6,), (2, 5)),
    ],
)
def test_modules_raise_torchs_types(name: str, arguments: tuple[Any, ...], shape: tuple[int, ...]) -> None:
    x = image(*shape)
    mine = error_of(lambda: getattr(normkern.nn, name)(*arguments)(x))
    theirs = error_of(lambda: getattr(torch.nn, name)(*arguments)(x))
    assert theirs is not None
    assert type(mine) is type(theirs)


def test_modules_check_act_when_they_are_made() -> None:
    with pytest.raises(ValueError, match=r"GroupNorm: act must be one of .*; got 'swish'"):
        normkern.nn.GroupNorm(2, 6, act="swish")
