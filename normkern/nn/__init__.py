"""nn: the stock modules with normkern's forward."""

from normkern.nn.conv import ConvNorm2d
from normkern.nn.convert import convert, register_converter, revert
from normkern.nn.family import (
    EvoNorm2dB0,
    EvoNorm2dS0,
    FilterResponseNorm1d,
    FilterResponseNorm2d,
    FilterResponseNorm3d,
    LpBatchNorm2d,
    NoisyBatchNorm2d,
    PaperBatchNorm2d,
    PaperGroupNorm,
    VarianceNorm1d,
    VarianceNorm2d,
    VarianceNorm3d,
)
from normkern.nn.norm import (
    BatchNorm1d,
    BatchNorm2d,
    BatchNorm3d,
    GroupNorm,
    InstanceNorm1d,
    InstanceNorm2d,
    InstanceNorm3d,
    LayerNorm,
    RMSNorm,
)
from normkern.nn.sync import SyncBatchNorm
from normkern.nn.weights import (
    CenteredConv2d,
    ScaledReLU,
    ScaledWSConv2d,
    WeightNormConv2d,
    WSConv2d,
    standardize_together,
)

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "CenteredConv2d",
    "ConvNorm2d",
    "EvoNorm2dB0",
    "EvoNorm2dS0",
    "FilterResponseNorm1d",
    "FilterResponseNorm2d",
    "FilterResponseNorm3d",
    "GroupNorm",
    "InstanceNorm1d",
    "InstanceNorm2d",
    "InstanceNorm3d",
    "LayerNorm",
    "LpBatchNorm2d",
    "NoisyBatchNorm2d",
    "PaperBatchNorm2d",
    "PaperGroupNorm",
    "RMSNorm",
    "ScaledReLU",
    "ScaledWSConv2d",
    "SyncBatchNorm",
    "VarianceNorm1d",
    "VarianceNorm2d",
    "VarianceNorm3d",
    "WSConv2d",
    "WeightNormConv2d",
    "convert",
    "register_converter",
    "revert",
    "standardize_together",
]
