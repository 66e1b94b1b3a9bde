"""Describes and connects the processes of a training: a single one, or one per device as started by `torchrun`.

    torchrun --nproc_per_node=2 train.py method=[lora] hardware=l40s_x2
    torchrun --nnodes=2 --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500 train.py ... hardware=l40s_x2

A training reads its rank from `world` and never starts processes; a pipeline does (`winnow.training.torchrun`). Every process
reads the same configuration and the same files; only rank 0 writes and logs. Devices share the work by `ddp`, where each holds
the whole model, or by `fsdp`, where each holds a part of every weight and blocks are gathered as they are used (FSDP2: Zhao et
al. 2023, arXiv:2304.11277).
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

LOST_SECONDS = 600  # timeout for a device that does not respond; one whose process died is noticed at once
TRAINING = (Slot.RECOVER, Slot.ADAPT, Slot.PROMPT)  # the slots of stages that train
DEVICE_HELD = "WINNOW_DEVICE_HELD"  # environment variable of a training whose pipeline already holds the device lock


@dataclass(frozen=True)
class DistEnv:
    """The number of processes of a training, and the rank of this one."""

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
    """A stage, of which only the slot matters here: it says whether the stage is a training."""

    slot: ClassVar[Slot]


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def world() -> DistEnv:
    """Returns the processes that `torchrun` set in the environment; a single one without `torchrun`."""
    if not under_torchrun():
        return DistEnv()
    names = ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    return DistEnv(*(int(os.environ[name]) for name in names))


def enter(hardware: Hardware, stages: Mapping[str, HasSlot]) -> DistEnv:
    """Returns this process's `DistEnv` after it has prepared the process for `torchrun`.

    Under `torchrun` it checks the stages and the number of processes, ties the process's life to its parent's, and selects the
    CUDA device.

    Raises:
        UserError: the number of processes differs from `hardware.devices`, or a stage is not a training.
    """
    if not under_torchrun():
        return DistEnv()
    env = world()
    if env.local_size != hardware.devices:
        raise UserError(
            f"torchrun started {env.local_size} process{'es' if env.local_size > 1 else ''} on this machine, and "
            f"hardware={hardware.name} has hardware.devices={hardware.devices}; start as many as there are devices "
            f"(torchrun --nproc_per_node={hardware.devices}), or set hardware.devices={env.local_size}"
        )
    not_training = [name for name, stage in stages.items() if stage.slot not in TRAINING]
    if env.size > 1 and not_training:
        raise UserError(
            f"method=[{','.join(stages)}] under torchrun: {', '.join(not_training)} is no training, and would be done once on "
            f"every device; run python compress.py without torchrun, which starts it by itself for the stages that train"
        )
    end_with_parent()
    if hardware.device == "cuda":
        import torch

        torch.cuda.set_device(env.local_rank)
    return env


def join(run: Run, world: DistEnv) -> None:
    """Initializes the process group of a training; does nothing for a single process, or on a second call."""
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


def total_energy(energy: Energy, run: Run) -> Energy:
    """Returns the energy of all processes of a training.

    A counter covers its whole machine, so it counts once per node; an estimate covers only its own process.
    """
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return energy
    import torch

    counts = world().local_rank == 0 or (run.device == "cpu" and energy.source == "estimated")
    spent = torch.tensor([energy.wh, energy.co2_g] if counts else [0.0, 0.0], device=local_device(run))
    distributed.all_reduce(spent)
    return dataclasses.replace(energy, wh=float(spent[0]), co2_g=float(spent[1]))


def broadcast_from_rank_zero(value: Any, world: DistEnv) -> Any:
    """Returns rank 0's value on all processes."""
    if world.size == 1:
        return value
    from torch import distributed

    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def is_rank_lost(error: BaseException) -> bool:
    """Returns whether an error reports that another process of the training has ended."""
    text = str(error)
    phrases = (
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
        and any(phrase in text for phrase in phrases)
    )


def local_device(run: Run) -> str:
    return f"cuda:{world().local_rank}" if run.device == "cuda" else run.device


def trainer_arguments(run: Run, world: DistEnv, sharded: bool = False) -> dict[str, Any]:
    """Returns the arguments of `lightning.Trainer` for devices and strategy."""
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
    """Shards every parameter under `root` over the devices of `mesh`, in place (FSDP2).

    Each block is a group that is gathered for its own forward and backward pass. The remaining parameters (embedding, norm and
    head) are the root's group, which stays gathered from its forward pass to the end of the backward pass, because the loss
    reads the whole head weight in between.
    """
    import torch
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mixed_precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=mixed_precision if mixed else MixedPrecisionPolicy())
    # the root stays in single precision, like the residual stream under autocast
    fully_shard(root, mesh=mesh, reshard_after_forward=False)


def unshard(root: nn.Module) -> None:
    """Undoes `shard` in place: every process has plain, full parameters in main memory, and tied weights stay tied."""
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    sharded_modules: list[Any] = [module for module in root.modules() if isinstance(module, FSDPModule)]
    for module in sharded_modules:
        module.reshard()
    full_parameters: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in list(module._parameters.items()):
            if isinstance(parameter, DTensor):
                if id(parameter) not in full_parameters:
                    full = parameter.full_tensor().detach().cpu()
                    full_parameters[id(parameter)] = torch.nn.Parameter(full, requires_grad=parameter.requires_grad)
                module._parameters[name] = full_parameters[id(parameter)]
    for module in sharded_modules:  # otherwise its hooks would look for shards at the next call
        state = module._get_fsdp_state()
        state._pre_forward_hook_handle.remove()
        state._post_forward_hook_handle.remove()
        module.__class__ = type(module).__bases__[1]
    root.cpu()  # buffers
