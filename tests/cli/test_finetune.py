"""``fastbert finetune`` and ``fastbert predict``: what is learnt, what is left in the folder, and what is refused."""

import csv
import json
import os
import random
import shutil

import datasets
import pytest
import torch
from cli import made, tiny
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer, pipeline

import fastbert
from fastbert.training import vocabulary

FAST = ("--learning-rate", 3e-3, "--batch-size", 16)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("bert") / "tiny-bert", initializer_range=0.05)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for split, seed, part in (("train", 0, 1.0), ("eval", 1, 0.2)):
        made.write_csv(folder / f"classified-{split}.csv", ["text", "label"], made.classified(int(300 * part), seed))
        columns = ["text", "text_pair", "label"]
        made.write_csv(folder / f"pairs-{split}.csv", columns, made.pairs(int(800 * part), seed))
        made.write_conll(folder / f"{split}.conll", int(300 * part), seed)
        made.write_squad(folder / f"{split}.json", int(900 * part), seed, longest=30)
        made.write_squad(folder / f"missing-{split}.json", int(900 * part), seed, missing=0.3)
    return folder


RUNS = {
    "classification": ("classification", "classified-{}.csv", ()),
    "pairs": ("pairs", "pairs-{}.csv", ("--epochs", 3)),
    "ner": ("ner", "{}.conll", ("--epochs", 4)),
    "qa": ("qa", "{}.json", ("--epochs", 4, "--max-length", 48)),
    "qa-missing": ("qa", "missing-{}.json", ("--epochs", 5, "--max-length", 48)),
}


def finetune(bert, output, task, train, *more):
    return tiny.run("finetune", "--task", task, "--model", bert, "--train", train, "--output", output, *FAST, *more)


@pytest.fixture(scope="module")
def tuned(bert, data, tmp_path_factory):
    """The output folder of a run, by its name."""
    folders = {}

    def of(name):
        if name not in folders:
            task, files, more = RUNS[name]
            output = tmp_path_factory.mktemp("tuned") / name
            train, evaluated = (data / files.format(split) for split in ("train", "eval"))
            result = finetune(bert, output, task, train, "--eval", evaluated, *more)
            assert result.exit_code == 0, result.output
            folders[name] = output
        return folders[name]

    return of


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "score"),
    [
        ("classification", "accuracy"),
        ("classification", "macro_f1"),
        ("pairs", "accuracy"),
        ("ner", "f1"),
        ("qa", "exact_match"),
        ("qa", "f1"),
        ("qa-missing", "f1"),
    ],
)
def test_it_learns(tuned, name, score):
    # Guessing gets half of the classes and pairs right, and next to none of the entities and answers.
    assert tiny.scores(tuned(name))[f"eval_{score}"] >= 0.95


@pytest.mark.slow
def test_what_is_in_the_folder(tuned):
    folder = tuned("classification")
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "log.json", "training.png"} <= names
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.bin"))
    log = json.loads((folder / "log.json").read_text())
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 3
    card = (folder / "README.md").read_text()
    assert f"| accuracy | {tiny.scores(folder)['eval_accuracy']:.4f} |" in card
    assert "| learning_rate | 0.003 |" in card
    assert "pipeline_tag: text-classification" in card


@pytest.mark.slow
def test_plain_transformers_loads_it(tuned, data):
    folder = tuned("classification")
    model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert type(model).__module__.startswith("transformers.")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    classify = pipeline("text-classification", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))
    with (data / "classified-eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    found = [answer["label"] for answer in classify([row["text"] for row in rows])]
    right = sum(label == row["label"] for label, row in zip(found, rows, strict=True))
    assert right / len(rows) == pytest.approx(tiny.scores(folder)["eval_accuracy"])


def predict(folder, texts, out):
    result = tiny.run("predict", "--model", folder, "--texts", texts, "--json", out)
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text("utf-8"))


