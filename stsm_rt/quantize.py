"""INT8 in an ONNX graph: quantize/dequantize pairs around convolutions, with recorded ranges.

Three runtimes fuse the same pairs in three ways, so the pairs come in three forms (`FORMS`). Weights are int8,
symmetric, with a scale for each output channel; activations have one scale for a tensor. Everything that is not a
convolution, the classifier included, stays as it was. `stsm_rt.integer_graph` goes on from there for ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from stsm_rt.errors import UserError
from stsm_rt.ranges import Ranges

_ACTIVATIONS = ("Clip", "Relu")
_MOVES = ("Concat", "Slice", "Pad", "Split")
# Smallest normal number of float16: below it a scale loses precision.
_LEAST_SCALE = {TensorProto.FLOAT: 1e-30, TensorProto.FLOAT16: 6.2e-5}


@dataclass(frozen=True, kw_only=True)
class Form:
    """Where the pairs go and which integers they use.

    Attributes:
        symmetric: Activations are int8 around 0; otherwise uint8 with a zero point.
        narrow_weights: Keep the sum of any two products of a weight and an activation within 16 bits, in which x86
            processors without VNNI add them; such a processor gives silently wrong numbers otherwise. See
            `weight_scale`.
        outputs: Quantize what leaves a convolution and residual sums too, and let one scale follow a tensor through
            the shift, so that integers go from convolution to convolution. Otherwise only what enters a convolution.
    """

    symmetric: bool
    narrow_weights: bool
    outputs: bool


FORMS = {
    "onnxruntime": Form(symmetric=False, narrow_weights=True, outputs=True),
    "openvino": Form(symmetric=False, narrow_weights=False, outputs=False),
    "onnx": Form(symmetric=True, narrow_weights=False, outputs=False),
}


class _Graph:
    """Who writes and who reads each tensor."""

    def __init__(self, graph: GraphProto) -> None:
        self.proto = graph
        self.weights = {tensor.name: tensor for tensor in graph.initializer}
        self.writers = {output: node for node in graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.outputs = {output.name for output in graph.output}

    def convolutions(self) -> dict[str, NodeProto]:
        """The convolutions by module path; exported weights are named after their module."""
        return {
            node.input[1].removesuffix(".weight"): node
            for node in self.proto.node
            if node.op_type == "Conv" and node.input[1] in self.weights and not is_one_hot(node, self.weights)
        }

    def activated(self, tensor: str) -> str:
        """The tensor behind the activation that follows, if one does."""
        after = self.readers.get(tensor, [])
        if len(after) == 1 and after[0].op_type in _ACTIVATIONS and tensor not in self.outputs:
            return after[0].output[0]
        return tensor

    def residual_sum(self, tensor: str) -> str | None:
        """The sum that a tensor goes into, behind its activation."""
        for node in self.readers.get(tensor, []):
            if node.op_type == "Add" and not any(name in self.weights for name in node.input):
                return self.activated(node.output[0])
        return None


def is_one_hot(node: NodeProto, weights: Mapping[str, TensorProto]) -> bool:
    """Whether a node is a depthwise convolution that only moves channels, as `stsm_rt.shift_folding` makes them."""
    if node.op_type != "Conv" or len(node.input) > 2 or node.input[1] not in weights:
        return False
    kernel = numpy_helper.to_array(weights[node.input[1]])
    ordered = np.sort(kernel.reshape(len(kernel), -1), 1)
    return bool(kernel.shape[1] == 1 and (ordered[:, -1] == 1).all() and not ordered[:, :-1].any())


def convolutions(graph: GraphProto) -> list[str]:
    """Module paths of the convolutions, which are the layers that can become int8, in the graph's order."""
    return list(_Graph(graph).convolutions())


def quantization_points(graph: GraphProto) -> dict[str, str]:
    """The tensors whose ranges INT8 builds need, as `Ranges.tensors` names them.

    Args:
        graph: A step form that `stsm_rt.export` wrote.

    Returns:
        For each point, ``backbone.layer1.0.conv1.input``, the tensor's name in this graph.
    """
    parts = _Graph(graph)
    points: dict[str, str] = {}
    for path, node in parts.convolutions().items():
        left = parts.activated(node.output[0])
        points |= {f"{path}.input": node.input[0], f"{path}.output": left}
        total = parts.residual_sum(left)
        if total is not None:
            points[f"{path}.sum"] = total
    return points


