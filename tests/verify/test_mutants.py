"""Verify's teeth: every mutant is caught and named, every right artifact passes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mxconv.verify import Options, Report, verify
from tests.mutants import BASES, MUTANTS, make_base, make_source
from tests.spoil import Folder


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_source(tmp_path_factory.mktemp("mutants") / "source")


@pytest.fixture(scope="module")
def bases(source: Path) -> dict[str, Path]:
    return {name: make_base(name, source, source.parent / name) for name in BASES}


def judged(artifact: Path, source: Path) -> Report:
    return verify(artifact, Options(source=source, sections=("structure", "numerics", "parallel")))


@pytest.mark.parametrize("base", BASES)
def test_control_the_right_artifact_passes(base: str, bases: dict[str, Path], source: Path) -> None:
    report = verify(bases[base], Options(source=source, windows=16 if base == "wide" else 3, window=300))
    assert report.ok, [finding.render() for finding in report.findings]
    assert all(section.status == "ok" for section in report.sections)


def test_a_saved_folder_without_a_change_passes(bases: dict[str, Path], source: Path, tmp_path: Path) -> None:
    """The mutants' own writing and sealing is not what verify catches."""
    shutil.copytree(bases["w4afp8"], tmp_path / "same")
    Folder(tmp_path / "same", source).save()
    report = verify(tmp_path / "same", Options(source=source, sections=("structure", "numerics"), hash_files=True))
    assert report.ok, [finding.render() for finding in report.findings]


@pytest.mark.parametrize("name", MUTANTS)
def test_every_mutant_is_caught_and_named(name: str, bases: dict[str, Path], source: Path, tmp_path: Path) -> None:
    mutant = MUTANTS[name]
    shutil.copytree(bases[mutant.base], tmp_path / "mutant")
    folder = Folder(tmp_path / "mutant", source)
    mutant.spoil(folder)
    folder.save()
    report = judged(tmp_path / "mutant", source)
    assert report.exit_code == 8
    section = report.section(mutant.section)
    assert section.status == "FAIL"
    lines = [finding.render() for finding in section.findings]
    assert any(all(word in line for word in mutant.names) for line in lines), lines[:10]
