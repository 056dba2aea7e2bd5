"""The bounded set of open files: what is in use stays open, what is not gives way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mxconv.checkpoint.descriptors import Descriptors


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    found = [tmp_path / str(i) for i in range(6)]
    for path in found:
        path.write_text(path.name)
    return found


def opened(descriptors: Descriptors) -> int:
    return len(descriptors._open)


def test_the_longest_unused_gives_way(paths: list[Path]) -> None:
    calls: list[int] = []

    def open_file(number: int) -> int:
        calls.append(number)
        return os.open(paths[number], os.O_RDONLY)

    descriptors = Descriptors(open_file, max_open=2)
    for number in (0, 1, 0, 2, 0, 1):
        with descriptors.use(number) as fd:
            assert os.pread(fd, 1, 0) == str(number).encode()
    assert calls == [0, 1, 2, 1] and opened(descriptors) == 2
    descriptors.close()
    assert opened(descriptors) == 0


def test_a_descriptor_in_use_is_never_closed(paths: list[Path]) -> None:
    descriptors = Descriptors(lambda number: os.open(paths[number], os.O_RDONLY), max_open=1)
    with descriptors.use(0) as first, descriptors.use(0) as again:
        assert first == again
        for number in range(1, 6):
            with descriptors.use(number):
                pass
        descriptors.forget(0)
        descriptors.close()
        assert os.pread(first, 1, 0) == b"0"
    descriptors.forget(0)
    assert opened(descriptors) == 0
    with pytest.raises(OSError):
        os.fstat(first)


def test_a_file_that_does_not_open_leaves_nothing(paths: list[Path]) -> None:
    descriptors = Descriptors(lambda number: os.open(paths[0].parent / "absent", os.O_RDONLY))
    with pytest.raises(FileNotFoundError), descriptors.use(0):
        pass
    assert opened(descriptors) == 0
