"""Differential privacy: each image's gradient is clipped, and noise is added to their sum (Abadi et al. 2016).

Next to read: `ledger.py`, what that costs; `noise.py`; `sampling.py`, which images a step takes; `grad_samplers.py`,
the gradient of each image.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch
from opacus.validators import ModuleValidator
from torch import Tensor, nn

from ml_src.core.atomic import write_json
from ml_src.core.callbacks import Callback
from ml_src.core.config import Config, EarlyStopping, PlateauSchedule
from ml_src.core.errors import ConfigError
from ml_src.core.network import build_model
from ml_src.core.tasks import Task
from ml_src.core.trainers.backend import Backend
from ml_src.core.trainers.dp.grad_samplers import LeanGradSampleModule
from ml_src.core.trainers.dp.ledger import Ledger, Plan, Unit, plan, privacy_report, read_privacy
from ml_src.core.trainers.dp.losses import require_uncoupled
from ml_src.core.trainers.dp.noise import Noise, private_optimizer
from ml_src.core.trainers.dp.sampling import PoissonOrder
from ml_src.core.trainers.training import Training

log = logging.getLogger("ml_src")


class DP(Backend):
    """Poisson sampling, gradients clipped one by one, Gaussian noise, and a ledger of what has been spent."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        assert config.training.dp is not None  # the configuration sees to it
        self.dp = config.training.dp
        self.unit: Unit = "patient" if self.dp.group == "patient" else "image"
        repeats = config.deterministic and not self.dp.secure
        self.noise = Noise(replay_key(config) if repeats else None, self.dp.secure)
        self.ledger = Ledger()
        self.replays: dict[str, int] = {}  # steps that repeat to the bit and are paid: last one by key

    def train_order(self, task: Task) -> PoissonOrder:
        training = self.config.training
        groups = task.groups("train") if self.dp.group == "patient" else None
        self.order = PoissonOrder(
            task.num_images("train"),
            self.dp.max_physical_batch_size or training.batch_size,
            training.batch_size * training.gradient_accumulation_steps,
            self.noise.key,
            groups,
        )
        return self.order

    def require_fitting(self, criterion: nn.Module) -> None:
        require_uncoupled(criterion, self.config.loss.type, self.config.data.num_classes, self.device)

    def prepare(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        converted = batch_norms(self.config)
        if converted:
            log.info("Group normalisation in the place of batch normalisation: %s", ", ".join(converted))
        errors = ModuleValidator.validate(network, strict=False)
        if errors:
            raise ConfigError(f"model.custom_architecture cannot be trained with trainer_type dp: {errors[0]}")
        for layer in network.modules():
            if getattr(layer, "inplace", False):
                vars(layer)["inplace"] = False  # a hook looks at what came before
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
        self.optimizer.clip_and_accumulate()
        for p in self.optimizer.params:
            p.grad_sample = p.grad = None

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
            key = hashlib.sha256(str(self.noise.key).encode()).hexdigest()
            if self.optimizer.num_steps < self.replays.get(key, 0):
                return
            self.replays[key] = self.optimizer.num_steps + 1
        self.ledger.charge(self.optimizer.noise_multiplier, self.order.sample_rate, 1, self.dp.max_grad_norm)

    def epsilon(self) -> float:
        """What has been spent so far."""
        return self.ledger.epsilon(self.dp.target_delta, self.dp.accountant)

    def metrics(self) -> dict[str, float]:
        values = {"dp_epsilon": self.epsilon()}
        if self.dp.clipping == "adaptive":
            values["dp_clip_norm"] = float(self.optimizer.max_grad_norm)
        return values

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

    def state_dict(self) -> dict[str, Any]:
        return {
            "ledger": self.ledger.plain(),
            "noise_multiplier": self.optimizer.noise_multiplier,
            "max_grad_norm": self.optimizer.max_grad_norm,
            "num_steps": self.optimizer.num_steps,
            "replays": dict(self.replays),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.ledger = Ledger.from_plain(state["ledger"])
        if self.dp.noise_multiplier is None:
            self.optimizer.noise_multiplier = state["noise_multiplier"]  # never found anew
        if self.dp.clipping == "adaptive":
            self.optimizer.max_grad_norm = state["max_grad_norm"]
        self.optimizer.num_steps = state["num_steps"]
        self.replays = dict(state["replays"])


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
        wanted = max(steps_per_epoch * t.num_epochs - t.progress.step, 0)
        future = backend.plan_steps(wanted, backend.optimizer.noise_multiplier)
        self.last_step = t.progress.step + future.num_steps
        self.is_short = future.num_steps < wanted
        log.info(future.sentence(steps_per_epoch, t.progress.step))
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
    return int.from_bytes(hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).digest()[:8]) >> 1


def batch_norms(config: Config) -> list[str]:
    """Return the names of the layers that `model.norm: group` replaces."""
    with torch.device("meta"):
        network = build_model(config.model.model_copy(update={"norm": "batch"}))
    kind = nn.modules.batchnorm._BatchNorm
    return [name for name, layer in network.named_modules() if isinstance(layer, kind)]


def not_covered(config: Config) -> list[str]:
    """Return, in sentences, what a run does with private images outside of the guarantee."""
    sentences = [
        "the validation and test images, their scores, and the pictures of them in tensorboard/ and inference/"
    ]
    choices = ["best.pt"]
    choices += ["early_stopping" for one in config.training.callbacks if isinstance(one, EarlyStopping)]
    choices += ["the plateau schedule"] * isinstance(config.scheduler, PlateauSchedule)
    sentences.append(f"choices made by validation scores: {', '.join(choices)}")
    sentences.append("the losses and scores on training images in logs/, tensorboard/ and the checkpoints")
    if config.training.dp is not None and config.training.dp.public_statistics:
        sentences.append("mean, std and class weights, which the configuration declares to be public")
    if config.deterministic:
        sentences.append(
            "deterministic: true, which makes the noise follow from the configuration: whoever has it can subtract it"
        )
    return sentences
