"""train.py when things go wrong: killed and dying processes, numbers that are not finite, data and arguments."""

import json
import re
import signal
from pathlib import Path

import pytest
import torch
from _script_helpers import made_once, run_program, save_model, write_run
from safetensors.torch import load_file
from train import run
from training.arguments import read_arguments
from training.checkpoint import fault_of
from training.text_data import load_documents


SECONDS = 90  # of a busy machine, the start of two processes included; without an end they would wait for half an hour


# Two processes, of which one or both die


@pytest.fixture(scope="module")
def jobs(tmp_path_factory) -> dict:
    folder = made_once(tmp_path_factory, "failures", run_jobs)
    return {"folder": folder, **json.loads((folder / "results.json").read_text())}


def run_jobs(folder: Path) -> None:
    path = write_run(folder, max_steps=40, save_strategy="steps", save_steps=4)
    run_program("scripts/failure_program.py", folder, path)


def test_killed_processes_end_the_job(jobs):
    for name, ranks in (("kill_one", [1]), ("kill_all", [0, 1])):
        job = jobs[name]
        assert job["failed"] and job["seconds"] < SECONDS and "tokens/s; held-out" not in job["printed"]
        assert sorted(map(int, re.findall(r"rank (\d) will be killed", job["printed"]))) == ranks
    assert list(jobs["kill_all"]["failed"].values()) == [-signal.SIGKILL]


def test_resumed_in_two_processes_bit_for_bit(jobs):
    """Rank 1 was killed, then both, each in the middle of a step between checkpoints: the curve is the unbroken one."""
    assert jobs["whole"]["failed"] is None and jobs["resumed"]["failed"] is None
    whole, broken = (json.loads((jobs["folder"] / name / "metrics.json").read_text()) for name in ("whole", "broken"))
    assert broken["train"] == whole["train"] and broken["eval"] == whole["eval"]
    expected, got = (load_file(jobs["folder"] / name / "model.safetensors") for name in ("whole", "broken"))
    assert expected.keys() == got.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_one_process_told_to_stop_stops_both_after_the_same_step(jobs):
    job = jobs["told"]
    assert job["printed"].count("stopped by SIGTERM after step 3 of 40; --resume continues from checkpoint-3") == 1
    assert job["failed"] and job["seconds"] < SECONDS and "Traceback" not in job["printed"]
    assert fault_of(jobs["folder"] / "told" / "checkpoint-3") is None


def test_an_error_on_one_process_ends_the_job_with_its_message(jobs):
    assert jobs["raised"]["failed"] is not None and jobs["raised"]["seconds"] < SECONDS
    assert "RuntimeError: the disk of rank 1 is full" in jobs["raised"]["printed"]


def test_a_loss_that_is_not_finite_on_one_process_is_said_by_that_process(jobs):
    assert jobs["spoiled"]["failed"] is not None and jobs["spoiled"]["seconds"] < SECONDS
    assert "train.py: error (rank 1 of 2): the training loss is" in jobs["spoiled"]["printed"]
    assert "first not finite: the output of model.layers.1.mlp_block; training rows" in jobs["spoiled"]["printed"]


# What is not finite


def stop_of(path: str, prepare) -> str:
    """The message with which a run stops into whose trainer `prepare(trainer)` has put a fault."""
    import train

    make = train.make_trainer

    def make_trainer(*arguments):
        trainer, facts = make(*arguments)
        prepare(trainer)
        return trainer, facts

    with pytest.MonkeyPatch.context() as patch, pytest.raises(FloatingPointError) as stop:
        patch.setattr(train, "make_trainer", make_trainer)
        run([path])
    return str(stop.value)


def rows_named(message: str) -> list[int]:
    return json.loads(re.search(r"training rows (\[[\d, ]*\])", message)[1])


def test_an_infinite_activation_names_module_and_row(tmp_path):
    """The one row of the batch that is spoiled, of all rows of the data."""
    bad = {}

    def prepare(trainer):
        def spoil(module, arguments, output):
            return output.index_fill(0, torch.tensor([1]), torch.inf)

        def remember(module, arguments):
            bad["row"] = trainer.train_dataset.find(arguments[0][1]) if module.training else bad.get("row")

        trainer.model.model.embed_tokens.register_forward_pre_hook(remember)
        trainer.model.model.layers[1].temporal_block.linear_x.register_forward_hook(spoil)

    message = stop_of(write_run(tmp_path), prepare)
    assert re.match(r"the training loss is (nan|inf) at step 1; ", message)
    assert "first not finite: the output of model.layers.1.temporal_block.linear_x;" in message
    assert rows_named(message) == [bad["row"]]
    assert "the first begins '" in message and "--resume continues" in message


def test_a_spoiled_weight_is_named(tmp_path):
    def prepare(trainer):
        trainer.model.model.layers[2].mlp_block.up_proj.weight.data[3, 4] = torch.nan

    message = stop_of(write_run(tmp_path), prepare)
    assert "first not finite: model.layers.2.mlp_block.up_proj.weight, 1 of 384 values, so an earlier step" in message


def test_a_gradient_that_is_not_finite_stops_before_the_step(tmp_path):
    """The loss is finite and so are all activations; with accumulation, the batch is found that spoils the sum."""
    seen, weights = [], {}

    def prepare(trainer):
        weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})

        def spoil(module, arguments, output):
            is_bad = torch.equal(arguments[0], seen[1]) if len(seen) > 1 else False
            seen.append(arguments[0].clone())
            if is_bad or len(seen) == 2:
                output.register_hook(lambda gradient: gradient * torch.inf)

        trainer.model.model.embed_tokens.register_forward_hook(spoil)
        stop_of.trainer = trainer

    message = stop_of(write_run(tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2), prepare)
    assert re.match(r"the norm of the gradients is (nan|inf) at step 1; first not finite: the gradient ", message)
    assert rows_named(message) == [stop_of.trainer.train_dataset.find(row) for row in seen[1]]
    for name, parameter in stop_of.trainer.model.named_parameters():
        assert torch.equal(parameter, weights[name]), name


