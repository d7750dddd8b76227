"""No secret of a command, a setting or a URL reaches a card, and what is no secret stays as it was."""

import json
import shlex

import pytest

from modeling_griffin.saving.mask_secrets import MASK, is_secret_name, mask_command, mask_file, mask_secrets, mask_text


SECRET = "s3cr3t value"
TOKEN = "hf_" + "a1B2" * 8


@pytest.mark.parametrize(
    "name",
    ["hub_token", "push-to-hub-token", "api_key", "apiKey", "AWS_SECRET_ACCESS_KEY", "aws_access_key_id", "password"]
    + ["db.password", "hftoken", "wandb_apikey", "client_secret", "encryption_key", "credentials", "basic_auth"]
    + ["creds", "auth_header", "token_string", "passwords", "smtp_pw", "passkey", "pswd", "id_jwt", "sas"]
    + ["hub_tokens", "access_tokens", "apikeys", "cookies", "slack_webhook", "pass_phrase", "dbpasswd"]
    + ["hub_toke", "hub-tok", "passw", "client_secr"],  # cut off, as argparse takes them
)
def test_the_name_tells(name):
    """As an option with and without a sign, as a variable before the command, as a field, in code and in a query."""
    assert is_secret_name(name)
    for words in (
        ["python", "train.py", f"--{name}", SECRET, "--seed", "1"],
        ["python", "train.py", f"--{name}={SECRET}", "--seed", "1"],
        ["python", "train.py", f"--{name}", "s3cr3t", "value", "--seed", "1"],
        [f"{name}={SECRET}", "python", "train.py", "--seed", "1"],
        ["env", "--", f"{name}={SECRET}", "python", "train.py", "--seed", "1"],
    ):
        for masked in (mask_secrets(words), shlex.split(mask_command(shlex.join(words)))):
            assert "s3cr3t" not in str(masked) and "value" not in str(masked) and MASK in str(masked)
            assert masked[-2:] == ["--seed", "1"] and "train.py" in masked
    assert mask_secrets({name: SECRET, "seed": 1}) == {name: MASK, "seed": 1}
    assert mask_secrets([{"deep": {name: [SECRET, 5]}}, 1]) == [{"deep": {name: MASK}}, 1]
    for text in (f"https://host/x?{name}=s3cr3t&page=2", f'python -c \'x["{name}"] = "{SECRET}"\'', f"{name}: s3cr3t"):
        assert "s3cr3t" not in mask_text(text) and "value" not in mask_text(text), text
    assert "page=2" in mask_text(f"https://host/x?{name}=s3cr3t&page=2")


