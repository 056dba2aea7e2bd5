"""The report in its three forms, and the order of looking."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mxconv.console import Console
from mxconv.documents import dumps, stamped
from mxconv.verify import Finding, Options, Report, Section, verify
from mxconv.verify.junit import to_junit


@pytest.fixture(scope="module")
def report(made: Callable[..., Path], small: Path) -> Report:
    return verify(made("w4afp8", 2), Options(source=small, windows=2, window=300))


def test_the_document_is_json(report: Report) -> None:
    document = json.loads(dumps(stamped("verify", report.document())))
    assert document["schema"] == "mxconv.verify" and document["ok"] is True
    assert list(document["sections"]) == ["structure", "numerics", "parallel", "logits"]
    assert document["sections"]["numerics"]["figures"]["worst"]["rel_rms"] == pytest.approx(0.118, rel=0.05)
    lanes = document["sections"]["logits"]["figures"]["lanes"]
    assert set(lanes) == {"as served", "weights only", "bf16"}
    shares = {"99.9%", "99%", "95%", "90%", "50%", "10%", "5%", "1%", "0.1%"}
    for metrics in lanes.values():
        assert set(metrics["kl"]["quantiles"]) == set(metrics["delta_p"]["quantiles"]) == shares
        assert {"mean", "error", "max"} <= metrics["kl"].keys()
        assert {"top1", "top5", "perplexity", "reference_perplexity", "perplexity_change"} <= metrics.keys()
    assert set(document["sections"]["logits"]["figures"]["layers"]["as served"]) and document["metrics_version"] == 1


def test_the_table(report: Report) -> None:
    out = io.StringIO()
    report.render(Console(stdout=out, stderr=io.StringIO(), environ={}))
    head = out.getvalue().splitlines()[:4]
    assert [line.split()[0] for line in head] == ["structure", "numerics", "parallel", "logits"]
    assert all(" ok" in line for line in head)
    assert "KL 90 · 95 · 99 · 99.9 %" in out.getvalue()
    brief = io.StringIO()
    report.render(Console(stdout=brief, stderr=io.StringIO(), environ={}), details=False)
    assert brief.getvalue().splitlines()[:4] == head and "99.9" not in brief.getvalue()


def section(**fields: object) -> Section:
    return Section(**{"name": "numerics", "status": "ok", "summary": "fine", **fields})  # type: ignore[arg-type]


def test_junit_has_a_case_for_each_check_whatever_the_outcome() -> None:
    findings = (
        Finding(check="weight scale", what="broken \x1b[31m", tensor="a.weight_scale", rank=1),
        Finding(check="weight scale", what="broken too", tensor="b.weight_scale", rank=0),
        Finding(check="surprise", what="not in the list"),
    )
    bad = section(status="FAIL", findings=findings, checks=("weight scale", "weight codes"), seconds=1.5)
    xml = to_junit([bad, section(name="parallel", status="skipped", summary="one rank")], "out")
    suite = ElementTree.fromstring(xml)[0]
    assert (suite.get("tests"), suite.get("failures"), suite.get("skipped")) == ("4", "2", "1")
    cases = {case.get("name"): case for case in suite}
    assert set(cases) == {"weight scale", "weight codes", "surprise", "parallel"}
    failure = cases["weight scale"].find("failure")
    assert failure is not None and "rank 1 · a.weight_scale" in (failure.get("message") or "")
    assert failure.text is not None and "b.weight_scale" in failure.text and "\x1b" not in failure.text
    assert cases["weight codes"].find("failure") is None and cases["parallel"].find("skipped") is not None
    good = ElementTree.fromstring(to_junit([section(checks=("weight scale", "weight codes"))], "out"))[0]
    assert {case.get("name") for case in good} == {"weight scale", "weight codes"}


def test_findings_decide_the_exit_code(report: Report) -> None:
    assert (report.ok, report.exit_code, report.findings) == (True, 0, ())
    bad = section(status="FAIL", findings=(Finding(check="x", what="wrong", key="alpha", expected="1", got="2"),))
    failed = Report(artifact=Path("a"), source=None, scheme=None, layout="fastdeploy", tp=1, sections=(bad,), limits={})
    assert (failed.ok, failed.exit_code) == (False, 8)
    out = io.StringIO()
    failed.render(Console(stdout=out, stderr=io.StringIO(), environ={}))
    assert "FAIL alpha: wrong (expected 1, got 2)" in out.getvalue()
    only_skipped = Report(
        artifact=Path("a"), source=None, scheme=None, layout="", tp=1, sections=(section(status="skipped"),), limits={}
    )
    assert only_skipped.ok


def test_names_from_files_are_escaped() -> None:
    assert "\x1b" not in Finding(check="x", what="wrong", tensor="a\x1b[2J").render()
