"""Where a training runs: one device, or the processes that `torchrun` started, one a device.

    torchrun --nproc_per_node=2 train.py method=[lora] hardware=l40s_x2
    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ... hardware=l40s_x2

A training asks `world` who it is, and never starts processes itself; a pipeline does (`winnow.training.torchrun`). Every process
reads the same configuration and the same files; the first alone writes and speaks. How devices share the work: `ddp`, each with
the whole model, or `fsdp`, each with a part of every weight, put together block by block as it is used (FSDP2: Zhao et al. 2023,
arXiv:2304.11277).
"""

from __future__ import annotations

import atexit
import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from winnow.core.errors import UserError
from winnow.core.process import end_with_parent
from winnow.core.types import Slot
from winnow.hardware.run import Run

if TYPE_CHECKING:
    from torch import nn

    from winnow.hardware.device import Hardware
    from winnow.hardware.energy import Energy

LOST_SECONDS = 600  # a device that has not answered for so long is given up; one that has died is noticed at once
TRAINING = (Slot.RECOVER, Slot.ADAPT, Slot.PROMPT)  # the slots of stages that train
HELD = "WINNOW_DEVICE_HELD"  # in the environment of a training whose pipeline shares the device already


@dataclass(frozen=True)
class DistEnv:
    """All processes of a training, and this one among them."""

    size: int = 1
    rank: int = 0
    local_size: int = 1
    local_rank: int = 0

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0

    @property
    def nodes(self) -> int:
        return self.size // self.local_size


class HasSlot(Protocol):
    """A stage, as far as its place in a pipeline says whether it is a training."""

    slot: ClassVar[Slot]


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def world() -> DistEnv:
    """As `torchrun` has put it into the environment; one process where it has not."""
    if not under_torchrun():
        return DistEnv()
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    return DistEnv(*(int(os.environ[name]) for name in names))


def enter(hardware: Hardware, stages: Mapping[str, HasSlot]) -> DistEnv:
    """Who this process is, once it is clear that what it is asked to do can be spread as `torchrun` has spread it.

    Raises:
        UserError: other devices than `hardware.devices`, or a stage that is no training.
    """
    if not under_torchrun():
        return DistEnv()
    found = world()
    if found.local_size != hardware.devices:
        raise UserError(
            f"torchrun started {found.local_size} process{'es' if found.local_size > 1 else ''} on this machine, and "
            f"hardware={hardware.name} has hardware.devices={hardware.devices}; start as many as there are devices "
            f"(torchrun --nproc_per_node={hardware.devices}), or set hardware.devices={found.local_size}"
        )
    others = [name for name, stage in stages.items() if stage.slot not in TRAINING]
    if found.size > 1 and others:
        raise UserError(
            f"method=[{','.join(stages)}] under torchrun: {', '.join(others)} is no training, and would be done once on every "
            f"device; run python compress.py without torchrun, which starts it by itself for the stages that train"
        )
    end_with_parent()
    if hardware.device == "cuda":
        import torch

        torch.cuda.set_device(found.local_rank)
    return found


def join(run: Run, world: DistEnv) -> None:
    """Lets the processes of a training find one another; does nothing for a single one, or a second time."""
    if world.size == 1:
        return
    import torch
    from torch import distributed

    if distributed.is_initialized():
        return
    on_cpu = run.device == "cpu"
    device = None if on_cpu else torch.device(local_device(run))
    distributed.init_process_group(
        "gloo" if on_cpu else "nccl", timeout=timedelta(seconds=LOST_SECONDS), device_id=device
    )
    atexit.register(_leave)


def _leave() -> None:
    from torch import distributed

    if distributed.is_initialized():
        distributed.destroy_process_group()


def together(energy: Energy, run: Run) -> Energy:
    """What all processes of a training took: a counter counts its whole machine, an estimate its own process."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return energy
    import torch

    counts = world().local_rank == 0 or (run.device == "cpu" and energy.source == "estimated")
    spent = torch.tensor([energy.wh, energy.co2_g] if counts else [0.0, 0.0], device=local_device(run))
    distributed.all_reduce(spent)
    return dataclasses.replace(energy, wh=float(spent[0]), co2_g=float(spent[1]))


def agreed(value: Any, world: DistEnv) -> Any:
    """What the first process says, on all of them."""
    if world.size == 1:
        return value
    from torch import distributed

    said = [value]
    distributed.broadcast_object_list(said, src=0)
    return said[0]


def is_lost(error: BaseException) -> bool:
    """Whether an error says that another process of the training is gone."""
    text = str(error)
    words = (
        "Connection closed by peer",
        "Connection reset by peer",
        "Broken pipe",
        "NCCL",
        "ProcessGroup",
        "Timed out",
    )
    return (
        isinstance(error, RuntimeError)
        and ("gloo" in text or "DistBackendError" in type(error).__name__)
        and any(word in text for word in words)
    )


def local_device(run: Run) -> str:
    return f"cuda:{world().local_rank}" if run.device == "cuda" else run.device


def trainer_arguments(run: Run, world: DistEnv, sharded: bool = False) -> dict[str, Any]:
    """The arguments of `lightning.Trainer` that say where it runs."""
    accelerator = "cpu" if run.device == "cpu" else "gpu"
    if world.size == 1:
        return {"accelerator": accelerator, "devices": 1}
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

    common: dict[str, Any] = {
        "process_group_backend": "gloo" if run.device == "cpu" else "nccl",
        "timeout": timedelta(seconds=LOST_SECONDS),
    }
    strategy: Any
    if sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=world.size, tensor_parallel_size=1, save_distributed_checkpoint=False, **common
        )
    else:
        strategy = DDPStrategy(find_unused_parameters=False, gradient_as_bucket_view=True, **common)
    return {
        "accelerator": accelerator,
        "devices": world.local_size,
        "num_nodes": world.nodes,
        "strategy": strategy,
        "plugins": [TorchElasticEnvironment()],
    }


def shard(root: nn.Module, blocks: nn.ModuleList, mesh: Any, mixed: bool) -> None:
    """Spreads every parameter under `root` over the devices of `mesh`, in place (FSDP2).

    Each block is a group that is put together for its own forward and backward pass. What is left, embedding, norm and head,
    is the root's group, which stays together from its forward pass to the end of the backward pass: a loss that takes the
    head's weight in between finds all of it.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    narrow = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=narrow if mixed else MixedPrecisionPolicy())
    fully_shard(
        root, mesh=mesh, reshard_after_forward=False
    )  # in single precision, as autocast leaves the residual stream


def unshard(root: nn.Module) -> None:
    """Undoes `shard` in place: plain, whole parameters in main memory, on every device; ties stay."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    wrapped: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in wrapped:
        module.reshard()
    whole: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in whole:
                    full = parameter.full_tensor().detach().cpu()
                    whole[id(parameter)] = torch.nn.Parameter(full, requires_grad=parameter.requires_grad)
                module._parameters[name] = whole[id(parameter)]
    for module in wrapped:  # else its hooks would look for shards at the next call
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__bases__[1]
    root.cpu()  # buffers
