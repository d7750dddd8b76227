"""What is shipped to the Hub is harmless to import, and imports nothing that a user of the model may lack."""

import ast
import contextlib
import importlib
import os
import shutil
import sys
import types
from pathlib import Path

from transformers.activations import ACT2FN
from transformers.dynamic_module_utils import get_imports
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING

from modeling_griffin.saving.save import AUTO_MAP, code_files


CODE = sorted(path.name for path in code_files())
OUR_STYLES = {"griffin_first_axis", "griffin_shared_head"}
SCRIPTS = sorted((Path(__file__).parents[2] / "scripts").rglob("*.py"))


def test_what_the_shipped_files_import():
    """The loader refuses files whose imports are missing: PyTorch, Transformers and what these bring, and no more."""
    installed = {"torch", "transformers", "huggingface_hub", "safetensors"}
    for path in code_files():
        assert set(get_imports(path)) - set(sys.stdlib_module_names) <= installed, path.name
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            # What the loader does not follow: `from . import x`, `from ..x import y`, `from .a.b import c`.
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level == 1 and node.module and "." not in node.module, f"{path.name}: {ast.unparse(node)}"
                assert f"{node.module}.py" in CODE, f"{path.name}: {ast.unparse(node)}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                assert "modeling_griffin" not in ast.unparse(node), f"{path.name}: {ast.unparse(node)}"


def test_what_the_shipped_files_name():
    """No code from text, no pickles, no processes, no sockets, no environment."""
    forbidden = {
        "eval",
        "exec",
        "__import__",
        "environ",
        "getenv",
        "putenv",
        "pickle",
        "subprocess",
        "socket",
        "urllib",
    }
    forbidden |= {"system", "popen", "requests", "httpx", "marshal", "ctypes"}
    for path in code_files():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "name", None)}
            if isinstance(node, ast.Attribute) and node.attr == "eval":  # model.eval()
                continue
            assert not names & forbidden, f"{path.name}, line {node.lineno}"
            if isinstance(node, ast.Attribute):
                assert ast.unparse(node) not in ("torch.load", "torch.save"), f"{path.name}, line {node.lineno}"


def test_the_scripts_write_and_read_weights_in_safetensors_only():
    """Two exceptions, without running what they hold: DeepMind's own checkpoints, which are pickles of tensors, and the
    state in which a long run waits to go on, optimizer and all, which nobody is given."""
    exceptions = {"convert_recurrent_gemma.py", "long_runs.py"}
    found = {"from_pretrained": 0, "torch.load": 0}
    for path in SCRIPTS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), path.name
            if not isinstance(node, ast.Call):
                continue
            name, keywords = (
                ast.unparse(node.func),
                {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords},
            )
            assert name != "torch.save" or path.name == "long_runs.py"
            assert name != "numpy.save" and keywords.get("allow_pickle") != "True", path.name
            assert keywords.get("trust_remote_code") != "True", path.name
            if name.endswith(".from_pretrained") and not name.endswith(
                ("Config.from_pretrained", "Tokenizer.from_pretrained")
            ):
                found["from_pretrained"] += 1
                assert keywords.get("use_safetensors") == "True", f"{path.name}, line {node.lineno}"
            if name == "torch.load":
                found["torch.load"] += 1
                assert keywords["weights_only"] == "True" and path.name in exceptions
    assert found["from_pretrained"] >= 5 and found["torch.load"] == 2


EVENTS = []
LISTENING = []
sys.addaudithook(lambda event, arguments: EVENTS.append((event, arguments)) if LISTENING else None)


def attributes_of_others() -> dict[tuple[str, str], int]:
    """(class or module, attribute) of PyTorch and Transformers as far as they are imported -> what it is."""
    found = {}
    for name, module in list(sys.modules.items()):
        if module is None or name.split(".")[0] not in ("torch", "transformers"):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType):
                found[name, attribute] = id(value)
            if isinstance(value, type) and value.__module__ == name:
                members = vars(value).items()
                found |= {(f"{name}.{attribute}", key): id(member) for key, member in members if callable(member)}
    return found


def test_importing_the_shipped_files_does_nothing_else(tmp_path, monkeypatch):
    """No file but Python's own is opened, none written; no process, no connection, no change of the environment.

    Nothing of PyTorch and Transformers is replaced, and of their registries two parallel styles are the only news.
    """
    package = tmp_path / "shipped_copy"
    package.mkdir()
    for path in code_files():
        shutil.copyfile(path, package / path.name)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401  what it does when it is imported is not ours to say
    environment, before = dict(os.environ), attributes_of_others()
    registries = (CONFIG_MAPPING, MODEL_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, ALL_ATTENTION_FUNCTIONS, ACT2FN)
    registered = [set(registry.keys()) for registry in registries]
    styles = dict(ALL_PARALLEL_STYLES.items())
    for name in OUR_STYLES:
        monkeypatch.setitem(ALL_PARALLEL_STYLES, name, "of the package")
    EVENTS.clear()
    LISTENING.append(True)
    try:
        for module in sorted({reference.split(".")[0] for reference in AUTO_MAP.values()}):
            importlib.import_module(f"shipped_copy.{module}")
    finally:
        LISTENING.clear()
    after = attributes_of_others()
    assert {name for name, value in before.items() if after.get(name) != value} == set() and len(before) > 10_000
    assert [set(registry.keys()) for registry in registries] == registered
    changed = {name for name, style in ALL_PARALLEL_STYLES.items() if styles.get(name) is not style}
    assert changed == OUR_STYLES
    opened = [str(arguments[0]) for event, arguments in EVENTS if event == "open"]
    assert [name for name in opened if not name.endswith((".py", ".pyc", ".so"))] == []
    watched = ("socket.", "subprocess.", "os.system", "os.remove", "os.rename", "os.mkdir", "os.putenv", "os.unsetenv")
    assert [event for event, _ in EVENTS if event.startswith(watched)] == []
    assert dict(os.environ) == environment
