"""The host kernels for one of the sets of instructions that the extension chooses from."""

import pytest
import torch

from fastbert.backends import extension, host_linear


def use(name, monkeypatch):
    """Have "AVX2", "AVX512" or "AMX" used, or skip where it can't be; gives the dtype that it computes in."""
    dtype = torch.bfloat16 if name == "AMX" else torch.float32
    if reason := host_linear.missing(dtype):
        pytest.skip(reason)
    code = getattr(extension.module(), name)
    if dtype == torch.float32 and code > extension.module().simd_level():
        pytest.skip(f"this processor has no {name}")
    monkeypatch.setattr(host_linear, "instructions", lambda dtype: code)
    return dtype
