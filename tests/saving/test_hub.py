"""Push and pull through a Hub: what one process uploads, another one without the package loads and runs.

The Hub is the one of hub_server.py: this proves the client's path, not the real service.
"""

import json

import pytest

from modeling_griffin.saving.save import AUTO_MAP, code_files
from tests.hub_client import LOGITS, HubClient
from tests.hub_server import LoopbackHub, Repo


SHAPES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, num_gate_blocks=2)
IDS = [[5, 9, 1, 33, 60, 2, 7, 7, 12, 4, 3, 8]]
CODE = sorted(path.name for path in code_files())


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub({"token-of-me": "me", "token-of-you": "you"}) as hub:
        yield hub


@pytest.fixture(scope="module")
def author(hub, tmp_path_factory):
    """A process with the package and a token, which has pushed me/griffin: a tiny model with a tokenizer."""
    client = HubClient(hub.url, tmp_path_factory.mktemp("author"), "token-of-me", package=True, triton=True)
    client.set_up(LOGITS, IDS=IDS)
    client.set_up(
        """
        from copy import deepcopy
        from modeling_griffin import GriffinConfig, GriffinForCausalLM
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        torch.manual_seed(0)
        model = GriffinForCausalLM(GriffinConfig(**SHAPES, attention_window_size=5))
        model.push_to_hub("me/griffin", tags="tiny")
        words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 64)}}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
        tokenizer.push_to_hub("me/griffin")
        """,
        SHAPES=SHAPES,
    )
    yield client
    client.close()


@pytest.fixture(scope="module")
def reader(hub, tmp_path_factory):
    """A process without the package, without Triton and without a token."""
    client = HubClient(hub.url, tmp_path_factory.mktemp("reader"), None, package=False)
    client.set_up(LOGITS, IDS=IDS)
    yield client
    client.close()


@pytest.fixture(scope="module")
def expected(author):
    """The author's logits for IDS."""
    return author.run("result = logits(model)")


def test_the_repository_is_complete(hub, author):
    files = hub.files("me/griffin")
    model = ["README.md", "config.json", "generation_config.json", "model.safetensors", *CODE]
    assert sorted(files) == sorted([*model, "tokenizer.json", "tokenizer_config.json"])
    assert json.loads(files["config.json"])["auto_map"] == AUTO_MAP
    card = files["README.md"].decode()
    assert 'from_pretrained("me/griffin", trust_remote_code=True' in card and "- tiny" in card


def test_without_the_package_and_without_triton(reader, expected):
    code = """
    model = AutoModelForCausalLM.from_pretrained("me/griffin", trust_remote_code=True)
    sampled = model.generate(torch.tensor(IDS), max_new_tokens=6, min_new_tokens=6)
    result = [type(model).__module__, sys.modules["modeling_griffin"], logits(model), sampled.shape]
    """
    module, package, found, shape = reader.run(code)
    assert module.startswith("transformers_modules.me.griffin.") and package is None
    assert found == expected
    assert shape == [1, 18]


@pytest.mark.gpu
@pytest.mark.parametrize("triton", [True, False])
def test_on_a_gpu(hub, author, tmp_path, triton):
    """Pulled in a clean process: the scan that Triton's presence allows, the author's logits, the same tokens."""
    client = HubClient(hub.url, tmp_path, None, package=False, triton=triton)
    client.set_up(LOGITS, IDS=IDS)
    code = """
    model = AutoModelForCausalLM.from_pretrained("me/griffin", trust_remote_code=True).cuda()
    scan = sys.modules[type(model).__module__.replace(".modeling_griffin", ".rg_lru_scan")]
    sampled = model.generate(torch.tensor(IDS).cuda(), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    result = [sys.modules["modeling_griffin"], scan.describe_backend("cuda"), logits(model), sampled.tolist()]
    """
    package, backend, found, sampled = client.run(code)
    client.close()
    code = """
    sampled = model.generate(torch.tensor(IDS), max_new_tokens=20, min_new_tokens=20, do_sample=False)
    result = [logits(model), sampled.tolist()]
    """
    expected, expected_tokens = author.run(code)
    assert package is None and backend.startswith(f"RG-LRU scan: {'triton' if triton else 'torch'} on cuda")
    assert max(abs(e - a) for e, a in zip(expected, found, strict=True)) < 1e-5
    assert sampled == expected_tokens


