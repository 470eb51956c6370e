"""Serve the page for uploads and cameras; the same as the command `stsm-rt app`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from stsm_rt.app.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
