"""A model card says what is so, in words that names cannot break, with programs that run as they are printed."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from ml_src.core.checking.grouping import printable
from ml_src.core.config_file import parse_config
from ml_src.core.deployment.benchmark import END_TO_END, Benchmark, Conditions, Fresh, Timing
from ml_src.core.deployment.card import ExportedFile, card_of, model_card
from ml_src.core.deployment.facts import Facts, Scores, collected
from ml_src.core.deployment.parity import Output, Parity
from ml_src.core.deployment.programs import python_lines
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.openvino_file import import_openvino
from ml_src.core.network import build_model

METADATA = Metadata(
    class_names=["background", "cell"],
    colours=[[0, 0, 0], [238, 102, 119]],
    channels=1,
    input_type="uint8",
    layout="NHWC",
    mean=[0.4948],
    std=[0.1726],
    resize=None,
    training_size=[512, 384],
    ignore_index=255,
    postprocess=[],
    mirror=True,
    metrics={},
    privacy=None,
    versions={"ml_src": "0.1.0", "onnxruntime": "1.23"},
    checkpoints=[{"name": "best.pt", "sha256": "ab" * 32, "weight": 1.0}],
    encoder_licence=None,
    precision="fp32",
    config={"data": {"data_dir": "data/cells", "num_classes": 2}, "training": {"trainer_type": "standard"}},
)
FILE = ExportedFile("best.onnx", 1234, "cd" * 32)
SCORES: dict[str, Any] = {
    "num_images": 5,
    "iou": 0.8105,
    "dice": 0.8922,
    "pixel_accuracy": 0.9243,
    "iou_per_class": [0.9066, 0.7144],
    "dice_per_class": [0.951, 0.8334],
}
INTERVALS: dict[str, Any] = {"over": "images", "num": 5, "iou": [0.8022, 0.8185], "iou_per_class": [[0.9, 0.92], None]}
LEDGER: dict[str, Any] = {
    "epsilon": 7.98,
    "delta": 1e-5,
    "accountant": "prv",
    "unit": "patient",
    "mechanisms": [{"noise_multiplier": 0.64, "sample_rate": 0.14, "steps": 7, "max_grad_norm": 1.0}],
    "not_covered": ["the validation images"],
    "replays": {},
}


def card(metadata: Metadata = METADATA, **reports: Any) -> str:
    given: dict[str, Any] = {"validation": None, "benchmark": None, **reports}
    return card_of(metadata, given["validation"], given["benchmark"], "ONNX", [FILE])


def tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text as another program reads them: rows of cells, as plain words."""
    found: list[list[list[str]]] = []
    inside = False
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        inside = token.type == "table_open" or (inside and token.type != "table_close")
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif inside and token.type == "inline":
            found[-1][-1].append("".join(child.content for child in token.children or []))
    return found


def headed(text: str, *heads: str) -> list[list[str]]:
    """The rows below the heads of the one table that begins with these."""
    [rows] = [rows for rows in tables(text) if rows[0][: len(heads)] == list(heads)]
    return rows[1:]


def parity(with_masks: bool = True, wrong: int = 0) -> dict[str, Any]:
    labels = np.arange(10_000).reshape(100, 100).astype(np.uint8) % 2
    other = labels.copy()
    other[0, :wrong] = 1 - other[0, :wrong]
    found = Parity(["background", "cell"], 255, "PyTorch float32", "best.onnx")
    outputs = [Output(np.stack([1 - one, one]).astype(np.float32), one) for one in (labels, other)]
    found.update("a", *outputs, labels if with_masks else None)
    return found.to_json("fp32")


# Words of users


@given(
    name=st.text(
        st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from("|\\`*_[]<>#~!&$\n\r\t")), max_size=12
    )
)
def test_a_class_of_any_name_is_one_row_that_shows_it(name: str) -> None:
    rows = headed(card(replace(METADATA, class_names=[name, "cell"])), "value", "name", "colour")
    assert len(rows) == 2
    assert rows[0] == ["0", printable(name).strip(), "#000000"]


