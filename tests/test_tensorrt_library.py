"""Without TensorRT: stand-in packages show how versions are told apart. With TensorRT-RTX: the real package."""

from __future__ import annotations

import ctypes
import enum
import sys
import types

import pytest

from stsm_rt import tensorrt_library
from stsm_rt.errors import UserError
from stsm_rt.tensorrt_library import (
    create_network,
    device_compute_capability,
    error_log,
    first_reason,
    load_tensorrt,
    plan_device,
    rtx_targets,
)


@pytest.fixture
def install(monkeypatch):
    """Put a stand-in for ``tensorrt`` of some version among the modules."""

    def stand_in(version, package="tensorrt", **members):
        module = types.ModuleType("tensorrt")
        module.__package__ = package
        module.__version__ = version
        for name, value in members.items():
            setattr(module, name, value)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        return module

    return stand_in


@pytest.fixture
def on_an_orin(monkeypatch):
    monkeypatch.setattr(tensorrt_library, "device_compute_capability", lambda: "8.7")


@pytest.fixture
def nothing_installed(monkeypatch):
    for package in ("tensorrt", "tensorrt_rtx"):
        monkeypatch.setitem(sys.modules, package, None)


def test_tensorrt_is_preferred_to_rtx(install):
    install("10.3.0")
    found = load_tensorrt()
    assert (found.runtime, found.version, found.name) == ("tensorrt", "10.3.0", "TensorRT 10.3.0")


def test_a_missing_package_is_told_with_how_to_install_it(nothing_installed):
    with pytest.raises(UserError, match=r"tensorrt is not installed.*JetPack.*; .*tensorrt_rtx is not installed.*RTX"):
        load_tensorrt()
    with pytest.raises(UserError, match=r"tensorrt_rtx is not installed.*pip install tensorrt-rtx"):
        load_tensorrt("tensorrt-rtx")


def test_rtx_under_the_name_of_tensorrt_is_not_tensorrt(install):
    # What importing Torch-TensorRT for RTX leaves behind.
    install("1.7.1", package="tensorrt_rtx")
    with pytest.raises(UserError, match="the module tensorrt is tensorrt_rtx"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize("version", ["8.6.1", "10.2.0", "12.0.0"])
def test_versions_that_are_not_supported_are_refused(install, version):
    install(version)
    with pytest.raises(UserError, match=f"10.3 to 11.x is supported, not {version}"):
        load_tensorrt("tensorrt")


@pytest.mark.parametrize("version", ["10.3.0", "10.13.3.9", "11.4.1"])
def test_supported_versions_load(install, version):
    install(version)
    assert load_tensorrt("tensorrt").version == version


def test_an_unknown_runtime_is_refused():
    with pytest.raises(UserError, match="tensorrt or tensorrt-rtx, not 'openvino'"):
        load_tensorrt("openvino")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [({"EXPLICIT_BATCH": 0, "STRONGLY_TYPED": 1}, 0b10), ({"STRONGLY_TYPED": 0}, 0b1), ({"OTHER": 0}, 0)],
    ids=["10.3", "11", "a later one where it is the only way"],
)
def test_networks_are_strongly_typed_in_every_version(install, flags, expected):
    install("10.3.0", NetworkDefinitionCreationFlag=enum.IntEnum("Flag", flags))
    builder = types.SimpleNamespace(create_network=lambda flags: flags)
    assert create_network(load_tensorrt("tensorrt"), builder) == expected


def test_rtx_makes_strongly_typed_networks(rtx):
    builder = rtx.module.Builder(error_log(rtx))
    network = create_network(rtx, builder)
    assert network.get_flag(rtx.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def test_there_is_one_error_log(rtx):
    assert error_log(rtx) is error_log(load_tensorrt("tensorrt-rtx"))


def test_rtx_names_its_targets(rtx):
    assert {"7.5", "8.6", "8.9", "12.0"} <= set(rtx_targets(rtx))


@pytest.mark.parametrize(
    ("asked", "device"), [((), "sm_80+"), (("8.6",), "sm_86"), (("8.6", "12.0", "8.6"), "sm_86,sm_120")]
)
def test_what_a_plan_of_rtx_runs_on(rtx, asked, device):
    assert plan_device(rtx, asked, False) == device


def test_rtx_refuses_targets_that_it_lacks(rtx):
    with pytest.raises(UserError, match=r"7\.5, .*8\.6, 8\.9.*, not '8\.7'"):
        plan_device(rtx, ("8.6", "8.7"), False)


def test_rtx_has_no_hardware_compatible_plans(rtx):
    with pytest.raises(UserError, match="no hardware-compatible plans"):
        plan_device(rtx, (), True)


def test_tensorrt_builds_for_the_gpu_it_is_on(install, on_an_orin):
    install("10.3.0", HardwareCompatibilityLevel=enum.IntEnum("Level", {"NONE": 0, "AMPERE_PLUS": 1}))
    tensorrt = load_tensorrt("tensorrt")
    assert plan_device(tensorrt, (), False) == "sm_87"
    assert plan_device(tensorrt, ("8.7",), False) == "sm_87"
    assert plan_device(tensorrt, (), True) == "sm_80+"
    with pytest.raises(UserError, match=r"has compute capability 8\.7, not for 8\.6"):
        plan_device(tensorrt, ("8.6",), False)


def test_a_version_without_hardware_compatible_plans_says_so(install, on_an_orin):
    install("11.0.0", HardwareCompatibilityLevel=enum.IntEnum("Level", {"NONE": 0}))
    with pytest.raises(UserError, match=r"TensorRT 11\.0\.0 has no hardware-compatible plans"):
        plan_device(load_tensorrt("tensorrt"), (), True)


def test_tensorrt_without_a_gpu_says_what_to_do(install, monkeypatch):
    monkeypatch.setattr(tensorrt_library, "device_compute_capability", lambda: None)
    install("10.3.0")
    with pytest.raises(UserError, match="this machine has none that works; build there, or use tensorrt-rtx"):
        plan_device(load_tensorrt("tensorrt"), (), False)


class Driver:
    """The three functions of the CUDA driver that are asked."""

    def __init__(self, status=0):
        self.status = status

    def cuInit(self, flags):
        return self.status

    def cuDeviceGet(self, device, ordinal):
        device._obj.value = 5
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):
        assert device.value == 5
        value._obj.value = {75: 12, 76: 1}[attribute]
        return 0


def test_the_driver_tells_the_compute_capability(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    assert device_compute_capability() == "12.1"


def test_a_driver_without_a_gpu_has_no_compute_capability(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver(status=100))
    assert device_compute_capability() is None


def test_no_driver_has_no_compute_capability(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert device_compute_capability() is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:337: check_turing] Cannot compile "
            "'linear' for Turing (SM75). In compileGraph at /_src/optimizer/codeGenerator.cpp:2012)",
            "Myelin (Cannot compile 'linear' for Turing (SM75))",
        ),
        (
            "IRuntime::deserializeCudaEngine: Error Code 1: Cuda Runtime (In ScopedCudaStream at /_src/common/x.cpp:25 "
            "(cudaError 35: CUDA driver version is insufficient))",
            "Cuda Runtime",
        ),
        ("4: [network.cpp::validate::3810] Error Code 4: API Usage Error (No output)", "API Usage Error (No output)"),
        ("Out of memory.\nSecond line", "Out of memory. Second line"),
    ],
)
def test_reasons_are_without_tensorrts_own_places(message, reason):
    assert first_reason(["", message, "a later one"]) == reason


def test_no_message_is_no_reason():
    assert first_reason([]) == "it gave no reason"
