"""Fetches the common tests of the installed transformers version. They lie in its sdist, not in its wheel.

What the sdist leaves out of the `tests` package, and its test files import, lies in `stand_ins/`.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from filelock import FileLock


PACKAGE = "transformers_tests"  # its modules import each other with relative imports, so the name is free
STAND_INS = {
    "distributed_testing_utils.py": "distributed_testing_utils.py",
    "test_export.py": "exporters/test_export.py",
    "test_utils.py": "generation/test_utils.py",
    "test_configuration_utils.py": "utils/test_configuration_utils.py",
}


def cache_folder() -> Path:
    """$GRIFFIN_TEST_CACHE, or a folder below the user's cache; never inside the repository."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("GRIFFIN_TEST_CACHE") or Path(base) / "griffin-transformers-tests")


def fetch_common_tests(version: str | None = None) -> Path:
    """Downloads once, and returns the folder to put on sys.path: it holds the package `transformers_tests`."""
    version = version or importlib.metadata.version("transformers")
    target = cache_folder() / f"transformers-{version}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # several test processes start at once
        if not (target / PACKAGE).is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
                extracted = _extract(_download(version, Path(scratch)), Path(scratch))
                target.mkdir(exist_ok=True)
                extracted.rename(target / PACKAGE)
        _add_stand_ins(target / PACKAGE)
    return target


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    subprocess.run([*command, "--dest", str(folder), f"transformers=={version}"], check=True)
    return next(folder.glob("transformers-*.tar.gz"))


def _extract(archive: Path, folder: Path) -> Path:
    """Takes out `tests/*.py` only."""
    with tarfile.open(archive) as tar:
        root = tar.next().name.split("/")[0]
        names = [m for m in tar.getmembers() if m.name.startswith(f"{root}/tests/") and m.name.endswith(".py")]
        tar.extractall(folder, members=names, filter="data")
    return folder / root / "tests"


def _add_stand_ins(package: Path) -> None:
    (package / "__init__.py").touch()
    for source, place in STAND_INS.items():
        (package / place).parent.mkdir(exist_ok=True)
        (package / place).parent.joinpath("__init__.py").touch()
        content = (Path(__file__).parent / "stand_ins" / source).read_text()
        if not (package / place).exists() or (package / place).read_text() != content:
            (package / place).write_text(content)


if __name__ == "__main__":
    print(fetch_common_tests(*sys.argv[1:]))