@pytest.mark.parametrize(
    "name", ["a|b", "a\\|b", "`x`", "<script>alert(1)</script>", "a\n\n# PASS", "&amp;", "[x](http://y)"]
)
def test_names_everywhere_stay_words(name: str) -> None:
    metadata = replace(
        METADATA,
        class_names=[name, "cell"],
        checkpoints=[{"name": name, "sha256": name, "weight": 1.0}],
        versions={name: name},
        encoder_licence=name,
        metrics={"val": SCORES},
        config={"data": {"dataset_name": name}},
    )
    file = ExportedFile(name, 1, "00")
    text = card_of(metadata, parity(), None, "ONNX", [file])
    html = MarkdownIt("commonmark").enable("table").render(text)
    plain = MarkdownIt("commonmark").enable("table").render(card_of(METADATA, parity(), None, "ONNX", [FILE]))
    assert "<script" not in html and "<a " not in html
    assert html.count("<h1") == plain.count("<h1") == 1
    assert html.count("<h2") == plain.count("<h2")


def test_a_file_name_cannot_end_the_code_block_or_the_command() -> None:
    text = card_of(METADATA, None, None, "ONNX", [ExportedFile("a b'\n```\n# x; rm.onnx", 1, "00")])
    fences = [token for token in MarkdownIt().parse(text) if token.type == "fence"]
    assert [fence.info for fence in fences] == ["bash", "python"]
    assert len(fences[0].content.splitlines()) == 2


# The programs


def write_onnx(path: Path, metadata: Metadata) -> None:
    """A file that gives class 1 the probability of the first channel, as a share of its full range."""
    full = {"uint8": 255.0, "uint16": 65535.0, "float32": 1.0}[metadata.input_type]
    kind = {"float32": "float"}.get(metadata.input_type, metadata.input_type)
    order, shape = ([0, 3, 1, 2], "N,H,W,C") if metadata.layout == "NHWC" else ([0, 1, 2, 3], "N,C,H,W")
    text = f"""
        <ir_version: 9, opset_import: ["" : 17]>
        graph ({kind}[{shape}] images) => (uint8[N,H,W] labels, float[N,2,H,W] probabilities)
        <int64[1] zero = {{0}}, int64[1] one = {{1}}, float full = {{{full}}}, float certain = {{1.0}}> {{
            numbers = Cast<to = 1>(images)
            planes = Transpose<perm = {order}>(numbers)
            first = Slice(planes, zero, one, one)
            likely = Div(first, full)
            unlikely = Sub(certain, likely)
            probabilities = Concat<axis = 1>(unlikely, likely)
            best = ArgMax<axis = 1, keepdims = 0>(probabilities)
            labels = Cast<to = 2>(best)
        }}"""
    onnx.save(onnx.parser.parse_model(text), path)


def write_image(folder: Path, metadata: Metadata, height: int = 12, width: int = 9) -> np.ndarray:
    """Write a picture whose first channel is bright to the right; return where it is (H, W)."""
    bright = np.zeros((height, width), bool)
    bright[:, width // 3 :] = True
    full = {"uint8": 255, "uint16": 65535, "float32": 1}[metadata.input_type]
    image = np.zeros((height, width, metadata.channels), metadata.input_type)
    image[..., 0] = bright * full
    if metadata.channels in (1, 3) and metadata.input_type != "float32":
        cv2.imwrite(str(folder / "image.png"), image[..., ::-1])
    else:
        np.save(folder / "image.npy", image)
    return bright


def run(lines: list[str]) -> Any:
    names: dict[str, Any] = {}
    exec("\n".join(lines), names)
    return names["labels"]


@pytest.mark.parametrize("resize", [None, [24, 18]])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize(
    ("channels", "input_type"), [(1, "uint8"), (3, "uint8"), (1, "uint16"), (3, "uint16"), (5, "uint8"), (2, "float32")]
)
def test_the_program_for_onnx_predicts_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, input_type: Any, layout: Any, resize: Any
) -> None:
    metadata = replace(METADATA, channels=channels, input_type=input_type, layout=layout, resize=resize)
    monkeypatch.chdir(tmp_path)
    write_onnx(Path("best.onnx"), metadata)
    bright = write_image(tmp_path, metadata)
    lines = python_lines(metadata, "ONNX", "best.onnx")
    assert not any("torch" in line or "ml_src" in line for line in lines)
    np.testing.assert_array_equal(run(lines), bright)