@pytest.mark.slow
def test_predict_classes(tuned, tmp_path):
    texts = tiny.write(tmp_path / "texts.txt", ["the kernel of sum", "row of the token", "", "kernel " + "row " * 90])
    found = predict(tuned("classification"), texts, tmp_path / "out.json")
    assert [row["text"] for row in found] == texts.read_text().split("\n")[:-1]
    assert [found[i]["label"] for i in (0, 1, 3)] == ["fast", "small", "fast"]
    for row in found:
        assert sum(row["scores"].values()) == pytest.approx(1, abs=1e-5)
        assert row["scores"][row["label"]] == row["score"] == max(row["scores"].values())


@pytest.mark.slow
def test_chinese(tmp_path):
    """Words without spaces: the entity after each \u5728 ("in") is a place of two characters."""
    generator = random.Random(0)
    places, others = "\u5317\u4eac\u4e0a\u6d77", "\u5929\u6c14\u5f88\u597d\u6211\u4f60\u4ed6\u662f"

    def sentence():
        place = "".join(generator.choices(places, k=2))
        before, after = ("".join(generator.choices(others, k=generator.randint(1, 5))) for _ in range(2))
        return before, place, after

    def lines(count):
        for before, place, after in (sentence() for _ in range(count)):
            tags = ["O"] * (len(before) + 1) + ["B-LOC", "I-LOC"] + ["O"] * len(after)
            yield from (f"{word} {tag}" for word, tag in zip(f"{before}\u5728{place}{after}", tags, strict=True))
            yield ""

    for name, count in (("train", 1500), ("eval", 40)):
        tiny.write(tmp_path / f"{name}.conll", list(lines(count)))
    tokenizer = vocabulary.learn([places + others + "\u5728"], 101, 48)
    bert = tiny.checkpoint(tmp_path / "bert", initializer_range=0.05, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(bert)
    given = ("--eval", tmp_path / "eval.conll", "--epochs", 3)
    result = finetune(bert, tmp_path / "out", "ner", tmp_path / "train.conll", *given)
    assert result.exit_code == 0, result.output
    assert tiny.scores(tmp_path / "out")["eval_f1"] >= 0.95
    before, place, after = sentence()
    texts = tiny.write(tmp_path / "texts.txt", [f"{before}\u5728{place}{after}"])
    [found] = predict(tmp_path / "out", texts, tmp_path / "out.json")
    [entity] = found["entities"]
    assert (entity["text"], entity["start"], entity["end"]) == (place, len(before) + 1, len(before) + 3)


@pytest.mark.slow
def test_predict_pairs(tuned, tmp_path):
    rows = [("the kernel of", "row token sum", "?"), ("the token of", "row kernel sum", "?")]
    table = made.write_csv(tmp_path / "pairs.csv", ["text", "text_pair", "note"], rows)
    found = predict(tuned("pairs"), table, tmp_path / "out.json")
    assert [(row["text_pair"], row["label"]) for row in found] == [(rows[0][1], "first"), (rows[1][1], "second")]
    lines = tiny.write(tmp_path / "lines.txt", ["one"])
    told = tiny.refusal("predict", "--model", tuned("pairs"), "--texts", lines, "--json", tmp_path / "out.json")
    assert "pairs come as .csv, .tsv or .jsonl" in told


@pytest.mark.slow
def test_predict_entities(tuned, tmp_path):
    texts = tiny.write(tmp_path / "texts.txt", ["the kernel mask batch of row", "sum, token.", "of the row"])
    found = predict(tuned("ner"), texts, tmp_path / "out.json")
    assert found[0]["entities"] == [{"entity": "TOOL", "text": "kernel mask batch", "start": 4, "end": 21}]
    assert {"entity": "PART", "text": "token", "start": 5, "end": 10} in found[1]["entities"]
    assert found[2]["entities"] == []


@pytest.mark.slow
def test_predict_answers(tuned, data, tmp_path):
    found = predict(tuned("qa"), data / "eval.json", tmp_path / "out.json")
    questions = [p for article in json.loads((data / "eval.json").read_text())["data"] for p in article["paragraphs"]]
    right = 0
    for row, paragraph in zip(found, questions, strict=True):
        assert row["id"] == paragraph["qas"][0]["id"]
        assert row["answer"] == paragraph["context"][row["start"] : row["end"]]
        right += row["answer"] == paragraph["qas"][0]["answers"][0]["text"]
    assert right / len(found) >= 0.95
    table = made.write_csv(tmp_path / "q.csv", ["question", "context"], [("the token of", "row the token of sum")])
    assert predict(tuned("qa"), table, tmp_path / "out.json")[0]["answer"] == "token"


@pytest.mark.slow
def test_predict_missing_answers(tuned, tmp_path):
    rows = [("the token of", "row the sum of the length"), ("the token of", "row the token of sum")]
    table = made.write_csv(tmp_path / "q.csv", ["question", "context"], rows)
    assert [row["answer"] for row in predict(tuned("qa-missing"), table, tmp_path / "out.json")] == ["", "token"]


@pytest.mark.slow
def test_long_contexts_are_answered_in_windows(tuned, tmp_path):
    made.write_squad(tmp_path / "long.json", 40, seed=5, longest=300)
    questions = json.loads((tmp_path / "long.json").read_text())["data"][0]["paragraphs"]
    assert max(len(p["context"].split()) for p in questions) > 4 * 48
    found = predict(tuned("qa"), tmp_path / "long.json", tmp_path / "out.json")
    right = sum(
        row["answer"] == paragraph["qas"][0]["answers"][0]["text"]
        for row, paragraph in zip(found, questions, strict=True)
    )
    assert right / len(found) >= 0.9


@pytest.mark.slow
def test_imdb_folder_and_saved_dataset_and_jsonl_are_the_same(bert, tmp_path):
    examples = made.classified(64)
    ids = {"fast": 0, "small": 1}
    for number, (text, label) in enumerate(examples):
        folder = tmp_path / "aclImdb" / "train" / label
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number:03}.txt").write_text(text)
    (tmp_path / "aclImdb" / "train" / "unsup").mkdir()
    (tmp_path / "aclImdb" / "train" / "unsup" / "0.txt").write_text("no label")
    ordered = sorted(examples, key=lambda example: example[1])
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(ids))})
    table = {"text": [text for text, _ in ordered], "label": [ids[label] for _, label in ordered]}
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(table, features)}).save_to_disk(tmp_path / "saved")
    lines = [json.dumps({"text": text, "label": label, "more": 1}) for text, label in ordered]
    tiny.write(tmp_path / "rows.jsonl", lines)
    weights = []
    for name in ("aclImdb", "saved", "rows.jsonl"):
        output = tmp_path / f"of-{name}"
        result = finetune(bert, output, "classification", tmp_path / name, "--epochs", 1)
        assert result.exit_code == 0, result.output
        assert "not evaluated, for want of --eval" in result.output
        weights.append(fastbert.BertForSequenceClassification.from_pretrained(output).state_dict())
    for other in weights[1:]:
        for name, value in weights[0].items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0)


