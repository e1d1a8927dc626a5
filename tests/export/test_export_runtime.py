"""An exported file predicts without torch what NumPy and PyTorch work out, in every layout, number type and size."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from known_exports import (
    METADATA,
    expected_probabilities,
    metadata_of,
    model_of,
    random_images,
    write_onnx,
    write_openvino,
)
from onnx import helper
from torch import nn

from ml_src.core.errors import CheckpointError, ConfigError, DataError
from ml_src.core.export.graph import Exportable
from ml_src.core.export.onnx import export_onnx
from ml_src.core.export.runtime import open_exported, usable_threads

SHAPES = [(1, 1, 1), (2, 5, 3), (1, 70, 33), (5, 2, 9)]
WRITERS = {"onnx": write_onnx, "xml": write_openvino}
engines = pytest.mark.parametrize("suffix", WRITERS)


@engines
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
@pytest.mark.parametrize("input_type", ["uint8", "uint16", "float32"])
def test_probabilities_are_those_of_numpy(suffix: str, layout: Any, input_type: Any, tmp_path: Path) -> None:
    metadata = metadata_of(layout=layout, input_type=input_type)
    exported = open_exported(WRITERS[suffix](tmp_path / f"best.{suffix}", metadata), "cpu", threads=1)
    for shape in SHAPES:  # one after another in the same session
        images = random_images((*shape, metadata.channels), input_type)
        found, expected = exported.probabilities(images), expected_probabilities(images, metadata)
        assert found.dtype == np.float32 and np.abs(found - expected).max() < 2e-6
        labels = exported.labels(images)
        assert labels.dtype == np.uint8 and np.array_equal(labels, found.argmax(axis=1))


@engines
def test_many_classes_and_channels_have_uint16_labels(suffix: str, tmp_path: Path) -> None:
    metadata = metadata_of(300, channels=8, mean=[0.5], std=[0.25])
    exported = open_exported(WRITERS[suffix](tmp_path / f"best.{suffix}", metadata), "cpu", threads=1)
    images = random_images((2, 6, 7, 8))
    expected = expected_probabilities(images, metadata)
    labels = exported.labels(images)
    assert labels.dtype == np.uint16 and labels.max() > 255
    assert np.abs(exported.probabilities(images) - expected).max() < 2e-6
    assert np.array_equal(labels, expected.argmax(axis=1))


def test_the_metadata_the_files_and_the_engine_are_told(tmp_path: Path) -> None:
    onnx, openvino = (open_exported(write(tmp_path / f"best.{suffix}")) for suffix, write in WRITERS.items())
    assert onnx.metadata == openvino.metadata == METADATA
    assert onnx.files == [tmp_path / "best.onnx"]
    assert openvino.files == [tmp_path / "best.xml", tmp_path / "best.bin"]
    assert onnx.engine.startswith("onnxruntime ") and openvino.engine.startswith("openvino 2")
    assert onnx.input_size is openvino.input_size is None


def test_a_float_file_takes_whole_numbers_as_shares_of_their_range(tmp_path: Path) -> None:
    metadata = metadata_of(input_type="float32")
    exported = open_exported(write_onnx(tmp_path / "best.onnx", metadata))
    for kind in ("uint8", "uint16"):
        images = random_images((1, 4, 5, 2), kind)
        assert np.abs(exported.probabilities(images) - expected_probabilities(images, metadata)).max() < 2e-6


@engines
@pytest.mark.parametrize("layout", ["NHWC", "NCHW"])
def test_a_file_of_one_size_repeats_the_edges_of_smaller_images(suffix: str, layout: Any, tmp_path: Path) -> None:
    metadata = metadata_of(layout=layout)
    exported = open_exported(WRITERS[suffix](tmp_path / f"best.{suffix}", metadata, size=(8, 6)))
    assert exported.input_size == (8, 6)
    for shape in ((1, 8, 6), (2, 3, 6), (1, 1, 1)):
        images = random_images((*shape, 2))
        assert np.abs(exported.probabilities(images) - expected_probabilities(images, metadata)).max() < 2e-6
        assert exported.labels(images).shape == shape
    with pytest.raises(DataError, match="at most 8 x 6 pixels, but these have 8 x 7: predict in tiles"):
        exported.labels(random_images((1, 8, 7, 2)))


def test_images_need_not_be_contiguous(tmp_path: Path) -> None:
    exported = open_exported(write_onnx(tmp_path / "best.onnx"))
    images = random_images((2, 8, 9, 2))
    assert np.array_equal(exported.labels(images[:, ::-1, ::2]), exported.labels(images)[:, ::-1, ::2])


@engines
def test_a_result_is_not_changed_by_the_next_one(suffix: str, tmp_path: Path) -> None:
    exported = open_exported(WRITERS[suffix](tmp_path / f"best.{suffix}"))
    first = exported.probabilities(random_images((1, 4, 4, 2)))
    before = first.copy()
    exported.probabilities(random_images((1, 4, 4, 2), seed=1))
    assert np.array_equal(first, before)


def test_images_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    exported = open_exported(write_onnx(tmp_path / "best.onnx"))
    with pytest.raises(DataError, match=r"best\.onnx takes images of 2 channels, but these have 3: give"):
        exported.probabilities(random_images((1, 4, 4, 3)))
    for kind in ("uint16", "float32"):
        with pytest.raises(
            DataError, match=f"the image is {kind}, but .* takes images of uint8: .*--input_type float32"
        ):
            exported.labels(random_images((1, 4, 4, 2), kind))
    for shape in ((4, 4, 2), (0, 4, 4, 2), (1, 0, 4, 2), (1, 4, 0, 2)):
        with pytest.raises(ValueError, match=r"not \(N, H, W, C\)"):
            exported.labels(np.zeros(shape, np.uint8))


class Small(nn.Module):
    """Halves its images twice and doubles them again, so that odd sizes have to be padded."""

    size_multiple, least_size = 4, 8

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 8, 4, stride=4)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 3, 4, stride=4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        up: torch.Tensor = self.up(self.norm(self.down(images)).relu())
        return up


def test_what_ml_export_writes_predicts_as_the_network_in_pytorch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    exportable = Exportable([Small()], [1.0], 3, [0.5], [0.25], "uint8", "NHWC", 3)
    metadata = metadata_of(channels=3, mean=[0.5], std=[0.25])
    export_onnx(exportable, tmp_path / "best.onnx", metadata.to_strings())
    exported = open_exported(tmp_path / "best.onnx", "cpu", threads=1)
    assert exported.metadata == metadata
    for shape in [*SHAPES, (1, 101, 64)]:
        images = random_images((*shape, 3))
        with torch.inference_mode():
            labels, probabilities = exportable(torch.from_numpy(images))
        assert np.abs(exported.probabilities(images) - probabilities.numpy()).max() < 1e-5
        assert np.array_equal(exported.labels(images), labels.numpy())


WITHOUT_TORCH = """
import json, sys
from pathlib import Path
for name in ("torch", "onnx", "pydantic", "cv2"):
    sys.modules[name] = None  # whoever imports it is refused
