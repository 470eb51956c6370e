from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stsm_rt import cli
from stsm_rt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def python(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, env=environment)


def test_inspect_prints_what_an_engine_is(tiny_engine, capsys):
    assert cli.main(["inspect", str(tiny_engine.path)]) == 0
    out = capsys.readouterr().out
    assert "tsm_online" in out and "blue" in out and tiny_engine.manifest.sha256 in out


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_help_names_every_command(arguments, capsys):
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


@pytest.mark.parametrize("name", ["webcam", "evaluate", "inspect", "bench", "build-engine"])
def test_a_command_explains_its_options(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--help"])
    assert exit.value.code == 0
    assert f"stsm-rt {name}" in capsys.readouterr().out


def test_a_wrong_path_is_one_sentence_and_exit_code_2(tmp_path: Path):
    for arguments in (
        ["inspect", "no.onnx"],
        ["bench", "--engine", "no.onnx"],
        ["evaluate", "--engine", "no.onnx", "--rooms", "1"],
        ["swim"],
    ):
        result = python("-m", "stsm_rt.cli", *arguments, cwd=tmp_path)
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.startswith("stsm-rt: error: ") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_command_is_answered_with_the_known_ones(capsys):
    assert cli.main(["swim"]) == 2
    error = capsys.readouterr().err
    assert "'swim'" in error and "webcam" in error and "export" in error


def test_a_user_error_that_a_command_raises_is_reported(monkeypatch, capsys):
    def fail(argv):
        raise UserError("a spec was expected")

    monkeypatch.setattr("stsm_rt.bench.main", fail)
    assert cli.main(["bench"]) == 2
    assert capsys.readouterr().err == "stsm-rt: error: a spec was expected\n"


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [("train", "torch", "train"), ("export", "torch", "build"), ("calibrate", "onnx", "build")],
)
def test_a_command_says_what_to_install_when_a_package_is_absent(name, package, extra, tmp_path: Path):
    absent = f"import sys; sys.modules['{package}'] = None"
    code = f"{absent}; from stsm_rt import cli; sys.exit(cli.main(['{name}', '-h']))"

    result = python("-c", code, cwd=tmp_path)

    assert result.returncode == 2
    assert result.stderr == (
        f"stsm-rt: error: stsm-rt {name} needs {package}, which is not installed; run: pip install 'stsm-rt[{extra}]'\n"
    )


def test_running_an_engine_imports_no_torch(tmp_path: Path):
    modules = "cli, evaluate, bench, inspect, webcam, recognizer, build_engine, engine.onnxruntime, engine.tensorrt"
    code = (
        "import importlib, sys\n"
        f"for name in '{modules}'.split(', '): importlib.import_module('stsm_rt.' + name)\n"
        "heavy = {'torch', 'torchvision', 'onnx', 'safetensors', 'PIL', 'scipy'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    result = python("-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_module_that_is_not_installed_is_named_also_where_train_is_run_as_a_module():
    code = "import runpy, sys; sys.modules['torch'] = None; sys.argv[1:] = ['recipe.toml']"
    code += "; runpy.run_module('stsm_rt.train', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == (
        "stsm-rt: error: stsm-rt train needs torch, which is not installed; run: pip install 'stsm-rt[train]'\n"
    )
