"""Writes TorchScript: the same graph for programs that have torch, in C++ too, but not this package."""

import copy
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ml_src.core.atomic import replacing
from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Exportable


def export_torchscript(exportable: Exportable, path: Path, metadata: Mapping[str, str]) -> None:
    """Write the graph as one TorchScript file, whole or not at all; the metadata are its extra files.

    `torch.jit.load(path)` gives a module that takes and returns what `Exportable` does.
    Raises: ConfigError for a network that cannot be traced for any size.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing and of its being deprecated: we compare what comes out
        traced = [_traced(exportable, index) for index in range(len(exportable.paddings))]
        whole = copy.copy(exportable)
        whole._modules = {**exportable._modules, "networks": nn.ModuleList(traced)}
        scripted = torch.jit.script(whole)
        contents = io.BytesIO()
        torch.jit.save(scripted, contents, _extra_files=dict(metadata))
    with replacing(path) as file:
        file.write(contents.getbuffer())


@torch.no_grad()
def _traced(exportable: Exportable, index: int) -> nn.Module:
    """Return a member as a trace, which is seen to do the same with images of another size."""
    network, example = exportable.networks[index], exportable.example(index)
    traced: nn.Module = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
    other = example[:1] if exportable.size else torch.cat([example, example], dim=3)[:1]
    if not _agree(network, traced, other):
        size = "any size" if exportable.size is None else "{} x {}".format(*exportable.size)
        raise ConfigError(
            f"{type(network).__name__} cannot be exported to TorchScript for images of {size}, because what it does "
            "depends on the size: give --input_size H,W"
        )
    return traced


def _agree(network: nn.Module, traced: nn.Module, images: Tensor) -> bool:
    expected = network(images)
    try:
        found = traced(images)
    except RuntimeError:
        return False
    return found.shape == expected.shape and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