@pytest.mark.slow
def test_frozen_encoder(bert, data, tmp_path):
    result = finetune(bert, tmp_path / "out", "ner", data / "train.conll", "--epochs", 1, "--freeze-encoder")
    assert result.exit_code == 0, result.output
    before = fastbert.BertModel.from_pretrained(bert, add_pooling_layer=False)
    after = fastbert.BertForTokenClassification.from_pretrained(tmp_path / "out")
    for name, value in before.named_parameters():
        torch.testing.assert_close(after.bert.get_parameter(name), value, rtol=0, atol=0)


@pytest.mark.slow
def test_early_stopping_keeps_the_best(bert, data, tmp_path):
    # A rate this high spoils the model soon after it has learnt.
    result = finetune(
        bert, tmp_path / "out", "classification", data / "classified-train.csv", "--eval",
        data / "classified-eval.csv", "--epochs", 40, "--early-stopping-patience", 2, "--learning-rate", 1e-2,
        "--lr-scheduler-type", "constant_with_warmup",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    log = json.loads((tmp_path / "out" / "log.json").read_text())
    found = [entry["eval_accuracy"] for entry in log if "eval_accuracy" in entry]
    assert len(found) < 40
    assert max(found) not in found[-2:] or found.index(max(found)) < len(found) - 2
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| accuracy | {max(found):.4f} |" in card
    model = fastbert.BertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    with (data / "classified-eval.csv").open() as file:
        rows = list(csv.DictReader(file))
    batch = tokenizer([row["text"] for row in rows], padding=True, return_tensors="pt")
    chosen = [model.config.id2label[int(i)] for i in model(**batch).logits.argmax(-1)]
    right = sum(label == row["label"] for label, row in zip(chosen, rows, strict=True))
    assert right / len(rows) == pytest.approx(max(found))


@pytest.mark.slow
def test_another_number_of_labels(tuned, data, tmp_path):
    """A checkpoint of another task lends its encoder."""
    epoch = ("--epochs", 1)
    result = finetune(tuned("ner"), tmp_path / "out", "classification", data / "classified-train.csv", *epoch)
    assert result.exit_code == 0, result.output
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.num_labels == 2
    result = finetune(tuned("classification"), tmp_path / "qa", "qa", data / "eval.json", "--max-length", 48, *epoch)
    assert result.exit_code == 0, result.output
    assert AutoModelForQuestionAnswering.from_pretrained(tmp_path / "qa").config.num_labels == 2


def refused(bert, tmp_path, task, content, name, *more, evaluated=None):
    path = tmp_path / name
    path.write_text(content, "utf-8")
    if evaluated is not None:
        (tmp_path / f"eval-{name}").write_text(evaluated, "utf-8")
        more = (*more, "--eval", tmp_path / f"eval-{name}")
    return tiny.refusal(
        "finetune", "--task", task, "--model", bert, "--train", path, "--output", tmp_path / "out", *more
    )


@pytest.mark.parametrize(
    ("task", "name", "content", "told"),
    [
        ("classification", "a.csv", "text,label\n", "holds no examples"),
        ("classification", "a.csv", "text,label\none,a\ntwo\n", "line 3 has 1 fields; it must have 2: text, label"),
        ("classification", "a.csv", 'text,label\none,a\n"two,b\n', "a.csv, line 3 is malformed"),
        ("classification", "a.csv", "words,class,x\none,a,1\n", "line 1 names the columns words, class, x;"),
        ("classification", "a.csv", "text,label\none,a\ntwo,a\n", "all examples have the label 'a'"),
        ("classification", "a.jsonl", '{"text": "one", "label": "a"}\nnope\n', "a.jsonl, line 2 is no JSON"),
        ("classification", "a.jsonl", '{"text": "one"}\n', "a.jsonl, line 1 has no 'label'; it has text"),
        ("classification", "a.jsonl", "[1]\n", "a.jsonl, line 1 is no JSON object"),
        ("classification", "a.txt", "one\n", "a.txt ends in .txt; it may be .csv, .tsv or .jsonl, or a folder"),
        ("pairs", "a.csv", "text,label\none,a\n", "text, label; there must be text, text_pair, label"),
        ("ner", "a.conll", "the O\nkernel\n\n", "line 2 has one column, 'kernel'; the last must be"),
        ("ner", "a.conll", "the NN O\nkernel B-X\n\n", "a.conll, line 2 has 2 columns, and the lines before it 3"),
        ("ner", "a.conll", "\n\n", "holds no examples"),
        ("ner", "a.conll", "the O\n", "all words have the tag 'O'"),
        ("qa", "a.json", "{", "a.json is no JSON"),
        ("qa", "a.json", '{"data": [{"paragraphs": [{"qas": [{}]}]}]}', "is not in SQuAD's format: after its"),
        ("qa", "a.json", '{"data": []}', "holds no examples"),
        ("qa", "a.json", "[" * 100_000, "a.json is no JSON"),
        ("classification", "a.jsonl", '{"text": ' + "[" * 100_000, "a.jsonl, line 1 is no JSON"),
        ("classification", "a.jsonl", '{"text": ["one"], "label": "a"}', "line 1 has a list as its 'text'; it must"),
        ("classification", "a.jsonl", '{"text": "\\ud800", "label": "a"}', "line 1 has half a character in its 'text'"),
    ],
)  # fmt: skip
def test_bad_training_data(bert, tmp_path, task, name, content, told):
    assert told in refused(bert, tmp_path, task, content, name)
    assert not (tmp_path / "out").exists()


def squad(answer, start):
    qa = {"id": "q7", "question": "who", "answers": [{"text": answer, "answer_start": start}]}
    return json.dumps({"data": [{"paragraphs": [{"context": "the kernel of", "qas": [qa]}]}]})


@pytest.mark.parametrize(
    ("answer", "start", "there"), [("kernel", 5, "'ernel '"), ("token", 4, "'kerne'"), ("", 4, "''")]
)
def test_an_answer_that_is_not_in_its_context(bert, tmp_path, answer, start, there):
    told = refused(bert, tmp_path, "qa", squad(answer, start), "a.json")
    assert f"question q7: the answer {answer!r} is not in its context at character {start}, where {there} is" in told


@pytest.mark.parametrize(
    "change",
    [{"question": 5}, {"context": 5}, {"text": 5}, {"answer_start": "4"}, {"question": None}, {"question": "\ud800"}],
)
def test_a_value_of_another_type_in_squad(bert, tmp_path, change):
    content = json.loads(squad("kernel", 4))
    [paragraph] = content["data"][0]["paragraphs"]
    [question] = paragraph["qas"]
    for values in (paragraph, question, question["answers"][0]):
        values.update({name: value for name, value in change.items() if name in values})
    told = refused(bert, tmp_path, "qa", json.dumps(content), "a.json")
    assert "a.json is not in SQuAD's format: after its beginning" in told


def test_an_answer_that_begins_before_its_context(bert, tmp_path):
    assert "is not in its context at character -9" in refused(bert, tmp_path, "qa", squad("kernel", -9), "a.json")


@pytest.mark.parametrize("name", ["dataset_info.json", "dataset_dict.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_saved_dataset(bert, tmp_path, name, content):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / name).write_text(content)
    given = ("--model", bert, "--train", tmp_path / "saved", "--output", tmp_path / "out")
    assert "saved can't be read" in tiny.refusal("finetune", "--task", "classification", *given)


def test_a_saved_dataset_that_lacks_a_text(bert, tmp_path):
    datasets.Dataset.from_dict({"text": ["one", None], "label": [1, 2]}).save_to_disk(tmp_path / "saved")
    given = ("--model", bert, "--train", tmp_path / "saved", "--output", tmp_path / "out")
    assert "saved, row 1 has no 'text'" in tiny.refusal("finetune", "--task", "classification", *given)


def test_a_saved_dataset_of_other_columns_than_it_says(bert, tmp_path):
    """Which is told in a dozen lines, unless they are joined."""
    datasets.Dataset.from_dict({"text": ["one"], "label": [1]}).save_to_disk(tmp_path / "saved")
    path = tmp_path / "saved" / "dataset_info.json"
    path.write_text(path.read_text().replace('"label"', '"class"'))
    given = ("--model", bert, "--train", tmp_path / "saved", "--output", tmp_path / "out")
    assert "saved can't be read as a saved dataset" in tiny.refusal("finetune", "--task", "classification", *given)


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
def test_a_damaged_row_of_a_saved_dataset(bert, tmp_path, command):
    """Its file says nothing of it, and a row is decoded when it is asked for."""
    table = {"text": ["one", "two-and-a-half", "three"], "label": [1, 2, 1]}
    datasets.Dataset.from_dict(table).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    path.write_bytes(path.read_bytes().replace(b"two-and-a-half", b"two\xa0and-a-half"))
    given = {"finetune": ("--task", "classification", "--train"), "pretrain": ("--corpus",)}
    more = (tmp_path / "saved", "--model", bert, "--output", tmp_path / "out")
    assert f"{tmp_path / 'saved'}, row " in (told := tiny.refusal(command, *given[command], *more))
    assert "can't be read: 'utf-8' codec can't decode byte 0xa0" in told


@pytest.mark.parametrize("label", [-1, 2])
def test_a_saved_dataset_with_a_label_that_has_no_name(bert, tmp_path, label):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, label]}, features)
    features["label"] = datasets.ClassLabel(names=["a", "b"])
    table.info.features["label"] = features["label"]
    table.save_to_disk(tmp_path / "saved")
    given = ("--model", bert, "--train", tmp_path / "saved", "--output", tmp_path / "out")
    told = tiny.refusal("finetune", "--task", "classification", *given)
    assert f"saved, row 1 has the label {label}; it may be 0 to 1" in told


