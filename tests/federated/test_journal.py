"""What the journal takes for the best round, where not all sites have measured every round."""

import json
import math
from pathlib import Path

import pytest
from known_sites import Configure

from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.federated.facts import Fingerprint
from ml_src.core.federated.journal import Journal

Scores = dict[str, float]


@pytest.fixture
def journal(configure: Configure, tmp_path: Path) -> Journal:
    """One of three sites, with nothing in it."""
    (tmp_path / "weights").mkdir()
    made = Journal(configure(), tmp_path)
    images = {"anna": 3, "berlin": 3, "charite": 3}
    made.begin(Fingerprint(num_images=images, class_names=None, class_counts=[], sizes={}))
    return made


def enter(journal: Journal, number: int, iou: Scores, total: float | None = None) -> None:
    """A round that the sites in `iou` have measured; over all it is their mean when left out."""
    state = {"model_state_dict": {}}
    journal.commit({"round": number, "seconds": 1.0, "train_loss": 0.5, "sites": {}, "dropped": {}}, state)
    over_all = sum(iou.values()) / len(iou) if total is None else total
    sites = {site: {"iou": value, "dice": value, "loss": 1 - value} for site, value in iou.items()}
    journal.measured(number, {"iou": over_all, "dice": over_all, "loss": 1 - over_all}, sites, state)


def best(journal: Journal) -> int:
    """The round of best.pt."""
    journal.write()
    told = json.loads((journal.run_dir / "federation.json").read_text())["best_round"]
    assert load_checkpoint(journal.run_dir / "weights" / "best.pt")["epoch"] == told
    return int(told)


def test_a_round_is_not_the_best_because_the_site_with_hard_images_was_away(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.9, "berlin": 0.8, "charite": 0.2})
    enter(journal, 2, {"anna": 0.85, "berlin": 0.75})  # better over all, worse at each site
    assert best(journal) == 1
    enter(journal, 3, {"anna": 0.95, "berlin": 0.81})
    assert best(journal) == 3


def test_a_round_may_be_the_best_where_the_site_with_hard_images_is_back(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5, "berlin": 0.4})
    enter(journal, 2, {"anna": 0.6, "berlin": 0.5, "charite": 0.1})  # worse over all, better at each that knows both
    assert best(journal) == 2
    enter(journal, 3, {"anna": 0.6, "berlin": 0.5, "charite": 0.05})
    assert best(journal) == 2


def test_weights_that_diverge_at_one_of_the_sites_are_not_the_best(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5, "berlin": 0.4, "charite": 0.3})
    enter(journal, 2, {"anna": 0.9, "berlin": math.nan})
    assert best(journal) == 1


def test_where_the_same_sites_measure_the_scores_over_all_their_pixels_decide(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.9, "berlin": 0.1}, total=0.6)
    enter(journal, 2, {"anna": 0.1, "berlin": 0.8}, total=0.7)
    assert best(journal) == 2


def test_where_no_site_has_measured_both_the_scores_over_all_decide(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5})
    enter(journal, 2, {"berlin": 0.4})
    assert best(journal) == 1
    enter(journal, 3, {"charite": 0.7})
    assert best(journal) == 3


def test_a_class_that_a_site_does_not_have_says_nothing(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5, "berlin": math.nan}, total=0.5)
    enter(journal, 2, {"anna": 0.6, "berlin": math.nan, "charite": 0.1}, total=0.4)
    assert best(journal) == 2
