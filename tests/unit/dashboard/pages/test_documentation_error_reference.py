"""The error reference."""

import re

from doubles.fake_tasks import TO_RUNNING
from sandbox.dashboard.pages import documentation
from sandbox.dashboard.pages.documentation import guide_file
from sandbox.model import events as e
from sandbox.model.failure import Failure, FailureCode


def test_failure_links_to_the_entry_of_its_code(pages):
    anchors = set(re.findall(r'<tr id="([^"]+)">', pages.get("/errors").text))
    for code in FailureCode:
        pages.tasks.add(code, *TO_RUNNING, e.AgentExited(1, failure=Failure(code, "It broke.")), e.TaskFinished())
        (link,) = re.findall(r'id="failure-code" href="/errors#([^"]+)"', pages.get(f"/tasks/{code}").text)
        assert link in anchors


def test_error_reference_has_all_codes_of_the_document():
    text = guide_file("errors").read_text()
    sections = documentation.parse_error_reference(text)
    codes = [row.code for section in sections for row in section.rows]
    assert codes == re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    rows = [row for section in sections for row in section.rows if len(row.cells) == len(section.columns) - 1]
    assert len(rows) == len(codes)
    assert [row for row in rows if not row.anchor or any(mark in str(row.cells) for mark in ("<", "]("))] == []


def test_links_in_the_error_reference_lead_to_pages_of_the_dashboard():
    text = "# E\n\nIntro.\n\n## A\n\nSee [b](limits.md#c).\n\n| code | meaning |\n| --- | --- |\n"
    text += '| `x` | <a id="x-1"></a>An [own](#o) `y`, [other](errors.md#z). |\n'
    (section,) = documentation.parse_error_reference(text)
    link = documentation.LinkedText
    assert (section.title, section.depth) == ("A", 2)
    assert section.notes == [[link("See "), link("b", "/guide/limits#c"), link(".")]]
    parts = [link("An "), link("own", "#o"), link(" `y`, "), link("other", "/errors#z"), link(".")]
    assert section.rows == [documentation.ErrorRow("x-1", "x", [parts])]


def test_links_of_the_error_page_have_a_target(pages):
    text = pages.get("/errors").text
    links = set(re.findall(r'<a href="(/guide/[^"]+|/docs)"', text))
    assert any(link.startswith("/guide/limits#") for link in links)
    for link in links:
        assert pages.get(link.partition("#")[0]).status_code == 200
    assert "(docs/" not in text
    assert "](" not in text
