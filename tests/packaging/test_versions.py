"""Which versions ``make test-versions`` tests, and what it keeps of the results."""

import tomllib

import pytest
import versions
from packaging.version import Version


@pytest.mark.parametrize("package", versions.PACKAGES)
def test_the_oldest_is_the_lower_bound(package):
    text = (versions.ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert f'"{package}>={versions.oldest(package)}' in text


def test_a_package_that_pip_does_not_find_is_told():
    with pytest.raises(versions.UnavailableError, match="pip can't look up the newest no such package"):
        versions.newest("no such package")


def test_passed_versions_are_kept_in_order(tmp_path):
    path = tmp_path / "tested.toml"
    path.write_text('torch = ["2.13.0"]\ntransformers = ["5.1.0", "5.24.0"]\ntriton = ["3.9.0"]\n')
    versions.record({"transformers": "5.100.0", "torch": "2.13.0"}, path)
    versions.record({"transformers": "5.17.0"}, path)
    kept = tomllib.loads(path.read_text())
    # 5.1.0 is no longer supported.
    assert kept == {"torch": ["2.13.0"], "transformers": ["5.17.0", "5.24.0", "5.100.0"], "triton": ["3.9.0"]}


def test_what_is_kept_is_supported():
    for package, tested in tomllib.loads(versions.TESTED.read_text(encoding="utf-8")).items():
        assert tested == sorted(tested, key=Version)
        assert Version(tested[0]) >= Version(versions.oldest(package))


@pytest.mark.parametrize("wrong", ["numpy", "torch-middle"])
def test_an_unknown_name_is_refused(monkeypatch, capsys, wrong):
    monkeypatch.setattr("sys.argv", ["versions.py", "--only", wrong])
    with pytest.raises(SystemExit):
        versions.main()
    assert f"--only is {wrong!r}; it may be a part of torch-oldest" in capsys.readouterr().err
