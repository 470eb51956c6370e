from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stsm_rt.insertion_branches import residual_blocks, run_on_shapes


class Network(nn.Module):
    """Convolutions a to d of eight channels, and whatever is made of them."""

    def __init__(self, wiring: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        for name in "abcd":
            self.add_module(name, nn.Conv2d(8, 8, 3, padding=1))
        self.narrow = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(8)
        self.container = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(inplace=True))
        self.block = Block()
        self.wiring = wiring

    def forward(self, x: Tensor) -> Tensor:
        return self.wiring(self, self.stem(x))


def in_place(n: Any, x: Tensor) -> Tensor:
    y = n.b(F.relu(n.a(x), inplace=True))
    y += x
    return y


def product_in_place(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    y *= n.b(y)
    return n.c(x) + y


class Block(nn.Module):
    """A function first, and the identity within."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.relu(x))


def scaled(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return x + y * n.b(y.mean((2, 3), keepdim=True)).sigmoid()


def res2net(n: Any, x: Tensor) -> Tensor:
    first, second = n.a(x).chunk(2, 1)
    y = torch.cat([first, n.narrow(first) + second], 1)
    return n.b(y) + x


def parallel(n: Any, x: Tensor) -> Tensor:
    return x + n.b(n.a(x)) + n.d(n.c(x))


def nested(n: Any, x: Tensor) -> Tensor:
    y = n.a(x)
    return x + n.c(y + n.b(y))


@pytest.mark.parametrize(
    ("wiring", "first_layers"),
    [
        pytest.param(lambda n, x: x + n.b(n.a(x)), ["a"], id="identity"),
        pytest.param(lambda n, x: n.b(n.a(x)) + x, ["a"], id="identity-last"),
        pytest.param(in_place, ["a"], id="in-place"),
        pytest.param(lambda n, x: n.norm(n.c(x)) + n.b(n.a(x)), ["a"], id="projection"),
        pytest.param(lambda n, x: F.avg_pool2d(x, 2) + F.avg_pool2d(n.a(x), 2), ["a"], id="pooled-identity"),
        pytest.param(lambda n, x: x + n.a(n.norm(x)), ["norm"], id="normalised-first"),
        pytest.param(lambda n, x: x + n.a(F.relu(x)), ["a"], id="function-first"),
        pytest.param(lambda n, x: n.b(y := n.norm(x)) + n.a(n.c(y)), ["c"], id="fork-after-norm"),
        pytest.param(lambda n, x: x + n.container(x), ["container.0"], id="innermost-module"),
        pytest.param(lambda n, x: n.block(x), ["block.conv"], id="function-first-in-a-module"),
        pytest.param(lambda n, x: x * (y := n.norm(x)) + n.b(n.a(y)), ["a"], id="layer-of-identity-and-branch"),
        pytest.param(product_in_place, ["a"], id="product-in-place"),
        pytest.param(parallel, ["a", "c"], id="parallel-branches"),
        pytest.param(lambda n, x: x + (n.a(x) + n.b(x)), ["a", "b"], id="branch-that-starts-twice"),
        pytest.param(lambda n, x: n.norm(x) + n.a(x) + n.b(x), ["a", "b"], id="normalised-identity"),
        pytest.param(nested, ["a", "b"], id="nested"),
        pytest.param(res2net, ["a"], id="parts-of-channels"),
        pytest.param(scaled, ["a"], id="squeeze-and-excitation"),
        pytest.param(lambda n, x: n.d(x + n.a(x)) + n.c(x), ["a"], id="block-of-blocks"),
        pytest.param(lambda n, x: n.b(n.a(x)), [], id="chain"),
        pytest.param(lambda n, x: n.a(x) + n.b(x), [], id="two-convolutions"),
        pytest.param(lambda n, x: n.b(n.a(x)) + n.d(n.c(x)), [], id="two-branches"),
        pytest.param(lambda n, x: n.b(n.a(x)) + n.d(n.c(n.stem(x))), [], id="a-longer-and-a-shorter-branch"),
        pytest.param(lambda n, x: x + n.a(x).mean((2, 3), keepdim=True), [], id="broadcast"),
        pytest.param(lambda n, x: x + n.norm(x), [], id="nothing-learned-from-neighbours"),
        pytest.param(lambda n, x: n.a(x) + 1, [], id="constant"),
        pytest.param(lambda n, x: torch.cat([x, n.a(x)], 1), [], id="concatenation"),
    ],
)
def test_branches_are_found_where_values_fork_and_are_added(
    wiring: Callable[[Any, Tensor], Tensor], first_layers: list[str]
) -> None:
    trace = run_on_shapes(Network(wiring), torch.zeros(2, 8, 6, 6))
    found = {layer.path for block in residual_blocks(trace) for layer in block.first_layers}
    assert sorted(found) == first_layers


def test_a_run_on_shapes_changes_and_computes_nothing() -> None:
    network = Network(lambda n, x: n.norm(x) + n.a(x)).train()
    network.norm.eval()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    trace = run_on_shapes(network, torch.zeros(()).expand(1, 8, 100_000, 100_000))
    assert trace.flops == 2 * 10**10 * (8 * 8 + 8 * 8 * 9)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training and not network.norm.training
    assert torch.backends.mha.get_fastpath_enabled()


def test_it_works_in_inference_mode() -> None:
    with torch.inference_mode():
        trace = run_on_shapes(Network(lambda n, x: x + n.a(x)), torch.zeros(2, 8, 6, 6))
        assert [layer.path for block in residual_blocks(trace) for layer in block.first_layers] == ["a"]
