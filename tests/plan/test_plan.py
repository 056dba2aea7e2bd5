"""The plan: pure, canonical, complete; every tensor accounted for, every problem listed at once."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mxconv.errors import MxconvError, Problems
from mxconv.plan import Plan, Request, build_plan
from mxconv.plan.values import canonical_json, digest
from mxconv.quantize.schemes import SCHEMES, get_scheme
from mxconv.source import open_source
from tests.synthetic import make_checkpoint

GOLDEN = Path(__file__).parent / "golden"


def plan_of(source: Path, **request: Any) -> Plan:
    return build_plan(open_source(source), Request(**request))


def facts(plan: Plan) -> dict[str, Any]:
    """What a golden file holds of a plan: readable, and nothing that a path or machine could change."""
    return {
        "digest": plan.digest,
        "numerics_digest": plan.numerics_digest,
        "placement_digest": plan.placement_digest,
        "files": {file.path: [file.size_bytes, len(file.tensors)] for file in plan.files},
        "groups": {g.group: [g.tensors, g.parameters, g.source_bytes, g.target_bytes] for g in plan.groups},
        "units": {op: sum(unit.op == op for unit in plan.units) for op in sorted({unit.op for unit in plan.units})},
        "largest_unit_bytes": plan.largest_unit_bytes,
    }


@pytest.mark.parametrize("name", ["convert-tp2", "w4afp8-tp2", "block_wise_fp8-tp1"])
def test_plans_of_the_demo_model_are_as_recorded(demo: Path, name: str) -> None:
    """A change here changes artifacts: record it on purpose (delete the file and run the test twice)."""
    scheme, tp = name.split("-tp")
    plan = plan_of(demo, tp=int(tp), scheme=None if scheme == "convert" else get_scheme(scheme))
    path = GOLDEN / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(facts(plan), indent=1, sort_keys=True) + "\n")
        pytest.fail(f"{path.name} was missing and has been recorded; look at it and run again")
    assert facts(plan) == json.loads(path.read_text())


def test_the_456b_model_plans_without_a_weight(shared: Path) -> None:
    plan = plan_of(shared / "reference" / "minimax-m1", tp=8, scheme=get_scheme("w4afp8"))
    groups = {g.group: g for g in plan.groups}
    assert groups["experts"].tensors == 7680 and groups["experts"].parameters == 434_865_438_720
    assert plan.source_summary["bytes"] == 912_210_767_872
    # 4 bits a code and a float32 scale for 128 of them
    assert groups["experts"].target_bytes == 434_865_438_720 * 17 // 32
    assert len(plan.rank_files) == 8 and max(file.size_bytes for file in plan.files) <= (4 << 30) + (8 << 20)
    assert sum(len(file.tensors) for file in plan.files) == 86_264
    assert plan.largest_unit_bytes < 256 << 20


def test_a_plan_is_the_same_whoever_makes_it(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=256)
    one = plan_of(source, tp=2, scheme=get_scheme("w4afp8"))
    shutil.copytree(source, tmp_path / "elsewhere")
    two = plan_of(tmp_path / "elsewhere", tp=2, scheme=get_scheme("w4afp8"))
    assert one.digest == two.digest == digest(one.document())
    assert canonical_json(one.document()) == canonical_json(two.document())


def test_the_two_digests_tell_values_from_places(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=512)
    base = plan_of(source, tp=1, scheme=get_scheme("w4afp8"))
    other_tp = plan_of(source, tp=2, scheme=get_scheme("w4afp8"))
    other_scheme = plan_of(source, tp=1, scheme=get_scheme("w4afp8", group_size=256 - 128))
    rotated = plan_of(source, tp=1, scheme=get_scheme("w4afp8", hadamard_block=256))
    assert base.numerics_digest == other_tp.numerics_digest and base.placement_digest != other_tp.placement_digest
    assert base.digest == other_scheme.digest  # group 128 is the default
    assert base.numerics_digest != rotated.numerics_digest and base.placement_digest == rotated.placement_digest
    assert len({base.digest, other_tp.digest, rotated.digest}) == 3


@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("scheme", [None, *SCHEMES])
def test_units_write_every_byte_of_every_tensor_once(tmp_path: Path, scheme: str | None, tp: int) -> None:
    source = make_checkpoint(tmp_path / "source", hidden=128, intermediate=512, vocab=100)
    plan = plan_of(source, tp=tp, scheme=None if scheme is None else get_scheme(scheme))
    written: dict[tuple[int, str], int] = {}
    for unit in plan.units:
        for output in unit.outputs:
            written[output.rank, output.spec.name] = written.get((output.rank, output.spec.name), 0) + output.size_bytes
    planned = {
        (rank, tensor.name): tensor.size_bytes
        for rank, files in enumerate(plan.rank_files)
        for index in files
        for tensor in plan.files[index].tensors
    }
    assert written == planned
    assert sum(unit.read_bytes for unit in plan.units) == plan.source_summary["bytes"]


def damaged(source: Path, change: Any) -> list[str]:
    """Problems of the plan after `change` to the tensors of the checkpoint's only file."""
    file = source / "model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    try:
        plan_of(source)
    except Problems as problems:
        return [problem.render() for problem in problems.problems]
    except MxconvError as problem:
        return [problem.render()]
    return []


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("plan") / "model", files=1, layers="ls", experts=2, shared=32)


