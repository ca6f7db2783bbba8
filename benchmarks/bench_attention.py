"""Attention within packed sequences, and PyTorch's on the padded batch."""

from __future__ import annotations

import functools
import importlib

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastbert import ops

from .harness import Contest
from .shapes import DOCUMENTS, MODELS, SENTENCES, Batch, Model, drawn, even, full
from .suite import TORCH, Case, Peer, op_cases, op_contest

_FLASH = "flash-attn"
# PyTorch's attention held to one of its kernels; neither takes the mask of a padded batch.
_PINNED = {"torch sdpa, flash": SDPBackend.FLASH_ATTENTION, "torch sdpa, cuDNN": SDPBackend.CUDNN_ATTENTION}
_PEERS = (_FLASH, *_PINNED)


def cases(device: str) -> list[Case]:
    base = MODELS["BERT-base"]
    shapes: list[tuple[Model, Batch]]
    if device == "cpu":
        padded = even(16, 128, 0.64)
        shapes = [(model, padded) for model in MODELS.values()]
        shapes += [(base, drawn("sentences", 32, SENTENCES)), (base, drawn("documents", 4, DOCUMENTS))]
    else:
        shapes = [(model, full(64, 512)) for model in MODELS.values()]
        shapes += [(base, even(64, 512, 0.5)), (base, full(256, 128)), (base, drawn("sentences", 512, SENTENCES))]
    return [
        *op_cases("attention", device, shapes, peers=_PEERS),
        *op_cases("attention", device, shapes[:1], dropout_p=0.1, peers=_PEERS),
    ]


def build(case: Case) -> Contest:
    batch, model, p = case.batch, case.model, case.dropout_p
    heads, size = model.heads, model.head_size
    mask = batch.mask().to(case.device)
    cu_seqlens = batch.cu_seqlens().to(case.device)
    tensors = {"qkv": torch.randn(batch.tokens, 3, heads, size, device=case.device)}
    seed = torch.tensor([7], device=case.device) if p else None
    keys = None if bool(mask.all()) else mask[:, None, None, :]

    def ours(qkv: Tensor, impl: str) -> Tensor:
        return ops.attention(qkv, cu_seqlens, batch.seqlen, dropout_p=p, seed=seed, impl=impl)

    def sdpa(qkv: Tensor) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v, keys, dropout_p=p).transpose(1, 2)

    def pinned(qkv: Tensor, backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(qkv)

    def pad(x: Tensor) -> Tensor:
        return x.new_zeros(*mask.shape, *x.shape[1:]).masked_scatter(mask[(...,) + (None,) * (x.dim() - 1)], x)

    theirs = {TORCH: Peer(sdpa, pad, lambda x: x[mask])}
    missing = {}
    for name, backend in _PINNED.items():
        if case.device != "cuda" or case.torch_dtype == torch.float32 or keys is not None:
            missing[name] = "it is a kernel for GPUs, 16 bits and batches without padding"
        else:
            theirs[name] = Peer(functools.partial(pinned, backend=backend), pad, lambda x: x[mask])
    if case.device != "cuda":
        missing[_FLASH] = "its kernels run on a GPU"
    elif case.torch_dtype == torch.float32:
        missing[_FLASH] = "it computes in 16 bits"
    else:
        try:
            flash = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func
            theirs[_FLASH] = Peer(lambda qkv: flash(qkv, cu_seqlens, batch.seqlen, dropout_p=p))
        except ImportError as error:
            missing[_FLASH] = f"it can't be imported ({error}): pip install flash-attn --no-build-isolation"
    element = batch.tokens * model.hidden * case.torch_dtype.itemsize
    return op_contest(
        case,
        tensors,
        ours,
        theirs,
        flops=sum(4.0 * model.hidden * length**2 for length in batch.lengths),
        bytes_forward=4.0 * element,
        bytes_backward=8.0 * element,
        missing=missing,
    )


def bench_attention(contest: None) -> None:
    """Reports the contest's rows; see conftest.py."""
