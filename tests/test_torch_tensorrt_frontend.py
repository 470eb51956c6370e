"""Real plans of TensorRT-RTX through Torch-TensorRT, on a machine with or without a GPU."""

from __future__ import annotations

import copy
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from stsm_rt.check_weights import moving_clip, random_weights
from stsm_rt.errors import UserError
from stsm_rt.export import export_onnx
from stsm_rt.model import load_model
from stsm_rt.networks import ARCHITECTURES, StreamingNetwork
from stsm_rt.quantize import FORMS, quantize
from stsm_rt.ranges import FORMAT_VERSION, Ranges
from stsm_rt.shift import ShiftError
from stsm_rt.tensorrt_build import BuildOptions, PlanTensor, build_plan
from stsm_rt.torch_tensorrt_frontend import (
    PreparedStep,
    _quantizers_of,
    build_plan_from_network,
    convert,
    export_step,
    fold_batch_norms,
    torch_tensorrt_library,
)

HEIGHT, WIDTH = 48, 64
SHIPPED = Path(__file__).resolve().parents[1] / "engines" / "actions_lite0.safetensors"


@pytest.fixture(scope="module")
def small():
    return random_weights("r8", height=HEIGHT, width=WIDTH).network("stsm_online")


def convolutions(network):
    return {path: module for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}


def play(step, state, height, width, frames=6):
    """Logits (frames, classes) of a clip."""
    logits = []
    with torch.no_grad():
        for frame in torch.from_numpy(moving_clip(frames, height, width, seed=1)):
            output, *state = step(frame[None], *state)
            logits.append(output[0])
    return torch.stack(logits)


def measured_ranges(network, height, width):
    largest, means = {}, {}

    def measure(path):
        def hook(module, args):
            largest[path] = max(largest.get(path, 0.0), args[0].abs().max().item())
            means[path] = tuple(args[0].mean((0, 2, 3)).tolist())

        return hook

    handles = [conv.register_forward_pre_hook(measure(path)) for path, conv in convolutions(network).items()]
    play(network, network.initial_state(height, width), height, width)
    for handle in handles:
        handle.remove()
    return Ranges(
        format_version=FORMAT_VERSION,
        network=network.name,
        shift="stsm_online",
        weights_sha256="0" * 64,
        data="noise",
        clips=1,
        frames=6,
        method="max",
        tensors={f"{path}.input": {"max": (-limit, limit)} for path, limit in largest.items()},
        means=means,
    )


def difference(got, expected):
    return float((got - expected).abs().max() / expected.abs().max())


def check_tensors(plan, network, height, width, *, batch=1, dtype="float16"):
    """The plan's inputs and outputs are those of the contract."""
    specs = network.state_specs(height, width, batch)
    active = [PlanTensor("active", "bool", (batch,))] if batch > 1 else []
    assert plan.definition.inputs == (
        PlanTensor("frame", "uint8", (batch, height, width, 3)),
        *active,
        *(PlanTensor(f"{spec.name}_in", dtype, spec.shape) for spec in specs),
    )
    assert plan.definition.outputs == (
        PlanTensor("logits", "float32", (batch, network.classifier.out_features)),
        *(PlanTensor(f"{spec.name}_out", dtype, spec.shape) for spec in specs),
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("r18", "r50"))) for name in sorted(ARCHITECTURES)]
)
def test_folding_leaves_no_batch_norm_and_the_same_step(name):
    network = random_weights(name, height=HEIGHT, width=WIDTH).network("stsm_online")
    state = network.initial_state(HEIGHT, WIDTH)
    expected, paths = play(network, state, HEIGHT, WIDTH), list(convolutions(network))
    fold_batch_norms(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    assert list(convolutions(network)) == paths
    assert difference(play(network, state, HEIGHT, WIDTH), expected) < 1e-5


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 2e-2)])
def test_the_exported_step_equals_the_network(small, precision, bound):
    expected = play(small, small.initial_state(HEIGHT, WIDTH), HEIGHT, WIDTH)
    step = PreparedStep(small, HEIGHT, WIDTH, precision=precision)
    got = play(export_step(step).module(), step.arguments[1:], HEIGHT, WIDTH)
    assert got.dtype == torch.float32
    assert {tensor.dtype for tensor in step.arguments[1:]} == {torch.float32 if precision == "fp32" else torch.float16}
    assert difference(got, expected) < bound
    assert small.classifier.weight.dtype == torch.float32


