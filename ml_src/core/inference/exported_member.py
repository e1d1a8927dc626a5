"""A file that ml-export wrote as a member: its engine computes, and nothing of torch is imported."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.output_folder import digest_of
from ml_src.core.config_file import parse_config
from ml_src.core.errors import ConfigError
from ml_src.core.export.runtime import Exported, open_exported
from ml_src.core.inference.members import Intake, Member
from ml_src.core.inference.memory import peak_of_process
from ml_src.core.postprocess_specs import PostprocessStep, steps_from_yaml

PRECISIONS = {"fp32": "float32", "fp16": "float16", "int8": "int8"}


@dataclass(frozen=True, kw_only=True)
class ExportedMember(Member):
    """An exported network, opened by its engine."""

    exported: Exported

    @property
    def precision(self) -> str:
        return PRECISIONS[self.exported.metadata.precision]

    @cached_property
    def intake(self) -> Intake:
        size, usual = self.exported.input_size, super().intake
        return usual if size is None else usual._replace(tile=size, fixed=True)

    @property
    def folds(self) -> frozenset[int]:
        return frozenset(int(one.get("fold", self.config.data.fold)) for one in self.exported.metadata.checkpoints)

    @property
    def keeps_memory(self) -> bool:
        return True

    @cached_property
    def digest(self) -> str:
        return " ".join(digest_of(path) for path in self.exported.files)

    @property
    def chain(self) -> list[PostprocessStep]:
        return steps_from_yaml(self.exported.metadata.postprocess)

    def require_type(self, path: Path, dtype: np.dtype[Any]) -> None:
        self.exported.require_type(dtype, path)

    def blank(self, side: int) -> NDArray[Any]:
        height, width = (side, side) if self.exported.input_size is None else self.exported.input_size
        shape = (1, min(side, height), min(side, width), self.intake.channels)
        return np.zeros(shape, self.exported.metadata.input_type)

    def probabilities(self, pixels: NDArray[Any]) -> NDArray[np.float32]:
        return self.exported.probabilities(pixels)

    def peak(self, work: Callable[[], object]) -> int:
        return peak_of_process(work)


def open_exported_member(path: Path, device: str, overrides: Mapping[str, Any], precision: str) -> ExportedMember:
    """Open an exported file; the rest is as in `members.open_member`."""
    exported = open_exported(path, device)
    if precision == "float32" and exported.metadata.precision != "fp32":
        raise ConfigError(
            f"--precision float32: {path} holds {exported.metadata.precision}; export the checkpoint with "
            "--precision fp32"
        )
    config = parse_config(exported.metadata.config, dict(overrides), source=str(path))
    return ExportedMember(path=path, config=config, exported=exported)
