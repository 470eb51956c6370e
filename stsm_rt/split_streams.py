"""Residual streams that stay divided where the shift divides them, so that no feature map is copied.

A shift puts together channels of an earlier frame, channels moved in space and channels left alone. None of that is
computation, yet slicing and concatenating copies every feature map and breaks the blocked layouts of the runtimes. The
channels need not be together, because both neighbours of a shift are linear in them:

* the convolution before it writes each part of its output channels by itself, with rows of its weights; the residual
  sum and its ReLU treat every channel alone, so ``relu(add(conv(y), x))`` becomes one such expression for each part;
* the convolution after it reads each part by itself, with columns of its weights, and adds: ``conv(concat(s, m, r))``
  becomes ``conv(r) + conv(m) + conv(s)``. ONNX Runtime and OpenVINO add such a sum inside the next convolution.

It is the same arithmetic in another order, and the part that a later frame needs leaves the graph as it was written.

Only streams between 1x1 convolutions are split (ResNet-50). A 3x3 convolution that writes few channels at a time loses
more than the copies cost: on ONNX Runtime, ResNet-18 took 1.13 times the plain network's time split and 1.06 unsplit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, helper, numpy_helper, shape_inference


@dataclass(frozen=True)
class _Part:
    """Channels ``start:stop`` of a tensor, and the name of the tensor that holds only these."""

    name: str
    start: int
    stop: int


_Parts = dict[str, list[_Part]]


def split_streams(model: ModelProto) -> ModelProto:
    """Split the residual streams that have a ReLU after their sum into the parts that the shifts read.

    The shift of what is no such stream, as in the first block, which reads the stem, stays as it is.

    Args:
        model: A step form that `stsm_rt.export` wrote, in FP32 or FP16; it is not changed.

    Returns:
        A graph with the same inputs, outputs and multiply-adds. Weights are named after what is left of them,
        ``backbone.layer1.1.conv1.weight/0:64,96:256``: output channels, input channels. `model` itself, where there is
        nothing to split.
    """
    graph = _Graph(model)
    parts = _divided(graph)
    if not parts:
        return model
    writer = _Writer(graph, parts)
    for node in model.graph.node:
        writer.rewrite(node)
    return writer.model()


class _Graph:
    """Who writes and who reads each tensor, its shape, and the constants."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.constants = {tensor.name: tensor for tensor in model.graph.initializer}
        self.writers = {output: node for node in model.graph.node for output in node.output}
        self.readers: dict[str, list[NodeProto]] = {}
        for node in model.graph.node:
            for name in node.input:
                self.readers.setdefault(name, []).append(node)
        inferred = shape_inference.infer_shapes(model).graph
        self._shapes = {
            value.name: [dimension.dim_value for dimension in value.type.tensor_type.shape.dim]
            for value in (*inferred.input, *inferred.value_info, *inferred.output)
        }

    def array(self, name: str) -> npt.NDArray[Any]:
        """The values of a constant."""
        return numpy_helper.to_array(self.constants[name])

    def channels(self, tensor: str) -> int:
        """C of a feature map (N, C, H, W)."""
        return self._shapes[tensor][1]

    def is_pointwise(self, node: NodeProto | None) -> bool:
        """Whether it is a convolution of all channels with constant 1x1 weights."""
        if node is None or node.op_type != "Conv" or node.input[1] not in self.constants:
            return False
        return list(self.constants[node.input[1]].dims[1:]) == [self.channels(node.input[0]), 1, 1]

    def averages_space(self, node: NodeProto) -> bool:
        """Whether it is the mean of (N, C, H, W) over H and W."""
        if node.op_type != "ReduceMean" or len(node.input) < 2 or node.input[1] not in self.constants:
            return False
        return sorted(self.array(node.input[1]) % 4) == [2, 3]

    def slices(self, tensor: str) -> list[_Part]:
        """What a tensor's channels are sliced into, in order; nothing, unless that is the whole tensor."""
        found = []
        for node in self.readers.get(tensor, []):
            if node.op_type == "Slice" and all(name in self.constants for name in node.input[1:]):
                start, stop, axis = (int(self.array(name).item()) for name in node.input[1:4])
                if axis == 1:
                    found.append(_Part(node.output[0], start, min(stop, self.channels(tensor))))
        found.sort(key=lambda part: part.start)
        starts, stops = [part.start for part in found], [part.stop for part in found]
        return found if [*starts, self.channels(tensor)] == [0, *stops] else []


def _divided(graph: _Graph) -> _Parts:
    """The tensors that are to be written in parts: the streams, their sums and what is added.

    A stream that no shift reads, as the last one, is divided as the stream that it continues.
    """
    parts: _Parts = {}
    for node in graph.model.graph.node:
        total = graph.writers.get(node.input[0]) if node.op_type == "Relu" else None
        if total is None or total.op_type != "Add":
            continue
        known = [parts[name] for name in total.input if name in parts]
        slices = graph.slices(node.output[0]) or (known[0] if known else [])
        alike = all(_bounds(operand) == _bounds(slices) for operand in known)
        others = [name for name in total.input if name not in parts]
        if slices and alike and all(graph.is_pointwise(graph.writers.get(name)) for name in others):
            parts[node.output[0]] = graph.slices(node.output[0]) or _alike(node.output[0], slices)
            parts |= {name: _alike(name, slices) for name in (*others, total.output[0])}
    return parts


