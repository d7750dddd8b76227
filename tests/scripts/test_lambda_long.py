"""The long study of Λ on a CPU: packages to text, text to tokens, runs that stop and go on, the page."""

import hashlib
import io
import json
import tarfile
import zipfile

import gather_text
import pytest
import torch
import yaml
from _script_helpers import ROOT, make_text
from lambda_study import long_runs
from lambda_study.long_runs import LongRun, ScaledScan, change_input_scale, plan, points, run_long
from lambda_study.long_text import ResidentTextTask, prepare_shards
from lambda_study.run import make_config, make_model
from report_lambda_inits import main as report_inits
from report_lambda_long import best_rate, measured, rate_table, tokens_to_reach
from report_lambda_long import main as report
from study_lambda_long import main as study_main
from study_lambda_long import read_study
from text_corpus.archives import CLIENTS, fetch
from text_corpus.deduplicate import Deduplicator
from text_corpus.documents import kind_of, text_of
from text_corpus.shards import read_shard

from modeling_griffin.rg_lru import RGLRU
from modeling_griffin.rg_lru_scan import rg_lru_scan


CPU = torch.device("cpu")
STUDY = {
    "arms": {
        "uniform": {"lambda_init": "uniform"},
        "recurrent_gemma": {"lambda_init": "recurrent_gemma"},
        "swapped": {"lambda_init": "uniform", "input_scale_of": "recurrent_gemma"},
    },
    "text": {"vocab_size": 300},
    "common": {
        "weight_decay": 0.1,
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "length": 32,
        "held_out_rows": 4,
        "long_length": 128,
        "long_rows": 2,
        "recall_rows": 16,
        "distances": [8, 64],
    },
    "sizes": {
        "tiny": {
            "rows": 4,
            "model": {
                "layout": "griffin",
                "hidden_size": 16,
                "num_hidden_layers": 3,
                "num_attention_heads": 2,
                "attention_window_size": 8,
                "num_gate_blocks": 4,
            },
        }
    },
    "phases": {
        "rates": {
            "size": "tiny",
            "arms": ["uniform", "recurrent_gemma"],
            "learning_rates": ["1e-3", 1e-2],
            "seeds": [9],
            "tokens": 640,
        },
        "full": {
            "size": "tiny",
            "arms": ["uniform", "recurrent_gemma"],
            "rates_of": "rates",
            "seeds": [0],
            "tokens": 2560,
        },
    },
}


