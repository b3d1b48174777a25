"""Several processes: a copy of the network on each, or one network split over them. torch.distributed does the work."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer

from gptlab import checkpoint
from gptlab.sharding import share, whole


class DataParallel(DDPStrategy):
    """A copy of the network on each device, each with its share of every batch (Li et al. 2020).

    A rank that has waited `timeout_s` seconds for another gives up.
    """

    def __init__(self, timeout_s: int):
        super().__init__(timeout=timedelta(seconds=timeout_s), gradient_as_bucket_view=True, broadcast_buffers=False)


class Sharded(ModelParallelStrategy):
    """Weights, gradients and optimizer state split over the ranks, by rows (FSDP2) or by heads (tensor parallel).

    `tensor_ranks` of them share each matrix and see the same data; the others split the batch. A checkpoint is the one
    file that a single process would write, gathered on rank 0, so that any number of ranks can go on with it.
    """

    def __init__(self, tensor_ranks: int | None, timeout_s: int):
        self.tensor_ranks = 1 if tensor_ranks is None else tensor_ranks
        super().__init__(
            tensor_parallel_size=self.tensor_ranks,
            save_distributed_checkpoint=False,
            timeout=timedelta(seconds=timeout_s),
        )

    def setup_environment(self) -> None:
        self._data_parallel_size = self.world_size // self.tensor_ranks
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return {name: on_cpu(tensor) for name, tensor in self.lightning_module.state_dict().items()}

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        state = optimizer.state_dict()
        return state | {
            "state": {
                index: {name: on_cpu(value) for name, value in entries.items()}
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
        own = self.lightning_module.state_dict()
        if missing := set(own) ^ set(state["state_dict"]):
            raise ValueError(f"{checkpoint_path}: its weights are not those of this network ({sorted(missing)[0]})")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(share(state["state_dict"][name].to(tensor.device), tensor))
        for optimizer, loaded in zip(self.optimizers, state["optimizer_states"], strict=True):
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            for index, entries in loaded["state"].items():
                parameter = parameters[index]
                for name, value in entries.items():
                    if isinstance(value, Tensor) and value.shape == parameter.shape:
                        entries[name] = share(value.to(parameter.device), parameter)
            optimizer.load_state_dict(loaded)
        return state


def on_cpu(value: Any) -> Any:
    """A value of some rank's state as a checkpoint holds it: whole, and out of the device's memory."""
    value = whole(value)
    return value.cpu() if isinstance(value, Tensor) else value
