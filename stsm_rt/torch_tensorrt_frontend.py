"""The step form -> torch.export -> Torch-TensorRT -> a TensorRT plan.

It works on a GPU with torch-tensorrt and, with or without a GPU, with torch-tensorrt-rtx. The network definition is
Torch-TensorRT's; it is built like a parsed one, with the same options (`tensorrt_build`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from stsm_rt.driverless import device_queries_answered, exportable_quantizers
from stsm_rt.errors import UserError
from stsm_rt.export import StepForm, step_inputs
from stsm_rt.networks import StreamingNetwork
from stsm_rt.quantize import mean_error
from stsm_rt.ranges import Ranges
from stsm_rt.tensorrt_build import BuildOptions, Definition, Plan, build_network, describe
from stsm_rt.tensorrt_library import TensorRT, load_tensorrt, one_line, plan_device

PRECISIONS = ("fp32", "fp16", "int8")

_DISTRIBUTIONS = {"torch-tensorrt-rtx": "tensorrt-rtx", "torch-tensorrt": "tensorrt"}
_LOGGERS = ("torch_tensorrt", "torch_tensorrt [TensorRT Conversion Context]")
_LEAST_AMAX = 127 * 6.2e-5


class PreparedStep(StepForm):
    """The step form in a plan's precision, which is what is exported.

    ``step(frame, [active,] *state) -> (logits, *next_state)``; frame uint8 (N, H, W, 3), active bool (N,) where N is
    more than 1, the states float16 unless the precision is ``"fp32"``, the logits always float32.

    Args:
        network: Causal, in evaluation mode; it is copied, not changed.
        height: Of the input, pixels.
        width: Of the input, pixels.
        batch: N.
        precision: One of `PRECISIONS`; ``"int8"`` is FP16 with int8 convolutions.
        ranges: Of the activations, for ``"int8"``.
        exclude: Patterns of module paths (``backbone.layer1.*``) whose convolutions stay in FP16.

    Attributes:
        arguments: Example arguments: zeros, and true for every stream.
        input_names: Names of the arguments: ``frame``, ``active``, ``state_00_in``, ...
        output_names: Names of the results: ``logits``, ``state_00_out``, ...
        quantized: Module paths of the convolutions that are int8.

    Raises:
        ShiftError: The shift looks ahead.
        UserError: An unknown precision, no ranges, or a pattern that names no convolution.
    """

    def __init__(
        self,
        network: StreamingNetwork,
        height: int,
        width: int,
        *,
        batch: int = 1,
        precision: str = "fp32",
        ranges: Ranges | None = None,
        exclude: Sequence[str] = (),
    ) -> None:
        if precision not in PRECISIONS:
            raise UserError(
                f"the precision must be {', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}, not {precision!r}"
            )
        if precision == "int8" and ranges is None:
            raise UserError("an INT8 plan needs recorded ranges; make them with stsm-rt calibrate")
        own = copy.deepcopy(network).eval().requires_grad_(False)
        fold_batch_norms(own)
        names, arguments = step_inputs(own, height, width, batch)
        quantized: tuple[str, ...] = ()
        if precision == "int8":
            assert ranges is not None
            quantized = _quantize(own, ranges, exclude)
        if precision != "fp32":
            own.half()
            arguments = tuple(each.half() if each.is_floating_point() else each for each in arguments)
        super().__init__(own)
        self.quantized = quantized
        self.arguments = arguments
        # Torch-TensorRT wants names in tuples, as arguments and results are.
        self.input_names = tuple(names)
        self.output_names = ("logits", *(name.removesuffix("_in") + "_out" for name in names if name.endswith("_in")))


def build_plan_from_network(
    network: StreamingNetwork,
    height: int,
    width: int,
    *,
    batch: int = 1,
    precision: str = "fp16",
    ranges: Ranges | None = None,
    exclude: Sequence[str] = (),
    options: BuildOptions,
) -> Plan:
    """Build a plan from a network.

    Args:
        network: Causal, in evaluation mode; it is not changed.
        height: Of the input, pixels.
        width: Of the input, pixels.
        batch: Streams per step; more than one adds the input ``active``.
        precision: One of `PRECISIONS`.
        ranges: Of the same weights, for ``"int8"``.
        exclude: Patterns of module paths whose convolutions stay in FP16.
        options: How to build.

    Returns:
        The plan, with the names that exported graphs have.

    Raises:
        ShiftError: The shift looks ahead.
        UserError: Torch-TensorRT is not installed, an option cannot be met, or the build failed.
    """
    tensorrt = torch_tensorrt_library()
    plan_device(tensorrt, options.compute_capabilities, options.hardware_compatible)
    if torch.cuda.is_available():
        network = copy.deepcopy(network).cuda()
    step = PreparedStep(network, height, width, batch=batch, precision=precision, ranges=ranges, exclude=exclude)
    return convert(tensorrt, step, options)


def torch_tensorrt_library() -> TensorRT:
    """The TensorRT that the installed Torch-TensorRT uses.

    Raises:
        UserError: Torch-TensorRT or its TensorRT is not installed.
    """
    # Without a driver torch_tensorrt cannot be imported to ask it.
    for distribution, runtime in _DISTRIBUTIONS.items():
        try:
            importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        return load_tensorrt(runtime)
    raise UserError(
        "Torch-TensorRT is not installed; run pip install torch-tensorrt (or torch-tensorrt-rtx on an RTX PC), or "
        "build with --frontend onnx"
    )


def export_step(step: PreparedStep) -> torch.export.ExportedProgram:
    """The program of a step, with ``tensorrt::quantize_op`` where it is int8."""
    with _quantizers_of(step), torch.no_grad():
        return torch.export.export(step, step.arguments, strict=False)


def convert(tensorrt: TensorRT, step: PreparedStep, options: BuildOptions) -> Plan:
    """Build a plan from a step.

    Raises:
        UserError: An option cannot be met, or the build failed.
    """
    device = plan_device(tensorrt, options.compute_capabilities, options.hardware_compatible)
    program = export_step(step)
    with device_queries_answered(), _quantizers_of(step), _kept_messages() as messages:
        try:
            import torch_tensorrt
        except ImportError as error:
            raise UserError(f"Torch-TensorRT cannot be imported ({one_line(error)}); install it again") from error
        with _building_as_parsed(tensorrt, options, messages) as definitions:
            try:
                data = torch_tensorrt.dynamo.convert_exported_program_to_serialized_trt_engine(
                    program,
                    arg_inputs=step.arguments,
                    min_block_size=1,
                    immutable_weights=True,
                    arg_input_binding_names=step.input_names,
                    output_binding_names=step.output_names,
                )
            except Exception as error:  # its exceptions have no common base
                if isinstance(error.__cause__, UserError):
                    raise error.__cause__ from None
                raise UserError(
                    f"Torch-TensorRT cannot convert the network: {one_line(error)}; build with --frontend onnx"
                ) from error
    return Plan(data=data, device=device, definition=definitions[0])


@contextmanager
def _quantizers_of(step: PreparedStep) -> Iterator[None]:
    """Let the quantizers of a step, if it has any, be exported and evaluated where it is."""
    if not step.quantized:
        yield
        return
    from modelopt.torch.quantization.utils import export_torch_mode

    with exportable_quantizers(step.arguments[0].device), export_torch_mode():
        yield


def fold_batch_norms(network: nn.Module) -> None:
    """Fold every batch norm into the convolution before it, in place; module paths and hooks stay."""
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in itertools.pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                assert norm.running_mean is not None and norm.running_var is not None
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, nn.Identity())


def _quantize(network: StreamingNetwork, ranges: Ranges, exclude: Sequence[str]) -> tuple[str, ...]:
    """Put int8 quantizers into the convolutions, in place; returns the paths of those that have them."""
    convolutions = [path for path, module in network.named_modules() if isinstance(module, nn.Conv2d)]
    for pattern in exclude:
        if not any(fnmatchcase(path, pattern) for path in convolutions):
            raise UserError(f"no layer matches {pattern!r}; the layers are named like {', '.join(convolutions[:3])}")
    chosen = [path for path in convolutions if not any(fnmatchcase(path, pattern) for pattern in exclude)]
    amax = {path: ranges.amax(path) for path in chosen}
    with _silence():
        try:
            import modelopt.torch.quantization as mtq
        except ImportError as error:
            raise UserError(
                f"INT8 through Torch-TensorRT needs ModelOpt ({one_line(error)}); run pip install nvidia-modelopt "
                "requests huggingface_hub transformers, or build with --frontend onnx"
            ) from error
        # Without an algorithm nothing is calibrated: what is known goes in below.
        mtq.quantize(network, {**mtq.INT8_DEFAULT_CFG, "algorithm": None})
    # ModelOpt has quantizers for pooling and linear layers, too.
    mtq.disable_quantizer(network, "*")
    for path, limit in amax.items():
        conv: Any = network.get_submodule(path)
        weight, bias = conv.get_parameter("weight").data, conv.get_parameter("bias").data
        # Below the least a scale is too small for FP16, in which weights and scales are before weights become int8.
        weight_amax = weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=_LEAST_AMAX).half().float()
        scale = weight_amax / 127
        moved = (weight.half().float() / scale).round() * scale - weight
        bias -= torch.from_numpy(mean_error(moved.double().cpu().numpy(), ranges.mean(path))).to(bias)
        input_amax = torch.tensor(max(limit, _LEAST_AMAX), device=weight.device)
        for quantizer, each in ((conv.input_quantizer, input_amax), (conv.weight_quantizer, weight_amax)):
            quantizer.amax = each
            quantizer.enable()
    return tuple(chosen)


@contextmanager
def _building_as_parsed(tensorrt: TensorRT, options: BuildOptions, messages: list[str]) -> Iterator[list[Definition]]:
    """Let Torch-TensorRT build its network definitions as parsed ones are; yields what they hold."""
    from torch_tensorrt.dynamo.conversion import _conversion

    definitions: list[Definition] = []
    interpreter = _conversion.TRTInterpreter

    class Interpreter(interpreter):  # type: ignore[misc, valid-type]
        def run(self, *arguments: Any, **keywords: Any) -> Any:
            self._construct_trt_network_def()
            definitions.append(describe(tensorrt, self.ctx.net))
            config = self._populate_trt_builder_config()
            data = build_network(tensorrt, self.builder, self.ctx.net, config, options, "the network", messages)
            # Its own way would load the plan to serialize it again, for which a GPU is needed.
            found = {
                "engine": _Built(data),
                "input_names": self._input_names,
                "output_names": self._output_names,
                "requires_output_allocator": False,
                "requires_native_multidevice": False,
                "aliased_io": {},
            }
            result = _conversion.TRTInterpreterResult
            return result(**{name: found[name] for name in result._fields})

    _conversion.TRTInterpreter = Interpreter
    try:
        yield definitions
    finally:
        _conversion.TRTInterpreter = interpreter


class _Built:
    """The part of an engine that Torch-TensorRT asks for."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def serialize(self) -> bytes:
        return self._data


@contextmanager
def _kept_messages() -> Iterator[list[str]]:
    """Torch-TensorRT's errors, kept instead of printed."""
    messages: list[str] = []

    class Keeper(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.levelno >= logging.ERROR:
                messages.append(record.getMessage())

    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [Keeper()], False
    try:
        with _silence():
            yield messages
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate


@contextmanager
def _silence() -> Iterator[None]:
    """Keep what Torch-TensorRT and ModelOpt print, and their warnings about uses that are not ours, from the person."""
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
