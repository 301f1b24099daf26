"""probes: what normalization does to a network: activations, gradients, the loss around it, and what theory predicts.

Every probe leaves the model as it was and returns a frozen dataclass with `.to_pandas()` and `.plot()`.
"""

from normkern.probes.activations import Activations, LayerActivity, Recorder, activations, record_activations
from normkern.probes.landscape import (
    CovariateShift,
    Landscape,
    LandscapeStep,
    ShiftedLayer,
    covariate_shift,
    landscape,
)
from normkern.probes.prediction import PredictedLayer, Prediction, predict
from normkern.probes.sharpness import BatchSharpness, Sharpness, sharpness
from normkern.probes.spectrum import (
    LayerNorms,
    SpectralNorms,
    conv_singular_values,
    conv_spectral_norm,
    spectral_norms,
)

__all__ = [
    "Activations",
    "BatchSharpness",
    "CovariateShift",
    "Landscape",
    "LandscapeStep",
    "LayerActivity",
    "LayerNorms",
    "PredictedLayer",
    "Prediction",
    "Recorder",
    "Sharpness",
    "ShiftedLayer",
    "SpectralNorms",
    "activations",
    "conv_singular_values",
    "conv_spectral_norm",
    "covariate_shift",
    "landscape",
    "predict",
    "record_activations",
    "sharpness",
    "spectral_norms",
]
