"""Every command and every config block of the guide, word for word, on small generated data.

The texts below are the contract with the user: a test that fails here says that the product broke a promise, so mend
the product, not the text. Flags that only make a training small are added behind the words of the guide (`SMALL`).
"""

import csv
import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from PIL import Image

from ml_src.cli import export, inference, init_config, split, train
from ml_src.core.checkpoint import load_checkpoint
from ml_src.core.config import Config
from ml_src.core.config_file import load_config, parse_config
from ml_src.core.data.files import read_mask
from ml_src.core.data.sample import write_sample
from ml_src.core.losses.segmentation import LOSS_REGISTRY
from ml_src.core.network.custom import MODEL_REGISTRY
from ml_src.core.tasks import task_for

COMMANDS = {
    "ml-split": split.main,
    "ml-init-config": init_config.main,
    "ml-train": train.main,
    "ml-inference": inference.main,
    "ml-export": export.main,
}
# 100 epochs of 64 channels take hours; --set stands last, so that a test can add another key
SMALL = "--num_epochs 1 --num_workers 0 --set model.base_channels=2"

QUICK_START = """
# 1. Prepare your dataset
# Structure:
# data/my_segmentation/
# ├── images/
# │   ├── img1.jpg
# │   └── img2.jpg
# └── masks/
#     ├── img1.png  # Single-channel PNG with class indices
#     └── img2.png

# 2. Create cross-validation splits
ml-split --raw_data data/my_segmentation/images \\
         --mask_data data/my_segmentation/masks \\
         --folds 5 \\
         --task segmentation

# 3. Generate configuration
ml-init-config data/my_segmentation --task segmentation

# 4. Train the model
ml-train --config configs/my_segmentation_config.yaml

# 5. Run inference
ml-inference --checkpoint_path runs/my_segmentation_fold_0/weights/best.pt
"""

MASK_CREATION = """
import numpy as np
from PIL import Image

# Create a 3-class segmentation mask (256x256)
# Class 0 (background), Class 1 (object 1), Class 2 (object 2)
mask = np.zeros((256, 256), dtype=np.uint8)
mask[50:150, 50:150] = 1  # Object 1
mask[150:200, 150:200] = 2  # Object 2

# Save as PNG
Image.fromarray(mask).save('mask.png')
"""

SPLIT_BASIC = """
# Basic segmentation split
ml-split --raw_data data/my_dataset/images \\
         --mask_data data/my_dataset/masks \\
         --folds 5 \\
         --task segmentation
"""

SPLIT_CUSTOM = """
# With custom test/validation splits
ml-split --raw_data data/my_dataset/images \\
         --mask_data data/my_dataset/masks \\
         --folds 5 \\
         --task segmentation \\
         --test_split 0.2 \\
         --val_split 0.15
"""

SPLIT_STRATIFIED = """
# With stratification (ensures balanced class distribution)
ml-split --raw_data data/my_dataset/images \\
         --mask_data data/my_dataset/masks \\
         --folds 5 \\
         --task segmentation \\
         --stratified
"""

INIT_DEFAULT = """
# Auto-generate with segmentation defaults
ml-init-config data/my_dataset --task segmentation
"""

INIT_CUSTOM = """
# With custom settings
ml-init-config data/my_dataset \\
  --task segmentation \\
  --batch_size 8 \\
  --num_epochs 100 \\
  --lr 0.001
"""

MINIMAL_CONFIG = """
data:
  task: 'segmentation'
  data_dir: 'data/my_dataset'
  num_classes: 3  # Including background class

model:
  type: 'custom'
  custom_architecture: 'simple_unet'
  in_channels: 3
  num_classes: 3

loss:
  type: 'dice_loss'

training:
  batch_size: 8  # Segmentation is memory-intensive
  num_epochs: 100
  trainer_type: 'mixed_precision'  # Recommended for GPU

optimizer:
  type: 'adam'
  lr: 0.001
"""

ADVANCED_CONFIG = """
data:
  task: 'segmentation'
  data_dir: 'data/medical_scans'
  num_classes: 4  # background + 3 organ classes
  fold: 0

model:
  type: 'custom'
  custom_architecture: 'simple_unet'
  in_channels: 3
  num_classes: 4
  dropout: 0.1  # Optional dropout in decoder

loss:
  type: 'dice_bce_loss'  # Combined Dice + BCE
  dice_bce:
    dice_weight: 0.7
    bce_weight: 0.3

training:
  batch_size: 4  # Reduce if OOM errors
  num_epochs: 150
  trainer_type: 'mixed_precision'
  amp_dtype: 'float16'

  # Callbacks
  callbacks:
    - type: 'early_stopping'
      monitor: 'val_iou'
      patience: 20
      mode: 'max'

    - type: 'model_checkpoint'
      monitor: 'val_dice'
      save_top_k: 3
      mode: 'max'

optimizer:
  type: 'adamw'
  lr: 0.0001
  weight_decay: 0.01

scheduler:
  type: 'cosine'
  T_max: 150
  eta_min: 0.00001

transforms:
  train:
    - type: 'resize'
      size: [512, 512]
    - type: 'random_horizontal_flip'
      p: 0.5
    - type: 'random_vertical_flip'
      p: 0.5
    - type: 'normalize'
      mean: [0.485, 0.456, 0.406]
      std: [0.229, 0.224, 0.225]

  val:
    - type: 'resize'
      size: [512, 512]
    - type: 'normalize'
      mean: [0.485, 0.456, 0.406]
      std: [0.229, 0.224, 0.225]
"""

TRAIN_WITH_CONFIG = """
# Train with config
ml-train --config configs/my_segmentation_config.yaml
"""

TRAIN_FOLD = """
# Train specific fold
ml-train --config configs/my_segmentation_config.yaml --fold 2
"""

TRAIN_BATCH_SIZE = """
# Override batch size
ml-train --config configs/my_segmentation_config.yaml --batch_size 4
"""

STANDARD = """
training:
  trainer_type: 'standard'
"""

MIXED_PRECISION = """
training:
  trainer_type: 'mixed_precision'
  amp_dtype: 'float16'  # or 'bfloat16' for newer GPUs
"""

ACCELERATE = """
# Train with accelerate
training:
  trainer_type: 'accelerate'
"""

DP = """
training:
  trainer_type: 'dp'
  batch_size: 16
  dp:
    noise_multiplier: 1.1
    max_grad_norm: 1.0
    target_epsilon: 3.0
    target_delta: 1e-5
"""

