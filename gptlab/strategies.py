"""Several processes: a copy of the network on each, or one network split over them. torch.distributed does the work."""

import atexit
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from torch.optim import Optimizer

from gptlab import checkpoint, meeting, ranks
from gptlab.sharding import row_orders, share, whole


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this machine. Where Lightning would kill all without a word, this one says why."""

    def _call_children_scripts(self) -> None:
        with ranks.ending_with_this_process():
            super()._call_children_scripts()
        ranks.watch_followers(self.procs)
        self.procs = []


class Launching:
    """What the strategies share: how their processes start."""

    def _configure_launcher(self) -> None:
        if not self.cluster_environment.creates_processes_externally:
            self._launcher = Launcher(self.cluster_environment, self.num_processes, self.num_nodes)

    def setup_environment(self) -> None:
        if not torch.distributed.is_initialized():
            self._meet()
        super().setup_environment()

    def _meet(self) -> None:
        """Find the other ranks. Lightning's own way waits inside of torch, where no signal is heard."""
        on_gpu = self.root_device.type == "cuda"
        self.set_world_ranks()
        place = self.cluster_environment
        torch.distributed.init_process_group(
            self._get_process_group_backend(),
            store=meeting.meet(
                place.main_address, place.main_port, place.global_rank(), place.world_size(), self._timeout
            ),
            rank=place.global_rank(),
            world_size=place.world_size(),
            timeout=self._timeout,
            device_id=self.root_device if on_gpu else None,
        )
        if on_gpu:
            atexit.register(torch.distributed.destroy_process_group)


class DataParallel(Launching, DDPStrategy):
    """A copy of the network on each device, each with its share of every batch (Li et al. 2020).

    A rank that has waited `timeout_s` seconds for another gives up.
    """

    def __init__(self, timeout_s: int):
        super().__init__(timeout=timedelta(seconds=timeout_s), gradient_as_bucket_view=True, broadcast_buffers=False)


class Sharded(Launching, ModelParallelStrategy):
    """One network split over the ranks.

    `by` rows (FSDP2), each rank has its share of the batch and of every tensor; by heads (tensor parallel), all ranks
    see the same data and share each matrix.

    A checkpoint is the one file that a single process would write, gathered on rank 0, so that any number of ranks can
    go on with it.
    """

    def __init__(self, by: Literal["rows", "heads"], timeout_s: int):
        self.by = by
        super().__init__(save_distributed_checkpoint=False, timeout=timedelta(seconds=timeout_s))

    @property
    def tensor_ranks(self) -> int:
        """How many ranks share each matrix and see the same data."""
        return self.world_size if self.by == "heads" else 1

    def setup_environment(self) -> None:
        self._tensor_parallel_size = self.tensor_ranks
        self._data_parallel_size = self.world_size // self.tensor_ranks
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        orders = self._orders()
        return {name: on_cpu(tensor, orders.get(name)) for name, tensor in self.lightning_module.state_dict().items()}

    def _orders(self) -> dict[str, Tensor]:
        """Of each parameter whose rows stand in another order than in a checkpoint, by name, that order."""
        assert self.lightning_module is not None
        orders = row_orders(self.lightning_module)
        return {name: orders[tensor] for name, tensor in self.lightning_module.named_parameters() if tensor in orders}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        state, parameters, orders = optimizer.state_dict(), in_order(optimizer), row_orders(self.lightning_module)
        return state | {
            "state": {
                index: {name: on_cpu(value, orders.get(parameters[index])) for name, value in entries.items()}
                for index, entries in state["state"].items()
            }
        }

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the file and keeps its share of it. Lightning's own way would read without weights_only."""
        state = checkpoint.load(Path(checkpoint_path))
        assert self.lightning_module is not None
        own, orders = self.lightning_module.state_dict(), self._orders()
        if missing := set(own) ^ set(state["state_dict"]):
            raise ValueError(f"{checkpoint_path}: its weights are not those of this network ({min(missing)})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(share(state["state_dict"][name].to(tensor.device), tensor, orders.get(name)))
        orders = row_orders(self.lightning_module)
        for optimizer, loaded in zip(self.optimizers, state["optimizer_states"], strict=True):
            parameters = in_order(optimizer)
            for index, entries in loaded["state"].items():
                parameter = parameters[index]
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = share(value.to(parameter.device), parameter, orders.get(parameter))
            optimizer.load_state_dict(loaded)
        return state


def in_order(optimizer: Optimizer) -> list[Tensor]:
    """The parameters, as the optimizer numbers them in its state."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def on_cpu(value: Any, order: Tensor | None) -> Any:
    """A value as a checkpoint holds it: whole, and out of the device's memory. Rank 0 alone keeps it."""
    value = whole(value, order)
    if not isinstance(value, Tensor):
        return value
    return value.cpu() if torch.distributed.get_rank() == 0 else None
