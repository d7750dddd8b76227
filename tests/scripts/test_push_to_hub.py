"""scripts/push_to_hub.py: what it checks, shows, sends and refuses, against the Hub of hub_server.py."""

import json
import re
import shutil

import pytest

from modeling_griffin.saving.save import code_files
from tests.hub_client import HubClient
from tests.hub_server import LoopbackHub, Repo


CODE = [path.name for path in code_files()]
# Not the model's: they stay at home.
OTHERS = ["checkpoint-2/model.safetensors", "optimizer.pt", "pytorch_model.bin", "training_args.bin"]


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({"token-of-me": "me", "token-of-you": "you"}) as hub:
        hub.repos["you/theirs"] = Repo("you", private=False)
        yield hub


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    client = HubClient(hub.url, tmp_path_factory.mktemp("home"), "token-of-me", package=True, triton=True)
    client.set_up("""
        import os
        import push_to_hub
        import torch
        from huggingface_hub import constants
        from push_to_hub import main
        from modeling_griffin import GriffinConfig, GriffinForCausalLM
        """)
    yield client
    client.close()


@pytest.fixture(scope="module")
def folder(client):
    """A trained model's folder, with what training leaves beside it."""
    folder = client.home / "trained"
    client.run(
        """
        torch.manual_seed(0)
        shapes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_gate_blocks=2)
        GriffinForCausalLM(GriffinConfig(**shapes, attention_window_size=5)).save_pretrained(folder)
        """,
        folder=folder,
    )
    for name in OTHERS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for the Hub")
    (folder / "metrics.json").write_text('{"steps": 7, "bits_per_byte": 2.5}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


def copy_of(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


def refusal(client, *arguments) -> str:
    """The one line with which the script ends."""
    error = client.error("main([str(a) for a in arguments])", arguments=[str(a) for a in arguments])
    start = "SystemExit: push_to_hub.py: error: "
    assert error.startswith(start) and "\n" not in error, error
    return error.removeprefix(start)


def test_dry_run(hub, client, folder):
    """Without the clean process here, which costs seconds: test_push has it."""
    before, hub.requests[:] = {p: p.stat().st_mtime for p in folder.rglob("*")}, []
    code = """
        check, push_to_hub.check_shipped_code = push_to_hub.check_shipped_code, lambda *arguments: 0.0
        try:
            main([folder, "me/dry", "--dry-run", "--license", "mit"])
        finally:
            push_to_hub.check_shipped_code = check
        """
    printed = client.printed(code, folder=folder)
    assert "left out: checkpoint-2, optimizer.pt, pytorch_model.bin, training_args.bin" in printed
    assert "license mit" in printed and "dry run: nothing was sent to me/dry" in printed
    for name in ["config.json", "model.safetensors", "tokenizer.json", "metrics.json", "README.md", *CODE]:
        assert f"  {name}\n" in printed
    assert hub.requests == [] and {p: p.stat().st_mtime for p in folder.rglob("*")} == before


def test_push(hub, client, folder):
    """A bare name goes to the token's account; stale weights go; README has the repository's name."""
    hub.repos["me/model"] = Repo("me", private=True)
    config = (folder / "config.json").read_bytes()
    old = {
        "config.json": hub.store(config),
        "model-00001-of-00002.safetensors": hub.store(b"old"),
        "a": hub.store(b"a"),
    }
    hub.repos["me/model"].commit("main", old)
    printed = client.printed("main([folder, 'model', '--private', '--base-model', 'me/base'])", folder=folder)
    assert "runs by the code that it ships; outputs differ from the package's by 0.0e+00 of scale" in printed
    assert "verified by pulling" in printed and f"{hub.url}/me/model/tree/main at " in printed
    files = hub.files("me/model")
    sent = ["config.json", "generation_config.json", "model.safetensors", "metrics.json", "tokenizer.json", "README.md"]
    assert sorted(files) == sorted([*sent, *CODE, "a"])
    card = files["README.md"].decode()
    assert 'from_pretrained("me/model"' in card and "base_model: me/base" in card and "type: bits_per_byte" in card


def test_no_token(client, folder):
    client.run("del os.environ['HF_TOKEN']")
    try:
        assert refusal(client, folder, "me/x").startswith("no token: run `hf auth login`")
    finally:
        client.run("os.environ['HF_TOKEN'] = 'token-of-me'")


def test_a_token_that_is_not_valid(client, folder):
    client.run("os.environ['HF_TOKEN'] = 'wrong'")
    try:
        assert refusal(client, folder, "me/x").startswith("the token is not valid (")
    finally:
        client.run("os.environ['HF_TOKEN'] = 'token-of-me'")


def test_no_right(client, folder):
    assert refusal(client, folder, "you/new") == "no right to create you/new: this token is me's"


def test_a_name_that_is_taken(client, folder):
    assert (
        refusal(client, folder, "you/theirs")
        == "the name you/theirs is taken, and this token, me's, may not write there"
    )


def test_no_network(hub, client, folder):
    client.run("constants.ENDPOINT = 'http://127.0.0.1:9'")
    try:
        assert refusal(client, folder, "me/x").startswith("no network: http://127.0.0.1:9 does not answer")
    finally:
        client.run("constants.ENDPOINT = url", url=hub.url)


def test_private_for_a_repository_that_is_public(hub, client, folder):
    hub.repos["me/public"] = Repo("me", private=False)
    message = refusal(client, folder, "me/public", "--private")
    assert message == "--private: me/public is there already, and public: pass another name, or make it private"
    assert hub.files("me/public") == {}


@pytest.mark.parametrize("field, value", [("model_type", "llama"), ("hidden_size", 32)])
def test_another_model(hub, client, folder, field, value):
    config = {**json.loads((folder / "config.json").read_text()), field: value}
    hub.repos["me/other"] = Repo("me", private=False)
    hub.repos["me/other"].commit("main", {"config.json": hub.store(json.dumps(config).encode())})
    assert refusal(client, folder, "me/other").startswith(f"me/other holds another model ({field} = {value!r}, here ")
    hub.repos["me/other"].commit("main", {"weights.gguf": hub.store(b"")})
    assert refusal(client, folder, "me/other").startswith("me/other holds other files (weights.gguf)")


def test_a_name_that_the_hub_does_not_allow(client, folder):
    assert "me/a b" in refusal(client, folder, "me/a b")


def test_folders_that_cannot_be_loaded(client, folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    assert refusal(client, tmp_path, "me/x").endswith("allowed are folders that save_pretrained wrote")
    (broken / "model.safetensors").rename(tmp_path / "weights")
    assert "holds no model*.safetensors" in refusal(client, broken, "me/x")
    (broken / "rg_lru.py").write_text("print('not what was installed')")
    assert refusal(client, broken, "me/x").startswith(f"rg_lru.py in {broken} differ from the installed package")
    (broken / "rg_lru.py").unlink()
    assert refusal(client, broken, "me/x") == f"{broken}/rg_lru.py is missing: save the model again"
    config = json.loads((broken / "config.json").read_text())
    del config["auto_map"]["AutoModel"]
    (broken / "config.json").write_text(json.dumps(config))
    assert "lacks AutoModel: save" in refusal(client, broken, "me/x")


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no class", r"architectures = \[\] in .*config.json: allowed is a class of its auto_map \(.*GriffinModel"),
        ("another class", r"architectures = \['LlamaForCausalLM'\] in .*config.json: allowed is a class of"),
        ("no JSON", r"config.json is not JSON \(Expecting"),
        ("cut weights", r"copy/model.safetensors is damaged \(.*\): save the model again"),
        ("no metadata", r"the metadata at the top of .*README.md is not YAML \(while parsing"),
    ],
)
def test_damaged_folders(client, folder, tmp_path, damage, message):
    broken = copy_of(folder, tmp_path)
    config, weights = json.loads((broken / "config.json").read_text()), broken / "model.safetensors"
    if damage == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "no metadata":
        (broken / "README.md").write_text("---\nlicense: [\n---\nMine.")
    elif damage == "no JSON":
        (broken / "config.json").write_text("{")
    else:
        config["architectures"] = None if damage == "no class" else ["LlamaForCausalLM"]
        (broken / "config.json").write_text(json.dumps(config))
    assert re.search(message, refusal(client, broken, "me/x", "--dry-run"))


def test_code_that_does_not_run(client, folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    (broken / "lambda_init.py").write_text("raise RuntimeError('broken')")
    message = refusal(client, broken, "me/x", "--dry-run", "--trust-remote-code")
    assert message == f"{broken} does not run by the code that it ships: RuntimeError: broken"


def test_a_card_written_by_a_person(client, folder, tmp_path):
    mine = copy_of(folder, tmp_path)
    (mine / "README.md").write_text("---\nlicense: mit\n---\nMine.")
    assert refusal(client, mine, "me/x", "--language", "en") == (
        f"{mine}/README.md was written by a person: say language there, not on the command line"
    )


def test_a_spoiled_upload_is_noticed(hub, client, folder):
    """One byte that changed on the way: the lengths agree, only a comparison of the contents finds it."""
    code = """
        from types import SimpleNamespace
        from pathlib import Path
        api, names = push_to_hub.HfApi(), ["config.json", "model.safetensors"]
        card = push_to_hub.prepare_card(Path(folder), "me/spoiled", {})
        arguments = SimpleNamespace(private=False, revision=None, message="Upload")
        commit = push_to_hub.upload(api, "me/spoiled", Path(folder), names, card, arguments)
        push_to_hub.verify("me/spoiled", commit, Path(folder), names, card)
        """
    hub.spoil = "model.safetensors"
    try:
        assert "model.safetensors came back from me/spoiled other than sent" in client.error(code, folder=folder)
    finally:
        hub.spoil = ""