import numpy as np
from ml_src.core.export.runtime import open_exported
exported = open_exported(Path(sys.argv[1]), "cpu", threads=1)
print(json.dumps(exported.labels(np.load(sys.argv[2])).tolist()))
"""


@engines
def test_neither_torch_nor_the_rest_of_the_package_is_needed(suffix: str, tmp_path: Path) -> None:
    model = WRITERS[suffix](tmp_path / f"best.{suffix}")
    images = random_images((2, 5, 4, 2))
    np.save(tmp_path / "images.npy", images)
    arguments = [sys.executable, "-c", WITHOUT_TORCH, str(model), str(tmp_path / "images.npy")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(done.stdout) == expected_probabilities(images, METADATA).argmax(axis=1).tolist()
    assert done.stderr == ""


TOO_LITTLE_MEMORY = """
import resource, sys
from pathlib import Path
import numpy as np
from ml_src.core.export.runtime import open_exported
exported = open_exported(Path(sys.argv[1]), "cpu", threads=1)
small, large = np.zeros((1, 8, 8, 2), np.uint8), np.zeros((1, 3000, 3000, 2), np.uint8)
exported.labels(small)
in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**25, resource.getrlimit(resource.RLIMIT_AS)[1]))
for predict in (exported.labels, exported.probabilities, exported.labels):
    try:
        print(predict(large).shape)
    except MemoryError:
        print("MemoryError")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and measures the memory of a process as Linux does")
