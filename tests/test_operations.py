from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from stsm_rt.engine.base import shipped_folder
from stsm_rt.operations import count_operations


def graph_of(path: Path, node: Any, weights: dict[str, tuple[int, ...]], dtype: type = np.float32) -> Path:
    """A graph of one node from ``x``, 1 x 4 x 8 x 8 or 3 x 4, to ``y``."""
    shape = (1, 4, 8, 8) if node.op_type.startswith("Conv") else (3, 4)
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(size, dtype), name) for name, size in weights.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


@pytest.mark.parametrize(
    ("weight", "attributes", "expected"),
    [
        ((6, 4, 3, 3), {"pads": [1, 1, 1, 1]}, 8 * 8 * 6 * 4 * 9),
        ((6, 4, 1, 1), {"strides": [2, 2]}, 4 * 4 * 6 * 4),
        ((4, 1, 3, 3), {"group": 4}, 6 * 6 * 4 * 9),
    ],
)
def test_a_convolution_counts_its_outputs_times_the_inputs_of_each(tmp_path: Path, weight, attributes, expected):
    node = helper.make_node("Conv", ["x", "w"], ["y"], **attributes)

    counted = count_operations(graph_of(tmp_path / "a.onnx", node, {"w": weight}))

    assert (counted.convolutions, counted.products) == (expected, 0)
    assert counted.weight_bytes == 4 * int(np.prod(weight))


@pytest.mark.parametrize(
    ("node", "weight", "expected"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (4, 5), 3 * 5 * 4),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (5, 4), 3 * 5 * 4),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), (3, 5), 4 * 5 * 3),
    ],
)
def test_a_matrix_product_counts_its_outputs_times_the_length_of_the_sums(tmp_path: Path, node, weight, expected):
    counted = count_operations(graph_of(tmp_path / "a.onnx", node, {"w": weight}))

    assert (counted.convolutions, counted.products, counted.multiply_adds) == (0, expected, expected)


def test_what_is_neither_counts_nothing(tmp_path: Path):
    node = helper.make_node("Add", ["x", "w"], ["y"])

    assert count_operations(graph_of(tmp_path / "a.onnx", node, {"w": (4,)})).multiply_adds == 0


def test_quantized_convolutions_count_like_those_in_fp32():
    folder = shipped_folder("engines")
    assert folder is not None
    fp32, int8 = (count_operations(folder / f"actions_lite0_{precision}.onnx") for precision in ("fp32", "int8"))

    # Folding and exporting may not change what a network computes.
    assert int8.multiply_adds == pytest.approx(fp32.multiply_adds, rel=0.01)
    assert 0.45e9 < fp32.multiply_adds < 0.55e9
    assert int8.weight_bytes < 0.4 * fp32.weight_bytes
