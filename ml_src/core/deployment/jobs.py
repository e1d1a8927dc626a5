"""What ml-export is asked for: a checkpoint, or several, as one file that needs no PyTorch. Next to read: `export/`.

The file is written into a folder of its own beside its target and takes its name only when all that was asked for has
passed. A file that fails the validation is kept under another name.
"""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from ml_src.core.allocator import keep_freed_memory
from ml_src.core.atomic import only_writer, write_json, write_text
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config_file import plain
from ml_src.core.data.files import Pair, image_info
from ml_src.core.deployment.card import is_card_of, model_card
from ml_src.core.deployment.contestants import Entry, benchmark_members, exported_entry, torch_entries
from ml_src.core.deployment.evaluation import compare_on, compare_on_random
from ml_src.core.deployment.facts import collected
from ml_src.core.deployment.federation import federation_of
from ml_src.core.deployment.formats import SUFFIXES, Format, open_written, write
from ml_src.core.deployment.parity import Parity
from ml_src.core.errors import ConfigError, DataError
from ml_src.core.export.metadata import InputType, Layout, Metadata, Precision
from ml_src.core.export.openvino import export_openvino
from ml_src.core.export.openvino_file import weights_of
from ml_src.core.inference.exported_member import ExportedMember
from ml_src.core.inference.jobs import home_of
from ml_src.core.inference.members import Member, checkpoints, require_same_classes, weighted
from ml_src.core.inference.predictor import Options
from ml_src.core.inference.torch_member import TorchMember, open_checkpoint
from ml_src.core.pictures import palette
from ml_src.core.postprocess_specs import steps_to_yaml
from ml_src.core.progress import progress_bar

VERSIONS = ("ml-src", "torch", "onnx", "onnxscript", "onnxruntime", "openvino", "safetensors")
CARD = "MODEL_CARD.md"
OPSET = 20

log = logging.getLogger("ml_src")


@dataclass(frozen=True)
class Request:
    """The words of the command line."""

    checkpoints: Sequence[Path]
    output: Path | None = None
    format: Format = "onnx"
    opset: int | None = None  # None: 20
    precision: Precision = "fp32"
    layout: Layout | None = None  # None: NHWC
    input_type: InputType | None = None  # None: that of the images
    input_size: tuple[int, int] | None = None
    weights: Sequence[float] | None = None
    data_dir: Path | None = None
    plugins: Sequence[str] = ()
    validate: bool = False
    benchmark: bool = False


class Written(NamedTuple):
    """What came of it: the blocks that are printed, the files, and whether the file may be used."""

    blocks: list[str]
    path: Path
    files: list[Path]
    passed: bool


def export(request: Request) -> Written:
    """Write the file, its card, and what else is asked for, beside it.

    Raises: MLError for all that the user can mend.
    """
    keep_freed_memory()
    _require_possible(request)
    members = _opened(request)
    target = _target(request, members)
    pairs = _pairs(request, members) if request.validate or request.benchmark or request.precision == "int8" else _NONE
    metadata = _metadata(request, members)
    reports: dict[str, Any] = {}
    passed = True
    with _workshop(target) as folder:
        draft = folder / target.name
        opset, size = request.opset or OPSET, request.input_size
        blocks = write(draft, request.format, members, metadata, opset, size, pairs.calibrating)
        if request.validate or request.benchmark:
            exported = open_written(draft, request.format, members, metadata, size)
        if request.validate:
            parity = _validated(members, exported, metadata, pairs)
            reports["validation"] = parity.to_json(metadata.precision)
            passed = parity.verdict(metadata.precision).passed
            blocks.append(parity.block(metadata.precision))
        if request.benchmark and passed:
            scratch = folder / "timing"
            scratch.mkdir()
            entries = _entries(request, members, exported, metadata, scratch)
            timed = benchmark_members(entries, metadata, pairs.compared, scratch)
            reports["benchmark"] = timed.to_json()
            blocks.append(timed.block())
        path = target if passed else target.with_name(f"{target.stem}.failed{target.suffix}")
        files = _settled(draft, path)
    files += _write_reports(path, reports)
    if passed:
        files.append(_card_of(path))
        write_text(files[-1], model_card(metadata, reports.get("validation"), reports.get("benchmark"), path, size))
    return Written(blocks, path, files, passed)


def _card_of(path: Path) -> Path:
    """Where the card of a file lies: MODEL_CARD.md, unless that is the card of another file which is there."""
    common, own = path.with_name(CARD), path.with_name(f"{path.name}.{CARD}")
    others = [one for one in path.parent.iterdir() if one.suffix in SUFFIXES.values() and one != path]
    if own.exists() or (common.exists() and any(is_card_of(one, common) for one in others)):
        return own
    return common


