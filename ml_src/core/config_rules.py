"""What the keys of a configuration contradict among each other. Next to read: `config.py`, which declares them."""

from typing import TYPE_CHECKING

from ml_src.core.federated_specs import SELECTIVE
from ml_src.core.postprocess_specs import misfits
from ml_src.core.transform_specs import (
    ColorJitter,
    Normalize,
    RandomCrop,
    RandomHorizontalFlip,
    RandomTranspose,
    RandomVerticalFlip,
)

if TYPE_CHECKING:
    from ml_src.core.config import Config
    from ml_src.core.federated_specs import FederatedConfig
    from ml_src.core.transform_specs import TrainTransform

# Mean and standard deviation that are known without a look at the data: of ImageNet (near those of most photographs),
# and of gray images that use most of their range, as one value or three.
PUBLIC_STATISTICS = [
    ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    ([0.5], [0.25]),
    ([0.5] * 3, [0.25] * 3),
    ([0.5], [0.5]),
    ([0.5] * 3, [0.5] * 3),
]

# Left becomes right; quarter turns, rotation, shear and the like keep the picture's hand.
Mirroring = RandomHorizontalFlip | RandomVerticalFlip | RandomTranspose


def contradictions(config: "Config") -> list[str]:
    """Return a sentence for each pair of keys that do not go together."""
    data, names = config.data, config.data.class_names
    problems = []
    if config.model.num_classes != data.num_classes:
        problems.append(f"model.num_classes is {config.model.num_classes} but data.num_classes is {data.num_classes}")
    if config.loss.ignore_index != data.ignore_index:
        problems.append(
            f"loss.ignore_index is {config.loss.ignore_index} but data.ignore_index is {data.ignore_index}: "
            "set it under data only"
        )
    if names is not None and len(names) != data.num_classes:
        problems.append(f"data.class_names has {len(names)} names but data.num_classes is {data.num_classes}")
    weights = config.loss.class_weights
    if isinstance(weights, list) and len(weights) != data.num_classes:
        problems.append(f"loss.class_weights has {len(weights)} values but data.num_classes is {data.num_classes}")
    if names is not None and (len(set(names)) < len(names) or not all(name.strip() for name in names)):
        problems.append("data.class_names has a name twice, or an empty one")
    if isinstance(weights, list) and not any(weights):
        problems.append("loss.class_weights are all 0")
    if config.loss.dice_bce.dice_weight == config.loss.dice_bce.bce_weight == 0:
        problems.append("loss.dice_bce: both weights are 0")
    if config.scheduler.type == "cosine" and config.scheduler.eta_min > config.optimizer.lr:
        problems.append(f"scheduler.eta_min {config.scheduler.eta_min:g} is above optimizer.lr {config.optimizer.lr:g}")
    problems += _trainer_problems(config)
    words = [callback.type for callback in config.training.callbacks]
    problems += [f"training.callbacks has {w} twice" for w in sorted(set(words)) if words.count(w) > 1]
    problems += _transform_problems(config)
    problems += [f"inference.postprocess: {p}" for p in misfits(config.inference.postprocess, data.num_classes)]
    return problems


def _trainer_problems(config: "Config") -> list[str]:
    """What the chosen trainer cannot do."""
    training, problems = config.training, []
    trainer, dp = training.trainer_type, training.dp
    if trainer == "federated":
        if config.federated is None:
            return ["trainer_type federated needs a section federated: with sites or num_sites"]
        problems += _federated_problems(config, config.federated)
        trainer = config.federated.backend  # what trains at a site
    if trainer == "dp":
        if dp is None or dp.noise_multiplier is dp.target_epsilon is None:
            problems.append("training.dp needs a noise_multiplier, a target_epsilon, or both")
        if config.model.norm != "group":
            problems.append("model.norm must be group with trainer_type dp: batch normalisation mixes the images")
        if training.compile:
            problems.append("training.compile does not go with trainer_type dp, whose hooks it would lose")
        if config.loss.class_weights == "balanced":
            problems.append("loss.class_weights: balanced counts the private masks: give weights known beforehand")
        if config.needs_statistics:
            problems.append("transforms.*.normalize: data reads the private images: give mean and std known beforehand")
        problems += _undeclared_statistics(config)
        if config.data.samples_per_image > 1:
            problems.append("data.samples_per_image must be 1 with trainer_type dp: it would spend privacy unseen")
    if training.num_processes is not None and trainer != "accelerate":
        problems.append(f"training.num_processes is for trainer_type accelerate, not {trainer}")
    if training.auto_batch and trainer in ("accelerate", "dp"):
        problems.append(f"training.auto_batch does not go with trainer_type {trainer}: set training.batch_size")
    return problems


