"""``fastbert pretrain``: what is learnt, that a stopped run resumes to the same end, and what is refused."""

import io
import itertools
import json
import random
import shutil
import signal
import time
import zipfile

import pytest
import torch
from cli import made, tiny
from transformers import AutoModelForMaskedLM, AutoTokenizer, BertForPreTraining
from transformers import BertModel as HuggingFaceModel

import fastbert
from fastbert.training import standard_library

# Without dropout, and with weights that keep the size of what they multiply, it learns in seconds.
SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
RUNS = {
    # Pairs are learnt last, and from many short ones.
    "mlm+nsp": {"steps": 500, "tokens-per-batch": 512, "max-length": 32},
    "mlm": {"steps": 150, "tokens-per-batch": 512},
    "mae": {"steps": 200},
}
SUBJECTS = ("kernel", "token", "batch", "mask")


def write_corpus(path, count=600, seed=0):
    """Documents about one subject each: a word of their sentences. The others follow a rule, but for one in six."""
    generator = random.Random(seed)
    documents = []
    for number in range(count):
        subject = SUBJECTS[number % len(SUBJECTS)]
        sentences = []
        for _ in range(generator.randint(4, 10)):
            words = []
            for _ in range(generator.randint(2, 4)):
                words += ["the", subject, "of", "the", generator.choice(("row", "sum")), "and"]
            sentences.append(" ".join(words[:-1]) + ".")
        documents.append("\n".join(sentences))
    path.write_text("\n\n".join(documents) + "\n", "utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps({**SMALL, "max_position_embeddings": 64, "model_type": "bert"}))
    return path


def arguments(corpus, config, output, objective="mlm+nsp", **options):
    chosen = {"steps": 40, "tokens-per-batch": 1024, "max-length": 48, "vocab-size": 120, "learning-rate": 3e-3}
    found = ["pretrain", "--corpus", corpus, "--config", config, "--output", output, "--objective", objective]
    for name, value in {**chosen, **options}.items():
        found += [f"--{name}", value]
    return found


@pytest.fixture(scope="module")
def pretrained(corpus, config, tmp_path_factory):
    folders = {}

    def of(objective):
        if objective not in folders:
            output = tmp_path_factory.mktemp("pretrained") / "out"
            half = RUNS[objective]["steps"] // 2
            more = {"eval-fraction": 0.3, "logging-steps": 50, "eval-steps": half, "save-steps": half}
            result = tiny.run(*arguments(corpus, config, output, objective, **more, **RUNS[objective]))
            assert result.exit_code == 0, result.output
            folders[objective] = output
        return folders[objective]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("objective", RUNS)
def test_it_learns(pretrained, objective):
    found = tiny.scores(pretrained(objective))
    card = (pretrained(objective) / "README.md").read_text()
    entropy = float(card.partition("unigram entropy of ")[2].split()[0])
    # Row or sum, a fair coin, is 0.69 nats for one word in six; all else follows from the document.
    assert found["eval_masked_loss"] < entropy / 2
    assert found["eval_masked_accuracy"] > found["eval_most_frequent_token"] + 0.3
    if objective == "mlm+nsp":
        # Over four hundred pairs: four standard deviations above chance.
        assert found["eval_next_sentence_accuracy"] > 0.6
    else:
        assert "eval_next_sentence_accuracy" not in found


@pytest.mark.slow
def test_what_is_in_the_folder(pretrained):
    folder = pretrained("mlm+nsp")
    names = {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "log.json", "training.png"} <= names
    assert not list(folder.glob("*.bin"))
    log = json.loads((folder / "log.json").read_text())
    tokens = [entry["num_input_tokens_seen"] for entry in log if "num_input_tokens_seen" in entry]
    assert tokens == sorted(tokens)
    assert 0.8 * 500 * 512 < tokens[-1] < 1.2 * 500 * 512


@pytest.mark.slow
def test_plain_transformers_loads_them(pretrained):
    for objective, kind in (("mlm+nsp", BertForPreTraining), ("mlm", AutoModelForMaskedLM)):
        model, report = kind.from_pretrained(pretrained(objective), output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(pretrained("mlm"))
    inputs = tokenizer("the kernel of the row and the [MASK] of the sum.", return_tensors="pt")
    place = int((inputs["input_ids"][0] == tokenizer.mask_token_id).nonzero())
    assert tokenizer.decode(model.eval()(**inputs).logits[0, place].argmax()) == "kernel"
    _, report = HuggingFaceModel.from_pretrained(pretrained("mae"), add_pooling_layer=False, output_loading_info=True)
    assert not report["missing_keys"]


@pytest.mark.slow
def test_from_pretraining_to_a_task(pretrained, tmp_path):
    """A vocabulary and an encoder of our own, fine-tuned: what all of this is for."""
    for name, seed in (("train", 0), ("eval", 1)):
        rows = [(text, label) for text, label in made.classified(200, seed)]
        made.write_csv(tmp_path / f"{name}.csv", ["text", "label"], rows)
    result = tiny.run(
        "finetune", "--task", "classification", "--model", pretrained("mae"), "--train", tmp_path / "train.csv",
        "--eval", tmp_path / "eval.csv", "--output", tmp_path / "out", "--learning-rate", 2e-3, "--epochs", 6,
        "--batch-size", 16, "--max-length", 32,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "and a new pooler" in result.stderr
    assert tiny.scores(tmp_path / "out")["eval_accuracy"] >= 0.95


@pytest.mark.slow
def test_going_on_from_a_checkpoint(pretrained, corpus, tmp_path):
    result = tiny.run(
        "pretrain", "--corpus", corpus, "--model", pretrained("mlm"), "--objective", "mae", "--steps", 2,
        "--max-length", 48, "--output", tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "has no head for mae; a new one is trained" in result.stderr
    before, after = (AutoTokenizer.from_pretrained(f).get_vocab() for f in (pretrained("mlm"), tmp_path / "out"))
    assert before == after


def weights(folder):
    return fastbert.BertForPreTraining.from_pretrained(folder).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_stopped_run_resumes_to_the_same_end(tmp_path, accumulation):
    """Dropout, masks, pairs, order, schedule and log go on as if nothing had been."""
    config = tmp_path / "config.json"
    dropout = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    config.write_text(json.dumps({**SMALL, **dropout, "max_position_embeddings": 64}))
    # Epochs of about a dozen batches, so that the runs go over the ends of some.
    corpus = write_corpus(tmp_path / "corpus.txt", 80)
    more = {"steps": 16, "tokens-per-batch": 512, "save-steps": 6, "eval-steps": 8, "logging-steps": 1}
    more["gradient-accumulation-steps"] = accumulation
    killed = arguments(corpus, config, tmp_path / "killed", **more)
    wanted = random.Random(accumulation).randint(7, 12)
    # Slow from there on, so that it is killed before its end however late this process sees it.
    prelude = (
        "import torch, time; torch.set_num_threads(1)\n"
        "import fastbert.training.trainer as t\n"
        "t.Journal.on_step_end = lambda self, args, state, control, **more: "
        f"time.sleep(2 * (state.global_step >= {wanted}))\n"
    )
    process = tiny.start(*killed, prelude=prelude)
    log = tmp_path / "killed" / "log.json"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if json.loads(log.read_text())[-1]["step"] >= wanted:
                break
        except (OSError, ValueError):
            pass
        time.sleep(0.01)
    how = signal.SIGKILL if accumulation == 1 else signal.SIGINT
    process.send_signal(how)
    _, stderr = process.communicate()
    if how == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 130
        assert "stopped; the same command with --resume goes on from the last checkpoint" in stderr
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    # As if it had been killed while it wrote a checkpoint.
    (tmp_path / "killed" / "checkpoint-15").mkdir()
    resumed = tiny.run(*killed, "--resume")
    assert resumed.exit_code == 0, resumed.output
    whole = tiny.run(*arguments(corpus, config, tmp_path / "whole", **more))
    assert whole.exit_code == 0, whole.output
    losses = []
    for name in ("killed", "whole"):
        entries = json.loads((tmp_path / name / "log.json").read_text())
        losses.append([(e["step"], e.get("loss"), e.get("eval_loss")) for e in entries if "train_loss" not in e])
    assert len(losses[1]) == 18
    assert losses[0] == losses[1]
    found, expected = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


@pytest.fixture(scope="module")
def ended(corpus, config, tmp_path_factory):
    """A run with two checkpoints."""
    output = tmp_path_factory.mktemp("ended") / "out"
    result = tiny.run(*arguments(corpus, config, output, **TWO_CHECKPOINTS))
    assert result.exit_code == 0, result.output
    return output


TWO_CHECKPOINTS = {"steps": 4, "save-steps": 2, "eval-fraction": 0, "threads": 1}


def flip(data):
    """A bit in the middle of an archive's largest part, or of a safetensors file's head, which has no checksum."""
    if not data.startswith(b"PK"):
        return data[:100] + b"}" + data[101:]
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        part = archive.read(max(archive.infolist(), key=lambda member: member.file_size))
    place = data.index(part) + len(part) // 2
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "model.safetensors"])
@pytest.mark.parametrize("damage", ["flipped", "short", "empty", "text", "missing"])
def test_a_damaged_checkpoint_of_a_run_is_named(corpus, config, ended, tmp_path, name, damage):
    """Case 64."""
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    path = output / "checkpoint-4" / name
    data = path.read_bytes()
    changed = {"flipped": flip(data), "short": data[:-100], "empty": b"", "text": b"no archive"}
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(changed[damage])
    before = {left: left.read_bytes() for left in output.rglob("*") if left.is_file()}
    told = tiny.refusal(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert f"{path} is {'missing' if damage == 'missing' else 'damaged'}" in told
    assert f"without {path.parent} --resume goes on from the checkpoint before" in told
    assert {left: left.read_bytes() for left in output.rglob("*") if left.is_file()} == before


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_damaged_end_of_an_archive(corpus, config, ended, tmp_path, name):
    """The number of a disk, which torch minds and Python's zipfile doesn't."""
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    path = output / "checkpoint-4" / name
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x06\x06") + 16] ^= 1
    path.write_bytes(data)
    told = tiny.refusal(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert f"{path} is damaged" in told


def another(value):
    """A whole archive of ``torch.save``, of something else."""
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("trainer_state.json", lambda data: data.replace(b'"log_history"', b'"log_histori"')),
        (
            "trainer_state.json",
            lambda data: data.replace(b'"stateful_callbacks": {', b'"stateful_callbacks": 5, "x": {'),
        ),
        ("trainer_state.json", lambda data: data.replace(b'"save_steps": 2', b'"save_steps": "x"')),
        ("config.json", lambda data: data.replace(b'"vocab_size"', b'"pad_token_id": [], "vocab_size"')),
        ("optimizer.pt", lambda data: another({})),
        ("scheduler.pt", lambda data: another(None)),
        ("rng_state.pth", lambda data: another({})),
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1])),
        ("checksums.json", lambda data: b"{"),
    ],
)
def test_a_file_of_a_checkpoint_that_is_whole_and_not_what_was_written(corpus, config, ended, tmp_path, name, change):
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    path = output / "checkpoint-4" / name
    data = path.read_bytes()
    path.write_bytes(change(data))
    assert path.read_bytes() != data
    told = tiny.refusal(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert f"{path} is damaged" in told


def test_a_checkpoint_whose_checksums_were_not_yet_written(corpus, config, ended, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    (output / "checkpoint-4" / "checksums.json").unlink()
    result = tiny.run(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", ["checkpoint-best", "checkpoint-", "checkpoint-4-old", "checkpoint-99"])
def test_what_is_no_checkpoint_of_a_run_is_left_as_it_is(corpus, config, ended, tmp_path, name):
    """Also by Trainer, which takes it for the oldest of too many checkpoints."""
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    if name == "checkpoint-99":
        (output / name).write_text("a file")
    else:
        shutil.copytree(output / "checkpoint-2", output / name)
    shutil.rmtree(output / "checkpoint-4")
    for how in ("--resume", "--overwrite"):
        result = tiny.run(*arguments(corpus, config, output, **TWO_CHECKPOINTS), how)
        assert result.exit_code == 0, result.output
        if name != "checkpoint-99" or how == "--resume":
            assert (output / name).exists()
        assert (output / "checkpoint-4").exists()


def test_the_last_checkpoints_are_kept(corpus, config, tmp_path):
    more = {"steps": 5, "save-steps": 1, "save-total-limit": 2, "eval-fraction": 0}
    assert tiny.run(*arguments(corpus, config, tmp_path / "out", **more)).exit_code == 0
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {"checkpoint-4", "checkpoint-5"}


def test_a_run_goes_on_without_its_damaged_checkpoint(corpus, config, ended, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    shutil.rmtree(output / "checkpoint-4")
    result = tiny.run(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert result.exit_code == 0, result.output
    found, expected = weights(output), weights(ended)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=0, msg=name)


def test_a_damaged_tokenizer_of_a_run(corpus, config, ended, tmp_path):
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    (output / "tokenizer.json").write_text("{")
    told = tiny.refusal(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert f"the tokenizer of {output} can't be used" in told


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("checkpoint-4/trainer_state.json", "[]"),
        ("checkpoint-4/trainer_state.json", '{"global_step": 3}'),
        ("fastbert.json", "{"),
        ("fastbert.json", "[]"),
        ("fastbert.json", "\udcff"),
    ],
)
def test_a_damaged_record_of_a_run_is_named(corpus, config, ended, tmp_path, name, text):
    output = tmp_path / "out"
    shutil.copytree(ended, output)
    (output / name).write_text(text, "utf-8", errors="surrogateescape")
    told = tiny.refusal(*arguments(corpus, config, output, **TWO_CHECKPOINTS), "--resume")
    assert f"{output / name} is damaged" in told


def test_resume_needs_the_same_settings(corpus, config, tmp_path):
    ours = arguments(corpus, config, tmp_path / "out", steps=2)
    assert "has no run to resume; without --resume one begins" in tiny.refusal(*ours, "--resume")
    assert tiny.run(*ours).exit_code == 0
    told = tiny.refusal(*arguments(corpus, config, tmp_path / "out", steps=3), "--resume")
    assert "holds a run with steps 2, and 3 is asked for; --resume needs the same settings" in told
    told = tiny.refusal(*ours)
    assert "is not empty; --resume goes on with it, and --overwrite begins again" in told
    assert tiny.run(*ours, "--overwrite").exit_code == 0


def test_the_default_corpus(config, tmp_path, monkeypatch):
    """Of its first hundred files; test_corpus.py reads all of them."""
    sources = standard_library._sources
    monkeypatch.setattr(standard_library, "_sources", lambda root: itertools.islice(sources(root), 100))
    result = tiny.run(
        "pretrain", "--config", config, "--output", tmp_path / "out", "--steps", 3, "--max-length", 32,
        "--vocab-size", 500, "--eval-fraction", 0, "--logging-steps", 1,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    losses = [entry["loss"] for entry in json.loads((tmp_path / "out" / "log.json").read_text()) if "loss" in entry]
    assert len(losses) == 3
    assert losses[-1] < losses[0]


def test_mixed_precision_checkpointing_and_whole_words(corpus, config, tmp_path):
    more = ("--bf16", "--gradient-checkpointing", "--whole-word", "--cased")
    result = tiny.run(*arguments(corpus, config, tmp_path / "out", steps=20), *more)
    assert result.exit_code == 0, result.output
    assert tiny.scores(tmp_path / "out")["eval_masked_loss"] < 4


def test_a_vocabulary_that_knows_no_word(checkpoint, tmp_path):
    strange = shutil.copytree(checkpoint, tmp_path / "strange")
    (strange / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n")
    text = tiny.write(tmp_path / "text.txt", ["the sum of the row"])
    given = ("--model", strange, "--corpus", text, "--objective", "mlm", "--eval-fraction", 0, "--max-length", 48)
    result = tiny.run("pretrain", "--output", tmp_path / "out", *given)
    assert result.exit_code == 2
    assert "the corpus has no token to mask: the vocabulary knows none of its words" in result.stderr
    assert not (tmp_path / "out").exists()


def test_refused(corpus, config, checkpoint, tmp_path):
    def told(*more, **options):
        return tiny.refusal(*arguments(corpus, config, tmp_path / "out", **options), *more)

    assert "--model and --config are both given" in told("--model", checkpoint)
    assert "--max-length is 65; the model has positions for 64 tokens" in told(**{"max-length": 65})
    assert "--eval-fraction 0.0001 of 600 documents leaves none to evaluate on" in told(**{"eval-fraction": 0.0001})
    one = tmp_path / "one.txt"
    one.write_text("A sentence. Another.\n")
    assert "the corpus has 1 documents, of which fewer than two" in told("--corpus", one, **{"eval-fraction": 0})
    assert "doesn't exist; a corpus is" in told("--corpus", tmp_path / "absent")
    for text, problem in (
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ('{"model_type": "gpt2"}', "has model_type gpt2; it must be bert"),
        ('{"hidden_size": 10, "num_attention_heads": 3}', "hidden_size is 10, no multiple of num_attention_heads"),
        ('{"num_attention_heads": 0}', "num_attention_heads is 0; it must be 1 or more"),
        ('{"hidden_act": "nope"}', "hidden_act is nope; it must be one of"),
        ('{"num_hidden_layers": 1000000}', "describes a BERT of"),
        ('{"attn_implementation": "nope"}', 'makes no model: Specified `attn_implementation="nope"`'),
    ):
        wrong = tmp_path / "wrong.json"
        wrong.write_text(text)
        assert problem in tiny.refusal(*arguments(corpus, wrong, tmp_path / "other"))
    file = tmp_path / "file"
    file.write_text("")
    assert "is a file; it must be a folder" in tiny.refusal(*arguments(corpus, config, file))
