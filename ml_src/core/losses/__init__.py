"""What is minimised: `build_loss` turns the `loss:` section of the configuration into a module.

Next to read: `segmentation.py`, which holds the losses.
"""

from torch import nn

from ml_src.core.config import LossConfig
from ml_src.core.losses.segmentation import LOSS_REGISTRY
from ml_src.core.registry import lookup


def build_loss(config: LossConfig) -> nn.Module:
    """Build the loss that `loss.type` names.

    Args:
        config: with class_weights a list or None ("balanced" is resolved before, from the training masks).

    Raises: ConfigError if no such loss is registered, or class_weights is still "balanced".
    """
    return lookup(LOSS_REGISTRY, config.type, "loss.type")(config)
