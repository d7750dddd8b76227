"""Documents from every source, the held-out part, tokenizers that reload, and packing, token by token."""

import json
import pickle

import datasets
import numpy as np
import pytest
import torch
from _script_helpers import make_text
from tokenizers import Tokenizer, models, pre_tokenizers
from training import text_data, text_tokenizer
from training.text_data import PackedRows, count_bytes, hold_out, load_documents, tokenize
from training.text_tokenizer import byte_tokenizer, check_fits, document_ends, load_tokenizer, train_bpe_tokenizer
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast


TEXTS = ["first text\nwith two lines", "zweiter, mit Ümläuten", "三番目"]


def texts_of(documents) -> list[str]:
    return [record["text"] for record in documents]


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_bytes("one\r\n\ntwo é".encode())
    assert texts_of(load_documents(str(tmp_path / "a.txt"))) == ["one\r\n\ntwo é"]


def test_folder_gives_one_document_a_text_file(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "deep" / "b.py").write_text("print(1)\n")
    (tmp_path / "a.md").write_text("# title")
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\xff\x00")
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "data.jsonl").write_text('{"text": "records beside other files are text too"}')
    assert texts_of(load_documents(str(tmp_path))) == [
        "# title",
        '{"text": "records beside other files are text too"}',
        "print(1)\n",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("how", ["file", "folder", "glob"])
def test_records(tmp_path, suffix, how):
    for shard, part in enumerate((TEXTS[:2], TEXTS[2:])):
        records = datasets.Dataset.from_dict({"body": part, "id": list(range(len(part)))})
        path = str(tmp_path / f"{shard}.{suffix}")
        records.to_parquet(path) if suffix == "parquet" else records.to_json(path, force_ascii=False)
    source = {"file": tmp_path / f"0.{suffix}", "folder": tmp_path, "glob": tmp_path / f"*.{suffix}"}[how]
    expected = TEXTS[:2] if how == "file" else TEXTS
    assert texts_of(load_documents(str(source), text_column="body")) == expected


def test_hub_dataset(monkeypatch):
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({"content": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(text_data, "require_on_hub", lambda *_: None)
    documents = load_documents("someone/some-data", "content", split="validation", subset="en")
    assert texts_of(documents) == TEXTS
    assert asked == [(("someone/some-data", "en"), {"split": "validation"})]


def test_wrong_sources_name_what_is_allowed(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "x", "number": 3}) + "\n")
    with pytest.raises(ValueError, match=r"text_column = 'text'.*\['body', 'number'\]"):
        load_documents(str(tmp_path / "a.jsonl"))
    with pytest.raises(ValueError, match="text_column = 'number'.*int64.*allowed is text"):
        load_documents(str(tmp_path / "a.jsonl"), text_column="number")
    with pytest.raises(ValueError, match="^train_data = '.*' does not exist"):
        load_documents(str(tmp_path / "missing.txt"))
    with pytest.raises(ValueError, match="^eval_data = '.*' does not exist"):
        load_documents(str(tmp_path / "missing.txt"), field="eval_data")
    (tmp_path / "binary.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8 text"):
        load_documents(str(tmp_path / "binary.bin"))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="holds no text"):
        load_documents(str(tmp_path / "empty.txt"))


def test_hold_out_parts_documents_by_its_own_seed():
    documents = datasets.Dataset.from_dict({"text": [str(i) for i in range(40)]})
    train, held_out = hold_out(documents, 0.1, seed=0)
    assert len(held_out) == 4
    assert sorted(texts_of(train) + texts_of(held_out), key=int) == texts_of(documents)
    assert texts_of(hold_out(documents, 0.1, seed=0)[1]) == texts_of(held_out)
    assert texts_of(hold_out(documents, 0.1, seed=1)[1]) != texts_of(held_out)


def test_hold_out_cuts_a_single_document_at_a_line():
    text = "".join(f"line {i}\n" for i in range(100))
    train, held_out = hold_out(datasets.Dataset.from_dict({"text": [text]}), 0.1, seed=0)
    assert train[0]["text"] + held_out[0]["text"] == text
    assert train[0]["text"].endswith("\n")
    assert 60 < len(held_out[0]["text"]) < 100
    with pytest.raises(ValueError, match="eval_fraction = 1.5"):
        hold_out(train, 1.5, seed=0)


def test_count_bytes_counts_bytes_not_characters():
    assert count_bytes(datasets.Dataset.from_dict({"text": ["é", "三番", "ab"]})) == 2 + 6 + 2