# Data and arguments: one line each


def write_lines(folder: Path, *lines: str) -> str:
    (folder / "bad.jsonl").write_text("".join(line + "\n" for line in lines))
    return str(folder / "bad.jsonl")


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"text": "fine"}', '{"text": "torn'], r"bad.jsonl, line 2: b'\{\"text\": \"torn'"),
        (['{"text": "fine"}', "", "no json"], "bad.jsonl, line 3: b'no json'"),
        (['{"body": "x"}'], r"text_column = 'text'.*\['body'\]"),
        (['{"text": 5}'], "allowed is text"),
        (['{"text": ""}'], "holds no text"),
    ],
)
def test_bad_jsonl(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message) as error:
        load_documents(write_lines(tmp_path, *lines))
    assert "\n" not in str(error.value)


def test_bad_parquet(tmp_path):
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match="bad.parquet cannot be read as parquet"):
        load_documents(str(tmp_path / "bad.parquet"))


@pytest.mark.parametrize(
    "settings, overrides, message",
    [
        ({"per_device_train_batch_size": 64}, [], r"43 rows of 64 tokens, fewer than the 64 of one pass"),
        ({"config_overrides": {"hidden_size": 32}}, ["--config_overrides", "{hidden"], "config_overrides = .*as JSON"),
        ({}, ["--config_overrides"], "config_overrides = True: allowed is a mapping"),
        ({"config_overrides": {"eos_token_id": 3}}, [], r"config_overrides sets \['eos_token_id'\]"),
        ({}, ["--config_overrides", '{"bos_token_id": 3}'], r"config_overrides sets \['bos_token_id'\]"),
        ({"config_name": None, "model_name_or_path": "/nowhere/at/all"}, [], "'/nowhere/at/all'"),
        ({"use_cpu": None}, ["--device", "cuda"], "unknown key 'device'"),
        ({}, ["--include_num_input_tokens_seen", "false"], "include_num_input_tokens_seen = false: allowed is true"),
    ],
)
def test_wrong_settings_end_in_one_line(tmp_path, settings, overrides, message):
    with pytest.raises(SystemExit, match=message) as stop:
        run([write_run(tmp_path, **settings), *overrides])
    assert str(stop.value).startswith("train.py: error: ") and "\n" not in str(stop.value)


def test_weights_that_are_not_there(tmp_path):
    save_model(tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").unlink()
    settings = {"config_name": None, "model_name_or_path": str(tmp_path / "empty")}
    with pytest.raises(SystemExit, match="model_name_or_path = '.*empty': allowed are a folder or Hub id with weights"):
        run([write_run(tmp_path, **settings)])
    torch.save({}, tmp_path / "empty" / "pytorch_model.bin")
    with pytest.raises(SystemExit, match="in safetensors .*no file named model.safetensors"):
        run([write_run(tmp_path, **settings)])


def test_tokenizer_larger_than_the_weights(tmp_path):
    save_model(tmp_path / "trained")
    settings = {"config_name": None, "model_name_or_path": str(tmp_path / "trained"), "tokenizer": "bpe"}
    with pytest.raises(SystemExit, match="the tokenizer has 300 tokens, the model's embedding 258 rows"):
        run([write_run(tmp_path, **settings, tokenizer_vocab_size=300)])


def test_config_overrides_of_file_and_command_line_are_merged(tmp_path):
    path = write_run(tmp_path, config_overrides={"hidden_size": 32, "rg_lru_c": 4.0})
    model = read_arguments([path, "--config_overrides", '{"rg_lru_c": 6.0, "lru_width": 32}'])[0]
    assert json.loads(model.config_overrides) == {"hidden_size": 32, "rg_lru_c": 6.0, "lru_width": 32}
    assert read_arguments([path, "--config_overrides="])[0].config_overrides is None


def test_resume_refuses_another_model(tmp_path):
    path = write_run(tmp_path, save_strategy="steps", save_steps=2)
    run([path])
    changed = ["--allow_changed", "max_steps", "attention_dropout"]
    overrides = ["--max_steps", "6", "--resume", *changed, "--config_overrides"]
    with pytest.raises(SystemExit, match="of another model: hidden_size = 16 there, 32 now; .*rg_lru_c = 8.0 there, 4"):
        run([path, *overrides, '{"hidden_size": 32, "rg_lru_c": 4.0}'])
    _, metrics = run([path, *overrides, '{"attention_dropout": 0.1}'])
    assert metrics["steps"] == 6


@pytest.mark.parametrize("shards, launcher", [("pytorch_model_fsdp_0", "FSDP"), ("latest", "DEEPSPEED")])
def test_resume_refuses_the_shards_of_another_launcher(tmp_path, shards, launcher):
    path = write_run(tmp_path, save_strategy="steps", save_steps=2, max_steps=2)
    run([path])
    shard = tmp_path / "out" / "checkpoint-2" / shards
    shard.mkdir() if launcher == "FSDP" else shard.write_text("global_step2")
    with pytest.raises(SystemExit, match=f"was written under {launcher}, now runs one process on CPU, float32: resume"):
        run([path, "--resume", "--max_steps", "4", "--allow_changed", "max_steps"])
