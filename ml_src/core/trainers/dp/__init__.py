"""Differential privacy: each image's gradient is clipped, and noise is added to their sum (Abadi et al. 2016).

Next to read: `ledger.py`, what that costs; `noise.py`; `sampling.py`, which images a step takes; `grad_samplers.py`,
the gradient of each image.
"""

import hashlib
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from ml_src.core.atomic import write_json
from ml_src.core.callbacks import Callback
from ml_src.core.config import Config, EarlyStopping, PlateauSchedule
from ml_src.core.device import choose_device
from ml_src.core.errors import CheckpointError, ConfigError, TrainingError
from ml_src.core.network import build_model
from ml_src.core.tasks import Task
from ml_src.core.trainers.backend import Backend
from ml_src.core.trainers.dp.coupling import require_separate, require_uncoupled
from ml_src.core.trainers.dp.grad_samplers import LeanGradSampleModule
from ml_src.core.trainers.dp.ledger import Ledger, Plan, Unit, plan, privacy_report, read_privacy
from ml_src.core.trainers.dp.noise import Noise, private_optimizer
from ml_src.core.trainers.dp.sampling import PoissonOrder
from ml_src.core.trainers.training import Training

log = logging.getLogger("ml_src")
# of torch, about the first layer: images need no gradient
warnings.filterwarnings("ignore", message="Full backward hook is firing")


