"""The console command: its help answers at once and is true, and names of ready-made files are found."""

import argparse
import ast
import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import command
import command_line
import presets
import pytest
import spoken
from training.report import next_steps

from modeling_griffin import GriffinConfig


ROOT = Path(__file__).resolve().parents[2]
TORCHLESS = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'scripts'); import command; command.main({!r})"


def run(words: list[str]) -> tuple[str, float]:
    """What `griffin words` prints, in a process that cannot import PyTorch, and the seconds that it took."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", TORCHLESS.format(words)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, time.perf_counter() - start


def test_help_without_pytorch():
    printed, _ = run(["--help"])
    for verb, (script, what) in command.VERBS.items():
        assert verb in printed and what in printed
        assert (ROOT / "scripts" / script).exists()
    assert run(["train", "--help"])[0].startswith("usage: griffin train")
    assert "griffin-100m" in run(["presets"])[0] and "own_text" in run(["presets"])[0]


@pytest.mark.parametrize("verb", command.VERBS)
def test_stored_help_is_the_scripts_own(verb, capsys, monkeypatch):
    """`python scripts/command.py --write-help` makes it anew."""
    script = command.VERBS[verb][0]
    monkeypatch.setenv("COLUMNS", command.WIDTH)
    monkeypatch.setattr(sys, "argv", [script, "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(script.removesuffix(".py")).main()
    assert end.value.code == 0
    own = command.in_verbs(capsys.readouterr().out, verb)
    assert command.help_file(verb).read_text(encoding="utf-8").split() == own.split()


@pytest.mark.parametrize("verb", command.VERBS)
def test_every_option_says_what_it_does(verb):
    """On its own line, or on the next ones; and its default, unless one has to give it."""
    text = command.help_file(verb).read_text(encoding="utf-8")
    usage, _, rest = text.partition("\n\n")
    for option in re.findall(r"^  --.*(?:\n {8,}\S.*)*", rest, flags=re.M):
        assert re.search(r"\S  +\S", option) or "\n" in option, option
        name = option.split()[0]
        is_required = "(required)" in option or re.search(rf"(?<!\[){name} ", usage)
        assert is_required or re.search(r"default|unset: ", option), option


@pytest.mark.parametrize("verb", command.VERBS)
def test_help_is_in_words_of_the_command(verb):
    text = command.help_file(verb).read_text(encoding="utf-8")
    assert text.startswith(f"usage: griffin {verb} ") and not re.search(r"\b\w+\.py\b", text)


@pytest.mark.parametrize("verb", sorted(set(command.VERBS) - {"demo"}))  # which reads its text first
def test_a_wrong_option_ends_in_one_line(verb, capsys, monkeypatch):
    """By the name that was called, without the usage, and with argparse's code."""
    script = command.VERBS[verb][0]
    for name, called in ((verb, f"griffin {verb}"), (None, script)):
        monkeypatch.setattr(spoken, "verb", name)
        monkeypatch.setattr(sys, "argv", [script, "--no_such_option"])
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script.removesuffix(".py")).main()
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"{called}: error: ")


BENCHMARKS = [verb for verb in command.VERBS if verb.startswith("benchmark") and verb != "benchmark-small-steps"]


@pytest.mark.parametrize("verb", [*BENCHMARKS, "plot-lambda"])  # but the one that asks for a GPU first
def test_an_output_that_cannot_be_written_is_said_before_the_work(verb, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(spoken, "verb", verb)
    few = ["--processes", "1"] if verb == "benchmark-distributed" else []
    monkeypatch.setattr(sys, "argv", [verb, "--output", str(tmp_path / "file" / "x"), *few])
    with pytest.raises(SystemExit):
        importlib.import_module(command.VERBS[verb][0].removesuffix(".py")).main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"griffin {verb}: error: folder of --output = ") and "file is a file" in line


