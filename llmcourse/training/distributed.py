"""One loop on N processes: what `torchrun` tells each of them, sums over all, and the wrapped model.

Everything here is the identity in a single process, so the loop needs no second version.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel


@dataclass(frozen=True, kw_only=True)
class World:
    """Where this process stands among all."""

    rank: int = 0
    """number of this process, 0 is the one that writes files and prints"""
    size: int = 1
    """number of processes"""
    local_rank: int = 0
    """number of this process on its own machine, and of the GPU it uses"""

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


def world() -> World:
    """This process's place, from torch.distributed when it is set up, else alone."""
    if dist.is_available() and dist.is_initialized():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        return World(rank=dist.get_rank(), size=dist.get_world_size(), local_rank=local)
    return World()


def start(device: torch.device) -> World:
    """Join the process group that `torchrun` announces (NCCL on CUDA, gloo elsewhere); alone without `torchrun`."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return world()


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """Element-wise sum of `values` over all processes."""
    if world().size > 1:
        dist.all_reduce(values)
    return values


def barrier() -> None:
    """Wait until every process has come here."""
    if world().size > 1:
        dist.barrier()


def wrap(model: nn.Module) -> nn.Module:
    """`DistributedDataParallel`, which averages gradients over processes during backward; the model itself when
    alone."""
    if world().size == 1:
        return model
    device = next(model.parameters()).device
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def without_gradient_sync(model: nn.Module, skip: bool) -> AbstractContextManager[None]:
    """Skip the gradient exchange in micro-steps that are not the last of a step."""
    if skip and isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()