def test_code_does_not_run_unasked(reader, author):
    code = 'AutoModelForCausalLM.from_pretrained("me/griffin", trust_remote_code=False)'
    assert "Please pass the argument `trust_remote_code=True`" in reader.error(code)


def test_with_the_package_no_flag_is_needed(author, expected):
    code = """
    found = [AutoModelForCausalLM.from_pretrained("me/griffin", **flag) for flag in ({}, {"trust_remote_code": True})]
    result = [[type(model) is GriffinForCausalLM, logits(model)] for model in found]
    """
    assert author.run(code) == [[True, expected]] * 2


@pytest.mark.parametrize(
    "auto_class", ["AutoModel", "AutoModelForSequenceClassification", "AutoModelForTokenClassification"]
)
def test_the_other_auto_classes(reader, author, auto_class):
    code = """
    import transformers
    other = getattr(transformers, auto_class).from_pretrained("me/griffin", trust_remote_code=True)
    base = AutoModelForCausalLM.from_pretrained("me/griffin", trust_remote_code=True).model
    same = [torch.equal(a, b) for a, b in zip(other.base_model.parameters(), base.parameters(), strict=True)]
    result = [type(other).__name__, all(same)]
    """
    assert reader.run(code, auto_class=auto_class) == [AUTO_MAP[auto_class].split(".")[1], True]


def test_pipeline_and_tokenizer(reader, author):
    code = """
    from transformers import pipeline
    generate = pipeline("text-generation", model="me/griffin", trust_remote_code=True)
    result = generate("w5 w9", max_new_tokens=4, min_new_tokens=4, do_sample=False)[0]["generated_text"]
    """
    text = reader.run(code)
    assert text.startswith("w5 w9") and text.count("w") == 6


def test_the_tokenizer_comes_along(author):
    """Of the repository that the model was loaded from, once it was downloaded; not where there are two revisions."""
    code = """
    import peft
    from pathlib import Path
    from transformers import AutoTokenizer
    def merge(name):
        base = AutoModelForCausalLM.from_pretrained("me/words")
        adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        adapted.merge_and_unload().save_pretrained(folder + name)
        return (Path(folder + name) / "tokenizer.json").exists()
    model.push_to_hub("me/words"), tokenizer.push_to_hub("me/words")
    result = [merge("/before")]
    AutoTokenizer.from_pretrained("me/words")
    result += [merge("/after"), AutoTokenizer.from_pretrained(folder + "/after")("w5 w9").input_ids]
    model.push_to_hub("me/words", tags=["another"])
    result += [merge("/later")]
    """
    assert author.run(code, folder=str(author.home / "merged")) == [False, True, [5, 9], False]


def test_private_repository(author, reader, expected):
    author.run('model.push_to_hub("me/secret", private=True)')
    assert "RepositoryNotFoundError" in reader.error(
        """
        from huggingface_hub import HfApi
        HfApi().model_info("me/secret")
        """
    )
    assert "me/secret" in reader.error('pulled_logits("me/secret")')
    assert "me/secret" in reader.error('pulled_logits("me/secret", token="token-of-you")')
    assert reader.run('result = pulled_logits("me/secret", token="token-of-me")') == expected


def test_upload_interrupted_and_repeated(hub, author, reader, expected):
    push = 'model.push_to_hub("me/shards", max_shard_size="8KB")'
    hub.uploads.clear()
    hub.uploads_left = 2
    try:
        assert "Error while uploading 'model-" in author.error(push)
    finally:
        hub.uploads_left = None
    assert len(hub.uploads) == 2 and hub.files("me/shards") == {}, "a failed upload must not show"
    author.run(push)
    shards = [name for name in hub.files("me/shards") if name.startswith("model-")]
    assert len(shards) > 2 and "model.safetensors.index.json" in hub.files("me/shards")
    assert len(hub.uploads) == len(shards), "what had arrived must not be sent again"
    assert reader.run('result = pulled_logits("me/shards")') == expected


