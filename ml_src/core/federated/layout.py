"""What of a network crosses: its parameters and its running statistics, each as one flat array.

One array is one object on Flower's wire instead of hundreds, and both sides know its length beforehand.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

Flat = NDArray[np.float32]
Arrays = dict[str, Flat]


@dataclass(frozen=True)
class Layout:
    """Names and shapes, in the order of the network. Counters, such as num_batches_tracked, never leave a site."""

    parameters: dict[str, torch.Size]
    buffers: dict[str, torch.Size]
    of_batch_norm: frozenset[str]  # the names, among both, that a site does not take over under FedBN

    @classmethod
    def of(cls, network: nn.Module) -> "Layout":
        """Return that of a network."""
        kept = [
            f"{path}.{name}" if path else name
            for path, layer in network.named_modules()
            if isinstance(layer, nn.modules.batchnorm._BatchNorm)
            for name in layer.state_dict()
        ]
        return cls(
            {name: p.shape for name, p in network.named_parameters()},
            {name: b.shape for name, b in network.named_buffers() if b.is_floating_point()},
            frozenset(kept),
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Length of the flat array of each kind."""
        return {
            "parameters": sum(shape.numel() for shape in self.parameters.values()),
            "buffers": sum(shape.numel() for shape in self.buffers.values()),
        }

    def flatten(self, network: nn.Module) -> Arrays:
        """Return copies of both kinds: `parameters` and `buffers`, (number of values,) float32 each."""
        found = dict(network.named_parameters()) | dict(network.named_buffers())
        return {kind: _joined([found[name] for name in names]) for kind, names in self._kinds().items()}

    @torch.no_grad()
    def load(self, network: nn.Module, flat: Mapping[str, Flat], keep: Collection[str] = ()) -> None:
        """Put flat arrays into a network, but for the names in `keep`."""
        found = dict(network.named_parameters()) | dict(network.named_buffers())
        for kind, shapes in self._kinds().items():
            for name, values in self.named(kind, flat[kind]).items():
                if name not in keep:
                    found[name].copy_(torch.from_numpy(values).view(shapes[name]))

    def named(self, kind: str, flat: Flat) -> Arrays:
        """Divide a flat array into those of the names of a kind; views of it."""
        shapes = self._kinds()[kind]
        ends = np.cumsum([shape.numel() for shape in shapes.values()])[:-1]
        pieces = np.split(flat, ends) if shapes else []
        return {name: piece.reshape(shape) for (name, shape), piece in zip(shapes.items(), pieces, strict=True)}

    def joined(self, kind: str, arrays: Mapping[str, Flat]) -> Flat:
        """Undo `named`."""
        parts = [np.asarray(arrays[name], np.float32).ravel() for name in self._kinds()[kind]]
        return np.concatenate(parts) if parts else np.zeros(0, np.float32)

    def _kinds(self) -> dict[str, dict[str, torch.Size]]:
        return {"parameters": self.parameters, "buffers": self.buffers}


def _joined(tensors: list[Tensor]) -> Flat:
    parts = [tensor.detach().float().cpu().contiguous().numpy().ravel() for tensor in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
