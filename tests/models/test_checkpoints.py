"""Cases 39-41: damaged, mismatched, incomplete and dangerous checkpoints."""

import os
import pathlib
import pickle

import pytest
import safetensors
import torch
import transformers
from models import twins
from safetensors.torch import load_file, save_file

import fastbert

KEY = "encoder.layer.0.attention.self.query.weight"


@pytest.fixture
def checkpoint(tmp_path):
    twins.twins()[0].save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def load_patched(folder, **options):
    with fastbert.patched():
        return transformers.AutoModel.from_pretrained(folder, **options)


LOADERS = [fastbert.BertModel.from_pretrained, load_patched]


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("kept", [0.0, 0.00001, 0.5, 0.999])
def test_truncated_file_case_39(load, kept, checkpoint):
    file = checkpoint / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(safetensors.SafetensorError):
        load(checkpoint)


@pytest.mark.parametrize("load", LOADERS)
def test_wrong_shape_case_39(load, checkpoint):
    rewrite(checkpoint, lambda weights: weights.update({KEY: torch.zeros(3, 5)}))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        load(checkpoint)


@pytest.mark.parametrize("load", LOADERS)
def test_missing_key_is_reported_case_40(load, checkpoint):
    rewrite(checkpoint, lambda weights: weights.pop(KEY))
    _, report = load(checkpoint, output_loading_info=True)
    assert report["missing_keys"] == {KEY}


def test_strict_loading_raises_case_40():
    reference, fast = twins.twins()
    weights = reference.state_dict()
    del weights[KEY]
    with pytest.raises(RuntimeError, match=f"Missing key.*{KEY}"):
        fast.load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*other"):
        fast.load_state_dict({**reference.state_dict(), "other": torch.zeros(1)})


class Code:
    """Creates a file when it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def as_pickle(folder, **more):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({**weights, **more}, folder / "pytorch_model.bin")


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize(
    "options", [{"use_safetensors": False}, {"use_safetensors": False, "weights_only": True}], ids=str
)
def test_code_in_a_pickle_does_not_run_case_41(load, options, checkpoint):
    mark = checkpoint / "ran"
    as_pickle(checkpoint, more=Code(mark))
    with pytest.raises(pickle.UnpicklingError):
        load(checkpoint, **options)
    assert not mark.exists()
    torch.load(pathlib.Path(checkpoint, "pytorch_model.bin"), weights_only=False)
    assert mark.exists(), "the code is harmless, and the test shows nothing"


@pytest.mark.parametrize("load", LOADERS)
def test_pickle_is_refused_unless_asked_for_case_41(load, checkpoint):
    expected = load_file(checkpoint / "model.safetensors")
    as_pickle(checkpoint)
    with pytest.raises(OSError, match="read only if asked for, with use_safetensors=False"):
        load(checkpoint)
    loaded = load(checkpoint, use_safetensors=False).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], value) for key, value in expected.items())


@pytest.mark.parametrize("load", LOADERS)
def test_an_explicit_choice_of_the_format_is_kept(load, checkpoint):
    model = load(checkpoint, use_safetensors=True, hidden_dropout_prob=0.3)
    assert model.config.hidden_dropout_prob == 0.3
    with pytest.raises(OSError, match="no file named"):
        load(checkpoint, use_safetensors=False)
    as_pickle(checkpoint)
    with pytest.raises(OSError, match="no file named"):
        load(checkpoint, use_safetensors=True)


def test_other_errors_of_loading_are_left_alone(checkpoint, monkeypatch):
    def fail(cls, *args, **kwargs):
        raise OSError("the disk is on fire")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(fail))
    with pytest.raises(OSError, match=r"^the disk is on fire$"):
        fastbert.BertModel.from_pretrained(checkpoint)


def _accelerated(folder):
    return fastbert.accelerate(transformers.BertModel.from_pretrained(folder), strict=True)


def _edited_afterwards(folder):
    """Nobody is told when a parameter is given other memory."""
    model = fastbert.BertModel.from_pretrained(folder)
    for parameter in model.parameters():
        memory = bytearray(parameter.numel() * parameter.itemsize + 1)
        data = torch.frombuffer(memory, dtype=parameter.dtype, count=parameter.numel(), offset=1)
        parameter.data = data.view(parameter.shape).copy_(parameter.data)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("load", [*LOADERS, _accelerated, _edited_afterwards])
def test_weights_at_any_address_of_a_file(load, dtype, tmp_path):
    """safetensors maps a file into memory, and older writers made its header of any length."""
    twins.twins(hidden_size=96, num_attention_heads=3, intermediate_size=192)[0].to(dtype).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length].rstrip(b" ")
    header += b" " * ((1 - len(header)) % 4)
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    stock = transformers.BertModel.from_pretrained(tmp_path, dtype=dtype).eval()
    assert any(p.data_ptr() % p.itemsize for p in stock.parameters())
    model = load(tmp_path).to(dtype).eval()
    inputs = twins.batch()
    where = twins.valid(inputs)
    with torch.no_grad():
        expected, found = (one(**inputs).last_hidden_state[where] for one in (stock, model))
    torch.testing.assert_close(found, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    told = "a weight lies at an address that is no multiple of its elements' size"
    assert (told in {row.reason for row in fastbert.explain(model)}) == (load is _edited_afterwards)
    model.train()
    model(**inputs).last_hidden_state[where].square().sum().backward()
    assert all(p.grad.isfinite().all() for name, p in model.named_parameters() if "pooler" not in name)
