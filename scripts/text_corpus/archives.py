"""Packages of public registries: fetched by their ordinary clients, checked, and read file by file."""

import gzip
import hashlib
import io
import lzma
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path


CLIENTS = {
    "debian": lambda name, version: ["apt-get", "download", "-q", f"{name}={version}"],
    "pypi": lambda name, version: [
        *(sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"),
        *("--python-version", "3.12", "--platform", "manylinux_2_28_x86_64", "--platform", "manylinux2014_x86_64"),
        *("--platform", "manylinux_2_17_x86_64", "--platform", "any", f"{name}=={version}"),
    ],
    "npm": lambda name, version: ["npm", "pack", "--silent", f"{name}@{version}"],
}
REMEDIES = {"debian": "run `apt-get update`, "}  # where a client's own list of versions may be old
NESTED = (".tar.xz", ".tar.gz", ".tgz", "src.zip")  # archives inside of packages that are read too


def fetch(package: dict, folder: Path) -> Path:
    """The package's file in `folder`, downloaded if it is not there; ValueError where it is another one.

    package: registry, name, version, file, sha256.
    """
    path = folder / package["file"]
    if not path.is_file():
        _download(package, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()  # Python 3.10 has no file_digest
    if found != package["sha256"]:
        raise ValueError(
            f"{path} has the SHA-256 {found}, the list says {package['sha256']}: delete the file, or list it"
        )
    return path


def _download(package: dict, path: Path) -> None:
    command = CLIENTS[package["registry"]](package["name"], package["version"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        files = list(Path(folder).iterdir())
        if done.returncode or len(files) != 1:
            reason = " ".join(done.stderr.split())[-300:]
            raise ValueError(
                f"{package['name']} {package['version']} cannot be had from {package['registry']} ({reason}): "
                f"{REMEDIES.get(package['registry'], '')}put {package['file']} into {path.parent}, "
                "or list another version"
            )
        files[0].rename(path)


def read_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside, bytes) of the regular files of a .deb, wheel or npm archive, and of archives inside of it."""
    if path.suffix == ".deb":
        process = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(path)], stdout=subprocess.PIPE)
        yield from _unnested(_read_tar(process.stdout))
        if process.wait():
            raise ValueError(f"{path} is no Debian package: delete it, it is fetched again")
    else:
        yield from _unnested(_read_archive(path.name, path.open("rb")))


def _read_archive(name: str, file) -> Iterator[tuple[str, bytes]]:
    if name.endswith((".zip", ".whl")):
        with zipfile.ZipFile(file) as archive:
            for entry in archive.infolist():
                if not entry.is_dir():
                    yield entry.filename, archive.read(entry)
    else:
        yield from _read_tar(lzma.open(file) if name.endswith(".xz") else gzip.open(file))


def _read_tar(stream) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(fileobj=stream, mode="r|") as archive:
        for entry in archive:
            if entry.isreg():
                yield entry.name.removeprefix("./"), archive.extractfile(entry).read()


def _unnested(files: Iterator[tuple[str, bytes]]) -> Iterator[tuple[str, bytes]]:
    for name, content in files:
        if name.endswith(NESTED):
            yield from ((f"{name}/{inner}", text) for inner, text in _read_archive(name, io.BytesIO(content)))
        elif name.endswith((".gz", ".dz")):
            yield name[:-3], gzip.decompress(content)
        else:
            yield name, content
