"""An ONNX graph -> a TensorRT plan, by TensorRT's own parser; for devices without torch.

Every network is strongly typed: a plan has the precision that its graph has.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stsm_rt.errors import UserError
from stsm_rt.tensorrt_library import (
    Progress,
    TensorRT,
    create_network,
    error_log,
    first_reason,
    has_timing_cache,
    plan_device,
    set_progress,
    set_targets,
)

_DTYPES = {"FLOAT": "float32", "HALF": "float16"}


@dataclass(frozen=True, kw_only=True)
class BuildOptions:
    """How to build a plan.

    Attributes:
        workspace_mib: Memory that layers may use for a moment, in MiB; None: TensorRT's own limit.
        compute_capabilities: What a plan of TensorRT-RTX is for, for example ``("8.6", "8.9")``; none: GPUs of
            compute capability 8.0 and later. TensorRT builds for the GPU it is on.
        hardware_compatible: Whether a plan of TensorRT runs on all GPUs since Ampere, at some loss of speed.
        dla: Number of the DLA core to use; what it cannot run goes to the GPU.
        timing_cache: File of measured kernels that makes the next build faster; it is read if it is there, and
            written.
        progress: Called with the builder's phase and the fraction that is done, 0 to 1.
    """

    workspace_mib: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    hardware_compatible: bool = False
    dla: int | None = None
    timing_cache: Path | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class PlanTensor:
    """An input or output of a plan.

    Attributes:
        name: For example ``"state_00_in"``.
        dtype: As numpy says it: ``"uint8"``, ``"bool"``, ``"float16"``, ``"float32"``.
        shape: Batch dimension first.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Definition:
    """What a network definition holds before TensorRT optimizes it.

    Attributes:
        inputs: In the network's order.
        outputs: Likewise.
        layers: Number of layers.
        quantize_layers: How many of them quantize.
        dequantize_layers: How many of them dequantize. Those of weights that are stored as int8 have no partner that
            quantizes.
    """

    inputs: tuple[PlanTensor, ...]
    outputs: tuple[PlanTensor, ...]
    layers: int
    quantize_layers: int
    dequantize_layers: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A serialized engine.

    Attributes:
        data: The plan, as ``trtexec`` loads it.
        device: What it runs on, in the manifest's form: ``"sm_86"``, ``"sm_86,sm_89"`` or ``"sm_80+"``.
        definition: What it was made from.
    """

    data: bytes
    device: str
    definition: Definition


class ParsedGraph:
    """A graph that TensorRT has parsed, ready to be built once.

    Args:
        tensorrt: The package to parse and build with.
        graph: ONNX file, strongly typed.

    Attributes:
        definition: What the network definition holds.

    Raises:
        UserError: The file is absent or damaged, or TensorRT does not know something in it.
    """

    def __init__(self, tensorrt: TensorRT, graph: Path) -> None:
        if not graph.is_file():
            raise UserError(f"there is no graph {graph}; give the path of an ONNX file that stsm-rt export wrote")
        self._tensorrt, self._graph = tensorrt, graph
        self._log = error_log(tensorrt)
        self._log.errors.clear()
        self._builder = _builder(tensorrt)
        self._network = create_network(tensorrt, self._builder)
        # It holds the weights that the network refers to.
        self._parser = tensorrt.module.OnnxParser(self._network, self._log)
        parsed = self._parser.parse_from_file(str(graph))
        # Of a file without a graph the parser makes an empty network.
        if not self._network.num_outputs and (parsed or self._parser_error() == "MODEL_DESERIALIZE_FAILED"):
            raise UserError(f"the graph {graph} is damaged or no ONNX file; export it again with stsm-rt export")
        if not parsed:
            raise UserError(
                f"{tensorrt.name} cannot read the graph {graph}: {self._parser_reason()}; export it again with stsm-rt "
                "export"
            )
        self.definition = describe(tensorrt, self._network)

    def build(self, options: BuildOptions) -> Plan:
        """Build the plan.

        Raises:
            UserError: An option that the package, its version or the device lacks, or the builder failed.
        """
        device = plan_device(self._tensorrt, options.compute_capabilities, options.hardware_compatible)
        config = self._builder.create_builder_config()
        source = f"the graph {self._graph}"
        data = build_network(self._tensorrt, self._builder, self._network, config, options, source, self._log.errors)
        return Plan(data=data, device=device, definition=self.definition)

    def _parser_error(self) -> str:
        return str(self._parser.get_error(0).code().name) if self._parser.num_errors else ""

    def _parser_reason(self) -> str:
        if not self._parser.num_errors:
            return first_reason(self._log.errors)
        error = self._parser.get_error(0)
        operator, text = error.node_operator(), error.desc()
        if "Plugin not found" in text:
            return f"it does not know the operator {operator} of node {error.node_name()!r}"
        # The text may be no more than the parser's own assertion, such as "false"; the code says what is wrong.
        lines = [line for line in text.splitlines() if not line.startswith(("Invalid Node", "false"))]
        kind = self._parser_error().replace("_", " ").lower()
        where = f" in node {error.node_name()!r} ({operator})" if operator else ""
        return f"{kind}{where}" + (f", {first_reason(lines)}" if lines else "")


def build_plan(tensorrt: TensorRT, graph: Path, options: BuildOptions) -> Plan:
    """Build a plan from an ONNX graph.

    Args:
        tensorrt: The package to build with.
        graph: ONNX file, strongly typed; Q/DQ pairs make it INT8.
        options: How to build.

    Returns:
        The plan.

    Raises:
        UserError: A graph that cannot be read, an option that cannot be met, or the builder failed.
    """
    plan_device(tensorrt, options.compute_capabilities, options.hardware_compatible)
    return ParsedGraph(tensorrt, graph).build(options)


def configure(tensorrt: TensorRT, builder: Any, config: Any, options: BuildOptions) -> None:
    """Set the options in a builder's config, all but the timing cache.

    Args:
        tensorrt: The package of the builder.
        builder: An ``IBuilder``.
        config: Its ``IBuilderConfig``.
        options: Options that `plan_device` has accepted.

    Raises:
        UserError: A timing cache or a DLA core that is not there.
    """
    trt = tensorrt.module
    if options.workspace_mib is not None:
        if options.workspace_mib < 1:
            raise UserError(f"the workspace must be at least 1 MiB, not {options.workspace_mib}")
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    if options.timing_cache is not None and not has_timing_cache(tensorrt):
        raise UserError(
            f"{tensorrt.name} measures nothing while it builds and has no timing cache; leave the option out"
        )
    if options.dla is not None:
        cores = builder.num_DLA_cores
        if not 0 <= options.dla < cores:
            raise UserError(
                f"DLA core {options.dla} was asked for, this device has {cores or 'none'} that {tensorrt.name} can "
                "use; choose another core or leave the option out"
            )
        config.default_device_type = trt.DeviceType.DLA
        config.DLA_core = options.dla
        config.set_flag(trt.BuilderFlag.GPU_FALLBACK)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    set_targets(tensorrt, config, options.compute_capabilities)
    if options.progress is not None:
        set_progress(tensorrt, config, options.progress)


def describe(tensorrt: TensorRT, network: Any) -> Definition:
    """What a network definition (an ``INetworkDefinition``) holds."""
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return Definition(
        inputs=tuple(_tensor(network.get_input(index)) for index in range(network.num_inputs)),
        outputs=tuple(_tensor(network.get_output(index)) for index in range(network.num_outputs)),
        layers=len(kinds),
        quantize_layers=kinds.count(tensorrt.module.LayerType.QUANTIZE),
        dequantize_layers=kinds.count(tensorrt.module.LayerType.DEQUANTIZE),
    )


def build_network(
    tensorrt: TensorRT, builder: Any, network: Any, config: Any, options: BuildOptions, source: str, errors: list[str]
) -> bytes:
    """Build a network definition with options that `plan_device` has accepted.

    Args:
        tensorrt: The package of the builder.
        builder: An ``IBuilder``.
        network: An ``INetworkDefinition`` of it.
        config: An ``IBuilderConfig`` of it, to be completed here.
        options: How to build.
        source: What the network was made from, for people.
        errors: Where the builder's logger puts its messages.

    Returns:
        The plan.

    Raises:
        UserError: The device or version lacks an option, or the builder failed.
    """
    configure(tensorrt, builder, config, options)
    if options.timing_cache is not None:
        _read_timing_cache(tensorrt, config, options.timing_cache)
    errors.clear()
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(
            f"{tensorrt.name} cannot build a plan from {source}: {first_reason(errors)}; choose another precision, "
            "device or frontend"
        )
    if options.timing_cache is not None:
        _write_timing_cache(config, options.timing_cache)
    return bytes(plan)


def _read_timing_cache(tensorrt: TensorRT, config: Any, path: Path) -> None:
    """Give the builder the timing cache in a file, or an empty one if there is none.

    Raises:
        UserError: The file is damaged or of another device or version.
    """
    try:
        data = path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise UserError(f"the timing cache {path} cannot be read ({error}); give another file") from error
    cache = config.create_timing_cache(data)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        raise UserError(
            f"the timing cache {path} is damaged or of another device or version than {tensorrt.name}; delete it or "
            "give another file"
        )


def _write_timing_cache(config: Any, path: Path) -> None:
    """Write what the builder has measured, whole or not at all.

    Raises:
        UserError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(memoryview(config.get_timing_cache().serialize()))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"the timing cache {path} cannot be written ({error}); give another file") from error
    finally:
        temporary.unlink(missing_ok=True)


def _builder(tensorrt: TensorRT) -> Any:
    log = error_log(tensorrt)
    try:
        return tensorrt.module.Builder(log)
    except Exception as error:  # pybind11 says it with a TypeError, of all things
        raise UserError(
            f"{tensorrt.name} cannot start ({first_reason([*log.errors, str(error)])}); check the GPU and its driver"
        ) from error


def _tensor(tensor: Any) -> PlanTensor:
    kind = tensor.dtype.name
    return PlanTensor(tensor.name, _DTYPES.get(kind, kind.lower()), tuple(tensor.shape))