class DP(Backend):
    """Poisson sampling, gradients clipped one by one, Gaussian noise, and a ledger of what has been spent."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.training.dp is not None  # the configuration sees to it
        self.dp = config.training.dp
        self.unit: Unit = "patient" if self.dp.group == "patient" else "image"
        self.config_key = replay_key(config) if repeats(config) else None
        self.noise = Noise(self.config_key, self.dp.secure)
        self.ledger = Ledger()
        self.replays: dict[str, int] = {}  # steps that repeat to the bit and are paid: last one by key

    def train_order(self, task: Task) -> PoissonOrder:
        training = self.config.training
        groups = task.groups("train") if self.dp.group == "patient" else None
        num_images = task.num_images("train")
        if self.config_key is not None:  # noise that comes again without an image would show that image
            images = f"{self.config_key} {groups} {task.fingerprint('train')}"
            self.config_key = self.noise.key = _number(images.encode())
        self.order = PoissonOrder(
            num_images,
            self.dp.max_physical_batch_size or -(-training.batch_size // 2),
            training.batch_size * training.gradient_accumulation_steps,
            self.noise.key,
            groups,
        )
        return self.order

    def require_fitting(self, criterion: nn.Module) -> None:
        require_uncoupled(criterion, self.config.loss.type, self.config.data.num_classes)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        shape = (self.config.model.in_channels, *(self.config.train_image_size or (64, 64)))
        require_known_layers(network, self.config.model.custom_architecture)
        require_separate(network, self.config.model.custom_architecture, shape, self.device)
        for layer in network.modules():
            if getattr(layer, "inplace", False):
                vars(layer)["inplace"] = False  # a hook looks at what came before
        self.network, self.converted = network, batch_norms(self.config)
        model = LeanGradSampleModule(network, loss_reduction="sum")
        self.optimizer = private_optimizer(
            self.dp.clipping,
            optimizer,
            self.noise,
            self.plan_steps(self.order.num_steps * self.config.training.num_epochs, None).noise_multiplier,
            self.dp.max_grad_norm,
            self.order.expected_size,
        )
        return model, self.optimizer

    def plan_steps(self, num_steps: int, noise_multiplier: float | None) -> Plan:
        """Plan `num_steps` further steps, with the given noise where the configuration names none."""
        dp = self.dp
        sigma = noise_multiplier if dp.noise_multiplier is None else dp.noise_multiplier
        rate = self.order.sample_rate
        return plan(sigma, dp.target_epsilon, dp.target_delta, rate, num_steps, dp.accountant, self.ledger, self.unit)

    def backward(self, loss: Tensor, batch_size: int, step_size: int) -> None:
        """Add the clipped gradients of a batch's images to those of its step."""
        (loss * batch_size).backward()  # type: ignore[no-untyped-call]
        self._require_each_image(batch_size)
        self.optimizer.clip_and_accumulate()
        for p in self.optimizer.params:
            p.grad_sample = p.grad = None

    def _require_each_image(self, batch_size: int) -> None:
        """Raise TrainingError where a layer takes something else than an image for what is clipped."""
        for name, p in self.network.named_parameters():
            grads = getattr(p, "grad_sample", None)
            if p.requires_grad and not (isinstance(grads, Tensor) and len(grads) == batch_size):
                raise TrainingError(
                    f"the weights {name} of model.custom_architecture {self.config.model.custom_architecture!r} have "
                    f"no gradient for each of {batch_size} images: trainer_type dp needs every layer to be used, and "
                    "called with one row an image (fold nothing into the first dimension)"
                )

    def step(self, model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> None:
        """Pay, add the noise, take the step. `max_norm` clips what comes out of it, which costs nothing more."""
        for p in self.optimizer.params:
            if p.summed_grad is None:  # nobody was drawn: a step of noise alone
                p.summed_grad = torch.zeros_like(p)
        self._charge()
        self.optimizer.add_noise()
        for p in self.optimizer.params:
            p.grad /= self.order.expected_size
        if max_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        self.optimizer.original_optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _charge(self) -> None:
        if self.noise.repeats:  # the same images, weights and noise give what was given before
            if self.num_free_steps():
                return
            self.replays[self._public_key()] = self.optimizer.num_steps + 1
        self.ledger.charge(self.optimizer.noise_multiplier, self.order.sample_rate, 1, self.dp.max_grad_norm)

    def num_free_steps(self) -> int:
        """How many of the next steps repeat what is paid."""
        if not self.noise.repeats:
            return 0
        return max(self.replays.get(self._public_key(), 0) - int(self.optimizer.num_steps), 0)

    def _public_key(self) -> str:
        """A name for the key of the noise that does not tell it."""
        return hashlib.sha256(str(self.noise.key).encode()).hexdigest()

    def epsilon(self) -> float:
        """What has been spent so far."""
        return self.ledger.epsilon(self.dp.target_delta, self.dp.accountant)

    def metrics(self) -> dict[str, float]:
        values = {"dp_epsilon": self.epsilon()}
        if self.dp.clipping == "adaptive":
            values["dp_clip_norm"] = float(self.optimizer.max_grad_norm)
        return values

    def summary(self) -> list[str]:
        steps, delta = self.ledger.num_steps, self.dp.target_delta
        spent = f"epsilon {self.epsilon():.4g} at delta {delta:g} for one {self.unit} after {steps} steps"
        return [f"Privacy: {spent}; privacy.json says what this does not cover."]

    def callbacks(self) -> list[Callback]:
        return [Budget(self)]

    def describe(self) -> str:
        return f"with noise multiplier {self.optimizer.noise_multiplier:.4g}"

    def before_save(self, run_dir: Path) -> None:
        """Write privacy.json: no weights are on the disk before their price is."""
        dp = self.dp
        report = privacy_report(
            self.ledger, dp.target_delta, dp.accountant, self.unit, not_covered(self.config), self.replays
        )
        write_json(run_dir / "privacy.json", report)

    def rekey(self, context: bytes) -> None:
        """Let noise that follows from the configuration follow from `context` too: the same noise on other weights
        would show their difference.
        """
        if self.config_key is not None:
            self.noise.key = self.order.key = _number(f"{self.config_key}".encode(), context)

    def state_dict(self) -> dict[str, Any]:
        return {
            "ledger": self.ledger.plain(),
            "noise_multiplier": self.optimizer.noise_multiplier,
            "max_grad_norm": self.optimizer.max_grad_norm,
            "num_steps": self.optimizer.num_steps,
            "unit": self.unit,
            # of noise that follows from the configuration; any other key stays in memory
            "keys": None if self.config_key is None else [self.config_key, self.noise.key],
            "replays": dict(self.replays),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["unit"] != self.unit:
            raise CheckpointError(
                f"training.dp.group is {self.dp.group}, but the steps of this checkpoint protect one {state['unit']} "
                "each: start a new run with --run_name"
            )
        self.ledger = Ledger.from_plain(state["ledger"])
        if self.dp.noise_multiplier is None:
            self.optimizer.noise_multiplier = state["noise_multiplier"]  # never found anew
        if self.dp.clipping == "adaptive":
            self.optimizer.max_grad_norm = state["max_grad_norm"]
        self.optimizer.num_steps = state["num_steps"]
        self.replays = dict(state["replays"])
        if self.config_key is not None:
            self.noise.key = self.order.key = self._key_after(state["keys"])

    def _key_after(self, keys: list[int] | None) -> int:
        """Return the key with which to go on: that of the checkpoint only if it was made under this configuration.

        Under another one its weights are not those that this configuration's own key has met, or will meet.
        """
        if keys is not None and keys[0] == self.config_key:
            return keys[1]
        weights = (p.detach().cpu().numpy().tobytes() for p in self.optimizer.params)
        return _number(f"{self.config_key} {self.optimizer.num_steps}".encode(), *weights)


class Budget(Callback):
    """Says before the first step what training will cost, and ends it before the step that would cost too much."""

    name = "privacy_budget"

    def __init__(self, backend: DP) -> None:
        self.backend = backend

    def on_start(self, t: Training) -> None:
        backend, steps_per_epoch = self.backend, t.train_loader.num_steps
        folder = read_privacy(t.run_dir / "privacy.json")
        if folder is not None:  # of a resumed run: what was spent after the checkpoint is spent
            ledger, replays = folder
            backend.ledger = ledger.at_least(backend.ledger)
            backend.replays = {
                key: max(replays.get(key, 0), backend.replays.get(key, 0)) for key in replays | backend.replays
            }
        # an epoch that a budget cut short counts as one
        wanted = max(steps_per_epoch * (t.num_epochs - t.progress.epoch) - t.progress.epoch_step, 0)
        free = min(backend.num_free_steps(), wanted)
        future = backend.plan_steps(wanted - free, backend.optimizer.noise_multiplier)
        self.last_step = t.progress.step + free + future.num_steps
        self.is_short = future.num_steps < wanted - free
        if backend.converted:
            log.info("Group normalisation in the place of batch normalisation: %s", ", ".join(backend.converted))
        log.info(future.sentence(steps_per_epoch, t.progress.step + free))
        if backend.dp.secure:
            log.info("training.dp.secure: the noise is the system's, so that a resumed run does not repeat itself")
        for sentence in not_covered(t.config):
            log.info("Not covered: %s", sentence)

    def on_step(self, t: Training, num_samples: int) -> None:
        if self.is_short and t.progress.step >= self.last_step:
            t.stop = f"the privacy budget allows no step after {t.progress.step}"

    def on_end(self, t: Training) -> None:
        if self.backend.ledger.num_steps:
            self.backend.before_save(t.run_dir)


def replay_key(config: Config) -> int:
    """Return a number that is the same for two runs only if they compute the same; 0 to 2**63 - 1."""
    plain = config.model_dump(mode="json", exclude={"run_name"})
    for key in ("num_workers", "pin_memory", "checkpoint_every", "profile"):
        del plain["training"][key]
    device = choose_device(config.training.device)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    plain["noise of"] = [kind, torch.__version__, np.__version__]
    return _number(json.dumps(plain, sort_keys=True).encode())


def repeats(config: Config) -> bool:
    """Whether the noise follows from the configuration."""
    return config.deterministic and config.training.dp is not None and not config.training.dp.secure


def _number(*parts: bytes) -> int:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest()[:8]) >> 1


def batch_norms(config: Config) -> list[str]:
    """Return the names of the layers that `model.norm: group` replaces."""
    with torch.device("meta"):
        network = build_model(config.model.model_copy(update={"norm": "batch"}))
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, layer in network.named_modules() if isinstance(layer, kind)]


