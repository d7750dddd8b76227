"""The package as it is shipped: what goes to a model repository, imports, public names, the wheel."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import modeling_griffin
from modeling_griffin import slots
from modeling_griffin.saving.save import code_files


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_griffin"
FILES = sorted(path.name for path in PACKAGE.glob("*.py"))
# What goes to a model repository, by name: a file that is added here goes to every one of them.
SHIPPED = sorted(
    f"{name}.py"
    for name in (
        *("configuration_griffin", "modeling_griffin", "slots", "gpu", "documents", "padding", "cache_layers"),
        *("cache_name", "lambda_init", "rg_lru", "rg_lru_scan", "rg_lru_scan_reference", "rg_lru_scan_torch"),
        *("rg_lru_scan_triton", "rg_lru_scan_triton_around", "rg_lru_scan_triton_kernels"),
        *("rg_lru_scan_triton_math", "causal_conv1d", "local_attention", "elementwise"),
        *("causal_lm_loss", "rollback", "tensor_parallel"),
    )
)
PUBLIC = {
    "GriffinConfig",
    "GriffinPreTrainedModel",
    "GriffinModel",
    "GriffinForCausalLM",
    "GriffinForSequenceClassification",
    "GriffinForTokenClassification",
    "rg_lru_scan",
    "LAMBDA_INITS",
    "LORA_TARGETS",
    "register_lambda_init",
    "decay_parameter_names",
    "keep_lambda_float32",
    "GeneratedToken",
    "GenerationRequest",
    "GenerationResult",
    "GenerationState",
}


def imports_of(name):
    """(node, guarded): guarded inside `try`, or under an `if` that asks whether a package is available."""
    found = []

    def visit(node, guarded):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append((node, guarded))
        if isinstance(node, ast.Try) or (isinstance(node, ast.If) and "available" in ast.unparse(node.test)):
            guarded = True
        for child in ast.iter_child_nodes(node):
            visit(child, guarded)

    visit(ast.parse((PACKAGE / name).read_text()), False)
    return found


def test_public_names():
    assert PUBLIC <= set(modeling_griffin.__all__)
    assert all(hasattr(modeling_griffin, name) for name in modeling_griffin.__all__)


def test_what_lies_flat_is_what_ships_and_is_little():
    assert [name for name in FILES if name != "__init__.py"] == SHIPPED == [path.name for path in code_files()]
    assert len(SHIPPED) <= 25
    assert sum(len((PACKAGE / name).read_text().splitlines()) for name in SHIPPED) <= 4000


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_files_import_as_the_hub_can_follow(name):
    """`from .name import x` of a file that exists, nothing relative otherwise, and the package never by its name."""
    for node, guarded in imports_of(name):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and node.module and "." not in node.module, ast.unparse(node)
            assert f"{node.module}.py" in SHIPPED, ast.unparse(node)
            assert all(alias.name != "*" for alias in node.names), ast.unparse(node)
            continue
        for module in modules:
            assert module.split(".")[0] != "modeling_griffin", ast.unparse(node)
            assert module.split(".")[0] != "triton" or guarded, ast.unparse(node)
            assert module != "__future__", "postponed annotations turn config_class into a string"


@pytest.mark.parametrize("name", SHIPPED)
def test_no_text_looks_like_an_import(name):
    """The Hub's loader reads lines, not syntax: a line of a docstring counts."""
    lines = (PACKAGE / name).read_text().splitlines()
    real = {node.lineno for node, _ in imports_of(name)}
    for number, line in enumerate(lines, 1):
        if re.match(r"\s*(from\s+\.\S+\s+import\b|import\s+\.)", line):
            assert number in real, f"{name}:{number}: {line}"


def test_a_folder_of_the_packages_name_is_not_the_package(tmp_path, monkeypatch):
    """A clone of a model repository, perhaps, in the folder where Python starts: importing it would bring nothing."""
    assert "import modeling_griffin" in slots._remedy()
    (tmp_path / "clone_of_a_model").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(slots, "PACKAGE", "clone_of_a_model")
    assert slots._remedy().startswith("`pip install")