def test_predict_looks_at_no_label(heads, tmp_path):
    """A contest's own set has -1 for all of them."""
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.Value("int64")})
    table = datasets.Dataset.from_dict({"text": ["one"], "label": [-1]}, features)
    table.info.features["label"] = datasets.ClassLabel(names=["a", "b"])
    table.save_to_disk(tmp_path / "saved")
    assert len(predict(heads["classification"], tmp_path / "saved", tmp_path / "out.json")) == 1


@pytest.mark.parametrize("there", [True, False])
def test_a_file_of_questions_that_can_not_be_read(bert, tmp_path, there):
    path = tmp_path / "a.json"
    if there:
        path.write_bytes(b"\xff")
    given = ("--model", bert, "--train", path, "--output", tmp_path / "out")
    told = tiny.refusal("finetune", "--task", "qa", *given)
    assert told.startswith(f"fastbert: {path} is not UTF-8" if there else f"fastbert: {path} can't be read")


def test_a_path_that_is_not_utf_8(bert, tmp_path):
    """The card names it, when all the work is done."""
    train = tmp_path / "\udcff.csv"
    train.write_text("text,label\none,a\ntwo,b\n")
    result = finetune(bert, tmp_path / "out", "classification", train, "--epochs", 1)
    assert result.exit_code == 0, result.output
    assert "\\udcff.csv" in (tmp_path / "out" / "README.md").read_text("utf-8")