def names_of(source: Path) -> list[str]:
    return sorted(load_file(source / "model.safetensors"))


@pytest.mark.parametrize("kind", ["delete", "rename", "reshape", "retype", "duplicate"])
def test_no_tensor_can_be_lost_or_invented(one_file: Path, tmp_path: Path, kind: str) -> None:
    """Each tensor of a model in turn deleted, renamed, reshaped, retyped or duplicated: all caught before any output, by name."""
    for number, name in enumerate(names_of(one_file)):
        source = Path(shutil.copytree(one_file, tmp_path / f"{number}"))

        def change(tensors: dict[str, Any], name: str = name) -> dict[str, Any]:
            value = tensors[name]
            if kind == "delete":
                del tensors[name]
            elif kind == "rename":
                tensors[name + "_scale_inv"] = tensors.pop(name)
            elif kind == "reshape":
                tensors[name] = value.reshape(1, *value.shape)
            elif kind == "retype":
                tensors[name] = value.to(torch.int8)
            else:
                tensors[name.replace("model.", "module.", 1) if name.startswith("model.") else "copy." + name] = value.clone()
            return tensors

        found = damaged(source, change)
        where = ".".join(name.split(".")[:6]) if ".experts." in name else name
        if kind == "duplicate":
            where = name.removeprefix("model.")
        assert found and any(where in line for line in found), (kind, name, found)


def test_all_problems_come_together(one_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(one_file, tmp_path / "model"))

    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        del tensors["model.norm.weight"]
        del tensors["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
        tensors["model.extra.weight"] = tensors["lm_head.weight"].clone()
        return tensors

    found = damaged(source, change)
    assert len(found) == 4
    assert any("have 1 of 2 experts" in line for line in found)


def test_the_first_of_3_4_7_2_decides_the_exit_code(one_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(one_file, tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(Problems) as caught:
        plan_of(source, tp=3)
    assert {problem.exit_code for problem in caught.value.problems} == {2, 4} and caught.value.exit_code == 4


def test_drop_leaves_out_what_is_named_and_the_plan_says_so(one_file: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(one_file, tmp_path / "model"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.mtp.weight"] = tensors["model.norm.weight"].clone()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(MxconvError, match="not one of this model's"):
        plan_of(source)
    plan = build_plan(open_source(source, drop=["model.mtp.*"]), Request(drop=("model.mtp.*",)))
    assert "model.mtp.weight" in plan.dropped
    assert not any(tensor.name == "model.mtp.weight" for file in plan.files for tensor in file.tensors)


def test_a_cut_unit_covers_its_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces far smaller than in real life: every tensor is cut, at rank borders and inside them, padding included."""
    import mxconv.plan.pieces as pieces
    from mxconv.execute import RunOptions, convert

    source = make_checkpoint(tmp_path / "source", vocab=100, heads=8, kv_heads=2, shared=32)
    whole = {tp: tmp_path / f"whole{tp}" for tp in (1, 2, 4)}
    for tp, folder in whole.items():
        convert(source, folder, tp=tp)
    for size in (1 << 10, 3000, 1 << 13):
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        monkeypatch.setattr(pieces, "MINIMUM_ROWS", random.Random(size).choice([1, 3, 16]))
        monkeypatch.setattr("mxconv.execute.reading.BLOCK_BYTES", 700)
        for tp, folder in whole.items():
            cut = tmp_path / f"cut{tp}-{size}"
            convert(source, cut, tp=tp, options=RunOptions(workers=2))
            for file in folder.rglob("*.safetensors"):
                assert (cut / file.relative_to(folder)).read_bytes() == file.read_bytes()