def run(arguments, **kwargs):
    result = subprocess.run(arguments, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{arguments}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


# As if not installed, neither found nor importable: what a wheel alone has to do with.
WITHOUT_EXTRAS = """
import importlib.util, sys
extras = ["triton", "scipy", "matplotlib", "datasets", "accelerate", "peft", "trl", "psutil", "bitsandbytes", "torchao"]
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *package: None if name.split(".")[0] in extras else find_spec(name, *package)
sys.modules |= dict.fromkeys(extras)
"""
IMPORT = f"""{WITHOUT_EXTRAS}
import torch
import modeling_griffin
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("griffin", vocab_size=8, hidden_size=32, num_hidden_layers=3, num_gate_blocks=2)
assert type(AutoModelForCausalLM.from_config(config)) is modeling_griffin.GriffinForCausalLM
print(modeling_griffin.__version__, modeling_griffin.__file__)
"""


def what_a_wheel_holds() -> set[str]:
    """The package with its folders, the scripts and the ready-made configurations under names of their own."""
    names = {"scripts": "griffin_scripts", "configuration": "griffin_configuration"}
    kinds = {"modeling_griffin": (".py", ".md", ".typed"), "scripts": (".py", ".txt")}
    kinds["configuration"] = (".json", ".yaml", ".md")
    return {
        str(Path(names.get(folder, folder)) / path.relative_to(ROOT / folder))
        for folder, suffixes in kinds.items()
        for path in (ROOT / folder).rglob("*")
        if path.suffix in suffixes and "__pycache__" not in path.parts
    }


def test_wheel(tmp_path):
    """Complete and no more; from a fresh folder without the repository it imports, trains and generates."""
    copy = tmp_path / "source"
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        copy.mkdir(exist_ok=True)
        (copy / name).write_text((ROOT / name).read_text())
    for folder in ("modeling_griffin", "scripts", "configuration", "tests"):  # all that could slip in
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run([*build, str(tmp_path), str(copy)])
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == what_a_wheel_holds()
    (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
    said = zipfile.ZipFile(wheel).read(metadata).decode()
    assert re.search(r"^License-Expression: Apache-2.0$", said, flags=re.M)
    assert {"LICENSE", "NOTICE"} <= {name.rpartition("/")[2] for name in names}

    target = tmp_path / "installed"
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)])
    environment = os.environ | {"PYTHONPATH": str(target) + os.pathsep + _other_paths(), "PYTHONSAFEPATH": "1"}
    printed = run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment)
    version, file = printed.split()[-2:]
    assert Path(file).parent == target / "modeling_griffin"
    assert re.search(rf"^Version: {re.escape(version)}$", said, flags=re.M)

    (tmp_path / "text.txt").write_text("The list of names in a class is kept in a dictionary. " * 200)
    griffin = [sys.executable, str(target / "bin" / "griffin")]
    train = ["train", "own_text_cpu", "--train_data", "text.txt", "--output_dir", "run", "--max_steps", "1"]
    small = ["--sequence_length", "32", "--tokenizer_vocab_size", "300", "--use_cpu", "true"]
    assert "griffin generate run" in run([*griffin, *train, *small], cwd=tmp_path, env=environment)
    generate = [*griffin, "generate", "run", "--prompt", "The list", "--max_new_tokens", "2"]
    assert run(generate, cwd=tmp_path, env=environment).startswith("The list")
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"    griffin {' '.join(train)} {' '.join(small)}\n" in card and "\n# model\n" not in card

    # Beside nothing but what the wheel itself asks for: sitecustomize runs before the command.
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    environment["PYTHONPATH"] = f"{tmp_path / 'bare'}{os.pathsep}{environment['PYTHONPATH']}"
    assert run(generate, cwd=tmp_path, env=environment).startswith("The list")
    refused = subprocess.run([*griffin, *train], capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert re.search(r"^griffin train: error: .*pip install 'modeling-griffin\[train\]'", refused.stderr, flags=re.M)


def _other_paths():
    """PYTHONPATH without the repository: what else the tests themselves were given."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(path for path in paths if path and Path(path).resolve() != ROOT)


def test_declared_dependencies():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"transformers>=5\.17', text) and re.search(r'"torch>=', text)
    assert importlib.metadata.version("transformers")


def names_at_the_top(path: Path) -> set[str]:
    """What a file defines or imports, wherever it stands outside functions and classes."""
    names, nodes = set(), list(ast.parse(path.read_text(encoding="utf-8")).body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        else:  # `if` and `try`
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt | ast.ExceptHandler)]
    return names


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_relative_imports_find_what_they_name(path):
    """Where Triton is missing, a wrong import of a kernel hides behind the `except ImportError` that Triton needs."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        folder = path.parents[node.level - 1]
        target = folder.joinpath(*(node.module or "").split("."))
        for alias in node.names:
            if target.with_suffix(".py").exists():
                assert alias.name in names_at_the_top(target.with_suffix(".py")), ast.unparse(node)
            else:
                is_module = (target / f"{alias.name}.py").exists() or (target / alias.name).is_dir()
                assert is_module or alias.name in names_at_the_top(target / "__init__.py"), ast.unparse(node)
