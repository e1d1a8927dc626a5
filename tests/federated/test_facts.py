"""What the sites tell of their images adds up to what is true of all of them, and where they differ they are named."""

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from known_sites import Configure, history, led, prepared

from ml_src.core.config import Config
from ml_src.core.data.labelled_images import LabelledImages
from ml_src.core.errors import DataError, TrainingError
from ml_src.core.federated.facts import collect, merge, parse
from ml_src.core.federated.simulation import site_configs
from ml_src.core.losses.segmentation import balanced_weights

OF_DATA = {
    "transforms.train": [{"type": "random_horizontal_flip"}, {"type": "normalize", "mean": "data", "std": "data"}],
    "loss.class_weights": "balanced",
}


def merged(config: Config, folder: Path) -> Any:
    return merge({name: collect(one, {}) for name, one in site_configs(config, folder).items()}, config)


@pytest.mark.parametrize("partition", ["iid", "dirichlet"])
def test_the_statistics_of_all_sites_are_those_of_the_pooled_images(
    configure: Configure, tmp_path: Path, partition: str
) -> None:
    config = configure(OF_DATA, partition=partition, alpha=0.3)
    found = merged(config, tmp_path / "sites")
    pairs = list(LabelledImages(config.model_copy(update={"federated": None})).pairs("train"))
    images = [cv2.cvtColor(cv2.imread(str(pair.image)), cv2.COLOR_BGR2RGB) for pair in pairs]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(found.mean, pixels.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(found.std, pixels.std(axis=0), rtol=1e-3)
    masks = np.concatenate([cv2.imread(str(pair.mask), cv2.IMREAD_UNCHANGED).ravel() for pair in pairs])
    assert found.class_counts == np.bincount(masks, minlength=3).tolist()
    assert found.sizes == {"64 x 64": len(pairs)}
    assert sum(found.num_images.values()) == len(pairs)


def test_every_site_normalises_alike_and_weighs_classes_by_all_sites(configure: Configure) -> None:
    config = configure(OF_DATA, rounds=1, partition="dirichlet", alpha=0.3)
    federation, sites = led(config)
    known = history(config.run_dir)["fingerprint"]
    for site in sites.values():
        settled = site.settled()
        normalize = settled.train_transforms[-1]
        assert (normalize.mean, normalize.std) == (known["mean"], known["std"])  # type: ignore[union-attr]
        assert settled.loss.class_weights == balanced_weights(known["class_counts"])
        own = collect(site.config, {}).class_counts
        assert balanced_weights(own) != settled.loss.class_weights
    assert federation.journal.config.needs_statistics is False


def test_no_pixel_is_among_the_facts(configure: Configure, tmp_path: Path) -> None:
    """A site of 6 images of 12 288 values each tells a few numbers."""
    site = site_configs(configure(OF_DATA), tmp_path / "sites")["site_0"]
    plain = collect(site, {}).model_dump(mode="json")
    assert len(str(plain)) < 700
    names = {Path(pair.image).stem for pair in LabelledImages(site).pairs("train")}
    assert not [name for name in names if name in str(plain)]


def test_under_dp_only_numbers_of_images_are_told(configure: Configure, tmp_path: Path) -> None:
    config = configure({"model.norm": "group", "training.dp": {"noise_multiplier": 1.0, "public_statistics": True}})
    one = site_configs(config, tmp_path / "sites")["site_0"]
    site = one.model_copy(update={"training": one.training.model_copy(update={"trainer_type": "dp"})})
    told = collect(site, {})
    assert (told.class_counts, told.sizes, told.channels) == ([], {}, None)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"class_names": ["background", "fibre", "cell"]}, "classes: .*site_0: background, cell, fibre.*site_1: back"),
        ({"num_classes": 4}, "number of classes: site_0: 3; site_1: 4; site_2: 3"),
        ({"ignore_index": 255}, "value of unlabelled pixels: site_0: None; site_1: 255"),
        ({"class_counts": [1, 2]}, "site_1"),
    ],
)
def test_sites_that_differ_are_named(
    configure: Configure, tmp_path: Path, change: dict[str, Any], sentence: str
) -> None:
    config = configure()
    facts = {name: collect(one, {}) for name, one in site_configs(config, tmp_path / "sites").items()}
    facts["site_1"] = facts["site_1"].model_copy(update=change)
    with pytest.raises(DataError, match=sentence):
        merge(facts, config.model_copy(update={"data": config.data.model_copy(update={"class_names": None})}))


@pytest.mark.parametrize("values", [None, [], {"num_classes": 3}, {"num_classes": 0}])
def test_what_are_no_facts_is_said_of_its_site(values: object) -> None:
    with pytest.raises(TrainingError, match="site_1 sent facts that cannot be read"):
        parse(values, "site_1")


def test_facts_in_which_numbers_are_negative_are_refused(configure: Configure, tmp_path: Path) -> None:
    plain = collect(site_configs(configure(), tmp_path / "sites")["site_0"], {}).model_dump(mode="json")
    assert parse(plain, "site_0").num_classes == 3
    for wrong in ({"num_images": {"train": -1, "val": 1}}, {"class_counts": [-1, 2, 3]}, {"num_images": {"val": 1}}):
        with pytest.raises(TrainingError, match=r"site_0 (sent facts that cannot be read|has no training)"):
            parse(plain | wrong, "site_0")


def test_a_site_of_other_classes_cannot_come_in_later(configure: Configure, site_data: Path, tmp_path: Path) -> None:
    """It was not there at the start, when the others were compared."""
    federation, sites = prepared(configure())
    nodes = federation.session.link.nodes
    federation.session.link.nodes = lambda: {name: number for name, number in nodes().items() if name != "site_2"}
    federation.session.num_sites = 2
    federation.session.open(0)
    federation.train_round(1)
    late = sites["site_2"]
    shutil.copytree(site_data, tmp_path / "other")
    (tmp_path / "other" / "classes.txt").write_text("background\nfibre\ncell\n")
    data = late.config.data.model_copy(update={"data_dir": str(tmp_path / "other"), "class_names": None})
    late.config = late.config.model_copy(update={"data": data})
    federation.session.link.nodes = nodes
    federation.train_round(2)
    federation.journal.close()
    entry = history(federation.journal.run_dir)
    assert set(entry["rounds"][1]["sites"]) == {"site_0", "site_1"}
    assert any(one["site"] == "site_2" and "differ in classes" in one["what"] for one in entry["troubles"])