def require_known_layers(network: nn.Module, name: str) -> None:
    """Raise ConfigError for layers of which Opacus knows no gradient of each image, or that keep something of them."""
    unknown = [
        f"{path} ({type(layer).__name__})"
        for path, layer in network.named_modules()
        if ModuleValidator.VALIDATORS.get(type(layer), lambda _: [])(layer)
        or (any(p.requires_grad for p in layer.parameters(recurse=False)) and any(True for _ in layer.buffers()))
    ]
    if unknown:
        raise ConfigError(
            f"model.custom_architecture {name!r} cannot be trained with trainer_type dp: {', '.join(unknown)} keeps "
            "statistics, or has no gradient for each image; use convolutions, linear layers and group normalisation"
        )


def not_covered(config: Config) -> list[str]:
    """Return, in sentences, what a run does with private images outside of the guarantee."""
    sentences = [
        "the validation and test images, their scores, and the pictures of them in tensorboard/ and inference/"
    ]
    choices = ["best.pt"]
    choices += ["early_stopping" for one in config.training.callbacks if isinstance(one, EarlyStopping)]
    choices += ["the plateau schedule"] * isinstance(config.scheduler, PlateauSchedule)
    sentences.append(f"choices made by validation scores: {', '.join(choices)}")
    sentences.append(
        "the losses, scores and class shares of training images in logs/, tensorboard/, summary.txt, metrics.json and "
        "the checkpoints"
    )
    if config.training.dp is not None and config.training.dp.public_statistics:
        sentences.append("mean, std and class weights, which the configuration declares to be public")
    if repeats(config):
        sentences.append(
            "deterministic: true, which makes the noise follow from the configuration: whoever has it can subtract it"
        )
    return sentences
