"""``python -m fastbert``: the command line of ``fastbert.cli``."""

from fastbert.cli import app

app(prog_name="fastbert")