def test_an_output_whose_name_is_not_utf_8(bert, tmp_path):
    """Before an hour of training, not after it."""
    train = tmp_path / "train.csv"
    train.write_text("text,label\none,a\ntwo,b\n")
    given = ("--model", bert, "--train", train, "--output", tmp_path / "\udcff")
    told = tiny.refusal("finetune", "--task", "classification", *given)
    assert "\\udcff has a name that isn't UTF-8" in told
    assert not (tmp_path / "\udcff").exists()


def test_unknown_labels_in_the_evaluation(bert, tmp_path):
    table = "text,label\none,a\ntwo,b\n"
    told = refused(bert, tmp_path, "classification", table, "a.csv", evaluated="text,label\none,a\nthree,c\n")
    assert "eval-a.csv, line 3 has the label 'c', which no training example has; they have 'a', 'b'" in told
    told = refused(bert, tmp_path, "ner", "the O\nkernel B-X\n", "a.conll", evaluated="the O\n\nof O\nrow B-Y\n")
    assert "sentence 2 has the tag 'B-Y', which no training sentence has; they have 'O', 'B-X'" in told


def test_other_refusals(bert, tmp_path):
    table = "text,label\none,a\ntwo,b\n"
    more = ("--early-stopping-patience", 2)
    assert "--early-stopping-patience needs --eval" in refused(bert, tmp_path, "classification", table, "a.csv", *more)
    told = refused(bert, tmp_path, "classification", table, "a.csv", "--max-length", 100)
    assert "--max-length is 100; tiny-bert has positions for 64 tokens" in told
    told = refused(bert, tmp_path, "qa", squad("kernel", 4), "a.json", "--max-length", 8)
    assert "question q7 has 3 tokens; with a length of 8 it may have 2" in told
    assert "no run to resume" in refused(bert, tmp_path, "classification", table, "a.csv", "--resume")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    told = refused(bert, tmp_path, "classification", table, "a.csv")
    assert f"--output {tmp_path / 'out'} is not empty; --overwrite adds to it" in told
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.parametrize("package", ["accelerate", "matplotlib"])
def test_without_the_packages_that_training_takes(tmp_path, package):
    process = tiny.start(
        "finetune", "--task", "ner", "--train", tmp_path / "a", "--output", tmp_path / "out",
        prelude=f"import sys; sys.modules['{package}'] = None",
    )  # fmt: skip
    stdout, stderr = process.communicate()
    assert process.returncode == 2, stderr
    assert stdout == ""
    wanted = f"training needs {package}, which isn't installed: `pip install '.[train]'` in fastbert's source tree"
    assert stderr.splitlines() == [f"fastbert: {wanted}"]


