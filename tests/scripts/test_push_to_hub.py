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


def test_a_folder_that_is_not_there(client, folder, tmp_path):
    assert "gone does not exist: allowed are folders of a model" in refusal(
        client, tmp_path / "gone", "me/x", "--dry-run"
    )
    assert "config.json is a file: allowed are" in refusal(client, folder / "config.json", "me/x", "--dry-run")


def test_a_name_that_the_hub_does_not_allow(client, folder):
    assert "me/a b" in refusal(client, folder, "me/a b")


def test_folders_that_cannot_be_loaded(client, folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    assert refusal(client, tmp_path, "me/x").endswith("allowed are folders that save_pretrained wrote")
    (broken / "model.safetensors").rename(tmp_path / "weights")
    (broken / "rg_lru.py").rename(tmp_path / "code")
    assert refusal(client, broken, "me/x") == f"{broken}/rg_lru.py is missing: save the model again"
    (tmp_path / "code").rename(broken / "rg_lru.py")
    missing = f"{broken}/model.safetensors: missing; allowed are checkpoints in safetensors"
    assert refusal(client, broken, "me/x") == missing
    (broken / "rg_lru.py").write_text("print('not what was installed')")
    assert refusal(client, broken, "me/x").startswith(f"rg_lru.py in {broken} differ from the installed package")
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
        ("no metadata", r"the metadata at the top of .*README.md cannot be read \(while parsing"),
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


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("auto_map", None, r"auto_map = None in .*config.json: allowed is an object"),
        ("auto_map", ["GriffinModel"], r"auto_map = \['GriffinModel'\] in .*: allowed is an object"),
        (
            "auto_map.AutoModel",
            "../other.GriffinModel",
            r"auto_map.AutoModel = '../other.GriffinModel' in .*FILE.CLASS",
        ),
        ("auto_map.AutoModel", "you/theirs--modeling.X", r"auto_map.AutoModel = 'you/theirs--modeling.X' in .*"),
        ("auto_map.AutoModel", 3, r"auto_map.AutoModel = 3 in "),
        ("vocab_size", None, r"vocab_size = None in .*config.json: allowed are positive whole numbers"),
        ("vocab_size", 0, r"vocab_size = 0 in "),
        ("vocab_size", True, r"vocab_size = True in "),
        ("vocab_size", "64", r"vocab_size = '64' in "),
        ("architectures", {"0": "GriffinModel"}, r"architectures = \{'0': 'GriffinModel'\} in .*: allowed is a class"),
        ("layer_types", None, r"layer_types = None in .*config.json: allowed is a list of names"),
        ("hidden_size", "wide", r"hidden_size = 'wide' in .*config.json: allowed are positive whole numbers"),
        ("lambda_init_bounds", [1], r"lambda_init_bounds = \[1\] in .*config.json: allowed are two numbers"),
    ],
)
def test_fields_of_other_kinds(client, folder, tmp_path, field, value, message):
    broken = copy_of(folder, tmp_path)
    config = json.loads((broken / "config.json").read_text())
    outer, _, inner = field.partition(".")
    (config[outer] if inner else config)[inner or outer] = value
    (broken / "config.json").write_text(json.dumps(config))
    assert re.match(message, refusal(client, broken, "me/x", "--dry-run"))


def test_a_configuration_that_is_a_list(client, folder, tmp_path):
    broken = copy_of(folder, tmp_path)
    (broken / "config.json").write_text("[1, 2]")
    expected = f"{broken}/config.json holds a list: allowed is a JSON object"
    assert refusal(client, broken, "me/x", "--dry-run") == expected


LISTING = """
    check, push_to_hub.check_shipped_code = push_to_hub.check_shipped_code, lambda *arguments: 0.0
    try:
        main([folder, "me/dry", "--dry-run"])
    finally:
        push_to_hub.check_shipped_code = check
    """


def listed(client, folder) -> set[str]:
    """What a dry run says it would send, without the clean process."""
    lines = client.printed(LISTING, folder=folder).splitlines()
    return {line.split()[-1] for line in lines if re.match(r"  +[\d,]+  ", line)}


