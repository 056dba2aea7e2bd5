"""Fixtures and markers that every room's tests share."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"
BUNDLED = REPOSITORY / "mxconv" / "data" / "demo"


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # a shell ignores it for what it starts in the background
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # Tests run in as many processes as there are cores; several threads each would only wait for one another.
    torch.set_num_threads(1)
    config.addinivalue_line("markers", "gpu: needs a CUDA device")
    config.addinivalue_line("markers", "thorough: ten times the size; runs only with --thorough")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--thorough", action="store_true", help="run the tests that are marked thorough as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    skips = {}
    if not torch.cuda.is_available():
        skips["gpu"] = pytest.mark.skip(reason="no CUDA device")
    if not config.getoption("--thorough"):
        skips["thorough"] = pytest.mark.skip(reason="runs with --thorough")
    for item in items:
        for marker, skip in skips.items():
            if item.get_closest_marker(marker):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of shared models and references beside the repository."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared is not there")
    return SHARED


@pytest.fixture(scope="session")
def demo() -> Path:
    """The trained demo model, bundled or shared."""
    for folder in (BUNDLED, SHARED / "models" / "demo"):
        if (folder / "config.json").is_file():
            return folder
    pytest.skip("no demo model")


@pytest.fixture(scope="session")
def tiny_a(shared: Path) -> Path:
    """The trained model that cuts into 8 ranks."""
    return shared / "models" / "tiny-a"
