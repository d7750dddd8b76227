"""The package as it is shipped: imports, public names, the wheel, and the tree in the README."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import modeling_griffin


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "modeling_griffin"
FILES = sorted(path.name for path in PACKAGE.glob("*.py"))
SHIPPED = [name for name in FILES if name != "__init__.py"]
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


def test_the_folder_is_flat():
    """All but what never ships to the Hub."""
    assert {path.name for path in PACKAGE.iterdir() if path.is_dir()} - {"__pycache__"} == {"serving"}


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


def test_files_stay_readable():
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in FILES}
    assert lengths.pop("modeling_griffin.py") < 600
    assert {name: length for name, length in lengths.items() if length >= 450} == {}


def run(arguments, **kwargs):
    result = subprocess.run(arguments, capture_output=True, text=True, **kwargs)
    assert result.returncode == 0, f"{arguments}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


IMPORT = """
import sys, torch
sys.modules |= dict.fromkeys(["triton", "scipy", "matplotlib", "datasets"])  # None: as if not installed
import modeling_griffin
from transformers import AutoConfig, AutoModelForCausalLM
config = AutoConfig.for_model("griffin", vocab_size=8, hidden_size=32, num_hidden_layers=3, num_gate_blocks=2)
assert type(AutoModelForCausalLM.from_config(config)) is modeling_griffin.GriffinForCausalLM
print(modeling_griffin.__file__)
"""


def test_wheel(tmp_path):
    """Holds modeling_griffin only, and imports from a fresh folder without the repository."""
    copy = tmp_path / "source"
    for name in ("pyproject.toml", "README.md"):
        copy.mkdir(exist_ok=True)
        (copy / name).write_text((ROOT / name).read_text() if (ROOT / name).exists() else "")
    for folder in ("modeling_griffin", "scripts", "configuration", "tests"):  # all that could slip in
        for path in (ROOT / folder).rglob("*.py" if folder != "configuration" else "*.json"):
            target = copy / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(path.read_text())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir"]
    run([*build, str(tmp_path), str(copy)])
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    files = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert {name for name in names if ".dist-info/" not in name} == files

    target = tmp_path / "installed"
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)])
    environment = os.environ | {"PYTHONPATH": str(target) + os.pathsep + _other_paths(), "PYTHONSAFEPATH": "1"}
    printed = run([sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment)
    assert Path(printed.split()[-1]).parent == target / "modeling_griffin"


def _other_paths():
    """PYTHONPATH without the repository: what else the tests themselves were given."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(path for path in paths if path and Path(path).resolve() != ROOT)


def test_declared_dependencies():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'"transformers>=5\.17', text) and re.search(r'"torch>=', text)
    assert importlib.metadata.version("transformers")


# The tree in the README

TREE_LINE = re.compile(r"^(?P<indent>(?:[│ ]   |[├└]── |    |  )*)(?P<name>[\w.\-]+/?)(?:\s{2,}(?P<note>\S.*))?$")
SKIPPED = re.compile(
    r"(^|/)(\.git|\.gitignore|__pycache__|\.venv|build|dist|\.pytest_cache|\.ruff_cache|[^/]*\.egg-info)(/|$)"
)


def files_on_disk():
    """Tracked files and those that will be; the disk where there is no git."""
    try:
        listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT).splitlines()
    except (AssertionError, FileNotFoundError):
        listed = [str(path.relative_to(ROOT)) for path in ROOT.rglob("*") if path.is_file()]
    return {name for name in listed if not SKIPPED.search(name) and (ROOT / name).exists()}


def tree_of_the_readme():
    """Paths and notes of the fenced block whose first line is the root or `README.md`."""
    text = (ROOT / "README.md").read_text()
    blocks = re.findall(r"```[a-z]*\n(.*?)```", text, flags=re.S)
    (block,) = [block for block in blocks if re.search(r"^\W*modeling_griffin/", block, flags=re.M)]
    paths, parents = {}, []
    for line in block.splitlines():
        if not line.strip() or line.strip() in (".", "./"):
            continue
        match = TREE_LINE.match(line)
        assert match, f"not a line of a tree: {line!r}"
        depth = len(match["indent"])
        parents = [(indent, name) for indent, name in parents if indent < depth]
        path = "".join(name for _, name in parents) + match["name"]
        if match["name"].endswith("/"):
            parents.append((depth, match["name"]))
        paths[path] = match["note"] or ""
    return paths


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="a checkout without a README")
def test_tree_in_the_readme():
    """Lines exist and say what they are; all top-level entries are there, and all files of a folder shown in full."""
    tree, disk = tree_of_the_readme(), files_on_disk()
    folders = {str(parent) + "/" for name in disk for parent in Path(name).parents if str(parent) != "."}
    for path, note in tree.items():
        assert path in disk or path in folders, f"{path} is in the README's tree but not on disk"
        assert note or path.endswith("/"), f"{path} has no note"
    for name in disk:
        folder = name.rpartition("/")[0] + "/" if "/" in name else ""
        shown = [
            path
            for path in tree
            if path.startswith(folder) and path != folder and "/" not in path[len(folder) :].rstrip("/")
        ]
        if folder == "" or any(not path.endswith("/") for path in shown):
            assert name in tree, f"{name} is on disk but not in the README's tree"
    for folder in {name.split("/")[0] + "/" for name in disk if "/" in name}:
        assert folder in tree or folder.startswith("."), f"{folder} is on disk but not in the README's tree"
