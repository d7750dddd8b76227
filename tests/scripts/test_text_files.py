"""Files that cannot be read, and names that are on no Hub: one line with the file, the line or the link."""

import errno
import os
import time
from pathlib import Path

import datasets
import pytest
from _script_helpers import write_run
from huggingface_hub import constants
from train import run
from training import hub_ids
from training.arguments import read_arguments
from training.text_data import load_documents


def one_line(source: Path | str, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message) as error:
        load_documents(str(source), **options)
    assert "\n" not in str(error.value)


def write_parquet(path: Path, texts: list) -> bytes:
    datasets.Dataset.from_dict({"text": texts}).to_parquet(path)
    return path.read_bytes()


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_jsonl_without_a_record(tmp_path, content):
    (tmp_path / "empty.jsonl").write_text(content)
    one_line(tmp_path / "empty.jsonl", "empty.jsonl' holds no text|empty.jsonl cannot be read as json")
    (tmp_path / "full.jsonl").write_text('{"text": "a"}\n')
    if not content:
        assert load_documents(str(tmp_path))["text"][:] == ["a"]


def test_parquet_without_a_record(tmp_path):
    write_parquet(tmp_path / "a.parquet", [])
    one_line(tmp_path / "a.parquet", "holds no text")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet", "a.json"])
