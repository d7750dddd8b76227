"""The tree in docs/architecture.md is that of the files, with what each says of itself."""

import _tree as tree


def test_tree():
    written = tree.BLOCK.search(tree.PAGE.read_text(encoding="utf-8"))[0].splitlines()
    made = tree.tree().splitlines()
    missing = [line for line in made if line not in written]
    gone = [line for line in written if line not in made]
    assert written == made, f"run `python tests/_tree.py`; missing: {missing}; no longer so: {gone}"
