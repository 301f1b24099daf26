"""normkern: normalization for PyTorch, with one read of the data and no error that grows with the mean."""

from normkern import nn, optim, probes
from normkern.autocast import keep_half
from normkern.backends import use_backend
from normkern.conv_norm import conv_norm, preconditioner
from normkern.explain import explain
from normkern.functional import (
    add_layer_norm,
    add_rms_norm,
    batch_noise,
    batch_norm,
    evo_norm_b0,
    evo_norm_s0,
    filter_response_norm,
    group_norm,
    instance_norm,
    layer_norm,
    lp_batch_norm,
    moments,
    paper_group_norm,
    rms_norm,
    scaled_relu,
    variance_norm,
    weight_center,
    weight_norm,
    weight_standardize,
    weight_standardize_all,
)
from normkern.nn.affine import norm_parameters, register_norm
from normkern.nn.conv import convert_conv_norm
from normkern.nn.convert import convert, register_converter, revert
from normkern.running import frozen_running_stats

__version__ = "0.1.0"

__all__ = [
    "add_layer_norm",
    "add_rms_norm",
    "batch_noise",
    "batch_norm",
    "conv_norm",
    "convert",
    "convert_conv_norm",
    "evo_norm_b0",
    "evo_norm_s0",
    "explain",
    "filter_response_norm",
    "frozen_running_stats",
    "group_norm",
    "instance_norm",
    "keep_half",
    "layer_norm",
    "lp_batch_norm",
    "moments",
    "nn",
    "norm_parameters",
    "optim",
    "paper_group_norm",
    "preconditioner",
    "probes",
    "register_converter",
    "register_norm",
    "revert",
    "rms_norm",
    "scaled_relu",
    "use_backend",
    "variance_norm",
    "weight_center",
    "weight_norm",
    "weight_standardize",
    "weight_standardize_all",
]
