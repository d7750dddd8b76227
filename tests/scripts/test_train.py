"""train.py: arguments, what decays, exact held-out figures, stopping at NaN, and resuming bit for bit."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from _script_helpers import ROOT, document_nats, make_text, save_model, write_run
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from train import make_trainer, run
from training.arguments import Resume, read_arguments
from training.checkpoint import find_checkpoint
from training.text_tokenizer import byte_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_griffin import GriffinForCausalLM, decay_parameter_names


def trainer_of(path: str, *overrides: str):
    model, data, training, _ = read_arguments([path, *overrides])
    return make_trainer(model, data, training, Resume())[0]


@pytest.mark.parametrize("path", sorted((ROOT / "configuration" / "training").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_configurations_parse(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    model, data, training, resume = read_arguments([str(path)])
    assert resume.checkpoint is None and training.max_grad_norm == 1.0 and training.warmup_steps > 0
    assert str(training.lr_scheduler_type).startswith("cosine") or training.lr_scheduler_type.startswith("cosine")
    if training.save_strategy == "steps":  # else the first loss logged after --resume would be of fewer steps
        assert training.save_steps % training.logging_steps == 0
    assert path.read_text().startswith("# ")
    if model.config_name is not None:
        assert Path(model.config_name).is_file()
        assert data.tokenizer == "bytes" or data.tokenizer_vocab_size > 256


def test_command_line_wins_over_the_file(tmp_path):
    path = write_run(tmp_path, learning_rate="1e-3", lr_scheduler_kwargs={"min_lr_rate": 0.1}, bf16=False)
    words = ["--max_steps", "7", "--text-column=body", "--use_cpu", "--config_name=", "--model_name_or_path=x"]
    model, data, training, resume = read_arguments([path, *words])
    assert (model.config_name, model.model_name_or_path) == (None, "x")
    assert training.learning_rate == 1e-3  # "1e-3" is a string in YAML 1.1
    assert training.lr_scheduler_kwargs == {"min_lr_rate": 0.1}
    assert (training.max_steps, data.text_column, training.use_cpu, resume.checkpoint) == (7, "body", True, None)
    assert read_arguments([path, "--resume"])[3].checkpoint is True
    assert read_arguments([path, "--resume", "folder", "--seed", "3"])[3].checkpoint == "folder"


@pytest.mark.parametrize("use_cpu", [True, "yes"])
def test_bfloat16_is_for_gpus(tmp_path, monkeypatch, use_cpu):
    """A machine with a GPU, of which the run makes no use: float32, as on any other CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    assert not read_arguments([write_run(tmp_path, use_cpu=use_cpu)])[2].bf16
    assert not read_arguments([write_run(tmp_path, use_cpu=None), "--use_cpu", "true"])[2].bf16


@pytest.mark.parametrize(
    "settings, overrides, message",
    [
        ({}, ["--learning_rat", "1"], r"unknown key 'learning_rat'.*nearest allowed are learning_rate"),
        ({"secuence_length": 9}, [], r"unknown key 'secuence_length'.*sequence_length"),
        ({}, ["7"], "'7' follows no --key"),
        ({"sequence_length": 1}, [], "sequence_length = 1"),
        ({"preprocessing_num_proc": 0}, [], "preprocessing_num_proc = 0: allowed are whole numbers from 1"),
        ({}, ["--per_device_train_batch_size", "0"], "per_device_train_batch_size = 0: allowed are"),
        ({}, ["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps = 0: allowed are"),
        ({"config_overrides": {"hidden_size": -3}, "train_data": "not/read"}, [], "hidden_size = -3: allowed are"),
        ({"model_name_or_path": "x"}, [], "exactly one"),
        ({"config_name": None}, [], "exactly one"),
        ({"config_name": None, "model_name_or_path": "x", "config_overrides": "{}"}, [], "config_overrides"),
        ({"config_overrides": {"hiden_size": 3}}, [], "hiden_size"),
        ({"config_overrides": {"vocab_size": 100}}, [], "258 tokens.*100 rows"),
        ({"text_column": "body"}, [], r"text_column = 'body'.*\['text'\]"),
        ({}, ["--resume"], "holds no complete checkpoint"),
        ({}, ["--resume", "/nowhere"], "--resume /nowhere"),
    ],
)
def test_wrong_arguments_end_in_one_line(tmp_path, settings, overrides, message):
    with pytest.raises(SystemExit, match=message):
        run([write_run(tmp_path, **settings), *overrides])


def test_wrong_types_end_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run([write_run(tmp_path), "--learning_rate", "fast"])
    assert "argument --learning_rate/--learning-rate: invalid float value: 'fast'" in capsys.readouterr().err


def test_a_run_leaves_model_tokenizer_metrics_and_curve(tmp_path, capsys):
    settings = dict(max_steps=6, eval_strategy="steps", eval_steps=3, tokenizer="bpe", tokenizer_vocab_size=300)
    path = write_run(tmp_path, **settings)
    trainer, metrics = run([path, "--config_overrides", '{"vocab_size": 320, "rg_lru_c": 4.0}'])
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0] == f"reading {tmp_path / 'data.jsonl'}" and "RG-LRU scan: torch on cpu" in lines[1]
    assert lines[2] == "one process on CPU, float32" and "{'" not in printed

    out = tmp_path / "out"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert isinstance(model, GriffinForCausalLM)
    assert (model.config.vocab_size, model.config.rg_lru_c, model.config.use_cache) == (320, 4.0, True)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert len(tokenizer) == 300
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name

    assert metrics == json.loads((out / "metrics.json").read_text())
    assert [entry["step"] for entry in metrics["train"]] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in metrics["eval"]] == [3, 6]  # not evaluated twice at the end
    assert [entry["tokens"] for entry in metrics["train"]] == [128 * (i + 1) for i in range(6)]
    assert metrics["tokens_seen"] == 6 * 2 * 64 and metrics["tokens_per_second"] > 0
    assert metrics["bits_per_byte"] == metrics["eval"][-1]["eval_bits_per_byte"]
    assert metrics["seed"] == 42 and metrics["versions"]["torch"] == torch.__version__
    assert (out / "loss_curve.png").read_bytes().startswith(b"\x89PNG")


