"""Whether an exported file predicts what its checkpoint does: `ml-export --validate`. Next to read: `benchmark.py`.

Counted band by band, so that images of any size fit. The limits are at the top.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ml_src.core.checking.grouping import printable
from ml_src.core.export.metadata import Precision
from ml_src.core.metrics.segmentation import ConfusionMatrix, Summary, summarize

LEAST_EQUAL = 9_999  # of 10 000 labels; int8 is not held to it
MOST_OF_IOU: dict[Precision, float] = {"fp32": 0.001, "fp16": 0.001, "int8": 0.005}
"""By how much mean IoU may differ."""
ROUNDING = 1e-9  # of float64: 0.5 - 0.499 is more than 0.001


class Output(NamedTuple):
    """What one of the two predicts for some rows of an image."""

    probs: NDArray[np.floating[Any]]  # (C, n, W); float16 rounds differences to some 0.0005
    labels: NDArray[np.integer[Any]]  # (n, W)


class Verdict(NamedTuple):
    """Whether the file may be used, and why."""

    passed: bool
    reason: str

    @property
    def word(self) -> str:
        """PASS or FAIL."""
        return "PASS" if self.passed else "FAIL"


@dataclass
class _Image:
    """What was counted in one image."""

    num_pixels: int = 0
    num_equal: int = 0
    largest: float = 0.0


class _Score(NamedTuple):
    """A score of both, over classes that both have; None where there is none."""

    reference: float | None
    exported: float | None

    @property
    def difference(self) -> float | None:
        """Exported less reference; positive where the exported file is better."""
        if self.reference is None or self.exported is None:
            return None
        return self.exported - self.reference

    def plain(self) -> dict[str, float | None]:
        return {"reference": self.reference, "exported": self.exported, "difference": self.difference}


class Parity:
    """Counts how two predictions of the same images differ, and judges it.

    Means of IoU and Dice are over the classes that have a score from both. A class that is not in the masks and that
    only one of the two predicts, perhaps in a single pixel, has a score from that one alone; to count it would compare
    means over unequal classes.

    Args:
        class_names: one a class; their number is C.
        ignore_index: of the masks; may be one of the classes.
        reference: what the first of the two is called, such as `PyTorch float32`.
        exported: what the second is called.
        images: what is compared on, in the plural.
    """

    def __init__(
        self, class_names: Sequence[str], ignore_index: int, reference: str, exported: str, images: str = "images"
    ) -> None:
        self.images = images
        self.class_names, self.ignore_index = list(class_names), ignore_index
        self.names = {"reference": reference, "exported": exported}
        num_classes = len(self.class_names)
        self._beside_masks = [ConfusionMatrix(num_classes, ignore_index) for _ in self.names]
        self._beside_each_other = ConfusionMatrix(num_classes, None)
        self._images: dict[str, _Image] = {}
        self._sum = 0.0
        self._not_finite = 0

    def update(
        self,
        image: str,
        reference: Output,
        exported: Output,
        mask: NDArray[np.integer[Any]] | None = None,
        nodata: NDArray[np.bool_] | None = None,
    ) -> None:
        """Count some rows of an image.

        Args:
            image: its name; rows of one name are one image.
            reference: probabilities (C, n, W) and labels (n, W) of the checkpoint.
            exported: the same of the exported file.
            mask: (n, W), the truth; None where there is none.
            nodata: (n, W), where the image has no data; those pixels are left out of everything.

        Raises: ValueError where shapes differ, or a label or a mask has a value that it cannot have.
        """
        shape = (len(self.class_names), *reference.labels.shape)
        found = [reference.probs.shape, exported.probs.shape, (shape[0], *exported.labels.shape)]
        if any(one != shape for one in found):
            raise ValueError(f"probabilities and labels of {image} are to be of shape {shape}, but are of {found}")
        labels = [reference.labels, exported.labels]
        with np.errstate(invalid="ignore"):  # what is not finite is counted
            difference = np.subtract(exported.probs, reference.probs, dtype=np.float32)
        if nodata is not None:
            labels = [one[~nodata] for one in labels]
            mask = None if mask is None else mask[~nodata]
            difference = difference[:, ~nodata]
        self._count_differences(image, np.abs(difference, out=difference), labels)
        self._beside_each_other.update(labels[1], labels[0])
        if mask is not None:
            for confusion, one in zip(self._beside_masks, labels, strict=True):
                confusion.update(one, mask)

    def _count_differences(
        self, image: str, difference: NDArray[np.float32], labels: Sequence[NDArray[np.integer[Any]]]
    ) -> None:
        seen = self._images.setdefault(image, _Image())
        seen.num_pixels += labels[0].size
        seen.num_equal += int(np.count_nonzero(labels[0] == labels[1]))
        finite = np.isfinite(difference)
        self._not_finite += difference.size - int(np.count_nonzero(finite))
        seen.largest = max(seen.largest, float(difference.max(initial=0.0, where=finite)))
        self._sum += float(difference.sum(dtype=np.float64, where=finite))

    @property
    def num_pixels(self) -> int:
        """Pixels that were compared."""
        return sum(one.num_pixels for one in self._images.values())

    @property
    def num_equal(self) -> int:
        """Of them, those of equal labels."""
        return sum(one.num_equal for one in self._images.values())

    @property
    def num_labelled(self) -> int:
        """Of them, those that a mask labels."""
        return int(self._beside_masks[0].matrix.sum())

    def _summaries(self) -> list[Summary]:
        return [summarize(confusion.matrix, self.ignore_index) for confusion in self._beside_masks]

    def _per_class(self, key: Literal["iou_per_class", "dice_per_class"]) -> list[_Score]:
        reference, exported = (summary[key] for summary in self._summaries())
        return [_Score(*pair) for pair in zip(reference, exported, strict=True)]

    def _mean(self, key: Literal["iou_per_class", "dice_per_class"]) -> _Score:
        common = [one for one in self._per_class(key) if one.difference is not None]
        if not common:
            return _Score(None, None)
        return _Score(*(float(np.mean(values)) for values in zip(*common, strict=True)))

    def _likeness(self) -> Summary:
        """The scores of the exported labels, with those of the reference as their truth."""
        return summarize(self._beside_each_other.matrix)

    def verdict(self, precision: Precision) -> Verdict:
        """Judge what was counted.

        fp32 and fp16 need 99.99 % equal labels and, where there are masks, a mean IoU within 0.001. int8 needs a mean
        IoU within 0.005. Without masks the reference's labels stand in for them, which is stricter: of each class,
        1 - IoU is a metric (the Jaccard distance; Levandowsky and Winter 1971), so that whatever the masks are, the
        IoUs of two label maps differ by no more than their distance from each other.
        """
        if not self.num_pixels:
            return Verdict(False, "no pixel was compared")
        facts = [self._finite(), self._difference_of_iou(precision)]
        if precision != "int8":
            facts.insert(1, self._equal_labels())
        failed = [reason for passed, reason in facts if not passed]
        return Verdict(not failed, "; ".join(failed or [reason for _, reason in facts if reason]))

    def _finite(self) -> Verdict:
        number = self._not_finite
        return Verdict(not number, f"{number} probabilities are not finite" if number else "")

    def _equal_labels(self) -> Verdict:
        enough = self.num_equal * 10_000 >= LEAST_EQUAL * self.num_pixels
        need = "" if enough else f", {LEAST_EQUAL / 100:.2f} % are needed"
        return Verdict(enough, f"{_percent(self.num_equal, self.num_pixels)} of the labels are equal{need}")

    def _difference_of_iou(self, precision: Precision) -> Verdict:
        most, difference = MOST_OF_IOU[precision], self._mean("iou_per_class").difference
        if difference is not None:
            return _within(f"mean IoU differs by {abs(difference):.6f}", abs(difference), most)
        if precision != "int8":
            return Verdict(True, "mean IoU was not compared, for no pixel is labelled")
        distance = 1 - self._likeness()["iou"]
        words = "no pixel is labelled; with the reference's labels as truth, mean IoU is"
        return _within(f"{words} {distance:.6f} below 1", distance, most)

    def to_json(self, precision: Precision) -> dict[str, Any]:
        """Return all of it as plain data: what best.validation.json has. None stands for what is not defined.

        verdict, reason; precision; names (of `reference` and `exported`); bounds (`share_equal`, None for int8, and
        `iou`); images, num_images, num_pixels, num_labelled_pixels; probabilities (`max_difference`, `mean_difference`,
        `num_not_finite`); labels (`num_equal`, `share_equal`); iou and dice (means of both, over classes that both
        have, and their difference); per_class; likeness (scores with the reference's labels as truth);
        confusion_matrices (rows are truth); per_image.
        """
        verdict, likeness = self.verdict(precision), self._likeness()
        of_classes = zip(
            self.class_names,
            self._per_class("iou_per_class"),
            self._per_class("dice_per_class"),
            likeness["iou_per_class"],
            strict=True,
        )
        return {
            "verdict": verdict.word,
            "reason": verdict.reason,
            "precision": precision,
            "names": dict(self.names),
            "bounds": {
                "share_equal": None if precision == "int8" else LEAST_EQUAL / 10_000,
                "iou": MOST_OF_IOU[precision],
            },
            "images": self.images,
            "num_images": len(self._images),
            "num_pixels": self.num_pixels,
            "num_labelled_pixels": self.num_labelled,
            "probabilities": {
                "max_difference": self._largest(),
                "mean_difference": self._mean_difference(),
                "num_not_finite": self._not_finite,
            },
            "labels": {"num_equal": self.num_equal, "share_equal": _share(self.num_equal, self.num_pixels)},
            "iou": self._mean("iou_per_class").plain(),
            "dice": self._mean("dice_per_class").plain(),
            "per_class": [
                {"class": index, "name": name, "iou": iou.plain(), "dice": dice.plain(), "likeness": same}
                for index, (name, iou, dice, same) in enumerate(of_classes)
            ],
            "likeness": {
                "iou": likeness["iou"] if self.num_pixels else None,
                "dice": likeness["dice"] if self.num_pixels else None,
            },
            "confusion_matrices": {
                name: confusion.matrix.tolist() for name, confusion in zip(self.names, self._beside_masks, strict=True)
            },
            "per_image": [
                {
                    "image": name,
                    "num_pixels": one.num_pixels,
                    "share_equal": _share(one.num_equal, one.num_pixels),
                    "max_difference": one.largest,
                }
                for name, one in self._images.items()
            ],
        }

    def _largest(self) -> float | None:
        return max(one.largest for one in self._images.values()) if self.num_pixels else None

    def _mean_difference(self) -> float | None:
        number = self.num_pixels * len(self.class_names) - self._not_finite
        return self._sum / number if number else None

    def block(self, precision: Precision) -> str:
        """Return it as the block that is printed."""
        lines = [
            f"Validation of the exported file ({precision}): {self.names['exported']} beside {self.names['reference']}",
            f"  {len(self._images)} {self.images}, {self.num_pixels} pixels, of which {self.num_labelled} are labelled",
        ]
        if self.num_pixels:
            lines += self._lines_of_probabilities()
            lines += ["", *(self._lines_of_scores() if self.num_labelled else self._lines_of_likeness())]
        verdict = self.verdict(precision)
        return "\n".join([*lines, "", f"{verdict.word}: {verdict.reason}."])

    def _lines_of_probabilities(self) -> list[str]:
        largest, mean = self._largest(), self._mean_difference()
        lines = [
            f"  Probabilities differ by {_small(largest)} at most, {_small(mean)} on average",
            f"  Equal labels: {self.num_equal} of {self.num_pixels} ({_percent(self.num_equal, self.num_pixels)})",
        ]
        name, worst = min(self._images.items(), key=lambda pair: _share(pair[1].num_equal, pair[1].num_pixels) or 1.0)
        if worst.num_equal < worst.num_pixels and len(self._images) > 1:
            share = _percent(worst.num_equal, worst.num_pixels)
            lines.append(f"  Fewest in an image: {share} in {printable(name)}")
        return lines

    def _lines_of_scores(self) -> list[str]:
        rows = [("Mean IoU", self._mean("iou_per_class")), ("Mean Dice", self._mean("dice_per_class"))]
        lines = ["  Scores of the reference, of the exported file, and the difference:"]
        lines += [f"    {name}: {_three(score)}" for name, score in rows]
        lines += ["", "  Per-class IoU, likewise:"]
        scores = self._per_class("iou_per_class")
        for index, (name, score) in enumerate(zip(self.class_names, scores, strict=True)):
            words = "ignored" if index == self.ignore_index else _three(score)
            lines.append(f"    Class {index} ({printable(name)}): {words}")
        common = sum(score.difference is not None for score in scores)
        lines.append(f"  Means are over {common} of {len(scores)} classes (those that both have a score for).")
        return lines

    def _lines_of_likeness(self) -> list[str]:
        likeness = self._likeness()
        lines = [
            "  No pixel is labelled, so there are no scores. With the labels of the reference as truth:",
            f"    Mean IoU: {likeness['iou']:.6f}",
        ]
        for index, (name, value) in enumerate(zip(self.class_names, likeness["iou_per_class"], strict=True)):
            lines.append(f"    Class {index} ({printable(name)}): {_number(value)}")
        return lines


def _within(words: str, value: float, most: float) -> Verdict:
    enough = value <= most + ROUNDING
    return Verdict(enough, words if enough else f"{words}, at most {most:g} is allowed")


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _percent(part: int, whole: int) -> str:
    """A share rounded down, so that no more is claimed than is so: 100 % is all of them."""
    millionths = part * 1_000_000 // whole
    return f"{millionths // 10_000}.{millionths % 10_000:04d} %"


def _three(score: _Score) -> str:
    difference = score.difference
    beside = "" if difference is None else f", {round(difference, 6) + 0.0:+.6f}"
    return f"{_number(score.reference)}, {_number(score.exported)}{beside}"


def _number(value: float | None) -> str:
    return "not present" if value is None else f"{value:.4f}"


def _small(value: float | None) -> str:
    return "nothing that is finite" if value is None else f"{value:.2g}"