@engines
def test_memory_that_is_not_there_is_a_memory_error_and_never_an_old_result(suffix: str, tmp_path: Path) -> None:
    model = WRITERS[suffix](tmp_path / f"best.{suffix}")
    arguments = [sys.executable, "-c", TOO_LITTLE_MEMORY, str(model)]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert done.stdout.split() == ["MemoryError"] * 3


TELEMETRY = """
import sys
from ml_src.core.export.openvino_file import import_openvino
import_openvino()
print(sorted(name for name in sys.modules if name.startswith("openvino_telemetry") and sys.modules[name]))
"""


def test_openvino_is_imported_without_the_program_that_reports_its_use() -> None:
    done = subprocess.run(
        [sys.executable, "-c", TELEMETRY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2]
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("suffix", "module", "extra"), [("onnx", "onnxruntime", "runtime"), ("xml", "openvino", "openvino")]
)
def test_an_engine_that_is_not_installed_is_named_with_its_pip_command(
    suffix: str, module: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = WRITERS[suffix](tmp_path / f"best.{suffix}")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"pip install 'ml-src\[{extra}\]'"):
        open_exported(path)


@engines
@pytest.mark.parametrize("device", ["cuda", "cuda:1", "mps", "cpu:x", "tpu"])
def test_a_device_that_is_not_there_is_refused(suffix: str, device: str, tmp_path: Path) -> None:
    import onnxruntime

    if suffix == "onnx" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime knows CUDA")
    with pytest.raises(ConfigError, match="use"):
        open_exported(WRITERS[suffix](tmp_path / f"best.{suffix}"), device)


def test_missing_files_folders_and_other_suffixes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist: write it with ml-export"):
        open_exported(tmp_path / "best.onnx")
    with pytest.raises(CheckpointError, match="is a folder"):
        open_exported(tmp_path)
    other = tmp_path / "best.tflite"
    other.write_bytes(b"TFL3")
    with pytest.raises(CheckpointError, match=r"no \.onnx or \.xml"):
        open_exported(other)


def test_a_graph_that_fails_as_it_runs_is_an_error_of_the_file(tmp_path: Path) -> None:
    model = model_of(METADATA)
    model.graph.node.insert(3, helper.make_node("Reshape", ["centred", "shape"], ["centred again"]))
    model.graph.initializer.append(helper.make_tensor("shape", 7, [4], [1, 2, 3, 3]))
    model.graph.node[4].input[0] = "centred again"
    (tmp_path / "best.onnx").write_bytes(model.SerializeToString())
    exported = open_exported(tmp_path / "best.onnx")
    assert exported.labels(random_images((1, 3, 3, 2))).shape == (1, 3, 3)
    with pytest.raises(CheckpointError, match=r"onnxruntime .* cannot compute .*best\.onnx for images of shape"):
        exported.labels(random_images((1, 4, 4, 2)))


def test_a_result_of_another_shape_is_an_error_of_the_file(tmp_path: Path) -> None:
    model = model_of(METADATA)
    model.graph.node[0].attribute[0].ints[:] = [0, 3, 2, 1]  # height and width change places
    (tmp_path / "best.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"gave labels of shape \(1, 4, 3\)"):
        open_exported(tmp_path / "best.onnx").labels(random_images((1, 3, 4, 2)))


@pytest.mark.parametrize(("value", "expected"), [("3", 3), ("2,4", 2), (" 5 ", 5)])
def test_threads_follow_the_environment(value: str, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert usable_threads() == expected


@pytest.mark.parametrize("value", ["", "0", "-1", "many"])
def test_without_a_number_threads_are_the_cores_of_this_process(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert usable_threads() == cores
