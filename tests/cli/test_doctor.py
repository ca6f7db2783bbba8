"""``fastbert doctor``: what is missing is told, what is broken is found."""

import importlib
import json
from importlib import metadata

import pytest
import torch
from cli import tiny

from fastbert import ops
from fastbert.backends import extension, host_linear
from fastbert.cli import doctor, machine, selftest
from fastbert.ops.layer_norm import torch as layer_norm


@pytest.fixture
def fresh_extension():
    """The extension is looked for again, and once more when the test is over."""
    extension._attempt.cache_clear()
    yield
    extension._attempt.cache_clear()


def _findings():
    result = tiny.run("doctor", "--json")
    return result.exit_code, json.loads(result.stdout, parse_constant=pytest.fail)


@pytest.fixture(scope="module")
def healthy():
    """(exit code, findings) with nothing spoilt."""
    return _findings()


def test_all_is_well_here(healthy):
    code, found = healthy
    assert found["problems"] == []
    assert code == 0
    assert found["healthy"]
    assert found["versions"]["torch"] == torch.__version__
    assert found["devices"][0]["type"] == "cpu"
    assert found["extension"]["missing"] is None
    assert found["extension"]["build"]["version"] == found["versions"]["fastbert"]


def test_every_op_is_tested_in_every_dtype(healthy):
    _, found = healthy
    tested = {(check["what"].partition(":")[0], check["dtype"]) for check in found["self_test"]}
    assert tested >= {(op, dtype) for op in ops.__all__ for dtype in ("float32", "bfloat16", "float16")}
    assert ("BertModel against Hugging Face", "float32") in tested
    assert all(check["failure"] is None and check["error"] <= check["tolerance"] for check in found["self_test"])


def test_every_implementation_is_told_with_its_reasons(healthy):
    _, found = healthy
    rows = found["implementations"]
    assert {row["op"] for row in rows} == set(ops.__all__)
    by_request = {}
    for row in rows:
        by_request.setdefault((row["op"], row["device"], row["dtype"], row["mode"]), []).append(row)
    assert all(sum(row["chosen"] for row in group) == 1 for group in by_request.values())
    cuda = [row for row in rows if row["implementation"] == "cuda" and row["device"] == "cpu"]
    assert cuda
    assert all("cuda" in reason.lower() for row in cuda for reason in row["reasons"])


def test_the_tables_for_people():
    result = tiny.run("doctor")
    assert result.exit_code == 0, result.output
    for shown in ("all is well", "self-test", "layer_norm", "inference", "training", torch.__version__):
        assert shown in result.stdout


@pytest.mark.usefixtures("fresh_extension")
@pytest.mark.parametrize("error", [ImportError("invalid ELF header"), SystemError("bad magic")])
def test_a_broken_extension(monkeypatch, error):
    """Case 44."""
    import_module = importlib.import_module

    def broken(name, package=None):
        if name == "fastbert._C":
            raise error
        return import_module(name, package)

    monkeypatch.setattr(importlib, "import_module", broken)
    code, found = _findings()
    assert code == 1
    assert len(found["problems"]) == 1
    assert str(error) in found["problems"][0]
    assert "pip install" in found["problems"][0]
    # The rest works.
    assert all(check["failure"] is None for check in found["self_test"])
    rows = [row for row in found["implementations"] if row["op"] == "bias_dropout_residual" and row["chosen"]]
    assert {row["implementation"] for row in rows} == {"reference"}
    result = tiny.run("doctor")
    assert result.exit_code == 1
    assert str(error) in result.stdout


@pytest.mark.usefixtures("fresh_extension")
def test_an_extension_of_another_version(monkeypatch):
    """Case 44."""
    monkeypatch.setattr(extension, "__version__", "99.0")
    code, found = _findings()
    assert code == 1
    assert "99.0" in found["problems"][0]


def test_without_triton_all_is_well(monkeypatch):
    """Case 44."""
    installed = machine._installed
    monkeypatch.setattr(machine, "_installed", lambda package: None if package == "triton" else installed(package))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, found = _findings()
    assert code == 0
    assert found["versions"]["triton"] is None


TESTED = {"torch": ["2.10.0", "2.13.0"], "transformers": ["5.17.0", "5.24.0"], "triton": ["3.5.0", "3.9.0"]}


def _told_of(monkeypatch, **installed):
    """The advice about versions where these are installed, and what tests have passed with is TESTED."""
    here = machine.versions()
    monkeypatch.setattr(machine, "versions", lambda: {**here, **dict.fromkeys(TESTED), **installed})
    monkeypatch.setattr(doctor, "tested_versions", lambda: TESTED)
    return [text for text in doctor.examine()["advice"] if "tested" in text]


