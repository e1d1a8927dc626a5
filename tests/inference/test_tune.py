"""Steps are chosen where they help on images that were held out, and for no other reason."""

import gc
import json
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import tifffile
import yaml
from known_folds import drawn_folds, speckled_run, write_groups
from PIL import Image

from ml_src.cli import inference
from ml_src.core.data.files import Pair, read_image
from ml_src.core.inference import planes
from ml_src.core.inference.cross_validation import open_folds
from ml_src.core.inference.inputs import Input
from ml_src.core.inference.jobs import Request
from ml_src.core.inference.measure import label_maps, split_items
from ml_src.core.inference.planes import Plane
from ml_src.core.inference.postprocess import apply_postprocessing, chain_path, has_chain, load_chain
from ml_src.core.inference.predictor import Predicted
from ml_src.core.inference.tune import Case, Judging, candidates, case_of, cases_of, search
from ml_src.core.metrics.intervals import Counts
from ml_src.core.metrics.segmentation import ConfusionMatrix
from ml_src.core.postprocess_specs import PostprocessStep, as_word, misfits, parse_steps

JUDGING = Judging(3, 255)


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return drawn_folds(Path("blocks"))


def dice_of(*words: str) -> float:
    """Mean Dice that ml-inference measures with these words."""
    assert inference.main([*words, "--output", "out"]) == 0
    return float(json.loads(Path("out/metrics.json").read_text())["dice"])


def read_pixels(path: Path) -> np.ndarray:
    return read_image(path).pixels


MakeCase = Callable[[np.ndarray, np.ndarray], Case]


@pytest.fixture
def make_case(tmp_path: Path) -> MakeCase:
    """From a label map (H, W) and its truth, of an image that shows nothing."""

    def make(labels: np.ndarray, truth: np.ndarray) -> Case:
        number = len(list(tmp_path.glob("*.png")))
        pair = Pair(tmp_path / f"{number}.png", tmp_path / f"{number + 1}.png")
        image = np.zeros((*truth.shape, 1), np.uint8)
        Image.fromarray(image[:, :, 0]).save(pair.image)
        Image.fromarray(truth.astype(np.uint8)).save(pair.mask)
        item = Input(PurePosixPath(pair.image.stem), pair.image)
        return case_of(
            pair, Predicted(item, Plane.of(labels.astype(np.uint8)), None, image=image), JUDGING, read_pixels
        )

    return make


def square(top: int = 20, bottom: int = 50, value: int = 1) -> np.ndarray:
    mask = np.zeros((70, 70), np.uint8)
    mask[top:bottom, top:bottom] = value
    return mask


def with_specks(mask: np.ndarray, seed: int, value: int = 1) -> np.ndarray:
    """Single pixels around a mask that nothing is near to."""
    labels = mask.copy()
    rows, columns = np.random.default_rng(seed).choice(8, (2, 6)) * 2
    labels[rows, columns] = value
    return labels


def kept_of(cases: Sequence[Case], judging: Judging = JUDGING, more: Sequence[PostprocessStep] = ()) -> list[str]:
    rounds, _ = search(cases, judging, more)
    return [as_word(one.kept.step) for one in rounds if one.kept is not None]