def _federated_problems(config: "Config", federated: "FederatedConfig") -> list[str]:
    """What a federation cannot do."""
    training, strategy, group = config.training, federated.strategy.type, config.model.norm == "group"
    number = federated.num_sites or (len(federated.sites) if federated.sites is not None else None)
    monitors = [str(getattr(section, "monitor", "val_")) for section in (config.scheduler, *training.callbacks)]
    of_training = [word for word in monitors if not word.startswith("val_")]
    top_k = [one.save_top_k for one in training.callbacks if one.type == "model_checkpoint"]
    wrong = {
        "federated: give sites or num_sites, not both": federated.sites is not None and federated.num_sites is not None,
        "federated.sites is empty": federated.sites == [],
        "federated.sites has a folder twice": len(set(federated.sites or [])) < len(federated.sites or []),
        "federated: give local_epochs or local_steps, not both": None
        not in (federated.local_epochs, federated.local_steps),
        f"federated.min_sites is {federated.min_sites} but there are {number} sites": number is not None
        and federated.quorum > number,
        "training.ema does not go with trainer_type federated: its average is that of the sites": training.ema
        is not None,
        "scheduler plateau does not go with trainer_type federated: the sites would part": config.scheduler.type
        == "plateau",
        "training.auto_batch does not go with trainer_type federated: set training.batch_size": training.auto_batch,
        "training.profile does not go with trainer_type federated": training.profile,
        f"a monitor is {', '.join(of_training)} but sites tell of validation only: use val_...": bool(of_training),
        "model_checkpoint.save_top_k above 1 does not go with trainer_type federated": bool(top_k) and max(top_k) > 1,
        "federated.strategy fedprox does not go with backend dp, which would clip its term": strategy == "fedprox"
        and federated.backend == "dp",
        "federated.personalize batch_norm needs model.norm batch": federated.personalize == "batch_norm" and group,
        f"federated.strategy {strategy} looks at single updates, which secure_aggregation and central_dp hide": strategy
        in SELECTIVE
        and (federated.secure_aggregation or federated.central_dp is not None),
        "federated.secure_aggregation needs three sites at least": federated.secure_aggregation
        and number is not None
        and number < 3,
        "federated.central_dp clips single updates, which secure_aggregation hides: use one, or backend dp": (
            federated.secure_aggregation and federated.central_dp is not None
        ),
        "federated.central_dp needs model.norm group: running statistics would leave without noise": (
            federated.central_dp is not None and not group
        ),
    }
    return [sentence for sentence, is_wrong in wrong.items() if is_wrong]


def _undeclared_statistics(config: "Config") -> list[str]:
    """What was perhaps computed from private images, outside of the guarantee."""
    if config.training.dp is None or config.training.dp.public_statistics:
        return []
    given = [(spec.mean, spec.std) for spec in config.train_transforms if isinstance(spec, Normalize)]
    known = [("data", "data"), *PUBLIC_STATISTICS]  # the first is refused already
    of_data = ["transforms.*.normalize" for one in given if one not in known]
    of_data += ["loss.class_weights"] * isinstance(config.loss.class_weights, list)
    return [
        f"{key} may have been computed from the private images: use values known beforehand, or say "
        "training.dp.public_statistics: true if they were not"
        for key in of_data
    ]


def _transform_problems(config: "Config") -> list[str]:
    """What the lists of transforms contradict: the channels of the image, or each other."""
    problems = []
    for split in ("train", "val"):
        for spec in getattr(config.transforms, split) or []:
            problems += [f"transforms.{split}: {problem}" for problem in _misfits(spec, config)]
    mirrored = [s.type for s in config.train_transforms if isinstance(s, Mirroring) and s.p > 0]
    if mirrored and not config.data.mirror:
        problems.append(f"transforms.train mirrors but data.mirror is false: remove {', '.join(mirrored)}")
    train, val = (
        [s for s in specs if isinstance(s, Normalize)] for specs in (config.train_transforms, config.val_transforms)
    )
    if train != val:
        problems.append("transforms: normalize must be the same in train and val: copy it, or leave out transforms.val")
    return problems


def _misfits(spec: "TrainTransform", config: "Config") -> list[str]:
    """What of a transform does not fit the images and classes."""
    channels, num_classes = config.model.in_channels, config.data.num_classes
    match spec:
        case Normalize(mean="data", std="data"):
            return []
        case Normalize(mean="data") | Normalize(std="data"):
            return ["give normalize both mean and std, or neither"]
        case Normalize():
            return [
                f"normalize.{key} has {len(values)} values but in_channels is {channels}"
                for key, values in (("mean", spec.mean), ("std", spec.std))
                if len(values) not in (1, channels)
            ]
        case RandomCrop():
            return [
                f"random_crop.classes has {value} but num_classes is {num_classes}"
                for value in spec.classes or []
                if value >= num_classes
            ]
        case ColorJitter() if (spec.saturation or spec.hue) and channels != 3:
            return [f"saturation and hue need colour, but in_channels is {channels}"]
    return []
