from __future__ import annotations

import pytest
import torch

from stsm_rt.driverless import device_queries_answered, exportable_quantizers

QUERIES = ("current_device", "get_device_capability", "mem_get_info")


def test_queries_are_answered_inside_the_block_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = [getattr(torch.cuda, name) for name in QUERIES]
    with device_queries_answered():
        assert torch.cuda.current_device() == 0
        assert torch.cuda.get_device_capability() == (8, 6)
        free, total = torch.cuda.mem_get_info()
        assert free == total > 0
    assert [getattr(torch.cuda, name) for name in QUERIES] == before


def test_queries_are_as_before_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.cuda.current_device
    with pytest.raises(RuntimeError, match="inside"), device_queries_answered():
        raise RuntimeError("inside")
    assert torch.cuda.current_device is before


def test_a_machine_with_a_gpu_answers_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = [getattr(torch.cuda, name) for name in QUERIES]
    with device_queries_answered():
        assert [getattr(torch.cuda, name) for name in QUERIES] == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_nothing_but_queries_works_without_a_gpu():
    with device_queries_answered(), pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(1, device="cuda")


def test_quantizers_export_from_the_cpu():
    tensor_quant = pytest.importorskip("modelopt.torch.quantization.tensor_quant")
    before = (tensor_quant.fake_quant_impl, tensor_quant._tensor_quant)

    class Quantized(torch.nn.Module):
        def forward(self, x):
            return tensor_quant.fake_tensor_quant(x, torch.tensor(2.0), None, 8, False, False)

    x = torch.tensor([-3.0, -0.7, 0.0, 0.7, 3.0])
    with exportable_quantizers(x.device):
        program = torch.export.export(Quantized(), (x,), strict=False)
        values = program.module()(x)
    assert any(node.target is torch.ops.tensorrt.quantize_op.default for node in program.graph.nodes)
    step = 2 / 127
    torch.testing.assert_close(values, (x / step).round().clamp(-128, 127) * step)
    assert (tensor_quant.fake_quant_impl, tensor_quant._tensor_quant) == before