GRADIENT_ACCUMULATION = """
   training:
     batch_size: 2
     gradient_accumulation_steps: 4  # Effective batch size = 2×4 = 8
"""  # noqa: RUF001

STANDARD_INFERENCE = """
ml-inference --checkpoint_path runs/my_seg_fold_0/weights/best.pt
"""

TTA_INFERENCE = """
ml-inference --checkpoint_path runs/my_seg_fold_0/weights/best.pt --tta
"""

ENSEMBLE_INFERENCE = """
ml-inference --ensemble \\
  runs/my_seg_fold_0/weights/best.pt \\
  runs/my_seg_fold_1/weights/best.pt \\
  runs/my_seg_fold_2/weights/best.pt
"""

FOLDER_INFERENCE = """
ml-inference --checkpoint_path runs/my_seg_fold_0/weights/best.pt --input data/new_images --output predicted
"""

CROSS_VALIDATION = """
ml-inference --cv runs/my_seg_fold_0 runs/my_seg_fold_1 runs/my_seg_fold_2
"""

POSTPROCESSING = """
# Specks
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess remove_small,area=30

# With an area for each class
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess remove_small,area=1:30+2:100

# Thin bridges, then gaps, of classes 1 and 2
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess opening,radius=2,classes=1+2 closing,classes=1+2

# Holes of at most 50 pixels
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess fill_holes,area=50

# One organ is one region
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess keep_largest,classes=1

# Borders along edges
ml-inference --checkpoint_path runs/my_seg_fold_0 --postprocess crf,radius=5,eps=0.001
"""

EXAMPLE_OUTPUT = """\
Test Results:
  Mean IoU: 0.7821
  Mean Dice: 0.8765
  Pixel Accuracy: 0.9234

  Per-class IoU:
    Class 0 (background): 0.9456
    Class 1 (organ_1): 0.7123
    Class 2 (organ_2): 0.6884
"""

SIMPLE_UNET = """
model:
  type: 'custom'
  custom_architecture: 'simple_unet'
  in_channels: 3
  num_classes: N
  dropout: 0.1  # Optional
"""

DICE = """
loss:
  type: 'dice_loss'
"""

DICE_BCE = """
loss:
  type: 'dice_bce_loss'
  dice_bce:
    dice_weight: 0.7
    bce_weight: 0.3
"""

IOU = """
loss:
  type: 'iou_loss'
"""

# The two lines of "# Your architecture here" are filled in; the imports are what a file of one's own needs.
CUSTOM_MODEL = """
from torch import nn
from ml_src.core.network.custom import MODEL_REGISTRY

class MyCustomUNet(nn.Module):
    def __init__(self, in_channels=3, num_classes=2, **kwargs):
        super().__init__()
        self.layer = nn.Conv2d(in_channels, num_classes, 3, padding=1)

    def forward(self, x):
        # Returns (batch, num_classes, H, W)
        output = self.layer(x)
        return output

# Register
MODEL_REGISTRY['my_custom_unet'] = MyCustomUNet
"""

FOCAL_LOSS = """
class FocalLoss(nn.Module):
    def __init__(self, config, alpha=0.25, gamma=2.0):
        super().__init__()
        self.alpha = alpha
        self.gamma = gamma

    def forward(self, logits, targets):
        ce_loss = F.cross_entropy(logits, targets, reduction='none')
        pt = torch.exp(-ce_loss)
        focal_loss = self.alpha * (1-pt)**self.gamma * ce_loss
        return focal_loss.mean()
"""

CLASS_WEIGHTS = """
# In config or code
class_weights = torch.tensor([0.1, 1.0, 2.0])  # background, class1, class2
criterion = nn.CrossEntropyLoss(weight=class_weights)
"""

CUSTOM_LOSS = (
    """
import torch
from torch import nn
from torch.nn import functional as F
from ml_src.core.losses.segmentation import LOSS_REGISTRY
"""
    + FOCAL_LOSS
    + CLASS_WEIGHTS
    + """
class MyCustomLoss(nn.Module):
    def __init__(self, config):
        super().__init__()

    def forward(self, logits, targets):
        # logits: (N, C, H, W)
        # targets: (N, H, W)
        loss_value = criterion(logits, targets)
        return loss_value

# Register
LOSS_REGISTRY['my_focal_loss'] = FocalLoss
LOSS_REGISTRY['my_custom_loss'] = MyCustomLoss
"""
)

MULTI_SCALE = """
transforms:
  train:
    - type: 'random_resize_crop'
      sizes: [[256, 256], [384, 384], [512, 512]]
      p: 0.5
"""

AUGMENTATION = """
transforms:
  train:
    - type: 'resize'
      size: [512, 512]
    - type: 'random_horizontal_flip'
      p: 0.5
    - type: 'random_rotation'
      degrees: 15
    - type: 'color_jitter'
      brightness: 0.2
      contrast: 0.2
"""

GRADIENT_CLIPPING = """
  training:
    callbacks:
      - type: 'gradient_clipping'
        max_norm: 1.0
"""

MASKS_NOT_LOADING = """
from PIL import Image
import numpy as np

mask = Image.open('data/my_dataset/masks/img1.png')
mask_array = np.array(mask)

print(f"Shape: {mask_array.shape}")  # Should be (H, W), not (H, W, 3)
print(f"Unique values: {np.unique(mask_array)}")  # Should be [0, 1, 2, ...], not [0, 255]
print(f"Dtype: {mask_array.dtype}")  # Should be uint8 or uint16
"""

MISMATCHED_DIMENSIONS = """
from PIL import Image

img = Image.open('data/my_dataset/images/img1.jpg')
mask = Image.open('data/my_dataset/masks/img1.png')

print(f"Image size: {img.size}")  # (W, H)
print(f"Mask size: {mask.size}")  # Should match image
"""

DATA_LOADING = """
training:
  num_workers: 4  # Adjust based on CPU cores
  pin_memory: true
"""

BRAIN_MRI = """
# 1. Split data
ml-split --raw_data data/brain_mri/images \\
         --mask_data data/brain_mri/masks \\
         --folds 5 \\
         --task segmentation \\
         --stratified

# 2. Generate config
ml-init-config data/brain_mri --task segmentation
"""

BRAIN_MRI_TRAIN = """
# 4. Train
ml-train --config configs/brain_mri_config.yaml
"""

