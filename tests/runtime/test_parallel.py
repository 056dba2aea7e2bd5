"""Ranks in processes of their own (gloo) give the bits that the same ranks give one after the other in one process."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed import DistNetworkError

from mxconv.checkpoint import ByteReader
from mxconv.errors import IntegrityError, MalformedInput, Problems, ResourceError, UsageError
from mxconv.membership import Membership, read_membership
from mxconv.quantize.schemes import SCHEMES
from mxconv.runtime import Model, generate, open_weights
from mxconv.runtime.parallel import LocalRanks, ranks_of
from mxconv.runtime.processes import _meet, device_of
from mxconv.runtime.watch import Watch
from mxconv.runtime.world import ALONE, World
from tests.members import in_processes, need_gpus
from tests.oracle.fastdeploy_writer import write_artifact
from tests.runtime.helpers import QUANTIZABLE, error, gathered_absmax, split_call
from tests.synthetic import make_checkpoint, random_ids

VOCAB = QUANTIZABLE["vocab"]


def logits_of(world: World, folder: Path, tp: int | None = None, *, briefly: bool = False) -> dict[str, Any]:
    """What a model says in every way that it can be asked (`briefly`: in two), and which folders its weights came from."""
    read: list[str] = []
    original = ByteReader.read

    def counted(self: ByteReader, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        read.append(Path(self._files[tensor.file].path).parent.name)
        return original(self, tensor, *args, **kwargs)

    ByteReader.read = counted  # type: ignore[method-assign]
    ids, mask = random_ids(VOCAB, 2, 300), torch.ones(2, 300, dtype=torch.bool)
    mask[0, 100:140] = False
    weights = open_weights(folder, tp=tp)
    found: dict[str, Any] = {}
    with torch.inference_mode():
        streamed = Model(weights, stream=True, group=world.group(weights.tp))
        found["streamed"] = streamed(ids[:, :40])
        found["folders"] = sorted(set(read))
        kept = Model(weights, group=world.group(weights.tp))
        found["weights only"] = kept(ids[:, :40], activations="none")
        if briefly:
            ByteReader.read = original  # type: ignore[method-assign]
            return found
        found["kept"] = kept(ids[:, :40])
        found["masked"] = kept(ids, mask=mask)
        found["in pieces"] = split_call(kept, ids[:, :40], [7, 8, 30])
        found["bf16"] = Model(weights, dtype=torch.bfloat16, group=world.group(weights.tp))(ids[:, :40])
        found["blocks"] = [(start, block) for start, block in kept.head_blocks(kept.embed(ids[:, :8]), block=24)]
    found["tokens"] = list(generate(kept, [1, 2, 3], max_tokens=12, eos_ids=()))
    ByteReader.read = original  # type: ignore[method-assign]
    return found


def same(a: Any, b: Any) -> bool:
    """Equal to the bit, all the way down."""
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) and not a.isnan().any()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def everything(world: World, artifacts: dict[str, Path], source: Path, tp: int) -> dict[str, Any]:
    """All that one group of processes is asked."""
    brief = ("w4afp8_static", "w4a8", "block_wise_fp8", "tensor_wise_fp8")
    found: dict[str, Any] = {name: logits_of(world, folder, briefly=name in brief) for name, folder in artifacts.items()}
    found["source"] = logits_of(world, source, tp)
    if world.size > 1:
        found["world"] = of_the_world(world)
    return found


def _broken(world: World, culprit: int) -> Tensor:
    if world.rank == culprit:
        raise MalformedInput("only here", where="a file", expected="one", got="two")
    return torch.ones(3)


def of_the_world(world: World) -> dict[str, Any]:
    """What a world does besides moving partial results."""
    found: dict[str, Any] = {}
    pids = world.share_out([lambda number=number: (number, os.getpid()) for number in range(40)])
    found["steps"] = [number for number, _ in pids]
    found["told"] = world.tell({"from": world.rank})
    mine = torch.full((2, 3), 7.0, dtype=torch.bfloat16) if world.rank == 1 else None
    found["fetched"] = world.fetch(1, mine)
    for name, raising in {
        "sum": lambda: world.group(4).sum(lambda rank: _broken(world, 1)),
        "share": lambda: world.group(4).share(3, lambda: _broken(world, world.size - 1), (3,), torch.ones(1)),
        "step": lambda: world.share_out([lambda: _broken(world, world.rank)]),
        "agree": lambda: world.agree(Problems([UsageError("a"), IntegrityError("b")]) if world.rank == 1 else None),
    }.items():
        try:
            raising()
        except (MalformedInput, Problems) as caught:
            found[name] = (type(caught).__name__, caught.exit_code, caught.render(), world.settled(caught))
    # The group still works: everybody came out of these at the same place.
    found["after"] = world.group(4).sum(lambda rank: torch.tensor([float(10**rank)]))
    found["nothing"] = world.group(4).sum(lambda rank: torch.ones(0, 5))
    try:
        world.group(world.size + 1)
    except UsageError as caught:
        found["uneven"] = caught.exit_code
    return found


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("parallel") / "source", **QUANTIZABLE, shared=64)


@pytest.fixture(scope="module")
def written(source: Path) -> Callable[[str | None, int], Path]:
    """`written(scheme, tp)`: the artifact of an independent writer."""
    plain = {**QUANTIZABLE}
    quantizable = make_checkpoint(source.parent / "plain", **plain)

    def write(scheme: str | None, tp: int) -> Path:
        rotation = {} if scheme is None else dict(SCHEMES[scheme].rotation)
        static = scheme is not None and SCHEMES[scheme].static
        absmax = gathered_absmax(Model(open_weights(quantizable)), random_ids(VOCAB, 1, 40), rotation) if static else None
        return write_artifact(quantizable, source.parent / f"{scheme}-{tp}", tp=tp, scheme=scheme, absmax=absmax)

    return write


@pytest.mark.parametrize(("processes", "tp"), [(2, 4), (4, 4)])
def test_the_same_bits(source: Path, written: Callable[[str | None, int], Path], processes: int, tp: int) -> None:
    """Every scheme, and a source cut into ranks; two processes compute two ranks each, four one."""
    names = [None, *SCHEMES] if processes == 4 else [None, "w4afp8", "w4afp8_static"]
    artifacts = {str(name): written(name, tp) for name in names}
    alone = everything(ALONE, artifacts, source, tp)
    together = in_processes(processes, everything, artifacts, source, tp)
    for rank, found in enumerate(together):
        world = found.pop("world")
        for name, expected in alone.items():
            for way, value in expected.items():
                if way != "folders":
                    assert same(value, found[name][way]), (rank, name, way)
        own = [f"rank{r}" for r in ranks_of(rank, processes, tp)]
        for name in artifacts:
            assert found[name]["folders"] == own, "a rank reads its own shard alone"
        assert world["steps"] == (list(range(40)) if rank == 0 else [])
        assert world["told"] == {"from": 0}
        fetched = world["fetched"]
        assert (fetched is None) == (rank != 0) and (rank or torch.equal(fetched, torch.full((2, 3), 7.0).bfloat16()))
        words = "a file: only here (expected one, got two)"
        for name in ("sum", "share", "step"):
            assert world[name] == ("MalformedInput", 3, words, True), name
        assert world["agree"][:2] == ("Problems", 2) and "- b" in world["agree"][2] and world["agree"][3]
        assert world["after"].tolist() == [1111.0] and world["nothing"].shape == (0, 5) and world["uneven"] == 2


def test_ranks_are_shared_out_in_order() -> None:
    assert [ranks_of(process, 4, 8) for process in range(4)] == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]
    with pytest.raises(UsageError, match=r"1 or 2 or 4 or 8 processes.*got 3"):
        ranks_of(0, 3, 8)


def test_alone() -> None:
    """A process of its own is a world of one."""
    assert ALONE.share_out([lambda: 1, lambda: 2]) == [1, 2]
    assert ALONE.group(3) == LocalRanks(3) and ALONE.tell("x") == "x"
    x = torch.ones(2)
    assert ALONE.fetch(0, x) is x
    ALONE.agree(None)
    with pytest.raises(IntegrityError):
        ALONE.agree(IntegrityError("no"))


PLACE = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}


def test_membership_is_read_from_the_variables_of_torchrun() -> None:
    found = read_membership({**PLACE, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    assert found == Membership(rank=1, size=4, local_rank=1, address="host", port=29500, agent_store=True)
    assert found is not None and found.follower and read_membership(found.environment()) == found
    assert found.launcher is None and read_membership({**PLACE, "MXCONV_LAUNCHER": "77"}) == replace(
        found, agent_store=False, launcher=77
    )
    for name in PLACE:  # a shell may have some of them for reasons of its own
        assert read_membership({key: value for key, value in PLACE.items() if key != name}) is None


@pytest.mark.parametrize("wrong", [
    {"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": "2"}, {"MASTER_PORT": "http"}, {"MXCONV_LAUNCHER": "me"},
])  # fmt: skip
def test_contradicting_variables_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        read_membership({**PLACE, **wrong})


def test_devices() -> None:
    place = read_membership(PLACE)
    assert place is not None
    assert device_of(place, "cpu") == "cpu"
    with pytest.raises(UsageError, match="cannot share one GPU"):
        device_of(place, "cuda:0")
    if torch.cuda.device_count() < 2:
        with pytest.raises(UsageError, match="fewer GPUs than processes"):
            device_of(place, "cuda")


def test_waiting_for_a_store_that_nobody_opens(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends when it is to, and a signal comes through."""

    def handle(*_: object) -> None:
        raise KeyboardInterrupt

    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        place = Membership(rank=1, size=2, local_rank=1, address="127.0.0.1", port=nobody.getsockname()[1])
        monkeypatch.setattr("mxconv.runtime.processes.MEET_SECONDS", 0.3)
        with pytest.raises(ResourceError, match=r"cannot meet.*refused"):
            _meet(place, keeper=False)
        monkeypatch.setattr("mxconv.runtime.processes.MEET_SECONDS", 60)
        before, began = signal.signal(signal.SIGALRM, handle), time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        try:
            with pytest.raises(KeyboardInterrupt):
                _meet(place, keeper=False)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        assert time.monotonic() - began < 20