@pytest.mark.parametrize("resize", [None, [24, 18]])
def test_the_program_for_openvino_predicts_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: Any
) -> None:
    openvino = import_openvino()
    metadata = replace(METADATA, resize=resize)
    monkeypatch.chdir(tmp_path)
    write_onnx(Path("best.onnx"), metadata)
    openvino.save_model(openvino.convert_model("best.onnx"), "best.xml", compress_to_fp16=False)
    bright = write_image(tmp_path, metadata)
    np.testing.assert_array_equal(run(python_lines(metadata, "OpenVINO", "best.xml")), bright)


class FirstChannel(torch.nn.Module):
    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        likely = images[..., 0].float() / 255
        return (likely > 0.5).byte(), torch.stack([1 - likely, likely], dim=1)


@pytest.mark.parametrize("resize", [None, [24, 18]])
@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_the_program_for_torchscript_predicts_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resize: Any
) -> None:
    metadata = replace(METADATA, resize=resize)
    monkeypatch.chdir(tmp_path)
    torch.jit.script(FirstChannel()).save("best.torchscript")
    bright = write_image(tmp_path, metadata)
    np.testing.assert_array_equal(run(python_lines(metadata, "TorchScript", "best.torchscript")), bright)


def test_the_program_for_safetensors_builds_the_network_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_config: dict[str, Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config(small_config)
    network = build_model(config.model).eval()
    strings = {"ml_src.config": json.dumps(config.model_dump(mode="json"))}
    save_file(network.state_dict(), "best.safetensors", strings)
    names: dict[str, Any] = {}
    exec("\n".join(python_lines(METADATA, "safetensors", "best.safetensors")), names)
    images = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        assert torch.equal(names["network"](images), network(images))


# What it says


def test_a_card_of_a_file_has_its_size_and_hash(tmp_path: Path) -> None:
    for name in ("best.xml", "best.bin"):
        (tmp_path / name).write_bytes(name.encode() * 3)
    text = model_card(METADATA, None, None, tmp_path / "best.xml")
    hashes = [hashlib.sha256(name * 3).hexdigest() for name in (b"best.xml", b"best.bin")]
    assert headed(text, "file", "bytes") == [["best.xml", "24", hashes[0]], ["best.bin", "24", hashes[1]]]
    assert "ml-src[openvino]" in text and "ml-inference --checkpoint_path best.xml" in text


def test_input_and_output_are_named_with_type_and_layout() -> None:
    rows = headed(card(replace(METADATA, channels=3, layout="NCHW", input_type="uint16")), "", "name", "type")
    assert [row[:4] for row in rows] == [
        ["input", "images", "uint16", "(N, 3, H, W)"],
        ["output", "labels", "uint8", "(N, H, W)"],
        ["output", "probabilities", "float32", "(N, 2, H, W)"],
    ]


def test_sizes_say_whether_images_are_resized_and_which_fit() -> None:
    assert "trained on 512x384 pixels (height x width). Images keep their own size" in card()
    assert "Whole images are to be resized to 256x128" in card(replace(METADATA, resize=[256, 128]))
    assert "trained on images of their own size." in card(replace(METADATA, training_size=None))
    fixed = card_of(METADATA, None, None, "ONNX", [FILE], (64, 32))
    assert "H and W are 64 and 32, and no others." in fixed and "Any N, H and W" not in fixed


def test_steps_are_named_as_the_command_takes_them() -> None:
    text = card(replace(METADATA, postprocess=[{"type": "fill_holes", "area": 96}, {"type": "opening", "radius": 2}]))
    assert "1. `fill_holes,area=96`\n2. `opening,radius=2`" in text
    assert "None: the label map is the result." in card()


def test_scores_come_with_their_intervals_or_say_that_there_are_none() -> None:
    text = card(replace(METADATA, metrics={"val": {**SCORES, "intervals": INTERVALS}, "test": SCORES}))
    rows = headed(text, "validation", "value", "95 % interval")
    assert rows[0] == ["mean IoU", "0.8105", "0.8022 to 0.8185"]
    assert rows[3:5] == [["IoU of 0 (background)", "0.9066", "0.9000 to 0.9200"], ["IoU of 1 (cell)", "0.7144", ""]]
    assert headed(text, "test", "value")[0] == ["mean IoU", "0.8105", ""]
    assert "Intervals are not known." in text and "No scores of a held-out test split" not in text
    assert "nothing beside the checkpoint says how good it is" in card()
    assert "No scores of a held-out test split are known." in card()


def test_scores_say_which_post_processing_they_are_of() -> None:
    steps = [{"type": "fill_holes", "area": 96}]

    def said(of_scores: Any, of_file: Any) -> str:
        metrics = {"val": Scores.model_validate({**SCORES, "postprocess": of_scores}).model_dump(mode="json")}
        return card(replace(METADATA, postprocess=of_file, metrics=metrics))

    assert "with the post-processing above:" in said(steps, steps)
    assert "without the post-processing above:" in said([], steps)
    assert "with other post-processing than above (`fill_holes,area=96`):" in said(steps, [])
    assert "with the post-processing of the training's configuration:" in said(None, steps)
    assert "without post-processing:" in said([], [])


def test_an_ignored_class_is_said_to_mean_nothing() -> None:
    text = card(replace(METADATA, ignore_index=0, metrics={"val": SCORES}))
    assert "Class 0 was ignored" in text
    assert ["IoU of 0 (background)", "ignored", ""] in headed(text, "validation", "value")


def test_privacy_is_the_ledgers_and_never_a_guess() -> None:
    assert "privacy" not in card().lower()
    text = card(replace(METADATA, privacy=LEDGER))
    assert "epsilon 7.98 at delta 1e-05; the unit of privacy is one patient" in text
    assert headed(text, "noise multiplier") == [["0.64", "0.14", "7", "1"]]
    assert "- the validation images" in text
    assert "None: epsilon has no bound." in card(replace(METADATA, privacy={**LEDGER, "epsilon": None}))
    lost = replace(METADATA, config={"training": {"trainer_type": "dp"}})
    assert "what that has cost is not known: promise nothing" in card(lost)


def test_a_file_that_failed_says_so_at_the_top() -> None:
    text = card(validation=parity(wrong=50))
    assert "**Do not use it" in text.split("## How to run it")[0]
    assert "**FAIL**: 99.5000 % of the labels are equal" in text
    assert "Do not use it" not in card(validation=parity())


def test_the_comparison_with_the_checkpoint_is_shown_with_both_scores() -> None:
    rows = {row[0]: row[1:] for row in headed(card(validation=parity(wrong=1)), "", "reference", "exported")}
    assert rows["equal labels"] == ["9999 of 10000", "", ""]
    assert rows["mean IoU"] == ["1.0000", "0.9998", "-0.000200"]
    assert "the scores above are not its own" in card(validation=parity(with_masks=False))
    assert "was not compared with its checkpoint" in card()


def test_the_benchmark_is_shown_with_its_conditions() -> None:
    times = {"network": [0.1] * 20, END_TO_END: [0.2] * 20}
    timings = [
        Timing("PyTorch float32", 2, times, Fresh(3.5, 900 << 20)),
        Timing("ONNX Runtime", 1, {key: [one / 2 for one in seconds] for key, seconds in times.items()}),
    ]
    conditions = Conditions((512, 512), 1, 1, {"torch": "2.15"}, "AMD EPYC", 2)
    text = card(benchmark=Benchmark(timings, conditions).to_json())
    assert headed(text, "", "threads") == [
        ["PyTorch float32", "2", "100.0", "100.0", "100.0", "1.00", "200.0", "900", "3.50"],
        ["ONNX Runtime", "1", "50.0", "50.0", "50.0", "2.00", "100.0", "-", "-"],
    ]
    assert "20 runs of each, in turn; p99 of so few is the slowest." in text and "AMD EPYC, 2 cores; torch 2.15" in text


# The run folder


def run_folder(home: Path, weights: bytes = b"weights") -> Path:
    checkpoint = home / "weights" / "best.pt"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(weights)
    (home / "metrics.json").write_text(json.dumps({"best_epoch": 3, "val": SCORES, "test": {**SCORES, "iou": 0.5}}))
    return checkpoint


def measured(home: Path, checkpoints: list[Path], shares: list[float], **how: Any) -> None:
    """What ml-inference leaves of a measurement of the validation images."""
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in checkpoints]
    defaults = {"ensemble": None, "tta": [], "precision": ["bfloat16"], "postprocess": [{"type": "keep_largest"}]}
    contents = {"how": {"checkpoints": digests, "weights": shares, **defaults, **how}, **SCORES, "iou": 0.75}
    path = home / "inference" / "val" / "metrics.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**contents, "intervals": {**INTERVALS, "one_group": True}}))


