"""README, CONTRIBUTING and docs/: every snippet runs, every command is one that its script takes, every path is there.

A page is read from the top: its Python blocks run in one namespace, its commands between them, in a folder that holds
what the pages speak of (a small model in build/demo/model, texts in data/). Trainings are cut to a step; of launchers
and long commands the arguments are read. A block that cannot run here says so in a comment above it, `<!-- gpu -->` or
`<!-- not run: reason -->`, and is counted in MARKED.
"""

import argparse
import importlib.util
import json
import re
import runpy
import sys
from collections import Counter

import command_line
import pytest
import torch
from _docs import (
    COMMENT,
    PAGES,
    ROOT,
    Block,
    anchors_of,
    blocks_of,
    commands_of,
    links_of,
    name_of,
    paths_of,
    prose_of,
)
from tokenizers import ByteLevelBPETokenizer
from transformers import HfArgumentParser, PreTrainedTokenizerFast

import modeling_griffin
from modeling_griffin import GriffinConfig, GriffinForCausalLM


# How many blocks of a page do not run on a machine without a GPU: a new one is a decision, and is written down here.
MARKED = {
    "README.md": 1,
    "docs/distributed.md": 1,
    "docs/evaluation.md": 2,
    "docs/export.md": 3,
    "docs/fine_tuning.md": 1,
    "docs/hub.md": 3,
    "docs/lambda.md": 2,
    "docs/long_context.md": 1,
    "docs/performance.md": 1,
    "docs/pretraining.md": 1,
    "docs/quantisation.md": 2,
    "docs/recurrent_gemma.md": 1,
    "docs/sequence_parallel.md": 3,
    "docs/vllm.md": 2,
}
CONFIGURATION = ROOT / "configuration" / "README.md"
RESULTS = sorted((ROOT / "results").rglob("*.md"))
DESIGNS = sorted((ROOT / "docs" / "designs").glob("*.md"))
HANDS_ON = {"serve.py"}  # their further options to another program
RUN = {  # cheap; of the others, and of launchers, arguments are read
    "generate.py",
    "evaluate_text.py",
    "convert_recurrent_gemma.py",
    "plan_memory.py",
    "plot_lambda_init.py",
    "push_to_hub.py",
    "train.py",
}
CUT = {  # what is added, so that it ends soon
    "train.py": "--max_steps 1 --sequence_length 16 --per_device_train_batch_size 1 --tokenizer_vocab_size 300",
}
NOT_OURS = {
    "git",
    "cd",
    "curl",
    "lm_eval",
    "transformers",
    "trl",
    "vllm",
}  # commands whose options are not for us to check
WIDTH = 160  # of prose, without the comments that say where a figure is from
STANDS_FOR_ANY = re.compile(r"NAME|FILE|_$")  # a name with a gap in it

TEXT = """The "if" statement is used for conditional execution. It selects exactly one of the suites by evaluating
the expressions one by one until one is found to be true. The list of names in a class is kept in a dictionary.
"""
TRANSFORMERS_ARGUMENTS = HfArgumentParser.parse_args_into_dataclasses
ARGUMENTS = argparse.ArgumentParser.parse_args
KNOWN_ARGUMENTS = argparse.ArgumentParser.parse_known_args


class Parsed(BaseException):
    """The script has read its arguments without complaint; a BaseException, so that no script catches it."""


