"""The benchmark of quantised weights on a CPU, at a tiny size: every row is measured, and quantised as said."""

import json
import subprocess

import benchmark_quantised
import pytest
import torch
from _script_helpers import make_text
from benchmarks.quantised import SCHEMES, bytes_of, dequantised, quantise, train_emulated


TINY = ["--device", "cpu", "--size", "tiny", "--rows", "1", "--new", "4", "--repeats", "1"]


def test_decoding(tmp_path, usual_four_bits):
    pytest.importorskip("bitsandbytes")
    schemes = ["bfloat16", "nf4, constants too"]
    benchmark_quantised.main([*TINY, "--parts", "decode", "--schemes", *schemes, "--output", str(tmp_path / "page")])
    rows = json.loads((tmp_path / "page.json").read_text())["decode"]
    assert [row["scheme"] for row in rows] == [schemes[0], schemes[1], schemes[1]]
    assert not any("failed" in row for row in rows), rows
    assert rows[0]["path"] == "fused" and rows[1]["path"] == "forward" and rows[1]["bytes"] < rows[0]["bytes"]
    assert rows[0]["same"] > 0.9 and rows[1]["same"] > 0.9
    assert "| nf4, constants too | 1 | forward |" in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("scheme", SCHEMES[1:])
@torch.no_grad()
def test_quantised_where_they_are(scheme, small_model):
    """Without a folder: as loading does it, but for the head."""
    pytest.importorskip("torchao" if scheme.startswith("torchao") else "bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "lru_width": 64, "head_dim": 32, "num_gate_blocks": 4}
    model, ids = small_model("griffin", "sdpa", **sizes), torch.randint(0, 29, (1, 12))
    before, size = model(ids).logits, bytes_of(model)
    model = quantise(model, scheme)
    found, expected = model(ids).logits, dequantised(model)(ids).logits
    assert type(model.lm_head) is torch.nn.Linear and bytes_of(model) < 0.6 * size
    assert (found - expected).abs().max() < (4e-2 if scheme.endswith("bytes int8") else 1e-4) * expected.abs().max()
    assert (found - before).abs().max() > 1e-3 * before.abs().max()


def test_what_is_left_out(tmp_path, usual_four_bits):
    """The forward pass beside the fused step, and schemes of QLoRA that were not asked for."""
    pytest.importorskip("bitsandbytes")
    words = [*TINY, "--parts", "decode", "qlora", "--schemes", "nf4", "--no-forward", "--qlora_schemes"]
    small = ["--qlora_size", "tiny", "--qlora_cells", "1x16", "--models", "llama"]
    benchmark_quantised.main([*words, "nf4, constants too", *small, "--output", str(tmp_path / "page")])
    report = json.loads((tmp_path / "page.json").read_text())
    assert [row["scheme"] for row in report["decode"]] == ["nf4"]
    assert [(row["model"], row["scheme"]) for row in report["qlora"]] == [("llama", "nf4, constants too")]
    assert "failed" not in report["qlora"][0]


def test_a_row_that_fails_says_why():
    def measure():
        raise RuntimeError("no such\nkernel")

    assert benchmark_quantised._try({"a": 1}, measure) == {"a": 1, "failed": "RuntimeError: no such kernel"}


def test_text(tmp_path, monkeypatch):
    """Trained in bfloat16 and in emulated float8; then the first run's model in a scheme."""
    pytest.importorskip("torchao")

    run = subprocess.run

    def in_this_process(command, **options):
        if "benchmarks.quantised" not in command:
            return run(command, **options)
        train_emulated(command[command.index("benchmarks.quantised") + 1 :])
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark_quantised.subprocess, "run", in_this_process)
    monkeypatch.setattr("demo.topic_documents", lambda: ([make_text(900, 0), make_text(900, 1)], [make_text(300, 2)]))
    monkeypatch.chdir(benchmark_quantised.ROOT)
    sizes = {"hidden_size": 32, "lru_width": 32, "head_dim": 16, "num_gate_blocks": 4, "vocab_size": 512}
    sizes |= {"num_hidden_layers": 3, "num_attention_heads": 2, "attention_window_size": 8}
    config = tmp_path / "config.json"
    config.write_text(json.dumps(sizes))
    words = ["--device", "cpu", "--parts", "text", "--steps", "1", "--config", str(config), "--seeds", "4", "5"]
    benchmark_quantised.main([*words, "--schemes", "torchao int8", "--output", str(tmp_path / "page")])
    rows = json.loads((tmp_path / "page.json").read_text())["text"]
    assert not any("failed" in row for row in rows), rows
    assert [(row.get("recipe") or row["scheme"], row.get("seed")) for row in rows] == [
        *(("bfloat16", 4), ("bfloat16", 5), ("tensorwise", 4), ("rowwise", 4)),
        *(("float32", None), ("torchao int8", None)),
    ]
    losses = [row.get("eval_loss", row.get("loss")) for row in rows]
    assert len(set(losses)) == 6 and max(losses) - min(losses) < 1  # each rounds otherwise
    assert abs(losses[0] - losses[4]) < 1e-2 and rows[0]["steps"] == 1
    assert (tmp_path / "page.md").read_text().startswith("# Quantised weights and float8\n")