def test_specks_are_cured_and_the_chain_is_used_from_then_on(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folds = [str(speckled_run(Path(f"runs/my_fold_{fold}"), data, fold, speck=1 + fold % 2)) for fold in range(3)]
    before = dice_of("--cv", *folds)
    capsys.readouterr()
    assert inference.main(["--cv", *folds, "--tune_postprocess"]) == 0
    printed = capsys.readouterr().out
    contents = [yaml.safe_load(Path(fold, "weights/postprocess.yaml").read_text()) for fold in folds]
    assert len({each.pop("checkpoints")[0] for each in contents}) == 3  # each its own network
    assert contents[0] == contents[1] == contents[2]
    facts = contents[0]["facts"]
    assert facts["mean_dice_before"] == pytest.approx(before, abs=1e-6) and facts["mean_dice_after"] == 1.0
    assert 0 < facts["interval_of_gain"][0] < facts["interval_of_gain"][1]
    assert facts["num_images"] == 6 and facts["num_tried"] > 10
    assert [step["type"] for step in contents[0]["postprocess"]] == ["remove_small"]
    assert f"Mean Dice rises from {before:.4f} to 1.0000" in printed
    assert "The same images have chosen and judged the steps" in printed
    assert dice_of("--cv", *folds) == 1.0
    assert dice_of("--cv", *folds, "--postprocess", "none") == before
    assert inference.main(["--checkpoint_path", folds[0], "--input", str(data / "images")]) == 0
    for number in range(6):
        mask = np.array(Image.open(f"{folds[0]}/inference/images/masks/{number}.png"))
        assert np.array_equal(mask, np.array(Image.open(data / f"masks/{number}.png")))


def test_where_nothing_helps_that_is_kept_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An older chain, be it damaged, and that of the configuration are no longer used then."""
    closing = {"inference.postprocess": [{"type": "closing", "radius": 7}]}
    run_dir = speckled_run(Path("runs/my_fold_0"), data, fold=0, speck=0, **closing)
    best = run_dir / "weights" / "best.pt"
    assert dice_of("--checkpoint_path", str(best), "--split", "val") < 1.0
    chain_path(best).write_text("no chain")
    assert inference.main(["--checkpoint_path", str(run_dir), "--tune_postprocess"]) == 0
    assert load_chain(best) == []
    assert "Chosen: no post-processing, as no step helps." in capsys.readouterr().out
    assert dice_of("--checkpoint_path", str(best), "--split", "val") == 1.0


def test_a_step_that_cures_some_images_and_harms_others_is_not_kept(make_case: MakeCase) -> None:
    """Specks that are true in one image of five: to remove them is better on the whole, but not surely."""
    helped = [make_case(with_specks(square(), seed), square()) for seed in range(4)]
    assert kept_of(helped, JUDGING) == ["remove_small,area=2"]
    harmed = make_case(with_specks(square(), 9), with_specks(square(), 9))
    rounds, after = search([*helped, harmed], JUDGING)
    best = rounds[0].tried[0]
    assert as_word(best.step) == "remove_small,area=2" and best.dice > rounds[0].dice
    assert best.interval is not None and best.interval[0] <= 0
    assert rounds[0].kept is None and len(rounds) == 1
    assert all(
        np.array_equal(one.labels.whole(), case.labels.whole())
        for one, case in zip(after, [*helped, harmed], strict=True)
    )


def test_images_of_one_group_are_one_witness(make_case: MakeCase) -> None:
    """What helps on all four images of one patient and harms on the one of another is not kept."""
    cases = [make_case(with_specks(square(), seed), square()) for seed in range(8)]
    true = with_specks(square(), 9)
    cases.append(make_case(true, true))
    assert kept_of(cases, JUDGING) == ["remove_small,area=2"]
    assert kept_of(cases, Judging(3, 255, ["a"] * 8 + ["b"])) == []


def test_steps_follow_one_another_until_none_helps(make_case: MakeCase) -> None:
    """Specks of one class and holes in another need two steps."""
    truth = square(value=2)
    cases = []
    for seed in range(5):
        labels = with_specks(truth, seed)
        labels[24:46:5, 24:46:5] = 0
        labels[30 + seed, 30:32] = 0
        cases.append(make_case(labels, truth))
    rounds, after = search(cases, JUDGING)
    kept = [one.kept.step for one in rounds if one.kept is not None]
    assert len(kept) == 2 and len(rounds) == 3
    assert all(np.array_equal(case.labels.whole(), truth) for case in after)
    assert [one.dice for one in rounds] == sorted(one.dice for one in rounds)


def test_a_step_of_the_configuration_is_a_candidate(make_case: MakeCase) -> None:
    """A cut of 12 pixels is more than what is tried by itself would close."""
    cases = []
    for place in range(3):
        labels = square()
        labels[:, 25 + place : 37 + place] = 0
        cases.append(make_case(labels, square()))
    assert kept_of(cases, JUDGING) == []
    assert kept_of(cases, JUDGING, parse_steps(["closing,radius=7"]))[0] == "closing,radius=7"


@pytest.mark.parametrize("band", [planes.BAND, 600])
def test_counting_only_what_changes_counts_everything(
    make_case: MakeCase, band: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The matrices after the search are those of the whole chain, applied at once and counted from nothing."""
    if band != planes.BAND:
        monkeypatch.setattr(planes, "BAND", band)
        monkeypatch.setattr(planes, "IN_MEMORY", 0)
    rng = np.random.default_rng(0)
    cases = []
    for _ in range(2):
        truth = np.kron(rng.integers(0, 3, (4, 4)), np.ones((10, 10), np.uint8))
        truth[:5] = 255
        wrong = rng.random(truth.shape) < 0.05
        cases.append(make_case(np.where(wrong, (np.minimum(truth, 2) + 1) % 3, np.minimum(truth, 2)), truth))
    rounds, after = search(cases, JUDGING)
    chain = [one.kept.step for one in rounds if one.kept is not None]
    assert chain
    for case, final in zip(cases, after, strict=True):
        labels = apply_postprocessing(case.labels, chain, 3, None, case.guide)
        confusion = ConfusionMatrix(3, 255)
        confusion.update(labels.whole(), case.truth.whole())
        assert np.array_equal(final.labels.whole(), labels.whole())
        expected = Counts.of(confusion.matrix)
        assert all(np.array_equal(*both) for both in zip(final.counts, expected, strict=True))


def test_images_are_not_kept_but_read_again_as_they_were_predicted(data: Path) -> None:
    """What guides `crf` when it is tuned is what guides it later: channels of the network, gaps filled."""
    gray = {number: np.array(Image.open(data / f"images/{number}.png")) for number in (0, 1)}
    Image.fromarray(np.dstack([gray[0], gray[0], gray[0]])).save(data / "images/0.png")
    pixels = gray[1].astype(np.float32)
    pixels[:9] = np.nan
    (data / "images/1.png").unlink()
    tifffile.imwrite(data / "images/1.tif", pixels)
    for kind in ("val", "train"):
        for path in (data / "splits").glob(f"fold_*_{kind}_images.txt"):
            path.write_text(path.read_text().replace("images/1.png", "images/1.tif"))
    run_dir = speckled_run(Path("runs/my_fold_0"), data, fold=0, speck=1)
    (fold,) = open_folds(Request([run_dir], postprocess=["none"]))
    seen, alive = [], []

    def finish(predicted: Predicted) -> None:
        assert predicted.image is not None
        seen.append(predicted.image.copy())
        case = case_of(fold.member.data.pairs("val")[len(alive)], predicted, JUDGING, read_pixels)
        alive.append((weakref.ref(predicted.image), case))

    cases = cases_of(fold, lambda done: None, JUDGING)
    list(label_maps(split_items(fold.member, "val"), [fold.member], fold.job.options, [], finish))
    gc.collect()
    assert [reference() for reference, _ in alive] == [None, None]
    for case, image in zip(cases, seen, strict=True):
        assert image.shape == (56, 56, 1)
        assert np.array_equal(case.guide(5, 30), image[5:30], equal_nan=True)
    assert cases[1].nodata is not None and np.isfinite(cases[1].guide(0, 9)).all()


def test_checkpoints_of_one_folder_share_the_chain_that_was_tuned_on_them(data: Path) -> None:
    paths = []
    for fold in range(2):
        run_dir = speckled_run(Path(f"runs/my_fold_{fold}"), data, fold, speck=1)
        paths.append((run_dir / "weights" / "best.pt").rename(f"fold_{fold}.pt"))
    assert inference.main(["--cv", *map(str, paths), "--tune_postprocess"]) == 0
    assert load_chain(paths[0]) == load_chain(paths[1]) != []
    assert has_chain(paths[0]) and has_chain(paths[1])


def test_candidates_fit_the_classes_and_can_be_said_on_the_command_line(make_case: MakeCase) -> None:
    labels = with_specks(square(value=2), seed=0)
    labels[30, 30] = 0
    with ThreadPoolExecutor(1) as pool:
        steps = candidates([make_case(labels, square(value=2))], JUDGING, pool)
    assert {step.type for step in steps} == {"opening", "closing", "fill_holes", "remove_small", "keep_largest", "crf"}
    assert misfits(steps, 3) == []
    assert parse_steps([as_word(step) for step in steps]) == steps
    words = [as_word(step) for step in steps]
    assert len(set(words)) == len(words)
    assert {"opening", "opening,classes=1", "opening,classes=2"} <= set(words)


def test_too_few_images_or_groups_are_one_sentence(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    single = drawn_folds(Path("single"), per_fold=1)
    alone = str(speckled_run(Path("runs/one_fold_0"), single, fold=0, speck=1))
    assert inference.main(["--checkpoint_path", alone, "--tune_postprocess"]) == 2
    assert "are 1 image, and a step is only kept if it helps on several images" in capsys.readouterr().err
    folds = [str(speckled_run(Path(f"runs/my_fold_{fold}"), data, fold, speck=1)) for fold in range(2)]
    write_groups(data, dict(enumerate("aabbcc")))
    assert inference.main(["--checkpoint_path", folds[0], "--tune_postprocess"]) == 2
    assert "are 1 group, and a step is only kept if it helps on several groups" in capsys.readouterr().err
    assert inference.main(["--cv", *folds, "--tune_postprocess"]) == 0
    assert "95 % intervals over groups" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [["--split", "val"], ["--input", "a.png"], ["--postprocess", "opening"], ["--overlay"], ["--output", "out"]],
)
def test_tuning_refuses_what_it_would_pass_over(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--checkpoint_path", "best.pt", "--tune_postprocess", *words]) == 2
    assert f"leave out {words[0]}" in capsys.readouterr().err


def test_an_ensemble_cannot_be_tuned(capsys: pytest.CaptureFixture[str]) -> None:
    assert inference.main(["--ensemble", "a.pt", "b.pt", "--tune_postprocess"]) == 2
    assert "--tune_postprocess is for --checkpoint_path or --cv" in capsys.readouterr().err
