"""From the config's `model:` section to a network. Next to read: `custom.py`."""

import math

from torch import nn

from ml_src.core.config import ModelConfig
from ml_src.core.errors import ConfigError
from ml_src.core.network.custom import MODEL_REGISTRY
from ml_src.core.registry import lookup


def build_model(config: ModelConfig) -> nn.Module:
    """Build the network that `config` names, with fresh weights from torch's global generator.

    Raises: ConfigError for an unknown architecture, or one that refuses the section's values.
    """
    architecture = lookup(MODEL_REGISTRY, config.custom_architecture, "model.custom_architecture")
    arguments = config.model_dump(exclude={"type", "custom_architecture", "norm"})
    try:
        network = architecture(**arguments)
    except TypeError as error:
        raise ConfigError(
            f"model.custom_architecture {config.custom_architecture!r} cannot be built from {sorted(arguments)}: "
            f"{error}; give its __init__ a **kwargs for what it does not use"
        ) from error
    return group_normalised(network) if config.norm == "group" else network


def group_normalised(network: nn.Module) -> nn.Module:
    """Replace every batch normalisation by a group normalisation, which looks at one image at a time.

    Up to 32 groups (Wu and He 2018), fewer where the channels cannot be divided so; weights start at 1 and 0.
    """
    if isinstance(network, nn.modules.batchnorm._BatchNorm):
        channels = network.num_features
        return nn.GroupNorm(math.gcd(32, channels), channels, eps=network.eps, affine=network.affine)
    for name, child in network.named_children():
        setattr(network, name, group_normalised(child))
    return network
