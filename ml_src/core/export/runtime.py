"""Opens an exported file, ONNX or OpenVINO, and predicts with it: NumPy arrays in and out, and no torch.

What the graph does (normalisation, padding, network, softmax, labels) is in the file. Only NumPy and the engine are
needed, which is imported when a file is opened. Next: `onnx_file.py`, what a file is checked for before that.
"""

import os
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ml_src.core.errors import CheckpointError, ConfigError, DataError
from ml_src.core.export.metadata import Metadata
from ml_src.core.export.onnx_file import check_onnx
from ml_src.core.export.openvino_file import check_openvino, import_openvino, weights_of

Images = NDArray[Any]  # uint8, uint16 or float32
FULL_RANGE = {"uint8": 255, "uint16": 65535}  # of all others it is 1
CONVERTIBLE = ("uint8", "uint16", "int16")  # to float32
CUDA = "CUDAExecutionProvider"
OUT_OF_MEMORY = ("failed to allocate", "bad_alloc", "bad allocation", "out of memory", "can not allocate")


class Engine(Protocol):
    """What computes a graph."""

    name: str
    sides: tuple[int | None, int | None]
    """Height and width, where the file has fixed them."""

    def run(self, images: Images, output: str) -> NDArray[Any]:
        """Return one output for images in the layout and number type of the file."""


class Exported:
    """An exported file, open."""

    def __init__(self, path: Path, metadata: Metadata, engine: Engine) -> None:
        self.path, self.metadata = path, metadata
        self._engine = engine

    @property
    def engine(self) -> str:
        """What computes it, with its version: `onnxruntime 1.23.0`."""
        return self._engine.name

    @property
    def files(self) -> list[Path]:
        """The file, and the one with its weights where that is another."""
        return [self.path, weights_of(self.path)] if self.path.suffix.lower() == ".xml" else [self.path]

    @property
    def input_size(self) -> tuple[int, int] | None:
        """Height and width of the network's images, where the file has fixed them; smaller ones are enlarged to it."""
        height, width = self._engine.sides
        return None if height is None or width is None else (height, width)

    def probabilities(self, images: Images) -> NDArray[np.float32]:
        """Return the probability of each class at each pixel, (N, classes, H, W), for images (N, H, W, C).

        Images have the file's number type; a float32 file takes uint8 and uint16 too, as shares of their full range,
        and int16 as it is. Where the file has fixed a size, smaller images are enlarged to it by repeating their last
        row and column, and the result is cropped.

        Raises: DataError for another number of channels or number type, or larger images than a fixed size;
            CheckpointError where the engine fails; MemoryError where it has not enough memory.
        """
        return self._run(images, "probabilities", (self.metadata.num_classes,))

    def labels(self, images: Images) -> NDArray[np.uint8] | NDArray[np.uint16]:
        """Return the class of each pixel, (N, H, W), uint8, or uint16 above 256 classes. Else as `probabilities`."""
        return self._run(images, "labels", ())

    def _run(self, images: Images, output: str, channels: tuple[int, ...]) -> NDArray[Any]:
        number, height, width = self._checked(images).shape[:3]
        result = self._computed(self._as_the_file_wants(images), output)
        if self.input_size is not None:
            result = result[..., :height, :width]
        if result.shape != (number, *channels, height, width):
            raise CheckpointError(
                f"{self.path} gave {output} of shape {result.shape} for images of shape {images.shape}: "
                "export the checkpoint again with ml-export"
            )
        return result

    def _computed(self, images: Images, output: str) -> NDArray[Any]:
        try:
            return self._engine.run(images, output)
        except Exception as error:  # each engine has its own
            if any(words in str(error).lower() for words in OUT_OF_MEMORY):
                raise MemoryError(str(error)) from error
            raise CheckpointError(
                f"{self.engine} cannot compute {self.path} for images of shape {images.shape} ({_reason(error)}): "
                "export the checkpoint again with ml-export --validate"
            ) from error

    def require_type(self, dtype: np.dtype[Any], name: Path | str) -> None:
        """Raise DataError where the file does not take images of a number type."""
        wanted = self.metadata.input_type
        if dtype != wanted and not (wanted == "float32" and dtype.name in CONVERTIBLE):
            raise DataError(
                f"{name} is {dtype}, but {self.path} takes images of {wanted}: give images like those that it was "
                "trained on, or export the checkpoint with --input_type float32, which takes all"
            )

    def typed(self, images: NDArray[Any]) -> Images:
        """Return images in the number type of the file."""
        if images.dtype == self.metadata.input_type:
            return images
        return np.asarray(images.astype(np.float32) / np.float32(FULL_RANGE.get(images.dtype.name, 1)))

    def _checked(self, images: Images) -> Images:
        """Return images that fit the file."""
        if images.ndim != 4 or 0 in images.shape[:3]:
            raise ValueError(f"images have the shape {images.shape}, not (N, H, W, C) with N, H, W of 1 or more")
        channels, size = self.metadata.channels, self.input_size
        if images.shape[3] != channels:
            raise DataError(
                f"{self.path} takes images of {channels} channels, but these have {images.shape[3]}: "
                "give images like those that it was trained on"
            )
        self.require_type(images.dtype, "the image")
        if size is not None and (images.shape[1] > size[0] or images.shape[2] > size[1]):
            raise DataError(
                f"{self.path} takes images of at most {size[0]} x {size[1]} pixels, but these have {images.shape[1]} x "
                f"{images.shape[2]}: predict in tiles, or export the checkpoint without --input_size"
            )
        return images

    def _as_the_file_wants(self, images: Images) -> Images:
        """Return images in the number type, size and layout of the file."""
        images = self.typed(images)
        if self.input_size is not None:
            bottom, right = self.input_size[0] - images.shape[1], self.input_size[1] - images.shape[2]
            images = np.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)), mode="edge")
        if self.metadata.layout == "NCHW":
            images = images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(images)


