"""The signatures of ``fastbert pretrain``, ``finetune`` and ``predict``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fastbert.cli.arguments import (
    AllowPickleOption,
    DeviceOption,
    DtypeOption,
    MaxLengthOption,
    ModelOption,
    ThreadsOption,
    at_least,
    not_negative,
    pick,
    positive,
)
from fastbert.cli.errors import INTERRUPTED, Refusal, reported
from fastbert.cli.options import Device, Dtype, Scheduler
from fastbert.training.errors import install
from fastbert.training.kinds import Kind, Objective


def _part(value: float) -> float:
    if not 0 <= value < 1:
        raise typer.BadParameter(f"{value} is no part of a whole; it may be 0, or more and less than 1")
    return value


def _ratio_or_none(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is no part of a whole; it must be more than 0 and less than 1")
    return value


_Output = Annotated[Path, typer.Option(help="Folder for the checkpoint, its card, the log and the plot.")]
_LearningRate = Annotated[float, typer.Option(callback=positive, help="Peak learning rate of AdamW.")]
_Scheduler = Annotated[Scheduler, typer.Option(help="How the learning rate goes on after the warm-up.")]
_WarmupSteps = Annotated[
    float, typer.Option(callback=not_negative, help="Steps in which it rises; below 1, the part of all steps.")
]
_WeightDecay = Annotated[float, typer.Option(callback=not_negative, help="Weight decay of AdamW.")]
_MaxGradNorm = Annotated[
    float, typer.Option(callback=not_negative, help="Length to which a longer gradient is clipped; 0 never clips.")
]
_Accumulation = Annotated[
    int, typer.Option(callback=at_least(1), help="Batches whose gradients make one step of the optimizer.")
]
_Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute layers again in the backward pass, for less memory.")
]
_Bf16 = Annotated[bool, typer.Option("--bf16", help="Mixed precision: products in bfloat16.")]
_Fp16 = Annotated[bool, typer.Option("--fp16", help="Mixed precision: products in float16, on a GPU.")]
# numpy takes no larger ones.
_Seed = Annotated[
    int, typer.Option(callback=at_least(0, (1 << 32) - 1), help="Of the weights, the order, the masks and dropout.")
]
_LoggingSteps = Annotated[int, typer.Option(callback=at_least(1), help="Steps from one log entry to the next.")]
_EvalSteps = Annotated[
    int | None,
    typer.Option(
        callback=at_least(1), help="Steps from one evaluation to the next. Default: an epoch.", show_default=False
    ),
]
_SaveSteps = Annotated[
    int | None,
    typer.Option(
        callback=at_least(1),
        help="Steps from one checkpoint to the next, from which --resume goes on. Default: an epoch.",
        show_default=False,
    ),
]
_SaveTotalLimit = Annotated[int, typer.Option(callback=at_least(1), help="Checkpoints that are kept.")]
_Patience = Annotated[
    int | None,
    typer.Option(
        callback=at_least(1),
        help="Stop after so many evaluations without a better one, and keep the best. Default: never.",
        show_default=False,
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped in the output folder.")]
_Fsdp = Annotated[
    bool, typer.Option("--fsdp", help="Shard weights, gradients and optimizer over the processes (FSDP2).")
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin again in an output folder that isn't empty.")]


def pretrain(
    output: _Output,
    corpus: Annotated[
        Path | None,
        typer.Option(
            help="Text file with blank lines between documents, folder of .txt files, or folder of a saved dataset "
            'with a column "text". Default: docstrings of the Python standard library.',
            show_default=False,
        ),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(help="Masked tokens and next sentences, masked tokens alone, or a masked autoencoder."),
    ] = Objective.mlm_nsp,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a BERT to train on, with its vocabulary. Default: a new one.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="config.json of the new BERT. Default: 2 layers of 128 features.",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(callback=at_least(100), help="Pieces of a new BERT's vocabulary, learnt from the corpus.")
    ] = 8192,
    lowercase: Annotated[
        bool, typer.Option("--lowercase/--cased", help="Whether a new vocabulary tells capitals and accents apart.")
    ] = True,
    max_length: Annotated[int, typer.Option(callback=at_least(8), help="Tokens of a sequence at most.")] = 128,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            callback=_ratio_or_none,
            help="Part of the tokens to predict. Default: 0.15; 0.3 for mae.",
            show_default=False,
        ),
    ] = None,
    whole_word: Annotated[bool, typer.Option("--whole-word", help="Mask all pieces of a word together.")] = False,
    steps: Annotated[int, typer.Option(callback=at_least(1), help="Steps of the optimizer.")] = 1000,
    tokens_per_batch: Annotated[
        int, typer.Option(callback=at_least(8), help="Tokens in a batch of one process, about.")
    ] = 4096,
    learning_rate: _LearningRate = 5e-4,
    lr_scheduler_type: _Scheduler = Scheduler.linear,
    warmup_steps: _WarmupSteps = 0.1,
    weight_decay: _WeightDecay = 0.01,
    max_grad_norm: _MaxGradNorm = 1.0,
    gradient_accumulation_steps: _Accumulation = 1,
    gradient_checkpointing: _Checkpointing = False,
    bf16: _Bf16 = False,
    fp16: _Fp16 = False,
    eval_fraction: Annotated[
        float,
        typer.Option(
            callback=_part, help="Part of the documents that is held out, to evaluate on; 0 evaluates on nothing."
        ),
    ] = 0.05,
    seed: _Seed = 42,
    logging_steps: _LoggingSteps = 10,
    eval_steps: _EvalSteps = None,
    save_steps: _SaveSteps = None,
    save_total_limit: _SaveTotalLimit = 2,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    fsdp: _Fsdp = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Pretrain a BERT on text: from nothing but the text, or going on from a checkpoint.

    Under torchrun or accelerate launch, each process trains on its own part of the corpus.
    """
    given = locals()
    with reported(), _training():
        from fastbert.cli import pretrain
        from fastbert.training.run import Settings

        given["mask_ratio"] = mask_ratio or (0.3 if objective == Objective.mae else 0.15)
        pretrain.main(pick(pretrain.Options, given), pick(Settings, given, use_cpu=device == Device.cpu))


