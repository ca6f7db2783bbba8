"""The whole-model peers of fastbert in inference: what prepares each, or the reason why it can't take part.

All of them compute what Hugging Face's ``BertModel`` does on the same padded batch.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

EAGER = "huggingface eager"
SDPA = "huggingface sdpa"
FLASH = "huggingface flash_attention_2"
COMPILED = "huggingface compiled"
REDUCED = "huggingface compiled, reduce-overhead"
ONNX = "onnxruntime"
OPENVINO = "openvino"

Forward = Callable[[], Tensor]


class Absent(Exception):
    """A peer can't take part; the message says why, in one sentence."""


def huggingface(
    name: str, stock: transformers.BertModel, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device
) -> Forward:
    """Hugging Face's model by the attention or the compilation that ``name`` says.

    Raises:
        Absent: the package flash-attn isn't there, or wants a GPU and 16 bits.
    """
    if name == FLASH:
        if device.type != "cuda":
            raise Absent("flash-attn's kernels run on a GPU")
        if dtype == torch.float32:
            raise Absent("flash-attn computes in 16 bits")
        if importlib.util.find_spec("flash_attn") is None:
            raise Absent("flash-attn isn't installed: pip install flash-attn --no-build-isolation")
    if name == REDUCED and device.type != "cuda":
        raise Absent("reduce-overhead replays CUDA graphs; on a processor it compiles the same as the default")
    attention = {EAGER: "eager", FLASH: "flash_attention_2"}.get(name, "sdpa")
    model: Any = copy.deepcopy(stock).to(device, dtype)
    model.set_attn_implementation(attention)
    if name in (COMPILED, REDUCED):
        torch._dynamo.reset()
        model = torch.compile(model, mode="reduce-overhead" if name == REDUCED else "default")
    # Graph replays of the next call would overwrite what reduce-overhead returns.
    return lambda: model(**inputs).last_hidden_state.clone() if name == REDUCED else model(**inputs).last_hidden_state


def openvino(stock: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> Forward:
    """OpenVINO's compiled model, told to compute in ``dtype``.

    Raises:
        Absent: it isn't installed, or the batch is on a GPU.
    """
    if device.type != "cpu":
        raise Absent("it is measured on processors")
    if importlib.util.find_spec("openvino") is None:
        raise Absent("it isn't installed: `pip install '.[peers]'` in fastbert's source tree")
    import openvino as ov

    precision = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
    hints = {
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    compiled = ov.Core().compile_model(_converted(stock), "CPU", hints)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return lambda: torch.from_numpy(compiled(arrays)[0])


@functools.lru_cache(maxsize=1)
def _converted(stock: nn.Module) -> Any:
    import openvino as ov

    return ov.convert_model(copy.deepcopy(stock), example_input=_example())


def onnxruntime(stock: nn.Module, inputs: dict[str, Tensor], dtype: torch.dtype, device: torch.device) -> Forward:
    """ONNX Runtime's session on the model as torch exports it.

    Raises:
        Absent: it or the exporter isn't installed, the batch is on a GPU, or the dtype isn't float32.
    """
    if device.type != "cpu":
        raise Absent("it is measured on processors")
    if dtype != torch.float32:
        raise Absent("its kernels for processors compute in float32 and 8 bits")
    if absent := [name for name in ("onnxruntime", "onnx", "onnxscript") if importlib.util.find_spec(name) is None]:
        raise Absent(f"{', '.join(absent)} isn't installed: `pip install '.[peers]'` in fastbert's source tree")
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Its threads would spin for a tenth of a second after each run, and halve the speed of whoever comes next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = ort.InferenceSession(str(_exported(stock)), options, providers=["CPUExecutionProvider"])
    arrays = {name: value.numpy() for name, value in inputs.items()}
    return lambda: torch.from_numpy(session.run(["last_hidden_state"], arrays)[0])


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Kept for as long as the process runs: sessions map what is in it."""
    return tempfile.TemporaryDirectory(prefix="fastbert-onnx-")


@functools.lru_cache(maxsize=1)
def _exported(stock: nn.Module) -> Path:
    path = Path(_folder().name) / "model.onnx"
    sizes = {0: "batch", 1: "sequence"}
    example = _example()
    with torch.no_grad():
        torch.onnx.export(
            copy.deepcopy(stock),
            (),
            path,
            kwargs=example,
            input_names=list(example),
            output_names=["last_hidden_state", "pooler_output"],
            dynamic_shapes={name: sizes for name in example},
            dynamo=True,
            verbose=False,
        )
    return path


def _example() -> dict[str, Tensor]:
    """Inputs to trace with: more than one sequence, and of a length that isn't the batch's."""
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    return {"input_ids": torch.arange(1000, 1016).view(2, 8) * mask, "attention_mask": mask}
