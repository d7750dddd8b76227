"""The papers around the code: licence, citation, changelog, templates and the workflow agree with the code."""

import re

import pytest
import yaml
from _docs import ROOT

import modeling_griffin
from modeling_griffin.saving.save import code_files


PROJECT = (ROOT / "pyproject.toml").read_text()
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def declared(field: str) -> str:
    """A string of [project] in pyproject.toml."""
    return re.search(rf'^{field} = "(.*)"$', PROJECT, flags=re.M)[1]


def test_licence():
    """The whole text of Apache 2.0, under the name that pyproject and the citation give."""
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert declared("license") == citation["license"] == "Apache-2.0"


@pytest.mark.parametrize("path", code_files(), ids=lambda path: path.name)
def test_what_ships_names_its_licence(path):
    """In the head of each file, since a copy in a model repository has no LICENSE beside it."""
    head = path.read_text(encoding="utf-8").splitlines()[:30]
    assert any(line.endswith(f"# SPDX-License-Identifier: {declared('license')}") for line in head)


def test_citation():
    """What the format 1.2.0 requires, the version that is being made, and the paper."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["title"] and citation["authors"]
    assert citation["version"] == re.match(r"[\d.]*\d", declared("version"))[0].removesuffix(".dev0")
    assert any(reference["url"].endswith("2402.19427") for reference in citation["references"])


def test_changelog():
    """Newest first, and the version that is being made stands at the top."""
    versions = re.findall(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    numbers = [tuple(map(int, number.split("."))) for number, _ in versions]
    assert numbers == sorted(numbers, reverse=True)
    assert declared("version").startswith(versions[0][0])
    assert all(date == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", date) for _, date in versions)


def test_workflow():
    """It runs .ci/run, which is executable, on the Pythons that the classifiers name."""
    (job,) = yaml.safe_load((ROOT / ".github" / "workflows" / "check.yml").read_text())["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
    named = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
    assert job["strategy"]["matrix"]["python"] == named
    assert declared("requires-python") == f">={named[0]}"


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates(path):
    """Forms as GitHub reads them: a name, a description, and a body of fields with labels."""
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        assert set(form) <= {"blank_issues_enabled", "contact_links"}
        return
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(set(ids)) == len(ids)
    assert all(field["type"] in ("textarea", "dropdown", "input") for field in form["body"])
    assert all(field["attributes"]["label"] for field in form["body"])


def test_version():
    """The package says its own version, that of the installation; a checkout that is not installed says so."""
    assert re.match(r"\d+\.\d+|0\+unknown", modeling_griffin.__version__)