def wheel(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def npm_archive(path, files):
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(content.encode())
            archive.addfile(entry, io.BytesIO(content.encode()))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Folder of shards made from two packages on disk, and the facts."""
    folder = tmp_path_factory.mktemp("text")
    archives = folder / "archives"
    archives.mkdir()
    long = {f"a/long{i}.md": "\n\n".join(make_text(120, seed=100 * i + j) for j in range(12)) for i in range(3)}
    wheel(archives / "a.whl", {f"a/{i}.md": make_text(150, seed=i) for i in range(40)} | long)
    npm_archive(
        archives / "b.tgz", {f"{i}.md": make_text(150, seed=i % 60) for i in range(30, 80)} | {"c.js": "x" * 5000}
    )
    packages = []
    for registry, name in (("pypi", "a.whl"), ("npm", "b.tgz")):
        digest = hashlib.sha256((archives / name).read_bytes()).hexdigest()
        packages.append(
            {"registry": registry, "name": name, "version": "1", "file": name, "sha256": digest, "licence": "MIT"}
        )
    wanted = {"packages": packages, "most": {"prose": 1}, "held_out": 0.2, "long_document": 5000, "held_out_of_long": 1}
    (folder / "list.yaml").write_text(yaml.safe_dump(wanted))
    arguments = [str(folder / "list.yaml"), "--archives", str(archives), "--shard", "1"]
    for output in ("shards", "again"):
        gather_text.main([*arguments, "--output", str(folder / output), "--jobs", "1"])
    return folder


def test_gathering_is_the_same_twice_and_leaves_each_text_in_once(text):
    facts = json.loads((text / "shards" / "facts.json").read_text())
    assert facts == json.loads((text / "again" / "facts.json").read_text())
    documents = [d for shard in facts["shards"] for d in read_shard(text / "shards" / shard["file"])]
    texts = [document["text"] for document in documents]
    assert (
        len(texts)
        == len(set(texts))
        == 40 + 3 + 20
        == facts["total"]["documents"] + facts["total"]["held_out_documents"]
    )
    assert facts["kinds"]["prose"]["read"] == 93 and facts["licences"]["npm: b.tgz 1"] == "MIT"
    held_out = [document["held_out"] for document in documents]
    assert 3 < sum(held_out) < 30 and all(d["held_out"] for d in documents if len(d["text"]) >= 5000)


def test_a_package_that_changed_is_refused(text, tmp_path):
    wanted = yaml.safe_load((text / "list.yaml").read_text())
    wanted["packages"][0]["sha256"] = "0" * 64
    path = tmp_path / "list.yaml"
    path.write_text(yaml.safe_dump(wanted))
    with pytest.raises(SystemExit, match="SHA-256"):
        gather_text.main([str(path), "--archives", str(text / "archives"), "--output", str(tmp_path)])


def test_a_package_that_cannot_be_had_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(CLIENTS, "debian", lambda name, version: ["false"])
    with pytest.raises(ValueError, match=r"apt-get update.*put a\.deb into .*or list another version"):
        fetch({"registry": "debian", "name": "a", "version": "1", "file": "a.deb", "sha256": ""}, tmp_path)


def test_paragraphs_that_came_before_go_and_near_copies_go_whole():
    once = Deduplicator()
    long, other = ("the quick brown fox jumps over the lazy dog and on " + word for word in ("home", "and away"))
    assert once(f"{long}\n\n{other}") == f"{long}\n\n{other}"
    assert once(f"{long.upper()}  2\n\n{other}!\n\nnew") is None
    fresh = "nothing of this was ever said before in any of the documents, and it is longer than what came before it"
    assert once(f"{long}\n\nshort\n\n{fresh}") == f"short\n\n{fresh}"
    assert once("short\n\n" + fresh[::-1]) == "short\n\n" + fresh[::-1]  # short paragraphs may come again


def test_what_is_a_document():
    assert kind_of("a/b.py") == "python" and kind_of("x/app.min.js") is None and kind_of("x.png") is None
    page = "<html><head><title>no</title></head><body><p>One &amp; two</p><script>no()</script><ul><li>three</ul>"
    said = text_of("a.html", "prose", (page + "<p>" + "word " * 100).encode())
    assert said.startswith("One & two\n\n") and "three" in said and "no" not in said
    good = "def f(value):\n    return value\n" * 20
    assert text_of("a.py", "python", good.encode()) == good
    for bad in (good.encode() + b"\xff", b"# @generated\n" + good.encode(), b"x = " + b"1, " * 200, b"0 1 2\n" * 200):
        assert text_of("a.py", "python", bad) is None


@pytest.fixture(scope="module")
def study(text, tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    made = read_study(path)
    made["text"] = prepare_shards(made["text"], text / "shards", folder / "tokens", 1)
    return made


RUN = {"phase": "full", "size": "tiny", "arm": "uniform", "seed": 3, "learning_rate": 1e-2, "tokens": 7680}


def test_rows_gathered_on_the_device_are_those_of_packed_rows(study):
    task = ResidentTextTask({**study["common"], **study["text"], "rows": 4, "steps": 50}, 0, CPU)
    for _ in range(50):
        rows = task.batch()["rows"]
        batch = task._gather(rows)
        for name, values in batch.items():
            expected = torch.stack([task.train_rows[row][name] for row in rows.tolist()])
            assert torch.equal(values, expected), name


def test_a_run_that_was_stopped_ends_as_one_that_was_not(study, tmp_path, monkeypatch):
    monkeypatch.setattr(long_runs, "LOOKS", 7)
    monkeypatch.setattr(long_runs, "FIRST_POINT", 1000)
    run = {"key": "full/a", **RUN}
    whole = run_long(run, study, tmp_path / "whole", "cpu", float("inf"))
    assert whole["status"] == "finished" and whole["steps"] == 60
    stopped = 0
    while (record := run_long(run, study, tmp_path / "parts", "cpu", 0))["status"] == "paused":
        stopped += 1
    assert stopped == 60 // 7
    for name in ("curve", "memory", "evaluations", "recall"):
        assert record[name] == whole[name], name
    assert whole["curve"][-1]["loss"] < whole["curve"][0]["loss"] - 0.5
    assert {entry["kind"] for entry in whole["recall"]} == {"text", "random"}


def test_the_scale_of_another_initialisation(study):
    """Hidden states are those of the definition with the other's sqrt(1 - b^2) at r = 0.5; a stays as it was."""
    arms, model = study["arms"], study["sizes"]["tiny"]["model"]
    config = make_config(model, {"lambda_init": "uniform"}, 300)
    plain, swapped, other = (
        make_model(config, 0),
        make_model(config, 0),
        make_model(make_config(model, {"lambda_init": arms["swapped"]["input_scale_of"]}, 300), 0),
    )
    change_input_scale(swapped, "recurrent_gemma", 0)
    units = [[module for module in each.modules() if isinstance(module, RGLRU)] for each in (plain, swapped, other)]
    assert len(units[0]) == 2
    for own, changed in zip(units[0], units[1]):
        assert torch.equal(own.decay(), changed.decay())
        width = own.decay().numel()
        x, gate = torch.randn(1, 1, width), torch.zeros(1, 1, width)  # r = i = 0.5, from a state of zeros
        h = rg_lru_scan(x, gate, gate, own.decay())[0]
        h_changed = changed.scan(x, gate, gate, changed.decay())[0]
        a_squared = own.decay().exp()  # a_t^2 = exp(2 * 0.5 log a^c)
        b_squared = 1 - (h_changed / h)[0, 0].square() * (1 - a_squared)
        assert ((b_squared > 0.43) & (b_squared < 0.993)).all() and b_squared.min() < 0.85  # the released code's range
        assert torch.equal(b_squared.argsort(), a_squared.argsort())  # ranks are kept
    same = ScaledScan(units[2][0].decay(), units[2][0].decay().flip(0))
    torch.testing.assert_close(same.factor, torch.ones_like(same.factor))


def test_points_and_rates(study):
    assert points(8_000_000, 1000) == {1000, 1414, 2000, 2828, 4000, 5657, 8000}
    runs = plan(study, {})
    assert [run["learning_rate"] for run in runs] == [1e-3, 1e-2, 1e-3, 1e-2, None, None]
    ends = {1e-3: 2.0, 1e-2: 1.0}
    records = {
        run["key"]: {"status": "finished", "curve": [{"loss": ends[run["learning_rate"]]}]}
        for run in runs
        if run["key"]
    }
    assert [run["learning_rate"] for run in plan(study, records)[4:]] == [1e-2, 1e-2]
    records[runs[1]["key"]]["status"] = "paused"
    assert [run["learning_rate"] for run in plan(study, records)[4:]] == [None, 1e-2]
    assert tokens_to_reach({10: 3.0, 1000: 1.0}, 2.0) == pytest.approx(100) and tokens_to_reach({10: 3.0}, 1.0) is None


def test_an_arm_of_several_rates_is_judged_at_its_best():
    def run(arm, rate, seed, losses, is_measured=True, status="finished"):
        curve = [{"step": step, "loss": loss} for step, loss in enumerate([9.0, *losses])]
        said = {"arm": arm, "learning_rate": rate, "seed": seed, "curve": curve, "tokens_a_step": 10, "status": status}
        return {**said, "measured": is_measured}

    slow, fast = run("a", 1e-3, 0, [3.0, 1.0]), run("a", 2e-3, 0, [2.0, 1.5])
    only, paused = run("b", 2e-3, 0, [2.0, 1.25]), run("a", 2e-3, 1, [2.0], status="paused")
    assert best_rate([slow, fast]) == 1e-3 and best_rate([slow, fast, paused]) == 2e-3  # after what all have seen
    assert measured([slow, fast, only, run("c", 1.0, 0, [1.0], is_measured=False)]) == [slow, only]
    assert rate_table([slow, fast, only, paused])[2:4] == ["| a | 1.0000 | 1.5000 |", "| b |  | 1.2500 |"]


def test_the_whole_chain_over_two_calls(text, study, tmp_path, capsys, monkeypatch):
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY, sort_keys=False))
    arguments = [str(path), "--text", str(text / "shards"), "--output", str(tmp_path / "long"), "--devices", "cpu"]
    study_main([*arguments, "--phases", "rates", "--commit", "abc"])
    assert "4 of 6 runs" in capsys.readouterr().out
    study_main([*arguments, "--commit", "abc"])
    assert "6 of 6 runs" in capsys.readouterr().out
    records = [json.loads(line) for line in (tmp_path / "long" / "runs.jsonl").read_bytes().splitlines()]
    assert [record["status"] for record in records] == ["finished"] * 6
    assert all(record["commit"] == "abc" and record["settings"]["data"]["train"]["tokens"] for record in records)
    longer = {**STUDY, "common": {**STUDY["common"], "weight_decay": 0.5}}
    path.write_text(yaml.safe_dump(longer, sort_keys=False))
    with pytest.raises(SystemExit, match="with weight_decay = .*, the sweep wants 0.5: give another --output"):
        study_main([*arguments, "--commit", "abc"])
    page = tmp_path / "long.md"
    page.write_text("# Old title\n\n**Correction.** Kept.\n\n`python old`; commit x\n")
    report([str(tmp_path / "long")])
    said = page.read_text()
    assert said.startswith("# Which Λ") and said.count("**Correction.** Kept.") == 1 and "python old" not in said
    assert "| recurrent_gemma |" in said and "layer 2" in said and "abc" in said
    assert tmp_path.joinpath("long.png").read_bytes().startswith(b"\x89PNG")


