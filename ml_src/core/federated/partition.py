"""Which image is at which site, for a federation on one computer. Next to read: `data/splits.py`, `cli/split.py`.

An ordinary split is divided further: every site gets its share of the test images, and of those for training and
validation of each fold. How uneven the shares are is drawn from the seed alone. Imports neither torch nor Flower.
"""

import math
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from ml_src.core.data import checks, split_files
from ml_src.core.data.files import Pair, listed
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.progress import progress_bar

if TYPE_CHECKING:
    from ml_src.core.config import Config

Strategy = Literal["iid", "dirichlet", "by_group"]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

STREAM = 1 << 32  # of random numbers: no decision of ml-split has this number
DEFAULT_ALPHA = 0.5


@dataclass(frozen=True)
class Plan:
    """How images are divided among sites; `alpha` matters for `dirichlet` alone."""

    num_sites: int
    strategy: Strategy
    alpha: float = DEFAULT_ALPHA


def plan_of_flags(
    federated: bool, num_clients: int | None, strategy: str | None, alpha: float | None, with_groups: bool
) -> Plan | None:
    """Return what the flags of ml-split ask for; None without --federated.

    Raises: ConfigError for flags that are missing, superfluous or out of range.
    """
    if not federated:
        flags = {"--num_clients": num_clients, "--partition_strategy": strategy, "--alpha": alpha}
        idle = [flag for flag, value in flags.items() if value is not None]
        if idle:
            raise ConfigError(f"--federated is missing, and {' and '.join(idle)} would do nothing without: give it too")
        return None
    if num_clients is None:
        raise ConfigError("--federated needs the number of sites: give --num_clients, such as --num_clients 4")
    if num_clients < 1:
        raise ConfigError(f"--num_clients is {num_clients}: give 1 or more")
    if strategy == "group" and not with_groups:
        raise ConfigError("--partition_strategy group keeps groups whole: give --groups or --group_regex")
    if alpha is not None and strategy != "dirichlet":
        raise ConfigError("--alpha belongs to --partition_strategy dirichlet: give both or neither")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ConfigError(f"--alpha is {alpha}: give a number above 0; 0.1 is very uneven, 100 is even")
    words: dict[str, Strategy] = {"iid": "iid", "dirichlet": "dirichlet", "group": "by_group"}
    return Plan(num_clients, words[strategy or "iid"], DEFAULT_ALPHA if alpha is None else alpha)


def assign_sites(
    counts: Sequence[Mapping[int, int]],
    parts: Mapping[str, Sequence[int]],
    groups: Sequence[str] | None,
    num_sites: int,
    strategy: Strategy,
    alpha: float,
    seed: int,
) -> list[int]:
    """Return the site of each image, from 0 to num_sites - 1.

    `iid` deals the images out at random, as many to each site. `by_group` deals out whole groups, so that sites have
    about as many images. `dirichlet` draws for each class how it is divided among the sites (Hsu et al. 2019; Yurochkin
    et al. 2019). There an image has one class; here it has a share of each, and goes where its classes are still
    wanted most: the sum over its classes of its part of all there is of the class, which lets rare classes count, times
    what the site still lacks of its drawn proportion. Images without a labelled pixel are a class of their own.

    Every part is divided in the same proportions, and every site gets an image (or group) of every part that has as
    many of them as there are sites.

    Args:
        counts: for each image the pixels per class, ignored ones left out; used by `dirichlet`.
        parts: the indices of the images in `test`, `fold_0_train`, `fold_0_val`, ...; parts may overlap.
        groups: the group of each image; used by `by_group`, which needs it.
        num_sites: 1 or more.
        strategy: how the images are divided.
        alpha: of `dirichlet`, above 0: each class is nearly at one site (0.1), or everywhere alike (100).
        seed: not negative; the same arguments give the same sites.

    Raises: DataError where a site would have no image of a part; only `test` may be without.
    """
    if strategy != "by_group":
        groups = None
    elif groups is None:
        raise DataError("the images have no groups: run ml-split again with --groups or --group_regex")
    what = "images" if groups is None else "groups"
    members = _members(len(counts), groups)
    if len(members) < num_sites:
        raise DataError(f"{len(members)} {what} are too few for {num_sites} sites: give fewer sites or more {what}")

    rng = np.random.Generator(np.random.Philox(key=[seed, STREAM]))
    if strategy == "dirichlet":
        shares = _class_shares(counts)
        proportions = rng.dirichlet(np.full(num_sites, alpha), shares.shape[1])
    else:
        shares = np.ones((len(counts), 1))
        proportions = np.full((1, num_sites), 1 / num_sites)
    site_of_unit, num_units = _deal(_units(members, shares, list(parts.values())), proportions, len(parts), rng)
    for name, held in zip(parts, num_units, strict=True):
        without = [f"site_{site}" for site in np.flatnonzero(held == 0)]
        if without and name != "test":
            raise DataError(
                f"{name} has {held.sum()} {what}, and {listed(without)} would have none of them: "
                f"give fewer sites, fewer folds or more {what}"
            )
    site_of = [0] * len(counts)
    for unit, site in zip(members, site_of_unit, strict=True):
        for index in unit:
            site_of[index] = site
    return site_of


