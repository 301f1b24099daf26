"""optim: sharpness-aware minimization, of the norm layers or of more."""

from normkern.optim.sam import SAM

__all__ = ["SAM"]
