"""Files that GitHub reads: the citation, the templates."""

import pytest
import yaml
from tiny import ROOT

TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def test_the_citation_has_the_fields_that_its_format_requires_and_names_the_original_authors() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for work, required in (
        (citation, {"cff-version", "message", "title", "authors"}),
        (citation["preferred-citation"], {"type", "title", "authors"}),
    ):
        assert required <= set(work)
    names = [author["family-names"] for author in citation["preferred-citation"]["authors"]]
    assert names == ["Trivigno", "Berton", "Aragon", "Caputo", "Masone"]


@pytest.mark.parametrize("path", [p for p in TEMPLATES if p.stem != "config"], ids=lambda p: p.stem)
def test_an_issue_form_has_what_github_requires(path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= set(form)
    asked = [part for part in form["body"] if part["type"] != "markdown"]
    assert len({part["id"] for part in asked}) == len(asked) > 0
    for part in asked:
        assert part["type"] in {"textarea", "input", "dropdown", "checkboxes"}
        assert part["attributes"]["label"]


def test_the_hook_runs_what_ci_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [hook["entry"] for hook in repository["hooks"]] == ["make lint"]
    assert "\ntest: lint\n" in (ROOT / "Makefile").read_text()
    assert (ROOT / ".ci" / "run").read_text().endswith("\nmake test\n")
