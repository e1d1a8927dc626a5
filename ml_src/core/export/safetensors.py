"""Writes safetensors: the weights alone, for those who build the network themselves."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import save
from torch import Tensor

from ml_src.core.atomic import replacing
from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable


def export_safetensors(
    exportable: Exportable, path: Path, metadata: Mapping[str, str], precision: Literal["fp32", "fp16"] = "fp32"
) -> None:
    """Write the networks' tensors under the names of their state_dict; of several members behind `0.`, `1.`, ...

    Raises: ConfigError for weights that do not fit into float16.
    """
    networks = exportable.networks
    named = (networks[0] if len(networks) == 1 else networks).state_dict()
    tensors = {name: _stored(name, tensor, precision) for name, tensor in named.items()}
    with replacing(path) as file:
        file.write(save(tensors, dict(metadata)))


def _stored(name: str, tensor: Tensor, precision: str) -> Tensor:
    """Return a tensor of its own memory, as the format demands, in the number type of the file."""
    stored = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    if precision == "fp32" or not stored.is_floating_point():
        return stored
    halved = stored.half()
    if halved.isinf().any() and not stored.isinf().any():
        raise ConfigError(f"--precision fp16 cannot hold {name}, whose values go beyond 65504: use fp32")
    return halved
