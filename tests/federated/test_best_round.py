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


def test_one_site_alone_does_not_decide_for_all(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5, "berlin": 0.5, "charite": 0.5})
    enter(journal, 2, {"anna": 0.61})
    assert best(journal) == 1
    enter(journal, 3, {"anna": 0.6, "berlin": 0.9, "charite": 0.9})
    assert best(journal) == 3


def test_a_round_that_only_one_site_has_measured_gives_way_to_one_that_all_have(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.9})
    enter(journal, 2, {"anna": 0.8, "berlin": 0.7, "charite": 0.7})
    assert best(journal) == 2
    enter(journal, 3, {"anna": math.nan, "berlin": math.nan, "charite": math.nan}, total=math.nan)
    assert best(journal) == 2


def test_a_class_that_a_site_does_not_have_says_nothing(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.5, "berlin": math.nan}, total=0.5)
    enter(journal, 2, {"anna": 0.6, "berlin": math.nan, "charite": 0.1}, total=0.4)
    assert best(journal) == 2


# A kill between best.pt and last.pt.


def restored(journal: Journal) -> Journal:
    """What goes on from the folder of a journal that was killed."""
    again = Journal(journal.config, journal.run_dir)
    again.restore(load_checkpoint(journal.run_dir / "weights" / "last.pt"))
    return again


def test_after_a_kill_before_last_pt_the_best_round_is_that_of_best_pt(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.7, "berlin": 0.7})
    enter(journal, 2, {"anna": 0.75, "berlin": 0.75})  # the next round would have written last.pt
    again = restored(journal)
    assert (again.best, again.best_round) == (0.75, 2)
    assert again.is_measured(2)
    state = {"model_state_dict": {}}
    scores = {site: {"iou": iou, "dice": iou, "loss": 1 - iou} for site, iou in {"anna": 0.75, "charite": 0.1}.items()}
    again.measured(2, {"iou": 0.4, "dice": 0.4, "loss": 0.6}, scores, state)  # other sites are there now
    assert best(again) == 2
    enter(again, 3, {"anna": 0.8, "charite": 0.2})
    assert best(again) == 3


def test_a_best_pt_of_a_round_that_is_done_again_is_replaced(journal: Journal) -> None:
    enter(journal, 1, {"anna": 0.7})
    enter(journal, 2, {"anna": 0.6})
    before = (journal.run_dir / "weights" / "last.pt").read_bytes()
    enter(journal, 3, {"anna": 0.9})
    (journal.run_dir / "weights" / "last.pt").write_bytes(before)  # as where the newest one is damaged
    again = restored(journal)
    enter(again, 3, {"anna": 0.5})
    assert best(again) == 3
