"""The values that several commands' options may take."""

from __future__ import annotations

from enum import StrEnum


class Dtype(StrEnum):
    """Floating types that a model is run in; the names are torch's."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Where a model is run."""

    cpu = "cpu"
    cuda = "cuda"


class Pooling(StrEnum):
    """How the states of a text's tokens become its embedding: their mean, or the state of ``[CLS]``."""

    mean = "mean"
    cls = "cls"


class Scheduler(StrEnum):
    """How a learning rate goes on after its warm-up; the names are Hugging Face's."""

    linear = "linear"
    cosine = "cosine"
    constant = "constant_with_warmup"


class Engine(StrEnum):
    """What embeds a file: this process, or the machines of a Ray cluster."""

    local = "local"
    ray = "ray"
