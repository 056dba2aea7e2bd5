"""Several processes that run one verification together, over `torch.distributed`.

`joined(place, device, …)` takes this process into the world that `place` (RANK, WORLD_SIZE …) describes and, whatever happens
inside, leaves it so that no other process is left waiting. Two groups: gloo for objects and for tensors on the CPU, NCCL for
tensors on GPUs, one GPU a process. Waiting for a peer may take long (a layer of a 456B model, on a CPU), so that the groups'
timeouts are generous; what ends the others within seconds when one fails is watch.py.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]  # exported, and not said so

from mxconv.errors import EXIT_BUG, EXIT_SIGTERM, Interrupted, MxconvError, ResourceError, UsageError
from mxconv.membership import Membership
from mxconv.runtime.parallel import Group, ProcessRanks
from mxconv.runtime.watch import LOST_SECONDS, Failure, Speak, Watch, known_failure, of_this_run, report
from mxconv.runtime.world import everywhere

MEET_SECONDS, AGENT_SECONDS = 60, 10
"""Until the store must be there: one that rank 0 opens, and one that a launcher had before it started anybody."""
GROUP_HOURS = 24
"""The timeout of gloo collectives: rank 0 may hash an artifact, or a peer run a lane of its own, in the meantime."""
NCCL_MINUTES = 30
CONNECT_SECONDS, POLL_SECONDS = 5.0, 0.1
DONE_SECONDS = 5.0

T = TypeVar("T")


class Processes:
    """See `World`: the processes of gloo's default group."""

    def __init__(self, place: Membership, store: Store, device: str) -> None:
        self.rank, self.size = place.rank, place.size
        self._store = store
        self._rounds = 0
        self._agreed: MxconvError | None = None
        self.device = everywhere(self, lambda: device_of(place, device))
        """This process's own, where `device` is what all of them were given."""
        self._data = _nccl(self.device) if self.device.startswith("cuda") else None
        """The group that moves tensors of the model, None for gloo's own."""

    def group(self, ranks: int) -> Group:
        """See `World.group`; what fails while one rank computes its part is raised in all."""
        return ProcessRanks(group=self._data, size=ranks, settle=self._settle)

    def fast_group(self, ranks: int) -> Group:
        """The same without asking before every sum whether all can go on: for speed, and for what a CUDA graph captures."""
        return ProcessRanks(group=self._data, size=ranks)

    def _settle(self, compute: Callable[[], Tensor]) -> Tensor:
        return everywhere(self, compute)

    def share_out(self, steps: Sequence[Callable[[], T]]) -> list[T]:
        """See `World.share_out`: a counter in the store hands the steps out."""
        self._rounds += 1
        counter, done, error = f"steps/{self._rounds}", dict[int, T](), None
        while (number := self._store.add(counter, 1) - 1) < len(steps):
            try:
                done[number] = steps[number]()
            except MxconvError as caught:
                error = caught
                self._store.add(counter, len(steps))  # nobody needs to begin another
        self.agree(error)
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(done, gathered, dst=0)
        results = {number: result for each in gathered or () for number, result in each.items()}
        return [results[number] for number in sorted(results)]

    def agree(self, error: MxconvError | None) -> None:
        """See `World.agree`."""
        flags = torch.tensor([error is not None], dtype=torch.uint8)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        if not flags.item():
            return
        errors: list[MxconvError | None] = [None] * self.size
        dist.all_gather_object(errors, error)
        self._agreed = next(each for each in errors if each is not None)
        raise self._agreed

    def settled(self, error: MxconvError) -> bool:
        """See `World.settled`."""
        return error is self._agreed

    def tell(self, value: T) -> T:
        """See `World.tell`."""
        box = [value if self.rank == 0 else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[return-value]

    def fetch(self, owner: int, tensor: Tensor | None) -> Tensor | None:
        """See `World.fetch`."""
        if self.rank not in (0, owner) or owner == 0:
            return tensor if self.rank == owner else None
        if self.rank == owner and tensor is not None:
            plain = tensor.detach().cpu().contiguous()
            dist.send_object_list([(tuple(plain.shape), plain.dtype)], dst=0)
            dist.send(plain.reshape(-1).view(torch.uint8), dst=0)
            return None
        facts: list[Any] = [None]
        dist.recv_object_list(facts, src=owner)
        shape, dtype = facts[0]
        found = torch.empty(shape, dtype=dtype)
        dist.recv(found.reshape(-1).view(torch.uint8), src=owner)
        return found


def device_of(place: Membership, device: str) -> str:
    """The device of this process: `cuda` is the GPU of its local rank. Raises UsageError for one GPU asked of several processes."""
    if device == "cpu" or (device != "cuda" and place.size == 1):
        return device
    if device != "cuda":
        raise UsageError("several processes cannot share one GPU", expected="--device cuda or cpu", got=f"--device {device}")
    found = torch.cuda.device_count()
    if place.local_rank >= found:
        raise UsageError(
            "there are fewer GPUs than processes on this machine", expected=f"at least {place.local_rank + 1}", got=found,
            hint="start as many processes as there are GPUs, or use --device cpu",
        )  # fmt: skip
    return f"cuda:{place.local_rank}"


@contextmanager
def joined(place: Membership, device: str, speak: Speak, quiet: Callable[[], None]) -> Iterator[Processes]:
    """Be one of the processes of `place`, each computing on its own part of `device` (`cuda`: a GPU each); all leave together.

    `speak` tells the user what failed, wherever it failed; only the process whose turn it is calls it. `quiet` silences a
    process that has others to speak for it, once they can. Raises ResourceError when the others cannot be met.
    """
    store = _meet(place, keeper=place.rank == 0 and not place.agent_store)
    # The watch has a connection of its own: the other is taken while a group waits there for a peer to appear.
    watch = Watch(_meet(place, keeper=False), place, speak)
    if place.follower:
        quiet()
    watch.start()
    try:
        dist.init_process_group(
            "gloo", store=PrefixStore("gloo", store), rank=place.rank, world_size=place.size, timeout=timedelta(hours=GROUP_HOURS)
        )
        yield Processes(place, PrefixStore("world", store), device)
        dist.barrier()
        _leave(place, store, watch)
    except BaseException as error:
        os._exit(_fail(place, watch, error))  # the interpreter's own way out could wait for peers that are gone


def _meet(place: Membership, *, keeper: bool) -> Store:
    """A connection to the store where the processes meet; the `keeper` opens it."""
    try:
        seconds = AGENT_SECONDS if place.agent_store else MEET_SECONDS
        if not keeper:
            _await_keeper(place, time.monotonic() + seconds)
        connect = timedelta(seconds=CONNECT_SECONDS)
        store = TCPStore(place.address, place.port, is_master=keeper, timeout=connect, wait_for_workers=False)
        store.set_timeout(timedelta(seconds=seconds))
    except (OSError, RuntimeError, ValueError) as error:
        raise ResourceError(
            f"the processes cannot meet: {str(error).splitlines()[0]}", where=f"{place.address}:{place.port}",
            hint="RANK, WORLD_SIZE, MASTER_ADDR … are set: is another process of this group running there?",
        ) from None  # fmt: skip
    return of_this_run(store)


def _await_keeper(place: Membership, deadline: float) -> None:
    """Until somebody listens; raises the OSError of the last try after `deadline`.

    TCPStore waits for that too, but in growing pauses (28 s where 10 were allowed), and no signal comes through meanwhile.
    """
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=CONNECT_SECONDS).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
        time.sleep(POLL_SECONDS)