def test_the_end_of_training_gives_the_scores_of_best_pt_alone(tmp_path: Path) -> None:
    best = run_folder(tmp_path)
    facts = collected(tmp_path, [best], [1.0])
    assert {split: scores["iou"] for split, scores in facts.metrics.items()} == {"val": 0.8105, "test": 0.5}
    assert facts.privacy is None and facts.problems == []
    last = shutil.copy(best, best.with_name("last.pt"))
    assert collected(tmp_path, [Path(last)], [1.0]) == Facts({}, None, [])


def test_a_measurement_counts_for_the_very_file_that_was_measured(tmp_path: Path) -> None:
    best = run_folder(tmp_path)
    measured(tmp_path, [best], [1.0])
    found = collected(tmp_path, [best], [1.0]).metrics
    assert (found["val"]["iou"], found["test"]["iou"]) == (0.75, 0.5)
    assert found["val"]["precision"] == ["bfloat16"]
    assert found["val"]["postprocess"] == [{"type": "keep_largest"}]
    assert found["val"]["intervals"]["one_group"] is True
    best.write_bytes(b"trained further")
    assert collected(tmp_path, [best], [1.0]).metrics["val"]["iou"] == 0.8105


@pytest.mark.parametrize("how", [{"tta": ["hflip"]}, {"ensemble": "hard_voting"}, {"weights": [0.4, 0.6]}])
def test_a_measurement_of_something_else_does_not_count(tmp_path: Path, how: dict[str, Any]) -> None:
    members = [run_folder(tmp_path / f"a_fold_{fold}", b"%d" % fold) for fold in range(2)]
    home = tmp_path / "a_ensemble"
    measured(home, members, [0.5, 0.5], ensemble="soft_voting")
    assert collected(home, members, [0.5, 0.5]).metrics["val"]["iou"] == 0.75
    assert collected(home, members[::-1], [0.5, 0.5]).metrics == {}
    measured(home, members, [0.5, 0.5], **how)
    assert collected(home, members, [0.5, 0.5]).metrics == {}


