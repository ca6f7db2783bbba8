"""What the tests here do without the compiler that they take."""

from typing import NoReturn

import pytest

# By whether all is to be run.
OUTCOMES = {False: pytest.skip.Exception, True: pytest.fail.Exception}


def missing(reason: str, everything: bool) -> NoReturn:
    """End the test: skipped, or failed with ``--everything``, lest a run that ran nothing look like success."""
    (pytest.fail if everything else pytest.skip)(reason)
