"""One validated, frozen object; the YAML file is its picture. Next to read: `config_file.py`, which reads it.

Every key is declared here with its type, its range and what it does; `docs/configuration.md` and the JSON Schema are
generated from these lines. Nothing here imports torch, so that a mistake is answered at once.
"""

import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BeforeValidator, Field, model_validator

from ml_src.core.config_rules import PUBLIC_STATISTICS, contradictions
from ml_src.core.federated_specs import FederatedConfig
from ml_src.core.postprocess_specs import PostprocessStep
from ml_src.core.transform_specs import (
    Normalize,
    RandomCrop,
    RandomResizeCrop,
    Resize,
    Section,
    TrainTransform,
    ValTransform,
)

Positive = Annotated[int, Field(ge=1)]
Mode = Literal["min", "max"]


class DataConfig(Section):
    """What is learned from."""

    task: str = "segmentation"
    """What is learned; `segmentation` is the one task so far."""
    data_dir: str
    """The folder that holds `images/`, `masks/` and `splits/`; relative to where the command is started."""
    num_classes: Annotated[int, Field(ge=2, le=65535)]
    """Number of classes, background included: mask values run from 0 to num_classes - 1."""
    class_names: list[str] | None = None
    """One name a class, in the order of the mask values; `class_0`, `class_1`, ... when left out."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] | None = None
    """The mask value of unlabelled pixels: left out of loss, metrics and class weights."""
    dataset_name: str | None = None
    """Names the run folder; the name of data_dir when left out."""
    splits_dir: str | None = None
    """Where the index files of ml-split lie; `splits` inside data_dir when left out."""
    fold: Annotated[int, Field(ge=0)] = 0
    """Which fold of the cross-validation is held out for validation."""
    samples_per_image: Positive = 1
    """How often an epoch takes each training image, each time with another crop and augmentation; more than 1 pays
    where the images are large scenes and random_crop takes a small part of them."""
    mirror: bool = True
    """`false` where classes differ by being left or right, such as left and right kidney: nothing is mirrored then,
    neither in training nor by --tta."""


class ModelConfig(Section):
    """The network."""

    type: Literal["custom"] = "custom"
    """`custom`: a network registered in MODEL_REGISTRY."""
    custom_architecture: str = "simple_unet"
    """A word of MODEL_REGISTRY; plugins can add to it."""
    in_channels: Annotated[int, Field(ge=1)] = 3
    """Channels of the input image: 3 reads images as RGB, 1 as gray; any other number is that of the files' bands."""
    num_classes: Annotated[int, Field(ge=2)] | None = None
    """Channels of the output; must agree with data.num_classes, which is used when this is left out."""
    norm: Literal["batch", "group"] = "batch"
    """`batch`: as the network is written; `group`: every batch normalisation becomes a group normalisation, which
    looks at one image at a time (Wu and He 2018). trainer_type `dp` sets it."""
    base_channels: Positive = 64
    """Width of the first level of simple_unet; each level down doubles it."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability with which a channel of the decoder is dropped during training."""


class DiceBceConfig(Section):
    """The two weights of `dice_bce_loss`."""

    dice_weight: Annotated[float, Field(ge=0)] = 0.5
    """Factor of the Dice loss."""
    bce_weight: Annotated[float, Field(ge=0)] = 0.5
    """Factor of the binary cross-entropy."""


class FocalConfig(Section):
    """The two parameters of `focal_loss` (Lin et al. 2017)."""

    alpha: Annotated[float, Field(gt=0)] = 0.25
    """Factor of the whole loss."""
    gamma: Annotated[float, Field(ge=0)] = 2.0
    """How much well classified pixels are played down; 0 is cross-entropy."""