def test_weights_that_are_replaced_are_removed(hub, author, reader, expected):
    """From one file to many: the loader would prefer the old file to the new ones."""
    author.run("""
        other = deepcopy(model)
        other.lm_head.weight.data.add_(1)
        other.push_to_hub("me/replaced")
        model.push_to_hub("me/replaced", max_shard_size="8KB")
        """)
    assert "model.safetensors" not in hub.files("me/replaced")
    assert reader.run('result = pulled_logits("me/replaced")') == expected
    author.run('model.push_to_hub("me/replaced")')
    assert not [name for name in hub.files("me/replaced") if name.startswith("model-") or name.endswith("index.json")]


def test_corrupted_download(hub, author, reader):
    """A file of the wrong length stops the download; a changed byte is found by the checksums."""
    author.run('model.push_to_hub("me/corrupted")')
    pull = 'from huggingface_hub import HfApi, snapshot_download; snapshot_download("me/corrupted")'
    check = 'result = [m["path"] for m in HfApi().verify_repo_checksums("me/corrupted").mismatches]'
    try:
        hub.cut = "model.safetensors"
        assert "should be of size" in reader.error(pull)
        hub.cut, hub.spoil = "", "model.safetensors"
        assert reader.run(f"{pull}\n{check}") == ["model.safetensors"]
    finally:
        hub.cut = hub.spoil = ""


def test_second_revision(hub, author, reader, expected):
    doubled = author.run("""
        other = deepcopy(model)
        other.lm_head.weight.data.mul_(2)
        other.push_to_hub("me/griffin", revision="v2")
        result = logits(other)
        """)
    assert sorted(hub.repos["me/griffin"].branches) == ["main", "v2"]
    assert reader.run('result = pulled_logits("me/griffin")') == expected
    assert reader.run('result = pulled_logits("me/griffin", revision="v2")') == doubled
    name = hub.repos["me/griffin"].branches["main"]
    assert reader.run('result = pulled_logits("me/griffin", revision=name)', name=name) == expected


def test_pulled_by_remote_code_and_pushed_again(hub, author, reader, expected):
    reader.run("""
        model = AutoModelForCausalLM.from_pretrained("me/griffin", trust_remote_code=True)
        model.push_to_hub("me/again", token="token-of-me")
        """)
    first, again = hub.files("me/griffin"), hub.files("me/again")
    for name in ["config.json", "model.safetensors", *CODE]:
        assert again[name] == first[name], name
    assert reader.run('result = pulled_logits("me/again")') == expected


def test_two_versions_of_the_code_side_by_side(hub, author, reader, expected):
    files = hub.files("me/griffin")
    files["rg_lru_scan.py"] += b"\n\nVERSION = 2\n"
    files["modeling_griffin.py"] += b"\n\nGriffinForCausalLM.version = 2\n"
    hub.repos["me/newer"] = Repo("me", private=False)
    hub.repos["me/newer"].commit("main", {path: hub.store(data) for path, data in files.items()})
    code = """
    names = ["me/griffin", "me/newer", "me/griffin"]
    models = [AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True) for name in names]
    scans = [sys.modules[type(m).__module__.replace(".modeling_griffin", ".rg_lru_scan")] for m in models]
    versions = [[getattr(type(m), "version", 1), getattr(scan, "VERSION", 1)] for m, scan in zip(models, scans)]
    result = [versions, [logits(m) for m in models]]
    """
    assert reader.run(code) == [[[1, 1], [2, 2], [1, 1]], [expected] * 3]


def test_a_card_written_by_a_person_stays(hub, author):
    author.run(
        """
        from huggingface_hub import HfApi
        HfApi().upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id="me/griffin")
        model.push_to_hub("me/griffin", tags=["later"])
        """,
        card="---\nlicense: mit\n---\nMine.",
    )
    card = hub.files("me/griffin")["README.md"].decode()
    assert card == "---\nlicense: mit\ntags:\n- later\n---\nMine."