@pytest.mark.parametrize("command", ["finetune", "pretrain"])
@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--fp16",), "--fp16 is for a GPU, and this run is on cpu; --bf16 runs on both"),
        (("--fp16", "--bf16"), "--fp16 and --bf16 are both given; it may be one of them"),
    ],
)
def test_mixed_precision_that_can_not_be(bert, tmp_path, monkeypatch, command, options, told):
    """Before anything is read."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = {
        "finetune": ("--task", "ner", "--train", tmp_path / "absent.conll"),
        "pretrain": ("--corpus", tmp_path / "absent.txt"),
    }
    told_now = tiny.refusal(command, *given[command], "--model", bert, "--output", tmp_path / "out", *options)
    assert told in told_now
    assert not (tmp_path / "out").exists()


# And peft, which comes with accelerate only.
HIDDEN_PACKAGES = ("accelerate", "datasets", "matplotlib", "peft", "sklearn")
HIDDEN = f"import sys; sys.modules.update(dict.fromkeys({HIDDEN_PACKAGES}))"


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    """Heads that have learnt nothing."""
    folder = tmp_path_factory.mktemp("heads")
    kinds = {"classification": "Sequence", "ner": "Token"}
    made = {name: tiny.checkpoint(folder / name, f"BertFor{kind}Classification") for name, kind in kinds.items()}
    return {**made, "qa": tiny.checkpoint(folder / "qa", "BertForQuestionAnswering")}


def test_predict_blank_lines(heads, tmp_path):
    texts = tiny.write(tmp_path / "texts.txt", ["", "  "])
    assert [row["entities"] for row in predict(heads["ner"], texts, tmp_path / "out.json")] == [[], []]
    assert len(predict(heads["classification"], texts, tmp_path / "out.json")) == 2


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_predict_half_a_character_in_a_label(heads, tmp_path):
    folder = shutil.copytree(heads["classification"], tmp_path / "odd")
    change_config(folder, id2label={"0": "\ud800", "1": "b"})
    texts = tiny.write(tmp_path / "texts.txt", ["one"])
    [found] = predict(folder, texts, tmp_path / "out.json")
    assert set(found["scores"]) == {"\ud800", "b"}


@pytest.mark.parametrize("kind", ["classification", "ner", "qa"])
def test_predict_asks_for_no_other_outputs(heads, tmp_path, kind):
    folder = shutil.copytree(heads[kind], tmp_path / "told")
    texts = tiny.write(tmp_path / "q.csv", ["text,question,context", "the sum,the,of the row"])
    texts = texts if kind != "ner" else tiny.write(tmp_path / "texts.txt", ["the sum"])
    expected = predict(folder, texts, tmp_path / "out.json")
    change_config(folder, output_hidden_states=True, output_attentions=True)
    assert predict(folder, texts, tmp_path / "out.json") == expected


def test_predict_numbers(heads, tmp_path):
    table = tmp_path / "questions.jsonl"
    table.write_text('{"question": 5, "context": 678}\n')
    assert predict(heads["qa"], table, tmp_path / "out.json")[0]["question"] == "5"


@pytest.mark.parametrize("kind", ["classification", "ner", "qa"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.csv"])
def test_predict_refuses_an_empty_file(heads, tmp_path, kind, name):
    (tmp_path / name).write_text("")
    given = ("--model", heads[kind], "--texts", tmp_path / name, "--json", tmp_path / "out.json")
    told = tiny.refusal("predict", *given)
    assert "holds no examples" in told or "is no JSON" in told
    assert not (tmp_path / "out.json").exists()


def test_predict_replaces_no_pipe_or_device(heads, tmp_path):
    texts, out = tiny.write(tmp_path / "texts.txt", ["one"]), tmp_path / "out.json"
    os.mkfifo(out)
    told = tiny.refusal("predict", "--model", heads["ner"], "--texts", texts, "--json", out)
    assert f"--json {out} is no regular file" in told
    assert out.is_fifo()


CALLS = {
    "BertForSequenceClassification": ("the sum\nof the row\n", 3),
    "BertForTokenClassification": ("the sum\nof the row\n", 5),
    "BertForQuestionAnswering": ("question,context\nthe,of the row\nsum,the sum\n", 2),
}


@pytest.fixture(scope="module")
def without_training_extra(tmp_path_factory):
    """For each head and for a saved dataset, a call of ``predict`` where the extra's packages are hidden."""
    folder = tmp_path_factory.mktemp("hidden")
    calls = {}
    for kind, (text, labels) in CALLS.items():
        model = tiny.checkpoint(folder / kind, kind, num_labels=labels)
        texts = folder / f"{kind}{'.csv' if ',' in text else '.txt'}"
        texts.write_text(text)
        calls[kind] = ("predict", "--model", model, "--texts", texts, "--json", folder / f"{kind}.json")
    datasets.Dataset.from_dict({"text": ["the sum"]}).save_to_disk(folder / "saved")
    model = folder / "BertForSequenceClassification"
    calls["saved"] = ("predict", "--model", model, "--texts", folder / "saved", "--json", folder / "saved.json")
    return dict(
        zip(calls, zip(calls.values(), tiny.in_turn(*calls.values(), prelude=HIDDEN), strict=True), strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", CALLS)
def test_predict_needs_no_training_extra(without_training_extra, kind):
    call, done = without_training_extra[kind]
    assert done.returncode == 0, done.stderr
    out = call[-1]
    found = json.loads(out.read_text())
    tiny.run(*call)
    assert found == json.loads(out.read_text())
    assert len(found) == 2


@pytest.mark.slow
def test_predict_of_a_saved_dataset_without_datasets(without_training_extra):
    _, done = without_training_extra["saved"]
    assert done.returncode == 2, done.stderr
    assert "a saved dataset needs datasets, which isn't installed: `pip install '.[train]'`" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_checkpoint_of_another_architecture(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}')
    told = refused(tmp_path / "other", tmp_path, "classification", "text,label\none,a\ntwo,b\n", "a.csv")
    assert "has model_type gpt2 (GPT2Model), which fastbert doesn't serve" in told


def test_predict_refuses_an_encoder(bert, tmp_path):
    texts = tiny.write(tmp_path / "texts.txt", ["one"])
    told = tiny.refusal("predict", "--model", bert, "--texts", texts, "--json", tmp_path / "out.json")
    assert "tiny-bert is BertModel; predict serves BertForSequenceClassification" in told
    told = tiny.refusal("predict", "--model", bert, "--texts", texts, "--json", tmp_path / "no" / "out.json")
    assert "doesn't exist" in told
    told = tiny.refusal("predict", "--model", bert, "--texts", texts, "--json", texts)
    assert "is the file of the texts itself" in told
    assert texts.read_text() == "one\n"
