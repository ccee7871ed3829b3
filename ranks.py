"""The processes of one run under torchrun: who is who, what they agree on, and how one of them fails.

Consecutive ranks hold one network together (tp.py); where there are more, replicas of it divide the samples. What a run
decides from a clock, a terminal, free memory or chance, rank 0 decides for all. Without torchrun a run is alone, and
everything here gives back what it is given.
"""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from tp import WHOLE, Shard

T = TypeVar("T")

# How long a rank waits for the others inside a run: as long as one may compile. A process that died is noticed at once.
PATIENCE = timedelta(minutes=10)
# Between runs, the others wait for what a person writes.
CONVERSATION = timedelta(days=1)
FAILURES = (ValueError, OSError, torch.OutOfMemoryError)


@dataclass(frozen=True)
class Ranks:
    """This process among all. shard: its part of the network. local: its place, and neighbours: how many there are, on
    its machine. control: the group that speaks of the run itself; None: this process is alone."""

    rank: int = 0
    replica: int = 0
    replicas: int = 1
    shard: Shard = WHOLE
    local: int = 0
    neighbours: int = 1
    control: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether it decides, and writes."""
        return self.rank == 0

    def all(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if self.control is None:
            return [value]
        values: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self.control)
        return values

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` gives on each rank. Where it fails on any, all end: rank 0 by a ValueError with the first's
        reason, the others with status 2."""
        value, error = None, None
        try:
            value = make()
        except FAILURES as failure:
            if self.control is None:
                raise
            error = f"rank {self.rank}: {failure}" if self.rank else str(failure)
        if found := [each for each in self.all(error) if each is not None]:
            if self.leads:
                raise ValueError(found[0])
            with suppress(RuntimeError):  # until rank 0 has said it and is gone: who ends first ends all
                dist.barrier(self.control)
            raise SystemExit(2)
        return value  # type: ignore[return-value]

    def share(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on all."""
        return self.all(self.agree(lambda: make() if self.leads else None))[0]  # type: ignore[return-value]

    def samples(self, total: int) -> range:
        """The indices of the samples that this replica draws."""
        return range(self.replica * total // self.replicas, (self.replica + 1) * total // self.replicas)

    def describe(self, report: dict[str, Any]) -> dict[str, Any]:
        """What the report of rank 0 says of all."""
        counts, rates = (self.all(report[name])[:: self.shard.world] for name in ("num_samples", "tokens_per_s"))
        total = None if None in rates else sum(rates)
        return {"num_samples": sum(counts), "tokens_per_s": total, "tp": self.shard.world, "replicas": self.replicas}

    def gather(self, drawn: Sequence[T]) -> list[T]:
        """What every replica drew, on all ranks."""
        if self.control is None:
            return list(drawn)
        return [each for part in self.all(list(drawn))[:: self.shard.world] for each in part]


def join(tp: int | None, device: torch.device) -> Ranks:
    """Joins the processes that torchrun started. tp: ranks that hold one network; None: those of a machine. Raises
    ValueError where the number of processes is not a multiple of it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        if tp not in (None, 1):
            raise ValueError(f"--tp {tp} takes as many processes: torchrun --nproc_per_node={tp} generate.py ...")
        return Ranks()
    rank, world, local, neighbours = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    from torch.distributed.device_mesh import init_device_mesh  # a run alone need not wait for it

    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    if device.type == "cuda":
        torch.cuda.set_device(local)
    control = dist.new_group(backend="gloo", timeout=CONVERSATION)
    each = Ranks(rank, control=control).agree(lambda: group_size(tp, world, neighbours))
    mesh = init_device_mesh(device.type, (world // each, each), mesh_dim_names=("replica", "tp"))
    # A network that is whole needs no sums; where it is all there is, they are made all the same, as a check.
    group = mesh.get_group("tp").group_name if each > 1 or world == 1 else ""
    return Ranks(rank, rank // each, world // each, Shard(rank % each, each, group), local, neighbours, control)


def group_size(tp: int | None, world: int, neighbours: int) -> int:
    """The ranks that hold one network: those of a machine, unless asked otherwise."""
    each = neighbours if tp is None else tp
    if each < 1 or world % each:
        raise ValueError(f"{world} processes cannot be divided into groups of {each}: give another --tp")
    return each


def lost_rank(error: RuntimeError) -> str | None:
    """What a failed collective means to the user; None where the error is another."""
    if not dist.is_initialized():
        return None
    why = str(error).splitlines()[0][:120]
    return f"rank {dist.get_rank()} lost another, which has ended or cannot be reached: {why}"


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
