"""What a step would take if it only multiplied, and if it only moved bytes, at rates measured in its own turns."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stsm_rt.machine import COPY_BYTES, PRODUCT_OPERATIONS, PRODUCT_SIZE, matrix_products, memory_copy
from stsm_rt.manifest import Manifest
from stsm_rt.timing import Comparison, Run, Times, time_block

_BLOCKS = 30


@dataclass(frozen=True)
class Floor:
    """How close a step comes to what the machine can do.

    Attributes:
        engine: Name of the engine.
        operations: Multiply-adds of the network's convolutions and matrix products, without what moves channels.
        weight_bytes: Bytes of its constants.
        state_bytes: Bytes of its states that a step reads and writes.
        multiplying: Seconds that the operations take at the measured matrix rate.
        moving: Seconds that the bytes take at the measured bandwidth.
        step: How many times as long as ``multiplying`` a step takes, over the pairs.
    """

    engine: str
    operations: int
    weight_bytes: int
    state_bytes: int
    multiplying: float
    moving: float
    step: Comparison

    def line(self) -> str:
        """In words."""
        return (
            f"{self.step.line()}: {self.operations / 1e9:.3f} G multiply-adds take {1000 * self.multiplying:.2f} ms, "
            f"{(self.weight_bytes + self.state_bytes) / 1e6:.1f} MB of weights and states {1000 * self.moving:.2f} ms"
        )


class FloorMeter:
    """Measures the machine's rates between the pairs of a run, at most in about 30 of them."""

    def __init__(self, pairs: int) -> None:
        self._every = max(1, pairs // _BLOCKS)
        products = matrix_products()
        # NumPy comes first: its threads go on spinning for a tenth of a second. To wait for them instead would let the
        # cores go idle, from which a virtual machine was seen to wake to half its speed for a second.
        self._candidates = [*products.values(), memory_copy()]
        self._names = list(products)
        self._blocks: list[list[list[float]]] = [[] for _ in self._candidates]
        self._pairs: list[int] = []

    def measure(self, pair: int) -> None:
        """Measure after a pair, if it is that one's turn."""
        if pair % self._every:
            return
        self._pairs.append(pair)
        for blocks, candidate in zip(self._blocks, self._candidates, strict=True):
            blocks.append(time_block(candidate))

    def rates(self) -> Rates:
        """Sum up what was measured."""
        *products, copy = map(Times.of, self._blocks)
        return Rates(dict(zip(self._names, products, strict=True)), copy, tuple(self._pairs))


@dataclass(frozen=True)
class Rates:
    """How fast the machine multiplied and copied.

    Attributes:
        products: Times of the matrix product by what computed it.
        copy: Times of the copy.
        pairs: After which pairs of the engines' blocks.
    """

    products: dict[str, Times]
    copy: Times
    pairs: tuple[int, ...]

    @property
    def by(self) -> str:
        """What multiplied fastest."""
        return min(self.products, key=lambda by: self.products[by].median)

    @property
    def operations_per_second(self) -> float:
        """Multiply-adds per second of the fastest."""
        return PRODUCT_OPERATIONS / self.products[self.by].median

    @property
    def bytes_per_second(self) -> float:
        """Of the copy, read and written."""
        return COPY_BYTES / self.copy.median

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "size": PRODUCT_SIZE,
            "by": self.by,
            "operations_per_second": self.operations_per_second,
            "bytes_per_second": self.bytes_per_second,
            "products": {by: asdict(times) for by, times in self.products.items()},
            "copy": asdict(self.copy),
            "pairs": list(self.pairs),
        }

    def line(self) -> str:
        """In words."""
        return (
            f"matrix product of {PRODUCT_SIZE}x{PRODUCT_SIZE} in FP32 by {self.by}: "
            f"{self.operations_per_second / 1e9:.1f} G multiply-adds/s; memory: {self.bytes_per_second / 1e9:.1f} GB/s"
        )

    def floor(self, run: Run, manifest: Manifest, path: Path, plain: Path) -> Floor:
        """Hold an engine's step to these rates.

        Args:
            run: Its times, of as many blocks.
            manifest: Its manifest.
            path: Its ONNX file.
            plain: That of the same network without the shift, whose operations count; else the same.
        """
        from stsm_rt.operations import count_operations

        operations, weight_bytes = count_operations(plain).multiply_adds, count_operations(path).weight_bytes
        state_bytes = 2 * sum(math.prod(state.shape) * np.dtype(state.dtype).itemsize for state in manifest.states)
        multiplying = operations * np.array(self.products[self.by].blocks) / PRODUCT_OPERATIONS
        return Floor(
            engine=run.engine,
            operations=operations,
            weight_bytes=weight_bytes,
            state_bytes=state_bytes,
            multiplying=operations / self.operations_per_second,
            moving=(weight_bytes + state_bytes) / self.bytes_per_second,
            step=Comparison.of(
                "its operations at the matrix rate", run.engine, np.array(run.blocks)[list(self.pairs)] / multiplying
            ),
        )


def why_not_counted(manifest: Manifest) -> str | None:
    """Why an engine's operations cannot be counted or held to this processor's rate; None if they can."""
    if manifest.runtime not in ("onnxruntime", "openvino"):
        return f"as it runs on {manifest.runtime}, not on this processor"
    if manifest.precision != "fp32":
        return f"as the matrix rate is that of FP32 and the engine is {manifest.precision}"
    if not importlib.util.find_spec("onnx"):
        return "as counting operations needs onnx, which is not installed; run pip install onnx"
    return None
