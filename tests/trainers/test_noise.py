"""The noise is normal, repeats when it should and never otherwise; the optimizers release what they are charged for."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from ml_src.core.trainers.dp.noise import (
    CHUNK,
    AdaptiveOptimizer,
    Clipping,
    Noise,
    clipping_arguments,
    fill_secure,
    gradient_noise,
    private_optimizer,
)

KINDS = [Noise(key=11), Noise(secure=True)]
CLIPPINGS: list[Clipping] = ["flat", "per_layer", "adaptive"]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def values(noise: Noise, step: int, size: int = 100) -> Tensor:
    return noise.stream(step)(torch.empty(size))


def test_a_key_and_a_step_give_the_same_bits_again() -> None:
    """Whatever the global generators have drawn, and whichever steps came before."""
    noise = Noise(7)
    first = [values(noise, step) for step in (4, 5)]
    torch.rand(3), np.random.rand(3)
    assert torch.equal(values(Noise(7), 5), first[1])
    assert not torch.equal(*first)


def test_the_noise_does_not_depend_on_the_number_of_threads(threads: None) -> None:
    torch.set_num_threads(1)
    one = values(Noise(7), 0, 3 * CHUNK + 5)
    torch.set_num_threads(2)
    assert torch.equal(one, values(Noise(7), 0, 3 * CHUNK + 5))


def test_other_steps_keys_parameters_and_chunks_have_other_noise() -> None:
    """Seeds that differ by 2**32 are one seed to torch's generator on a CPU."""
    drawn = [values(Noise(key), step) for key in (0, 1, 2**32, 2**62) for step in (0, 1, 2**32, 2**40)]
    stream = Noise(0).stream(2)
    drawn += [*stream(torch.empty(CHUNK + 100)).split(CHUNK), stream(torch.empty(100))]
    numbers = torch.cat(drawn).unique()
    assert len(numbers) > 0.99 * sum(len(part) for part in drawn)  # float32 has twins among 70 000
    tops = [part[:100] for part in drawn]
    assert all(len(np.intersect1d(a, b)) == 0 for index, a in enumerate(tops) for b in tops[:index])


def test_without_a_key_no_noise_is_ever_reused() -> None:
    assert not torch.equal(values(Noise(), 0), values(Noise(), 0))
    assert not torch.equal(values(Noise(secure=True), 0), values(Noise(secure=True), 0))
    assert not torch.equal(values(Noise(3, secure=True), 0), values(Noise(3, secure=True), 0))
    assert [Noise(3).repeats, Noise().repeats, Noise(3, secure=True).repeats] == [True, False, False]


def test_a_step_that_was_given_is_refused() -> None:
    noise = Noise(3)
    noise.stream(4)
    for step in (4, 0):
        with pytest.raises(ValueError, match="was given before"):
            noise.stream(step)


@pytest.mark.parametrize("noise", KINDS, ids=["philox", "secure"])
def test_the_noise_is_standard_normal(noise: Noise) -> None:
    """Kolmogorov and Smirnov; and the kurtosis, for the tails. Chance of a false alarm: one in a million."""
    drawn = noise.stream(1)(torch.empty(200_001, dtype=torch.float64)).numpy()
    assert stats.kstest(drawn, "norm").pvalue > 1e-6
    assert abs(stats.kurtosis(drawn)) < 5 * math.sqrt(24 / len(drawn))
    assert abs(np.corrcoef(drawn[:-1], drawn[1:])[0, 1]) < 5 / math.sqrt(len(drawn))


def test_the_two_halves_of_secure_noise_are_independent() -> None:
    """They are the cosines and the sines of the same angles; so are their squares, which share a radius."""
    drawn = np.empty(100_001)
    fill_secure(drawn)
    a, b = drawn[:50_000], drawn[50_001:]
    for x, y in ((a, b), (a**2, b**2), (np.abs(a), b)):
        assert abs(np.corrcoef(x, y)[0, 1]) < 5 / math.sqrt(50_000)


