"""Processes that train together: how they start, share a batch and agree on errors; on Lightning Fabric."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from torch import Tensor
from torch import distributed as dist

from stsm_rt.errors import UserError

PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "64-true")


def make_fabric(
    device: torch.device | str = "cpu",
    *,
    devices: int | None = None,
    nodes: int | None = None,
    precision: str | None = None,
    find_unused: bool = False,
) -> Fabric:
    """The devices to train on. Call `launch` of what is returned where there is more than one process.

    Under torchrun its environment says how many processes there are. Elsewhere `launch` starts the other processes of
    this machine by running the same command again; with several nodes it is started once on each, with MASTER_ADDR,
    MASTER_PORT and NODE_RANK set.

    Args:
        device: "cpu", "cuda" or "cuda:N".
        devices: Processes on each node; None: 1, or what torchrun says.
        nodes: Machines; None: 1, or what torchrun says.
        precision: One of `PRECISIONS`; None: "bf16-mixed" on CUDA, "32-true" elsewhere.
        find_unused: Whether some steps leave parameters without a gradient.

    Raises:
        UserError: There are no such devices, they lack the precision, or the numbers contradict torchrun's.
    """
    try:
        wanted_device = torch.device(device)
    except RuntimeError:
        wanted_device = torch.device("meta")
    if wanted_device.type not in ("cpu", "cuda"):
        raise UserError(f"training runs on cpu, cuda or cuda:N, got --device {device}; choose one of them")
    device = wanted_device
    if precision == "16-mixed" and device.type == "cpu":
        raise UserError("precision 16-mixed needs a GPU; choose bf16-mixed or 32-true on the CPU")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local, world = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
        for option, wanted, given in (("--devices", devices, local), ("--nodes", nodes, world // local)):
            if wanted not in (None, given):
                raise UserError(f"{option} is {wanted}, but torchrun started {given}; leave it out under torchrun")
        devices, nodes = local, world // local
    devices, nodes = devices or 1, nodes or 1
    if device.type == "cuda" and devices + (device.index or 0) > torch.cuda.device_count():
        raise UserError(
            f"--device {device} with {devices} processes was asked for, and PyTorch sees {torch.cuda.device_count()} "
            "GPUs; choose fewer, or --device cpu"
        )
    first = device.index or 0
    # torch 2.14 renames the argument; 2.11 knows the old name only.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")
    return Fabric(
        accelerator=device.type,
        devices=list(range(first, first + devices)) if device.type == "cuda" else devices,
        num_nodes=nodes,
        # Every process holds the same buffers: batch norm is synchronised or frozen.
        strategy=DDPStrategy(find_unused_parameters=find_unused, broadcast_buffers=False)
        if devices * nodes > 1
        else "auto",
        precision=precision or ("bf16-mixed" if device.type == "cuda" else "32-true"),  # type: ignore[arg-type]
    )


def reports_errors() -> bool:
    """Whether this process is the one of its machine that tells errors to people."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def shares(count: int, fabric: Fabric, accumulate: int) -> list[slice]:
    """Which clips of a global batch this process computes, one slice per accumulation step.

    Args:
        count: Clips of the global batch.
        fabric: The processes.
        accumulate: Accumulation steps.

    Raises:
        UserError: There are more parts than clips.
    """
    parts = fabric.world_size * accumulate
    if count < parts:
        raise UserError(
            f"a batch of {count} clips cannot be divided over {fabric.world_size} processes and {accumulate} "
            "accumulation steps; use fewer of them or a larger batch"
        )
    bounds = [round(part * count / parts) for part in range(parts + 1)]
    first = fabric.global_rank * accumulate
    return [slice(bounds[part], bounds[part + 1]) for part in range(first, first + accumulate)]


def total(fabric: Fabric, values: Tensor) -> Tensor:
    """The sum of a tensor over all processes, on the device."""
    values = values.to(fabric.device)
    if fabric.world_size > 1:
        values = values.clone()
        dist.all_reduce(values)
    return values


@contextmanager
def together(fabric: Fabric) -> Iterator[None]:
    """Let an error of one process end all of them with the same sentence; all processes run the block.

    Raises:
        UserError: Any process raised one inside.
    """
    sentence = None
    try:
        yield
    except UserError as error:
        if fabric.world_size == 1:
            raise
        sentence = str(error)
    if fabric.world_size > 1 and total(fabric, torch.tensor(float(sentence is not None))) > 0:
        sentences: list[str | None] = [None] * fabric.world_size
        dist.all_gather_object(sentences, sentence)
        raise UserError(next(s for s in sentences if s is not None))


def on_first(fabric: Fabric, action: Callable[[], object]) -> None:
    """Do something in the first process only; its error ends all.

    Raises:
        UserError: The action raised one.
    """
    with together(fabric):
        if fabric.is_global_zero:
            action()


def leave() -> None:
    """Take this process out of the group, as PyTorch wants it before the end."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