LANDCOVER = """
# 1. Split data
ml-split --raw_data data/landcover/images \\
         --mask_data data/landcover/masks \\
         --folds 3 \\
         --task segmentation

# 2. Generate config
ml-init-config data/landcover --task segmentation

# 3. Train with larger image size
ml-train --config configs/landcover_config.yaml \\
         --batch_size 4 \\
         --loss dice_loss

# 4. Export for deployment
ml-export --checkpoint runs/landcover_fold_0/weights/best.pt \\
          --validate --benchmark
"""


class Result(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def command_lines(block: str) -> list[str]:
    """The commands of a block of shell, as bash would see them."""
    lines = block.replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.lstrip().startswith("#")]


def shell(block: str, added_to_train: str = "") -> Result:
    """Run the commands of a block one after the other until one fails; the result is the last one's."""
    result = Result(0, "", "")
    for line in command_lines(block):
        name, *words = shlex.split(line)
        if name == "ml-train":
            words += shlex.split(added_to_train)
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = COMMANDS[name](words)
        result = Result(code, out.getvalue(), err.getvalue())
        if code != 0:
            break
    return result


def expect(result: Result) -> Result:
    assert result.code == 0, result.err
    return result


def snippet(code: str) -> str:
    """Run a piece of Python of the guide and return what it prints."""
    out = io.StringIO()
    with redirect_stdout(out):
        exec(compile(code, "guide.md", "exec"), {})
    return out.getvalue()


def photographs(name: str, num_images: int = 16) -> Path:
    """data/<name> as the guide draws it: images/img1.jpg with masks/img1.png, 64x64, three classes."""
    data = Path("data") / name
    write_sample(data, num_images, height=64, width=64)
    for index in range(num_images):
        old = f"{index:03}.png"
        Image.open(data / "images" / old).save(data / "images" / f"img{index + 1}.jpg", quality=95)
        (data / "images" / old).unlink()
        (data / "masks" / old).rename(data / "masks" / f"img{index + 1}.png")
    return data


def drawing(name: str, num_classes: int, gray: bool = False, num_images: int = 16) -> Path:
    """data/<name>: one bright rectangle a class besides the background, on noise; no classes.txt."""
    data = Path("data") / name
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (data / folder).mkdir(parents=True)
    for index in range(num_images):
        mask = np.zeros((64, 64), np.uint8)
        for value in range(1, num_classes):
            top, left = rng.integers(0, 48, 2)
            mask[top : top + 16, left : left + 16] = value
        image = mask * 40.0 + rng.uniform(0, 40, mask.shape)
        image = image if gray else np.stack([image, image[::-1], image + 10], axis=2)
        Image.fromarray(image.astype(np.uint8)).save(data / "images" / f"scan_{index}.png")
        Image.fromarray(mask).save(data / "masks" / f"scan_{index}.png")
    return data


def listed(data: Path, name: str, kind: str = "images") -> list[str]:
    return (data / "splits" / f"{name}_{kind}.txt").read_text().splitlines()


def classes_in(data: Path, name: str) -> set[int]:
    return {int(value) for line in listed(data, name, "masks") for value in np.unique(read_mask(data / line))}


def tree(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def config_with(*blocks: str, data_dir: str = "data/my_dataset") -> Path:
    """A file with the guide's minimal config, the standard trainer, and the blocks laid over it."""
    whole = yaml.safe_load(MINIMAL_CONFIG)
    whole["data"]["data_dir"] = data_dir
    for block in (STANDARD, *blocks):
        for section, values in yaml.safe_load(block).items():
            whole.setdefault(section, {}).update(values)
    path = Path("mine.yaml")
    path.write_text(yaml.safe_dump(whole, sort_keys=False))
    return path


def write_yaml(block: str) -> Path:
    path = Path("mine.yaml")
    path.write_text(block)
    return path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield
    torch.use_deterministic_algorithms(False)
    MODEL_REGISTRY.pop("my_custom_unet", None)
    LOSS_REGISTRY.pop("my_focal_loss", None)
    LOSS_REGISTRY.pop("my_custom_loss", None)


@pytest.fixture
def my_dataset() -> Path:
    """data/my_dataset, split as the guide's first command does."""
    data = photographs("my_dataset")
    expect(shell(SPLIT_BASIC))
    return data


@pytest.fixture
def my_segmentation() -> Path:
    """data/my_segmentation after steps 2 and 3 of the quick start."""
    data = photographs("my_segmentation")
    expect(shell("\n".join(command_lines(QUICK_START)[:2])))
    return data


# Quick Start


@pytest.fixture(scope="module")
def quick_start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Result]]:
    """The folder in which the whole quick start ran, and the result of its last command."""
    home = tmp_path_factory.mktemp("quick_start")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        data = photographs("my_segmentation")
        (data / "classes.txt").write_text("background\norgan_1\norgan_2\n")  # the names of the guide's example output
        # as written it trains 100 epochs
        result = expect(shell(QUICK_START, SMALL.replace("num_epochs 1", "num_epochs 2")))
    yield home, result


def test_the_quick_start_leaves_the_files_the_guide_names(quick_start: tuple[Path, Result]) -> None:
    home, _ = quick_start
    names = ["test", *(f"fold_{k}_{part}" for k in range(5) for part in ("train", "val"))]
    expected = {f"{name}_{kind}.txt" for name in names for kind in ("images", "masks")}
    splits = home / "data/my_segmentation/splits"
    assert {path.name for path in splits.iterdir() if not path.name.startswith(".")} == expected
    assert (home / "configs/my_segmentation_config.yaml").is_file()
    run = home / "runs/my_segmentation_fold_0"
    for name in ("config.yaml", "summary.txt", "metrics.json", "weights/best.pt", "weights/last.pt", "logs/train.log"):
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*"))


def test_lines_of_the_index_files_pair_images_with_masks(quick_start: tuple[Path, Result]) -> None:
    data = quick_start[0] / "data/my_segmentation"
    for name in ("test", "fold_0_train", "fold_4_val"):
        pairs = list(zip(listed(data, name), listed(data, name, "masks"), strict=True))
        assert pairs
        for image, mask in pairs:
            assert (data / image).is_file() and (data / mask).is_file()
            assert (image, mask) == (f"images/{Path(image).stem}.jpg", f"masks/{Path(image).stem}.png")


