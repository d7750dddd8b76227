"""The page of an assistant's drafts: a row for each way, whose tokens are those of greedy decoding."""

import _script_helpers  # noqa: F401  (puts scripts/ on the path)
import pytest
import time_assistant

from modeling_griffin.decode.speculative.verify import VerifyStep


SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}


@pytest.fixture
def small(monkeypatch):
    fields = {**time_assistant.BYTES, **SMALL, "num_gate_blocks": 2}
    values = {"TARGET": fields, "ASSISTANT": fields, "PROMPT": 5, "NEW": 6, "PROMPTS": 2, "LENGTH": 16, "ROUNDS": 1}
    for name, value in values.items():
        monkeypatch.setattr(time_assistant, name, value)


def test_the_page(small, tmp_path):
    """Trained alike, both models are the same one, and every draft is right."""
    read = VerifyStep.read
    time_assistant.main(["--steps", "2", "--output", str(tmp_path / "page")])
    rows = [line.split(" | ") for line in (tmp_path / "page.md").read_text().splitlines() if line.startswith("| ")][1:]
    assert [row[0][2:] for row in rows] == [name for name, *_ in time_assistant.WAYS] and VerifyStep.read is read
    assert {row[0]: row[3].rstrip(" |") for row in rows}["| 4 drafts"] == "5.00"


def test_other_tokens_are_refused(small, monkeypatch):
    monkeypatch.setattr(VerifyStep, "read", lambda verify, token, drafts: [7])
    with pytest.raises(RuntimeError, match="4 drafts: prompt 0 has other tokens than greedy decoding"):
        time_assistant.main(["--steps", "2"])