def test_no_secret_is_written_and_the_command_starts_the_run_again(tmp_path, monkeypatch, capsys):
    """Into any file: metrics, card, trainer's arguments, checkpoints."""
    monkeypatch.setenv("HF_TOKEN", "the-token-of-before")
    path = write_run(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    words = [path, "--hub_token", "hf_SECRETSECRET", "--run_name=https://me:pw123456@host/x"]
    for more in ([], ["--resume", "--max_steps", "3", "--allow_changed", "max_steps", "--logging_steps", "1"]):
        monkeypatch.setattr("sys.argv", ["scripts/train.py", *words, *more])
        _, metrics = run([*words, *more])
    assert os.environ["HF_TOKEN"] == "hf_SECRETSECRET"  # where the Hub's client looks for it
    assert metrics["command"] == (
        f"python scripts/train.py {path} --hub_token HIDDEN '--run_name=https://HIDDEN@host/x' --max_steps 3 "
        "--logging_steps 1"
    ).replace("'", "")
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert any(file.suffix == ".bin" for file in files)
    assert not [file for file in files if b"SECRETSECRET" in file.read_bytes()]
    assert not [file for file in files if b"pw123456" in file.read_bytes() and file.suffix != ".bin"]


def test_held_out_figures_are_those_of_the_documents_alone(tmp_path):
    texts = [make_text(30 + i, seed=100 + i) for i in range(5)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    path = write_run(tmp_path, eval_data=str(tmp_path / "held_out.jsonl"), sequence_length=2048, max_steps=2)
    trainer, metrics = run([path])
    documents = [[256, *text.encode(), 256] for text in texts]
    nats = sum(document_nats(trainer.model.eval(), tokens) for tokens in documents)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert metrics["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert metrics["eval_loss"] == pytest.approx(nats / sum(len(tokens) - 1 for tokens in documents), rel=1e-5)

    # Rows that cut documents lose context, but no token: batches of unequal numbers of tokens do not shift the mean.
    rows = trainer_of(path, "--sequence_length", "50", "--per_device_eval_batch_size", "3")
    rows.model.load_state_dict(trainer.model.state_dict())
    stream = [token for tokens in documents for token in tokens]
    starts = {sum(len(tokens) for tokens in documents[:i]) for i in range(len(documents))}
    nats = 0.0
    for begin in range(0, len(stream) - 1, 49):
        cuts = sorted({begin, *(s for s in starts if begin < s < begin + 50), min(begin + 50, len(stream))})
        nats += sum(document_nats(rows.model.eval(), stream[a:b]) for a, b in zip(cuts, cuts[1:]))
    evaluated = rows.evaluate()
    assert evaluated["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert evaluated["eval_bits_per_byte"] > metrics["bits_per_byte"]


def test_what_decays(tmp_path):
    trainer = trainer_of(write_run(tmp_path, weight_decay=0.1))
    trainer.create_optimizer()
    names = {parameter: name for name, parameter in trainer.model.named_parameters()}
    groups = {group["weight_decay"]: {names[p] for p in group["params"]} for group in trainer.optimizer.param_groups}
    assert set(groups) == {0.1, 0.0}
    assert groups[0.1] | groups[0.0] == set(names.values()) and not groups[0.1] & groups[0.0]
    decayed = {name.split(".", 3)[-1] for name in groups[0.1]}
    assert decayed == {
        *(f"temporal_block.{name}.weight" for name in ("linear_x", "linear_y", "linear_out", "conv_1d")),
        *(f"temporal_block.{name}_proj.weight" for name in "qkvo"),
        *(f"mlp_block.{name}_proj.weight" for name in ("gate", "up", "down")),
    }
    for part in ("lambda_bias", "recurrence_gate.weight", "input_gate.bias", "final_norm.weight", "tokens.weight"):
        assert any(name.endswith(part) for name in groups[0.0]), part


class Wrapped(torch.nn.Module):
    """As FSDP's first version and others wrap: one module more in each name."""

    def __init__(self, module, name):
        super().__init__()
        self.add_module(name, module)


def wrap_layers(model, wrap):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = wrap(layer)
    return model


@pytest.mark.parametrize(
    "wrap, prefix",
    [
        (torch.compile, "_orig_mod."),
        (lambda model: wrap_layers(model, torch.compile), "_orig_mod."),
        (lambda model: wrap_layers(model, checkpoint_wrapper), "_checkpoint_wrapped_module."),
        (lambda model: torch.compile(wrap_layers(model, checkpoint_wrapper)), "_orig_mod."),
        (
            lambda model: wrap_layers(model, lambda layer: Wrapped(layer, "_fsdp_wrapped_module")),
            "_fsdp_wrapped_module.",
        ),
        (lambda model: Wrapped(Wrapped(model, "_fsdp_wrapped_module"), "module"), "_fsdp_wrapped_module."),
    ],
)
def test_what_decays_under_the_names_of_wrappers(small_model, wrap, prefix):
    plain = set(decay_parameter_names(small_model()))
    wrapped = wrap(small_model())
    names, decayed = {name for name, _ in wrapped.named_parameters()}, set(decay_parameter_names(wrapped))
    assert decayed <= names and any(prefix in name for name in names)
    prefixes = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module")
    assert {".".join(part for part in name.split(".") if part not in prefixes) for name in decayed} == plain


def test_loss_that_is_not_finite_stops_with_the_step(tmp_path):
    path = write_run(tmp_path, learning_rate=1e25, lr_scheduler_type="constant", max_grad_norm=0)
    with pytest.raises(FloatingPointError, match="loss is (nan|inf) at step 2"):
        run([path])


def test_order_of_the_data_follows_the_seed(tmp_path):
    def batches(*overrides):
        return [batch["input_ids"] for batch in trainer_of(write_run(tmp_path), *overrides).get_train_dataloader()]

    first, again, other = batches("--seed", "1"), batches("--seed", "1"), batches("--seed", "2")
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert torch.equal(torch.cat(first).sort(0).values, torch.cat(other).sort(0).values)


def test_continues_weights_with_their_tokenizer(tmp_path):
    model = save_model(tmp_path / "trained")
    path = write_run(tmp_path, config_name=None, model_name_or_path=str(tmp_path / "trained"), learning_rate=0.0)
    trainer, metrics = run([path, "--max_steps", "1"])
    assert trainer.processing_class.get_vocab() == byte_tokenizer().get_vocab()
    for name, tensor in model.state_dict().items():
        assert torch.equal(trainer.model.state_dict()[name], tensor), name


KILL = """
import os, signal, sys
sys.path[:0] = {paths}
import train
step = train.GriffinTrainer.training_step
def training_step(self, *args, **kwargs):
    if self.state.global_step == 11:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)
train.GriffinTrainer.training_step = training_step
train.run(sys.argv[1:])
"""


def test_resume_is_bit_for_bit(tmp_path):
    """Killed in the second epoch, between checkpoints; dropout and shuffling depend on the random state."""
    settings = dict(max_steps=16, logging_steps=2, save_strategy="steps", save_steps=4, gradient_accumulation_steps=2)
    settings |= dict(eval_strategy="steps", eval_steps=4, weight_decay=0.1, lr_scheduler_type="cosine", warmup_steps=3)
    settings |= dict(tokenizer="bpe", tokenizer_vocab_size=300)
    settings |= dict(config_overrides={"attention_dropout": 0.2, "vocab_size": 300})
    path = write_run(tmp_path, **settings)
    whole, broken = str(tmp_path / "whole"), str(tmp_path / "broken")
    trainer, metrics = run([path, "--output_dir", whole])
    assert trainer.state.epoch > 2

    code = KILL.format(paths=[str(ROOT / "scripts"), str(ROOT)])
    killed = subprocess.run(
        [sys.executable, "-c", code, path, "--output_dir", broken],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert find_checkpoint(True, broken).endswith("checkpoint-8")
    with pytest.raises(SystemExit, match="holds checkpoints of another run: pass --resume"):
        run([path, "--output_dir", broken])
    _, resumed = run([path, "--output_dir", broken, "--resume"])

    assert resumed["train"] == metrics["train"] and resumed["eval"] == metrics["eval"]
    assert resumed["tokens_seen"] == metrics["tokens_seen"]
    expected, got = (load_file(f"{folder}/model.safetensors") for folder in (whole, broken))
    assert expected.keys() == got.keys() and len(expected) > 30
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_resume_of_a_complete_run_changes_nothing(tmp_path, capsys):
    config = write_run(tmp_path, save_strategy="steps", save_steps=2)
    run([config])
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    with pytest.raises(SystemExit) as stop:
        run([config, "--resume"])
    assert stop.value.code == 0 and "the run is complete" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")} == before
