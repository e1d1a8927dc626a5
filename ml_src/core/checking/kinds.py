"""What ml-check can find: the kinds, how bad each is, and which is named first. Next to read: `findings.py`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ml_src.core.data.files import listed

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")
NUM_NAMED = 3  # files in a summary

FIX = "ml-check DATA --fix"


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or good to know, about a file or about the whole data set."""

    kind: str  # a stable word, one of KINDS
    severity: Severity  # error: training would fail or learn wrong things; warning: look at it; note: fine, but know it
    path: Path | None  # None: the whole data set
    message: str  # what, where, with which values, and what to do
    fix: str | None = None  # what mends it: a command, or the question that must be answered first
    summary: str = ""  # the same, said once of all files of this kind
    details: tuple[str, ...] = ()  # lines that belong below the summary, such as a proposed table of colours

    @property
    def mended(self) -> bool:
        """Whether --fix mends it."""
        return self.fix is not None and self.fix.startswith(FIX)


# Among findings that are equally bad and concern equally many files, the first of these is named first.
KINDS: tuple[str, ...] = (
    "lfs_pointer",
    "empty_file",
    "not_an_image",
    "no_permission",
    "link_to_itself",
    "damaged_file",
    "too_large",
    "needs_rasterio",
    "unsupported_colours",
    "multi_page",
    "several_masks",
    "jpeg_mask",
    "transparent_mask",
    "colour_mask",
    "blended_mask",
    "multi_channel_mask",
    "nan_values",
    "negative_values",
    "float_mask",
    "soft_mask",
    "stretched_mask",
    "values_too_high",
    "value_gaps",
    "wide_mask",
    "mask_format",
    "exif_not_applied",
    "size_differs",
    "same_stem",
    "layout",
    "stems_differ",
    "missing_mask",
    "missing_image",
    "channels_differ",
    "number_types_differ",
    "missing_files",
    "listed_twice",
    "split_groups",
    "duplicates",
    "near_duplicates",
    "overlapping_tiles",
    "one_class",
    "absent_class",
    "rare_class",
    "constant_image",
    "exif_doubtful",
    "wrong_extension",
    "gray_and_colour",
    "alpha_channel",
    "one_bit_mask",
    "palette_mask",
)


def of_files(
    kind: str,
    severity: Severity,
    noun: str,
    says: Mapping[Path, str],
    together: str,
    fix: str | None = None,
    details: Sequence[str] = (),
) -> list[Finding]:
    """Return a finding a file, of one kind.

    Args:
        kind: one of KINDS.
        severity: of all of them.
        noun: what the files are, in the singular.
        says: what is said of each file; completes "<path> ...".
        together: what is said of all, where there are several; completes "<number> <noun>s ...".
        fix: what mends them.
        details: lines below the summary.
    """
    if len(says) == 1:
        summary = "".join(f"{path} {text}" for path, text in says.items())
    else:
        summary = f"{len(says)} {noun}s {together}"
    return [
        Finding(kind, severity, path, f"{path} {text}", fix, summary, tuple(details)) for path, text in says.items()
    ]


def of_set(kind: str, severity: Severity, message: str, fix: str | None = None) -> Finding:
    """Return a finding about the whole data set."""
    return Finding(kind, severity, None, message, fix, message)


def named(paths: Sequence[Path]) -> str:
    """Name the first few files, each with its folder."""
    return listed([f"{path.parent.name}/{path.name}" for path in paths], NUM_NAMED)