def quantize(model: ModelProto, ranges: Ranges, form: Form, exclude: Sequence[str] = ()) -> ModelProto:
    """Put quantize/dequantize pairs into a step form.

    Args:
        model: FP32 or FP16, as `stsm_rt.export` writes it; it is not changed.
        ranges: Of the same weights.
        form: What the runtime fuses.
        exclude: Patterns of module paths (``backbone.features.0.*``) whose convolutions stay as they are.

    Returns:
        The INT8 graph.

    Raises:
        UserError: A module was not calibrated, or a pattern names no convolution.
    """
    quantized = ModelProto()
    quantized.CopyFrom(model)
    parts = _Graph(quantized.graph)
    chosen = _chosen(parts.convolutions(), exclude)
    scales = _activation_scales(parts, chosen, ranges, form)
    writer = _PairWriter(quantized.graph, form)
    inputs = {path: scales[node.input[0]][0] for path, node in chosen.items()}
    for tensor, (scale, zero) in scales.items():
        writer.activation(tensor, scale, zero)
    for path, node in chosen.items():
        writer.weights(node, inputs[path], ranges.mean(path), parts.weights)
    writer.finish()
    return quantized


def _chosen(convolutions: dict[str, NodeProto], exclude: Sequence[str]) -> dict[str, NodeProto]:
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path in convolutions):
            raise UserError(
                f"no layer matches {pattern!r}; the layers are named like {', '.join(list(convolutions)[:3])}"
            )
    return {
        path: node for path, node in convolutions.items() if not any(fnmatchcase(path, pattern) for pattern in exclude)
    }


def _activation_scales(
    parts: _Graph, chosen: dict[str, NodeProto], ranges: Ranges, form: Form
) -> dict[str, tuple[float, int]]:
    """Scale and zero point of every tensor that gets a pair."""
    points = quantization_points(parts.proto)
    found: dict[str, tuple[float, int]] = {}
    if form.outputs:
        for path in chosen:
            for point in (f"{path}.output", f"{path}.sum"):
                if point in points:
                    found.setdefault(points[point], _scale(ranges.range(point), form))
    for path, node in chosen.items():
        tensor = node.input[0]
        moved = _moved_from(parts, tensor) if form.outputs else [tensor]
        source = next((found[name] for name in moved if name in found), None)
        for name in moved:
            found.setdefault(name, source or _scale(ranges.range(f"{path}.input"), form))
    return found


def _moved_from(parts: _Graph, tensor: str) -> list[str]:
    """A tensor and, if it is only moved data, all that it is made of, states included."""
    names, i = [tensor], 0
    while i < len(names):
        writer = parts.writers.get(names[i])
        if writer is not None and (writer.op_type in _MOVES or is_one_hot(writer, parts.weights)):
            moved = writer.input if writer.op_type == "Concat" else writer.input[:1]
            names += [name for name in moved if name not in names]
        i += 1
    return names


def _scale(bounds: tuple[float, float], form: Form) -> tuple[float, int]:
    low, high = bounds
    if form.symmetric:
        return max(-low, high, 1e-12) / 127, 0
    scale = max(high - low, 1e-12) / 255
    return scale, round(-low / scale)


