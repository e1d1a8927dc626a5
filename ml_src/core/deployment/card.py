"""MODEL_CARD.md: what an exported file is, how to run it, how good it is, and what nobody knows of it.

Markdown for people; programs read the metadata in the file. Words of users (names of classes, files, versions) are
escaped, so that they stay words.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ml_src.core.checking.output_folder import digest_of
from ml_src.core.deployment.benchmark import END_TO_END, NETWORK
from ml_src.core.deployment.card_federation import federation_lines, federations, trained_by
from ml_src.core.deployment.facts import Privacy, Scores
from ml_src.core.deployment.markdown import figure, interval, numbers, shell, size_text, table, text
from ml_src.core.deployment.programs import python_lines
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.openvino_file import weights_of
from ml_src.core.postprocess_specs import as_word, steps_from_yaml

FORMATS = {".onnx": "ONNX", ".xml": "OpenVINO", ".safetensors": "safetensors"}
"""Of all other endings it is TorchScript."""
EXTRAS = {"ONNX": "runtime", "OpenVINO": "openvino"}
"""The extra that ml-inference needs to open it."""
SPLITS = {"val": "validation", "test": "test"}
LEVELS = {"uint8": 255, "uint16": 65535, "float32": 1}
"""What counts as 1 in the normalisation."""


class ExportedFile(NamedTuple):
    """A file of an export, as the card names it."""

    name: str
    num_bytes: int
    sha256: str


def model_card(
    metadata: Metadata,
    validation: Mapping[str, Any] | None,
    benchmark: Mapping[str, Any] | None,
    path: Path,
    input_size: tuple[int, int] | None = None,
) -> str:
    """Return the card of a file that lies at `path`, as Markdown.

    Args:
        metadata: what the file says about itself.
        validation: `Parity.to_json`; None where it was not asked for.
        benchmark: `Benchmark.to_json`, likewise.
        path: the file; of OpenVINO the .xml, whose .bin is named too.
        input_size: the one height and width that the file takes; None where it takes all.
    """
    kind = FORMATS.get(path.suffix.lower(), "TorchScript")
    paths = [path, weights_of(path)] if kind == "OpenVINO" else [path]
    files = [ExportedFile(one.name, one.stat().st_size, digest_of(one)) for one in paths]
    return card_of(metadata, validation, benchmark, kind, files, input_size)


def is_card_of(path: Path, card: Path) -> bool:
    """Whether a card is that of a file."""
    with card.open(encoding="utf-8") as file:
        return file.readline().rstrip("\n") == _title(path.name)


def _title(name: str) -> str:
    return f"# Model card: {text(name)}"


def card_of(
    metadata: Metadata,
    validation: Mapping[str, Any] | None,
    benchmark: Mapping[str, Any] | None,
    kind: str,
    files: Sequence[ExportedFile],
    input_size: tuple[int, int] | None = None,
) -> str:
    """Return the card of files; the first is the one to open. Nothing is read. The rest is as in `model_card`."""
    parts = [
        _head(metadata, validation, kind, files),
        _use(metadata, kind, files[0].name),
        _ends(metadata, kind, input_size),
        _classes(metadata),
        _steps(metadata),
        federation_lines(metadata),
        _scores(metadata),
        _privacy(metadata),
        _validation(validation),
        _speed(benchmark),
        _origin(metadata),
        _limits(metadata, validation, kind),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part) + "\n"


# What it is and how it is run


def _head(
    metadata: Metadata, validation: Mapping[str, Any] | None, kind: str, files: Sequence[ExportedFile]
) -> list[str]:
    number, members = metadata.num_classes, len(metadata.checkpoints)
    of = "" if members == 1 else f" It is the weighted mean of {members} networks."
    lines = [
        _title(files[0].name),
        "",
        f"A network that gives each pixel of an image one of {number} classes (semantic segmentation), exported as "
        f"{kind} in {metadata.precision}.{of}",
        "",
        *table(["file", "bytes", "SHA-256"], [[text(one.name), str(one.num_bytes), one.sha256] for one in files]),
    ]
    if validation is not None and validation["verdict"] != "PASS":
        lines += [
            "",
            f"**Do not use it: it does not predict what its checkpoint does.** {text(validation['reason'])}.",
        ]
    return lines


def _use(metadata: Metadata, kind: str, name: str) -> list[str]:
    lines = ["## How to run it"]
    if kind in EXTRAS:
        lines += [
            "",
            "On files and folders, with tiles, overlays and post-processing, in an environment without PyTorch:",
            "",
            "```bash",
            f"pip install 'ml-src[{EXTRAS[kind]}]'",
            f"ml-inference --checkpoint_path {shell(name)} --input IMAGES --output RESULTS",
            "```",
        ]
    lines += ["", "In Python:", "", "```python", *python_lines(metadata, kind, name), "```"]
    if metadata.resize is not None and kind != "safetensors":
        lines += [
            "",
            "Where images shrink more than twofold, `ml-inference` averages pixels before it resizes, "
            "so that its results differ a little from these lines.",
        ]
    return lines


# What it takes and gives


def _ends(metadata: Metadata, kind: str, input_size: tuple[int, int] | None) -> list[str]:
    channels, number = metadata.channels, metadata.num_classes
    shape = f"N, H, W, {channels}" if metadata.layout == "NHWC" else f"N, {channels}, H, W"
    full = LEVELS[metadata.input_type]
    of_full = "" if full == 1 else f", as shares of {full}"
    statistics = f"mean {numbers(metadata.mean)}, standard deviation {numbers(metadata.std)}{of_full}"
    lines = ["## Input and output", ""]
    if kind == "safetensors":
        lines += [
            "The file holds weights alone. Images are to be (N, C, H, W) float32, normalised before: "
            f"less mean, divided by standard deviation; {statistics}. Softmax and argmax come after.",
        ]
    else:
        rows = [
            ["input", "images", metadata.input_type, f"({shape})", _meaning_of_images(metadata)],
            ["output", "labels", metadata.label_type, "(N, H, W)", "the most probable class of each pixel"],
            ["output", "probabilities", "float32", f"(N, {number}, H, W)", "of each class; they sum to 1"],
        ]
        lines += table(["", "name", "type", "shape", "meaning"], rows)
        lines += ["", f"The normalisation is inside the file: give images as they are. It uses {statistics}."]
        if input_size is None:
            lines.append("Any N, H and W of 1 or more are taken; what the network needs beyond is padded inside.")
        else:
            lines.append(f"H and W are {input_size[0]} and {input_size[1]}, and no others.")
    lines.append(_sizes(metadata))
    return lines


def _meaning_of_images(metadata: Metadata) -> str:
    order = {1: "gray", 3: "red, green, blue"}.get(metadata.channels, "channels in the order of training")
    return f"{order}; 8-bit values / 255, 16-bit values / 65535" if metadata.input_type == "float32" else order


def _sizes(metadata: Metadata) -> str:
    trained = (
        "images of their own size" if metadata.training_size is None else f"{size_text(metadata.training_size)} pixels"
    )
    resized = (
        "Images keep their own size; larger ones are best cut into overlapping tiles, as `ml-inference` does."
        if metadata.resize is None
        else f"Whole images are to be resized to {size_text(metadata.resize)} (height x width) before and the "
        "probabilities back after, which is not in the file; `ml-inference` does it."
    )
    return f"It was trained on {trained}{'' if metadata.training_size is None else ' (height x width)'}. {resized}"


def _classes(metadata: Metadata) -> list[str]:
    rows = [
        [str(index), text(name), "#{:02x}{:02x}{:02x}".format(*colour)]
        for index, (name, colour) in enumerate(zip(metadata.class_names, metadata.colours, strict=True))
    ]
    ignored = metadata.ignore_index
    words = (
        f"Class {ignored} was ignored in training and in all scores: what the network says of it means nothing."
        if ignored < metadata.num_classes
        else f"In masks, {ignored} stands for pixels that are not labelled; the network never says it."
    )
    return ["## Classes", "", *table(["value", "name", "colour"], rows), "", words]


def _steps(metadata: Metadata) -> list[str]:
    lines = ["## Post-processing", ""]
    if not metadata.postprocess:
        return [*lines, "None: the label map is the result."]
    words = [as_word(step) for step in steps_from_yaml(metadata.postprocess)]
    return [
        *lines,
        "Not in the file. `ml-inference` applies these steps to the label map, in this order; other programs have to:",
        "",
        *(f"{number}. `{word}`" for number, word in enumerate(words, 1)),
    ]


# How good it is


def _scores(metadata: Metadata) -> list[str]:
    lines = ["## Scores", ""]
    found = {split: Scores.model_validate(metadata.metrics[split]) for split in SPLITS if split in metadata.metrics}
    if not found:
        if any(one.config is not None and one.config.personalize != "none" for one in federations(metadata)):
            return [
                *lines,
                "Not known: the federation measured the network of each site, with its own batch normalisation.",
            ]
        return [*lines, "Not known: nothing beside the checkpoint says how good it is."]
    lines.append("Of the checkpoint, on images that took no part in the training, at their own size.")
    for split, scores in found.items():
        lines += ["", *_scores_of(SPLITS[split], scores, metadata)]
    if "val" in found:
        chosen = "round" if federations(metadata) else "epoch"
        lines += ["", f"The validation images chose the {chosen}, which flatters their scores."]
    return lines


def _scores_of(split: str, scores: Scores, metadata: Metadata) -> list[str]:
    outlines, intervals = scores.boundaries, scores.intervals
    unit = "" if outlines is None else ("pixels" if outlines.pixel_size == 1 else "units")
    values = [
        ("mean IoU", "iou", scores.iou),
        ("mean Dice", "dice", scores.dice),
        ("pixel accuracy", "pixel_accuracy", scores.pixel_accuracy),
    ]
    if outlines is not None:
        values += [
            (f"HD95, in {unit}", "hd95", outlines.hd95),
            (f"surface Dice within {outlines.tolerance:g} {unit}", "surface_dice", outlines.surface_dice),
            ("boundary IoU", "boundary_iou", outlines.boundary_iou),
        ]
    rows = [
        [name, f"{value:.4f}", interval(None if intervals is None else getattr(intervals, key))]
        for name, key, value in values
        if value is not None
    ]
    ends = None if intervals is None else intervals.iou_per_class
    if len(scores.iou_per_class) == metadata.num_classes:
        for index, (name, value) in enumerate(zip(metadata.class_names, scores.iou_per_class, strict=True)):
            between = ends[index] if ends is not None and index < len(ends) else None
            shown = "ignored" if index == metadata.ignore_index else "not present" if value is None else f"{value:.4f}"
            rows.append([f"IoU of {index} ({text(name)})", shown, interval(between)])
    how = "" if scores.precision is None else f", computed in {text(', '.join(sorted(set(scores.precision))))}"
    images = (
        f"{split} images of the sites that measured it"
        if scores.num_images is None
        else f"{scores.num_images} {split} images"
    )
    lines = [f"{images[0].upper()}{images[1:]}{how}; {_applied(scores, metadata)}:", ""]
    lines += table([split, "value", "95 % interval"], rows)
    if intervals is None:
        return [*lines, "", "Intervals are not known."]
    alike = ", all of one group, so that new groups may differ by more" if intervals.one_group else ""
    return [*lines, "", f"Intervals are by resampling {intervals.num} {text(intervals.over)}{alike}."]


def _applied(scores: Scores, metadata: Metadata) -> str:
    if scores.postprocess is None:
        return "with the post-processing of the training's configuration"
    if scores.postprocess == metadata.postprocess:
        return "with the post-processing above" if metadata.postprocess else "without post-processing"
    steps = " ".join(as_word(step) for step in steps_from_yaml(scores.postprocess))
    return f"with other post-processing than above (`{steps}`)" if steps else "without the post-processing above"


def _privacy(metadata: Metadata) -> list[str]:
    trainer = metadata.config.get("training", {}).get("trainer_type")
    if metadata.privacy is None and trainer != "dp":
        return []
    lines = ["## Differential privacy", ""]
    if metadata.privacy is None:
        return [*lines, "It was trained with noise, but what that has cost is not known: promise nothing."]
    ledger = Privacy.model_validate(metadata.privacy)
    if ledger.epsilon is None:
        lines.append("None: epsilon has no bound.")
    else:
        lines.append(
            f"epsilon {ledger.epsilon:.4g} at delta {ledger.delta:g}; the unit of privacy is one {text(ledger.unit)} "
            f"of the training set; accountant {text(ledger.accountant)}."
        )
    lines += [
        f"It covers the images of {text(one.site)} alone; what the other sites have spent is known to them."
        for one in federations(metadata)
        if one.site is not None
    ]
    rows = [
        [f"{one.noise_multiplier:.4g}", f"{one.sample_rate:.4g}", str(one.steps), f"{one.max_grad_norm:g}"]
        for one in ledger.mechanisms
    ]
    lines += ["", *table(["noise multiplier", "sample rate", "steps", "clip norm"], rows)]
    if ledger.not_covered:
        lines += ["", "Not covered:", "", *(f"- {text(sentence)}" for sentence in ledger.not_covered)]
    return lines


def _validation(report: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Beside its checkpoint", ""]
    if report is None:
        return [*lines, "Not compared (`ml-export --validate`)."]
    names, labels, probs = report["names"], report["labels"], report["probabilities"]
    lines += [
        f"**{report['verdict']}**: {text(report['reason'])}.",
        "",
        f"{text(names['exported'])} beside {text(names['reference'])}, on {report['num_images']} "
        f"{text(report['images'])}, {report['num_pixels']} pixels, of which {report['num_labelled_pixels']} are "
        "labelled:",
        "",
    ]
    rows = [
        ["equal labels", f"{labels['num_equal']} of {report['num_pixels']}", "", ""],
        ["probabilities, largest difference", figure(probs["max_difference"], ".2g"), "", ""],
        ["probabilities, mean difference", figure(probs["mean_difference"], ".2g"), "", ""],
    ]
    scores = [("mean IoU", report["iou"]), ("mean Dice", report["dice"])]
    scores += [(f"IoU of {one['class']} ({text(one['name'])})", one["iou"]) for one in report["per_class"]]
    rows += [
        [name, *(figure(one[key], ".4f") for key in ("reference", "exported")), figure(one["difference"], "+.6f")]
        for name, one in scores
        if one["reference"] is not None or one["exported"] is not None
    ]
    return [*lines, *table(["", "reference", "exported", "difference"], rows)]


def _speed(report: Mapping[str, Any] | None) -> list[str]:
    lines = ["## Speed", ""]
    if report is None:
        return [*lines, "Not measured (`ml-export --benchmark`)."]
    conditions, number = report["conditions"], report["num_runs"]
    rows = []
    for one in report["contestants"]:
        whole = one["stages"][END_TO_END]
        network = one["stages"].get(NETWORK, whole)
        peak = one["peak_bytes"]
        rows.append(
            [
                text(one["name"]),
                str(one["threads"]),
                *(f"{network[f'p{share}_ms']:.1f}" for share in (50, 95, 99)),
                figure(network["ratio"], ".2f"),
                f"{whole['p50_ms']:.1f}",
                figure(peak and peak / (1 << 20), ".0f"),
                figure(one["startup_seconds"], ".2f"),
            ]
        )
    heads = ["", "threads", "network p50 ms", "p95", "p99", "ratio", "end to end p50 ms", "peak MiB", "start-up s"]
    height, width = conditions["image_size"]
    versions = ", ".join(f"{name} {version}" for name, version in conditions["versions"].items())
    return [
        *lines,
        *table(heads, rows),
        "",
        f"{number} runs of each, in turn{'; p99 of so few is the slowest' if number < 100 else ''}. Batches of "
        f"{conditions['batch_size']}, {height}x{width} pixels, {conditions['channels']} channels, on "
        f"{text(conditions['device'])}; {text(conditions['cpu'])}, {conditions['num_cores']} cores; "
        f"{text(versions)}. ratio: how many times as fast as {text(report['reference'])}. Other machines give other "
        "numbers.",
    ]


# Where it comes from and where it ends


def _origin(metadata: Metadata) -> list[str]:
    members = [[text(one["name"]), f"{one['weight']:.4g}", text(one["sha256"])] for one in metadata.checkpoints]
    licence = metadata.encoder_licence
    return [
        "## Origin",
        "",
        *table(["checkpoint", "weight", "SHA-256"], members),
        "",
        "Versions: " + text(", ".join(f"{name} {version}" for name, version in metadata.versions.items())) + ".",
        "Licence of the encoder's pretrained weights: "
        + ("no such weights are known of." if licence is None else f"{text(licence)}."),
        "The licence of the training images is not known here; it may bind the network too.",
        "The whole configuration is in the file's metadata, as `ml_src.config`.",
    ]


def _limits(metadata: Metadata, validation: Mapping[str, Any] | None, kind: str) -> list[str]:
    data = metadata.config.get("data", {})
    name = data.get("dataset_name") or Path(str(data.get("data_dir", ""))).name
    trained = [trained_by(one) for one in federations(metadata)]
    if len(trained) < len(metadata.checkpoints):
        trained.insert(0, "on " + (text(name) if name and not trained else "data that have no name here"))
    lines = [
        f"It was trained {'; '.join(dict.fromkeys(trained))}. Nothing is known of images from elsewhere: other "
        "devices, sites, colours or resolutions were not tested.",
        "Every pixel gets one of the classes, also where the image shows none of them.",
        "Probabilities are not calibrated: 0.9 does not mean right nine times of ten.",
    ]
    if "test" not in metadata.metrics:
        lines.append("No scores of a held-out test split are known.")
    if metadata.training_size is not None:
        lines.append(
            f"Objects were seen at the scale of {size_text(metadata.training_size)} samples; at others it may fail."
        )
    if validation is None:
        lines.append("It was not compared with its checkpoint, so that the scores above may not be its own.")
    elif not validation["num_labelled_pixels"]:
        lines.append("It was compared with its checkpoint without masks, so that the scores above are not its own.")
    if metadata.precision == "int8":
        lines.append("Its numbers are rounded to 8 bits: single pixels differ from the checkpoint.")
    if not data.get("mirror", True):
        lines.append("Its classes differ by being left or right: do not mirror images.")
    if kind == "safetensors":
        lines.append("It needs ml_src and PyTorch, and the plugins with which it was trained.")
    return ["## Limits", "", *(f"- {line}" for line in lines)]
