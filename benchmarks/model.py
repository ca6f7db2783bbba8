"""BERT-base inference on the CPU: fastbert against Hugging Face's sdpa, and OpenVINO where it is installed.

    python -m benchmarks.model [--seconds 20] [--dtype float32] [--dtype bfloat16] [--write DEVICE]

Each row is one run: the contestants in turn on the same padded batch, the padding ratio, the error of each, and the
floor, which is the time that the matrix products of the valid tokens take at the rate of a large product measured in
the same run. A result that fails its parity gate gets no speed-up.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastbert
from benchmarks import harness
from fastbert.backends import amx, onednn

# (batch, sequence, share of valid tokens)
SHAPES = ((16, 128, 0.64), (16, 128, 1.0), (1, 128, 1.0))


def lengths(batch: int, seqlen: int, share: float) -> Tensor:
    """Sequence lengths whose sum is ``share`` of ``batch * seqlen``, spread evenly, the longest ``seqlen``."""
    if share == 1.0:
        return torch.full((batch,), seqlen)
    shortest = round(seqlen * (2 * share - 1))
    spread = torch.linspace(shortest, seqlen, batch).round().long()
    return spread[torch.randperm(batch, generator=torch.Generator().manual_seed(0))]


def make_batch(batch: int, seqlen: int, share: float, vocab_size: int) -> dict[str, Tensor]:
    """Random ids, right-padded."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.arange(seqlen) < lengths(batch, seqlen, share)[:, None]
    ids = torch.randint(1000, vocab_size, (batch, seqlen), generator=generator)
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def run(
    shape: tuple[int, int, float], dtype: torch.dtype, models: dict[str, nn.Module], seconds: float
) -> dict[str, Any]:
    """One row: times, errors and the floor."""
    reference = models["oracle"]
    inputs = make_batch(*shape, reference.config.vocab_size)
    valid = inputs["attention_mask"].bool()
    contestants: dict[str, Callable[[], Tensor]] = {
        "huggingface": lambda: models["huggingface"](**inputs).last_hidden_state,
        "fastbert": lambda: models["fastbert"](**inputs).last_hidden_state,
    }
    if openvino := _openvino(models["stock"], inputs, dtype):
        contestants["openvino"] = openvino
    with torch.inference_mode():
        exact = reference(**inputs).last_hidden_state[valid]
        errors = {name: (call().double()[valid] - exact).abs().max().item() for name, call in contestants.items()}
        timings = harness.interleave(contestants, seconds)
        rate = product_rate(int(valid.sum()), reference.config, dtype)
    passed = {
        name: errors[name] <= 2 * errors["huggingface"] + torch.finfo(dtype).eps * exact.abs().max().item()
        for name in errors
    }
    flops = forward_flops(reference.config, inputs["attention_mask"].sum(1))
    return {
        "batch": shape[0],
        "seqlen": shape[1],
        "valid": valid.float().mean().item(),
        "dtype": str(dtype).removeprefix("torch."),
        "error": errors,
        "parity": passed,
        "milliseconds": {name: vars(timing) for name, timing in timings.items()},
        "speedup": {
            peer: timings[peer].median / timings["fastbert"].median
            for peer in timings
            if peer != "fastbert" and passed["fastbert"]
        },
        "product_gflops": rate / 1e9,
        "floor_milliseconds": 1e3 * flops / rate,
    }


def forward_flops(config: transformers.BertConfig, lengths: Tensor) -> float:
    """FLOPs of the encoder on the valid tokens: 2L(4H² + 2HI) a token and 4LHn for attention over n tokens."""
    hidden, intermediate, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    tokens = float(lengths.sum())
    attention = 4.0 * layers * hidden * float(lengths.square().sum())
    return 2.0 * layers * (4 * hidden**2 + 2 * hidden * intermediate) * tokens + attention


def product_rate(tokens: int, config: transformers.BertConfig, dtype: torch.dtype) -> float:
    """FLOP/s of the best product that there is of the shape of the intermediate layer."""
    x = torch.randn(tokens, config.hidden_size, dtype=dtype)
    weight = torch.randn(config.intermediate_size, config.hidden_size, dtype=dtype)
    calls: dict[str, Callable[[], object]] = {"linear": lambda: torch.nn.functional.linear(x, weight)}
    if onednn.missing(dtype) is None:
        packed = onednn.pack(weight)
        calls["oneDNN"] = lambda: onednn.linear(x, packed, None)
    if amx.missing(dtype) is None:
        tiles = amx.pack(weight)
        calls["AMX"] = lambda: amx.linear(x, tiles, None)
    best = min(timing.p20 for timing in harness.interleave(calls, seconds=1.0).values())
    return 2e3 * x.numel() * config.intermediate_size / best


def _openvino(model: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype) -> Callable[[], Tensor] | None:
    try:
        import openvino
    except ImportError:
        return None
    example = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    converted = openvino.convert_model(copy.deepcopy(model), example_input=example)
    names = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
    compiled = openvino.Core().compile_model(
        converted,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": names[dtype],
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        },
    )
    arrays = {name: value.numpy() for name, value in example.items()}
    return lambda: torch.from_numpy(compiled(arrays)[0])


def show(rows: list[dict[str, Any]]) -> None:
    """Print the rows as a table."""
    table = Table("shape", "valid", "dtype", "contestant", "ms (p20–p80)", "error", "fastbert is faster by", "of floor")
    for row in rows:
        for name, timing in row["milliseconds"].items():
            speedup = row["speedup"].get(name)
            table.add_row(
                f"{row['batch']}×{row['seqlen']}",
                f"{row['valid']:.0%}",
                row["dtype"],
                name,
                f"{timing['median']:.1f} ({timing['p20']:.1f}–{timing['p80']:.1f})",
                f"{row['error'][name]:.1e}" + ("" if row["parity"][name] else " FAILS"),
                f"{speedup:.2f}×" if speedup else "",
                f"{row['floor_milliseconds'] / timing['median']:.0%}",
            )
    Console(width=140).print(table)


def main() -> None:
    """Run every shape in every dtype."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="time for each row")
    parser.add_argument("--dtype", action="append", choices=["float32", "bfloat16"], help="may be repeated")
    parser.add_argument("--write", metavar="DEVICE", help="write benchmarks/results/DEVICE/model.json")
    arguments = parser.parse_args()
    environment = harness.environment()
    torch.manual_seed(0)
    stock = transformers.BertModel(transformers.BertConfig()).eval()
    rows = []
    for name in arguments.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        models = {
            "oracle": copy.deepcopy(stock).double(),
            "stock": stock,
            "huggingface": copy.deepcopy(stock).to(dtype),
            "fastbert": fastbert.accelerate(copy.deepcopy(stock).to(dtype), strict=True),
        }
        rows += [run(shape, dtype, models, arguments.seconds) for shape in SHAPES]
    print(environment)
    show(rows)
    if arguments.write:
        data = {"model": "BERT-base, random weights", "environment": environment, "rows": rows}
        print(harness.write(arguments.write, "model", data))


if __name__ == "__main__":
    main()