def test_what_a_study_may_say(tmp_path):
    path = tmp_path / "study.yaml"
    for change, message in (
        ({"arms": {**STUDY["arms"], "uniform": {"input_scale_of": "nothing"}}}, "input_scale_of = 'nothing'"),
        ({"phases": {"full": {**STUDY["phases"]["full"], "rates_of": "no"}}}, "rates_of = 'no'"),
        ({"phases": {"full": {**STUDY["phases"]["full"], "arms": ["no"]}}}, "arms = \\['no'\\]"),
    ):
        path.write_text(yaml.safe_dump({**STUDY, **change}, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            read_study(path)
    for key in ("arms", "sizes", "phases", "common", "text"):
        path.write_text(yaml.safe_dump({name: STUDY[name] for name in STUDY if name != key}, sort_keys=False))
        with pytest.raises(ValueError, match=f"study.yaml lacks {key}: allowed is "):
            read_study(path)
    full = STUDY["phases"]["full"]
    for change, message in (
        ({"phases": {"full": {**full, "seeds": 3}}}, "seeds = 3 of phase 'full': allowed is a list of whole"),
        ({"phases": {"full": {**full, "tokens": "many"}}}, "tokens = many of phase 'full': allowed is a number"),
        ({"phases": {"full": {**full, "size": [1]}}}, r"phase 'full' has size = \[1\]"),
        ({"sizes": [1]}, r"sizes = \[1\]: allowed is names"),
    ):
        path.write_text(yaml.safe_dump({**STUDY, **change}, sort_keys=False))
        with pytest.raises(ValueError, match=message):
            read_study(path)


@pytest.mark.parametrize("path", sorted((ROOT / "configuration" / "training" / "lambda_long").glob("*.yaml")), ids=str)
def test_shipped_studies(path):
    assert read_study(path)["phases"]


def test_a_list_of_packages_that_is_none(tmp_path):
    shipped = yaml.safe_load((ROOT / "configuration" / "text" / "long.yaml").read_text())
    path = tmp_path / "list.yaml"
    for change, message in (
        ({"packages": [3]}, r"packages = \[3\]: allowed is a list of mappings"),
        ({"most": 5}, "most = 5: allowed is a mapping"),
        ({"held_out": "few"}, "held_out = few: allowed is a number"),
    ):
        path.write_text(yaml.safe_dump({**shipped, **change}))
        with pytest.raises(ValueError, match=message):
            gather_text.read_list(path)
    path.write_text("phases: {}")
    with pytest.raises(ValueError, match="list.yaml lacks packages"):
        gather_text.read_list(path)


def test_runs_of_another_study_are_no_page(tmp_path, capsys):
    for write_report, line in ((report, {"key": "a/b", "task": "a"}), (report_inits, {"key": "a/b", "size": "35m"})):
        (tmp_path / "runs.jsonl").write_text(json.dumps(line) + "\n")
        with pytest.raises(SystemExit):
            write_report([str(tmp_path)])
        assert "runs.jsonl: the run a/b lacks " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        report([str(tmp_path / "nothing")])
    assert "nothing does not exist: allowed are folders of study_lambda_long.py" in capsys.readouterr().err


def test_long_run_saves_what_it_needs(study, tmp_path):
    run = LongRun(RUN, study, CPU)
    run.save(tmp_path / "a.pt")
    again = LongRun({**RUN, "seed": 4}, study, CPU)
    again.load(tmp_path / "a.pt")
    for first, second in zip(run.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(first, second)
    other = {**study, "common": {**study["common"], "weight_decay": 0.5}}
    with pytest.raises(ValueError, match="is of a run with other settings: give another --state"):
        LongRun(RUN, other, CPU).load(tmp_path / "a.pt")
