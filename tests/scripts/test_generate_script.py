"""generate.py: what it prints is what the model gives."""

import json
import shutil
import time

import pytest
import torch
from _script_helpers import save_model
from generate import main, read_arguments
from safetensors.torch import load_file
from training import hub_ids
from training.text_tokenizer import train_bpe_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, eos_token_id=None)  # random weights: let no document end
    return folder


def printed(capsys, *argv: str) -> str:
    main([str(word) for word in argv])
    return capsys.readouterr().out


def test_greedy_is_argmax_each_time(folder, capsys):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokens = [256, *"the é".encode()]
    for _ in range(20):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    text = printed(capsys, folder, "--prompt", "the é", "--max_new_tokens", 20, "--greedy")
    assert text.rstrip("\n") == tokenizer.decode(tokens, skip_special_tokens=True).rstrip("\n")
    assert text.startswith("the é")


def test_seed_decides_the_sample(folder, capsys):
    sample = [printed(capsys, folder, "--max_new_tokens", 30, "--seed", seed, "--device", "cpu") for seed in (3, 3, 4)]
    assert sample[0] == sample[1] != sample[2]


def test_top_k_of_one_is_greedy(folder, capsys):
    arguments = (folder, "--prompt", "a", "--max_new_tokens", 20)
    greedy = printed(capsys, *arguments, "--greedy")
    assert printed(capsys, *arguments, "--top_k", 1) == greedy
    assert printed(capsys, *arguments, "--top_p", 1e-6) == greedy
    assert printed(capsys, *arguments, "--temperature", 1e-4) == greedy


def test_streams_token_by_token(folder, monkeypatch):
    """The streamer gets text while generate still runs, not once at the end."""
    from transformers import TextStreamer

    pieces = []
    monkeypatch.setattr(TextStreamer, "on_finalized_text", lambda self, text, stream_end=False: pieces.append(text))
    main([str(folder), "--prompt", "a b c\n", "--max_new_tokens", "60", "--seed", "0"])
    assert len(pieces) > 3


def test_remote_code_is_off_unless_asked_for():
    assert read_arguments(["m"]).trust_remote_code is False
    assert read_arguments(["m", "--trust_remote_code"]).trust_remote_code is True


@pytest.mark.parametrize(
    "option, value, allowed",
    [
        ("--max_new_tokens", "0", "whole numbers from 1"),
        ("--temperature", "-0.5", "numbers above 0"),
        ("--top_k", "-1", "whole numbers from 0"),
        ("--top_p", "1.5", "numbers above 0 up to 1"),
        ("--seed", str(2**64), "whole numbers from -2"),
    ],
)
def test_wrong_options(option, value, allowed, capsys):
    with pytest.raises(SystemExit):
        read_arguments(["m", f"{option}={value}"])
    assert f"{option} {value}: allowed are {allowed}" in capsys.readouterr().err


@pytest.mark.parametrize("option, value", [("--temperature", "0.5"), ("--top_k", "3"), ("--top_p", "1.0")])
def test_what_greedy_search_would_ignore_is_refused(option, value, capsys):
    with pytest.raises(SystemExit):
        read_arguments(["m", "--greedy", option, value])
    assert f"{option} {value} with --greedy: allowed is one of them" in capsys.readouterr().err
    assert read_arguments(["m"]).temperature == read_arguments(["m", "--greedy"]).temperature == 0.8


def test_pickles_are_not_read(folder, tmp_path):
    """Stock loading would take pytorch_model.bin where there are no safetensors."""
    weights = shutil.copytree(folder, tmp_path / "pickled") / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(SystemExit, match="no file named model.safetensors"):
        main([str(tmp_path / "pickled"), "--max_new_tokens", "1"])


def test_missing_model_is_named(folder, monkeypatch):
    for name in ("/nowhere/at/all", "no/such/folder"):
        with pytest.raises(SystemExit, match=f"MODEL = '{name}' does not exist") as error:
            main([name])
        assert "\n" not in str(error.value) and "Repo id" not in str(error.value)
    with pytest.raises(SystemExit, match="config.json' is a file: allowed are a folder or Hub id"):
        main([f"{folder}/config.json"])


def test_a_name_on_no_hub_is_answered_in_time(monkeypatch):
    """As where there is no network: the loader alone would try five times, for a minute."""
    monkeypatch.setattr(hub_ids.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_ids.HfApi, "repo_info", lambda *_, **__: time.sleep(30))
    begun = time.monotonic()
    with pytest.raises(SystemExit, match="MODEL = 'me/typo' does not exist .*the Hub .*cannot be reached"):
        main(["me/typo"])
    assert time.monotonic() - begun < 5


def test_a_tokenizer_that_is_not_the_models(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    train_bpe_tokenizer([200 * "the quick brown fox "], 300).save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit, match=r"generate.*: error: the tokenizer gives the id 2\d\d, .* has 258 rows"):
        main([str(tmp_path / "model"), "--prompt", "the quick brown fox", "--max_new_tokens", "1"])


def test_a_tokenizer_without_ends_is_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({name: settings[name] for name in settings if name not in ("bos_token", "eos_token")}))
    with pytest.raises(SystemExit, match="MODEL = '.*': the tokenizer has neither an eos_token nor a bos_token"):
        main([str(tmp_path / "model")])