def test_a_batched_step_keeps_the_state_of_idle_streams(small):
    step = PreparedStep(small, HEIGHT, WIDTH, batch=2, precision="fp16")
    assert step.input_names[:3] == ("frame", "active", "state_00_in")
    frame, _, *state = step.arguments
    with torch.no_grad():
        logits, *following = step(torch.full_like(frame, 90), torch.tensor([True, False]), *state)
    assert logits.shape[0] == 2
    assert all(after[1].eq(0).all() for after in following)
    assert all(after[0].ne(0).any() for after in following)


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"precision": "int4"}, "fp32, fp16 or int8, not 'int4'"),
        ({"precision": "int8"}, "needs recorded ranges"),
    ],
)
def test_wrong_precisions_are_one_sentence(small, keywords, sentence):
    with pytest.raises(UserError, match=sentence):
        PreparedStep(small, HEIGHT, WIDTH, **keywords)


def test_a_shift_that_looks_ahead_has_no_step():
    network = random_weights("r8", height=HEIGHT, width=WIDTH).network("stsm")
    with pytest.raises(ShiftError):
        PreparedStep(network, HEIGHT, WIDTH)


def test_without_torch_tensorrt_the_sentence_names_the_other_way(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    with pytest.raises(UserError, match=r"Torch-TensorRT is not installed.*--frontend onnx"):
        torch_tensorrt_library()


def test_int8_is_close_to_fp32_and_the_exported_program_has_its_pairs(torch_rtx, small):
    ranges = measured_ranges(small, HEIGHT, WIDTH)
    expected = play(small, small.initial_state(HEIGHT, WIDTH), HEIGHT, WIDTH)
    step = PreparedStep(small, HEIGHT, WIDTH, precision="int8", ranges=ranges)
    program = export_step(step)
    quantizers = [node for node in program.graph.nodes if node.target is torch.ops.tensorrt.quantize_op.default]
    # One for what enters a convolution and one for its weights.
    assert len(quantizers) == 2 * len(convolutions(small))
    assert step.quantized == tuple(convolutions(small))
    with _quantizers_of(step):
        got = play(program.module(), step.arguments[1:], HEIGHT, WIDTH)
    assert 0 < difference(got, expected) < 0.1


def test_excluded_layers_and_wrong_patterns(torch_rtx, small):
    ranges = measured_ranges(small, HEIGHT, WIDTH)
    step = PreparedStep(
        small, HEIGHT, WIDTH, precision="int8", ranges=ranges, exclude=["backbone.stem.*", "*.blocks.1.conv2"]
    )
    assert set(convolutions(small)) - set(step.quantized) == {"backbone.stem.0", "backbone.blocks.1.conv2"}
    with pytest.raises(UserError, match=r"no layer matches 'backbone.layer9.\*'; the layers are named like backbone"):
        PreparedStep(small, HEIGHT, WIDTH, precision="int8", ranges=ranges, exclude=["backbone.layer9.*"])


def test_rounded_weights_leave_the_mean_of_every_channel(torch_rtx, small):
    ranges = measured_ranges(small, HEIGHT, WIDTH)
    int8 = convolutions(PreparedStep(small, HEIGHT, WIDTH, precision="int8", ranges=ranges).network)
    exact = convolutions(PreparedStep(small, HEIGHT, WIDTH).network)
    for path, conv in int8.items():
        mean = torch.tensor(ranges.mean(path))
        rounded = conv.weight_quantizer(conv.weight).float()
        moved = ((rounded - exact[path].weight).sum((2, 3)) * mean).sum(1)
        left = conv.bias.float() + moved - exact[path].bias
        # What is left is FP16's own rounding.
        assert left.abs().max() < 0.15 * moved.abs().max()


def test_a_module_that_was_not_calibrated_is_named(torch_rtx, small):
    ranges = measured_ranges(small, HEIGHT, WIDTH)
    del ranges.tensors["backbone.stem.0.input"]
    with pytest.raises(UserError, match=r"backbone\.stem\.0"):
        PreparedStep(small, HEIGHT, WIDTH, precision="int8", ranges=ranges)


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "batch"), [("fp32", 1), ("fp16", 1), ("fp16", 2), ("int8", 2)])
def test_a_small_network_becomes_a_plan(torch_rtx, small, precision, batch):
    ranges = measured_ranges(small, HEIGHT, WIDTH) if precision == "int8" else None
    seen = []
    options = BuildOptions(compute_capabilities=("8.6", "8.9"), progress=lambda phase, fraction: seen.append(fraction))
    plan = build_plan_from_network(
        small, HEIGHT, WIDTH, batch=batch, precision=precision, ranges=ranges, options=options
    )
    check_tensors(plan, small, HEIGHT, WIDTH, batch=batch, dtype="float32" if precision == "fp32" else "float16")
    pairs = 2 * len(convolutions(small)) if precision == "int8" else 0
    assert (plan.definition.quantize_layers, plan.definition.dequantize_layers) == (pairs, pairs)
    assert plan.device == "sm_86,sm_89"
    assert len(plan.data) > 100_000
    assert seen[-1] == 1.0
    # What was answered for a machine without a driver is forgotten.
    assert torch.cuda.get_device_capability.__module__ == "torch.cuda"