def make_tokenizer(folder) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 384 entries, fitted to TEXT."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT], vocab_size=384, special_tokens=["<s>", "</s>", "<pad>"], show_progress=False)
    bpe.save(str(folder / "bpe.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "bpe.json"), **names)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with what the pages speak of: the repository's data and scripts, a model, texts."""
    place = tmp_path_factory.mktemp("reader")
    for name in ("configuration", "scripts"):
        (place / name).symlink_to(ROOT / name)
    (place / "data" / "text").mkdir(parents=True)
    for name in ("text/a.txt", "text/b.txt", "held_out.txt"):
        (place / "data" / name).write_text(TEXT * 3)
    records = [{"text": TEXT[start:]} for start in range(0, 160, 20)]
    (place / "data" / "documents.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tokenizer = make_tokenizer(place)
    torch.manual_seed(0)
    config = GriffinConfig(
        vocab_size=384,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_gate_blocks=4,
        attention_window_size=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    for model in (GriffinForCausalLM(config), tokenizer):
        model.save_pretrained(place / "build" / "demo" / "model")
    return place


@pytest.fixture
def reader(place, monkeypatch, usual_four_bits):
    """The reader's folder as the current one; the initialisations of Λ are afterwards those of before."""
    monkeypatch.chdir(place)
    before = dict(modeling_griffin.LAMBDA_INITS)
    yield place
    modeling_griffin.LAMBDA_INITS.clear()
    modeling_griffin.LAMBDA_INITS.update(before)


def runs_here(block: Block) -> bool:
    return not block.mark.startswith("not run") and (block.mark != "gpu" or torch.cuda.is_available())


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_page(page, reader, monkeypatch):
    """From the top: Python runs, cheap commands run, of the others the arguments are read by their own parser."""
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        where = f"{name_of(page)}, line {block.line}"
        if block.language == "python":
            code = compile("\n" * block.line + block.text, name_of(page), "exec")
            if runs_here(block):
                exec(code, namespace)
        elif block.language == "bash":
            for words in commands_of(block):
                check_command(words, where, run_cheap=runs_here(block), monkeypatch=monkeypatch)
        else:
            assert block.language in ("", "yaml"), f"{where}: a block of {block.language!r} is not checked by anything"


def check_command(words: list[str], where: str, run_cheap: bool, monkeypatch) -> None:
    """One line of a shell block: the program is known, its files are there, its options are taken."""
    program = words[0].rpartition("/")[2]
    if program == "accelerate" and words[1] == "launch":
        (start,) = [index for index, word in enumerate(words) if word.startswith("scripts/")]
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), where
        check_script(words[start:], where, False, monkeypatch)
    elif program == "torchrun":
        (start,) = [index for index, word in enumerate(words) if word.startswith("scripts/")]
        check_script(words[start:], where, False, monkeypatch)
    elif program == "accelerate":
        assert words[1] in ("estimate-memory", "config"), where
    elif program == "python" and words[1] == "-m":
        assert importlib.util.find_spec(words[2]), f"{where}: no module {words[2]}"
        if run_cheap and words[2].startswith("modeling_griffin."):
            monkeypatch.setattr(sys, "argv", words[2:])
            runpy.run_module(words[2], run_name="__main__")
    elif program == "python" and words[1].startswith("scripts/"):
        check_script(words[1:], where, run_cheap, monkeypatch)
    elif program == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M), f"{where}: make {words[1]}"
    elif program == "pip":
        check_extras(words, where)
    else:
        assert program in NOT_OURS, f"{where}: {program}"
        for option in ("--config", "--config_file"):
            assert option not in words or (ROOT / words[words.index(option) + 1]).is_file(), where


def check_script(words: list[str], where: str, run: bool, monkeypatch) -> None:
    """Runs scripts/NAME.py with these arguments, to its end if it is cheap or can be cut short, else until it has
    read them."""
    path = ROOT / words[0]
    assert path.is_file(), f"{where}: {words[0]} is not there"
    if run and path.name in RUN:
        monkeypatch.setattr(sys, "argv", [*words, *CUT.get(path.name, "").split()])
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as end:
            assert end.code in (None, 0), f"{where}: {end}"
        return
    monkeypatch.setattr(sys, "argv", words)

    def stop_after(read):
        def parse(*args, **kwargs):
            read(*args, **kwargs)
            raise Parsed

        return parse

    with monkeypatch.context() as patch:
        patch.setattr(command_line, "device", str)  # a page's machine may have a GPU where this one has none
        patch.setattr(argparse.ArgumentParser, "parse_args", stop_after(ARGUMENTS))
        if path.name in HANDS_ON:
            patch.setattr(argparse.ArgumentParser, "parse_known_args", stop_after(KNOWN_ARGUMENTS))
        patch.setattr(HfArgumentParser, "parse_args_into_dataclasses", stop_after(TRANSFORMERS_ARGUMENTS))
        with pytest.raises(Parsed):
            runpy.run_path(str(path), run_name="__main__")


def check_extras(words: list[str], where: str) -> None:
    project = (ROOT / "pyproject.toml").read_text()
    for extra in re.findall(r"^\.\[(.*)\]$", "\n".join(words), flags=re.M):
        for name in extra.split(","):
            assert re.search(rf"^{name} = \[", project, flags=re.M), f"{where}: no extra {name}"


def test_what_does_not_run():
    """Each block that does not run here has its reason, and their number is the one written down."""
    marked = [block for page in PAGES for block in blocks_of(page) if block.mark and block.language]
    for block in marked:
        good = block.mark == "gpu" or re.fullmatch(r"not run: \S.*", block.mark)
        assert good, f"{name_of(block.page)}, line {block.line}: {block.mark!r} is neither `gpu` nor `not run: reason`"
        print(f"{name_of(block.page)}:{block.line}: {block.mark}")
    assert dict(Counter(name_of(block.page) for block in marked)) == MARKED


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_width(page):
    """A line of prose is a sentence or a clause, so that a changed figure is a changed line."""
    prose = ((line, COMMENT.sub("", text).rstrip()) for line, text in prose_of(page))
    wide = [line for line, text in prose if len(text) > WIDTH and not text.startswith(("|", "!["))]
    assert not wide, f"{name_of(page)}: wider than {WIDTH} are the lines {wide}"


@pytest.mark.parametrize("page", [*PAGES, CONFIGURATION, *RESULTS, *DESIGNS], ids=name_of)
def test_links(page):
    """Links lead to files and headings that are there."""
    for file, anchor in links_of(page):
        assert file.exists(), f"{name_of(page)}: a link to {file}, which is not there"
        assert not anchor or anchor in anchors_of(file), f"{name_of(page)}: {file.name} has no heading #{anchor}"


@pytest.mark.parametrize("page", [*PAGES, CONFIGURATION], ids=name_of)
def test_paths(page):
    """So are the paths that a page names without a link. (Pages of results/ name those of their day.)"""
    for path in paths_of(page):
        assert STANDS_FOR_ANY.search(path) or (ROOT / path).exists(), f"{name_of(page)}: {path} is not there"


def test_every_result_is_in_the_index():
    """results/README.md links every page."""
    linked = {file for file, _ in links_of(ROOT / "results" / "README.md")}
    missing = [name_of(page) for page in RESULTS if page.name != "README.md" and page.resolve() not in linked]
    assert not missing, f"results/README.md has no link to {missing}"


def test_every_page_is_on_the_map():
    """README links every page of docs/ and every notebook, is one page long, and has at most 12 KB."""
    readme = ROOT / "README.md"
    linked = {file for file, _ in links_of(readme)}
    missing = [path.name for path in [*PAGES[1:], *(ROOT / "examples").glob("*.ipynb")] if path.resolve() not in linked]
    assert not missing, f"README has no link to {missing}"
    assert len(readme.read_text().splitlines()) <= 200 and readme.stat().st_size <= 12_000
