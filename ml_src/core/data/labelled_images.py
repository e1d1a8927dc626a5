"""The images and masks that a configuration names, and what happens to them before a network sees them."""

from functools import cached_property
from pathlib import Path

from ml_src.core.config import Config
from ml_src.core.data import split_files
from ml_src.core.data.pairs import Pairs
from ml_src.core.transforms import Pipeline, build_transforms


class LabelledImages:
    """The data set of a configuration."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._pairs: dict[str, Pairs] = {}
        self.data_dir = Path(config.data.data_dir)
        self.class_names = config.class_names
        self.ignore_index = config.ignore_index

    @cached_property
    def train_transforms(self) -> Pipeline:
        """What happens to a training sample."""
        return build_transforms(self.config.train_transforms, self.ignore_index)

    @cached_property
    def val_transforms(self) -> Pipeline:
        """What happens to a sample that is measured or predicted."""
        return build_transforms(self.config.val_transforms, self.ignore_index)

    def pairs(self, split: str) -> Pairs:
        """Return the image/mask pairs of `train`, `val` or `test` from the index files of the fold."""
        if split not in self._pairs:  # once: reading looks every listed file up
            name = split if split == "test" else f"fold_{self.config.data.fold}_{split}"
            self._pairs[split] = split_files.read_split(self.config.splits_dir, self.data_dir, name)
        return self._pairs[split]

    def num_images(self, split: str) -> int:
        """Return how many images a split has."""
        return len(self.pairs(split))

    def groups(self, split: str) -> list[str]:
        """Return the group of each image of a split, as ml-split kept them together.

        Raises: DataError where the split was made without groups.
        """
        return split_files.read_groups(self.config.splits_dir, self.pairs(split))
