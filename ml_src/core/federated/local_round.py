"""What a site adds to the loop of any training for its share of a round. Next to read: `site.py`."""

import torch
from torch import Tensor, nn

from ml_src.core.callbacks import Callback
from ml_src.core.trainers.training import Training


class RoundEnd(Callback):
    """Ends the loop with the last step of a round."""

    name, reached = "round_end", "end of the round"

    def __init__(self) -> None:
        self.last_step = 0
        self.refusal = ""  # why no further round is trained

    def on_step(self, t: Training, num_samples: int) -> None:
        if t.progress.step >= self.last_step and not t.stop:
            t.stop = self.reached


class Proximal(nn.Module):
    """A loss and mu / 2 * |w - w_global|^2, over all parameters (FedProx, Li et al. 2020, equation 2)."""

    def __init__(self, criterion: nn.Module, network: nn.Module, mu: float) -> None:
        super().__init__()
        self.criterion, self.mu = criterion, mu
        self.weights = list(network.parameters())
        self.reference = [p.detach().clone() for p in self.weights]

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (N, C, H, W) and targets (N, H, W) as the loss takes them; a scalar."""
        pairs = zip(self.weights, self.reference, strict=True)
        distance = torch.stack([(p - before).square().sum() for p, before in pairs]).sum()
        loss: Tensor = self.criterion(logits, targets) + self.mu / 2 * distance
        return loss