def test_only_exact_names_are_sent(client, folder, tmp_path):
    """A name that only sounds like a model's file stays at home, and so does a link that nobody asked for."""
    mine = copy_of(folder, tmp_path)
    known = ["tokenizer_config.json", "tokenizer.model", "vocab.json", "merges.txt", "LICENSE", "NOTICE"]
    planted = [".env", "token", "id_rsa", "tokenizer_token.txt", "tokenizer.env", "tokenizer_backup.pem", "LICENSE.pem"]
    planted += [
        "LICENSE_KEY.txt",
        "model-optimizer.safetensors",
        "model-00009-of-00009.safetensors",
        "metrics.json.bak",
    ]
    for name in [*known, *planted]:
        (mine / name).write_text("{}")
    (mine / "LICENSE_LINK").symlink_to("/etc/hostname")
    (mine / "dangling").symlink_to(tmp_path / "nowhere")
    sent = listed(client, mine)
    assert sent == listed(client, folder) | set(known)
    assert {"config.json", "model.safetensors", "README.md", *CODE} <= sent


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "LICENSE", "model.safetensors", "README.md", "generation_config.json"]
)
def test_a_link_is_not_followed(client, folder, tmp_path, name):
    mine, elsewhere = copy_of(folder, tmp_path), tmp_path / "elsewhere"
    content = (mine / name).read_bytes() if (mine / name).exists() else b"Mine."
    (mine / name).unlink(missing_ok=True)
    (mine / name).symlink_to(elsewhere)
    dangling = refusal(client, mine, "me/x", "--dry-run")
    assert dangling.startswith(f"{mine / name}") and ("is a link" in dangling or "missing" in dangling)
    elsewhere.write_bytes(content)
    assert refusal(client, mine, "me/x", "--dry-run").startswith(f"{mine / name} is a link: allowed are files of the")


def in_shards(client, folder, tmp_path):
    """The model in several files of weights; returns the folder and its index."""
    mine = tmp_path / "shards"
    client.run(
        "GriffinForCausalLM.from_pretrained(folder).save_pretrained(mine, max_shard_size='8KB')",
        folder=folder,
        mine=mine,
    )
    return mine, json.loads((mine / "model.safetensors.index.json").read_text())


def test_weights_are_what_their_index_names(client, folder, tmp_path):
    mine, index = in_shards(client, folder, tmp_path)
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    shutil.copyfile(mine / shards[0], mine / "model-optimizer.safetensors")
    sent = {name for name in listed(client, mine) if "safetensors" in name}
    assert sent == {*shards, "model.safetensors.index.json"}
    (mine / shards[-1]).unlink()
    assert refusal(client, mine, "me/x", "--dry-run").startswith(f"{mine / shards[-1]}: missing; allowed")


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/tmp/x.safetensors", "sub/x.safetensors", ".env", "token", 3]
)
def test_an_index_that_names_something_else(client, folder, tmp_path, name):
    mine, index = in_shards(client, folder, tmp_path)
    index["weight_map"]["lm_head.weight"] = name
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    expected = f"{mine}/model.safetensors.index.json names {name!r}: allowed are safetensors files beside it"
    assert refusal(client, mine, "me/x", "--dry-run") == expected


@pytest.mark.parametrize(
    "index, message",
    [
        ([], "holds a list: allowed is a JSON object"),
        ({"weight_map": ["a"]}, "weight_map = ['a'] in "),
        ({}, "weight_map = None in "),
        ("swapped", "which model.safetensors.index.json does not give it: save the model again"),
    ],
    ids=["list", "list of names", "empty", "swapped"],
)
def test_an_index_that_is_none(client, folder, tmp_path, index, message):
    mine, good = in_shards(client, folder, tmp_path)
    if index == "swapped":
        one, other = sorted(set(good["weight_map"].values()))[:2]
        swap = {one: other, other: one}
        index = {"weight_map": {tensor: swap.get(file, file) for tensor, file in good["weight_map"].items()}}
    (mine / "model.safetensors.index.json").write_text(json.dumps(index))
    assert message in refusal(client, mine, "me/x", "--dry-run")


