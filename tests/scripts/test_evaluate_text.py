"""evaluate_text.py: every byte counted once, and the same losses as the documents alone, in chunks of any size."""

import json
import math
import os
import resource
import shutil
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from _script_helpers import ROOT, document_nats, make_text, save_model
from evaluate_text import count_token_bytes, main, row_losses, token_bytes
from tokenizers import Tokenizer, models, pre_tokenizers
from training.text_data import load_documents, tokenize
from training.text_tokenizer import byte_tokenizer, train_bpe_tokenizer
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.tolerances import assert_close


TEXTS = [make_text(60, seed=1), "é", make_text(5, seed=2)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    return save_model(folder), str(folder)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return str(path)


def test_figures_are_those_of_the_documents_alone(model, data, tmp_path, capsys):
    result = main([model[1], data, "--length", "4096", "--output", str(tmp_path / "out")])
    documents = [[256, *text.encode(), 256] for text in TEXTS]
    nats = sum(document_nats(model[0], tokens) for tokens in documents)
    assert result["bytes"] == sum(len(text.encode()) for text in TEXTS)
    assert result["tokens"] == result["bytes"] + len(TEXTS)
    assert result["bits_per_byte"] == pytest.approx(nats / math.log(2) / result["bytes"], rel=1e-5)

    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == result
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "out" / "evaluation.md").read_text()
    assert "rows of 4,096 tokens" in page and f"{result['tokens']:,} tokens in " in page
    assert f"| all | {result['tokens']:,} | {result['loss']:.4f} | {result['bits_per_byte']:.4f} |" in page
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["position", "tokens", "loss", "bits/byte"]
    assert table[len(result["by_position"]) + 1].split()[0] == "all"


