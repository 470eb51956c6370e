"""How much a network computes and moves, counted in its graph."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import onnx
from onnx import NodeProto, numpy_helper, shape_inference

_Shapes = Mapping[str, tuple[int, ...]]

_CONVOLUTIONS = {"Conv": 1, "ConvInteger": 1, "QLinearConv": 3}  # which input is the weight
_PRODUCTS = {"MatMul": 0, "Gemm": 0, "MatMulInteger": 0, "QLinearMatMul": 0}  # which input is the left factor


@dataclass(frozen=True)
class Operations:
    """What one step computes and reads.

    Attributes:
        convolutions: Multiply-adds of the convolutions; those of padding count.
        products: Multiply-adds of the matrix products.
        weight_bytes: Bytes of the constants.
    """

    convolutions: int
    products: int
    weight_bytes: int

    @property
    def multiply_adds(self) -> int:
        """Those of convolutions and matrix products; nothing else is counted."""
        return self.convolutions + self.products


def count_operations(path: str | os.PathLike[str]) -> Operations:
    """Count what a graph computes from the shapes of its tensors.

    Args:
        path: An ONNX file with static shapes.
    """
    model = onnx.load(path)
    graph = shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {
        info.name: tuple(dimension.dim_value for dimension in info.type.tensor_type.shape.dim)
        for info in (*graph.input, *graph.value_info, *graph.output)
    } | {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return Operations(
        convolutions=sum(_convolution(node, shapes) for node in graph.node if node.op_type in _CONVOLUTIONS),
        products=sum(_product(node, shapes) for node in graph.node if node.op_type in _PRODUCTS),
        weight_bytes=sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer),
    )


def _convolution(node: NodeProto, shapes: _Shapes) -> int:
    """Output elements times the inputs of each: weights are (out, in / groups, *kernel)."""
    return math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[_CONVOLUTIONS[node.op_type]]][1:])


def _product(node: NodeProto, shapes: _Shapes) -> int:
    """Output elements times the length of the sums."""
    left = shapes[node.input[_PRODUCTS[node.op_type]]]
    across = node.op_type == "Gemm" and any(item.name == "transA" and item.i for item in node.attribute)
    return math.prod(shapes[node.output[0]]) * left[-2 if across else -1]