class LossConfig(Section):
    """What is minimised."""

    type: str = "dice_loss"
    """`dice_loss`, `dice_bce_loss`, `iou_loss`, `cross_entropy`, `focal_loss`, or a loss that a plugin registers."""
    class_weights: list[Annotated[float, Field(ge=0)]] | Literal["balanced"] | None = None
    """One weight a class, or `balanced`: inversely proportional to the class's share of the training pixels."""
    ignore_index: Annotated[int, Field(ge=0, le=65535)] | None = None
    """Filled in from data.ignore_index, with which it must agree. A loss itself sees -100 in ignored pixels."""
    dice_bce: DiceBceConfig = DiceBceConfig()
    """Only for `dice_bce_loss`."""
    focal: FocalConfig = FocalConfig()
    """Only for `focal_loss`."""


class Monitored(Section):
    """A section that watches a metric."""

    monitor: str = "val_iou"
    """The metric: val_ or train_ followed by iou, dice, pixel_accuracy or loss."""
    mode: Mode | None = None
    """`max`: higher is better; `min`: lower is. Left out: `min` for losses, `max` for all else."""

    def is_better(self, value: float, best: float | None, min_delta: float = 0.0) -> bool:
        """Whether `value` beats `best` by more than `min_delta`; NaN never does, anything else beats None."""
        if math.isnan(value) or best is None or math.isnan(best):
            return not math.isnan(value)
        mode = self.mode or ("min" if self.monitor.endswith("loss") else "max")
        return value < best - min_delta if mode == "min" else value > best + min_delta


class EarlyStopping(Monitored):
    """Stop when a metric has not improved for a while."""

    type: Literal["early_stopping"]
    patience: Positive = 20
    """Epochs without improvement after which training stops."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """The least change that counts as an improvement."""


class ModelCheckpoint(Monitored):
    """Keep the best epochs. `weights/best.pt` is always written and never removed."""

    type: Literal["model_checkpoint"]
    save_top_k: Annotated[int, Field(ge=0)] = 1
    """How many of the best epochs are kept as `weights/epoch_N.pt` besides best.pt, when more than one."""


class LrMonitor(Section):
    """Write the learning rate of every optimizer step to TensorBoard (without it: once an epoch)."""

    type: Literal["lr_monitor"]


class GradientClipping(Section):
    """Scale the gradient of a step down to a largest norm."""

    type: Literal["gradient_clipping"]
    max_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest L2 norm over all parameters."""


CallbackConfig = Annotated[EarlyStopping | ModelCheckpoint | LrMonitor | GradientClipping, Field(discriminator="type")]


class Every(NamedTuple):
    """How often: every so many seconds, or every so many steps."""

    seconds: float | None = None
    steps: int | None = None


class DPConfig(Section):
    """Differential privacy: noise_multiplier, target_epsilon or both must be given."""

    noise_multiplier: Annotated[float, Field(ge=0)] | None = None
    """Standard deviation of the noise over the clip norm; found for target_epsilon when left out."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """L2 norm to which each image's gradient is clipped."""
    target_epsilon: Annotated[float, Field(gt=0)] | None = None
    """Privacy budget; beside a noise_multiplier, training ends before the step that would exceed it."""
    target_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    """Probability with which the guarantee may fail; well below 1 / number of images."""
    accountant: Literal["prv", "rdp"] = "prv"
    """How epsilon is computed: `prv` (Gopi et al. 2021) is tighter, `rdp` (Mironov 2017) simpler."""
    clipping: Literal["flat", "per_layer", "adaptive"] = "flat"
    """One norm over all layers, one a layer, or one that follows the gradients (Andrew et al. 2021)."""
    group: Literal["none", "patient"] = "none"
    """Whom epsilon protects: an image, or a `patient`: all images of one group of ml-split."""
    max_physical_batch_size: Positive | None = None
    """Images whose gradients are held at once, which bounds the memory and changes no result; half of
    training.batch_size when left out."""
    secure: bool = False
    """Noise from the system's cryptographic generator (slower); a resumed run does not repeat it."""
    public_statistics: bool = False
    """States that mean, std and class weights were not computed from the private images."""