def finetune(
    task: Annotated[Kind, typer.Option(help="Classes of texts or of pairs of texts, named entities, or answers.")],
    train: Annotated[
        Path,
        typer.Option(
            help="classification, pairs: .csv, .tsv or .jsonl with columns text (text_pair) and label; a saved "
            "dataset; or a folder of .txt files for each class. ner: CoNLL. qa: SQuAD's JSON.",
        ),
    ],
    output: _Output,
    eval: Annotated[
        Path | None, typer.Option(help="As --train, to evaluate on. Default: no evaluation.", show_default=False)
    ] = None,
    model: ModelOption = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            callback=at_least(8),
            help="Tokens of a sequence at most. Default: 128; 384 for qa.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(callback=positive, help="Times that each example is seen.")] = 3.0,
    batch_size: Annotated[int, typer.Option(callback=at_least(1), help="Examples in a batch of one process.")] = 32,
    freeze_encoder: Annotated[
        bool, typer.Option("--freeze-encoder", help="Train the head alone, on the encoder as it is.")
    ] = False,
    learning_rate: _LearningRate = 2e-5,
    lr_scheduler_type: _Scheduler = Scheduler.linear,
    warmup_steps: _WarmupSteps = 0.1,
    weight_decay: _WeightDecay = 0.01,
    max_grad_norm: _MaxGradNorm = 1.0,
    gradient_accumulation_steps: _Accumulation = 1,
    gradient_checkpointing: _Checkpointing = False,
    bf16: _Bf16 = False,
    fp16: _Fp16 = False,
    seed: _Seed = 42,
    logging_steps: _LoggingSteps = 10,
    eval_steps: _EvalSteps = None,
    save_steps: _SaveSteps = None,
    save_total_limit: _SaveTotalLimit = 2,
    early_stopping_patience: _Patience = None,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    fsdp: _Fsdp = False,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Fine-tune a BERT on labelled data; plain transformers loads the result.

    Under torchrun or accelerate launch, each process trains on its own part of the data.
    """
    given = locals()
    with reported(), _training():
        from fastbert.cli import finetune
        from fastbert.training.run import Settings

        finetune.main(pick(finetune.Options, given), pick(Settings, given, use_cpu=device == Device.cpu))


def predict(
    model: Annotated[str, typer.Option(help="Folder or hub name of a fine-tuned BERT.")],
    texts: Annotated[
        Path,
        typer.Option(
            help="A text a line; or for classification a table with the column text (and text_pair); for qa SQuAD's "
            "JSON, or a table with the columns question and context.",
        ),
    ],
    json: Annotated[Path, typer.Option(help="File for the predictions, in the order of the texts.")],
    max_length: MaxLengthOption = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Classify texts, find entities in them or answer questions, with a model that was fine-tuned for it."""
    given = locals()
    with reported():
        from fastbert.cli import predict

        predict.main(pick(predict.Options, given))


@contextmanager
def _training() -> Iterator[None]:
    """Say how a run goes on that the user stops."""
    try:
        with _packages():
            yield
    except KeyboardInterrupt:
        typer.echo("stopped; the same command with --resume goes on from the last checkpoint", err=True)
        raise typer.Exit(INTERRUPTED) from None


@contextmanager
def _packages() -> Iterator[None]:
    """Say how to get what training needs, where it isn't installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = str(error.name).partition(".")[0]
        if package not in ("accelerate", "datasets", "matplotlib", "sklearn"):
            raise
        raise Refusal(f"training needs {package}, which isn't installed: {install('train')}") from None