@pytest.mark.parametrize(
    "installed",
    [
        {"torch": "2.10.0", "transformers": "5.17.0", "triton": "3.5.0"},
        {"torch": "2.13.0+cpu", "transformers": "5.24.0", "triton": "3.9.0"},
        {"torch": "2.13.0a0+git1234", "transformers": "5.20.1"},
    ],
)
def test_versions_that_were_tested_are_not_warned_of(monkeypatch, installed):
    assert _told_of(monkeypatch, **installed) == []


@pytest.mark.parametrize(
    ("package", "version", "relation"),
    [
        ("transformers", "5.25.0", "newer"),
        ("torch", "2.14.0.dev20261101+cu130", "newer"),
        ("triton", "3.4.0", "older"),
        ("transformers", "5.9.0", "older"),
    ],
)
def test_versions_beyond_those_tested_are_warned_of(monkeypatch, package, version, relation):
    """Case 51."""
    oldest, newest = TESTED[package]
    (told,) = _told_of(monkeypatch, **{package: version})
    assert f"{package} {version} is {relation} than any that fastbert was tested with ({oldest} to {newest})" in told
    assert f"`pip install {package}=={newest}`" in told


def test_tested_versions_are_told(healthy):
    _, found = healthy
    assert found["tested_versions"].keys() == TESTED.keys()
    result = tiny.run("doctor")
    for package, versions in found["tested_versions"].items():
        assert versions
        assert f"{package} {versions[0]}" in result.stdout


def test_a_stranger_of_the_same_name_is_noticed(monkeypatch, tmp_path):
    """Case 67."""
    found = metadata.Distribution.from_name

    def only_ours(name):
        if name == "fastbert":
            raise metadata.PackageNotFoundError(name)
        return found(name)

    with monkeypatch.context() as patch:
        patch.setattr(metadata.Distribution, "from_name", only_ours)
        assert not [text for text in doctor.examine()["advice"] if "another project" in text]
    folder = tmp_path / "fastbert-0.2.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: fastbert\nVersion: 0.2.2\n")
    monkeypatch.syspath_prepend(tmp_path)
    (told,) = [text for text in doctor.examine()["advice"] if "another project" in text]
    assert "fastbert 0.2.2 is installed" in told
    assert "`pip uninstall fastbert`" in told


def _layer_norm_problems():
    code, found = _findings()
    assert code == 1
    assert not found["healthy"]
    problems = [problem for problem in found["problems"] if "layer_norm: torch" in problem]
    assert len(problems) >= len(selftest.DTYPES)
    return problems


def test_a_wrong_forward_is_found(monkeypatch):
    forward = layer_norm.forward

    def wrong(*args):
        output, *saved = forward(*args)
        return output * 1.1, *saved

    monkeypatch.setattr(layer_norm, "forward", wrong)
    assert all("output is off by" in problem for problem in _layer_norm_problems())


def test_a_wrong_gradient_is_found(monkeypatch):
    backward = layer_norm.backward

    def wrong(*args):
        dx, dweight, dbias = backward(*args)
        return dx, dweight * 1.1, dbias

    monkeypatch.setattr(layer_norm, "backward", wrong)
    assert all("gradient of weight is off by" in problem for problem in _layer_norm_problems())


def test_nan_is_found(monkeypatch):
    forward = layer_norm.forward

    def wrong(*args):
        output, *saved = forward(*args)
        return output * float("nan"), *saved

    monkeypatch.setattr(layer_norm, "forward", wrong)
    assert all("isn't finite" in problem for problem in _layer_norm_problems())


def test_a_kernel_that_raises_is_found(monkeypatch):
    def broken(*args):
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(layer_norm, "forward", broken)
    assert all("RuntimeError: illegal instruction" in problem for problem in _layer_norm_problems())
    result = tiny.run("doctor")
    assert result.exit_code == 1
    assert "illegal instruction" in result.stdout


@pytest.mark.parametrize(
    ("module", "function", "size"), [("backends.prepacked", "linear", 260), ("models.whole_layer", "forward", 256)]
)
def test_a_wrong_model_is_found(module, function, size, monkeypatch):
    """The model's inference goes ways that no op goes: products of prepacked weights, and a layer in one call."""
    if host_linear.missing(torch.float32):
        pytest.skip("the extension has no products for this machine")
    right = getattr(importlib.import_module(f"fastbert.{module}"), function)
    monkeypatch.setattr(f"fastbert.{module}.{function}", lambda *args: right(*args) + 0.01)
    code, found = _findings()
    assert code == 1
    (problem,) = found["problems"]
    assert f"intermediate size {size}" in problem
    assert "states is off by" in problem


@pytest.mark.gpu
def test_a_gpu_is_examined():
    code, found = _findings()
    assert code == 0, found["problems"]
    assert {check["device"] for check in found["self_test"]} == {"cpu", "cuda"}
    assert [device for device in found["devices"] if device["type"] == "cuda"]
