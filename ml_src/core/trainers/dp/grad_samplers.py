"""The gradient of each sample for convolutions and group normalisation, in the place of Opacus' own samplers.

Theirs is wrong for channels-last activations and for padding other than zeros, and fails on an empty batch of a
transposed convolution. `LeanGradSampleModule` also leaves out the gradient of the whole batch, which DP throws away.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleModule
from opacus.grad_sample.utils import register_grad_sampler
from torch import Tensor, nn
from torch.nn import functional as F

CONVOLUTIONS = (nn.Conv2d, nn.ConvTranspose2d)
Conv = nn.Conv2d | nn.ConvTranspose2d
GradSamples = dict[Tensor, Tensor]  # from a parameter


def register_grad_samplers() -> None:
    """Make every GradSampleModule that is built from here on use the samplers below; a second call changes nothing."""
    register_grad_sampler(CONVOLUTIONS)(conv_grad_sample)
    register_grad_sampler(nn.GroupNorm)(group_norm_grad_sample)


def conv_grad_sample(layer: Conv, activations: list[Tensor], backprops: Tensor) -> GradSamples:
    """Per-sample gradients of the parameters that require one, summed in float32 or wider, for N >= 0.

    Shape: activations [(N, C, H, W)], the layer's input; backprops (N, O, H', W'), the gradient of each sample's own
    loss with respect to the output. Returns (N, *parameter.shape) each.
    """
    grads: GradSamples = {}
    with torch.autocast(backprops.device.type, enabled=False):
        if layer.weight.requires_grad:
            grads[layer.weight] = conv_weight_grad_sample(layer, activations[0], backprops)
        if layer.bias is not None and layer.bias.requires_grad:
            grads[layer.bias] = backprops.sum((2, 3), dtype=_wide(backprops))
    return grads


def conv_weight_grad_sample(layer: Conv, images: Tensor, backprops: Tensor) -> Tensor:
    """Return the gradient of `layer.weight` for each sample, by whichever of two ways suits the layer's shape.

    A transposed convolution is a convolution read backwards: with the two sides exchanged its weight has the same
    gradient. The kernel walks over the `fine` side and meets one value of the `coarse` side at each position.
    Shape: images (N, C, H, W), backprops (N, O, H', W'); returns (N, *weight.shape).
    """
    fine, coarse = (backprops, images) if isinstance(layer, nn.ConvTranspose2d) else (images, backprops)
    num_positions = coarse.shape[2] * coarse.shape[3]
    # The unfolded side is then no larger than the result, so this needs no bound on memory of its own. It is also where
    # one product is faster than a convolution a sample: deep layers, 256 channels at 8x8. Elsewhere it is 2-5x slower.
    if num_positions <= coarse.shape[1] // layer.groups:
        return _by_product(layer, fine, coarse)
    return _by_sample(layer, fine, coarse)


def _by_product(layer: Conv, fine: Tensor, coarse: Tensor) -> Tensor:
    """Unfold the fine side and multiply, all samples at once."""
    fine, padding = _padded(layer, fine, coarse)
    num_blocks = len(fine) * layer.groups  # (N * groups): a group is as separate as a sample
    columns = F.unfold(fine.to(_wide(fine)), layer.kernel_size, layer.dilation, padding, layer.stride)
    columns = columns.reshape(num_blocks, columns.shape[1] // layer.groups, columns.shape[2])
    values = coarse.to(columns.dtype).reshape(num_blocks, coarse.shape[1] // layer.groups, columns.shape[2])
    return torch.bmm(values, columns.mT).view(len(fine), *layer.weight.shape)


def _by_sample(layer: Conv, fine: Tensor, coarse: Tensor) -> Tensor:
    """Call torch's own weight gradient for one sample after another: as many operations as for the batch, no copies."""
    grads = fine.new_empty((len(fine), *layer.weight.shape), dtype=_wide(fine))
    weight = layer.weight.detach().to(grads.dtype)  # only its shape and layout are read
    for index in range(len(fine)):
        one, padding = _padded(layer, fine[index : index + 1], coarse)
        grads[index] = torch.ops.aten.convolution_backward(
            coarse[index : index + 1].to(grads.dtype),
            one.to(grads.dtype),
            weight,
            None,  # no bias
            layer.stride,
            padding,
            layer.dilation,
            False,  # not transposed: the sides are exchanged already
            (0, 0),  # output padding
            layer.groups,
            (False, True, False),  # the gradient of the weight alone
        )[1]
    return grads