def test_byte_tokenizer_is_bytes_and_reloads(tmp_path):
    tokenizer = byte_tokenizer()
    text = "".join(map(chr, range(0x250))) + " 三番目 🙂\r\n\t  end "
    assert tokenizer(text)["input_ids"] == [256, *text.encode()]  # as documents begin in training
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
    assert len(tokenizer) == 258
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (256, 256, 257)

    tokenizer.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert reloaded(text)["input_ids"] == [256, *text.encode()]
    assert reloaded.decode(list(text.encode())) == text
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (256, 256, 257)


def test_bpe_tokenizer_reloads_and_keeps_every_byte(tmp_path):
    tokenizer = train_bpe_tokenizer([make_text(300, seed) for seed in range(3)], 300)
    assert len(tokenizer) == 300
    text = make_text(50, seed=9) + " 🙂 unseen"
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text and len(ids) < 0.8 * len(text.encode())
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), [], 0)(text)["input_ids"] == ids


def test_tokenizer_errors():
    with pytest.raises(ValueError, match="tokenizer_vocab_size = 100: .*from 258"):
        load_tokenizer("bpe", ["x"], 100)
    with pytest.raises(ValueError, match="tokenizer = '/nowhere/at/all'"):
        load_tokenizer("/nowhere/at/all", [], 0)
    with pytest.raises(ValueError, match="258 tokens.*257 rows"):
        check_fits(byte_tokenizer(), 257)
    check_fits(byte_tokenizer(), 258)
    with pytest.raises(ValueError, match="neither an eos_token nor a bos_token"):
        document_ends(PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer().backend_tokenizer))


def packed(lengths: list[int], row_length: int, chunks: int = 1) -> tuple[PackedRows, list[list[int]]]:
    """Documents whose tokens all differ, in as many Arrow chunks as asked for."""
    numbers = iter(range(1, 10_000))
    documents = [[next(numbers) for _ in range(length)] for length in lengths]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    parts = [
        datasets.Dataset.from_dict({"input_ids": [documents[i] for i in part]}, features=features)
        for part in np.array_split(range(len(documents)), chunks)
    ]
    return PackedRows(datasets.concatenate_datasets(parts), row_length, filler=0), documents


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("lengths", [[2, 3, 2, 11, 4, 9], [5], [40, 2, 2, 2], [7, 7, 7, 7], [2]])
@pytest.mark.parametrize("row_length", [2, 3, 7, 8, 64])
def test_packing_predicts_every_token_once(lengths, row_length, chunks):
    rows, documents = packed(lengths, row_length, min(chunks, len(lengths)))
    previous = {token: before for document in documents for before, token in zip(document, document[1:])}
    predicted = []
    for index in range(len(rows)):
        row = rows[index]
        ids, positions, labels = (row[name].tolist() for name in ("input_ids", "position_ids", "labels"))
        assert len(ids) == len(positions) == len(labels) == row_length
        assert positions[0] == 0 and labels[0] == -100
        for i in range(1, row_length):
            assert positions[i] in (0, positions[i - 1] + 1)
            starts = ids[i] == 0 or ids[i] in [document[0] for document in documents]
            if starts:
                assert labels[i] == -100
                assert positions[i] == 0 or ids[i - 1] == 0
            else:  # the token before it is its document's, and the model sees no border between them
                assert labels[i] == ids[i] and positions[i] > 0 and previous[ids[i]] == ids[i - 1]
                predicted.append(labels[i])
    assert sorted(predicted) == sorted(previous)
    assert rows.num_predicted == len(predicted)
    assert rows.num_tokens == sum(lengths)


def test_packing_exact():
    rows, _ = packed([3, 2, 6], 6)
    assert len(rows) == 2
    assert {name: tensor.tolist() for name, tensor in rows[0].items()} == {
        "input_ids": [1, 2, 3, 4, 5, 6],
        "position_ids": [0, 1, 2, 0, 1, 0],
        "labels": [-100, 2, 3, -100, 5, -100],
    }
    rows, _ = packed([3, 2, 5], 6)
    assert {name: tensor.tolist() for name, tensor in rows[1].items()} == {
        "input_ids": [6, 7, 8, 9, 10, 0],
        "position_ids": [0, 1, 2, 3, 4, 0],
        "labels": [-100, 7, 8, 9, 10, -100],
    }
    assert rows[0]["input_ids"].dtype == torch.long
    with pytest.raises(ValueError, match="sequence_length = 1"):
        PackedRows(None, 1, 0)


def test_rows_come_to_an_end():
    """Before and after them there is none, as of any sequence."""
    tokenized = datasets.Dataset.from_dict({"input_ids": [[9, 1, 2, 3, 9]]})
    rows = PackedRows(tokenized.cast_column("input_ids", datasets.List(datasets.Value("int32"))), 3, 9)
    assert len([row for row in rows]) == len(rows) == 2
    for wrong in (-1, 2):
        with pytest.raises(IndexError, match=f"row {wrong}: allowed are 0 to 1"):
            rows[wrong]


