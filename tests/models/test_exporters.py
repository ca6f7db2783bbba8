"""Exporters to other runtimes, by torch and by transformers: fastbert's models give what stock's give."""

import pytest
import torch
from models import twins

pytestmark = pytest.mark.filterwarnings("ignore")

NAMES = ("BertModel", "BertForQuestionAnswering")


def assert_same(found, expected, where):
    torch.testing.assert_close(torch.as_tensor(found)[where], torch.as_tensor(expected)[where], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_onnx_by_torch_case_60(name):
    onnxruntime = pytest.importorskip("onnxruntime")
    reference, fast = twins.twins(name, num_hidden_layers=1)
    batch, length = torch.export.Dim("batch", min=2), torch.export.Dim("length", min=2, max=64)
    example = twins.batch(3, 9)
    shapes = {key: {0: batch, 1: length} for key in example}
    program = torch.onnx.export(fast, (), kwargs=example, dynamo=True, verbose=False, dynamic_shapes=shapes)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    for shape in ((3, 9), (5, 37)):
        inputs = twins.batch(*shape)
        found = session.run(None, {given.name: inputs[given.name].numpy() for given in session.get_inputs()})[0]
        with torch.no_grad():
            assert_same(found, reference(**inputs)[0], twins.valid(inputs))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["onnx", "openvino"])
def test_exporters_of_transformers_case_60(name, kind):
    pytest.importorskip("onnxruntime" if kind == "onnx" else "openvino")
    module = pytest.importorskip(f"transformers.exporters.exporter_{kind}", reason="this transformers has no exporters")
    exporter = getattr(module, {"onnx": "OnnxExporter", "openvino": "OpenVINOExporter"}[kind])()
    settings = exporter.config_class(dynamic=True)
    stock, fast = (
        exporter.export(model, twins.batch(3, 9), config=settings) for model in twins.twins(name, num_hidden_layers=1)
    )
    for shape in ((3, 9), (5, 37)):
        inputs = twins.batch(*shape)
        # OpenVINO may compute in bfloat16, and so it does for both.
        assert_same(fast(**inputs)[0], stock(**inputs)[0], twins.valid(inputs))
