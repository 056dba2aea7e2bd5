"""The report as a JUnit XML file, which CI systems show: one test suite, one case for each check of each section.

Case names do not change from run to run, so that a CI system can follow them. Format: the common subset that Jenkins, GitLab
and GitHub reporters read (testsuites / testsuite / testcase with failure, skipped or system-out).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from mxconv.verify.findings import Finding, Section

# What XML 1.0 cannot hold, even escaped.
_NO_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
MAX_LISTED = 200


def to_junit(sections: Sequence[Section], suite: str) -> bytes:
    """UTF-8 XML of `sections`; `suite` names the artifact."""
    root = ElementTree.Element("testsuites")
    cases = [case for section in sections for case in _cases(section)]
    tally = {
        "tests": len(cases),
        "failures": sum(case.find("failure") is not None for case in cases),
        "skipped": sum(case.find("skipped") is not None for case in cases),
    }
    attributes = {"name": _text(suite), "errors": "0", **{key: str(value) for key, value in tally.items()}}
    attributes["time"] = f"{sum(section.seconds for section in sections):.3f}"
    ElementTree.SubElement(root, "testsuite", attributes).extend(cases)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _cases(section: Section) -> list[ElementTree.Element]:
    """A case for each check; the first carries the section's time and its words."""
    if section.status == "skipped":
        case = _case(section, section.name)
        ElementTree.SubElement(case, "skipped", {"message": _text(section.summary)})
        return [case]
    failed: dict[str, list[Finding]] = {}
    for finding in section.findings:
        failed.setdefault(finding.check, []).append(finding)
    cases = [_case(section, check) for check in dict.fromkeys((*section.checks, *failed))] or [_case(section, section.name)]
    for case in cases:
        _add_failure(case, section, failed.get(case.attrib["name"], ()))
    cases[0].attrib["time"] = f"{section.seconds:.3f}"
    words = "\n".join((section.summary, *section.lines, *section.warnings))
    ElementTree.SubElement(cases[0], "system-out").text = _text(words)
    return cases


def _case(section: Section, name: str) -> ElementTree.Element:
    return ElementTree.Element("testcase", {"classname": f"mxconv.verify.{section.name}", "name": _text(name), "time": "0.000"})


def _add_failure(case: ElementTree.Element, section: Section, findings: Sequence[Finding]) -> None:
    if not findings:
        return
    failure = ElementTree.SubElement(case, "failure", {"type": section.name, "message": _text(findings[0].render())})
    lines = [finding.render() for finding in findings[:MAX_LISTED]]
    if len(findings) > MAX_LISTED:
        lines.append(f"… and {len(findings) - MAX_LISTED} more")
    failure.text = _text("\n".join(lines))


def _text(text: str) -> str:
    return _NO_XML.sub("\ufffd", text)
