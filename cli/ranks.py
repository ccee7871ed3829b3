"""Processes of one run under torchrun: their roles, how they agree, and how a failure of one ends all.

Consecutive ranks hold one network together (tp.py); further ranks are replicas, which divide the samples. Whatever
depends on a clock, a terminal, free memory or chance, rank 0 decides for all. Without torchrun there is one process,
and everything here returns what it is given.

There are three ways to wait. `share` broadcasts the value of rank 0, which may wait for a person or a pipe. `gather`
and `wait` are for uneven work. `all` and `agree` are for even work: they time out, which ends a run in which a rank
hangs. In each, the death of a process is noticed at once.
"""

import atexit
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from cli.system import Stream
from engine.scheduler import Queue
from tp import WHOLE, Shard

T = TypeVar("T")

SHORT = timedelta(minutes=10)  # the longest that a rank may compile
LONG = timedelta(days=30)  # waiting for a download, a batch or a person
FAILURES = (ValueError, OSError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Ranks:
    """Roles of this process. shard: its part of the network. local: its rank on its machine; local_world_size: the
    processes there. control: process group for Python objects with a short timeout; patient: the same with a long one;
    store: torch.distributed's, for counters; None for a single process."""

    rank: int = 0
    replica: int = 0
    replicas: int = 1
    shard: Shard = WHOLE
    local: int = 0
    local_world_size: int = 1
    control: dist.ProcessGroup | None = None
    patient: dist.ProcessGroup | None = None
    store: dist.Store | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank decides and writes."""
        return self.rank == 0

    def all(self, value: T, patient: bool = False) -> list[T]:
        """Gather every rank's value, in rank order."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.patient if patient else self.control)
        return values

    def agree(self, make: Callable[[], T], patient: bool = False) -> T:
        """Run `make` on each rank and return its result. If it fails on any, all end: rank 0 with a ValueError giving
        the first reason, the others with status 2. patient: one rank may take much longer than others."""
        value, error = self.attempt(make)
        self.exit_if([each for each in self.all(error, patient) if each is not None])
        return value  # type: ignore[return-value]

    def check_equal(self, value: T, error: str) -> None:
        """End all ranks with an error if their values differ."""
        values = self.all(value)
        self.exit_if([f"{error} on all machines of a run"] * (values != values[:1] * len(values)))

    def share(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 and broadcast its result, however long it takes. If it fails all end, as in `agree`."""
        found = [self.attempt(make) if self.leads else (None, None)]
        if self.control is not None:
            dist.broadcast_object_list(found, 0, group=self.patient)
        value, error = found[0]
        self.exit_if([] if error is None else [error])
        return value  # type: ignore[return-value]

    def attempt(self, make: Callable[[], T]) -> tuple[T | None, str | None]:
        """Return the result of `make`, or its error as text. A single process raises it."""
        try:
            return make(), None
        except FAILURES as failure:
            if self.control is None:
                raise
            return None, f"rank {self.rank}: {failure}" if self.rank else str(failure)

    def exit_if(self, errors: Sequence[str]) -> None:
        """End all ranks if there are errors."""
        if errors and self.leads:
            raise ValueError(errors[0])
        if errors:
            with suppress(RuntimeError):  # until rank 0 has printed it and exited: the first exit ends all
                dist.barrier(self.control)
            raise SystemExit(2)

    def gather(self, value: T) -> list[T]:
        """Gather the value of every replica on all ranks, however long one takes."""
        return self.all(value, patient=True)[:: self.shard.world]

    def wait(self) -> None:
        """Wait for all ranks, some of which may have had more to do."""
        if self.patient is not None:
            dist.barrier(self.patient)

    def samples(self, total: int) -> range:
        """Return the indices of the samples that this replica draws; the first replicas draw the most. Raises
        ValueError if there are fewer samples than replicas."""
        if 0 < total < self.replicas:
            raise ValueError(
                f"-n {total} is less than one sample for each of {self.replicas} replicas: pass a larger -n or --tp"
            )
        begin, end = (-(-replica * total // self.replicas) for replica in (self.replica, self.replica + 1))
        return range(begin, end)

    def count(self, name: str, more: int = 1) -> int:
        """Add to a counter of all ranks, and return its value before."""
        assert self.store is not None, "a single process counts by itself"
        return self.store.add(name, more) - more

    def queue(self, name: str, more: bool = False) -> Queue | None:
        """Return a queue of numbers that all replicas share; all ranks of a network take the same. None: there is only
        one replica. more: whether another queue follows."""
        if self.replicas == 1:
            return None

        def take() -> int:
            number = self.count(name) if self.shard.rank == 0 else 0
            return int(self.shard.broadcast(torch.tensor([number])))

        return Queue(take, self.replicas, self.replica == 0, more)

    def describe(self, report: dict[str, Any]) -> dict[str, Any]:
        """Return the report's fields that cover all ranks, given that of rank 0."""
        counts, rates = (self.gather(report[name]) for name in ("num_samples", "tokens_per_s"))
        total = None if None in rates else sum(rates)
        return {"num_samples": sum(counts), "tokens_per_s": total, "tp": self.shard.world, "replicas": self.replicas}


class Listener(Stream):
    """stdout of the writing rank. If its reader leaves, the run continues, since other ranks take part in it."""

    def failed(self, error: OSError) -> None:
        if not isinstance(error, BrokenPipeError):
            raise error
        self.stream = open(os.devnull, "w")


def join(tp: int | None, device: torch.device) -> Ranks:
    """Join the processes that torchrun started. tp: ranks per network; None: those of a machine. Raises ValueError if
    they cannot be divided so, or if a machine has too few devices."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if tp not in (None, 1):
            raise ValueError(f"--tp {tp} needs {tp} processes: run torchrun --nproc_per_node={tp} generate.py ...")
        return Ranks()
    rank, world, local, local_world_size = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    store, *_ = next(dist.rendezvous("env://", timeout=SHORT))
    if local_world_size == world:  # on one machine torchrun's store outlives a restart, with its old addresses
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=SHORT)
    atexit.register(leave)
    control, patient = (dist.new_group(backend="gloo", timeout=each) for each in (SHORT, LONG))
    alone = Ranks(rank, control=control)
    machines = alone.all(local_world_size)
    each = alone.agree(lambda: group_size(tp, world, machines))
    alone.agree(lambda: take_device(device, local))
    group, _ = dist.new_subgroups(each, timeout=SHORT)
    # A whole network needs no all-reduce; a single process runs it all the same, as a check.
    shard = Shard(rank % each, each, group.group_name if each > 1 or world == 1 else "")
    return Ranks(rank, rank // each, world // each, shard, local, local_world_size, control, patient, store)


def group_size(tp: int | None, world: int, machines: Sequence[int]) -> int:
    """Return the ranks per network: those of a machine unless tp is given. machines: processes on each rank's."""
    each = machines[0] if tp is None else tp
    if world % each or (tp is None and len(set(machines)) > 1):
        fits = " or ".join(str(number) for number in range(1, world + 1) if world % number == 0)
        raise ValueError(
            f"{world} processes cannot be divided into groups of {each}: pass --tp {fits} (1: one replica per process)"
        )
    return each


def take_device(device: torch.device, local: int) -> None:
    """On CUDA, select a device of its own for each process of a machine. Raises ValueError if there are too few."""
    if device.type != "cuda":
        return
    if device.index is not None or local >= torch.cuda.device_count():
        raise ValueError(
            f"{device} is not available to process {local} ({torch.cuda.device_count()} GPUs): pass --device cuda and "
            "start at most one process per GPU"
        )
    torch.cuda.set_device(local)


def restarted() -> bool:
    """Return whether torchrun --max-restarts started this process again after one died."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def lost_rank(error: BaseException) -> str | None:
    """Explain a failed collective to the user; None if the error is another."""
    known = isinstance(error, dist.DistError) or re.search("gloo|nccl", str(error), re.IGNORECASE)
    if not dist.is_initialized() or not known:
        return None
    return f"rank {dist.get_rank()} lost the connection to another rank, which has exited or cannot be reached"


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
