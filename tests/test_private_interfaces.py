"""docs/private_interfaces.md: each name is still there, and the code uses no other with an underscore."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "private_interfaces.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+)(?::(\w+))?` \| (.+?) \| (.+?) \|$", PAGE, flags=re.M)
# Names of ours that hold an underscore in front, or of namedtuples and Python itself.
PYTHONS = {"_", "_replace", "_fields", "_asdict", "_make"}
WRITTEN_ELSEWHERE = {"_C", "_functorch", "_device"}  # parts of a listed path
PREFIXES = {"_masked_", "_unfinished_save_"}  # of files
SUFFIXES = {"_ms", "_x"}  # of fields
NOT_INSTALLED_HERE = {"_attention_ops", "_active"}  # vLLM's table, docs/vllm.md; Triton's driver, check_portability.py


def follow(path: str):
    """The object at a dotted path."""
    parts = path.split(".")
    for number in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:number]))
        except ImportError:
            continue
        for part in parts[number:]:
            found = getattr(found, part)
        return found
    raise ImportError(path)


@pytest.mark.parametrize("path, word", [(path, word) for path, word, *_ in ROWS])
def test_each_name_is_there(path, word):
    found = follow(path)
    if word:
        assert re.search(rf"\b{word}\b", inspect.getsource(found)), f"{path} knows no {word} any more"


def words_of(node: ast.AST) -> list[str]:
    """Names that a node reads: an attribute, a string that may be one (`getattr`, `vars`), what it imports."""
    if isinstance(node, ast.Attribute):
        return [node.attr]
    if isinstance(node, ast.Constant):
        return [str(node.value)]
    if isinstance(node, ast.Import) or isinstance(node, ast.ImportFrom) and not node.level:
        return ".".join([getattr(node, "module", ""), *(alias.name for alias in node.names)]).split(".")
    return []


def private_names() -> dict[str, set[str]]:
    """Names with an underscore in front that the code reads and does not define, with the files that do."""
    read, own = {}, set()
    for path in (*(ROOT / "modeling_griffin").rglob("*.py"), *(ROOT / "scripts").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                own.add(node.name)
            elif isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                own |= {target.id for target in targets if isinstance(target, ast.Name)}
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                own.add(node.attr)
            for word in words_of(node):
                if re.fullmatch(r"_[a-zA-Z]\w*", word):
                    read.setdefault(word, set()).add(str(path.relative_to(ROOT)))
    return {
        name: files
        for name, files in read.items()
        if name not in own | PYTHONS | WRITTEN_ELSEWHERE | PREFIXES | SUFFIXES | NOT_INSTALLED_HERE
    }


def test_the_code_uses_no_other():
    listed = {word or path.rpartition(".")[2] for path, word, *_ in ROWS}
    assert {name: files for name, files in private_names().items() if name not in listed} == {}


def test_files_are_named_where_they_are():
    for _, _, _, where in ROWS:
        for name in re.findall(r"`([\w./]+)`", where):
            assert (ROOT / "modeling_griffin" / name).exists() or (ROOT / name).exists(), name
