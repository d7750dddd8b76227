"""whole_files.py: an older file stays whole where a new one cannot be written, and OUTPUT may have a dot."""

import re
import resource

import pytest
import spoken
from _script_helpers import ROOT
from plot_lambda_init import main as plot_lambda
from whole_files import in_one_step, with_ending, write_whole


@pytest.fixture
def small_files():
    """No file of more than 1,000 bytes can be written, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_older_file(tmp_path, small_files):
    path = tmp_path / "page.md"
    write_whole(path, "older, by a person")
    with pytest.raises(OSError, match=rf"an older file is as it was: '{re.escape(str(path))}'"):
        write_whole(path, 2000 * "x")
    assert path.read_text() == "older, by a person" and [*tmp_path.iterdir()] == [path]
    with pytest.raises(SystemExit, match="report-lambda: error: .*page.md'$"), spoken.writing("report-lambda"):
        write_whole(path, 2000 * "x")


def test_what_is_raised_on_the_way_stays_what_it_is(tmp_path):
    path = tmp_path / "page.md"
    with pytest.raises(FileNotFoundError, match="nowhere"), in_one_step(path):
        (tmp_path / "nowhere").read_text()
    with pytest.raises(OSError, match="^encoder error$"), in_one_step(path):
        raise OSError("encoder error")
    with pytest.raises(KeyError), in_one_step(path):
        raise KeyError
    assert not [*tmp_path.iterdir()]


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "link.md").symlink_to(tmp_path / "page.md")
    write_whole(tmp_path / "link.md", "é")
    assert (tmp_path / "link.md").is_symlink() and (tmp_path / "page.md").read_text(encoding="utf-8") == "é"


def test_outputs_whose_names_have_a_dot_are_two(tmp_path):
    assert with_ending(tmp_path / "c0.5", ".md").name == "c0.5.md"
    plot_lambda(["--output", str(tmp_path / "c0.5")])
    assert {path.name for path in tmp_path.iterdir()} == {"c0.5.md", "c0.5.png", "c0.5.svg"}


def test_no_script_takes_a_dot_in_output_for_a_suffix():
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "scripts").glob("*.py")}
    assert not [
        name for name, text in scripts.items() if re.search(r"output\)?\.with_suffix|output\)?\S*\.write_text", text)
    ]
