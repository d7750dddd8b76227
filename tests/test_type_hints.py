"""Every public function says what it takes and returns; whether that is true, `make lint` asks mypy."""

import ast

from _docs import ROOT


FILES = sorted(path for folder in ("modeling_griffin", "scripts") for path in (ROOT / folder).rglob("*.py"))


def public_functions(node: ast.AST) -> list[ast.FunctionDef]:
    """Of a module or class, those of its public classes too. Not Triton's kernels: their pointers have no types."""
    found = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef) and is_public(child.name):
            found += [] if any("triton.jit" in ast.unparse(each) for each in child.decorator_list) else [child]
        elif isinstance(child, ast.If | ast.Try) or (isinstance(child, ast.ClassDef) and is_public(child.name)):
            found += public_functions(child)
    return found


def is_public(name: str) -> bool:
    return not name.startswith("_") or name.startswith("__")


def without_hints(function: ast.FunctionDef) -> list[str]:
    """Its arguments without a hint, and "the result" where that has none."""
    listed, star = function.args, [function.args.vararg, function.args.kwarg]
    arguments = [*listed.posonlyargs, *listed.args, *listed.kwonlyargs, *(each for each in star if each)]
    names = [each.arg for each in arguments if each.annotation is None and each.arg not in ("self", "cls")]
    result = function.returns is None and function.name != "__init__"
    return [*names, "the result"] if result else names


def test_public_functions_have_hints():
    missing = {
        f"{path.relative_to(ROOT)}:{function.lineno} {function.name}": without_hints(function)
        for path in FILES
        for function in public_functions(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert len(missing) > 800 and not {name: names for name, names in missing.items() if names}
