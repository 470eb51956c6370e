PYTHON ?= python3
# Two environments: a small one as a user has it, and one with torch for tests, training and export.
VENV ?= .venv
DEV_VENV ?= .venv-dev
RTX_VENV ?= .venv-rtx
RTX_TESTS := tests/test_tensorrt_library.py tests/test_tensorrt_build.py tests/test_torch_tensorrt_frontend.py \
	tests/test_driverless.py tests/test_build_engine.py
PYTEST_ARGS ?=
DEMO_ARGS ?=
ENGINE ?= engines/actions_lite0_fp32.onnx

SOURCES := pyproject.toml $(wildcard stsm_rt/*.py stsm_rt/*/*.py engines/actions_*)

.PHONY: demo test test-folders test-files test-rtx setup-rtx lint bench engines gpu-check clean

# The camera if there is one, else the sample clip, which leaves the annotated video and the events in out/.
demo: $(VENV)/.ready
	@mkdir -p out
	@if $(VENV)/bin/python -c 'import sys, cv2; sys.exit(not cv2.VideoCapture(0).isOpened())' 2>/dev/null; \
	then set --; else set -- --save out/sample.mp4 --events out/sample.jsonl; fi; \
	$(VENV)/bin/python demo/webcam.py "$$@" $(DEMO_ARGS)

# Two processes with one thread each, about equally long: most tests wait or compute on one core. 5: no test was chosen.
# OpenVINO and PyTorch's loader of data, which handles SIGCHLD, do not go together: the kernel ends such a process.
test: $(DEV_VENV)/.ready
	@$(MAKE) --no-print-directory --jobs 2 --output-sync=target test-folders test-files

test-folders:
	OMP_NUM_THREADS=1 $(DEV_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/app tests/gpu tests/train tests/video || [ $$? = 5 ]

test-files:
	OMP_NUM_THREADS=1 $(DEV_VENV)/bin/python -m pytest $(PYTEST_ARGS) tests/engine tests/test_*.py || [ $$? = 5 ]

# TensorRT-RTX builds plans without a GPU. Two steps, because torch-tensorrt-rtx asks for an older TensorRT-RTX, which
# refuses INT8 convolutions; no list of requirements can say that.
setup-rtx: $(RTX_VENV)/.ready

test-rtx: $(RTX_VENV)/.ready
	STSM_RTX=1 $(RTX_VENV)/bin/python -m pytest $(PYTEST_ARGS) $(RTX_TESTS)

lint: $(DEV_VENV)/.ready
	$(DEV_VENV)/bin/ruff format --check .
	$(DEV_VENV)/bin/ruff check .
	$(DEV_VENV)/bin/mypy

bench: $(VENV)/.ready
	mkdir -p out
	$(VENV)/bin/python -m stsm_rt.bench --engine $(ENGINE) --engine engines/actions_lite0_int8.onnx --json out/bench.json

engines: $(DEV_VENV)/.ready
	$(DEV_VENV)/bin/python -m stsm_rt.export --weights engines/actions_lite0.safetensors --out $(ENGINE) \
		--measured engines/reports/actions_lite0_fp32.json
	$(DEV_VENV)/bin/python -m stsm_rt.build_engine --runtime onnxruntime --int8 \
		--weights engines/actions_lite0.safetensors --calibration calibration/actions_lite0.json \
		--measured engines/reports/actions_lite0_int8.json --out engines/actions_lite0_int8.onnx
	$(DEV_VENV)/bin/python -m stsm_rt.export --weights engines/actions_lite0.safetensors --precision fp16 \
		--out engines/actions_lite0_fp16_tensorrt.onnx
	$(DEV_VENV)/bin/python -m stsm_rt.export --weights engines/actions_lite0.safetensors --precision int8 \
		--calibration calibration/actions_lite0.json --out engines/actions_lite0_int8_tensorrt.onnx
	$(DEV_VENV)/bin/python -m stsm_rt.model_card --weights engines/actions_lite0.safetensors --out engines/actions_lite0.md \
		--measured engines/reports/actions_lite0_fp32.json --silence engines/reports/actions_lite0_fp32_silence.json \
		--int8 engines/reports/actions_lite0_int8.json --comparison engines/reports/actions_lite0_shifts.jsonl

# Installs nothing: it runs with the PyTorch that the machine's own python3 has.
gpu-check:
	@chip=$$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1 | tr 'A-Z /' 'a-z--'); \
	$(PYTHON) -m stsm_rt.gpu_check --json "benchmarks/gpu-check-$${chip:-unknown}.json"

clean:
	rm -rf $(VENV) $(DEV_VENV) $(RTX_VENV) out build dist

# Of sports2d only the clip is used, which any Python can play.
$(VENV)/.ready: $(SOURCES)
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet .
	$(VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python sports2d==0.8.34
	touch $@

RTX_VERSION := 1.7.1.116
$(RTX_VENV)/.ready: pyproject.toml
	test -x $(RTX_VENV)/bin/python || $(PYTHON) -m venv $(RTX_VENV)
	$(RTX_VENV)/bin/python -m pip install --quiet 'torch>=2.14,<2.15' torchvision==0.29.1 torch-tensorrt-rtx==2.14.0
	$(RTX_VENV)/bin/python -m pip install --quiet --no-deps tensorrt-rtx==$(RTX_VERSION) \
		tensorrt-rtx-cu13==$(RTX_VERSION) tensorrt-rtx-cu13-bindings==$(RTX_VERSION) tensorrt-rtx-cu13-libs==$(RTX_VERSION)
	$(RTX_VENV)/bin/python -m pip install --quiet nvidia-modelopt requests huggingface_hub transformers
	$(RTX_VENV)/bin/python -m pip install --quiet --editable '.[build]' cuda-bindings pytest pytest-timeout hypothesis
	touch $@

$(DEV_VENV)/.ready: pyproject.toml
	test -x $(DEV_VENV)/bin/python || $(PYTHON) -m venv $(DEV_VENV)
	$(DEV_VENV)/bin/python -m pip install --quiet --editable '.[dev,train,build,ui,live]'
	$(DEV_VENV)/bin/python -m pip install --quiet --no-deps --ignore-requires-python sports2d==0.8.34
	touch $@
