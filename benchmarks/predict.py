"""What inference should take on an H200 by its kernels' work alone: to be held against a measurement.

    python -m benchmarks.predict

Each kernel of a layer takes the longer of its FLOPs at the rate of the tensor cores and its least memory traffic at
that of the memory, both as the device's data sheet gives them; attention is stretched to whole waves of the blocks that
fit on the multiprocessors, by the registers and the shared memory that it was compiled to (``results/kernels.json``).
Neither launches nor the gaps between kernels are counted, so these are lower bounds. Writes ``results/predicted.json``,
apart from what is measured.
"""

from __future__ import annotations

import json
import math
from typing import Any

from .environment import RESULTS
from .shapes import MODELS, Batch, Model, even, full

# "NVIDIA H200 Tensor Core GPU", data sheet, 2024: SXM, BFLOAT16 Tensor Core without sparsity; memory bandwidth.
DEVICE = {"device": "NVIDIA H200 SXM", "capability": 90, "flops": 989e12, "bytes": 4.8e12, "multiprocessors": 132}
_WARPS = 64
_SIZE = 2


def kernels_of(model: Model, batch: Batch, compiled: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kernels of a forward in bfloat16, each with how often it runs, its work and its seconds."""
    tokens, hidden, intermediate, layers = batch.tokens, model.hidden, model.intermediate, model.layers
    rows = tokens * hidden * _SIZE

    def product(name: str, features: int, depth: int) -> dict[str, Any]:
        numbers = tokens * depth + features * depth + tokens * features
        return _kernel(name, layers, 2.0 * tokens * features * depth, float(numbers * _SIZE))

    weights = layers * 3 * hidden * (hidden + 1) * _SIZE
    padded = len(batch.lengths) * batch.seqlen * hidden * _SIZE
    return [
        _kernel("embeddings", 1, 0.0, 2.0 * rows),
        _kernel("joined weights", 1, 0.0, 2.0 * weights),
        product("query, key, value", 3 * hidden, hidden),
        _kernel(
            "attention",
            layers,
            sum(4.0 * hidden * n**2 for n in batch.lengths),
            4.0 * rows,
            _waves(model, batch, compiled),
        ),
        product("attention output", hidden, hidden),
        _kernel("bias, residual, LayerNorm", 2 * layers, 0.0, 3.0 * rows),
        product("linear, GELU", intermediate, hidden),
        product("output", hidden, intermediate),
        _kernel("unpacking", 1, 0.0, rows + 2.0 * padded),
    ]


def _kernel(name: str, runs: int, flops: float, traffic: float, stretch: float = 1.0) -> dict[str, Any]:
    by_flops, by_bytes = flops * stretch / DEVICE["flops"], traffic / DEVICE["bytes"]
    seconds = max(by_flops, by_bytes)
    bound = "products" if by_flops > by_bytes else "memory"
    return {"kernel": name, "runs": runs, "bound": bound, "microseconds": 1e6 * seconds, "total": 1e6 * runs * seconds}


def _waves(model: Model, batch: Batch, compiled: list[dict[str, Any]]) -> float:
    """How much longer whole waves of blocks take than the blocks themselves would."""
    keys = next((size for size in (32, 64, 128) if batch.seqlen <= size), None)
    tile = f"BLOCK_M={keys}, BLOCK_N={keys}, WHOLE" if keys else "BLOCK_M=128, BLOCK_N=64"
    wanted = ("attention", "forward_kernel", "bf16", DEVICE["capability"], f"D={model.head_size}, {tile}")
    columns = ("op", "kernel", "dtype", "capability", "what")
    found = next(row for row in compiled if tuple(row[column] for column in columns) == wanted)
    at_once = DEVICE["multiprocessors"] * int(found["occupancy"] * _WARPS) // found["options"]["num_warps"]
    blocks = model.heads * sum(math.ceil(length / (keys or 128)) for length in batch.lengths)
    return math.ceil(blocks / at_once) * at_once / blocks


def main() -> None:
    """Predict the shapes that there are targets for, and write them."""
    compiled = json.loads((RESULTS / "kernels.json").read_text("utf-8"))["kernels"]
    forwards = []
    for model in MODELS.values():
        for batch in (full(1, 128), even(64, 512, 0.5), full(64, 512)):
            kernels = kernels_of(model, batch, compiled)
            forwards.append(
                {
                    "model": model.name,
                    "batch": batch.name,
                    "dtype": "bfloat16",
                    "launches": sum(one["runs"] for one in kernels),
                    "milliseconds": sum(one["total"] for one in kernels) / 1e3,
                    "share_of_products": model.forward_flops(batch.lengths)
                    / DEVICE["flops"]
                    / (sum(one["total"] for one in kernels) / 1e6),
                    "kernels": kernels,
                }
            )
    data = {"device": DEVICE, "forwards": forwards}
    (RESULTS / "predicted.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
