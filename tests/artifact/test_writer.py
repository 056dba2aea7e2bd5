"""A run from its first byte to its manifest: bytes, order, names, modes, and what the writer refuses."""

from __future__ import annotations

import json
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mxconv.artifact import ArtifactWriter, Parts, Region, open_output, read_manifest, tree_digest, writer
from mxconv.artifact.names import RUN_LOG_NAME
from mxconv.artifact.publishing import append_run_log
from mxconv.checkpoint import read_shards
from mxconv.errors import IntegrityError, MxconvError
from mxconv.placement import place_file
from mxconv.tensors import whole
from tests.artifact import sample


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_run_gives_exactly_the_planned_files(tmp_path: Path) -> None:
    manifest, computed = sample.run(tmp_path / "out")
    shards = [file.path for file in sample.files()]
    expected = sorted([*shards, *sample.INDEXES, *sample.SIDECARS, "config.json", "manifest.json"])
    assert names(tmp_path / "out") == expected and set(computed) == set(sample.units())
    assert sample.wrong_files(tmp_path / "out") == []
    assert os.listdir(tmp_path) == ["out"]
    for file in sample.files():
        raw = (tmp_path / "out" / file.path).read_bytes()
        assert raw[:8] == len(file.header).to_bytes(8, "little") and raw[8 : 8 + len(file.header)] == file.header
        with safe_open(tmp_path / "out" / file.path, "np") as opened:
            assert opened.metadata() == {"format": "pt"} and set(opened.keys()) == {t.name for t in file.tensors}
    assert set(manifest.files) == set(expected) - {"manifest.json"}
    assert manifest.body["tool"] == sample.EXTRA["tool"] and manifest.plan_digest == sample.PLAN


def test_our_own_reader_opens_what_the_writer_wrote(tmp_path: Path) -> None:
    sample.run(tmp_path / "out")
    for file in sample.files():
        folder = tmp_path / "one"
        folder.mkdir(exist_ok=True)
        (folder / "model.safetensors").write_bytes((tmp_path / "out" / file.path).read_bytes())
        shards = read_shards(folder)
        assert not shards.problems and {n: t.offset for n, t in shards.tensors.items()} == dict(file.offsets)


