"""The command line: ``fastbert compare``, ``embed``, ``pretrain``, ``finetune``, ``predict``, ``bench``, ``doctor``.

Only the signatures of the commands are here; what they do is imported when they are called, so that ``--help`` and a
mistyped option answer at once.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastbert._version import __version__
from fastbert.cli import training
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
)
from fastbert.cli.errors import Refusal, reported
from fastbert.cli.options import Dtype, Engine, Pooling
from fastbert.training.errors import install

app = typer.Typer(
    name="fastbert",
    help="A performance-optimised BERT that drops into Hugging Face code.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fastbert {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    # What stdout can't encode, such as a path that isn't UTF-8, is printed in escapes, as on stderr.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


@app.command("compare")
def _compare(
    model: ModelOption = None,
    texts: Annotated[
        Path | None,
        typer.Option(
            help="UTF-8 file with one text per line; blank lines are left out. "
            "Default: docstrings of the Python standard library.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    batch_size: Annotated[int, typer.Option(callback=at_least(1), help="Texts in a batch.")] = 32,
    max_length: MaxLengthOption = None,
    limit: Annotated[int, typer.Option(callback=at_least(1), help="Texts to use at most.")] = 256,
    repeats: Annotated[
        int, typer.Option(callback=at_least(1), help="Timed passes over all batches, for each of the two.")
    ] = 5,
    threads: ThreadsOption = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write all figures to this file, as JSON.", show_default=False)
    ] = None,
    allow_pickle: AllowPickleOption = False,
) -> None:
    """Run a checkpoint on Hugging Face and on fastbert, compare the numbers, then the time.

    Both run the same padded batches of the same texts. The exit code is 1 if the numbers disagree, and then no times
    are given.
    """
    given = locals()
    from fastbert.cli import compare

    with reported():
        parity = compare.run(pick(compare.Options, given))
    if not parity:
        raise typer.Exit(1)


@app.command("embed")
def _embed(
    texts: Annotated[
        Path,
        typer.Option(
            help="UTF-8 file with one text per line, or - for standard input, of which a temporary file is made. "
            "A blank line is an empty text: row N is always line N. "
            'With --engine ray also FILE.parquet with a column "text".'
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="Where the embeddings go: FILE.npy or FILE.parquet; with --engine ray a folder of Parquet files."
        ),
    ],
    model: ModelOption = None,
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
    max_length: MaxLengthOption = None,
    tokens_per_batch: Annotated[
        int | None,
        typer.Option(
            callback=at_least(1),
            help="Tokens in a batch at most; a longer text is a batch by itself. Default: 4096 on cpu, 65536 on cuda.",
            show_default=False,
        ),
    ] = None,
    dtype: DtypeOption = Dtype.float32,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin again where a stopped run left something to go on with.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that exists already.")] = False,
    allow_pickle: AllowPickleOption = False,
    engine: Annotated[Engine, typer.Option(help="This process, or the machines of a Ray cluster.")] = Engine.local,
    address: Annotated[
        str | None,
        typer.Option(
            help="With --engine ray: the cluster, as HOST:PORT; all its machines must have the text, the checkpoint "
            "and the folder at the same paths. Default: RAY_ADDRESS, a cluster on this machine, or one made for it.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Embed a text file of any size in bounded memory: one float32 row for each line, in the file's order.

    A run that was stopped goes on where it stopped when the same command is given again.
    """
    given = locals()
    from fastbert.cli import embed

    options = pick(embed.Options, given)
    with reported():
        if engine == Engine.local:
            if address is not None:
                raise Refusal(f"--address is {address}, and --engine is local; a cluster takes --engine ray")
            embed.run(options)
            return
        try:
            from fastbert.cli import embed_ray
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] != "ray":
                raise
            raise Refusal(f"--engine ray needs ray, which isn't installed: {install('ray')}") from None
        embed_ray.run(options, address)


app.command("pretrain")(training.pretrain)
app.command("finetune")(training.finetune)
app.command("predict")(training.predict)


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
    device: DeviceOption = None,
    threads: ThreadsOption = None,
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
        float,
        typer.Option(
            callback=not_negative, help="With --compare: the part by which two runs of the same code may differ."
        ),
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