def test_tokenize_puts_ends_around_documents():
    documents = datasets.Dataset.from_dict({"text": ["ab", "é"]})
    assert tokenize(documents, byte_tokenizer())["input_ids"][:] == [[256, 97, 98, 256], [256, 195, 169, 256]]


def tokenizer_of(kind: str):
    texts = [make_text(60, seed) for seed in range(3)]
    if kind == "python":  # without a library that encodes many texts at once
        return ByT5Tokenizer()
    tokenizer = byte_tokenizer() if kind == "bytes" else train_bpe_tokenizer(texts, 320)
    if kind == "cuts":  # as some folders' tokenizers are set
        tokenizer.backend_tokenizer.enable_truncation(4)
        tokenizer.backend_tokenizer.enable_padding(length=50)
    return tokenizer


@pytest.mark.parametrize("kind", ["bytes", "bpe", "cuts", "python"])
@pytest.mark.parametrize("num_proc", [None, 2])
def test_tokens_are_those_of_each_text_alone(kind, num_proc, monkeypatch):
    """Whole, whatever is encoded together, and in the same rows as ids in plain lists make."""
    monkeypatch.setattr(text_tokenizer, "ENCODED_AT_ONCE", 100)
    monkeypatch.setattr(text_data, "BATCH", 5)
    texts = [*TEXTS, "", "x <|endoftext|> y", *(make_text(20 + seed, seed) for seed in range(10))]
    tokenizer = tokenizer_of(kind)
    tokens = tokenize(datasets.Dataset.from_dict({"text": texts}), tokenizer, num_proc)
    first, last = document_ends(tokenizer)
    alone = [[first, *tokenizer(text, add_special_tokens=False)["input_ids"], last] for text in texts]
    assert tokens["input_ids"][:] == alone and tokens.features["input_ids"].feature.dtype == "uint16"
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    plain = PackedRows(datasets.Dataset.from_dict({"input_ids": alone}, features=features), 16, last)
    rows = PackedRows(tokens, 16, last)
    assert rows.checksum() == plain.checksum() and len(rows) == len(plain)
    for row, expected in zip(rows, plain):
        assert all(torch.equal(row[name], expected[name]) and row[name].dtype == torch.long for name in expected)


def test_rows_have_the_checksum_of_earlier_versions():
    """By which a run that was interrupted then knows its text."""
    documents = datasets.Dataset.from_dict({"text": TEXTS})
    rows = PackedRows(tokenize(documents, byte_tokenizer()), 16, 256)
    assert rows.checksum() == "098a83d12824092336fe06b89f4204e5a8dd7ae38c405483ef8ba8375281d76c"


def test_ids_beyond_two_bytes():
    model = models.WordLevel({f"w{i}": i for i in range(70_000)}, unk_token="w0")
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w1")
    tokens = tokenize(datasets.Dataset.from_dict({"text": ["w69999 w65536"]}), tokenizer)
    assert tokens["input_ids"][:] == [[1, 69999, 65536, 1]]


def test_long_text_lies_in_a_file_and_is_tokenised_once(tmp_path, monkeypatch):
    """Under the name that its contents give; what a process is sent does not grow with the text."""
    monkeypatch.setattr(text_data, "LONG_TEXT_BYTES", 1000)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "text"
    folder.mkdir()
    for i in range(4):
        (folder / f"{i}.txt").write_text(make_text(5000, i))
    documents, tokenizer = load_documents(str(folder)), train_bpe_tokenizer([make_text(300, 0)], 300)
    assert texts_of(documents) == [make_text(5000, i) for i in range(4)]
    assert len(pickle.dumps(documents.shard(2, 0, contiguous=True))) < 20_000 < len(make_text(5000, 0))
    expected = tokenize(documents, tokenizer)["input_ids"][:]

    monkeypatch.setattr(text_tokenizer, "_groups", lambda texts: pytest.fail("tokenised again"))
    again = train_bpe_tokenizer([make_text(300, 0)], 300)  # as another process makes it
    assert tokenize(load_documents(str(folder)), again)["input_ids"][:] == expected
    assert len(list((tmp_path / "cache").glob("*/*"))) == 1
    (folder / "0.txt").write_text(make_text(5000, 9))
    assert texts_of(load_documents(str(folder)))[0] == make_text(5000, 9)
    (folder / "0.txt").write_text("short")
    assert texts_of(load_documents(str(folder)))[0] == "short"