def open_exported(path: Path, device: str = "auto", threads: int | None = None) -> Exported:
    """Open an exported file, .onnx or .xml, after it has been checked.

    Args:
        path: a file that ml-export wrote; a .xml has its .bin beside it.
        device: auto, cpu, cuda or cuda:1; auto is CUDA where ONNX Runtime has it.
        threads: for one operator; left out: OMP_NUM_THREADS, else the cores that this process may use.

    Raises: CheckpointError where the file is missing, foreign, damaged or unsafe; ConfigError where the engine is not
        installed or the device not there.
    """
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder: give the exported file, such as {path / 'weights' / 'best.onnx'}")
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: write it with ml-export")
    threads = threads or usable_threads()
    match path.suffix.lower():
        case ".onnx":
            metadata = check_onnx(path)
            return Exported(path, metadata, _OnnxRuntime(path, metadata, device, threads))
        case ".xml":
            metadata = check_openvino(path)
            return Exported(path, metadata, _OpenVino(path, metadata, device, threads))
    raise CheckpointError(f"{path} is no .onnx or .xml: give a file that ml-export wrote")


def usable_threads() -> int:
    """Return OMP_NUM_THREADS where it is a number of 1 or more, else the cores that this process may use."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if first.isascii() and first.isdigit() and int(first) > 0:
        return int(first)
    if hasattr(os, "sched_getaffinity"):  # in a container or under taskset, fewer than the machine has
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _OnnxRuntime:
    """ONNX Runtime on the CPU or a CUDA GPU."""

    def __init__(self, path: Path, metadata: Metadata, device: str, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(
                f"ONNX files need ONNX Runtime, which cannot be imported ({error}): pip install 'ml-src[runtime]'"
            ) from error
        onnxruntime.set_default_logger_severity(4)  # of what it wants to say, the exceptions are enough
        onnxruntime.disable_telemetry_events()
        self.name = f"onnxruntime {onnxruntime.__version__}"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        options.enable_mem_pattern = False  # one plan for each size of images: 8 % more memory, and no faster
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.add_session_config_entry("session.load_model_format", "ONNX")  # whatever else the bytes look like
        options.add_session_config_entry("session.force_spinning_stop", "1")  # its threads leave the cores to others
        providers = _providers(device, onnxruntime.get_available_providers())
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers, enable_fallback=0)
            self.sides = _sides(self._session.get_inputs()[0].shape, metadata)
        except Exception as error:
            raise _cannot_open(path, self.name, error) from error
        if device.startswith("cuda") and CUDA not in self._session.get_providers():  # it goes on without, and is silent
            raise ConfigError(
                f"ONNX Runtime cannot use {device!r}: its CUDA and cuDNN libraries do not fit, or there is no such "
                "GPU: use cpu, or install what onnxruntime-gpu asks for"
            )
        self._run_options = onnxruntime.RunOptions()
        self._run_options.only_execute_path_to_fetches = True

    def run(self, images: Images, output: str) -> NDArray[Any]:
        """Return one output; the way to the other one is not computed."""
        result: NDArray[Any] = self._session.run([output], {"images": images}, self._run_options)[0]
        return result


def _providers(device: str, available: list[str]) -> list[Any]:
    """Return ONNX Runtime's providers for a device, with their options."""
    kind, _, index = device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or not (index == "" or index.isdigit()):
        raise ConfigError(f"ONNX Runtime does not know the device {device!r}: use auto, cpu, cuda or cuda:1")
    if kind == "cuda" and CUDA not in available:
        raise ConfigError(
            f"device {device!r} is not there for ONNX Runtime, which has {', '.join(available)}: "
            "use cpu, or install onnxruntime-gpu in place of onnxruntime"
        )
    if kind == "cpu" or CUDA not in available:
        return ["CPUExecutionProvider"]
    # heuristic: images of a new size would each be tried with every algorithm; tf32 is not float32
    options = {"device_id": int(index or 0), "cudnn_conv_algo_search": "HEURISTIC", "use_tf32": 0}
    return [(CUDA, options), "CPUExecutionProvider"]


class _OpenVino:
    """OpenVINO on the CPU."""

    def __init__(self, path: Path, metadata: Metadata, device: str, threads: int) -> None:
        if device not in ("auto", "cpu"):
            raise ConfigError(f"OpenVINO models run on the CPU here, not on {device!r}: use cpu, or export as ONNX")
        openvino = import_openvino()
        self.name = f"openvino {openvino.__version__.split('-')[0]}"
        # float32: by itself it takes bfloat16 on a CPU that has it, and other masks come out
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1}
        try:
            core = openvino.Core()
            model = core.read_model(path, weights_of(path))
            _require_ends(path, model, metadata)
            shape = [side.get_length() if side.is_static else None for side in model.input().get_partial_shape()]
            self._request = core.compile_model(model, "CPU", settings).create_infer_request()
        except CheckpointError:
            raise
        except Exception as error:
            raise _cannot_open(path, self.name, error) from error
        self.sides = _sides(shape, metadata)

    def run(self, images: Images, output: str) -> NDArray[Any]:
        """Return one output; both are computed."""
        self._request.start_async({"images": images}, share_inputs=True)
        self._request.wait()  # not infer(): that passes over a failure, and the result before it is left there
        result: NDArray[Any] = self._request.get_tensor(output).data.copy()
        return result


def _require_ends(path: Path, model: Any, metadata: Metadata) -> None:
    """Raise CheckpointError where an OpenVINO model's inputs and outputs are not those of ml-export."""
    short = {"uint8": "u8", "uint16": "u16", "float32": "f32"}
    expected = [
        ("images", short[metadata.input_type], 4),
        ("labels", short[metadata.label_type], 3),
        ("probabilities", "f32", 4),
    ]
    found = [
        (name, end.get_element_type().get_type_name(), end.get_partial_shape().rank.get_length())
        for end in (*model.inputs, *model.outputs)
        for name in end.get_names()
        if name in ("images", "labels", "probabilities")
    ]
    if sorted(found) != expected or (len(model.inputs), len(model.outputs)) != (1, 2):
        raise CheckpointError(f"{path} has other inputs and outputs than the files of ml-export: give one of those")


def _sides(shape: list[Any], metadata: Metadata) -> tuple[int | None, int | None]:
    """Return height and width of a file's input, where they are numbers and not names."""
    first = 1 if metadata.layout == "NHWC" else 2
    height, width = (side if isinstance(side, int) else None for side in shape[first : first + 2])
    return height, width


def _cannot_open(path: Path, engine: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{engine} cannot open {path} ({_reason(error)}): export the checkpoint again with ml-export"
    )


def _reason(error: Exception) -> str:
    """Return the last line of an engine's message: those before it say where in the engine."""
    lines = str(error).strip().splitlines()
    return lines[-1][:300] if lines else type(error).__name__