def mean_error(error: npt.NDArray[np.float64], mean: Sequence[float]) -> npt.NDArray[np.float64]:
    """How far rounded weights move the mean of each output channel; subtracted from the bias, that moves it back.

    Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", ICCV 2019, section 4.2, with
    measured means.

    Args:
        error: Rounded minus true weights, (outputs, inputs / groups, kernel height, kernel width).
        mean: Of each input channel.

    Returns:
        (outputs,)
    """
    outputs, inputs = error.shape[:2]
    groups = len(mean) // inputs
    by_group = np.asarray(mean).reshape(groups, inputs).repeat(outputs // groups, 0)
    return np.asarray((error.sum((2, 3)) * by_group).sum(1))


def weight_scale(values: npt.NDArray[np.float64], *, narrow: bool) -> npt.NDArray[np.float64]:
    """Scale of each output channel of a convolution's weights.

    x86 processors without VNNI multiply bytes in pairs of neighbouring inputs and add each pair in 16 bits, so with
    activations up to 255 the weights of a pair may add up to 128. In a 1x1 convolution it is known which weights are
    neighbours, and few channels have two large ones side by side: most keep nearly 8 bits. Larger kernels get 7 bits,
    with which no pair is too large.

    Args:
        values: (outputs, inputs / groups, kernel height, kernel width).
        narrow: Whether to keep every pair within 16 bits.

    Returns:
        (outputs,); the largest weight is at most 127 scales.
    """
    flat = values.reshape(len(values), -1)
    largest = np.abs(flat).max(1)
    if not narrow:
        return np.asarray(largest / 127)
    if values.shape[2:] != (1, 1):
        return np.asarray(largest / 63)
    pairs = np.abs(flat[:, 1:] + flat[:, :-1]).max(1, initial=0)
    return np.asarray(np.maximum(largest, pairs) / 127)


class _PairWriter:
    """Adds nodes and constants to a graph."""

    def __init__(self, graph: GraphProto, form: Form) -> None:
        self._graph = graph
        self._form = form
        self._before: list[NodeProto] = []
        self._type = next(tensor.data_type for tensor in graph.initializer if tensor.name.endswith(".weight"))

    def activation(self, tensor: str, scale: float, zero: int) -> None:
        """A pair after a tensor; its readers read the pair's result."""
        kind = np.int8 if self._form.symmetric else np.uint8
        names = [
            self._constant(f"{tensor}_scale", self._float(scale)),
            self._constant(f"{tensor}_zero_point", np.array(zero, kind)),
        ]
        pair = [
            helper.make_node("QuantizeLinear", [tensor, *names], [f"{tensor}_quantized"], f"{tensor}_quantize"),
            helper.make_node(
                "DequantizeLinear", [f"{tensor}_quantized", *names], [f"{tensor}_dequantized"], f"{tensor}_dequantize"
            ),
        ]
        for node in self._graph.node:
            for i, name in enumerate(node.input):
                if name == tensor:
                    node.input[i] = f"{tensor}_dequantized"
        self._before += pair

    def weights(
        self, node: NodeProto, input_scale: float, mean: Sequence[float], weights: dict[str, TensorProto]
    ) -> None:
        """Integers instead of a convolution's weights and, where activations are integers throughout, its bias."""
        name, bias_name = node.input[1], node.input[2]
        values = numpy_helper.to_array(weights[name]).astype(np.float64)
        bias = numpy_helper.to_array(weights[bias_name]).astype(np.float64)
        scale = weight_scale(values, narrow=self._form.narrow_weights)
        # Of a channel without weights the scale must still be large enough for its bias.
        scale = self._float(np.maximum(scale, np.abs(bias) / (input_scale * 2**30)))
        wide = scale.astype(np.float64).reshape(-1, *[1] * (values.ndim - 1))
        integers = np.clip(np.rint(values / wide), -127, 127).astype(np.int8)
        node.input[1] = self._dequantize(name, integers, scale)
        bias = bias - mean_error(integers * wide - values, mean)
        if self._form.outputs:
            bias_scale = (scale * np.float32(input_scale)).astype(np.float32)
            node.input[2] = self._dequantize(bias_name, np.rint(bias / bias_scale).astype(np.int32), bias_scale)
        else:
            kind = numpy_helper.to_array(weights[bias_name]).dtype
            node.input[2] = self._constant(f"{bias_name}_corrected", bias.astype(kind))

    def finish(self) -> None:
        """Put the nodes in an order in which each comes after what it reads."""
        nodes = [*self._before, *self._graph.node]
        written = (
            {tensor.name for tensor in self._graph.initializer} | {value.name for value in self._graph.input} | {""}
        )
        ordered = []
        readers: dict[str, list[int]] = {}
        missing = []
        for i, node in enumerate(nodes):
            lacking = {name for name in node.input if name not in written}
            missing.append(lacking)
            for name in lacking:
                readers.setdefault(name, []).append(i)
        ready = [i for i, lacking in enumerate(missing) if not lacking]
        for i in ready:
            ordered.append(nodes[i])
            for output in nodes[i].output:
                for reader in readers.get(output, []):
                    missing[reader].discard(output)
                    if not missing[reader]:
                        ready.append(reader)
        del self._graph.node[:]
        self._graph.node.extend(ordered)
        read = {name for node in ordered for name in node.input}
        kept = [tensor for tensor in self._graph.initializer if tensor.name in read]
        del self._graph.initializer[:]
        self._graph.initializer.extend(kept)
        del self._graph.value_info[:]

    def _dequantize(self, name: str, integers: npt.NDArray[Any], scale: npt.NDArray[Any]) -> str:
        zeros = np.zeros(scale.shape, integers.dtype)
        inputs = [
            self._constant(f"{name}_quantized", integers),
            self._constant(f"{name}_scale", scale),
            self._constant(f"{name}_zero_point", zeros),
        ]
        self._before.append(
            helper.make_node("DequantizeLinear", inputs, [f"{name}_dequantized"], f"{name}_dequantize", axis=0)
        )
        return f"{name}_dequantized"

    def _float(self, value: Any) -> npt.NDArray[Any]:
        kind = np.float16 if self._type == TensorProto.FLOAT16 else np.float32
        return np.maximum(np.asarray(value, np.float64), _LEAST_SCALE[self._type]).astype(kind)

    def _constant(self, name: str, value: npt.NDArray[Any]) -> str:
        self._graph.initializer.append(numpy_helper.from_array(value, name))
        return name