@pytest.mark.parametrize("noise", KINDS, ids=["philox", "secure"])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 2, 5, 5), (CHUNK,), (CHUNK + 1,)])
def test_noise_has_the_shape_and_dtype_of_its_parameter(noise: Noise, shape: tuple[int, ...]) -> None:
    for step, dtype in enumerate((torch.float32, torch.float64, torch.bfloat16)):
        drawn = Noise(noise.key, noise.secure).stream(step)(torch.empty(shape, dtype=dtype))
        assert (drawn.shape, drawn.dtype) == (shape, dtype)
        assert bool(drawn.isfinite().all())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_repeats_its_noise_too() -> None:
    like = torch.empty(1000, device="cuda")
    first, again, other = (Noise(7).stream(step)(like) for step in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert stats.kstest(first.cpu().numpy(), "norm").pvalue > 1e-6
    assert Noise(secure=True).stream(0)(like).device == like.device


# ------------------------------------------------------------------------------------------------ the optimizers


def private(
    clipping: Clipping, sigma: float, norm: float = 1.0, batch: float = 4.0, key: int = 5
) -> tuple[list[torch.nn.Parameter], AdaptiveOptimizer]:
    """Two parameters, a matrix and a number, under SGD of rate 1: a step subtracts the gradient."""
    params = [torch.nn.Parameter(torch.zeros(3, 4)), torch.nn.Parameter(torch.zeros(()))]
    return params, private_optimizer(clipping, torch.optim.SGD(params, lr=1.0), Noise(key), sigma, norm, batch)


def give(params: list[torch.nn.Parameter], grads: Tensor) -> None:
    """Set per-sample gradients from rows of 13 numbers."""
    params[0].grad_sample = grads[:, :12].reshape(-1, 3, 4).clone()
    params[1].grad_sample = grads[:, 12].clone()


def summed(clipping: Clipping, grads: Tensor, norm: float) -> Tensor:
    """The sum of clipped gradients, and for adaptive clipping the count: all that noise is added to."""
    params, optimizer = private(clipping, 1.0, norm)
    give(params, grads)
    optimizer.clip_and_accumulate()
    parts = [p.summed_grad.flatten() for p in params]
    return torch.cat([*parts, torch.tensor([float(optimizer.centred_count)])] if clipping == "adaptive" else parts)


# Opacus clips a number's gradients by the norm of the whole batch: of no use, so per_layer is asked for a matrix alone
@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_one_sample_moves_what_is_released_by_at_most_its_sensitivity(clipping: Clipping) -> None:
    torch.manual_seed(0)
    for scale in (0.01, 1.0, 100.0):
        grads = torch.randn(5, 13) * scale
        change = summed(clipping, grads, 0.7) - summed(clipping, grads[1:], 0.7)
        assert change[:13].norm() <= 0.7 * (1 + 1e-5)
        assert change[13:].abs().tolist() == ([0.5] if clipping == "adaptive" else [])


def test_per_layer_clipping_shares_out_the_norm() -> None:
    """Each parameter keeps at most 1/sqrt(K) of it, so that a sample moves the sum by at most the whole."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(5)), torch.nn.Parameter(torch.zeros(2, 3))]
    optimizer = private_optimizer("per_layer", torch.optim.SGD(params, lr=1.0), Noise(1), 1.0, 0.7, 4)
    for p in params:
        p.grad_sample = torch.randn(1, *p.shape) * 100
    optimizer.clip_and_accumulate()
    norms = [float(p.summed_grad.norm()) for p in params]
    assert norms == pytest.approx([0.7 / math.sqrt(2)] * 2, rel=1e-4)
    assert math.hypot(*norms) <= 0.7 * (1 + 1e-6)
    assert optimizer.max_grad_norm == pytest.approx(0.7)


@pytest.mark.parametrize("clipping", CLIPPINGS)
def test_the_noise_of_a_step_is_what_the_ledger_is_charged_for(clipping: Clipping) -> None:
    """Noise alone (an empty batch) has the standard deviation z C / batch of theorem and textbook."""
    params = [torch.nn.Parameter(torch.zeros(200, 200)), torch.nn.Parameter(torch.zeros(40_000))]
    optimizer = private_optimizer(clipping, torch.optim.SGD(params, lr=1.0), Noise(1), 1.5, 0.7, 10)
    for p in params:
        p.grad_sample = torch.zeros(0, *p.shape)
    optimizer.step()
    z = (1.5**-2 - (2 * 3.0) ** -2) ** -0.5 if clipping == "adaptive" else 1.5
    for p in params:
        assert float(p.detach().std()) == pytest.approx(z * 0.7 / 10, rel=0.02)  # five standard errors
    assert not torch.equal(params[0].detach().flatten(), params[1].detach())


def test_the_arguments_of_each_clipping_keep_the_charged_noise_honest() -> None:
    assert clipping_arguments("flat", 1.1, 2.0, 7, 16) == {"noise_multiplier": 1.1, "max_grad_norm": 2.0}
    layers = clipping_arguments("per_layer", 1.1, 2.0, 7, 16)
    assert math.sqrt(sum(norm**2 for norm in layers["max_grad_norm"])) == pytest.approx(2.0)
    for z, batch, std in ((1.1, 16, 2.2), (1.1, 400, 20.0), (3.5, 16, 7.0)):
        adaptive = clipping_arguments("adaptive", z, 2.0, 7, batch)
        assert adaptive == {"noise_multiplier": z, "max_grad_norm": 2.0, "unclipped_num_std": std}
        z_gradients = gradient_noise(z, std)
        assert z_gradients**-2 + (2 * std) ** -2 == pytest.approx(z**-2)  # two Gaussian releases of one sample
        assert z < z_gradients < 1.034 * z
    assert gradient_noise(0.0, 1.0) == 0


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_a_resumed_optimizer_repeats_the_step_to_the_bit(clipping: Clipping) -> None:
    torch.manual_seed(0)
    batches = [torch.randn(count, 13) for count in (4, 0, 3, 5)]

    def steps(params: list[torch.nn.Parameter], optimizer: AdaptiveOptimizer, batches: list[Tensor]) -> None:
        for grads in batches:
            give(params, grads)
            optimizer.step()
            optimizer.zero_grad()

    params, optimizer = private(clipping, 1.1)
    steps(params, optimizer, batches)
    first, before = private(clipping, 1.1)
    steps(first, before, batches[:2])
    second, after = private(clipping, 1.1)
    after.num_steps, after.max_grad_norm = before.num_steps, before.max_grad_norm
    for p, q in zip(second, first, strict=True):
        p.data.copy_(q.data)
    steps(second, after, batches[2:])
    assert all(torch.equal(p, q) for p, q in zip(params, second, strict=True))
    assert after.num_steps == 4
    assert after.max_grad_norm == optimizer.max_grad_norm


def test_no_noise_multiplier_is_the_plain_mean_of_clipped_gradients() -> None:
    params, optimizer = private("flat", 0.0, norm=1e6, batch=4)
    grads = torch.arange(26.0).reshape(2, 13)
    give(params, grads)
    optimizer.step()
    assert torch.allclose(-params[0].detach().flatten(), grads[:, :12].sum(0) / 4)


@pytest.mark.parametrize("clipping", ["flat", "adaptive"])
def test_gradients_that_were_not_cleared_are_refused(clipping: Clipping) -> None:
    params, optimizer = private(clipping, 1.0)
    give(params, torch.ones(2, 13))
    optimizer.step()
    with pytest.raises(ValueError, match="haven't been cleared"):
        optimizer.step()


@pytest.mark.parametrize(("scale", "factor"), [(1e-3, math.exp(-0.1)), (1e3, math.exp(0.1))])
def test_the_adaptive_norm_follows_the_gradients(scale: float, factor: float) -> None:
    """Everything unclipped: it shrinks; everything clipped: it grows. 0.2 times the distance from one half."""
    params, optimizer = private("adaptive", 1e-6, norm=1.0, batch=2000)
    optimizer.unclipped_num_std = 1e-3
    give(params, torch.full((2000, 13), scale))
    optimizer.step()
    assert optimizer.max_grad_norm == pytest.approx(factor, rel=1e-4)


def test_the_adaptive_norm_counts_every_physical_batch_of_a_step() -> None:
    """Three quarters of the samples are unclipped, none of them in the last physical batch."""
    params, optimizer = private("adaptive", 1e-6, norm=1.0, batch=2000)
    optimizer.unclipped_num_std = 1e-3
    for scale, count, skip in ((1e-3, 1000, True), (1e-3, 500, True), (1e3, 500, False)):
        give(params, torch.full((count, 13), scale))
        optimizer.signal_skip_step(skip)
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.max_grad_norm == pytest.approx(math.exp(-0.2 * 0.25), rel=1e-4)


def test_the_adaptive_norm_does_not_tell_how_many_took_part() -> None:
    """With half of the samples clipped, a batch of twice the size leaves it the same."""
    norms = []
    for count in (100, 200):
        params, optimizer = private("adaptive", 1e-6, norm=1.0, batch=100)
        optimizer.unclipped_num_std = 1e-3
        give(params, torch.cat([torch.full((count // 2, 13), scale) for scale in (1e-3, 1e3)]))
        optimizer.step()
        norms.append(optimizer.max_grad_norm)
    assert norms[0] == norms[1] == pytest.approx(1.0, abs=1e-4)
