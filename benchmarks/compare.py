"""Measure everything that benchmarks/RESULTS.md shows, on this machine, and write that file.

Each measurement is a command of its own, one after the other, with nothing else running; each writes a file of raw
numbers into benchmarks/results. Run it in the repository's root on a quiet machine:

    python benchmarks/make_video.py out/loop.mp4      # the loop's video, once; needs PyAV
    python benchmarks/compare.py --video out/loop.mp4
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path("benchmarks/results")
# A block of a small network is short, so it takes more of them to be as sure.
_PAIRS = {"r50": 200, "mbv2": 400, "lite0": 400}
_AGAINST = ["--against", "plain", "--against", "naive", "--against", "self"]


def measurements(video: Path | None) -> dict[str, list[str]]:
    """The commands, without Python and ``--json``, by the names of their files."""
    bench = ["-m", "stsm_rt.bench"]
    found = {}
    for network, pairs in _PAIRS.items():
        common = [*bench, "--network", network, *_AGAINST, "--pairs", str(pairs)]
        found[f"onnxruntime_fp32_{network}"] = common
        found[f"onnxruntime_int8_{network}"] = [*common, "--precision", "int8"]
    found["openvino_fp32_r50"] = [*found["onnxruntime_fp32_r50"], "--runtime", "openvino"]
    for network in ("r50", "lite0"):
        found[f"rivals_{network}"] = ["benchmarks/rivals.py", "--network", network, "--pairs", "60"]
    if video is not None:
        found["loop"] = [*bench, "--loop", str(video)]
        batches = [word for batch in (2, 4, 8) for word in ("--batch", str(batch))]
        found["cameras"] = ["benchmarks/cameras.py", "--video", str(video), *batches]
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--video", type=Path, help="640x480 H.264; without it the loop and several cameras are not measured"
    )
    parser.add_argument("--only", action="append", metavar="NAME", help="one measurement; give it again for more")
    parser.add_argument("--list", action="store_true", help="print the commands and measure nothing")
    options = parser.parse_args(argv)
    found = measurements(options.video)
    for name in options.only or ():
        if name not in found:
            parser.error(
                f"there is no measurement {name} (loop and cameras need --video); there are {', '.join(found)}"
            )
    RESULTS.mkdir(exist_ok=True)
    for name in options.only or found:
        command = [*found[name], "--json", str(RESULTS / f"{name}.json")]
        print(f"\n$ python {shlex.join(command)}", flush=True)
        if not options.list:
            subprocess.run([sys.executable, *command], check=True)
    if not options.list:
        picture = ["--plot", str(RESULTS / "ratios.png")]
        subprocess.run([sys.executable, "benchmarks/results.py", *picture], check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
