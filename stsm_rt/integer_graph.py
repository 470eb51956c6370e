"""Integers from the frame to the last convolution: what moves data in an INT8 graph moves bytes.

`stsm_rt.quantize` puts a quantize/dequantize pair around every tensor. ONNX Runtime fuses the pairs around a
convolution, but not those around a shift, and it computes the normalisation of the frame in floating point, in the
layout of its integer convolutions, which is slow. So before quantization `enter_frame` lets the first convolution take
the frame's bytes, and after it `keep_integers` lets slices, concatenations and states carry what has been quantized, in
the layout of integer convolutions (channels last).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from stsm_rt.manifest import StateSpec
from stsm_rt.quantize import FORMS, is_one_hot, quantize
from stsm_rt.ranges import Ranges

_NORMALISATION = ("Div", "Sub", "Slice", "Transpose", "Cast")  # from the first convolution back to the frame
_MOVES = ("Slice", "Concat")
_CENTRED = "frame_centred"


def quantize_for(runtime: str, model: ModelProto, ranges: Ranges, exclude: Sequence[str] = ()) -> ModelProto:
    """Make an INT8 graph as a runtime computes it fastest.

    Args:
        runtime: One of `stsm_rt.quantize.FORMS`.
        model: As for `stsm_rt.quantize.quantize`, and so on.
        ranges: Likewise.
        exclude: Likewise.

    Raises:
        UserError: As there.
    """
    form = FORMS[runtime]
    if not form.outputs:
        return quantize(model, ranges, form, exclude)
    entered = ModelProto()
    entered.CopyFrom(model)
    quantized = quantize(entered, enter_frame(entered, ranges, exclude), form, exclude)
    keep_integers(quantized)
    return quantized


def enter_frame(model: ModelProto, ranges: Ranges, exclude: Sequence[str] = ()) -> Ranges:
    """Fold the normalisation of the frame into the first convolution, in place.

    The convolution then takes ``frame - z``, z being the whole number next to the mean colour, which quantization with
    a scale of 1 and a zero point of z represents exactly. Where the mean is z (EfficientNet-Lite), the result is equal;
    elsewhere the padding around the picture has the colour z instead of the mean colour.

    Args:
        model: FP32, as `stsm_rt.export` writes it.
        ranges: Of the same weights.
        exclude: Patterns of module paths whose convolutions stay in floating point.

    Returns:
        The ranges, of what now enters the first convolution.
    """
    graph = model.graph
    weights = {tensor.name: tensor for tensor in graph.initializer}
    writers = {output: node for node in graph.node for output in node.output}
    for conv in graph.node:
        chain = _chain(conv, writers) if conv.op_type == "Conv" else []
        if not chain:
            continue
        path = conv.input[1].removesuffix(".weight")
        if any(fnmatchcase(path, pattern) for pattern in exclude):
            return ranges
        divide, subtract, flip, transpose, _ = chain
        mean, deviation = (
            numpy_helper.to_array(weights[node.input[1]]).astype(np.float64).ravel() for node in (subtract, divide)
        )
        zero = round(float(mean.mean()))
        kernel = numpy_helper.to_array(weights[conv.input[1]]).astype(np.float64) / deviation.reshape(1, -1, 1, 1)
        bias = numpy_helper.to_array(weights[conv.input[2]]) - kernel.sum((2, 3)) @ (mean - zero)
        _replace(weights[conv.input[1]], kernel[:, ::-1])
        _replace(weights[conv.input[2]], bias)
        graph.initializer.append(numpy_helper.from_array(np.array(zero, np.float32), "frame_zero"))
        centre = helper.make_node("Sub", [transpose.output[0], "frame_zero"], [_CENTRED], "frame_centre")
        position = list(graph.node).index(flip)
        for node in (divide, subtract, flip):
            graph.node.remove(node)
        graph.node.insert(position, centre)
        conv.input[0] = _CENTRED
        entering = np.asarray(ranges.mean(path)) * deviation + mean - zero
        bounds = {method: (float(-zero), float(255 - zero)) for method in ranges.tensors[f"{path}.input"]}
        return dataclasses.replace(
            ranges,
            tensors={**ranges.tensors, f"{path}.input": bounds},
            means={**ranges.means, path: tuple(entering[::-1])},
        )
    return ranges


def keep_integers(model: ModelProto) -> None:
    """Let what has been quantized move as integers, in place.

    Args:
        model: With pairs as `stsm_rt.quantize` puts them. States that go through moves only become bytes, channels
            last.
    """
    graph = model.graph
    _quantize_kernels(graph)
    _move_integers(graph)
    _take_bytes(graph)
    for name, zero in _keep_bytes(graph).items():
        model.metadata_props.add(key=f"{name}.zero", value=str(zero))
    _drop_unread(graph)


def byte_states(model: ModelProto, states: tuple[StateSpec, ...]) -> tuple[StateSpec, ...]:
    """The states as an INT8 graph takes them.

    Args:
        model: The graph.
        states: Those of the FP32 graph.

    Returns:
        For a state in bytes its shape, channels last, dtype ``"uint8"`` and the byte that means 0.
    """
    zeros = {entry.key: int(entry.value) for entry in model.metadata_props}
    return tuple(
        dataclasses.replace(state, shape=_last(state.shape), dtype="uint8", zero=zeros[f"{state.name}.zero"])
        if f"{state.name}.zero" in zeros
        else state
        for state in states
    )


def _last(shape: Sequence[int]) -> tuple[int, ...]:
    batch, channels, height, width = shape
    return batch, height, width, channels


def _chain(conv: NodeProto, writers: Mapping[str, NodeProto]) -> list[NodeProto]:
    """The nodes of the normalisation, from the convolution back to the frame; none if it is not behind it."""
    chain: list[NodeProto] = []
    tensor = conv.input[0]
    for kind in _NORMALISATION:
        node = writers.get(tensor)
        if node is None or node.op_type != kind:
            return []
        chain.append(node)
        tensor = node.input[0]
    return chain if tensor == "frame" else []


def _replace(tensor: TensorProto, values: npt.NDArray[np.float64]) -> None:
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, np.float32), tensor.name))


class _Pairs:
    """The pairs of a graph: what was quantized how."""

    def __init__(self, graph: GraphProto) -> None:
        self._constants = {tensor.name: tensor for tensor in graph.initializer}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        self.writers = {output: node for node in graph.node for output in node.output}

    def integers(self, tensor: str) -> str | None:
        """The integers that a tensor was made from, if it leaves a pair."""
        writer = self.writers.get(tensor)
        return writer.input[0] if writer is not None and writer.op_type == "DequantizeLinear" else None

    def quantizer(self, tensor: str) -> NodeProto | None:
        """The node that quantizes a tensor, if nothing else reads it."""
        readers = self.readers.get(tensor, [])
        return readers[0] if len(readers) == 1 and readers[0].op_type == "QuantizeLinear" else None

    def scale(self, node: NodeProto) -> tuple[float, int]:
        """Scale and zero point of one half of a pair."""
        scale, zero = (numpy_helper.to_array(self._constants[name]) for name in node.input[1:3])
        return float(scale), int(zero)


def _quantize_kernels(graph: GraphProto) -> None:
    """A one is the integer 1 at a scale of 1."""
    weights = {tensor.name: tensor for tensor in graph.initializer}
    pairs = _Pairs(graph)
    moving = [node for node in graph.node if is_one_hot(node, weights) and pairs.integers(node.input[0])]
    for name in dict.fromkeys(conv.input[1] for conv in moving):  # equal kernels are one constant
        kernel = numpy_helper.to_array(weights[name]).astype(np.int8)
        constants = {
            f"{name}_quantized": kernel,
            f"{name}_scale": np.float32(1),
            f"{name}_zero_point": np.int8(0),
        }
        graph.initializer.extend(numpy_helper.from_array(np.asarray(value), key) for key, value in constants.items())
        graph.node.insert(0, helper.make_node("DequantizeLinear", list(constants), [f"{name}_dequantized"]))
    for conv in moving:
        conv.input[1] += "_dequantized"


def _move_integers(graph: GraphProto) -> None:
    pairs = _Pairs(graph)
    for node in list(graph.node):
        if node.op_type not in _MOVES:
            continue
        count = len(node.input) if node.op_type == "Concat" else 1
        integers = [pairs.integers(name) for name in node.input[:count]]
        quantizer = pairs.quantizer(node.output[0])
        if quantizer is None or None in integers:
            continue
        scales = {pairs.scale(pairs.writers[name]) for name in node.input[:count]}
        if scales == {pairs.scale(quantizer)}:
            node.input[:count] = integers
            node.output[0] = quantizer.output[0]
            graph.node.remove(quantizer)


def _take_bytes(graph: GraphProto) -> None:
    """What is cast, centred and quantized again is the frame itself."""
    pairs = _Pairs(graph)
    quantizer = pairs.quantizer(_CENTRED)
    if quantizer is None:
        return
    centre = pairs.writers[_CENTRED]
    transpose = pairs.writers[centre.input[0]]
    graph.node.remove(pairs.writers[transpose.input[0]])
    transpose.input[0], transpose.output[0] = "frame", quantizer.output[0]
    graph.node.remove(centre)
    graph.node.remove(quantizer)


def _keep_bytes(graph: GraphProto) -> dict[str, int]:
    """Make bytes of the states that only moves write and read; gives the byte that means 0 for each."""
    pairs = _Pairs(graph)
    inputs = {value.name: value for value in graph.input}
    zeros: dict[str, int] = {}
    for output in graph.output:
        name = output.name.removesuffix("_out")
        move = pairs.writers[output.name]
        quantizer = pairs.quantizer(f"{name}_in")
        integers = pairs.integers(move.input[0]) if move.op_type == "Slice" else None
        if quantizer is None or integers is None:
            continue
        scale, zero = pairs.scale(quantizer)
        if pairs.scale(pairs.writers[move.input[0]]) != (scale, zero):
            continue
        zeros[name] = zero
        _make_bytes(inputs[f"{name}_in"])
        _make_bytes(output)
        last_to_first = helper.make_node("Transpose", [f"{name}_in"], [quantizer.output[0]], perm=[0, 3, 1, 2])
        move.input[0], move.output[0] = integers, f"{name}_kept"
        graph.node.remove(quantizer)
        graph.node.insert(0, last_to_first)
        graph.node.append(helper.make_node("Transpose", [f"{name}_kept"], [output.name], perm=[0, 2, 3, 1]))
    return zeros


def _make_bytes(value: ValueInfoProto) -> None:
    shape = [size.dim_value for size in value.type.tensor_type.shape.dim]
    value.CopyFrom(helper.make_tensor_value_info(value.name, TensorProto.UINT8, _last(shape)))


def _drop_unread(graph: GraphProto) -> None:
    read = {name for node in graph.node for name in node.input} | {output.name for output in graph.output}
    nodes = [node for node in graph.node if any(name in read for name in node.output)]
    read = {name for node in nodes for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(constants)