def test_what_is_missing_is_left_out_without_a_word(tmp_path: Path) -> None:
    checkpoint = tmp_path / "best.pt"
    checkpoint.write_bytes(b"")
    assert collected(tmp_path, [checkpoint], [1.0]) == Facts({}, None, [])


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"val": 3}', '{"val": {"iou": "high"}}', "[" * 100_000, '{"val": {"num_images": NaN}}']
)
@pytest.mark.parametrize("place", ["metrics.json", "privacy.json"])
def test_what_is_damaged_is_left_out_and_said(tmp_path: Path, damage: str, place: str) -> None:
    best = run_folder(tmp_path)
    (tmp_path / place).write_text(damage)
    facts = collected(tmp_path, [best], [1.0])
    assert len(facts.problems) == 1 and str(tmp_path / place) in facts.problems[0]
    assert facts.privacy is None
    assert ("val" in facts.metrics) == (place == "privacy.json")


def test_a_number_that_no_score_can_be_is_damage(tmp_path: Path) -> None:
    best = run_folder(tmp_path)
    (tmp_path / "metrics.json").write_text(json.dumps({"val": {**SCORES, "iou": 7.0}, "test": SCORES}))
    facts = collected(tmp_path, [best], [1.0])
    assert list(facts.metrics) == ["test"]
    assert "iou" in facts.problems[0]


