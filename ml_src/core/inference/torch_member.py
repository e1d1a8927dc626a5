"""A checkpoint as a member: its network in PyTorch. The only file of this package that imports torch."""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.profiler import profile

from ml_src.core.checkpoint import load_checkpoint, load_weights
from ml_src.core.config_file import parse_config
from ml_src.core.device import choose_device
from ml_src.core.errors import ConfigError
from ml_src.core.export.graph import Padding, find_padding
from ml_src.core.inference.members import Member
from ml_src.core.network import build_model
from ml_src.core.network.custom import pad_edges
from ml_src.core.plugins import check_plugins, import_plugins
from ml_src.core.tasks.segmentation import Segmentation


@dataclass(frozen=True, kw_only=True)
class TorchMember(Member):
    """A network on its device, in evaluation mode."""

    network: nn.Module
    device: torch.device
    precision_word: str = "auto"  # or float32

    @cached_property
    def data(self) -> Segmentation:
        return Segmentation(self.config)

    @property
    def precision(self) -> str:
        return str(self.amp_dtype or torch.float32).removeprefix("torch.")

    @property
    def amp_dtype(self) -> torch.dtype | None:
        """The 16-bit type that it computes in: that of mixed-precision training, where the device is fast in it."""
        if self.precision_word == "float32" or self.config.training.trainer_type != "mixed_precision":
            return None
        if self.device.type == "cpu":
            return torch.bfloat16 if fast_bfloat16() else None
        return torch.bfloat16 if self.device.type != "cuda" else getattr(torch, self.config.training.amp_dtype)

    def _logits(self, images: Tensor) -> Tensor:
        """What the network says; of one that has failed, for it takes multiples only, with its images enlarged."""
        if "padding" not in vars(self):
            try:
                return self.network(images)  # type: ignore[no-any-return]
            except torch.OutOfMemoryError:
                raise
            except Exception:  # each network has its own
                if self.padding == (1, 1):
                    raise
        logits: Tensor = self.network(pad_edges(images, *self.padding))
        return logits[..., : images.shape[-2], : images.shape[-1]]

    @cached_property
    def padding(self) -> Padding:
        """What the network needs its images to be multiples of, as far as that can be found out."""
        try:
            return find_padding(self.network, self.config.model.in_channels, self.config.data.num_classes)
        except ConfigError:  # images of one size, which may be that of these
            return Padding(1, 1)

    @torch.inference_mode()
    def probabilities(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        images = torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2)
        return np.asarray(self.softmax(self.data.normalize(images, self.device)).cpu().numpy())

    def softmax(self, images: Tensor) -> Tensor:
        """Return probabilities (N, C, H, W) float32 of normalised images (N, channels, H, W) on its device."""
        context: AbstractContextManager[Any] = nullcontext()
        if self.amp_dtype is not None:
            context = torch.autocast(self.device.type, dtype=self.amp_dtype)
        with context:
            logits = self._logits(images)
        return logits.float().softmax(dim=1)

    def peak(self, work: Callable[[], object]) -> int:
        return torch_peak(work)


def torch_peak(work: Callable[[], object]) -> int:
    """Return the bytes of host memory that torch holds at most during some work, above what it held before.

    Its own record of blocks is read, not the process: it also counts what oneDNN rearranges inside a convolution, and
    neither holes nor libraries that are being loaded.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler would write to stderr that it starts
    with profile(profile_memory=True) as profiler:
        work()
    assert profiler.kineto_results is not None
    events = [
        event
        for event in profiler.kineto_results.events()
        if event.name() == "[memory]" and event.device_type().name == "CPU"
    ]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def fast_bfloat16() -> bool:
    """Whether this CPU has instructions for bfloat16; without them it would be slower than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def open_checkpoint(
    path: Path,
    device: str,
    plugins: Sequence[str],
    overrides: Mapping[str, Any],
    precision: str,
    compiled: bool,
) -> TorchMember:
    """Open a checkpoint; the rest is as in `members.open_member`."""
    place = choose_device(device)
    contents = load_checkpoint(path, place)
    config = parse_config(contents["config"], dict(overrides), source=str(path))
    check_plugins(config.plugins, plugins, path)
    import_plugins(plugins)
    network = build_model(config.model)
    load_weights(network, contents["model_state_dict"], path)
    member = TorchMember(
        path=path, config=config, network=placed(network, place), device=place, precision_word=precision
    )
    return replace(member, network=cast(nn.Module, torch.compile(member.network))) if compiled else member


def placed(network: nn.Module, device: torch.device) -> nn.Module:
    """Put a network where it predicts. Channels-last is how images are read, and what CPUs and GPUs are faster in."""
    return network.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload, no-any-return]
