"""The training loop: Hugging Face's curve on the fused path, and steps that don't depend on how a batch is divided."""

import json
import random
import re
import socket
import subprocess
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from cli import made, tiny
from models import twins
from transformers.models.bert import modeling_bert as hf

import fastbert
from fastbert.training import batches, pretraining, run, trainer, vocabulary
from fastbert.training.errors import DataError
from fastbert.training.kinds import Objective
from fastbert.training.masking import Masking
from fastbert.training.pretraining import Examples
from fastbert.training.run import Settings

HEADS = {Objective.mlm_nsp: "BertForPreTraining", Objective.mlm: "BertForMaskedLM"}


@pytest.fixture(scope="module")
def tokenizer():
    return vocabulary.learn([" ".join(tiny.WORDS)] * 9, 101, 64)


def examples(tokenizer, objective):
    generator = random.Random(0)
    documents = [
        [" ".join(generator.choices(tiny.WORDS, k=generator.randint(2, 12))) for _ in range(12)] for _ in range(40)
    ]
    return Examples(pretraining.encode(documents, tokenizer), objective, Masking(tokenizer), 48, 0)


def train(model, tokenizer, data, output, objective, **settings):
    """The losses of each step."""
    chosen = {"logging_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 1.0, "use_cpu": True, **settings}
    run.train(
        model,
        tokenizer,
        data,
        None,
        Settings(output=output, **chosen),
        collator=batches.Collator(tokenizer.pad_token_id, pretraining.KEYS[objective]),
        checkpoint=None,
    )
    log = json.loads((output / "log.json").read_text())
    return torch.tensor([entry["loss"] for entry in log if "loss" in entry], dtype=torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("objective", HEADS)
def test_a_hundred_steps_are_hugging_faces(tokenizer, tmp_path, objective):
    reference, fast = twins.twins(HEADS[objective], initializer_range=0.02)
    fast.sparse_prediction = True
    data = examples(tokenizer, objective)
    losses = [
        train(model, tokenizer, data, tmp_path / name, objective, steps=100, tokens_per_batch=400)
        for model, name in ((fast, "fast"), (reference, "reference"))
    ]
    assert type(reference) is getattr(hf, HEADS[objective])
    assert len(losses[0]) == 100
    assert losses[0][-10:].mean() < losses[0][:10].mean() - 0.3
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=0)
    twins.assert_packed(fast)


@pytest.mark.slow
@pytest.mark.parametrize("objective", HEADS)
def test_the_first_gradients_are_hugging_faces(tokenizer, objective):
    reference, fast = twins.twins(HEADS[objective], initializer_range=0.02)
    oracle = twins.twins(HEADS[objective], initializer_range=0.02)[0].double()
    fast.sparse_prediction = True
    data = examples(tokenizer, objective)
    collator = batches.Collator(tokenizer.pad_token_id, pretraining.KEYS[objective])
    batch = collator([data[key] for key in range(12)])
    for model in (reference, fast, oracle):
        found = model.train()(**batch)
        found.loss.backward()
    twins.assert_gradients_match(fast, reference, oracle)


@pytest.mark.slow
@pytest.mark.parametrize("objective", HEADS)
def test_accumulation_makes_the_same_steps(tokenizer, tmp_path, objective):
    """Batches have other numbers of masked tokens and of pairs, and the last step of an epoch is a smaller one."""
    data = examples(tokenizer, objective)
    assert len(data) % 16
    results = []
    for size, accumulation in ((16, 1), (8, 2), (4, 4), (16, 1)):
        model = twins.twins(HEADS[objective])[1]
        output = tmp_path / f"{size}-{accumulation}-{len(results)}"
        how = {"epochs": 2.0, "batch_size": size, "gradient_accumulation_steps": accumulation}
        losses = train(model, tokenizer, data, output, objective, **how)
        results.append((losses, torch.cat([p.detach().flatten() for p in model.parameters()])))
    (losses, weights), *others, (_, again) = results
    assert torch.equal(weights, again)
    for other_losses, other_weights in others:
        torch.testing.assert_close(other_losses, losses, rtol=1e-5, atol=0)
        torch.testing.assert_close(other_weights, weights, rtol=0, atol=2e-4)


# Each process of a launch runs this: it imports everything once, and forks for each call that it takes part in.
# accelerate shards on accelerators only, and these processes have none: a call with --fsdp is told otherwise.
CALLS_IN_TURN = """
import atexit, json, os, runpy, shutil, sys
from accelerate import DistributedType, PartialState
from fastbert.cli import finetune, pretrain

initialize = PartialState.__init__

def shards_on_cpus(self, *args, **kwargs):
    initialize(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU

def run(call, rank):
    arguments = [str(argument) for argument in call["arguments"]]
    places = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "ROLE_RANK": rank}
    sizes = dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE", "ROLE_WORLD_SIZE"), len(call["ranks"]))
    # The launcher's store is for one process group; another has a store of its own.
    store = {"TORCHELASTIC_USE_AGENT_STORE": False, "MASTER_PORT": call["port"]} if call["port"] else {}
    os.environ.update({name: str(value) for name, value in {**places, **sizes, **store}.items()})
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(call["output"] + "." + name, os.O_WRONLY | os.O_APPEND | os.O_CREAT), stream)
    if "--fsdp" in arguments:
        PartialState.__init__ = shards_on_cpus
    sys.argv[:] = ["fastbert", *arguments, "--output", call["output"]]
    try:
        runpy.run_module("fastbert", run_name="__main__")
    except SystemExit as ended:
        # Taking the interpreter's modules apart takes seconds in a fork.
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ended.code or 0)

rank = int(os.environ["RANK"])
for call in json.loads(sys.argv[1]):
    if rank in call["ranks"]:
        if call["stopped"] and rank == call["ranks"][0]:
            shutil.copytree(call["stopped"], call["output"], ignore=shutil.ignore_patterns("checkpoint-12"))
            os.remove(os.path.join(call["output"], "model.safetensors"))
        if not (child := os.fork()):
            run(call, call["ranks"].index(rank))
            sys.exit("the command returned")
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            sys.exit("the call for " + call["output"] + " failed")
"""


class Call(NamedTuple):
    """A call of the command by the processes ``ranks`` of a launch."""

    ranks: list[int]
    arguments: tuple[object, ...]
    output: Path
    # The output of a run, which is copied as if it had been stopped after its first checkpoint.
    stopped: Path | None = None
    # Where its processes find each other; None, for one call only, is the launcher's.
    port: int | None = None

    def printed(self, stream):
        return Path(f"{self.output}.{stream}").read_text()


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def launch(calls):
    """Two processes make the calls in turn; as many of them as a call has form its process group."""
    program = calls[0].output.parent / "calls.py"
    program.write_text(CALLS_IN_TURN)
    described = json.dumps([call._asdict() for call in calls], default=str)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", str(program), described]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    told = [path.read_text()[-2000:] for path in sorted(program.parent.glob("*.stderr"))]
    assert done.returncode == 0, "\n".join([*told, done.stderr[-3000:]])


def losses_of(output):
    log = json.loads((output / "log.json").read_text())
    return torch.tensor([entry["loss"] for entry in log if "loss" in entry], dtype=torch.float64)


def weights_of(output):
    return fastbert.BertForPreTraining.from_pretrained(output).state_dict()


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Calls of one process and of two, each with half of the batch."""
    folder = tmp_path_factory.mktemp("launched")
    config = folder / "config.json"
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config.write_text(json.dumps({**off, **sizes}))
    corpus = folder / "corpus.txt"
    generator = random.Random(0)
    blocks = ["\n".join(" ".join(generator.choices(tiny.WORDS, k=9)) + "." for _ in range(8)) for _ in range(60)]
    corpus.write_text("\n\n".join(blocks))
    made.write_conll(folder / "train.conll", 100)
    bert = tiny.checkpoint(folder / "bert", initializer_range=0.05, **off)
    common = ("--logging-steps", 1, "--threads", 1, "--learning-rate", 1e-3)
    pretrain = ("pretrain", "--corpus", corpus, "--config", config, "--steps", 12, "--max-length", 48, *common)
    ner = ("finetune", "--task", "ner", "--model", bert, "--train", folder / "train.conll", "--epochs", 2, *common)
    one, two = ((*pretrain, "--save-steps", 6, "--tokens-per-batch", tokens) for tokens in (1024, 512))
    calls = {
        ("pretrain", 1): Call([0], one, folder / "pretrain-1", port=free_port()),
        ("ner", 1): Call([1], (*ner, "--batch-size", 16), folder / "ner-1", port=free_port()),
        ("ner", 2): Call([0, 1], (*ner, "--batch-size", 8), folder / "ner-2"),
        ("pretrain", 2): Call([0, 1], two, folder / "pretrain-2", port=free_port()),
        ("sharded", 2): Call([0, 1], (*two, "--fsdp"), folder / "sharded", port=free_port()),
    }
    # Two processes go on where two were stopped.
    for name, more in (("pretrain", ()), ("sharded", ("--fsdp",))):
        output = folder / f"resumed-{name}"
        calls["resumed", name] = Call([0, 1], (*two, *more, "--resume"), output, calls[name, 2].output, free_port())
    launch(list(calls.values()))
    return calls


@pytest.mark.slow
@pytest.mark.parametrize(("name", "other"), [("pretrain", "pretrain"), ("pretrain", "sharded"), ("ner", "ner")])
def test_two_processes_train_as_one(launched, name, other):
    alone, together = launched[name, 1].output, launched[other, 2].output
    expected = losses_of(alone)
    assert len(expected) > 10
    torch.testing.assert_close(losses_of(together), expected, rtol=1e-5, atol=0)
    kind = {"pretrain": fastbert.BertForPreTraining, "ner": fastbert.BertForTokenClassification}[name]
    weights = [kind.from_pretrained(output).state_dict() for output in (alone, together)]
    for path, value in weights[0].items():
        torch.testing.assert_close(weights[1][path], value, rtol=0, atol=2e-4, msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sharded", "ner"])
def test_one_process_tells_and_writes(launched, name):
    call = launched[name, 2]
    assert len(re.findall(r"^step 1 of ", call.printed("stderr"), re.MULTILINE)) == 1
    assert len(call.printed("stdout").splitlines()) == 1
    assert not list(call.output.glob("*.bin"))


@pytest.mark.slow
def test_each_process_saves_its_shards(launched):
    for saved in ("pytorch_model_fsdp_0", "optimizer_0"):
        shards = sorted((launched["sharded", 2].output / "checkpoint-6" / saved).glob("*.distcp"))
        assert [path.name for path in shards] == ["__0_0.distcp", "__1_0.distcp"]
        sizes = [path.stat().st_size for path in shards]
        assert min(sizes) > 0.8 * max(sizes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain", "sharded"])
def test_two_processes_resume(launched, name):
    whole, resumed = launched[name, 2].output, launched["resumed", name]
    steps = re.findall(r"^step (\d+) of 12  loss", resumed.printed("stderr"), re.MULTILINE)
    assert steps == [str(step) for step in range(7, 13)]
    torch.testing.assert_close(losses_of(resumed.output), losses_of(whole), rtol=0, atol=0)
    weights = weights_of(whole)
    for path, value in weights_of(resumed.output).items():
        torch.testing.assert_close(value, weights[path], rtol=0, atol=0, msg=path)


def test_too_few_examples(tokenizer):
    with pytest.raises(ValueError, match="there are 1 examples for 2 processes"):
        batches.Batches([3], 0, batch_size=4, processes=2)


def test_sharding_needs_gpus(tmp_path):
    with pytest.raises(DataError, match="--fsdp shards over the processes of several GPUs, and this run has 1 on cpu"):
        run.join_processes(Settings(output=tmp_path / "out", fsdp=True))


def test_curves_of_a_log():
    history = [
        {"step": 1, "epoch": 0.1, "loss": 3.0, "learning_rate": 1e-3, "train_runtime": 1.0},
        {"step": 2, "epoch": 0.2, "loss": 2.0, "num_input_tokens_seen": 9, "train_tokens_per_second": 4.0},
        {"step": 2, "epoch": 0.2, "eval_loss": 2.5, "eval_f1": 0.5, "eval_runtime": 1.0, "eval_steps_per_second": 2.0},
        {"step": 2, "train_loss": 2.5, "train_runtime": 9.0, "total_flos": 1.0},
    ]
    assert trainer.curves(history) == {
        "loss": [(1, 3.0), (2, 2.0)],
        "learning_rate": [(1, 1e-3)],
        "eval_loss": [(2, 2.5)],
        "eval_f1": [(2, 0.5)],
    }


def test_plot(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.plot([{"step": 1, "eval_loss": 2.0, "eval_f1": 0.3}], tmp_path / "a.png")
        trainer.plot([], tmp_path / "b.png")
    assert (tmp_path / "a.png").stat().st_size > (tmp_path / "b.png").stat().st_size > 1000


def test_transformers_is_left_as_it_was():
    """Nothing here stays behind in the library: models that are trained elsewhere are Hugging Face's."""
    assert type(transformers.BertForMaskedLM(twins.config())) is hf.BertForMaskedLM