class TrainingConfig(Section):
    """How it is trained."""

    trainer_type: Literal["standard", "mixed_precision", "accelerate", "dp", "federated"] = "standard"
    """How one optimisation step runs."""
    batch_size: Positive = 8
    """Images a batch; a step takes gradient_accumulation_steps of them."""
    num_epochs: Positive = 100
    """Passes over the training images."""
    gradient_accumulation_steps: Positive = 1
    """Batches whose gradients are averaged into one step."""
    auto_batch: bool = False
    """Where a batch does not fit into memory, halve it and take more of them a step."""
    amp_dtype: Literal["float16", "bfloat16"] = "float16"
    """The short number format of `mixed_precision` on a GPU; a CPU always uses bfloat16."""
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of the moving average of the weights, such as 0.999; the average is what is validated and kept."""
    compile: bool = False
    """Compile the network with torch.compile (takes up to a minute at the start)."""
    tf32: bool = True
    """Let a GPU multiply float32 with ten bits of mantissa."""
    device: str = "auto"
    """`auto` (a GPU where there is one), `cpu`, `cuda`, `cuda:1`, `mps`."""
    num_processes: Positive | None = None
    """Only for trainer_type `accelerate`: how many processes train together, one a GPU."""
    num_workers: Annotated[int, Field(ge=0)] = 2
    """Processes that read and augment images; 0 does it in the training process."""
    pin_memory: bool = True
    """Stage batches in page-locked memory for a GPU; no effect on a CPU."""
    checkpoint_every: Annotated[str, Field(pattern=r"^[1-9][0-9]*(s|m|h|steps)$")] | None = None
    """Also write last.pt within an epoch: `90s`, `10m`, `2h` or `500steps`."""
    profile: bool = False
    """Measure 20 steps with torch.profiler and write a table and a trace into the run folder."""
    callbacks: list[CallbackConfig] = []
    """early_stopping, model_checkpoint, lr_monitor, gradient_clipping; each at most once."""
    dp: DPConfig | None = None
    """Only for trainer_type `dp`, or federated.backend `dp`."""


class Adam(Section):
    """Kingma and Ba 2015."""

    type: Literal["adam"] = "adam"
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty, added to the gradient."""