def test_a_file_that_may_not_be_read(tmp_path, monkeypatch, name):
    """By a stand-in for the system's refusal, which a superuser never meets."""
    (tmp_path / name).write_text("{}")
    opened = Path.open

    def refuse(self, *arguments, **more):
        if self.name == name:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))
        return opened(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    for source in (tmp_path / name, tmp_path):
        one_line(source, rf"{tmp_path}/{name} cannot be read: Permission denied")


def test_a_folder_that_may_not_be_listed(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.txt").write_text("text")
    listed = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    one_line(tmp_path, "closed cannot be read: Permission denied")


def test_the_damaged_one_of_several_parquets(tmp_path):
    for shard in range(3):
        content = write_parquet(tmp_path / f"{shard}.parquet", [f"text {shard} {i}" for i in range(50)])
    (tmp_path / "1.parquet").write_bytes(content[:100] + bytes(100) + content[200:])
    one_line(tmp_path, "1.parquet cannot be read as parquet: ")
    (tmp_path / "1.parquet").write_bytes(content[: len(content) // 2])
    one_line(tmp_path / "*.parquet", "1.parquet cannot be read as parquet: ")


def test_files_that_do_not_fit_each_other(tmp_path):
    write_parquet(tmp_path / "0.parquet", ["a", "b"])
    datasets.Dataset.from_dict({"other": [1.5]}).to_parquet(tmp_path / "1.parquet")
    one_line(tmp_path, "0.parquet to .*1.parquet cannot be read together as parquet")


@pytest.mark.parametrize("second", ['{"text": 5}', '{"text": ["a"]}', "[1]", '{"text": NaN}', '{"text": '])
def test_a_line_whose_text_is_none(tmp_path, second, capfd):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n' + second + "\n")
    one_line(tmp_path / "a.jsonl", r"a\.jsonl, line 2: ")
    assert capfd.readouterr() == ("", "")  # neither a bar that stops half-way nor the reader's own words


def test_a_record_without_the_column(tmp_path, capsys):
    """The reader would put null there, and the document would be gone without a word."""
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"body": "two"}\n')
    one_line(tmp_path / "a.jsonl", r"a\.jsonl, line 3 has no 'text': allowed are records that all have it")
    (tmp_path / "a.json").write_text('[{"text": "one"}, {"body": "two"}]')
    one_line(tmp_path / "a.json", r"a\.json, record 2 has no 'text'")
    (tmp_path / "b.jsonl").write_text('{"body": "two"}\n{"text": "one"}\n')
    one_line(tmp_path / "b.jsonl", r"b\.jsonl, line 1 has no 'text'")
    (tmp_path / "b.jsonl").write_text('{"body": "two", "text": "one"}\n{"text": null}\n{"text": ""}\n')
    assert load_documents(str(tmp_path / "b.jsonl"))["text"][:] == ["one"]
    assert "b.jsonl: 2 of 3 documents, which are empty\n" in capsys.readouterr().out


def test_bytes_that_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "\xe9"}\n')
    one_line(tmp_path / "a.jsonl", r"a\.jsonl, line 2: .* is not UTF-8 text")


@pytest.mark.parametrize("content", ["null", " null\n", '\n\nnull\n{"text": "a"}\n'])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_null_for_a_record(tmp_path, name, content):
    """At a file's beginning, where the reader ends the process."""
    (tmp_path / name).write_text(content)
    one_line(tmp_path / name, f"{name} begins with null: allowed are JSON records")


def test_a_record_that_is_nested_too_deep(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "b", "more": ' + "[" * 2000 + "]" * 2000 + "}\n")
    one_line(tmp_path / "a.jsonl", r"a\.jsonl, line 2: .* cannot be read as json")


def test_links_to_nothing(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.txt").symlink_to("../gone.txt")
    one_line(tmp_path / "data", "holds no file but the link .*a.txt to ../gone.txt, which does not exist")
    one_line(tmp_path / "data" / "a.txt", "the link .*a.txt to ../gone.txt, which does not exist")
    (tmp_path / "data" / "b.txt").write_text("text")
    assert load_documents(str(tmp_path / "data"))["text"][:] == ["text"]
    assert "left out of" in capsys.readouterr().out
    (tmp_path / "hollow").mkdir()
    one_line(tmp_path / "hollow", "the folder .*hollow' holds no files")


def test_a_full_disk_is_not_the_fault_of_the_data(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')

    def load(*arguments, **more):
        raise datasets.exceptions.DatasetGenerationError("x") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(datasets.exceptions.DatasetGenerationError):
        load_documents(str(tmp_path / "a.jsonl"))


# Names


@pytest.mark.parametrize("name", ["/no/where", "./nowhere", "a/b/c", "data.txt", "what is this?", "data/text.jsonl"])
def test_what_is_no_name_of_the_hub_does_not_exist(name, monkeypatch):
    monkeypatch.setattr(hub_ids, "_answer", lambda *_: pytest.fail("the Hub was asked"))
    one_line(name, "does not exist")


@pytest.mark.parametrize("how", ["refused", "silent", "offline"])
def test_without_a_network_the_answer_comes_in_time(tmp_path, monkeypatch, how):
    """No server at the Hub's address; one that never answers; a machine that was told to stay offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", how == "offline")
    if how == "silent":
        monkeypatch.setattr(hub_ids.HfApi, "repo_info", lambda *_, **__: time.sleep(30))
    else:
        info = hub_ids.HfApi.repo_info
        at = hub_ids.HfApi(endpoint="http://127.0.0.1:9")
        monkeypatch.setattr(hub_ids.HfApi, "repo_info", lambda _, *a, **k: info(at, *a, **k))
    begun = time.monotonic()
    one_line("data/text", r"'data/text' does not exist \(no such file or folder, and .*(cannot be reached|offline)")
    settings = {"config_name": None, "model_name_or_path": "build/not_there"}
    if how != "silent":
        with pytest.raises(SystemExit, match="model_name_or_path = 'build/not_there' does not exist"):
            run([write_run(tmp_path, **settings)])
    assert time.monotonic() - begun < 5


def test_a_name_that_the_hub_does_not_know(monkeypatch):
    error = hub_ids.RepositoryNotFoundError.__new__(hub_ids.RepositoryNotFoundError)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_ids, "_answer", lambda *_: error)
    one_line("some/typo", r"'some/typo' does not exist \(no such file or folder, and the Hub .* no public data set")


def test_in_the_cache_it_is_loaded_without_the_hub(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    (tmp_path / "models--some--model" / "snapshots" / "0123").mkdir(parents=True)
    monkeypatch.setattr(hub_ids, "_answer", lambda *_: TimeoutError("no answer"))
    hub_ids.require_on_hub("x", "some/model", "model", "y")
    assert constants.HF_HUB_OFFLINE and "some/model is taken from the cache" in capsys.readouterr().err
    with pytest.raises(ValueError, match="offline .* the cache has no data set of this name"):
        hub_ids.require_on_hub("x", "some/model", "dataset", "y")


# Before the work


def test_bad_yaml_has_a_file_and_a_line(tmp_path):
    (tmp_path / "bad.yaml").write_text("seed: 1\nmax_steps: 3\n  learning_rate: 1\n")
    with pytest.raises(ValueError, match=r"bad\.yaml, line 3, column 16: mapping values are not allowed here$"):
        read_arguments([str(tmp_path / "bad.yaml")])
    (tmp_path / "bad.yaml").write_bytes(b"seed: \xff\n")
    with pytest.raises(ValueError, match=r"bad\.yaml is not UTF-8 text"):
        read_arguments([str(tmp_path / "bad.yaml")])
    with pytest.raises(ValueError, match=r"missing\.yaml does not exist: allowed are YAML files"):
        read_arguments([str(tmp_path / "missing.yaml")])


def test_a_configuration_that_is_not_there_names_those_that_are(tmp_path):
    said = r"config_name = './nothing' does not exist .* a ready-made one \(griffin-100m, .*, tiny\), or a Hub id"
    with pytest.raises(SystemExit, match=said):
        run([write_run(tmp_path, config_name="./nothing")])


def test_an_output_dir_that_cannot_be_written_is_refused_before_reading(tmp_path, monkeypatch):
    monkeypatch.setattr("train.make_trainer", lambda *_: pytest.fail("the data were read"))
    path = write_run(tmp_path)
    for place, reason in ((path, "is a file"), (f"{path}/x/y", "run.yaml is a file"), ("/proc/x", "cannot be written")):
        with pytest.raises(SystemExit, match=f"output_dir = '{place}': .*{reason}"):
            run([path, "--output_dir", place])