@dataclass(frozen=True)
class Real:
    network: StreamingNetwork
    height: int
    width: int
    ranges: Ranges
    states: int


@pytest.fixture(scope="module", params=["the default network", "r50"])
def real(request):
    if request.param == "r50":
        network, height, width, states = random_weights("r50").network("stsm_online"), 224, 224, 16 + 3
    else:
        network, spec = load_model(SHIPPED)
        height, width, states = spec.height, spec.width, 9 + 3
    return Real(network, height, width, measured_ranges(network, height, width), states)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_real_networks_become_plans_through_both_frontends(torch_rtx, real, tmp_path, precision):
    size = (real.height, real.width)
    count = len(convolutions(real.network))
    plan = build_plan_from_network(real.network, *size, precision=precision, ranges=real.ranges, options=BuildOptions())
    check_tensors(plan, real.network, *size)
    assert len(plan.definition.inputs) == 1 + real.states
    pairs = 2 * count if precision == "int8" else 0
    assert (plan.definition.quantize_layers, plan.definition.dequantize_layers) == (pairs, pairs)
    assert len(plan.data) > sum(conv.weight.numel() for conv in convolutions(real.network).values())

    parsed = build_plan(torch_rtx, typed_graph(real, precision, tmp_path / "step.onnx"), BuildOptions())
    check_tensors(parsed, real.network, *size)
    # Here weights are stored as integers and only dequantized; convolutions that read the same tensor share its pair.
    quantized = parsed.definition.quantize_layers
    assert count * 0.9 < quantized <= count if precision == "int8" else quantized == 0
    assert parsed.definition.dequantize_layers == (quantized + count if precision == "int8" else 0)
    assert 0.5 < len(parsed.data) / len(plan.data) < 2


def typed_graph(real, precision, path):
    """The same step as a strongly typed ONNX graph, which ``build_engine`` reads on a device without torch."""
    network = copy.deepcopy(real.network).half()
    export_onnx(network, path, height=real.height, width=real.width)
    if precision == "int8":
        onnx.save(quantize(onnx.load(path), real.ranges, FORMS["onnx"]), path)
    return path


def test_a_target_that_cannot_be_built_for_is_refused_first(torch_rtx, small):
    with pytest.raises(UserError, match=r"builds for the compute capabilities 7\.5, .*not '8\.7'"):
        build_plan_from_network(
            small, HEIGHT, WIDTH, precision="fp32", options=BuildOptions(compute_capabilities=("8.7",))
        )


@pytest.mark.slow
def test_a_build_that_fails_gives_tensorrts_reason(torch_rtx, small):
    options = BuildOptions(compute_capabilities=("7.5",))
    with pytest.raises(UserError, match=r"cannot build a plan from the network: .*for Turing") as caught:
        build_plan_from_network(small, HEIGHT, WIDTH, precision="fp32", options=options)
    assert "\n" not in str(caught.value)


def test_an_operator_that_torch_tensorrt_does_not_know_is_one_sentence(torch_rtx, capfd):
    class Unknown(nn.Module):
        quantized = ()
        arguments = (torch.zeros(1, 3),)
        input_names = ("frame",)
        output_names = ("logits",)

        def forward(self, x):
            return (torch.special.bessel_j0(x),)

    with pytest.raises(UserError, match=r"Torch-TensorRT cannot convert the network: .*bessel_j0") as caught:
        convert(torch_rtx, Unknown().eval(), BuildOptions())
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err