def _nccl(device: str) -> dist.ProcessGroup:
    """NCCL's group, beside the default one."""
    # Multicast over NVLink hangs on some machines, and the all-reduces here are not what a verification waits for.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    torch.cuda.set_device(torch.device(device))
    return dist.new_group(backend="nccl", timeout=timedelta(minutes=NCCL_MINUTES))


def _leave(place: Membership, store: Store, watch: Watch) -> None:
    watch.stop()
    dist.destroy_process_group()
    deadline = time.monotonic() + DONE_SECONDS
    # Whoever keeps the store leaves last: the others' watches still look into it.
    while place.rank == 0 and not place.agent_store and time.monotonic() < deadline:
        if all(store.add(f"done/{rank}", 0) for rank in range(place.size)):
            break
        time.sleep(0.02)


def _fail(place: Membership, watch: Watch, error: BaseException) -> int:
    """Make known why this process ends, or find out which other one made it end; the exit code.

    A connection that broke, or a launcher's SIGTERM, is most often the end of another process: its own words, or the watch's look
    at it, come first, and the watch ends this process meanwhile.
    """
    for number in (signal.SIGTERM, signal.SIGINT):  # this process is on its way out; what else is sent must not cut that short
        signal.signal(number, signal.SIG_IGN)
    watch.resigned = True
    terminated = isinstance(error, Interrupted) and error.exit_code == EXIT_SIGTERM
    if terminated:
        watch.look_at_peers(time.monotonic())
    if _broken_connection(error) or (terminated and known_failure(watch.store)):
        time.sleep(LOST_SECONDS + DONE_SECONDS)
    watch.ending = True
    code, own = _as_error(error)
    trace = "" if code != EXIT_BUG else "".join(traceback.format_exception(error))
    try:
        report(watch.store, Failure(rank=place.rank, speaker=0, error=own, trace=trace))
        if not place.follower or not watch.await_told():
            watch.say(own, trace)
    except dist.DistError:  # rank 0 kept the store, failed too, and has spoken
        if not place.follower:
            raise
    sys.stdout.flush()
    return code


def _as_error(error: BaseException) -> tuple[int, MxconvError]:
    """(exit code, error) of whatever ended this process, as the command line's session sees it."""
    if isinstance(error, KeyboardInterrupt):
        error = Interrupted("stopped by interrupt")
    elif isinstance(error, MemoryError | torch.OutOfMemoryError):
        error = ResourceError("out of memory", hint="lower --memory, or give the machine more")
    elif isinstance(error, OSError):
        error = ResourceError(f"input or output failed: {error.strerror or error}", where=error.filename)
    elif _broken_connection(error):
        error = ResourceError(f"the connection to another process broke: {str(error).splitlines()[0]}")
    elif not isinstance(error, MxconvError):
        error = MxconvError(f"a bug in mxconv: {type(error).__name__}: {error}", hint="please report it with the lines above")
    return error.exit_code, error


def _broken_connection(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))