def _members(num_images: int, groups: Sequence[str] | None) -> list[list[int]]:
    """Return the images of each thing that is dealt out: of each group, or of each image itself."""
    if groups is None:
        return [[index] for index in range(num_images)]
    by_group: dict[str, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        by_group[group].append(index)
    return list(by_group.values())


def _class_shares(counts: Sequence[Mapping[int, int]]) -> Floats:
    """Return the share of each class in each image: (images, classes + 1), rows sum to 1.

    The last column is 1 where no pixel is labelled. Shares and not pixels, because a large image is one image still.
    """
    column = {value: place for place, value in enumerate(sorted({value for count in counts for value in count}))}
    shares = np.zeros((len(counts), len(column) + 1))
    for index, count in enumerate(counts):
        total = sum(count.values())
        for value, pixels in count.items():
            shares[index, column[value]] = pixels / total if total else 0
        shares[index, -1] = not total
    return shares


@dataclass(frozen=True)
class _Unit:
    """An image, or a group: the parts it is in (p,), and how much of each class there it is (p, classes)."""

    parts: Indices
    amounts: Floats


def _units(members: Sequence[Sequence[int]], shares: Floats, parts: Sequence[Sequence[int]]) -> list[_Unit]:
    parts_of: dict[int, list[int]] = defaultdict(list)
    totals = np.ones((len(parts), shares.shape[1]))
    for number, indices in enumerate(parts):
        for index in indices:
            parts_of[index].append(number)
        found = shares[list(indices)].sum(axis=0)
        totals[number] = np.where(found > 0, found, 1)
    units = []
    for unit in members:
        amounts: dict[int, Floats] = defaultdict(lambda: np.zeros(shares.shape[1]))
        for index in unit:
            for number in parts_of[index]:
                amounts[number] = amounts[number] + shares[index] / totals[number]
        numbers = np.array(sorted(amounts), np.int64)
        units.append(_Unit(numbers, np.array([amounts[number] for number in numbers]).reshape(-1, shares.shape[1])))
    return units


class _Sites:
    """The sites while they fill: what each still wants, and how many units it has of each part."""

    def __init__(self, proportions: Floats, num_parts: int) -> None:
        self.wanted = np.tile(proportions, (num_parts, 1, 1))  # (parts, classes, sites), of all there is of a class
        self.num_units = np.zeros((num_parts, proportions.shape[1]), np.int64)

    def wants(self, unit: _Unit) -> Floats:
        """Return how much each site (sites,) wants a unit.

        Giving it to the site that wants it most brings what all have nearest to what they should have, in the sum of
        squares over parts, classes and sites.
        """
        want = (unit.amounts[:, :, None] * self.wanted[unit.parts]).sum(axis=(0, 1))
        return np.asarray(want / max(unit.amounts.sum(), np.finfo(np.float64).tiny))

    def give(self, unit: _Unit, site: int) -> None:
        self.wanted[unit.parts, :, site] -= unit.amounts
        self.num_units[unit.parts, site] += 1

    def take(self, unit: _Unit, site: int) -> None:
        self.wanted[unit.parts, :, site] += unit.amounts
        self.num_units[unit.parts, site] -= 1


def _deal(
    units: Sequence[_Unit], proportions: Floats, num_parts: int, rng: np.random.Generator
) -> tuple[list[int], Indices]:
    """Give each unit to the site that wants it most; return the sites and the number of units, (parts, sites).

    What is most of a class comes first, the rest in random order: what is small then levels the sites.
    """
    sites = _Sites(proportions, num_parts)
    order = rng.permutation(len(units))
    ties = rng.random((len(units), proportions.shape[1]))
    site_of = [0] * len(units)
    for index in sorted(order, key=lambda index: -round(units[index].amounts.sum(), 9)):
        # rounded: what differs in the last bit only is a tie, on every computer
        best = np.lexsort((ties[index], np.round(sites.wants(units[index]), 9)))[-1]
        site_of[index] = int(best)
        sites.give(units[index], site_of[index])
    _cover(units, site_of, sites)
    return site_of, sites.num_units


def _cover(units: Sequence[_Unit], site_of: list[int], sites: _Sites) -> None:
    """Give every site a unit of every part that has enough of them, from a site that keeps one of each part.

    One is always found where the images of validation are divided among the folds; where each fold draws its own, a
    unit may be the last of its site in another fold, and then it stays.
    """
    num_sites = sites.num_units.shape[1]
    in_part: list[list[int]] = [[] for _ in sites.num_units]
    for index, unit in enumerate(units):
        for part in unit.parts:
            in_part[part].append(index)
    enough = [len(indices) >= num_sites for indices in in_part]
    least = np.where(enough, 2, 1)  # a site with fewer units of a part gives none of them away
    for part in sorted(np.flatnonzero(enough), key=lambda part: len(in_part[part])):
        for site in np.flatnonzero(sites.num_units[part] == 0):
            spare = [
                index
                for index in in_part[part]
                if (sites.num_units[units[index].parts, site_of[index]] >= least[units[index].parts]).all()
            ]
            if not spare:
                continue
            wants = {index: sites.wants(units[index]) for index in spare}
            best = max(spare, key=lambda index: (round(wants[index][site] - wants[index][site_of[index]], 9), -index))
            sites.take(units[best], site_of[best])
            site_of[best] = int(site)
            sites.give(units[best], site_of[best])


def site_files(
    site_of: Sequence[int],
    parts: Mapping[str, Sequence[int]],
    groups: Sequence[str] | None,
    pairs: Sequence[Pair],
    data_dir: Path,
) -> dict[str, str]:
    """Return `site_0/test_images.txt` -> text and so on: the index files of each site, of the same names and formats as
    those of the whole split.
    """
    files: dict[str, str] = {}
    for site in sorted(set(site_of)):
        members = [index for index, home in enumerate(site_of) if home == site]
        place = {index: number for number, index in enumerate(members)}
        of_site = split_files.files_of_parts(
            {name: [place[index] for index in indices if index in place] for name, indices in parts.items()},
            None if groups is None else [groups[index] for index in members],
            [pairs[index] for index in members],
            data_dir,
        )
        files |= {f"site_{site}/{name}": text for name, text in of_site.items()}
    return files


def site_folders(folder: Path, num_sites: int) -> list[Path]:
    """Return where the index files of each site lie."""
    return [folder / f"site_{site}" for site in range(num_sites)]


def share_facts(cache: Path, folders: Sequence[Path]) -> None:
    """Lay what is known of the masks beside the index files of each site, so that no site reads them again."""
    for folder in folders:
        with suppress(OSError):
            shutil.copyfile(cache, split_files.cache_path(folder))


def sites_as_yaml(folders: Sequence[Path]) -> str:
    """Return the section of a configuration that names the sites."""
    import yaml

    sites = {"federated": {"sites": [folder.as_posix() for folder in folders]}}
    text: str = yaml.safe_dump(sites, default_flow_style=None, width=math.inf, allow_unicode=True)
    return text.rstrip("\n")


def write_partition(config: "Config", folder: Path) -> list[Path]:
    """Divide the configuration's fold as its section `federated` asks; return the folders of index files of the sites.

    Args:
        config: with `federated.num_sites`; the pairs are read from its splits_dir.
        folder: of the run; what an earlier call wrote there is replaced. The same configuration writes the same files.

    Raises: DataError as `assign_sites` and `read_split` do, and for masks that break a rule.
    """
    federated = config.federated
    if federated is None or federated.num_sites is None:
        raise ConfigError("federated.num_sites is not given: set it to the number of sites to divide the data set into")
    data_dir, splits_dir = Path(config.data.data_dir), config.splits_dir
    pairs: list[Pair] = []
    parts: dict[str, Sequence[int]] = {}
    for name in ("test", f"fold_{config.data.fold}_train", f"fold_{config.data.fold}_val"):
        without = name == "test" and split_files.is_empty(splits_dir, name)
        read = [] if without else split_files.read_split(splits_dir, data_dir, name)
        parts[name] = range(len(pairs), len(pairs) + len(read))
        pairs += read
    groups = None
    if federated.partition == "by_group" or (splits_dir / split_files.GROUPS).is_file():
        groups = split_files.read_groups(splits_dir, pairs)
    counts = _class_counts(config, pairs) if federated.partition == "dirichlet" else [{}] * len(pairs)
    seed = config.seed if federated.seed is None else federated.seed
    site_of = assign_sites(counts, parts, groups, federated.num_sites, federated.partition, federated.alpha, seed)

    new, old = site_files(site_of, parts, groups, pairs, data_dir), split_files.existing_site_files(folder)
    if new != old:
        split_files.replace_files(folder, old, new)
    folders = site_folders(folder, federated.num_sites)
    share_facts(split_files.cache_path(splits_dir), folders)
    return folders


def _class_counts(config: "Config", pairs: Sequence[Pair]) -> list[dict[int, int]]:
    """Return for each pair the pixels of each class, ignored ones left out."""
    ignore_index = config.data.ignore_index
    with progress_bar("reading masks", len(pairs)) as advance:
        facts = checks.scan(pairs, split_files.cache_path(config.splits_dir), advance)
    checks.check_masks(pairs, facts, config.data.num_classes, ignore_index)
    return [{value: pixels for value, pixels in fact.counts.items() if value != ignore_index} for fact in facts]