def test_inference_prints_the_guides_example_line_by_line(quick_start: tuple[Path, Result]) -> None:
    """Words, indentation, class names and four decimals; only the digits may differ."""
    printed = quick_start[1].out.splitlines()
    example = EXAMPLE_OUTPUT.splitlines()
    for line, model in zip(printed, example, strict=False):
        pattern = re.sub(r"0\\\.\d{4}$", r"[01]\\.\\d{4}", re.escape(model))
        assert re.fullmatch(pattern, line), f"{line!r} is not like {model!r}"
    assert printed[len(example)] == "", "nothing else may stand in the block"


def test_the_scores_follow_the_guides_formulas(quick_start: tuple[Path, Result]) -> None:
    """IoU and Dice from the sets of pixels of the files written, not from the program's own counts."""
    home, result = quick_start
    data, out = home / "data/my_segmentation", home / "runs/my_segmentation_fold_0/inference/test"
    metrics = json.loads((out / "metrics.json").read_text())
    truth, predicted = [], []
    for line in listed(data, "test", "masks"):
        truth.append(np.array(Image.open(data / line)))
        predicted.append(np.array(Image.open(out / "masks" / Path(line).name)))
        assert truth[-1].shape == predicted[-1].shape
        assert (out / "overlays" / Path(line).name).is_file()
    true, pred = np.concatenate(truth).ravel(), np.concatenate(predicted).ravel()
    matrix = [[int(((true == row) & (pred == column)).sum()) for column in range(3)] for row in range(3)]
    assert metrics["confusion_matrix"] == matrix

    ious, dices = [], []
    for value in range(3):
        both, either = ((true == value) & (pred == value)).sum(), ((true == value) | (pred == value)).sum()
        ious.append(both / either)
        dices.append(2 * both / ((pred == value).sum() + (true == value).sum()))
    assert metrics["iou_per_class"] == pytest.approx(ious)
    assert metrics["dice_per_class"] == pytest.approx(dices)
    assert metrics["pixel_accuracy"] == pytest.approx((true == pred).mean())
    assert f"  Mean IoU: {np.mean(ious):.4f}\n  Mean Dice: {np.mean(dices):.4f}\n" in result.out


def test_tensorboard_tracks_the_metrics_the_guide_lists(quick_start: tuple[Path, Result]) -> None:
    """`tensorboard --logdir runs/my_segmentation_fold_0/tensorboard` has something to show for every line."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert Path(sys.executable).with_name("tensorboard").is_file()
    events = EventAccumulator(str(quick_start[0] / "runs/my_segmentation_fold_0/tensorboard"))
    events.Reload()
    tags = events.Tags()
    per_class = [f"val_{key}/{name}" for key in ("iou", "dice") for name in ("background", "organ_1", "organ_2")]
    for tag in ("loss/train", "loss/val", "iou/val", "dice/val", "pixel_accuracy/val", *per_class):
        assert len(events.Scalars(tag)) == 2, tag  # one value an epoch
    assert len(tags["images"]) == 1


def test_standard_inference_works_in_a_run_folder_of_any_name(quick_start: tuple[Path, Result]) -> None:
    """The guide's checkpoint lies in runs/my_seg_fold_0; the results go beside it and are the same."""
    home, before = quick_start
    shutil.copytree(home / "data", "data")
    shutil.copytree(home / "runs/my_segmentation_fold_0/weights", "runs/my_seg_fold_0/weights")
    result = expect(shell(STANDARD_INFERENCE))
    assert result.out.splitlines()[:9] == before.out.splitlines()[:9]
    assert len(list(Path("runs/my_seg_fold_0/inference/test/masks").iterdir())) == len(
        listed(home / "data/my_segmentation", "test")
    )


# Inference


@pytest.fixture(scope="module")
def three_folds(quick_start: tuple[Path, Result]) -> Path:
    """The folder of the quick start, in which three folds have been trained as runs/my_seg_fold_0 to 2."""
    home, _ = quick_start
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        for fold in range(3):
            expect(shell(f"{TRAIN_WITH_CONFIG.strip()} --fold {fold} --seed {fold} --run_name my_seg", SMALL))
    return home


@pytest.fixture
def my_seg(three_folds: Path) -> Path:
    """data/my_segmentation with the three runs, to be written to."""
    shutil.copytree(three_folds / "data", "data")
    for fold in range(3):
        shutil.copytree(three_folds / f"runs/my_seg_fold_{fold}/weights", f"runs/my_seg_fold_{fold}/weights")
    return Path("data/my_segmentation")


def assert_printed_as_in_the_guide(result: Result) -> None:
    lines = expect(result).out.splitlines()
    for line, model in zip(lines, EXAMPLE_OUTPUT.splitlines(), strict=False):
        assert re.sub(r"\d\.\d{4}$", "", line) == re.sub(r"\d\.\d{4}$", "", model)


def probabilities(folder: str) -> NDArray[Any]:
    """(N, H, W, C) of the images of a folder of outputs, by name."""
    return np.stack([np.load(path)["probs"] for path in sorted(Path(folder, "probabilities").iterdir())]).astype(float)


def labels(folder: str) -> NDArray[Any]:
    """(N, H, W), likewise."""
    return np.stack([read_mask(path) for path in sorted(Path(folder, "masks").iterdir())])


def test_augmented_inference_is_the_mean_over_mirrored_images(my_seg: Path) -> None:
    """Of files that are mirrored one by one, predicted without --tta, and mirrored back."""
    assert_printed_as_in_the_guide(shell(TTA_INFERENCE.strip() + " --save_probs npz"))
    axes: list[tuple[int, ...]] = [(), (1,), (0,), (0, 1)]
    for number, flipped in enumerate(axes):
        Path(f"views/{number}").mkdir(parents=True)
        for line in listed(my_seg, "test"):
            pixels = np.flip(np.array(Image.open(my_seg / line)), flipped)
            Image.fromarray(pixels).save(f"views/{number}/{Path(line).stem}.png")
        command = "ml-inference --checkpoint_path runs/my_seg_fold_0/weights/best.pt --save_probs npz"
        expect(shell(f"{command} --input views/{number} --output seen/{number}"))
    seen = [np.flip(probabilities(f"seen/{number}"), [1 + axis for axis in axes[number]]) for number in range(4)]
    merged = probabilities("runs/my_seg_fold_0/inference/test")
    assert np.abs(merged - np.mean(seen, axis=0)).max() < 0.001 < np.abs(merged - seen[0]).max()  # float16


