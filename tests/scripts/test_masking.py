"""masking.py: no secret is written, and a command without one stays as it is, byte for byte."""

import shlex

import pytest
from _script_helpers import ROOT  # noqa: F401  (puts scripts/ on the path)
from training.masking import MASK, is_secret, mask_secrets, mask_values


SECRET = "xYz-s3cr3t'value"
NAMES = ["hub_token", "hub-token", "api_key", "password", "client_secret", "aws_secret_access_key", "db.passwd", "auth"]


@pytest.mark.parametrize("name", NAMES)
def test_an_option_of_such_a_name(name):
    for words in (
        ["python", "train.py", f"--{name}", SECRET, "--seed", "1"],
        ["python", "train.py", f"--{name}={SECRET}", "--seed", "1"],
        ["env", f"{name.replace('-', '_').upper()}={SECRET}", "train.py", "--seed", "1"],
        ["train.py", f"--{name}", SECRET, SECRET, "--seed", "1"],
    ):
        for masked in (mask_secrets(words), shlex.split(mask_secrets(shlex.join(words)))):
            assert SECRET not in str(masked) and "s3cr3t" not in str(masked)
            assert masked[-2:] == ["--seed", "1"] and any(MASK in word for word in masked)


@pytest.mark.parametrize(
    "text, hidden",
    [
        ("https://me:pw1234@host/data.jsonl", "pw1234"),
        ("https://host/x?token=pw1234&page=2", "pw1234"),
        ("https://host/x?X-Amz-Signature=pw1234&X-Amz-Date=5", "pw1234"),
        ("s3://AKIAABCDEFGHIJKLMNOP:pw1234@bucket/key", "AKIA"),
        ('{"hidden_size": 3, "api_key": "pw1234 and more"}', "more"),
        ("{a: 1, secret: pw1234}", "pw1234"),
        ("curl -H 'Authorization: Bearer pw1234567890'", "pw1234"),
        ("the Hub said no to hf_abcdefghijklmnop", "abcdef"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIx.c2ln", "eyJhbGci"),
    ],
)
def test_a_secret_in_any_text(text, hidden):
    for masked in (mask_secrets(text), mask_secrets(["a", text, "b"])[1], mask_values([{"x": text}])[0]["x"]):
        assert hidden in text and hidden not in masked and MASK in masked


def test_a_value_that_the_environment_holds(monkeypatch):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "plain-looking-value")
    assert mask_secrets("--train_data /mnt/plain-looking-value/x") == f"--train_data /mnt/{MASK}/x"
    monkeypatch.setenv("PWD", "/home/me/project")  # where a shell is: no secret, though a name that ends so would be
    assert mask_secrets("--train_data /home/me/project/text") == "--train_data /home/me/project/text"
    monkeypatch.setenv("MY_SERVICE_TOKENS", "another-plain-value")
    assert mask_secrets("--train_data another-plain-value") == "--train_data another-plain-value"


@pytest.mark.parametrize(
    "command",
    [
        "python scripts/train.py run.yaml --tokenizer bpe --tokenizer_vocab_size 300 --max_new_tokens 5",
        """train.py c.yaml --config_overrides '{"num_key_value_heads": 2, "rg_lru_c": 4.0}' --use_cpu""",
        "train.py --include_num_input_tokens_seen true --eos_token '</s>' --metric_key loss --text_key body",
        "accelerate launch --config_file a.yaml train.py --output_dir 'a  b' --hub_token",
        "train.py --train_data https://host:8080/x.jsonl?page=2 'glob/*.jsonl' it",
    ],
)
def test_what_is_no_secret_stays(command):
    assert mask_secrets(command) == command
    assert mask_secrets(shlex.split(command)) == shlex.split(command)


def test_nested_values():
    value = {
        "command": "train.py --hub_token abc",
        "words": ["train.py", "--hub_token", "abc"],
        "token": "abc",
        "password": 1234,
        "tokens": 5,
        "loss_per_token": 0.5,
        "eos_token_id": 7,
        "entries": [{"step": 1, "secret": ["abc"], "hub_token": None}],
    }
    assert mask_values(value) == {
        "command": f"train.py --hub_token {MASK}",
        "words": ["train.py", "--hub_token", MASK],
        "token": MASK,
        "password": MASK,
        "tokens": 5,
        "loss_per_token": 0.5,
        "eos_token_id": 7,
        "entries": [{"step": 1, "secret": MASK, "hub_token": None}],
    }


def test_names():
    assert all(map(is_secret, ["HF_TOKEN", "hubToken", "AWSAccessKeyId", "apikey", "AWS_SECRET_ACCESS_KEY", "key"]))
    assert not any(
        map(is_secret, ["tokens", "tokenizer", "num_key_value_heads", "bos_token", "token_id", "keys", "seed"])
    )
