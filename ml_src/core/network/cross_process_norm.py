"""Batch normalisation over the batches of all processes, so that two processes train as one with the whole batch.

torch has it for GPUs only (`nn.SyncBatchNorm`); this is the same for a CPU. Who converts: `trainers/accelerate.py`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from ml_src.core.errors import ConfigError


class CrossProcessBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d, 2d or 3d whose statistics in training are those of the batches of all processes together.

    Parameters, buffers and their names are those of the layer it stands for; evaluation and a single process too.
    Each process must call it equally often; one whose batch is empty adds nothing to the statistics.

    Shape: (N, C, ...) to (N, C, ...), N >= 0. Source: Ioffe and Szegedy 2015, algorithm 1, over the joined batches.
    Raises: ValueError in training if all processes together have at most one value a channel.
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation needs (N, C, ...), not {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        mean, var, count = joined_statistics(input.detach())
        if count <= 1:
            raise ValueError(f"training needs more than one value a channel, but {tuple(input.shape)} is all there is")
        if self.num_batches_tracked is not None:  # None: the layer keeps no running statistics
            self._track(mean, var * (count / (count - 1)))
        weight = torch.ones_like(mean) if self.weight is None else self.weight
        bias = torch.zeros_like(mean) if self.bias is None else self.bias
        output: Tensor = _Normalize.apply(input, weight, bias, mean, var, count, self.eps)
        return output

    def _track(self, mean: Tensor, unbiased_var: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None and self.running_var is not None
        self.num_batches_tracked.add_(1)
        # no momentum: the plain mean over all batches so far
        share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(unbiased_var.to(self.running_var.dtype), share)


def joined_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return mean (C,), biased variance (C,) and number of values a channel of (N, C, ...) over all processes.

    Every process adds up the same numbers in the same order, so all get the same bits. Float32 at least.
    Source: Chan, Golub, LeVeque 1983, for putting together the sums of parts.
    """
    dims = [dim for dim in range(x.dim()) if dim != 1]
    values = x if x.dtype == torch.float64 else x.float()
    mean = squares = values.new_zeros(x.shape[1])
    count = x.numel() // x.shape[1]
    if count:  # two passes: the difference of large sums would cancel
        mean = values.mean(dims)
        squares = (values - _along(mean, x)).square_().sum(dims)
    part = torch.cat([mean, squares, mean.new_full((1,), count)]).double()  # (2C + 1,)
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    means, sums, counts = torch.split(torch.stack(parts), [x.shape[1], x.shape[1], 1], dim=1)  # (P, C), (P, C), (P, 1)
    total = counts.sum()
    joined_mean = (counts * means).sum(0) / total
    joined_var = (sums + counts * (means - joined_mean).square()).sum(0) / total
    return joined_mean.to(values.dtype), joined_var.to(values.dtype), int(total)


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and var are those of all processes' x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, count: int, eps: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt())
        ctx.count = count
        return F.batch_norm(x, mean, var, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, inverse_std = ctx.saved_tensors
        dims = [dim for dim in range(x.dim()) if dim != 1]
        grad = grad.to(mean.dtype)
        normalized = (x - _along(mean, x)).mul_(_along(inverse_std, x))
        grad_bias, grad_weight = grad.sum(dims), (grad * normalized).sum(dims)  # of this process; DDP joins them
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.stack([grad_bias, grad_weight])
            dist.all_reduce(sums)
            mean_grad, mean_product = sums / ctx.count
            through_statistics = normalized.mul_(_along(mean_product, x)).add_(_along(mean_grad, x))
            grad_x = (grad - through_statistics).mul_(_along(weight * inverse_std, x)).to(x.dtype)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype), None, None, None, None


def _along(per_channel: Tensor, x: Tensor) -> Tensor:
    """(C,) to (1, C, 1, ...), for arithmetic with x."""
    return per_channel.view(1, -1, *[1] * (x.dim() - 2))


def convert(model: nn.Module) -> nn.Module:
    """Return `model` with the statistics of its batch normalisations joined over all processes, its tensors the same.

    On a GPU that is torch's own layer. Call it before DDP wraps the model, after the model is on its device.
    Raises: ConfigError for a layer that does more than normalise (a subclass), which would be lost.
    """
    plain = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, layer in layers:
        if type(layer) not in (*plain, CrossProcessBatchNorm, nn.SyncBatchNorm):
            raise ConfigError(
                f"the network's {name} is a {type(layer).__name__}, whose statistics cannot be joined over processes: "
                "use nn.BatchNorm2d or nn.GroupNorm in its place, or one process"
            )
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call, no-any-return]
    for _, layer in layers:
        # in place: the optimizer, a layer used twice and hooks keep what they hold
        layer.__class__ = CrossProcessBatchNorm
    return model
