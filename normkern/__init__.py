"""normkern: normalization for PyTorch, with one read of the data and no error that grows with the mean."""

from normkern import nn, probes
from normkern.backends import use_backend
from normkern.conv_norm import conv_norm, preconditioner
from normkern.explain import explain
from normkern.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_norm,
    group_norm,
    instance_norm,
    layer_norm,
    moments,
    rms_norm,
)
from normkern.nn.conv import convert_conv_norm
from normkern.nn.convert import convert, register_converter, revert
from normkern.running import frozen_running_stats

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_norm",
    "conv_norm",
    "convert",
    "convert_conv_norm",
    "explain",
    "frozen_running_stats",
    "group_norm",
    "instance_norm",
    "layer_norm",
    "moments",
    "nn",
    "preconditioner",
    "probes",
    "register_converter",
    "revert",
    "rms_norm",
    "use_backend",
]