def _bounds(parts: Sequence[_Part]) -> list[tuple[int, int]]:
    return [(part.start, part.stop) for part in parts]


def _alike(tensor: str, parts: Sequence[_Part]) -> list[_Part]:
    """The same channels of another tensor."""
    return [_Part(f"{tensor}/{start}:{stop}", start, stop) for start, stop in _bounds(parts)]


class _Writer:
    """Rewrites the nodes of a graph one by one, in their order.

    Args:
        graph: Is not changed.
        parts: Of each tensor that is to be written in parts.
    """

    def __init__(self, graph: _Graph, parts: _Parts) -> None:
        self._graph = graph
        self._parts = parts
        self._names = {part.name for found in parts.values() for part in found}
        self._shifts: _Parts = {}  # what a shift would have put together
        self._nodes: list[NodeProto] = []
        self._constants: dict[str, npt.NDArray[Any]] = {}
        self._whole: set[str] = set()

    def rewrite(self, node: NodeProto) -> None:
        """Write what stands for a node."""
        output = node.output[0]
        if output in self._names:
            return  # a slice of a stream, which is written as such
        if self._is_shift(node):
            self._shifts[output] = self._pieces(node)
        elif output in self._parts:
            for i, part in enumerate(self._parts[output]):
                if node.op_type == "Conv":
                    self._convolve(node, part)
                else:
                    self._like(node, [self._parts[name][i].name for name in node.input], part.name)
        elif node.input and node.input[0] in self._shifts | self._parts and self._graph.is_pointwise(node):
            self._convolve(node, _Part(output, 0, self._graph.channels(output)))
        elif node.input and node.input[0] in self._parts and self._graph.averages_space(node):
            parts = self._parts[node.input[0]]
            means = _alike(output, parts)
            for mean, part in zip(means, parts, strict=True):
                self._like(node, [part.name, *node.input[1:]], mean.name)
            self._concatenate(means, output)
        else:
            for name in node.input:
                if name in self._parts and name not in self._whole:
                    self._concatenate(self._parts[name], name)
                    self._whole.add(name)
            self._nodes.append(node)

    def model(self) -> ModelProto:
        """The graph of what was written."""
        model = ModelProto()
        model.CopyFrom(self._graph.model)
        read = {name for node in self._nodes for name in node.input}
        for field in ("node", "initializer", "value_info"):
            model.graph.ClearField(field)
        model.graph.node.extend(self._nodes)
        model.graph.initializer.extend(tensor for name, tensor in self._graph.constants.items() if name in read)
        model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in self._constants.items())
        return model

    def _is_shift(self, node: NodeProto) -> bool:
        """Whether it puts parts of a stream, as they are or moved by a convolution, together for convolutions."""
        if node.op_type != "Concat" or not all(map(self._graph.is_pointwise, self._graph.readers[node.output[0]])):
            return False
        writers = [self._graph.writers.get(name) for name in node.input]
        moved = {writer.input[0] for writer in writers if writer is not None and writer.op_type == "Conv"}
        return bool(self._names & {*node.input, *moved})

    def _pieces(self, shift: NodeProto) -> list[_Part]:
        pieces, start = [], 0
        for name in shift.input:
            pieces.append(_Part(name, start, start + self._graph.channels(name)))
            start = pieces[-1].stop
        return pieces

    def _convolve(self, conv: NodeProto, target: _Part) -> None:
        """Some output channels of a convolution, as a sum over the parts of its input, the last and largest first."""
        source, weight, *bias = conv.input
        whole = [_Part(source, 0, self._graph.channels(source))]
        sources = (self._shifts.get(source) or self._parts.get(source) or whole)[::-1]
        rows = f"{target.start}:{target.stop}"
        weights = self._graph.array(weight)[target.start : target.stop]
        total = ""
        for i, part in enumerate(sources):
            columns = weights[:, part.start : part.stop]
            inputs = [part.name, self._constant(f"{weight}/{rows},{part.start}:{part.stop}", columns)]
            if bias and i == 0:
                values = self._graph.array(bias[0])[target.start : target.stop]
                inputs.append(self._constant(f"{bias[0]}/{rows}", values))
            product = target.name if len(sources) == 1 else f"{target.name}/product_{i}"
            self._like(conv, inputs, product)
            if i > 0:
                together = target.name if part is sources[-1] else f"{target.name}/sum_{i}"
                self._write(helper.make_node("Add", [total, product], [together]))
                product = together
            total = product

    def _concatenate(self, parts: Sequence[_Part], tensor: str) -> None:
        self._write(helper.make_node("Concat", [part.name for part in parts], [tensor], axis=1))

    def _like(self, node: NodeProto, inputs: Sequence[str], output: str) -> None:
        """The same operator on other tensors."""
        new = helper.make_node(node.op_type, inputs, [output])
        new.attribute.extend(node.attribute)
        self._write(new)

    def _write(self, node: NodeProto) -> None:
        node.name = f"node_{node.output[0]}"
        self._nodes.append(node)

    def _constant(self, name: str, values: npt.NDArray[Any]) -> str:
        self._constants[name] = np.ascontiguousarray(values)
        return name
