"""Every route with the oldest supported and the newest released transformers; ``make test-versions`` tests more."""

import subprocess

import pytest
import versions


@pytest.mark.slow
@pytest.mark.parametrize("end", versions.ENDS)
def test_routes(end):
    """Case 51: a release of transformers that breaks a route turns this red, whatever is installed here."""
    try:
        version = versions.oldest("transformers") if end == "oldest" else versions.newest("transformers")
        environment = versions.Environment("transformers", version)
    except versions.UnavailableError as error:
        pytest.skip(f"NOT TESTED WITH THE {end.upper()} TRANSFORMERS: {error}")
    assert environment.versions()["transformers"].startswith(version)
    tests = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/models/test_routes.py")
    result = environment.run(*tests, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