def test_save_pretrained_that_pushes(hub, author, reader, expected, tmp_path):
    """Uploads what it saved, and nothing else that lies in the folder."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "optimizer.pt").write_text("not for the Hub")
    author.run('model.save_pretrained(folder, push_to_hub=True, repo_id="me/saved")', folder=tmp_path / "model")
    files = sorted(hub.files("me/saved"))
    assert files == sorted(["README.md", "config.json", "generation_config.json", "model.safetensors", *CODE])
    author.run('model.config.push_to_hub("me/only-config")')
    assert sorted(hub.files("me/only-config")) == sorted(["config.json", *CODE, "README.md"])


@pytest.mark.parametrize("facts", ["keep_model_card(trainer, datasets=['me/words'])", ""], ids=["facts", "bare"])
def test_trainer_that_pushes(facts, hub, author, reader):
    """What stock Trainer uploads during training loads; the card is ours where one line has asked for it.

    Trainers of other models write the card that they wrote.
    """
    repo = "me/trained" if facts else "me/trained-bare"
    code = f"""
    from modeling_griffin.saving.card import keep_model_card
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    arguments = TrainingArguments(
        folder, max_steps=2, save_steps=1, push_to_hub=True, hub_model_id="{repo}", report_to=[], use_cpu=True,
        per_device_train_batch_size=1, hub_always_push=True, logging_steps=1, disable_tqdm=True,
    )
    rows = [{{"input_ids": ids, "labels": ids}} for ids in IDS * 4]
    trainer = Trainer(deepcopy(model), arguments, train_dataset=rows)
    {facts}
    from huggingface_hub import HfApi
    trainer.train()
    trainer._finish_current_push()
    during = HfApi().list_repo_files("{repo}")
    trainer.push_to_hub(license="mit")
    sizes = dict(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    other = TrainingArguments(folder + "-other", report_to=[], use_cpu=True)
    Trainer(LlamaForCausalLM(LlamaConfig(**sizes)), other).create_model_card("en", model_name="other")
    result = [during, logits(trainer.model), open(folder + "-other/README.md").read()]
    """
    during, trained, other = author.run(code, folder=str(author.home / repo[3:]))
    assert {"README.md", "config.json", "model.safetensors", *CODE} <= set(during)
    card = hub.files(repo)["README.md"].decode()
    assert "license: mit" in card and ("## Λ, the learnt decay" in card) == ("- me/words" in card) == bool(facts)
    assert "Λ" not in other and "generated_from_trainer" in other and "- en" in other
    assert reader.run(f'result = pulled_logits("{repo}")') == trained


def test_an_initialisation_that_the_reader_does_not_have(author, reader):
    """Its name matters to new weights only."""
    code = """
    from modeling_griffin import register_lambda_init
    register_lambda_init("mine", lambda width, c, low, high: torch.linspace(-5, -7, width))
    mine = GriffinForCausalLM(GriffinConfig(**SHAPES, lambda_init="mine"))
    mine.push_to_hub("me/initialised-by-me")
    result = logits(mine)
    """
    expected = author.run(code)
    assert reader.run('result = pulled_logits("me/initialised-by-me")') == expected


def test_adapter_on_the_hub(author, reader):
    """It names its base model, which is loaded from the Hub too."""
    code = """
    import peft
    base = AutoModelForCausalLM.from_pretrained("me/griffin")
    adapted = peft.get_peft_model(base, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    for parameter in (p for name, p in adapted.named_parameters() if "lora_B" in name):
        torch.nn.init.normal_(parameter)
    adapted.push_to_hub("me/adapter")
    result = logits(adapted)
    """
    expected = author.run(code)
    load = 'import peft; Auto = peft.AutoPeftModelForCausalLM; found = Auto.from_pretrained("me/adapter", **flag)'
    assert reader.run(f"{load}; result = logits(found)", flag={"trust_remote_code": True}) == expected