def test_a_server_without_its_extra(tmp_path, monkeypatch):
    """As `griffin` says it, before Transformers raises an error of its own."""
    monkeypatch.setattr(spoken, "verb", None)
    for name in ("fastapi", "openai", "uvicorn"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            patch.setattr(sys, "argv", [])
            with pytest.raises(
                SystemExit, match=rf"griffin serve: error: {name} .*pip install 'modeling-griffin\[serve\]'"
            ):
                command.main(["serve", str(tmp_path)])


def test_what_next_is_said_in_the_words_of_the_call(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(spoken, "verb", None)
    steps = next_steps("build/a run", "data/x")
    assert "python scripts/generate.py 'build/a run' --prompt " in steps
    assert "python scripts/push_to_hub.py 'build/a run' NAME" in steps and "griffin" not in steps
    monkeypatch.setattr(spoken, "verb", "train")
    steps = next_steps("build/a run", "data/x")
    assert "griffin evaluate 'build/a run' data/x" in steps and "griffin train finetune " in steps
    assert ".py" not in steps


@pytest.mark.parametrize("error, code", [(ValueError("a\n  b"), 2), (RuntimeError("a b"), 1)])
def test_an_end_in_one_line(error, code, capsys, monkeypatch):
    """2 for what was given and cannot be, as argparse has it; 1 for what went wrong."""
    monkeypatch.setattr(spoken, "verb", "train")
    with pytest.raises(SystemExit, match="^griffin train: error: a b$") as end:
        spoken.stop("train.py", error)
    assert end.value.code == code and capsys.readouterr().err == "griffin train: error: a b\n"


@pytest.mark.parametrize("path", sorted((ROOT / "scripts").glob("*.py")), ids=lambda path: path.stem)
def test_no_message_begins_with_a_file(path):
    """But with the name that was called: `spoken` knows it."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    assert not [text for text in texts if re.match(r"\w+\.py: ", text)]


def test_an_interrupt_is_no_traceback(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(spoken, "verb", None)
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "generate.py").write_text("raise KeyboardInterrupt")
    with pytest.raises(SystemExit) as end:
        command.main(["generate", "m"])
    assert end.value.code == 130 and capsys.readouterr().err == "\ngriffin generate: interrupted\n"


def test_a_terminal_without_greek_letters():
    words = [sys.executable, str(ROOT / "scripts" / "command.py"), "--help"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "what each initialisation of ? means" in done.stdout, done.stderr


@pytest.mark.parametrize("gone", [True, False])
def test_who_reads_the_output_may_leave(tmp_path, gone):
    """As `griffin generate ... | head` does; another pipe that breaks is a fault."""
    own = "import time\nwhile True: print('word', flush=True); time.sleep(0.01)"
    (tmp_path / "generate.py").write_text(own if gone else "print('word', flush=True)\nraise BrokenPipeError")
    code = f"import command, pathlib; command.HERE = pathlib.Path({str(tmp_path)!r}); command.main(['generate'])"
    words = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout.readline() == "word\n"
        if gone:
            process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, "Traceback" in said) == ((141, False) if gone else (1, True)), said


def test_a_device_that_is_not_here():
    assert command_line.device("cpu") == "cpu"
    for name in ("nope", "cpu:1", "cuda:99", "meta"):
        with pytest.raises(argparse.ArgumentTypeError, match=f"'{name}' is not here: allowed is cpu"):
            command_line.device(name)


def test_what_an_extra_brings_is_said(monkeypatch, tmp_path):
    """Where the wheel was installed alone."""
    monkeypatch.setattr(spoken, "verb", None)  # and as it was, afterwards
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    (tmp_path / "train.py").write_text("import psutil.nothing")
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(SystemExit, match=r"griffin train: error: psutil .*pip install 'modeling-griffin\[train\]'"):
        command.main(["train", "own_text"])
    (tmp_path / "train.py").write_text("import a_fault_of_our_own")
    with pytest.raises(ModuleNotFoundError, match="a_fault_of_our_own"):
        command.main(["train", "own_text"])


def test_a_program_is_named_as_it_was_called(monkeypatch):
    monkeypatch.setattr(spoken, "verb", None)
    for script in ("scripts/train.py", str(ROOT / "scripts/train.py")):
        monkeypatch.setattr(sys, "argv", [script])
        assert spoken.program() == ["python", "scripts/train.py"]
    monkeypatch.setattr(spoken, "verb", "train")
    assert spoken.program() == ["griffin", "train"]


def test_presets_are_readable(capsys):
    """Columns for people, each model with its parameters, each training with what it is for."""
    command.main(["presets"])
    printed = capsys.readouterr().out
    assert "|" not in printed and re.search(r"^  tiny +1,432,128 ", printed, flags=re.M)
    assert all(f"\n  {name} " in printed for name in presets.preset_names("training"))
    assert re.search(r"own_text_cpu +Your own text on a CPU.*\n.*110 seconds", printed)


def test_an_unknown_command_names_those_that_there_are():
    with pytest.raises(SystemExit, match="'trian' is no command: allowed are train, generate"):
        command.main(["trian"])
    with pytest.raises(SystemExit, match="presets takes no arguments, not tiny"):
        command.main(["presets", "tiny"])


@pytest.mark.parametrize("name", ["tiny", "tiny.json", "model/tiny.json", "configuration/model/tiny.json"])
def test_presets_are_found_from_anywhere(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(presets.find_preset(name, "model")).samefile(ROOT / "configuration" / "model" / "tiny.json")
    (tmp_path / "tiny").write_text("mine")
    assert presets.find_preset("tiny", "model") == "tiny"
    assert presets.find_preset("nowhere", "model") == "nowhere"


def test_configurations_by_name():
    config = GriffinConfig.from_preset("griffin-100m", lambda_init="recurrent_gemma")
    assert (config.hidden_size, config.lru_width, config.lambda_init) == (768, 1024, "recurrent_gemma")
    with pytest.raises(ValueError, match="preset = 'griffin-100': allowed are griffin-100m, griffin-14b"):
        GriffinConfig.from_preset("griffin-100")
    assert set(presets.preset_names("model")) >= {"tiny", "hawk-7b", "recurrentgemma-9b"}
