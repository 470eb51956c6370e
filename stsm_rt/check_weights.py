"""Weights to check a machine with: the trained ones where they are at hand, else random ones from a seed."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from stsm_rt.errors import UserError
from stsm_rt.manifest import DecisionSpec, sha256_of
from stsm_rt.model import ModelSpec, load_model
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork
from stsm_rt.shift import shift_spec

_SEED = 0


@dataclass(frozen=True)
class Weights:
    """Weights of one network; the shift has none, so they serve every shift.

    Attributes:
        source: Where they come from, for people.
        sha256: Of the file, None if they are random.
        spec: Their record; its shift is not used.
        tensors: The state dict.
    """

    source: str
    sha256: str | None
    spec: ModelSpec
    tensors: dict[str, Tensor]

    def network(self, shift: str | None) -> StreamingNetwork:
        """The network with a preset shift, or the plain one, in evaluation mode on the CPU."""
        network = dataclasses.replace(self.spec, shift=shift_spec(shift).to_json() if shift else None).build()
        network.load_state_dict(self.tensors)
        return network.eval()


def shipped_weights(network: str) -> Weights | None:
    """The trained weights of that network in the checkout's ``engines`` folder, if there are any."""
    for path in sorted((Path(__file__).resolve().parents[1] / "engines").glob("*.safetensors")):
        trained, spec = load_model(path)
        if spec.network == network:
            return Weights(path.name, sha256_of(path), spec, trained.state_dict())
    return None


@torch.no_grad()
def random_weights(network: str, *, height: int = 224, width: int = 224) -> Weights:
    """Seeded weights with batch norms of their own and logits of order one.

    Args:
        network: One of `ARCHITECTURES`.
        height: Of the input, pixels.
        width: Of the input, pixels.

    Raises:
        UserError: Unknown network.
    """
    if network not in ARCHITECTURES:
        raise UserError(f"unknown network {network!r}; there are {', '.join(ARCHITECTURES)}")
    spec = ModelSpec(
        network=network,
        padding=ARCHITECTURES[network].padding,
        shift=None,
        rates=(0.5, 0.2, 0.08),
        changes=True,
        labels=tuple(f"class_{i:02d}" for i in range(21)),
        background=None,
        height=height,
        width=width,
        frame_rate=10.0,
        decision=DecisionSpec(smoothing=1, threshold=0.5, release=0.5, min_steps=1),
        recipe={},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = spec.build()
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.3, 0.3)
        # Deep random networks amplify rounding from block to block, which trained ones hardly do, unless what a branch
        # adds is small.
        for norm in _last_norms(model):
            norm.weight.mul_(0.2)
            norm.bias.mul_(0.2)
        clip = torch.from_numpy(moving_clip(8, height, width, seed=100))[None]
        for norm in norms:
            norm.momentum = 1.0
        model.train()
        model.clip_features(clip)
        model.eval()
        for norm in norms:
            norm.momentum = 0.1
        # Half of the mean: minus all of it, the logits are small differences of large rounded numbers, which no trained
        # network's are; minus none, they hardly change from frame to frame.
        model.offset.copy_(model.averages.clip(model.clip_features(clip)).mean((0, 1)) / 2)
        model.classifier.weight.div_(model(clip).std())
    return Weights(f"random, seed {_SEED}", None, spec, model.state_dict())


def weights_sha256(weights: Weights) -> str:
    """Their file's SHA-256, or one of the random tensors themselves."""
    if weights.sha256 is not None:
        return weights.sha256
    digest = hashlib.sha256()
    for name, tensor in weights.tensors.items():
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def moving_clip(frames: int, height: int, width: int, *, seed: int) -> npt.NDArray[np.uint8]:
    """Soft blobs with some grain, other ones in every frame: (frames, height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = torch.from_numpy(rng.random((frames, 3, 4, 5), np.float32))
    blobs = nn.functional.interpolate(coarse, (height, width), mode="bilinear").permute(0, 2, 3, 1).numpy()
    grain = rng.random(blobs.shape, np.float32)
    return np.ascontiguousarray((255 * (0.8 * blobs + 0.2 * grain)).astype(np.uint8))


def _last_norms(network: nn.Module) -> Iterator[nn.BatchNorm2d]:
    """The last batch norm of every residual branch."""
    for module in network.modules():
        if isinstance(module, Bottleneck | BasicBlock):
            yield module.bn3 if isinstance(module, Bottleneck) else module.bn2
        elif getattr(module, "use_res_connect", False):
            yield [norm for norm in module.modules() if isinstance(norm, nn.BatchNorm2d)][-1]