@pytest.mark.parametrize(
    "text, secret",
    [
        (f"the Hub said no to {TOKEN}.", TOKEN),
        ("https://me:pw@host/data.jsonl", "pw"),
        ("git+https://tok3n@host/repo", "tok3n"),
        ("https://me:p@w@host/data.jsonl", "p@w"),
        ("curl -H 'Authorization: Bearer abcdefgh'", "abcdefgh"),
        ("curl -H 'Authorization: Basic YWJj'", "YWJj"),
        ("curl -u me:hunter2@proxy.example:3128", "hunter2"),
        (f"build/run_{TOKEN}/x", TOKEN),
        ("train.py --hub_token= hunter2", "hunter2"),
        ("key sk-proj-abcdefghijklmnop12345", "sk-proj"),
        ("ghp_abcdefghijklmnopqrst", "ghp_"),
        ("SG.abcdefghijklmnop12.qrstuvwxyzabcdefgh34", "qrstuv"),
        ("r8_abcdefghijklmnopqrstuvwxyz012345", "r8_a"),
        ("dapi0123456789abcdef0123456789abcdef", "dapi0"),
        ("eyJhbGciOiJIUzI1.eyJzdWIiOiIx.c2ln", "eyJ"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc\ndef", "abc"),
        (f"sk-ant-api03-AbCdEfGhIjKlMnOpQrSt-{'x' * 20}-short_tail", "short_tail"),
        (f"xai-{'a1B2' * 20}", "a1B2"),
        (f"rpa_{'AB12' * 8}", "AB12"),
        (f"dckr_pat_{'abc-D_' * 5}", "abc-D_"),
        (f"GOCSPX-{'abc-D_' * 5}", "abc-D_"),
        (f"glrt-{'abcdef12' * 3}", "abcdef12"),
        (f"xapp-1-A01-23-{'abcdef12' * 3}", "abcdef12"),
        (f"whsec_{'abcdef12' * 3}", "abcdef12"),
        (f"https://api.telegram.org/bot123456789:{'AAbc-_f' * 5}/sendMessage", "AAbc-_f"),
        ("https://x.webhook.office.com/webhookb2/a1@b2/IncomingWebhook/hunter2/c3", "hunter2"),
        ("-----BEGIN PGP PRIVATE KEY BLOCK-----\nabc\ndef", "abc"),
        (json.dumps(json.dumps({"token": "hunter2"})), "hunter2"),
        ("train.py 'unbalanced --password hunter2", "hunter2"),
    ],
)
def test_the_shape_tells(text, secret):
    for masked in (mask_text(text), mask_command(text), *mask_secrets({"x": text, "command": text}).values()):
        assert secret not in masked and MASK in masked
        assert mask_command(masked) == masked  # once is enough


@pytest.mark.parametrize(
    "command, masked",
    [
        ("train.py --hub_t hunter2 --seed 1", f"train.py --hub_t {MASK} --seed 1"),
        ("train.py --hub-to=hunter2", f"train.py --hub-to={MASK}"),
        ("curl -u me:hunter2 https://host/x", f"curl -u me:{MASK} https://host/x"),
        ("curl --proxy-user me:hunter2 x", f"curl --proxy-user me:{MASK} x"),
        ("curl --user=me:hunter2 x", f"curl --user=me:{MASK} x"),
        ("curl -ume:hunter2 x", f"curl -ume:{MASK} x"),
        ("docker run --user=1000:1000 -u1000:1000 x", "docker run --user=1000:1000 -u1000:1000 x"),
        ("sshpass -p hunter2 ssh -p 22 host train", f"sshpass -p {MASK} ssh -p {MASK} host train"),
        ("/usr/bin/mysqldump -phunter2 -u me db", f"/usr/bin/mysqldump -p{MASK} -u me db"),
        ("docker login -u me -p hunter2 host", f"docker login -u me -p {MASK} host"),
        ("wandb login 0123456789abcdef", f"wandb login {MASK}"),
        ("wandb login --relogin 0123456789abcdef && x", f"wandb login --relogin {MASK} '&&' x"),
        ("curl https://hooks.slack.com/services/T0/B0/hunter2", f"curl https://{MASK}"),
    ],
)
def test_short_options_and_abbreviations(command, masked):
    assert mask_command(command) == masked and mask_secrets(shlex.split(command)) == shlex.split(masked)
    assert mask_command(masked) == masked


@pytest.mark.parametrize(
    "command",
    [
        "mkdir -p out/a && python -u -m torch.distributed.run -p 3 train.py -p path/to -u 5",
        "docker run -u 1000:1000 -p 8080:80 image python train.py",
        "python scripts/train.py run.yaml --tokenizer bpe --tokenizer_vocab_size 300 --max_new_tokens 5",
        """train.py c.yaml --config_overrides '{"num_key_value_heads": 2, "pad_token_id": 0}' --use_cpu""",
        "train.py --eos_token '</s>' --text_key body --metric_key loss --key_file /home/me/key --hub_token",
        "train.py --train_data 'https://host:8080/x.jsonl?page=2' 'a  b/*.jsonl' --output_dir build/passing-signal",
        "train.py --ratio 3:4 --at 12:30 --image name:tag --remote git@host:me/repo --note a:b@ --mask_value 1",
        "the token is right: gated, monkey, task-conditional, hf_transfer, risk-of-something-quite-long",
    ],
)
def test_what_is_no_secret_stays(command):
    assert mask_command(command) == command and mask_text(command) == command


@pytest.mark.parametrize(
    "text", ['{"a": 3, "api_key": "HIDDEN"}', "{secret: HIDDEN}", "https://HIDDEN@host/?token=HIDDEN"]
)
def test_what_is_masked_already_stays(text):
    assert mask_text(text) == text


def test_numbers_and_what_is_not_given_stay():
    value = {"tokens": 5, "nats_per_token": 0.5, "hub_token": None, "push_to_hub_token": "", "use_auth": False}
    assert mask_secrets(value) == value
    assert mask_secrets({"password": 1234}) == {"password": MASK}
    for key in ("name", "key", "variable"):
        assert mask_secrets([{key: "HF_TOKEN", "value": "x"}])[0]["value"] == MASK
    assert mask_secrets({"variable": "learning_rate", "value": "x"}) == {"variable": "learning_rate", "value": "x"}


def test_a_file_is_masked_in_one_step(tmp_path, caplog):
    path = tmp_path / "metrics.json"
    mask_file(path)
    assert not path.exists()
    clean = '{"steps":   7, "command": "train.py --seed 1"}'
    path.write_text(clean)
    mask_file(path)
    assert path.read_text() == clean
    path.write_text(json.dumps({"steps": 7, "command": f"train.py --hub_token {TOKEN}"}))
    path.chmod(0o640)
    mask_file(path)
    assert json.loads(path.read_text()) == {"steps": 7, "command": f"train.py --hub_token {MASK}"}
    assert path.stat().st_mode & 0o777 == 0o640 and [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