def test_the_ledger_of_a_run_is_kept_without_what_only_a_resume_needs(tmp_path: Path) -> None:
    best = run_folder(tmp_path)
    (tmp_path / "privacy.json").write_text(json.dumps(LEDGER))
    privacy = collected(tmp_path, [best], [1.0]).privacy
    assert privacy == {key: value for key, value in LEDGER.items() if key != "replays"}


def test_the_epsilons_of_an_ensemble_add_up(tmp_path: Path) -> None:
    members = [run_folder(tmp_path / f"a_fold_{fold}", b"%d" % fold) for fold in range(3)]
    for path in members:
        (path.parents[1] / "privacy.json").write_text(json.dumps(LEDGER))
    privacy = collected(tmp_path, members, [1 / 3] * 3).privacy
    assert privacy is not None
    assert (privacy["epsilon"], privacy["delta"]) == (pytest.approx(3 * 7.98), pytest.approx(3e-5))
    assert sum(one["steps"] for one in privacy["mechanisms"]) == 21
    assert privacy["not_covered"] == ["the validation images"]
    (members[1].parents[1] / "privacy.json").write_text(json.dumps({**LEDGER, "epsilon": None}))
    unbounded = collected(tmp_path, members, [1 / 3] * 3).privacy
    assert unbounded is not None and unbounded["epsilon"] is None


@pytest.mark.parametrize("second", [None, {**LEDGER, "unit": "image"}])
def test_an_ensemble_of_which_a_member_is_not_private_is_not(tmp_path: Path, second: dict[str, Any] | None) -> None:
    members = [run_folder(tmp_path / f"a_fold_{fold}", b"%d" % fold) for fold in range(2)]
    for path, ledger in zip(members, (LEDGER, second), strict=True):
        if ledger is not None:
            (path.parents[1] / "privacy.json").write_text(json.dumps(ledger))
    facts = collected(tmp_path, members, [0.5, 0.5])
    assert facts.privacy is None
    assert "the ensemble has none" in facts.problems[0]


def test_what_was_collected_survives_the_metadata_and_is_on_the_card(tmp_path: Path) -> None:
    best = run_folder(tmp_path)
    measured(tmp_path, [best], [1.0])
    (tmp_path / "privacy.json").write_text(json.dumps(LEDGER))
    facts = collected(tmp_path, [best], [1.0])
    strings = replace(METADATA, metrics=facts.metrics, privacy=facts.privacy).to_strings()
    text = card(Metadata.from_strings(strings))
    assert ["mean IoU", "0.7500", "0.8022 to 0.8185"] in headed(text, "validation", "value")
    assert "all of one group, so that new groups may differ by more" in text
    assert "epsilon 7.98" in text