def _write_reports(path: Path, reports: Mapping[str, Any]) -> list[Path]:
    """Write what was found out about a file beside it, and remove what was found out about one before it."""
    about = {"file": path.name, "sha256": _sha256(path)}
    written = []
    for kind in ("validation", "benchmark"):
        beside = path.with_suffix(f".{kind}.json" if path.suffix == ".onnx" else f"{path.suffix}.{kind}.json")
        beside.unlink(missing_ok=True)
        if kind in reports:
            write_json(beside, {**about, **reports[kind]})
            written.append(beside)
    return written


def _require_possible(request: Request) -> None:
    """Raise ConfigError for words that would be passed over."""
    if request.precision == "int8" and request.format not in ("onnx", "openvino"):
        raise ConfigError(f"--precision int8 is for onnx and openvino, not for {request.format}")
    if request.precision == "int8" and request.input_size is not None:
        raise ConfigError("--precision int8 is for images of any size: leave out --input_size, or take fp16")
    if request.precision == "fp16" and request.format == "torchscript":
        raise ConfigError("--format torchscript is written in fp32: leave out --precision, or take onnx")
    unused = {"torchscript": ("opset",), "safetensors": ("opset", "layout", "input_type", "input_size")}
    for name in unused.get(request.format, ()):
        if getattr(request, name) is not None:
            raise ConfigError(f"--format {request.format} has no {name}: leave out --{name}")


def _opened(request: Request) -> list[TorchMember]:
    """The members, in float32, with their shares.

    Raises: ConfigError for members that one graph cannot hold, and words that do not go together.
    """
    paths = checkpoints(request.checkpoints)
    for path in paths:
        if path.suffix.lower() in (".onnx", ".xml"):
            raise ConfigError(f"{path} is an exported file already: give the checkpoint, such as {path.parent}/best.pt")
    if len(paths) > 1 and request.format == "safetensors":
        raise ConfigError("--format safetensors holds the weights of one network: give one checkpoint")
    overrides = {} if request.data_dir is None else {"data.data_dir": str(request.data_dir), "data.splits_dir": None}
    members = [open_checkpoint(path, "cpu", request.plugins, overrides, "float32", False) for path in paths]
    require_same_classes(members)
    for other in members[1:]:
        if other.intake != members[0].intake:
            raise ConfigError(
                f"{members[0].path} and {other.path} take different images (channels, resize or normalize), which one "
                "graph cannot give them: export each, and give ml-inference the files with --ensemble"
            )
    return [member for member in weighted(members, request.weights) if isinstance(member, TorchMember)]


def _target(request: Request, members: Sequence[Member]) -> Path:
    """Where the file goes: as asked, else beside the first checkpoint, whose name it has."""
    suffix = SUFFIXES[request.format]
    if request.output is not None:
        if request.output.is_dir():
            raise ConfigError(
                f"--output {request.output} is a folder: give the name of a file in it, ending in {suffix}"
            )
        if request.output.suffix != suffix:
            raise ConfigError(f"--output {request.output}: a file of --format {request.format} ends in {suffix}")
        return request.output
    stem = members[0].path.stem if len(members) == 1 else "ensemble"
    precision = "" if request.precision == "fp32" else f".{request.precision}"
    return members[0].path.with_name(f"{stem}{precision}{suffix}")


def _metadata(request: Request, members: Sequence[TorchMember]) -> Metadata:
    config, intake = members[0].config, members[0].intake
    chains = [member.config.inference.postprocess if member.chain is None else member.chain for member in members]
    if any(chain != chains[0] for chain in chains):
        raise ConfigError("the checkpoints have different chains of post-processing: tune them together with --cv")
    problems: list[str] = []
    paths = [member.path for member in members]
    federations = [federation_of(path, load_checkpoint(path), problems) for path in paths]
    facts = collected(home_of(members), paths, [member.weight for member in members], federations)
    for problem in problems + facts.problems:
        log.warning("%s", problem)
    return Metadata(
        class_names=config.class_names,
        colours=palette(config.data.num_classes).tolist(),
        channels=intake.channels,
        input_type=request.input_type or _type_of_images(request, members[0]),
        layout=request.layout or "NHWC",
        mean=list(intake.mean),
        std=list(intake.std),
        resize=None if intake.size is None else list(intake.size),
        training_size=None if config.train_image_size is None else list(config.train_image_size),
        ignore_index=config.ignore_index,
        postprocess=steps_to_yaml(chains[0]),
        mirror=config.data.mirror,
        metrics=facts.metrics,
        privacy=facts.privacy,
        versions=_versions(),
        checkpoints=[
            {
                "name": str(member.path),
                "sha256": _sha256(member.path),
                "weight": member.weight,
                "fold": member.config.data.fold,
                **({} if federation is None else {"federation": federation.model_dump(mode="json")}),
            }
            for member, federation in zip(members, federations, strict=True)
        ],
        encoder_licence=None,
        precision=request.precision,
        config=plain(config),
    )