def test_the_manifest_tells_what_sha256sum_tells(tmp_path: Path) -> None:
    import hashlib

    manifest, _ = sample.run(tmp_path / "out")
    for path, fact in manifest.files.items():
        content = (tmp_path / "out" / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (fact.size_bytes, fact.sha256)
    for file in sample.files():
        for tensor in file.tensors:
            content = sample.tensor_bytes(file.path, tensor).tobytes()
            assert manifest.files[file.path].tensors[tensor.name].sha256 == hashlib.sha256(content).hexdigest()


def test_any_order_any_threads_any_umask_one_digest(tmp_path: Path) -> None:
    sample.run(tmp_path / "plain")
    digest = tree_digest(tmp_path / "plain")
    for seed, umask in ((1, 0o022), (2, 0o077), (3, 0o000)):
        old = os.umask(umask)
        try:
            root = tmp_path / f"out{seed}"
            with ThreadPoolExecutor(4) as pool:
                sample.run(root, order=random.Random(seed), mapper=pool.map)
        finally:
            os.umask(old)
        assert tree_digest(root) == digest
        assert {path.stat().st_mode & 0o777 for path in root.rglob("*") if path.is_file()} == {0o666 & ~umask}


def test_no_shard_has_its_name_before_its_last_unit(tmp_path: Path) -> None:
    root = tmp_path / "out"
    seen: list[int] = []
    sample.run(root, on_unit=lambda _: seen.append(len(list(root.rglob("model-*.safetensors")))))
    assert seen[0] == 0 and not any(count == 4 for count in seen)


def test_a_stray_part_never_parses(tmp_path: Path) -> None:
    import safetensors

    class Stop(Exception):
        pass

    def stop(unit: str) -> None:
        if unit == "scalar":
            raise Stop

    with pytest.raises(Stop):
        sample.run(tmp_path / "out", on_unit=stop)
    parts = [path for path in (tmp_path / "out").rglob(".*.part")]
    assert len(parts) >= 2  # those that wait for the last unit, and what was not yet finished in the background
    for part in parts:
        assert part.read_bytes()[:8] == bytes(8)
        with pytest.raises(safetensors.SafetensorError):
            safetensors.deserialize(part.read_bytes())


def open_writer(root: Path) -> tuple[object, ArtifactWriter]:
    output = open_output(root, plan_digest=sample.PLAN)
    return output, ArtifactWriter(output, files=sample.files(), units=sample.units())


def test_data_must_fill_its_region(tmp_path: Path) -> None:
    _, opened = open_writer(tmp_path / "out")
    with opened, pytest.raises(MxconvError, match="fill its region"):
        opened.write(sample.units()["layer.0"][0], np.zeros(7, np.uint8))


def test_a_unit_must_be_committed_whole_and_a_run_must_commit_all(tmp_path: Path) -> None:
    _, opened = open_writer(tmp_path / "out")
    with opened:
        with pytest.raises(MxconvError, match="without all its regions"):
            opened.commit("layer.0", source_sha256="0" * 64, outputs=["0" * 64])
        with pytest.raises(MxconvError, match="not committed"):
            opened.finish()


def test_bytes_that_change_on_the_disk_before_a_file_is_finished_are_noticed(tmp_path: Path) -> None:
    """Two units that write over each other, or a disk that lies: the finished file must hold what was handed over."""
    placed = sample.files()
    _, opened = open_writer(tmp_path / "out")
    with opened:
        for unit, regions in sample.units().items():  # file 0 is complete with layer.4
            digests = [opened.write(region, sample.region_bytes(placed, region)) for region in regions]
            if unit == "layer.4":
                part = opened.parts.part(0)
                with open(part, "r+b") as file:
                    file.seek(placed[0].offsets["l0.codes"] + 5)
                    byte = file.read(1)
                    file.seek(-1, 1)
                    file.write(bytes([byte[0] ^ 1]))
            try:
                opened.commit(unit, source_sha256="0" * 64, outputs=digests)
            except IntegrityError as error:
                problem = error
                break
        else:
            with pytest.raises(IntegrityError) as raised:
                opened.finish()
            problem = raised.value
    assert "l0.codes" in problem.render()
    assert not (tmp_path / "out" / placed[0].path).exists()


def region(tensor: str, *box: tuple[int, int]) -> Region:
    return Region(file=0, tensor=tensor, box=box)


@pytest.mark.parametrize(
    "regions",
    [
        [region("a", (0, 4), (0, 6))],  # b is not covered
        [region("a", (0, 4), (0, 3)), region("b", (0, 2))],
        [region("a", (0, 4), (0, 6)), region("a", (1, 2), (0, 6)), region("b", (0, 2))],
        [region("a", (0, 2), (0, 6)), region("a", (1, 3), (0, 6)), region("b", (0, 2))],
        [region("a", (0, 2), (0, 3)), region("a", (0, 2), (2, 5)), region("a", (2, 4), (0, 6)), region("b", (0, 2))],
        [region("a", (0, 4), (0, 6)), region("b", (0, 2)), region("c", (0, 2))],
    ],
)
def test_units_must_cover_every_tensor_once(regions: list[Region], tmp_path: Path) -> None:
    placed = [place_file("model.safetensors", [sample.spec("a", "I8", 4, 6), sample.spec("b", "I8", 2)])]
    parts = Parts(tmp_path, plan_digest=sample.PLAN, files=placed)
    with pytest.raises((MxconvError, KeyError)):
        writer.check_cover(placed, {"one": regions[:1], "two": regions[1:]}, parts)
    grid = [region("a", (r, r + 2), (c, c + 3)) for r in (0, 2) for c in (0, 3)]
    writer.check_cover(placed, {"one": grid, "two": [region("b", *whole((2,)))]}, parts)


def test_workers_write_through_parts_of_their_own(tmp_path: Path) -> None:
    """What a worker process does: it knows root, plan and files, writes regions, and sends digests back."""
    placed = sample.files()
    output, opened = open_writer(tmp_path / "out")
    with opened:
        worker = Parts(output.work, plan_digest=sample.PLAN, files=placed, finished=opened.finished_files)
        for unit, regions in sample.units().items():
            digests = [worker.write(region, memoryview(sample.region_bytes(placed, region))) for region in regions]
            opened.commit(unit, source_sha256="0" * 64, outputs=digests)
        hashes = opened.finish()
        worker.close()
    assert sample.wrong_files(tmp_path / "out") == [] and len(hashes) == 4


def test_many_files_need_few_descriptors(tmp_path: Path) -> None:
    placed = [place_file(f"model-{i:05d}.safetensors", [sample.spec("t", "I8", 8)]) for i in range(200)]
    units = {f"u{i}": [Region(file=i, tensor="t", box=((0, 8),))] for i in range(200)}
    before = len(os.listdir("/proc/self/fd"))
    output = open_output(tmp_path / "out", plan_digest=sample.PLAN)
    with output, ArtifactWriter(output, files=placed, units=units) as opened:
        digests = {unit: [opened.write(regions[0], np.full(8, 1, np.uint8))] for unit, regions in units.items()}
        assert len(os.listdir("/proc/self/fd")) < before + 80
        for unit, outputs in digests.items():
            opened.commit(unit, source_sha256="0" * 64, outputs=outputs)
        assert len(opened.finish()) == 200
    assert len(os.listdir("/proc/self/fd")) == before


def test_run_log_is_in_no_digest(tmp_path: Path) -> None:
    root = tmp_path / "out"
    sample.run(root)
    digest = tree_digest(root)
    append_run_log(root, {"workers": 2})
    append_run_log(root, {"seconds": 1.5})
    lines = [json.loads(line) for line in (root / RUN_LOG_NAME).read_text().splitlines()]
    assert [line.get("workers") for line in lines] == [2, None] and all("time" in line and "host" in line for line in lines)
    assert tree_digest(root) == digest and RUN_LOG_NAME not in read_manifest(root).files


def test_the_tree_digest_sees_names_contents_and_links(tmp_path: Path) -> None:
    sample.run(tmp_path / "out")
    digest, seen = tree_digest(tmp_path / "out"), set()
    target = tmp_path / "out" / "tokenizer.json"
    content = target.read_bytes()
    target.write_bytes(content[::-1])
    seen.add(tree_digest(tmp_path / "out"))
    target.rename(target.with_name("tokenizer2.json"))
    seen.add(tree_digest(tmp_path / "out"))
    target.symlink_to("tokenizer2.json")
    seen.add(tree_digest(tmp_path / "out"))
    target.unlink()
    target.with_name("tokenizer2.json").rename(target)
    target.write_bytes(content)
    os.chmod(target, 0o600)
    assert len(seen) == 3 and digest not in seen and tree_digest(tmp_path / "out") == digest