def test_processes_that_share_a_row_find_the_same(model, data, tmp_path):
    """Rows with several documents, of a length that two do not divide; the second process prints and writes nothing."""
    arguments = [model[1], data, "--length", "101", "--device", "cpu", "--output"]
    alone = main([*arguments, str(tmp_path / "alone")])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    program = [str(ROOT / "scripts" / "evaluate_text.py"), *arguments, str(tmp_path / "shared"), "--chunk", "16"]
    done = subprocess.run([*torchrun, *program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = json.loads((tmp_path / "shared" / "evaluation.json").read_text())
    assert done.stdout.count("written to") == 1
    assert shared["processes"] == 2 and "a row over 2 processes" in (tmp_path / "shared" / "evaluation.md").read_text()
    assert [(entry["tokens"], entry["bytes"]) for entry in shared["by_position"]] == [
        (entry["tokens"], entry["bytes"]) for entry in alone["by_position"]
    ]
    for mine, expected in zip(shared["by_position"], alone["by_position"]):
        assert mine["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_only_a_griffin_shares_its_rows(data, tmp_path):
    """One line before the text is read; alone, any model is evaluated."""
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    for each in (LlamaForCausalLM(config), byte_tokenizer()):
        each.save_pretrained(tmp_path / "llama")
    arguments = [str(tmp_path / "llama"), data, "--length", "101", "--device", "cpu", "--output", str(tmp_path / "out")]
    assert main(arguments)["processes"] == 1
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(
            SystemExit, match="error: MODEL = .*llama' with several processes: model is a LlamaForCausalLM"
        ):
            main(arguments)
    finally:
        dist.destroy_process_group()


def test_buckets_by_position(model, data, tmp_path):
    result = main([model[1], data, "--length", "4096", "--output", str(tmp_path)])
    losses = []  # (position, loss, bytes) of every predicted token
    for text in TEXTS:
        tokens = torch.tensor([[256, *text.encode(), 256]])
        with torch.no_grad():
            log_p = model[0](input_ids=tokens, use_cache=False).logits[0, :-1].double().log_softmax(-1)
        nats = -log_p.gather(1, tokens[0, 1:, None])[:, 0]
        # a character counts for the first of its bytes' tokens
        widths = [w for c in text for w in (len(c.encode()), *[0] * (len(c.encode()) - 1))]
        losses += zip(range(1, len(nats) + 1), nats.tolist(), [*widths, 0])
    for entry in result["by_position"]:
        inside = [(nats, width) for position, nats, width in losses if entry["from"] <= position <= entry["to"]]
        assert entry["tokens"] == len(inside)
        assert entry["bytes"] == sum(width for _, width in inside)
        assert entry["loss"] == pytest.approx(sum(nats for nats, _ in inside) / len(inside), rel=1e-4)
    assert [entry["from"] for entry in result["by_position"]] == [2**k for k in range(len(result["by_position"]))]


@pytest.mark.parametrize("layer_types", [None, ["linear_attention"] * 3])
def test_chunks_carry_the_state(tmp_path, data, layer_types):
    """Griffin and Hawk; rows of 40 tokens cut documents, chunks of 7 cut rows; chunks must not change the result."""
    save_model(tmp_path / "model", layer_types=layer_types)
    arguments = [str(tmp_path / "model"), data, "--length", "40", "--output", str(tmp_path)]
    whole, chunked = main(arguments), main([*arguments, "--chunk", "7"])
    assert whole["bytes"] == chunked["bytes"] == sum(len(text.encode()) for text in TEXTS)
    for a, b in zip(whole["by_position"], chunked["by_position"]):
        assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-4)
    assert max(entry["to"] for entry in whole["by_position"]) <= 39


def test_long_rows_in_bounded_memory(model):
    """Each pass sees one chunk, and the state between chunks is as large at the end as behind the window."""
    tokens = torch.randint(0, 256, (4001,), generator=torch.Generator().manual_seed(0))
    row = {"input_ids": tokens, "position_ids": torch.arange(4001), "labels": tokens}
    passes, states = [], []

    def watch(module, args, kwargs, output):
        passes.append(kwargs["input_ids"].shape[1])
        tensors = [each for layer in output.past_key_values.layers for each in vars(layer).values()]
        flat = [part for each in tensors for part in (each.values() if isinstance(each, dict) else [each])]
        states.append(sum(each.numel() for each in flat if isinstance(each, torch.Tensor)))

    with torch.no_grad():
        log_p = model[0](input_ids=tokens[None], use_cache=False).logits[0, :-1].double().log_softmax(-1)
    handle = model[0].register_forward_hook(watch, with_kwargs=True)
    losses = row_losses(model[0], row, 500)
    handle.remove()
    assert passes == [500] * 8 and len(set(states)) == 1 and 0 < states[0] < 2000
    assert_close("logits", losses, -log_p.gather(1, tokens[1:, None])[:, 0])


def test_a_row_that_is_filled_up_is_read_as_far_as_its_text(model):
    tokens = torch.randint(0, 256, (100,), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(100) < 31, tokens, -100)
    passes = []
    handle = model[0].register_forward_pre_hook(lambda module, args, kwargs: passes.append(kwargs), with_kwargs=True)
    losses = row_losses(model[0], {"input_ids": tokens, "position_ids": torch.arange(100), "labels": labels}, 20)
    handle.remove()
    assert [each["input_ids"].shape[1] for each in passes] == [20, 10]
    assert losses.shape == (99,) and (losses[:30] > 0).all() and (losses[30:] == 0).all()
    nothing = {"input_ids": tokens[:2], "position_ids": torch.arange(2), "labels": labels[-2:]}
    assert row_losses(model[0], nothing, 20).tolist() == [0.0]


def test_first_rows_only(model, data, tmp_path):
    result = main([model[1], data, "--length", "50", "--max_rows", "2", "--output", str(tmp_path)])
    assert result["tokens"] == 2 * 49


def test_token_bytes():
    assert token_bytes("aé三", [(0, 1), (1, 2), (1, 2), (2, 3)]) == [1, 2, 0, 3]
    edges = "\x7f\x80\u07ff\u0800\uffff\U00010000"
    assert token_bytes(edges, [(i, i + 1) for i in range(6)]) == [1, 2, 2, 3, 3, 4]
    assert token_bytes("  ab ", [(2, 3), (3, 4)]) == [3, 2]  # what no token covers is counted all the same
    with pytest.raises(IndexError):
        token_bytes("x", [])


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_every_byte_is_counted_once(data, kind):
    documents = load_documents(data)
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe_tokenizer(TEXTS, 320)
    counts = count_token_bytes(documents, tokenizer)
    assert counts.sum() == sum(len(text.encode()) for text in TEXTS)
    assert len(counts) == sum(len(record["input_ids"]) for record in tokenize(documents, tokenizer))


def test_wrong_arguments(model, data, capsys):
    with pytest.raises(SystemExit):
        main([model[1], data, "--length", "1"])
    assert "--length 1: allowed are whole numbers from 2" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="--output = '.*': .* is a file; allowed is a folder"):
        main([model[1], data, "--output", f"{model[1]}/config.json"])
    with pytest.raises(SystemExit, match="MODEL = 'no/such/folder' does not exist"):
        main(["no/such/folder", "not.read"])
    with pytest.raises(SystemExit, match="error: DATA = 'no/such/text' does not exist"):
        main([model[1], "no/such/text"])
    with pytest.raises(SystemExit, match="text_column = 'body'"):
        main([model[1], data, "--text_column", "body"])


def test_a_document_without_tokens(tmp_path):
    """Its bytes count for its end, which is predicted."""
    save_model(tmp_path)
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1, "the": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", unk_token="[UNK]").save_pretrained(tmp_path)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("the é", " \n ", "the")))
    result = main([str(tmp_path), str(data), "--output", str(tmp_path / "out")])
    assert (result["tokens"], result["bytes"]) == (6, 12)


def test_a_tokenizer_that_cannot_be_counted_with(model, data, tmp_path):
    shutil.copytree(model[1], tmp_path / "slow")
    (tmp_path / "slow" / "tokenizer.json").unlink()
    (tmp_path / "slow" / "tokenizer_config.json").unlink()
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path / "slow")
    with pytest.raises(SystemExit, match=r"a tokenizer that does not say .* \(ByT5Tokenizer\): allowed are fast"):
        main([str(tmp_path / "slow"), data, "--output", str(tmp_path / "out")])
    shutil.copytree(model[1], tmp_path / "other")
    train_bpe_tokenizer(TEXTS, 320).save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit, match=r"MODEL = '.*other': the tokenizer gives the id \d+, .* has 258 rows"):
        main([str(tmp_path / "other"), data, "--output", str(tmp_path / "out")])


def test_a_full_disk_leaves_the_older_page(model, data, tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    words = [model[1], data, "--output", str(tmp_path / "out"), "--length"]
    main([*words, "4096"])
    older = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(SystemExit, match="an older file is as it was: '.*evaluation.json'"):
            main([*words, "32"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == older


def test_peft_stays_out():
    """It brings bitsandbytes, seconds and lines of theirs. Looked at in a new process: other tests import it."""
    code = "import sys, evaluate_text; print(sorted({'peft', 'bitsandbytes', 'trl'} & sys.modules.keys()))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr
