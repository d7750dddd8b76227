"""Memory and speed over calls of all kinds, one after another; the script has the page of thousands."""

import _script_helpers  # noqa: F401  # puts scripts/ on the path
import time_calls


def test_memory_and_speed_stay_flat():
    """2.0 MiB more over 2,000 calls, and as many tensors."""
    notes = time_calls.run_calls(120, warm_up=60)
    assert len(set(notes["tensors"])) == 1
    assert notes["bytes"][-1] - notes["bytes"][0] < 8 * 2**20
    first, last = time_calls.first_and_last(notes, 60)
    assert last < 1.3 * first


def test_what_is_kept_is_found(monkeypatch):
    """Of a call that leaves a tensor behind, and takes longer each time."""
    kept = []

    def leaking(model):
        def call(ids, new):
            kept.append(ids.clone())
            for _ in range(2000 * len(kept)):
                pass

        return {"leaking": call}

    monkeypatch.setattr(time_calls, "kinds_of_calls", leaking)
    notes = time_calls.run_calls(40, warm_up=2)
    first, last = time_calls.first_and_last(notes, 20)
    assert notes["tensors"] == [notes["tensors"][0] + 20 * half for half in range(3)] and last > 1.3 * first


def test_the_page(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(time_calls, "LOOKS", 3)
    time_calls.main(["--calls", "24", "--warm_up", "0", "--output", str(tmp_path / "page")])
    page = (tmp_path / "page.md").read_text()
    assert (
        "24 calls behind 0 to warm up" in page
        and "435 modules and 484 parameters" in page
        and page in capsys.readouterr().out
    )