def test_a_store_that_is_gone_ends_the_process() -> None:
    """From the first moment on, and though there is no terminal to say so."""

    class Gone:
        def set(self, *_: object) -> None:
            raise DistNetworkError("Connection reset by peer")

    def speak(*_: object) -> None:
        raise BrokenPipeError

    place = Membership(rank=0, size=2, local_rank=0, address="", port=1, agent_store=True)
    watch = Watch(Gone(), place, speak, leave=sys.exit)  # type: ignore[arg-type]
    with pytest.raises(SystemExit) as ended:
        watch._run()
    assert ended.value.code == 6


@pytest.mark.gpu
def test_one_rank_over_nccl(source: Path, written: Callable[[str | None, int], Path]) -> None:
    """The NCCL path with the one rank that one GPU can hold: the bits of the plain run on the same GPU."""
    artifacts = {str(name): written(name, 1) for name in (None, "w4afp8", "block_wise_fp8")}
    (found,) = in_processes(1, on_gpus, artifacts, device="cuda")
    for name, expected in on_gpus(ALONE, artifacts).items():
        assert same(expected, found[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("processes", [2, 4, 8])
def test_ranks_over_nccl(source: Path, written: Callable[[str | None, int], Path], processes: int) -> None:
    """A GPU a rank: the single-process run to what float32 sums in another order differ by, the same bits in every process."""
    need_gpus(processes)
    tp = min(processes, 4)
    artifacts = {str(name): written(name, tp) for name in (None, *SCHEMES)} if processes <= 4 else {}
    if not artifacts:
        eight = make_checkpoint(source.parent / "eight", **{**QUANTIZABLE, "intermediate": 1024})
        artifacts = {"None": write_artifact(eight, source.parent / "None-8", tp=8, scheme=None)}
    together = in_processes(processes, on_gpus, artifacts, device="cuda")
    for name, expected in on_gpus(ALONE, artifacts).items():
        for found in together:
            assert same(found[name], together[0][name]), name
        assert error(together[0][name]["weights only"], expected["weights only"]) <= 2e-6


def on_gpus(world: World, artifacts: dict[str, Path]) -> dict[str, Any]:
    """Logits in float32 on the CPU, weights only and as served, and tokens."""
    found = {}
    ids = random_ids(VOCAB, 2, 300)
    for name, folder in artifacts.items():
        weights = open_weights(folder)
        device = f"cuda:{torch.cuda.current_device()}"
        with torch.inference_mode():
            model = Model(weights, device=device, group=world.group(weights.tp))
            found[name] = {
                "weights only": model(ids, activations="none").cpu(), "served": model(ids).cpu(),
                "tokens": list(generate(model, [1, 2, 3], max_tokens=8, eos_ids=())),
            }  # fmt: skip
    return found