def test_an_ensemble_of_folds_is_the_mean_of_its_members(my_seg: Path) -> None:
    assert_printed_as_in_the_guide(shell(ENSEMBLE_INFERENCE.strip() + " --save_probs npz"))
    for fold in range(3):
        expect(shell(f"ml-inference --checkpoint_path runs/my_seg_fold_{fold} --save_probs npz"))
    alone = [probabilities(f"runs/my_seg_fold_{fold}/inference/test") for fold in range(3)]
    merged = probabilities("runs/my_seg_ensemble/inference/test")
    assert len(merged) == len(listed(my_seg, "test"))
    assert np.abs(merged - np.mean(alone, axis=0)).max() < 0.001 < np.abs(merged - alone[0]).max()


def test_a_folder_of_new_images_is_predicted_without_masks(my_seg: Path) -> None:
    """Only the checkpoint and the images are there; the table counts what the masks hold."""
    (my_seg / "images").rename("data/new_images")
    shutil.rmtree(my_seg)
    assert "16 images predicted" in expect(shell(FOLDER_INFERENCE)).out
    names = sorted(path.stem for path in Path("data/new_images").iterdir())
    assert sorted(path.stem for path in Path("predicted/masks").iterdir()) == names
    with Path("predicted/predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    counts = [[int(row[f"pixels_{name}"]) for name in ("background", "organ_1", "organ_2")] for row in rows]
    assert counts == [np.bincount(mask.ravel(), minlength=3).tolist() for mask in labels("predicted")]


def test_cross_validation_measures_each_image_outside_the_test_set_once(my_seg: Path) -> None:
    out = expect(shell(CROSS_VALIDATION)).out
    assert out.startswith("Cross-validated Results:\n")
    metrics = json.loads(Path("runs/my_seg_cv/metrics.json").read_text())
    measured = [image["image"] for image in metrics["per_image"]]
    assert measured == [Path(line).name for fold in range(3) for line in listed(my_seg, f"fold_{fold}_val")]
    assert len(labels("runs/my_seg_cv")) == len(measured) == np.sum([fold["num_images"] for fold in metrics["folds"]])


@pytest.mark.parametrize("command", command_lines(POSTPROCESSING), ids=lambda line: line.split(",")[0].split()[-1])
def test_each_step_of_post_processing_is_recorded_beside_the_scores(my_seg: Path, command: str) -> None:
    assert_printed_as_in_the_guide(shell(command))
    metrics = json.loads(Path("runs/my_seg_fold_0/inference/test/metrics.json").read_text())
    words = command.partition("--postprocess ")[2].split()
    assert [step["type"] for step in metrics["how"]["postprocess"]] == [word.partition(",")[0] for word in words]


@pytest.mark.parametrize(
    "block",
    [STANDARD_INFERENCE, TTA_INFERENCE, ENSEMBLE_INFERENCE, FOLDER_INFERENCE, CROSS_VALIDATION, POSTPROCESSING],
    ids=["standard", "tta", "ensemble", "folder", "cv", "postprocessing"],
)
def test_the_projects_own_guide_shows_these_commands(block: str) -> None:
    """docs/guide.md has them to the letter, so that what runs here is what is read there."""
    guide = (Path(__file__).parents[1] / "docs" / "guide.md").read_text(encoding="utf-8")
    assert block.strip() in guide


# Dataset Preparation


def test_the_guides_mask_is_a_mask() -> None:
    snippet(MASK_CREATION)
    mask = read_mask(Path("mask.png"))
    assert mask.shape == (256, 256) and np.unique(mask).tolist() == [0, 1, 2]
    data = Path("data/my_dataset")
    for index in range(7):
        for folder in ("images", "masks"):
            (data / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (256, 256)).save(data / "images" / f"img{index}.jpg")
        shutil.copy("mask.png", data / "masks" / f"img{index}.png")
    assert "unchanged" not in expect(shell(SPLIT_BASIC)).out


def test_the_basic_split_is_a_partition(my_dataset: Path) -> None:
    """Each image is in the test part, or in the val part of exactly one fold and the train part of all others."""
    images = sorted(f"images/{path.name}" for path in (my_dataset / "images").iterdir())
    test = listed(my_dataset, "test")
    vals = [listed(my_dataset, f"fold_{k}_val") for k in range(5)]
    assert sorted(test + [line for val in vals for line in val]) == images
    assert len(test) == round(0.15 * 16)
    for fold, val in enumerate(vals):
        assert sorted(listed(my_dataset, f"fold_{fold}_train") + val + test) == images
    assert not (my_dataset / "splits" / "fold_5_val_images.txt").exists()


def test_custom_shares_of_the_split_are_kept() -> None:
    """A fifth of 20 images is for testing, 15 % of the other 16 for validation, and no image stands twice."""
    data = photographs("my_dataset", num_images=20)
    expect(shell(SPLIT_CUSTOM))
    assert len(listed(data, "test")) == 4
    for fold in range(5):
        train_part, val = listed(data, f"fold_{fold}_train"), listed(data, f"fold_{fold}_val")
        assert len(val) == round(0.15 * 16)
        assert len({*train_part, *val, *listed(data, "test")}) == 20 == len(train_part) + len(val) + 4


def test_stratification_brings_a_rare_class_into_every_part() -> None:
    """Fibres are left in 6 of 20 images: one for each of the test part and the 5 validation parts."""
    data = photographs("my_dataset", num_images=20)
    for index in range(1, 21):
        path = data / "masks" / f"img{index}.png"
        mask = read_mask(path)
        mask[mask == 2] = 0
        if index in (1, 2, 3, 4, 5, 6):
            mask[10:20, 10:20] = 2
        Image.fromarray(mask).save(path)
    expect(shell(SPLIT_STRATIFIED))
    for name in ["test", *(f"fold_{k}_{part}" for k in range(5) for part in ("train", "val"))]:
        assert classes_in(data, name) == {0, 1, 2}, name


# Configuration


def test_the_generated_config_fits_the_data(my_dataset: Path) -> None:
    expect(shell(INIT_DEFAULT))
    config = load_config(Path("configs/my_dataset_config.yaml"))
    assert config.data.task == "segmentation"
    assert (config.data.data_dir, config.data.num_classes, config.model.num_classes) == ("data/my_dataset", 3, 3)
    assert (config.model.custom_architecture, config.model.in_channels) == ("simple_unet", 3)


def test_the_settings_given_land_in_the_config(my_dataset: Path) -> None:
    expect(shell(INIT_CUSTOM))
    written = yaml.safe_load(Path("configs/my_dataset_config.yaml").read_text())
    assert (written["training"]["batch_size"], written["training"]["num_epochs"]) == (8, 100)
    assert written["optimizer"]["lr"] == 0.001
    expect(shell(INIT_CUSTOM.replace("8", "6").replace("100", "7").replace("0.001", "0.02").rstrip() + " --yes"))
    written = yaml.safe_load(Path("configs/my_dataset_config.yaml").read_text())
    assert (written["training"]["batch_size"], written["training"]["num_epochs"]) == (6, 7)
    assert written["optimizer"]["lr"] == 0.02


def test_the_minimal_config_says_what_it_means(my_dataset: Path) -> None:
    config = load_config(write_yaml(MINIMAL_CONFIG))
    assert (config.data.num_classes, config.model.in_channels, config.loss.type) == (3, 3, "dice_loss")
    assert (config.training.batch_size, config.training.num_epochs, config.optimizer.lr) == (8, 100, 0.001)
    expect(shell("ml-train --config mine.yaml", SMALL))
    assert Path("runs/my_dataset_fold_0/weights/best.pt").is_file()


def test_the_advanced_config_says_what_it_means() -> None:
    config = load_config(write_yaml(ADVANCED_CONFIG))
    assert (config.data.data_dir, config.data.num_classes, config.data.fold) == ("data/medical_scans", 4, 0)
    assert config.model.dropout == 0.1
    assert (config.loss.dice_bce.dice_weight, config.loss.dice_bce.bce_weight) == (0.7, 0.3)
    assert (config.training.trainer_type, config.training.amp_dtype) == ("mixed_precision", "float16")
    stop, keep = config.training.callbacks
    assert (stop.type, stop.monitor, stop.patience, stop.mode) == ("early_stopping", "val_iou", 20, "max")
    assert (keep.type, keep.monitor, keep.save_top_k, keep.mode) == ("model_checkpoint", "val_dice", 3, "max")
    assert (config.optimizer.type, config.optimizer.lr, config.optimizer.weight_decay) == ("adamw", 0.0001, 0.01)
    assert (config.scheduler.type, config.scheduler.T_max, config.scheduler.eta_min) == ("cosine", 150, 0.00001)
    assert [spec.type for spec in config.train_transforms] == [
        "resize", "random_horizontal_flip", "random_vertical_flip", "normalize",
    ]  # fmt: skip
    assert [spec.type for spec in config.val_transforms] == ["resize", "normalize"]
    assert config.val_transforms[0].size == (512, 512)


def test_the_advanced_config_trains_end_to_end() -> None:
    """Everything as written, at 512x512: the three best epochs by val_dice stay, and best.pt is one."""
    data = drawing("medical_scans", num_classes=4, num_images=10)
    expect(shell(f"ml-split --raw_data {data}/images --mask_data {data}/masks --folds 4 --task segmentation"))
    write_yaml(ADVANCED_CONFIG)
    tiny = "--num_epochs 4 --num_workers 0 --set model.base_channels=1"
    expect(shell("ml-train --config mine.yaml", tiny))
    weights = Path("runs/medical_scans_fold_0/weights")
    last, best = load_checkpoint(weights / "last.pt"), load_checkpoint(weights / "best.pt")
    kept = {path.stem: load_checkpoint(path)["metrics"]["val_dice"] for path in weights.glob("epoch_*.pt")}
    assert last["epoch"] == 4 and len(kept) == 3
    assert f"epoch_{best['epoch']}" in kept and best["metrics"]["val_dice"] == max(kept.values())
    lr = 0.00001 + (0.0001 - 0.00001) * (1 + np.cos(np.pi * 4 / 150)) / 2
    assert last["optimizer_state_dict"]["param_groups"][0]["lr"] == pytest.approx(lr)
    assert last["callback_state_dicts"]["early_stopping"]["best"] is not None
    out = expect(shell(f"ml-inference --checkpoint_path {weights / 'best.pt'}")).out
    assert re.search(r"^    Class 3 \(class_3\): [01]\.\d{4}$", out, re.MULTILINE)
    assert Image.open(next(Path("runs/medical_scans_fold_0/inference/test/masks").iterdir())).size == (64, 64)


# Training


def test_train_a_specific_fold(my_segmentation: Path) -> None:
    """`--fold 2` validates on the images of fold 2 and names the run folder after it."""
    expect(shell(TRAIN_FOLD, SMALL))
    assert [path.name for path in Path("runs").iterdir()] == ["my_segmentation_fold_2"]
    metrics = json.loads(Path("runs/my_segmentation_fold_2/metrics.json").read_text())
    validated = sorted(f"images/{image['image']}" for image in metrics["val"]["per_image"])
    assert validated == sorted(listed(my_segmentation, "fold_2_val"))


def test_override_the_batch_size(my_segmentation: Path) -> None:
    """The YAML says 2; the run takes 4, so that 11 training images are 3 steps."""
    assert load_config(Path("configs/my_segmentation_config.yaml")).training.batch_size == 2
    expect(shell(TRAIN_BATCH_SIZE, SMALL))
    run = Path("runs/my_segmentation_fold_0")
    assert yaml.safe_load((run / "config.yaml").read_text())["training"]["batch_size"] == 4
    steps = -(-len(listed(my_segmentation, "fold_0_train")) // 4)
    assert load_checkpoint(run / "weights" / "last.pt")["step"] == steps


def test_a_second_training_does_not_overwrite_the_first(my_segmentation: Path) -> None:
    expect(shell(TRAIN_WITH_CONFIG, SMALL))
    result = shell(TRAIN_WITH_CONFIG, SMALL)
    assert result.code == 2 and "runs/my_segmentation_fold_0 holds a finished run" in result.err
    expect(shell(TRAIN_WITH_CONFIG, f"--overwrite {SMALL}"))


def test_the_standard_trainer_trains(my_dataset: Path) -> None:
    config_with(STANDARD)
    assert "Test Results:" in expect(shell("ml-train --config mine.yaml", SMALL)).out


@pytest.mark.parametrize(
    ("block", "word"), [(MIXED_PRECISION, "mixed_precision"), (ACCELERATE, "accelerate"), (DP, "dp")]
)
def test_the_other_trainers_train_as_their_blocks_say(my_dataset: Path, block: str, word: str) -> None:
    """Their blocks train as written; of so few images, dp takes one a step, or the first would exceed the budget."""
    assert load_config(config_with(block)).training.trainer_type == word
    expect(shell("ml-train --config mine.yaml", SMALL + (" training.batch_size=1" if word == "dp" else "")))
    assert next(Path("runs").glob("*/weights/best.pt")).is_file()


def test_1e_5_is_a_number_in_the_dp_block(my_dataset: Path) -> None:
    """Plain YAML reads 1e-5 as text."""
    assert isinstance(yaml.safe_load(DP)["training"]["dp"]["target_delta"], str)
    config = load_config(config_with(DP))
    assert config.training.batch_size == 16
    dp = config.training.dp
    assert (dp.noise_multiplier, dp.max_grad_norm, dp.target_epsilon, dp.target_delta) == (1.1, 1.0, 3.0, 1e-5)


def test_gradient_accumulation_makes_one_step_of_four_batches(my_dataset: Path) -> None:
    config_with(GRADIENT_ACCUMULATION)
    expect(shell("ml-train --config mine.yaml", SMALL))
    batches = -(-len(listed(my_dataset, "fold_0_train")) // 2)
    assert load_checkpoint(Path("runs/my_dataset_fold_0/weights/last.pt"))["step"] == -(-batches // 4)


def test_gradient_clipping_is_read_into_the_step(my_dataset: Path) -> None:
    config_with(GRADIENT_CLIPPING)
    assert load_config(Path("mine.yaml")).max_norm == 1.0
    expect(shell("ml-train --config mine.yaml", SMALL))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # torch's word on machines of fewer cores
def test_workers_and_pinned_memory_train(my_dataset: Path) -> None:
    """As written, with four worker processes."""
    config_with(DATA_LOADING)
    config = load_config(Path("mine.yaml"))
    assert (config.training.num_workers, config.training.pin_memory) == (4, True)
    # the batches are many enough for all four workers
    flags = "--num_epochs 1 --batch_size 2 --set model.base_channels=2"
    expect(shell("ml-train --config mine.yaml", flags))


# Models and losses


def test_the_model_block_builds_the_unet_for_any_n() -> None:
    for num_classes in (2, 5):
        block = SIMPLE_UNET.replace("num_classes: N", f"num_classes: {num_classes}")
        raw = yaml.safe_load(f"data: {{data_dir: d, num_classes: {num_classes}}}\n{block}")
        config = parse_config(raw)
        assert (config.model.num_classes, config.model.dropout) == (num_classes, 0.1)
        net = MODEL_REGISTRY[config.model.custom_architecture](3, num_classes, base_channels=2, dropout=0.1)
        assert net(torch.zeros(1, 3, 32, 48)).shape == (1, num_classes, 32, 48)


def test_dice_is_the_default_loss() -> None:
    assert Config.model_validate({"data": {"data_dir": "d", "num_classes": 2}}).loss.type == "dice_loss"


@pytest.mark.parametrize(
    ("block", "word"),
    [(DICE, "dice_loss"), (DICE_BCE, "dice_bce_loss"), (IOU, "iou_loss")],
    ids=["dice", "dice_bce", "iou"],
)
def test_each_loss_block_trains(my_dataset: Path, block: str, word: str) -> None:
    config_with(block)
    expect(shell("ml-train --config mine.yaml", SMALL))
    best = load_checkpoint(Path("runs/my_dataset_fold_0/weights/best.pt"))
    assert best["config"]["loss"]["type"] == word and 0 < best["metrics"]["train_loss"] < 2


def test_the_class_weights_of_the_guide_train(my_dataset: Path) -> None:
    config_with("loss: {type: cross_entropy, class_weights: [0.1, 1.0, 2.0]}")
    expect(shell("ml-train --config mine.yaml", SMALL))


@pytest.mark.parametrize("loss", ["my_focal_loss", "my_custom_loss"])
def test_a_model_and_a_loss_of_ones_own_register_as_the_guide_shows(my_dataset: Path, loss: str) -> None:
    """The guide's code in files that `plugins:` names; training and inference run with it."""
    Path("my_models.py").write_text(CUSTOM_MODEL)
    Path("my_losses.py").write_text(CUSTOM_LOSS)
    config_with(f"model: {{custom_architecture: my_custom_unet}}\nloss: {{type: {loss}}}")
    result = shell("ml-train --config mine.yaml", SMALL)
    assert result.code == 2 and "my_custom_unet" in result.err  # not known without the plugin
    shutil.rmtree("runs", ignore_errors=True)
    with Path("mine.yaml").open("a") as file:
        file.write("plugins: [my_models.py, my_losses.py]\n")
    expect(shell("ml-train --config mine.yaml", SMALL))
    best = "runs/my_dataset_fold_0/weights/best.pt"
    assert set(load_checkpoint(Path(best))["model_state_dict"]) == {"layer.weight", "layer.bias"}
    out = expect(shell(f"ml-inference --checkpoint_path {best} --plugin my_models.py my_losses.py")).out
    assert out.startswith("Test Results:\n")


def test_the_guides_focal_loss_trains_with_the_generated_config(my_segmentation: Path) -> None:
    """The generated config rotates, which brings ignored pixels into the targets; F.cross_entropy must bear them."""
    Path("my_losses.py").write_text(CUSTOM_LOSS)
    expect(shell(TRAIN_WITH_CONFIG, f"{SMALL} loss.type=my_focal_loss plugins=[my_losses.py]"))


# Advanced topics


def test_multi_scale_training_draws_each_size_for_whole_batches(my_dataset: Path) -> None:
    config = load_config(config_with(MULTI_SCALE), {"training.num_workers": 0})
    loader = task_for(config).loader("train", training=True)
    sizes = {tuple(batch.images.shape[-2:]) for epoch in range(8) for batch in loader.epoch(epoch)}
    assert sizes == {(256, 256), (384, 384), (512, 512)}
    expect(shell("ml-train --config mine.yaml", SMALL.replace("channels=2", "channels=1")))


def test_the_augmentation_example_trains(my_dataset: Path) -> None:
    config = load_config(config_with(AUGMENTATION))
    assert [spec.type for spec in config.train_transforms] == [
        "resize", "random_horizontal_flip", "random_rotation", "color_jitter",
    ]  # fmt: skip
    assert [spec.type for spec in config.val_transforms] == ["resize"]
    expect(shell("ml-train --config mine.yaml", SMALL.replace("channels=2", "channels=1")))


# Troubleshooting


def test_the_guides_look_at_a_mask_prints_what_it_should(my_dataset: Path) -> None:
    assert snippet(MASKS_NOT_LOADING) == "Shape: (64, 64)\nUnique values: [0 1 2]\nDtype: uint8\n"


def test_the_guides_look_at_the_sizes_prints_what_it_should(my_dataset: Path) -> None:
    assert snippet(MISMATCHED_DIMENSIONS) == "Image size: (64, 64)\nMask size: (64, 64)\n"


def spoil(data: Path, kind: str) -> str:
    """Make one mistake of the guide's list with the mask of img1; return the name that the error must say."""
    path = data / "masks" / "img1.png"
    mask: NDArray[Any] = read_mask(path)
    match kind:
        case "RGB":
            Image.fromarray(np.stack([mask] * 3, axis=2)).save(path)
        case "JPEG":
            path.unlink()
            path = path.with_suffix(".jpg")
            Image.fromarray(mask).save(path)
        case "JPEG named PNG":
            Image.fromarray(mask).save(path, format="JPEG")
        case "float":
            path.unlink()
            path = path.with_suffix(".tif")
            Image.fromarray(mask.astype(np.float32)).save(path)
        case "another size":
            Image.fromarray(mask[:, :48].copy()).save(path)
        case "another name":
            path = path.rename(path.with_name("img1_mask.png"))
        case "0 and 255":
            Image.fromarray(((mask > 0) * 255).astype(np.uint8)).save(path)
    return path.name


def assert_one_sentence(result: Result, name: str) -> None:
    assert result.code == 2 and result.out == ""
    assert result.err.startswith("error: ") and result.err.count("\n") == 1, result.err
    assert name in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("kind", ["RGB", "JPEG", "JPEG named PNG", "float", "another size", "another name"])
def test_a_wrong_mask_is_named_and_nothing_is_written(kind: str) -> None:
    """ml-split and ml-init-config find each mistake that a file shows by itself."""
    data = photographs("my_dataset")
    name = spoil(data, kind)
    before = tree(Path())
    assert_one_sentence(shell(SPLIT_BASIC), name)
    assert_one_sentence(shell(INIT_DEFAULT), name)
    assert tree(Path()) == before


@pytest.mark.parametrize("kind", ["RGB", "JPEG named PNG", "float", "another size", "another name", "0 and 255"])
def test_training_finds_a_mask_that_went_wrong_after_the_split(my_dataset: Path, kind: str) -> None:
    """The index files still name masks/img1.png, in whatever part of fold 0 it is."""
    assert "masks/img1.png" in listed(my_dataset, "fold_0_train", "masks") + listed(my_dataset, "fold_0_val", "masks")
    config_with()
    name = spoil(my_dataset, kind)
    if kind in ("float", "another name"):  # the name on the list is gone
        name = "img1.png"
    before = tree(Path())
    assert_one_sentence(shell("ml-train --config mine.yaml"), name)
    assert tree(Path()) == before


@pytest.mark.parametrize(
    "named",
    [
        False,
        True,
    ],
    ids=["no classes.txt", "classes.txt"],
)
def test_255_is_not_class_1(named: bool) -> None:
    """Masks of 0 and 255 only: ml-split warns, and no config is written that would take the object for unlabelled."""
    data = photographs("my_dataset")
    for path in (data / "masks").iterdir():
        Image.fromarray(((read_mask(path) > 0) * 255).astype(np.uint8)).save(path)
    (data / "classes.txt").write_text("background\ncell\n")
    if not named:
        (data / "classes.txt").unlink()
    assert "warning: the masks have the values 0 and 255 only" in expect(shell(SPLIT_BASIC)).out
    before = tree(Path())
    assert_one_sentence(shell(INIT_DEFAULT), "data/my_dataset/masks")
    assert tree(Path()) == before


# Examples


def test_the_brain_mri_example() -> None:
    """Gray images, three classes, a stratified split, and the guide's edits of the config."""
    data = drawing("brain_mri", num_classes=3, gray=True)
    expect(shell(BRAIN_MRI))
    for name in ["test", *(f"fold_{k}_val" for k in range(5))]:
        assert classes_in(data, name) == {0, 1, 2}
    path = Path("configs/brain_mri_config.yaml")
    edited = yaml.safe_load(path.read_text())
    assert (edited["data"]["num_classes"], edited["model"]["in_channels"]) == (3, 1)
    # 3. Edit config for medical imaging: num_classes: 3, loss: dice_bce_loss, trainer_type, batch_size: 8
    edited["data"]["num_classes"] = edited["model"]["num_classes"] = 3
    edited["loss"]["type"] = "dice_bce_loss"
    edited["training"].update(trainer_type="mixed_precision", batch_size=8)
    path.write_text(yaml.safe_dump(edited))
    expect(shell(BRAIN_MRI_TRAIN, SMALL))
    assert Path("runs/brain_mri_fold_0/weights/best.pt").is_file()


def test_the_landcover_example() -> None:
    """Five classes, three folds; batch size and loss on the command line take the place of the config's."""
    data = drawing("landcover", num_classes=5)
    expect(shell(LANDCOVER, SMALL))
    assert (data / "splits" / "fold_2_val_images.txt").is_file()
    assert not (data / "splits" / "fold_3_val_images.txt").exists()
    merged = load_config(Path("runs/landcover_fold_0/config.yaml"))
    assert (merged.data.num_classes, merged.training.batch_size, merged.loss.type) == (5, 4, "dice_loss")
    metrics = json.loads(Path("runs/landcover_fold_0/metrics.json").read_text())
    assert np.shape(metrics["test"]["confusion_matrix"]) == (5, 5)
    weights = Path("runs/landcover_fold_0/weights")
    assert json.loads((weights / "best.validation.json").read_text())["verdict"] == "PASS"
    timed = json.loads((weights / "best.benchmark.json").read_text())
    names = [one["name"] for one in timed["contestants"]]
    assert names[0] == "PyTorch float32" and any(name.startswith("onnxruntime ") for name in names)
    assert {path.name for path in weights.iterdir()} >= {"best.onnx", "MODEL_CARD.md"}


@pytest.mark.parametrize("name", [*COMMANDS, "ml-demo"])
def test_each_command_is_installed_and_explains_itself(name: str) -> None:
    done = subprocess.run([Path(sys.executable).with_name(name), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: {name} ") and not done.stderr
