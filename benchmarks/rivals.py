"""Time one decision of a streaming network against other ways to reach one, in one run.

- the plain 2D network's step, the step with the shift as slices and pads, as others export it, and the step as we ship
  it;
- the clip recomputed for every decision, as mmaction2 and jetson-inference do it: the last 8 frames as a batch through
  the same 2D network, the same shift between them;
- a 3D network of torchvision, r3d_18, on 16 frames of 112x112, the size that it was made for;
- the step run eagerly by PyTorch.

All but the last are run by ONNX Runtime with the same threads.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from torchvision.models.video import r3d_18

from stsm_rt.bench_build import Subject, subject_of_network
from stsm_rt.engine import Engine
from stsm_rt.engine.host import physical_cores
from stsm_rt.engine.torch import TorchEngine
from stsm_rt.errors import UserError, report
from stsm_rt.machine import Quiet, machine, machine_lines, quiet_line, versions
from stsm_rt.manifest import sha256_of
from stsm_rt.networks import StreamingNetwork
from stsm_rt.timing import Candidate, Run, Times, compare, engine_candidates, engine_run, time_in_turns

CLIP_FRAMES = 8
VIDEO_FRAMES, VIDEO_SIZE = 16, 112
# A decision of a clip or of a 3D network takes as long as many steps.
_SLOW = {"warm_up": 1, "counted": 2}


class ClipForm(nn.Module):
    """One decision from the last frames: all of them through the network, the mean of their logits.

    Args:
        network: In evaluation mode.
    """

    def __init__(self, network: StreamingNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 (T, H, W, 3) -> (1, K)."""
        return self.network(frames[None]).mean(1)


def export_clip(network: StreamingNetwork, path: Path, height: int, width: int) -> None:
    """Write the clip form of `CLIP_FRAMES` frames as an ONNX graph."""
    _export(ClipForm(network), torch.zeros(CLIP_FRAMES, height, width, 3, dtype=torch.uint8), path)


def export_video_network(path: Path) -> None:
    """Write torchvision's r3d_18 with random weights as an ONNX graph."""
    _export(r3d_18().eval(), torch.zeros(1, 3, VIDEO_FRAMES, VIDEO_SIZE, VIDEO_SIZE), path)


def _export(network: nn.Module, example: Tensor, path: Path) -> None:
    with torch.no_grad():
        program = torch.export.export(network, (example,), strict=False)
        torch.onnx.export(program, opset_version=20, dynamo=True, verbose=False).save(path)


def onnx_decision(path: Path) -> Callable[[], object]:
    """What makes one decision with a graph of one input and one output, on noise, as the engine runs its steps."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = physical_cores()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (taken,), (given,) = session.get_inputs(), session.get_outputs()
    noise = np.random.default_rng(0).integers(0, 256, taken.shape, np.uint8)
    array = noise if taken.type == "tensor(uint8)" else noise.astype(np.float32) / 128 - 1
    values = [onnxruntime.OrtValue.ortvalue_from_numpy(item) for item in (array, np.empty(given.shape, np.float32))]
    binding = session.io_binding()
    binding.bind_ortvalue_input(taken.name, values[0])
    binding.bind_ortvalue_output(given.name, values[1])
    # The default keeps what is bound alive.
    return lambda values=values: session.run_with_iobinding(binding)


def time_rivals(subject: Subject, pairs: int, folder: Path) -> tuple[list[Run], list[tuple[str, str]]]:
    """Time them all in turns.

    Args:
        subject: The streaming network, FP32 for ONNX Runtime.
        pairs: Number of blocks of each.
        folder: Where to build.

    Returns:
        The runs, and the names of those to compare, a and b.
    """
    spec = subject.weights.spec
    group = subject.group(["plain", "naive"], folder)
    ours = group.contenders[group.subject].name
    shifted = subject.weights.network(subject.shift["name"])
    clip, video = folder / "clip.onnx", folder / "video.onnx"
    export_clip(shifted, clip, spec.height, spec.width)
    export_video_network(video)
    torch.set_num_threads(physical_cores())

    engines = {contender.name: Engine.open(contender.path) for contender in group.contenders}
    engines[f"{spec.network} fp32 pytorch eager {subject.shift['name']}"] = TorchEngine(shifted, spec, device="cpu")
    name = f"{spec.network} fp32 onnxruntime {subject.shift['name']} clip of {CLIP_FRAMES} frames"
    slow = {
        name: (clip, spec.network, subject.shift["name"], (spec.height, spec.width)),
        f"r3d_18 fp32 onnxruntime clip of {VIDEO_FRAMES} frames": (video, "r3d_18", "none", (VIDEO_SIZE, VIDEO_SIZE)),
    }
    candidates = [
        *engine_candidates(list(engines.values())),
        *(Candidate(step=onnx_decision(path), **_SLOW) for path, *_ in slow.values()),
    ]
    times = time_in_turns(candidates, pairs)
    runs = [engine_run(engine, name, blocks) for (name, engine), blocks in zip(engines.items(), times, strict=False)]
    for (name, (path, network, shift, size)), blocks in zip(slow.items(), times[len(engines) :], strict=True):
        about = {"engine": name, "runtime": "onnxruntime", "network": network, "shift": shift, "folding": "none"}
        runs.append(Run(**vars(Times.of(blocks)), **about, precision="fp32", input=size, sha256=sha256_of(path)))
    compared = [(group.contenders[a].name, group.contenders[b].name) for a, b in group.compared]
    return runs, [*compared, *((run.engine, ours) for run in runs[len(group.contenders) :])]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="lite0", help="default: lite0")
    parser.add_argument("--shift", default="stsm_online", help="default: stsm_online")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of random weights' input")
    parser.add_argument("--pairs", type=int, default=30, help="blocks of each (default: 30)")
    parser.add_argument("--json", type=Path, required=True, metavar="OUT", help="write all numbers here")
    options = parser.parse_args(arguments)
    size = tuple(options.size) if options.size else None
    try:
        subject = subject_of_network(
            options.network, runtime="onnxruntime", precision="fp32", shift=options.shift, size=size
        )
        record = {
            "command": shlex.join(["python", "benchmarks/rivals.py", *arguments]),
            "machine": machine(),
            "versions": versions(),
        }
        print("\n".join(machine_lines(record)), flush=True)
        quiet = Quiet()
        with tempfile.TemporaryDirectory() as folder:
            runs, compared = time_rivals(subject, options.pairs, Path(folder))
    except UserError as error:
        return report(error)
    record["machine"]["quiet"] = quiet.record()
    named = {run.engine: run for run in runs}
    comparisons = [compare(named[a], named[b]) for a, b in compared]
    for run in runs:
        print(f"{run.engine}: {1000 * run.median:.2f} ms, p95 {1000 * run.p95:.2f} ms")
    print("\n".join(comparison.line() for comparison in comparisons))
    print(quiet_line(record["machine"]["quiet"]))
    record |= {"runs": list(map(asdict, runs)), "comparisons": list(map(asdict, comparisons))}
    options.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
