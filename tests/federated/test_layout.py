"""What of a network crosses is a flat array of parameters and one of running statistics, and comes back to the bit."""

from collections import OrderedDict

import numpy as np
import torch
from known_sites import differing
from torch import nn

from ml_src.core.federated.layout import Layout


def network(seed: int = 0) -> nn.Module:
    """Parameters, running statistics, a counter, a frozen weight, a scalar, a shared weight; after one batch."""
    torch.manual_seed(seed)
    first = nn.Conv2d(2, 2, 3, padding=1)
    layers = OrderedDict(first=first, norm=nn.BatchNorm2d(2), again=first, instance=nn.InstanceNorm2d(2, affine=True))
    made = nn.Sequential(layers)
    made.register_parameter("temperature", nn.Parameter(torch.rand(())))
    made.register_buffer("steps", torch.tensor(seed))
    made.instance.weight.requires_grad_(False)
    made(torch.rand(3, 2, 8, 8))
    return made


def test_what_is_put_into_another_network_makes_it_the_same_but_for_counters() -> None:
    source, target = network(0), network(1)
    layout = Layout.of(source)
    layout.load(target, layout.flatten(source))
    assert differing(source.state_dict(), target.state_dict()) == ["steps"]


def test_counters_never_cross() -> None:
    layout = Layout.of(network())
    assert set(layout.buffers) == {"norm.running_mean", "norm.running_var"}
    assert not {"steps", "norm.num_batches_tracked"} & set(layout.parameters)
    source, target = network(), network()
    source.norm.num_batches_tracked.fill_(99)
    layout.load(target, layout.flatten(source))
    assert target.norm.num_batches_tracked == 1


def test_each_value_crosses_once() -> None:
    """A weight that two layers share is one."""
    made = network()
    layout = Layout.of(made)
    flat = layout.flatten(made)
    assert layout.sizes == {kind: len(values) for kind, values in flat.items()}
    assert layout.sizes["parameters"] == sum(p.numel() for p in made.parameters())
    assert all(values.dtype == np.float32 for values in flat.values())


def test_names_can_be_taken_apart_and_joined() -> None:
    made = network()
    layout = Layout.of(made)
    for kind, flat in layout.flatten(made).items():
        named = layout.named(kind, flat)
        for name, values in named.items():
            assert np.array_equal(values, made.state_dict()[name].numpy())
        assert layout.joined(kind, dict(reversed(named.items()))).tobytes() == flat.tobytes()


def test_what_is_kept_stays_and_only_batch_norm_is_of_batch_norm() -> None:
    source, target = network(0), network(1)
    before = {name: values.clone() for name, values in target.state_dict().items()}
    layout = Layout.of(source)
    layout.load(target, layout.flatten(source), keep=layout.of_batch_norm)
    kept = {name for name in before if torch.equal(before[name], target.state_dict()[name])}
    assert {name for name in kept if name.startswith("norm.")} == set(layout.of_batch_norm)
    assert set(layout.of_batch_norm) == {f"norm.{name}" for name in source.norm.state_dict()}
    assert not torch.equal(target.first.weight, before["first.weight"])
    assert torch.equal(target.instance.bias, source.instance.bias)


def test_a_flattened_network_is_a_copy() -> None:
    made = network()
    layout = Layout.of(made)
    flat = layout.flatten(made)
    before = flat["parameters"].copy()
    with torch.no_grad():
        made.first.weight.add_(1)
    assert np.array_equal(flat["parameters"], before)


def test_a_network_without_running_statistics_has_an_empty_array_of_them() -> None:
    made = nn.Conv2d(1, 1, 1)
    layout = Layout.of(made)
    flat = layout.flatten(made)
    assert flat["buffers"].shape == (0,)
    assert layout.named("buffers", flat["buffers"]) == {}
    assert layout.joined("buffers", {}).shape == (0,)
    layout.load(made, flat)
    assert layout.of_batch_norm == frozenset()
