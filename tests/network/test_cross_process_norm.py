"""Two real processes, each with a part of a batch, against torch's BatchNorm2d in one process with the whole batch."""

import copy
import socket
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch import multiprocessing as mp

from ml_src.core.errors import ConfigError
from ml_src.core.network.cross_process_norm import CrossProcessBatchNorm, convert
from ml_src.core.network.custom import SimpleUNet

pytestmark = pytest.mark.xdist_group("cross_process_norm")  # what they share is made once

Result = dict[str, Tensor]


def network(dtype: torch.dtype, momentum: float | None = 0.1) -> nn.Sequential:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(4, momentum=momentum), nn.BatchNorm2d(5, affine=False, momentum=momentum)]
    # without biases, whose gradients before a normalisation are 0 but for rounding
    convolutions = [nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(4, 5, 3, bias=False)]
    layers = [convolutions[0], norms[0], nn.ReLU(), convolutions[1], norms[1]]
    return nn.Sequential(*layers).to(dtype, memory_format=torch.channels_last)


def batch(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images whose mean is far from 0, and weights that make the loss differ from pixel to pixel."""
    torch.manual_seed(1)
    images, weights = 2 + torch.randn(4, 3, 9, 8, dtype=dtype), torch.randn(4, 5, 5, 4, dtype=dtype)
    return images.contiguous(memory_format=torch.channels_last), weights


def two_steps(model: nn.Module, images: Tensor, weights: Tensor) -> Result:
    """Outputs and gradients of the second of two passes, and the buffers after them."""
    for factor in (1.0, 1.5):
        model.zero_grad()
        leaf = (images * factor).detach().requires_grad_()
        logits = model(leaf)
        (logits * weights).square().sum().backward()
    gradients = {f"grad {name}": p.grad for name, p in model.named_parameters()}
    return {"logits": logits.detach(), "grad images": leaf.grad, **gradients, **dict(model.named_buffers())}


CASES = [(torch.float64, 0.1, 3), (torch.float64, None, 4), (torch.float32, 0.1, 3), (torch.float32, 0.3, 0)]


def on_a_part(rank: int, dtype: torch.dtype, momentum: float | None, first: int) -> Result:
    part = slice(0, first) if rank == 0 else slice(first, None)
    images, weights = batch(dtype)
    return two_steps(convert(network(dtype, momentum)), images[part], weights[part])


def under_autocast(rank: int) -> Result:
    model = convert(network(torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch(torch.float32)[0][:3] if rank == 0 else batch(torch.float32)[0][3:])
    logits.float().square().sum().backward()
    return {"logits": logits.detach(), "grad": model[0].weight.grad, "mean": model[1].running_mean}


def all_empty(rank: int) -> Result:
    try:
        convert(network(torch.float32))(batch(torch.float32)[0][:0])
    except ValueError as error:
        return {"refused": torch.tensor("more than one value a channel" in str(error))}
    return {"refused": torch.tensor(False)}


def evaluated(rank: int) -> Result:
    model = convert(network(torch.float32)).eval()
    return {"logits": model(batch(torch.float32)[0])} if rank == 0 else {}  # the other one takes no part


def process(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = {str(case): on_a_part(rank, *case) for case in CASES}
    results |= {work.__name__: work(rank) for work in (under_autocast, all_empty, evaluated)}
    torch.save(results, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Result]]:
    """What each of two processes found; started once, because starting takes longer than all the work."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    mp.spawn(process, (port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_with_uneven_parts_equal_one_with_the_whole_batch(
    results: list[dict[str, Result]], case: tuple[torch.dtype, float | None, int]
) -> None:
    """3 and 1 images, 4 and 0, 0 and 4: outputs, input and weight gradients, running statistics."""
    a, b = (result[str(case)] for result in results)
    dtype, momentum, _ = case
    whole = two_steps(network(dtype, momentum).double(), *(tensor.double() for tensor in batch(dtype)))
    tolerance = 1e-6 if dtype == torch.float64 else 1e-5
    for key, expected in whole.items():
        if key in ("logits", "grad images"):
            found = torch.cat([a[key], b[key]])
        elif key.startswith("grad"):
            found = a[key] + b[key]
        else:
            assert torch.equal(a[key], b[key]), key  # the same bits in every process
            found = a[key]
        scale = max(1.0, float(expected.abs().max()))
        assert float((found - expected).abs().max()) <= tolerance * scale, key


def test_under_bfloat16_autocast_statistics_stay_float32(results: list[dict[str, Result]]) -> None:
    a, b = (result["under_autocast"] for result in results)
    whole = network(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = whole(batch(torch.float32)[0])
    assert a["logits"].dtype == torch.bfloat16
    assert a["mean"].dtype == torch.float32
    assert torch.equal(a["mean"], b["mean"])
    assert torch.allclose(a["mean"], whole[1].running_mean, atol=1e-3)  # bfloat16 has three digits
    assert torch.allclose(torch.cat([a["logits"], b["logits"]]).float(), logits.float(), atol=0.05)
    assert torch.isfinite(a["grad"]).all()


def test_a_batch_that_is_empty_everywhere_is_refused_by_every_process(results: list[dict[str, Result]]) -> None:
    assert all(result["all_empty"]["refused"] for result in results)


def test_evaluation_needs_no_other_process_and_equals_torch(results: list[dict[str, Result]]) -> None:
    expected = network(torch.float32).eval()(batch(torch.float32)[0])
    assert torch.equal(results[0]["evaluated"]["logits"], expected)


def test_in_one_process_a_converted_network_gives_the_same_bits() -> None:
    images, weights = batch(torch.float32)
    a = two_steps(network(torch.float32), images, weights)
    b = two_steps(convert(network(torch.float32)), images, weights)
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_conversion_keeps_parameters_and_the_names_in_a_checkpoint() -> None:
    model = SimpleUNet(base_channels=2)
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    converted = convert(model)
    assert all(a is b for a, b in zip(parameters, converted.parameters(), strict=True))
    assert list(before) == list(converted.state_dict())
    assert not any(type(layer) is nn.BatchNorm2d for layer in converted.modules())
    SimpleUNet(base_channels=2).load_state_dict(converted.state_dict())


def test_a_layer_used_twice_is_converted_in_both_places() -> None:
    norm = nn.BatchNorm2d(3)
    model = convert(nn.ModuleDict({"a": norm, "b": norm}))
    assert model["a"] is model["b"]
    assert isinstance(model["b"], CrossProcessBatchNorm)


def test_a_layer_that_does_more_than_normalise_is_refused_by_name() -> None:
    class NormAndRelu(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).relu()

    with pytest.raises(ConfigError, match=r"1\.norm is a NormAndRelu, .* one process"):
        convert(nn.Sequential(nn.Conv2d(1, 1, 1), nn.ModuleDict({"norm": NormAndRelu(1)})))