TOKEN = "hf_" + "a1B2" * 8


def test_secrets_of_an_old_run_are_not_sent(hub, client, folder, tmp_path):
    """metrics.json goes up masked, the card too, and the folder is not changed."""
    mine = copy_of(folder, tmp_path)
    command = f"python scripts/train.py run.yaml --hub_token {TOKEN} --report_password hunter2 --seed 1"
    text = json.dumps({"command": command, "train_data": "https://me:hunter2@data.example/text.jsonl", "steps": 7})
    (mine / "metrics.json").write_text(text)
    code = """
        from pathlib import Path
        from types import SimpleNamespace
        api, path = push_to_hub.HfApi(), Path(folder)
        names, _ = push_to_hub.list_files(path, False)
        card = push_to_hub.prepare_card(path, "me/masked", {})
        arguments = SimpleNamespace(private=False, revision=None, message="Upload")
        commit = push_to_hub.upload(api, "me/masked", path, names, card, arguments)
        push_to_hub.verify("me/masked", commit, path, names, card)
        """
    client.run(code, folder=mine)
    files = hub.files("me/masked")
    for name in ("metrics.json", "README.md"):
        sent = files[name].decode()
        assert TOKEN not in sent and "hunter2" not in sent and "--seed 1" in sent and "HIDDEN@data.example" in sent
    assert json.loads(files["metrics.json"])["steps"] == 7 and (mine / "metrics.json").read_text() == text
    assert "sent with its secrets masked" in client.printed(LISTING, folder=mine)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "README.md", "LICENSE", "modeling_griffin.py"]
)
def test_a_token_in_settings_or_code_is_refused(client, folder, tmp_path, name):
    mine = copy_of(folder, tmp_path)
    (mine / name).write_text(json.dumps({"token": TOKEN}))
    said = refusal(client, mine, "me/x", "--dry-run", "--trust-remote-code")
    assert said.startswith(f"{mine / name} holds a token")


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_secret_is_known_by_its_name_too(client, folder, tmp_path, name):
    mine = copy_of(folder, tmp_path)
    path = mine / name
    settings = json.loads(path.read_text()) if path.exists() else {}
    for field in ("wandb_api_key", "hub_token", "password"):
        path.write_text(json.dumps({**settings, "deep": [{field: "hunter2"}]}))
        said = refusal(client, mine, "me/x", "--dry-run")
        assert said == f"{path} holds a secret by its name, {field}: take it out first"
    tokens = {"image_token": "<image>", "fim_prefix_token": "<fim>", "token": None, "extra": {"eot_token": "<eot>"}}
    path.write_text(json.dumps({**settings, **tokens}))
    assert f"  {name}\n" in client.printed(LISTING, folder=mine)


def test_code_that_is_no_text(client, folder, tmp_path):
    mine = copy_of(folder, tmp_path)
    (mine / "padding.py").write_bytes(b"\xff\xfe\x00")
    said = refusal(client, mine, "me/x", "--dry-run", "--trust-remote-code")
    assert said.startswith(f"the code in {mine} is not UTF-8 text (")


@pytest.mark.parametrize("change, message", [("more", "hold what is not the model's: spy"), ("less", "lack model.")])
def test_weights_that_are_not_the_models(client, folder, tmp_path, change, message):
    mine = copy_of(folder, tmp_path)
    code = """
        from safetensors.torch import load_file, save_file
        tensors = load_file(path)
        if change == "more":
            tensors["spy"] = torch.zeros(3)
        else:
            del tensors["model.final_norm.weight"]
        save_file(tensors, path, metadata={"format": "pt"})
        """
    client.run(code, path=mine / "model.safetensors", change=change)
    assert f"the weights in {mine} {message}" in refusal(client, mine, "me/x", "--dry-run")


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
