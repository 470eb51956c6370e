"""``python -m stsm_rt.train`` is ``stsm-rt train``, which also says what is not installed."""

from __future__ import annotations

import sys

from stsm_rt import cli

if __name__ == "__main__":
    sys.exit(cli.main(["train", *sys.argv[1:]]))
