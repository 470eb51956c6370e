from __future__ import annotations

import pytest
import torch

from stsm_rt.channel_order import order_channels
from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork, stream
from stsm_rt.shift import shift_spec


def randomised(name, shift):
    torch.manual_seed(0)
    network = StreamingNetwork(name, 5, shift=shift_spec(shift) if shift else None).eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            module.weight.data.uniform_(0.2, 1.5)
    return network


def clip(seed):
    return torch.randint(0, 256, (1, 4, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mbv2", "lite0"])
@torch.no_grad()
def test_renumbering_leaves_the_plain_network_and_weakens_the_shifts_disturbance(name):
    plain, shifted = randomised(name, None), randomised(name, "stsm_online")
    expected = plain.clip_features(clip(1))
    before = (shifted.clip_features(clip(1)) - expected).norm()
    weights = {key: value.clone() for key, value in shifted.state_dict().items()}
    order_channels(shifted, clip(0))
    assert any(not torch.equal(weights[key], value) for key, value in shifted.state_dict().items())
    plain.load_state_dict(shifted.state_dict())
    torch.testing.assert_close(plain.clip_features(clip(1)), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert (shifted.clip_features(clip(1)) - expected).norm() < before


@torch.no_grad()
def test_the_network_still_streams_exactly():
    network = randomised("lite0", "tsm_online")
    order_channels(network, clip(0))
    expected = network(clip(1))
    torch.testing.assert_close(stream(network, clip(1)), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(("name", "shift"), [("r18", "tsm_online"), ("lite0", None)])
def test_a_network_it_cannot_renumber_is_refused(name, shift):
    with pytest.raises(UserError, match="mbv2 and lite0 with a shift"):
        order_channels(randomised(name, shift), clip(0))
