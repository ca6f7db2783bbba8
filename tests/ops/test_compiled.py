"""What the compilers make of every kernel, at every configuration that BERT-base, BERT-large and MiniLM launch.

No GPU is needed: Triton and nvcc compile ahead of time, and the machine code is read.
"""

import json
from pathlib import Path

import pytest
import torch
from packaging.version import Version

from benchmarks import kernels
from fastbert.backends import extension
from fastbert.backends.launch import table

triton = pytest.importorskip("triton", reason="Triton can't be imported: its kernels can't be compiled")

# Tensors that a memory-bound kernel reads and writes by whole rows.
MEMORY_BOUND = {
    ("layer_norm", "forward_kernel"): (1, 1),
    ("layer_norm", "backward_kernel"): (2, 1),
    ("bias_gelu", "forward_kernel"): (1, 1),
    ("bias_gelu", "backward_kernel"): (2, 1),
    ("embedding_layer_norm", "forward_kernel"): (3, 1),
    ("embedding_layer_norm", "backward_kernel"): (4, 1),
    ("embedding_layer_norm", "chunk_kernel"): (1, 0),
    ("embedding_layer_norm", "segment_kernel"): (1, 0),
    ("attention", "forward_kernel"): (3, 1),
    ("attention", "backward_short_kernel"): (4, 3),
}
PRODUCTS = ("attention", "linear_gelu")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(request):
    """Everything that devices are given, by compute capability; float16 compiles to what bfloat16 does.

    What ``benchmarks/results/kernels.json`` has of the same sources and the same Triton is taken from there, but for
    one launch of each kernel, of one capability or another, whose report must be the same once more.
    """
    jobs = [
        (launch, capability)
        for capability in kernels.CAPABILITIES
        for launch in kernels.all_launches(capability)
        if launch.dtype != "fp16"
    ]
    known = {} if request.config.getoption("--everything") else kernels.known_reports(jobs)
    of_a_kernel = {}
    for job in known:
        of_a_kernel.setdefault((job[0].op, job[0].kernel), []).append(job)
    again = [found[len(found) * (place % 3) // 3] for place, found in enumerate(of_a_kernel.values())]
    missing = [job for job in jobs if job not in known]
    made = dict(zip([*missing, *again], kernels.reports([*missing, *again]), strict=True))
    for job in again:
        assert made[job] == known[job], "benchmarks/results/kernels.json is wrong: `python -m benchmarks.kernels`"
    found = known | made
    return {capability: [found[job] for job in jobs if job[1] == capability] for capability in kernels.CAPABILITIES}


@pytest.fixture(params=kernels.CAPABILITIES)
def compiled(request, reports):
    """The reports of one compute capability."""
    return reports[request.param]


def test_the_reports_are_those_of_these_sources():
    """So that few are compiled again, and docs/kernels.md shows what there is."""
    written = json.loads((kernels.RESULTS / "kernels.json").read_text("utf-8"))["environment"]["versions"]["triton"]
    if written != triton.__version__:
        pytest.skip(f"benchmarks/results/kernels.json is of Triton {written}, and this is {triton.__version__}")
    jobs = [(launch, capability) for capability in kernels.CAPABILITIES for launch in kernels.all_launches(capability)]
    known = kernels.known_reports(jobs)
    missing = {launch.kernel for launch, capability in jobs if (launch, capability) not in known}
    assert not missing, "these have changed: `python -m benchmarks.kernels` compiles them and writes their reports"


def pieces_of_a_program(launch):
    """Elements of one tensor that a program of a memory-bound kernel holds at once, by the pieces it reads them in."""
    constants = dict(launch.constants)
    if launch.op == "attention":
        return [constants.get("BLOCK", constants.get("BLOCK_M")) * constants["D"]]
    if "BLOCK" in constants:
        return [constants["ROWS"] * constants["BLOCK"], constants["ROWS"] * constants["REST"]]
    return [constants["ROWS"] * constants.get("H", constants.get("COLUMNS"))]


def test_every_triton_kernel(compiled):
    names = {(report.launch.op, report.launch.kernel) for report in compiled}
    assert names >= MEMORY_BOUND.keys() | {("attention", "backward_dkv_kernel"), ("linear_gelu", "forward_kernel")}
    assert ("linear_gelu", "persistent_kernel") in names or compiled[0].capability < 90
    for report in compiled:
        launch, limits = report.launch, kernels.LIMITS[report.capability]
        what = f"{launch.op}.{launch.kernel}, {launch.dtype}, {launch.describe()}, {dict(launch.options)}"
        spills = measured_spills(report)
        assert report.stack <= spills, f"{what} spills {report.stack} bytes on {report.capability}"
        if not spills:
            assert not {"LDL", "STL"} & report.instructions.keys(), f"{what} uses local memory on {report.capability}"
        assert report.shared <= limits.shared_block, f"{what} needs {report.shared} bytes of shared memory"
        assert report.occupancy > 0, what
        check_products(report, what)
        check_persistent(report, what)
        check_accesses(report, what)


def measured_spills(report):
    """The bytes that a thread may spill: none, but where the fastest without a spill took 1.2 to 1.4 times as long.

    That is the backward of attention in float32 with heads of 64, measured on an H200 (docs/performance.md). Those
    launches were chosen with Triton 3.6; 3.5, which nobody has timed, has fewer registers for them, and for 8.0.
    """
    launch, constants = report.launch, dict(report.launch.constants)
    if Version(triton.__version__) < Version("3.6") and (launch.op, launch.dtype) == ("attention", "fp32"):
        return 256
    if report.capability != 90 or launch.dtype != "fp32" or constants.get("D") != 64:
        return 0
    allowed = {("backward_dq_kernel", True): 128, ("backward_dkv_kernel", False): 32, ("backward_dkv_kernel", True): 96}
    return allowed.get((launch.kernel, constants.get("DROPOUT")), 0)


def check_products(report, what):
    """wgmma takes four warps and 64 rows, its successor 64 as well; smaller blocks use the older instruction."""
    launch, constants = report.launch, dict(report.launch.constants)
    if launch.op not in PRODUCTS:
        return
    block = min(constants[name] for name in ("BLOCK", "BLOCK_M") if name in constants)
    block = constants["BLOCK_N"] if launch.kernel == "backward_dkv_kernel" else block
    if block < 64 or report.warps < 4 or report.capability == 80:
        expected = {"HMMA"}
    elif report.capability == 90:
        expected = {"HGMMA"}
    else:
        expected = {"UTCHMMA", "HMMA"}
    if "HGMMA" in report.instructions and launch.op == "attention" and not known_to_be_serial(launch):
        # The steps of a product follow each other; if they were serialised, each would have a start and a wait.
        assert report.instructions["WARPGROUP"] < report.instructions["HGMMA"], f"{what}: {report.instructions}"
    assert expected & report.instructions.keys(), f"{what} has {report.instructions} on {report.capability}"


def check_persistent(report, what):
    """Its tensors come and go by TMA, and as many programs fit on a multiprocessor as are launched for it."""
    if report.launch.kernel != "persistent_kernel":
        return
    assert report.instructions.keys() >= {"UTMALDG", "UTMASTG"}, f"{what} has {report.instructions}"
    assert not {"LDGSTS", "STG.128"} & report.instructions.keys(), f"{what} has {report.instructions}"
    entries = {int(key): options for key, options in table()["linear_gelu_persistent"]["16 bits"].items()}
    options = entries[max(key for key in entries if key <= report.capability)]
    assert report.blocks >= options["PROGRAMS"], f"{report.blocks} of {what} fit on {report.capability}"


def known_to_be_serial(launch):
    """Triton waits twice for the output where its blocks are not as wide as those of the scores; ptxas gives up."""
    constants = dict(launch.constants)
    whole = constants.get("WHOLE", True)
    return launch.kernel == "forward_kernel" and not whole and constants["BLOCK_N"] != constants["BLOCK_D"]


def check_accesses(report, what):
    launch = report.launch
    whole = dict(launch.constants).get("WHOLE", True)  # long sequences' attention isn't bound by memory
    if (launch.op, launch.kernel) not in MEMORY_BOUND or not whole:
        return
    read, written = MEMORY_BOUND[launch.op, launch.kernel]
    size = 4 if launch.kernel == "segment_kernel" else torch.finfo(DTYPES[launch.dtype]).bits // 8
    lanes = 32 * report.warps
    # A piece of fewer than 16 bytes a lane can't be read 16 at a time.
    each = [elements * size / (lanes * 16) for elements in pieces_of_a_program(launch)]
    each = sum(accesses for accesses in each if accesses >= 1)
    for name, tensors in (("LDG", read), ("STG", written)):
        wide = report.instructions.get(f"{name}.128", 0) + 2 * report.instructions.get(f"{name}.256", 0)
        if name == "LDG":
            wide += report.instructions.get("LDGSTS.128", 0)
        assert wide >= tensors * each, f"{what} has {report.instructions} on {report.capability}, not {tensors * each}"


DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.mark.skipif(extension.missing_cuda() is not None, reason=f"nothing to read: {extension.missing_cuda()}")
@pytest.mark.parametrize("capability", kernels.CAPABILITIES)
def test_every_kernel_of_the_extension(capability):
    library = Path(extension.module().__file__)
    reports = kernels.extension_reports(library, capability)
    assert {(report.op, report.kernel) for report in reports} == {
        *(("bias_dropout_residual", name) for name in ("forward_kernel", "backward_kernel", "add_partials_kernel")),
        *(
            ("bias_dropout_residual_layer_norm", name)
            for name in (
                "forward_kernel",
                "forward_loop_kernel",
                "backward_kernel",
                "backward_loop_kernel",
                "add_partials_kernel",
            )
        ),
    }
    for report in reports:
        assert report.stack == 0, f"{report} spills"
        assert not {"LDL", "STL"} & report.instructions.keys(), report
        if report.vector:
            assert report.instructions.get("LDG.128", 0) > 0, report
            assert report.instructions.get("STG.128", 0) > 0, report