def _versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name.replace("-", "_")] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _has_data(request: Request, member: Member) -> bool:
    """Whether the data set is here; to say with --data_dir where it is, and to be wrong, is an error."""
    if request.data_dir is not None:
        member.require_data()
    return Path(member.config.data.data_dir).is_dir()


def _type_of_images(request: Request, member: Member) -> InputType:
    """The number type of the images; float32, as shares of white, where they differ or have other numbers."""
    if not _has_data(request, member):
        log.info("%s is not here: the file will take 8-bit images (--input_type)", member.config.data.data_dir)
        return "uint8"
    try:
        paths = [pair.image for split in ("train", "val") for pair in member.data.pairs(split)]
    except DataError as error:
        raise DataError(f"{error}; or say --input_type, and the images are not looked at") from error
    found = {image_info(path).dtype for path in paths}
    if found == {"uint8"}:
        return "uint8"
    return "uint16" if found == {"uint16"} else "float32"


class _Pairs(NamedTuple):
    """Images and masks: which int8 is calibrated on, and on which the file is compared and timed."""

    calibrating: Sequence[Pair]
    compared: Sequence[Pair]
    what: str = "validation images"


_NONE = _Pairs([], [])


def _pairs(request: Request, members: Sequence[Member]) -> _Pairs:
    """The validation images; an ensemble of several folds is compared on the test images, which none has seen."""
    first = members[0]
    if not _has_data(request, first):
        return _NONE
    validation = list(first.data.pairs("val"))
    found = {image_info(pair.image).dtype for pair in validation}
    if request.input_type not in (None, "float32") and found - {request.input_type}:
        raise ConfigError(
            f"--input_type {request.input_type}: the validation images are {', '.join(sorted(found))}; give that type, "
            "or float32, which takes all"
        )
    if len({member.config.data.fold for member in members}) == 1:
        return _Pairs(validation, validation)
    test = list(first.data.pairs("test"))
    if not test:
        return _Pairs(validation, validation, "validation images, some of which some of the members were trained on")
    return _Pairs(validation, test, "test images")


def _entries(
    request: Request, members: Sequence[TorchMember], exported: Member, metadata: Metadata, folder: Path
) -> list[Entry]:
    """PyTorch, the file, and OpenVINO with the same graph where it is installed."""
    draft = exported.path
    entries = torch_entries([member.path for member in members], members, request.plugins)
    name = exported.exported.engine if isinstance(exported, ExportedMember) else request.format
    opens = request.format in ("onnx", "openvino")
    entries.append(exported_entry(f"{name}, {request.precision}", exported, draft if opens else None))
    if request.format == "onnx" and find_spec("openvino") is not None:
        beside = folder / "beside.xml"
        export_openvino(draft, beside, metadata.to_strings(), request.precision)
        other = open_written(beside, "openvino", members, metadata, request.input_size)
        assert isinstance(other, ExportedMember)
        entries.append(exported_entry(f"{other.exported.engine}, {request.precision}", other, beside))
    return entries


def _validated(members: Sequence[TorchMember], exported: Member, metadata: Metadata, pairs: _Pairs) -> Parity:
    config, name = members[0].config, f"the exported file ({metadata.precision})"
    what = pairs.what if pairs.compared else "pictures of smooth noise"
    parity = Parity(config.class_names, config.ignore_index, "PyTorch float32", name, what)
    if not pairs.compared:
        log.info("Validating on noise, for %s is not here (--data_dir)", config.data.data_dir)
        compare_on_random(parity, members, exported, metadata.input_type)
        return parity
    with progress_bar("validating", len(pairs.compared), least=1) as advance:
        compare_on(parity, members, exported, pairs.compared, Options(batch_size=1), advance)
    return parity


@contextmanager
def _workshop(target: Path) -> Iterator[Path]:
    """A folder beside the target, on the same disk, which does not outlive the block.

    Raises: ConfigError where another process writes the same file.
    """
    folder = target.with_name(f".{target.name}.export")
    with only_writer(folder):
        for left in folder.iterdir():  # of a process that was killed
            if left.is_dir():
                shutil.rmtree(left)
        try:
            with tempfile.TemporaryDirectory(dir=folder) as name:
                yield Path(name)
        except OSError as error:
            if error.filename is not None and Path(os.fsdecode(error.filename)).is_relative_to(folder):
                error.filename = str(target)  # a name that the user knows
            raise
        finally:
            shutil.rmtree(folder)


def _settled(draft: Path, path: Path) -> list[Path]:
    """Give the file of a draft, and what belongs to it, its name."""
    files = []
    for part in [weights_of(draft), draft] if draft.suffix == ".xml" else [draft]:
        files.append(path.with_suffix(part.suffix))
        part.replace(files[-1])
    return files
