"""What the processes of a run tell each other, beyond the model's gradients that DDP moves."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shards.console import JobError, describe_os_error, format_count, is_systems

T = TypeVar("T")

# What gloo waits too. NCCL's own ten minutes end a run whose first process writes an index or a checkpoint to a slow
# disk, or whose storage is away for a while.
PATIENCE = timedelta(minutes=30)


@dataclass(frozen=True)
class World:
    """This process among the others: `rank` of `size`, computing on `device`."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def made_on(self, chosen: bool, make: Callable[[], T]) -> T | None:
        """What `make` gives on the ranks that are `chosen`, None on the others.

        A JobError of one, or an error of its operating system, stops every rank with the same words.
        """
        made, refused = None, None
        if chosen:
            try:
                made = make()
            except JobError as error:
                refused = str(error)
            except OSError as error:
                if not is_systems(error):
                    raise
                refused = describe_os_error(error)
        for reason in self.gather(refused):
            if reason is not None:
                raise JobError(reason)
        return made

    def bring_to_main(self, tensors: dict[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """Send `tensors` from rank `source` to rank 0 one by one; rank 0 gets them on the CPU, others nothing.

        All ranks must call it; `tensors` is read on `source` only.
        """
        own = (tensors or {}) if self.rank == source else {}
        if source == 0:
            return {name: tensor.detach().cpu() for name, tensor in own.items()}
        kinds = self.gather({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()})[source]
        received = {}
        for name, (shape, dtype) in kinds.items():
            if self.rank == source:
                _exchange(dist.isend, own[name].detach().to(self.device).contiguous(), 0)
            elif self.is_main:
                buffer = torch.empty(shape, dtype=dtype, device=self.device)
                _exchange(dist.irecv, buffer, source)
                received[name] = buffer.cpu()
        return received


def check_gpus(device: torch.device) -> None:
    """JobError where this machine's processes are more than its GPUs, of which NCCL wants one for each.

    A process that sees one GPU may have it to itself: Slurm can hide the others, and so can a script between torchrun
    and Python. By itself torchrun, and with it accelerate launch, shows all its processes the same.
    """
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    own = os.environ.get("CUDA_VISIBLE_DEVICES", "") == os.environ.get("LOCAL_RANK")
    alike = gpus > 1 or ("TORCHELASTIC_RUN_ID" in os.environ and not own)
    if device.type == "cuda" and alike and gpus < processes:
        raise JobError(
            f"{processes} processes were started here for {format_count(gpus, 'GPU')}; give --num_processes {gpus} "
            "(of several machines the sum) or, on the CPU, --cpu"
        )


def _exchange(operation: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    """Send a tensor to a rank or receive it from there, through the connections that all ranks have already.

    By itself a send or receive of NCCL makes a communicator of the two, with memory of its own on both GPUs.
    """
    for work in dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer)]):
        work.wait()


def join_after_restart(backend: str) -> None:
    """After a restart by torchrun: join a process group with keys of its own in the launcher's store.

    The launcher keeps one store over all its restarts, and with it the addresses of the processes that are gone: what
    looks there for its peers waits for the dead (pytorch issue 135712). Does nothing in a first start, and where the
    launcher keeps no store: launchers of several machines count their restarts each for itself, so give torchrun
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 there.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or dist.is_initialized():
        return
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.PrefixStore(f"restart-{attempt}", dist.TCPStore(address, port, size, is_master=False))
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def settle_buckets(wrapped: nn.Module) -> None:
    """Have DDP lay out its buckets of gradients now; by itself it does so after the first step of a process.

    Gloo rounds the sums of three and more ranks by a number's place in its bucket, so that a resumed run, whose first
    step is another one, would differ from an undisturbed one. Costs the overlap with the backward: for CPUs. All ranks
    must call it; does nothing where `wrapped` is not in DDP.
    """
    reducer = getattr(wrapped, "reducer", None)
    if reducer is not None and hasattr(reducer, "_push_all_rebuilt_params"):  # private: of torch 2.11 to 2.14
        reducer._push_all_rebuilt_params()
        reducer._rebuild_buckets()


class RankGroups:
    """Process groups by their set of ranks; every rank must ask for the same sets in the same order."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.known: dict[tuple[int, ...], dist.ProcessGroup | None] = {}

    def of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
        """The group of these ranks; None (the default group) for all of them, and for a rank on its own."""
        if len(ranks) in (1, self.world.size):
            return None
        if ranks not in self.known:
            group = dist.new_group(list(ranks), timeout=PATIENCE)
            self.known[ranks] = group if isinstance(group, dist.ProcessGroup) else None
        return self.known[ranks]


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the host on a device, without waiting for the work that is queued there.

    A copy to a GPU waits for it unless it begins in pinned memory, where torch keeps the values until it is done.
    """
    if device.type == "cuda" and not values.is_cuda:
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


class HostCopy:
    """A small tensor on its way to the host: `wait` blocks until it is there, not until later work is done."""

    def __init__(self, tensor: Tensor) -> None:
        self.event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self.values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self.values.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()
        else:
            self.values = tensor

    def wait(self) -> list[float]:
        """The values."""
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


def trained_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of gradients that an all-reduce of these parameters moves."""
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)
