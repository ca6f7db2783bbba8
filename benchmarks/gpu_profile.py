"""One kernel at BERT-base's shape, launched a few times: what Nsight Compute reads counters of.

ncu --clock-control none ... python -m benchmarks.gpu_profile NAME
"""

from __future__ import annotations

import functools
import sys

import torch

from . import calls
from .calls import Call

_BF16 = torch.bfloat16
_ATTENTION = functools.partial(calls.attention, 12, 64, _BF16, 512)

# name -> the call; the first launches of each warm it up.
CALLS: dict[str, Call] = {
    "attention forward": functools.partial(_ATTENTION, 0.0, False),
    "attention forward, p=0.1": functools.partial(_ATTENTION, 0.1, False),
    "attention backward": functools.partial(_ATTENTION, 0.0, True),
    "attention backward, p=0.1": functools.partial(_ATTENTION, 0.1, True),
    "bias_gelu forward": functools.partial(calls.bias_gelu, 3072, _BF16, "none", False),
    "bias_gelu backward": functools.partial(calls.bias_gelu, 3072, _BF16, "none", True),
    "linear_gelu": functools.partial(calls.linear_gelu, 3072, 768, _BF16, calls.TOKENS, False),
    "layer_norm backward": functools.partial(calls.layer_norm, 768, _BF16, True),
}
_SECTIONS = ("SpeedOfLight", "Occupancy", "LaunchStats", "WarpStateStats", "MemoryWorkloadAnalysis", "InstructionStats")
OPTIONS = (
    *(f"--section={name}" for name in _SECTIONS),
    "--profile-from-start=off",
    "--kernel-name=regex:.*_kernel",
)


def main() -> None:
    call = CALLS[sys.argv[1]](torch.device("cuda"))
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    call()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
