"""Makes a training text out of public source packages: `python scripts/gather_text.py configuration/text/long.yaml`.

Every package of the list is fetched by its registry's own client (apt-get, pip, npm) and compared with its checksum.
Their text files become documents: prose and code in the kinds of text_corpus/documents.py. Each paragraph stays in
once, a document that others repeat by more than half is left out, and a part of the documents is held out, long ones
more often, so that there is text to judge long contexts on. The result is the same on every machine: shards of JSON
lines (kind, held_out, text), and facts.json with counts, checksums and the licences of all packages.
"""

import concurrent.futures
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import spoken
from command_line import Parser, ShowDefaultsAndLines, check_folder
from text_corpus.archives import CLIENTS, fetch, read_files
from text_corpus.deduplicate import Deduplicator
from text_corpus.documents import KINDS, kind_of, share_of, text_of
from text_corpus.shards import ShardWriter
from tqdm import tqdm
from whole_files import write_whole
from yaml_file import check_shapes, read_yaml


MEGABYTE = 10**6
FIELDS = ("registry", "name", "version", "file", "sha256", "licence")
OPTIONS = ("share", "only", "without")


def read_list(path: Path) -> dict:
    """packages (registry, name, version, file, sha256, licence; share, only, without), most (MB by kind), held_out,
    long_document (characters) and held_out_of_long."""
    wanted = read_yaml(path, "files of configuration/text/")
    numbers = dict.fromkeys(("held_out", "long_document", "held_out_of_long"), "a number")
    check_shapes(path, wanted, packages="a list of mappings", most="a mapping", **numbers)
    for package in wanted["packages"]:
        if missing := set(FIELDS) - set(package):
            raise ValueError(f"{path}: {package.get('name')} lacks {', '.join(sorted(missing))}")
        if unknown := set(package) - {*FIELDS, *OPTIONS}:
            raise ValueError(f"{path}: {package['name']} has {', '.join(sorted(unknown))}: allowed are {OPTIONS}")
        if package["registry"] not in CLIENTS:
            raise ValueError(f"{path}: registry = {package['registry']!r}: allowed are {', '.join(CLIENTS)}")
    if unknown := set(wanted["most"]) - set(KINDS):
        raise ValueError(f"{path}: most has {', '.join(sorted(unknown))}: allowed are {', '.join(KINDS)}")
    return wanted


def documents_of(package: dict, archive: Path) -> list[tuple[str, str]]:
    """(kind, text) of a package's files; of a package with a `share`, those of as many files, chosen by their names."""
    documents = []
    only, without = (re.compile(package.get(key, default)) for key, default in (("only", ""), ("without", r"$^")))
    for name, content in read_files(archive):
        kind = kind_of(name)
        if kind is None or not only.search(name) or without.search(name) or share_of(name) >= package.get("share", 1):
            continue
        text = text_of(name, kind, content)
        if text is not None:
            documents.append((kind, text))
    return documents


def read_all(packages: list[dict], archives: Path, jobs: int) -> Iterator[list[tuple[str, str]]]:
    """The documents of each package in the list's order, `jobs` packages at once."""
    paths = [fetch(package, archives) for package in tqdm(packages, desc="fetching", unit="package", disable=None)]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        yield from pool.map(documents_of, packages, paths)


def gather(wanted: dict, archives: Path, output: Path, shard: int, jobs: int) -> dict:
    """Writes the shards into `output`; returns the facts."""
    once, writer = Deduplicator(), ShardWriter(output, shard, jobs)
    counts = {name: Counter() for name in ("documents", "bytes", "held_out_documents", "held_out_bytes")}
    read, digest = Counter(), hashlib.sha256()
    packages = read_all(wanted["packages"], archives, jobs)
    for documents in tqdm(packages, desc="reading", total=len(wanted["packages"]), unit="package", disable=None):
        for kind, text in documents:
            read[kind] += 1
            if counts["bytes"][kind] >= wanted["most"].get(kind, 0) * MEGABYTE or (text := once(text)) is None:
                continue
            is_long = len(text) >= wanted["long_document"]
            held_out = share_of(text) < wanted["held_out_of_long" if is_long else "held_out"]
            size, prefix = len(text.encode()), "held_out_" if held_out else ""
            counts[prefix + "documents"][kind] += 1
            counts[prefix + "bytes"][kind] += size
            digest.update(text.encode())
            writer.write({"kind": kind, "held_out": held_out, "text": text})
    licences = {f"{p['registry']}: {p['name']} {p['version']}": p["licence"] for p in wanted["packages"]}
    return {
        "kinds": {kind: {"read": read[kind], **{name: counts[name][kind] for name in counts}} for kind in sorted(read)},
        "total": {name: sum(counts[name].values()) for name in counts},
        "sha256": digest.hexdigest(),
        "shards": writer.close(),
        "licences": licences,
    }


def main(argv: list[str] | None = None) -> None:
    parser = Parser(__file__, description=__doc__, formatter_class=ShowDefaultsAndLines)
    parser.add_argument("list", type=Path, help="a file of configuration/text/")
    parser.add_argument("--output", type=Path, default=Path("build/text"), help="folder of the shards and facts.json")
    parser.add_argument("--archives", type=Path, default=Path("build/archives"), help="where fetched packages stay")
    parser.add_argument("--shard", type=int, default=200, help="MB of text in a shard, before compression")
    parser.add_argument("--jobs", type=int, default=2, help="packages read, and shards compressed, at once")
    arguments = parser.parse_args(argv)
    parser.check_least(arguments, shard=1, jobs=1)
    try:
        check_folder("--output", arguments.output)
        wanted = read_list(arguments.list)
        facts = gather(wanted, arguments.archives, arguments.output, arguments.shard * MEGABYTE, arguments.jobs)
    except ValueError as error:
        spoken.stop(__file__, error)
    facts = {"list": arguments.list.name, **facts}
    write_whole(arguments.output / "facts.json", json.dumps(facts, indent=1) + "\n")
    for kind, numbers in facts["kinds"].items():
        print(f"{kind:12} {numbers['documents']:>8,} documents {numbers['bytes'] / MEGABYTE:>8.1f} MB")
    total = sum(shard["bytes"] for shard in facts["shards"])
    train, held_out = (facts["total"][name] / MEGABYTE for name in ("bytes", "held_out_bytes"))
    print(f"{train:.1f} MB for training, {held_out:.1f} MB held out")
    print(f"{len(facts['shards'])} shards of {total / MEGABYTE:.1f} MB in {arguments.output}")


if __name__ == "__main__":
    main()
