"""Which versions ``make test-versions`` tests, with which tests, and what it keeps of the results."""

import functools
import json
import subprocess
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


def test_the_newest_is_what_pip_would_install(monkeypatch):
    asked = []

    def pip(purpose, *arguments):
        asked.append(arguments)
        return json.dumps({"version": "1", "install": [{"metadata": {"name": "torch", "version": "9.8.7"}}]})

    monkeypatch.setattr(versions, "_pip", pip)
    assert versions.newest("torch") == "9.8.7"
    (arguments,) = asked
    assert arguments[0] == "install"
    assert arguments[-1] == "torch"
    # In an environment of its own, and without a change of this one.
    assert {"--dry-run", "--ignore-installed", "--report"} < set(arguments)


@pytest.mark.parametrize("package", versions.PACKAGES)
def test_what_is_run_is_there(package):
    assert versions.RUNS.keys() == set(versions.PACKAGES)
    for run in versions.RUNS[package]:
        paths = [argument for argument in run.arguments if not argument.startswith("-")]
        assert paths
        for path in paths:
            assert (versions.ROOT / path).exists(), path


@pytest.mark.parametrize("package", ["torch", "transformers"])
@pytest.mark.parametrize("path", ["models/test_routes.py", "models/test_parity.py", "hugging_face/test_common.py"])
def test_models_are_compared_with_hugging_face_s(package, path):
    assert any(f"tests/{path}" in run.arguments for run in versions.RUNS[package])


def test_every_kernel_of_triton_is_run():
    assert any({"--triton", "tests/ops"} < set(run.arguments) for run in versions.RUNS["triton"])


VERSIONS = {("torch", "oldest"): "2.10", ("transformers", "oldest"): "5.17", ("triton", "oldest"): "3.5"} | {
    ("torch", "newest"): "2.98", ("transformers", "newest"): "5.98", ("triton", "newest"): "3.98",
}  # fmt: skip


class Examined:
    """What is run in the environments, none of which is made; ``fails`` says of a call whether it exits with 1."""

    def __init__(self, monkeypatch, folder):
        self.calls = []
        self.fails = lambda name, arguments: False
        self.missing = None
        self.path = folder / "tested.toml"
        self.path.write_text("torch = []\ntransformers = []\ntriton = []\n")
        examined = self

        class Environment:
            def __init__(self, package, version):
                (end,) = (end for (one, end), known in VERSIONS.items() if (one, known) == (package, version))
                self.name, self.changed = f"{package}-{end}", {package: version}
                if self.name == examined.missing:
                    raise versions.UnavailableError(f"pip can't install {package}=={version}")

            def versions(self):
                return {"torch": "2.50", "transformers": "5.50", "triton": "3.50"} | self.changed

            def run(self, *arguments, variables=None, check=False):
                examined.calls.append((self.name, arguments, variables))
                done = subprocess.CompletedProcess(arguments, int(examined.fails(self.name, arguments)))
                if check:
                    done.check_returncode()
                return done

        monkeypatch.setattr(versions, "Environment", Environment)
        for end in versions.ENDS:
            monkeypatch.setattr(versions, end, lambda package, end=end: VERSIONS[package, end])
        monkeypatch.setattr(versions, "record", functools.partial(versions.record, path=self.path))

    def tested(self):
        return tomllib.loads(self.path.read_text())

    def names(self):
        return list(dict.fromkeys(name for name, *_ in self.calls))


@pytest.fixture
def examined(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["versions.py"])
    return Examined(monkeypatch, tmp_path)


NAMES = [name for name, *_ in versions.combinations()]
# Triton's kernels run in its own environments only.
ALL = {"torch": ["2.10", "2.50", "2.98"], "transformers": ["5.17", "5.50", "5.98"], "triton": ["3.5", "3.98"]}


def test_every_end_is_run_and_recorded(examined):
    versions.main()
    assert examined.names() == NAMES
    assert examined.tested() == ALL
    for name in NAMES:
        runs = versions.RUNS[name.partition("-")[0]]
        found = [(call[5:], variables) for of, call, variables in examined.calls if of == name and "pytest" in call]
        assert found == [(run.arguments, run.variables) for run in runs]


def test_only_what_is_asked_for_is_run(examined, monkeypatch):
    monkeypatch.setattr("sys.argv", ["versions.py", "--only", "triton", "--only", "torch-newest"])
    versions.main()
    assert examined.names() == ["torch-newest", "triton-oldest", "triton-newest"]
    assert examined.tested() == {"torch": ["2.50", "2.98"], "transformers": ["5.50"], "triton": ["3.5", "3.98"]}


def fetches(arguments):
    return "fetch()" in arguments[-1]


@pytest.mark.parametrize(
    ("failing", "fails"),
    [
        ("transformers-newest", lambda arguments: "pytest" in arguments),
        ("torch-oldest", fetches),
        ("triton-newest", lambda arguments: "--triton" in arguments),
    ],
    ids=["tests", "Hugging Face's tests can't be fetched", "the second of two runs"],
)
def test_a_failure_is_not_recorded_and_the_others_run(examined, failing, fails):
    examined.fails = lambda name, arguments: name == failing and fails(arguments)
    with pytest.raises(SystemExit) as ended:
        versions.main()
    # A text is printed, and the exit code is 1.
    assert ended.value.code.splitlines()[0].startswith(f"FAILED {failing}: ")
    assert ended.value.code.count("FAILED ") == 1
    assert examined.names() == NAMES
    package, _, end = failing.partition("-")
    assert examined.tested() == ALL | {package: [v for v in ALL[package] if v != VERSIONS[package, end]]}


def test_a_version_that_is_not_to_be_had_is_a_failure(examined):
    examined.missing = "torch-newest"
    with pytest.raises(SystemExit) as ended:
        versions.main()
    assert ended.value.code == "FAILED torch-newest: pip can't install torch==2.98"
    assert examined.names() == [name for name in NAMES if name != "torch-newest"]
    assert examined.tested() == ALL | {"torch": ["2.10", "2.50"]}