def _padded(layer: Conv, fine: Tensor, coarse: Tensor) -> tuple[Tensor, tuple[int, int]]:
    """Return the fine side and the zero padding that is left for the convolution to add at both ends."""
    left, right, top, bottom = layer._reversed_padding_repeated_twice  # as numbers, also of "same" and "valid"
    if isinstance(layer, nn.ConvTranspose2d):  # output_padding has lengthened the far ends, beyond the kernel's reach
        bottom, right = (
            (coarse.shape[axis] - 1) * stride + dilation * (size - 1) + 1 - before - fine.shape[axis]
            for axis, stride, dilation, size, before in zip(
                (2, 3), layer.stride, layer.dilation, layer.kernel_size, (top, left), strict=True
            )
        )
    if layer.padding_mode == "zeros" and left == right and top == bottom:
        return fine, (top, left)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    return F.pad(fine, (left, right, top, bottom), mode=mode), (0, 0)


def group_norm_grad_sample(layer: nn.GroupNorm, activations: list[Tensor], backprops: Tensor) -> GradSamples:
    """Per-sample gradients of scale and shift; Opacus' own normalises and multiplies in bfloat16 under autocast.

    Shape: activations [(N, C, *)], backprops (N, C, *). Returns (N, C) each, float32 or wider, for N >= 0.
    """
    axes, dtype = tuple(range(2, backprops.dim())), _wide(backprops)
    grads: GradSamples = {}
    with torch.autocast(backprops.device.type, enabled=False):
        if layer.weight.requires_grad:
            normalised = F.group_norm(activations[0].to(dtype), layer.num_groups, eps=layer.eps)
            grads[layer.weight] = normalised.mul_(backprops).sum(axes)
        if layer.bias.requires_grad:
            grads[layer.bias] = backprops.sum(axes, dtype=dtype)
    return grads


def _wide(values: Tensor) -> torch.dtype:
    """The number format of sums: float32, or float64 where the values are."""
    return torch.promote_types(values.dtype, torch.float32)


class LeanGradSampleModule(GradSampleModule):  # type: ignore[misc]
    """Opacus' hooks mode, in which convolutions have per-sample gradients only: `weight.grad` stays None.

    `DPOptimizer` overwrites `grad` with the clipped, noisy sum; to compute it before takes a third of a backward pass.
    Evaluation, and hooks that are disabled or removed, bring the ordinary gradient back. Used as `GradSampleModule` is,
    with the samplers above; layers derived from nn.Conv2d are left as they are.
    """

    def add_hooks(self, **options: Any) -> None:
        register_grad_samplers()
        super().add_hooks(**options)
        for layer in self._module.modules():
            if type(layer) in CONVOLUTIONS:
                layer.forward = partial(self._forward_convolution, layer)

    def remove_hooks(self) -> None:
        super().remove_hooks()
        for layer in self._module.modules():
            if type(layer) in CONVOLUTIONS:
                vars(layer).pop("forward", None)

    def _forward_convolution(self, layer: Conv, *inputs: Any, **options: Any) -> Tensor:
        forward: Callable[..., Tensor] = type(layer).forward
        trainable = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        observed = self.hooks_enabled and layer.training and torch.is_grad_enabled()  # when Opacus' hooks look too
        if not (observed and trainable):
            return forward(layer, *inputs, **options)
        constant = copy.copy(layer)
        constant.__dict__["_parameters"] = {
            name: None if parameter is None else parameter.detach() for name, parameter in layer._parameters.items()
        }
        outputs: Tensor = _Reached.apply(forward(constant, *inputs, **options), trainable[0])
        return outputs


class _Reached(torch.autograd.Function):
    """Returns its first argument; through the second, backward comes by even where the first needs no gradient."""

    @staticmethod
    def forward(ctx: Any, outputs: Tensor, parameter: Tensor) -> Tensor:
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