class AdamW(Section):
    """Loshchilov and Hutter 2019."""

    type: Literal["adamw"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decoupled from the gradient."""


class SGD(Section):
    """Stochastic gradient descent with Nesterov momentum."""

    type: Literal["sgd"]
    lr: Annotated[float, Field(gt=0)] = 1e-2
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Share of the last step that is kept."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty, added to the gradient."""


class RMSprop(Section):
    """Tieleman and Hinton 2012."""

    type: Literal["rmsprop"]
    lr: Annotated[float, Field(gt=0)] = 1e-3
    """Learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the last step that is kept."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """L2 penalty, added to the gradient."""


class Schedule(Section):
    """What every schedule of the learning rate has. Steps are optimizer steps; lengths are in epochs."""

    warmup_epochs: Annotated[int, Field(ge=0)] = 0
    """The learning rate rises linearly over these epochs; the schedule begins after them (`plateau` counts at once)."""


class NoSchedule(Schedule):
    """A constant learning rate."""

    type: Literal["none"] = "none"


class StepSchedule(Schedule):
    """Multiply the learning rate every few epochs."""

    type: Literal["step"]
    step_size: Positive = 30
    """Epochs between two drops."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of each drop."""


class CosineSchedule(Schedule):
    """Half a cosine from lr down to eta_min (Loshchilov and Hutter 2017, without restarts)."""

    type: Literal["cosine"]
    T_max: Positive | None = None
    """Epochs to the minimum; what num_epochs leaves after the warm-up when left out. It stays there afterwards."""
    eta_min: Annotated[float, Field(ge=0)] = 0.0
    """Last learning rate."""


class PolySchedule(Schedule):
    """lr * (1 - progress) ** power, as in DeepLab."""

    type: Literal["poly"]
    power: Annotated[float, Field(gt=0)] = 0.9
    """1 is a straight line."""


class PlateauSchedule(Schedule, Monitored):
    """Lower the learning rate when a metric stops improving."""

    type: Literal["plateau"]
    monitor: str = "val_loss"
    """The metric that is watched; as for the callbacks."""
    patience: Positive = 10
    """Epochs without improvement that are borne; the next one lowers the rate."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Factor of each drop."""


class OneCycleSchedule(Schedule):
    """Up to lr and down again over the whole training (Smith and Topin 2018)."""

    type: Literal["one_cycle"]
    pct_start: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of the training in which the learning rate rises."""


class TransformsConfig(Section):
    """What happens to a sample. All geometry of a list becomes one resampling."""

    train: list[TrainTransform] | None = None
    """In order. Left out: normalize alone, with the ImageNet statistics for RGB, 0.5 and 0.25 for gray."""
    val: list[ValTransform] | None = None
    """Validation, test and prediction: resize and normalize only. Left out: those of `train`."""


class InferenceConfig(Section):
    """What is done with predictions, at the end of training and by ml-inference. Training itself does not know it."""

    postprocess: list[PostprocessStep] = []
    """Steps that tidy a label map, in order. Pixels without data are to them what lies beyond the edge of the image."""


def _default_type(word: str) -> BeforeValidator:
    """A section chosen by `type` may leave it out."""
    return BeforeValidator(lambda raw: {"type": word, **raw} if isinstance(raw, dict) else raw)


class Config(Section):
    """A whole training: data, network, loss, training, optimizer, learning-rate schedule, transforms; and inference."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """All randomness (weights, order, augmentation) is a function of it."""
    deterministic: bool = False
    """Also forbid the few GPU operations whose result varies from run to run (slower)."""
    run_name: Annotated[str, Field(pattern=r"^[^/\\]*[^/\\.][^/\\]*$")] | None = None
    """Names the run folder instead of the data set: runs/<run_name>_fold_<fold>."""
    plugins: list[str] = []
    """Python files that register own models or losses; imported before training. Relative to where you start."""
    data: DataConfig
    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    training: TrainingConfig = TrainingConfig()
    federated: FederatedConfig | None = None
    optimizer: Annotated[
        Annotated[Adam | AdamW | SGD | RMSprop, Field(discriminator="type")], _default_type("adam")
    ] = Adam()
    scheduler: Annotated[
        Annotated[
            NoSchedule | StepSchedule | CosineSchedule | PolySchedule | PlateauSchedule | OneCycleSchedule,
            Field(discriminator="type"),
        ],
        _default_type("none"),
    ] = NoSchedule()
    transforms: TransformsConfig = TransformsConfig()
    inference: InferenceConfig = InferenceConfig()

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, raw: Any) -> Any:
        """One value said in two places is the same value; said in one, it holds for the other."""
        if not isinstance(raw, dict) or not isinstance(raw.get("data"), dict):
            return raw
        raw = {key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()}
        raw = {key: value for key, value in raw.items() if value is not None}  # a section left empty is left out
        data = raw["data"]
        for key in ("num_workers", "pin_memory"):  # about training as much as about data: both places are good
            _move(data, raw.setdefault("training", {}), key)
        for section, key in (("model", "num_classes"), ("loss", "ignore_index")):
            target = raw.setdefault(section, {})
            if isinstance(target, dict) and target.get(key) is None and data.get(key) is not None:
                target[key] = data[key]
        training, model, federated = raw.get("training"), raw.get("model"), raw.get("federated")
        trainers = [training.get("trainer_type")] if isinstance(training, dict) else []
        trainers += [federated.get("backend")] if isinstance(federated, dict) else []
        if "dp" in trainers and isinstance(model, dict):
            model.setdefault("norm", "group")
        return raw

    @model_validator(mode="after")
    def _agree(self) -> "Config":
        problems = contradictions(self)
        if problems:
            raise ValueError("; ".join(problems))
        return self

    # What follows from the keys, said in one place.

    @property
    def dataset_name(self) -> str:
        """`data.dataset_name`, or the name of the data folder."""
        return self.data.dataset_name or Path(self.data.data_dir).resolve().name

    @property
    def run_dir(self) -> Path:
        """`runs/<run_name or dataset>_fold_<k>`."""
        return Path("runs") / f"{self.run_name or self.dataset_name}_fold_{self.data.fold}"

    @property
    def splits_dir(self) -> Path:
        """Where the index files lie."""
        return Path(self.data.splits_dir) if self.data.splits_dir else Path(self.data.data_dir) / "splits"

    @property
    def class_names(self) -> list[str]:
        """One name a class."""
        return self.data.class_names or [f"class_{index}" for index in range(self.data.num_classes)]

    @property
    def ignore_index(self) -> int:
        """The value of ignored pixels in masks: the declared one, else one that no class can have.

        Also the value of what a transform brings in from outside the image.
        """
        if self.data.ignore_index is not None:
            return self.data.ignore_index
        return 255 if self.data.num_classes <= 255 else 65535

    @property
    def max_norm(self) -> float | None:
        """Of gradient_clipping, or None: clipping is part of the step, not of a callback."""
        return next((c.max_norm for c in self.training.callbacks if isinstance(c, GradientClipping)), None)

    @property
    def checkpoint_every(self) -> Every | None:
        """`training.checkpoint_every`, read."""
        match = re.fullmatch(r"(\d+)([a-z]+)", self.training.checkpoint_every or "")
        if match is None:
            return None
        number, unit = int(match[1]), match[2]
        seconds = {"s": 1.0, "m": 60.0, "h": 3600.0}
        return Every(steps=number) if unit == "steps" else Every(seconds=number * seconds[unit])

    @property
    def train_image_size(self) -> tuple[int, int] | None:
        """The largest height and width of a training image; None where it has that of its file."""
        sizes: list[tuple[int, int]] = []
        for spec in self.train_transforms:
            if isinstance(spec, Resize | RandomCrop):
                sizes = [spec.size]
            elif isinstance(spec, RandomResizeCrop):
                sizes = spec.sizes
        return max(sizes, key=lambda size: size[0] * size[1], default=None)

    @property
    def train_transforms(self) -> list[TrainTransform]:
        """`transforms.train`, or the normalisation alone."""
        if self.transforms.train is not None:
            return self.transforms.train
        if self.model.in_channels not in (1, 3):
            return [Normalize(type="normalize")]
        mean, std = PUBLIC_STATISTICS[0 if self.model.in_channels == 3 else 1]
        return [Normalize(type="normalize", mean=mean, std=std)]

    @property
    def needs_statistics(self) -> bool:
        """Whether a `normalize` leaves mean and std to the training images."""
        return any(isinstance(spec, Normalize) and spec.mean == "data" for spec in self.train_transforms)

    def with_statistics(self, mean: list[float], std: list[float]) -> "Config":
        """Return this configuration with numbers in the place of normalize's `data`."""
        lists = {
            name: [
                Normalize(type="normalize", mean=mean, std=std) if isinstance(spec, Normalize) else spec
                for spec in specs
            ]
            for name, specs in (("train", self.train_transforms), ("val", self.val_transforms))
        }
        return self.model_copy(update={"transforms": self.transforms.model_copy(update=lists)})

    @property
    def val_transforms(self) -> list[ValTransform]:
        """`transforms.val`, or what is not random in `transforms.train`."""
        if self.transforms.val is not None:
            return self.transforms.val
        return [spec for spec in self.train_transforms if isinstance(spec, Resize | Normalize)]


def _move(source: dict[str, Any], target: Any, key: str) -> None:
    if key in source and isinstance(target, dict):
        value = source.pop(key)
        if target.setdefault(key, value) != value:
            raise ValueError(f"data.{key} is {value} but training.{key} is {target[key]}: set it under training only")
