"""From a plain config to the objects of a run. Only doors call it; below it, no config is known."""

import contextlib
import logging
import platform
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator, CUDAAccelerator, MPSAccelerator
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from gptlab import config, cost, profilers, ranks
from gptlab.callbacks.averaging import MovingAverage
from gptlab.callbacks.floor import Floor
from gptlab.callbacks.record import MetricsFile, Monitor, RunRecord
from gptlab.callbacks.saving import Checkpoints, RandomState
from gptlab.callbacks.steps import Budget, CompileAhead, Interrupts, Requests
from gptlab.callbacks.watching import Alerts, ConsoleLines, ProgressBar, Samples
from gptlab.data.cleaning import Cleaned, Cleaning
from gptlab.data.corpus import Files, Source
from gptlab.data.mixed import MixedDataModule
from gptlab.data.module import TextDataModule, reading_of
from gptlab.data.tokenized import TokenizedDataModule
from gptlab.machine import set_compiler
from gptlab.model import GPT, GPTConfig
from gptlab.run import RunFolder
from gptlab.tasks.lm import LMTask
from gptlab.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger("gptlab")


def build_tokenizer(node: dict[str, Any], trust: tuple[str, ...]) -> Tokenizer | Callable[..., Tokenizer]:
    """An existing tokenizer, if `tokenizer.path` names one, or what makes one of the training text."""
    if node.get("path") and node.get("files") is not None:
        raise ValueError(
            f"tokenizer.files={node['files']} is to train a tokenizer, and tokenizer.path={node['path']} is one: leave "
            "one of them out"
        )
    settings = {name: value for name, value in node.items() if name not in ("path", "files")}
    return load_tokenizer(node["path"], trust) if node.get("path") else config.make(settings)


def tokenizer_source(cfg: dict[str, Any]) -> Source | None:
    """The text of `tokenizer.files`, where a tokenizer is to learn from other text than the model."""
    if (files := cfg["tokenizer"].get("files")) is None:
        return None
    node = config.data_config(cfg["data"])
    source = Files(files, reading_of(node), "tokenizer.files")
    return Cleaned(source, Cleaning(node.normalize, 0, None, 1.0)) if node.normalize else source


def data_kind(cfg: dict[str, Any]) -> type[TextDataModule]:
    """Which data module the config calls for; a checkpoint has its state under the name of the class."""
    if (stream := config.make(cfg["data"].get("stream"))) is not None:
        return stream.data_module
    if cfg["data"].get("tokens") is not None:
        return TokenizedDataModule
    return TextDataModule if cfg["data"].get("mix") is None else MixedDataModule


def build_data(cfg: dict[str, Any], tokenizer: Tokenizer | None = None) -> TextDataModule:
    """The data module, its text found or built. `tokenizer` replaces the one that the config describes."""
    data = data_module(cfg, tokenizer)
    data.prepare_data()
    data.setup()
    return data


def data_module(cfg: dict[str, Any], tokenizer: Tokenizer | None = None) -> TextDataModule:
    """The same, before any text is read."""
    node = config.data_config(cfg["data"])
    learnt_from = tokenizer_source(cfg)
    if tokenizer is None and learnt_from is not None:
        learnt_from.paths()  # what is wrong with them is said before other text is read
    mix = node.mix and {name: config.make(part.get("source")) for name, part in node.mix.items()}
    return data_kind(cfg)(
        node,
        config.make(node.stream) or mix or config.make(node.source),
        tokenizer or build_tokenizer(cfg["tokenizer"], config.trusted(cfg)),
        block_size=cfg["model"]["block_size"],
        seed=cfg["seed"],
        tokenizer_source=learnt_from,
    )


def build_model(cfg: dict[str, Any], tokenizer: Tokenizer) -> GPT:
    """A network for this tokenizer, with the weights of the seed."""
    node = config.model_config(cfg["model"])
    known = tokenizer.vocab_size
    if node.vocab_size is None:
        node.vocab_size = known
    if node.vocab_size < known:
        raise ValueError(
            f"model.vocab_size={node.vocab_size} is less than the tokenizer's {known} tokens; leave it null"
        )
    torch.manual_seed(cfg["seed"])  # so that no reading of data before this changes the weights
    return GPT(node, config.trusted(cfg))


def describe_cost(
    node: GPTConfig, batch_size: int, precision: str, trust: tuple[str, ...], averaged: bool = False
) -> str:
    """One line on the size of a network, found without allocating it."""
    figures = cost.estimate(node, batch_size, bf16=precision.startswith("bf16"), trust=trust, averaged=averaged)
    return (
        f"{figures.parameters / 1e6:.2f} M parameters "
        f"({figures.parameters_non_embedding / 1e6:.2f} M without embeddings), "
        f"{figures.flops_per_token / 1e6:.3g} MFLOPs a trained token, "
        f"up to about {figures.memory_bytes / 2**30:.2g} GiB to train"
    )


def device_type(accelerator: str) -> str:
    """The kind of device, cuda, mps or cpu, that Lightning's word means on this machine."""
    if torch.cuda.is_available() and accelerator in ("auto", "gpu", "cuda"):
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and accelerator in ("auto", "gpu", "mps") else "cpu"


def wants_compile(word: Any, node: dict[str, Any]) -> bool:
    """Whether to compile, by the word for it and the values of the group `trainer`."""
    if word not in (True, False, "auto"):
        raise ValueError(f"compile={word!r} is none of auto, true, false")
    is_split = "by" in (node.get("strategy") or {})
    if word is True and is_split:
        raise ValueError(
            "compile=true: a network that is split over ranks is not compiled; use compile=auto, or trainer=ddp"
        )
    if word != "auto" or is_split:
        return word is True
    has_compiler = any(shutil.which(name) for name in ("g++", "clang++", "c++")) and platform.system() == "Linux"
    return device_type(node["accelerator"]) == "cuda" or has_compiler


def import_compiler(cfg: dict[str, Any]) -> None:
    """Import the compiler where it is wanted, and let it find out meanwhile what the processor can do.

    It tries that in processes of its own, a second long, at every start. Where this fails it tries again when it needs
    to know, and then somebody hears of it.
    """
    if not wants_compile(cfg["compile"], cfg["trainer"]):
        return
    import torch._inductor.compile_fx  # noqa: F401  here, because it takes most of a second

    def probe() -> None:
        with contextlib.suppress(Exception):  # it is no documented function
            from torch._inductor.cpu_vec_isa import valid_vec_isa_list

            valid_vec_isa_list()

    device = device_type(cfg["trainer"]["accelerator"])
    is_watched = cfg["trainer"]["profiler"] == "pytorch"  # which sees nothing of what C++ calls
    set_compiler(calls_in_cpp=device == "cpu" and not is_watched)
    if device == "cpu":
        threading.Thread(target=probe, daemon=True).start()


def build_task(cfg: dict[str, Any], model: GPT, tokenizer: Tokenizer, total_steps: int) -> LMTask:
    return config.make(cfg["task"])(
        model=model,
        tokenizer=tokenizer,
        optimizer=config.make(cfg["optimizer"]),
        schedule=config.make(cfg["schedule"]),
        total_steps=total_steps,
        separate_documents=cfg["documents"] == "separate",
        skip_nonfinite=cfg["nonfinite"] == "skip",
        compile=wants_compile(cfg["compile"], cfg["trainer"]),
    )


def steps_to_train(node: dict[str, Any], steps_an_epoch: int) -> int:
    """Optimizer steps of the whole run: trainer.max_steps or trainer.max_epochs, whichever ends first."""
    limits = []
    if (steps := node["max_steps"]) not in (None, -1):
        limits.append(steps)
    if (epochs := node["max_epochs"]) not in (None, -1):
        limits.append(epochs * steps_an_epoch)
    if not limits:
        raise ValueError(
            "nothing ends this run: give trainer.max_steps or trainer.max_epochs (max_time may end it sooner)"
        )
    if min(limits) < 1:
        raise ValueError(f"trainer.max_steps={steps}, trainer.max_epochs={epochs}: must be at least 1")
    return min(limits)


def device_kind(node: dict[str, Any]) -> type[Accelerator]:
    """What Lightning calls the kind of device that the group `trainer` names."""
    kinds = {"cuda": CUDAAccelerator, "mps": MPSAccelerator, "cpu": CPUAccelerator}
    return kinds[device_type(node["accelerator"])]


def world_of(node: dict[str, Any]) -> int:
    """How many ranks there will be, by the values of the group `trainer`."""
    if given := ranks.devices_given():
        devices, nodes = given
    else:
        kind, devices, nodes = device_kind(node), node["devices"], node["num_nodes"]
        if devices == "auto":
            devices = kind.auto_device_count() if node.get("strategy") else 1
        else:
            devices = len(kind.get_parallel_devices(kind.parse_devices(devices)))
    return devices * nodes


def data_world(node: dict[str, Any]) -> int:
    """How many of the ranks will split each batch."""
    return 1 if (node.get("strategy") or {}).get("by") == "heads" else world_of(node)


def counted(number: int, one: str, several: str) -> str:
    return f"{number} {one if number == 1 else several}"


def fit_to_ranks(cfg: dict[str, Any], windows_a_step: int, world: int) -> dict[str, Any]:
    """The config with micro-batches such that `world` ranks take the same windows a step as the run always did."""
    batch, accumulate = cfg["data"]["batch_size"], cfg["trainer"]["accumulate_grad_batches"]
    if batch * accumulate * world == windows_a_step:
        return cfg
    if windows_a_step % world:
        raise ValueError(
            f"a step of this run has {windows_a_step} windows, which {world} ranks cannot share: use a trainer.devices "
            "that divides them"
        )
    share = windows_a_step // world
    batch = max(size for size in range(1, min(batch, share) + 1) if share % size == 0)
    parts = counted(share // batch, "micro-batch", "micro-batches")
    where = "on one rank" if world == 1 else f"on each of {world} ranks"
    log.info("a step is %s of %s %s now, as many windows as before", parts, counted(batch, "window", "windows"), where)
    return cfg | {
        "data": cfg["data"] | {"batch_size": batch},
        "trainer": cfg["trainer"] | {"accumulate_grad_batches": share // batch},
    }


def share_dial(cfg: dict[str, Any], overridden: dict[str, str], world: int) -> dict[str, Any]:
    """The config with the batch that `depth` chose, which is that of a whole step, shared among `world` ranks."""
    if cfg["depth"] is None or "data.batch_size" in overridden:
        return cfg
    return fit_to_ranks(cfg, cfg["data"]["batch_size"] * cfg["trainer"]["accumulate_grad_batches"], world)


def build_loggers(node: dict[str, Any], folder: RunFolder, resumed_step: int | None) -> list[Logger]:
    """metrics.csv, and what the word `logger` names."""
    loggers: list[Logger] = [MetricsFile(folder.metrics)]
    target = str(node.get("_target_") or "").rpartition(".")[2]
    try:
        if target == "TensorBoardLogger":
            purge = {} if resumed_step is None else {"purge_step": resumed_step + 1}
            loggers.append(config.make(node)(save_dir=folder.path, **purge))
        elif target == "MLFlowLogger":
            uri = node["tracking_uri"] or f"sqlite:///{folder.path / 'mlflow.db'}"
            loggers.append(config.make(node)(run_name=folder.path.name, tracking_uri=uri))
        elif target:
            loggers.append(config.make(node)(save_dir=folder.path, name=folder.path.name))
    except ModuleNotFoundError as error:
        word = target.removesuffix("Logger").lower()
        raise ValueError(f'logger={word} is not installed ({error}): pip install "gptlab[track]"') from error
    return loggers


class Watchers:
    """The callbacks of a run, in the order in which they act at the end of a step."""

    def __init__(self, cfg: dict[str, Any], folder: RunFolder, total_steps: int):
        self.seed = cfg["seed"]
        self.compile = CompileAhead(must=cfg["compile"] is True)
        self.requests = Requests()
        self.budget = Budget(total_steps, cfg["max_time"], self.requests)
        self.monitor = Monitor(cfg["log"]["every_steps"], self.budget, cfg["log"]["peak_tflops"])
        self.samples: Samples = config.make(cfg["samples"])
        self.samples.path = folder.samples
        self.alerts = Alerts(self.monitor)
        self.floor = Floor(folder.floor)
        self.checkpoints: Checkpoints = config.make(cfg["checkpoint"])
        self.checkpoints.folder, self.checkpoints.requests = folder.checkpoints, self.requests
        self.record = RunRecord(folder, self.monitor, self.budget)
        self.extra: list[Callback] = [config.make(node) for node in (cfg["callbacks"] or {}).values()]

    def callbacks(self, on_terminal: bool) -> list[Callback]:
        averages = [callback for callback in self.extra if isinstance(callback, MovingAverage)]
        return [
            self.requests,
            RandomState(self.seed),
            *averages,  # what samples, validates and saves after it sees the average of this step
            self.compile,
            self.budget,
            self.monitor,
            self.samples,
            self.alerts,
            self.floor,
            *(callback for callback in self.extra if callback not in averages),
            ConsoleLines(self.monitor, self.budget),
            self.record,
            self.checkpoints,
            Interrupts(self.checkpoints.save_last, self.requests),
            *([ProgressBar(self.monitor, self.budget)] if on_terminal else []),
        ]


def build_trainer(
    cfg: dict[str, Any], watchers: Watchers, loggers: list[Logger], on_terminal: bool, run_dir: Path
) -> Trainer:
    """Lightning's Trainer, all of whose intervals count optimizer steps."""
    node = dict(cfg["trainer"])
    if (given := ranks.devices_given()) and node["devices"] == "auto":
        node["devices"], node["num_nodes"] = given
    if node["devices"] == "auto" and not node.get("strategy"):
        node["devices"] = 1
    if not node["deterministic"] and device_type(node["accelerator"]) == "cpu":
        # So that a resumed run is the uninterrupted one: compiled embeddings otherwise add up in any order of threads.
        node["deterministic"] = "warn"
        torch.utils.deterministic.fill_uninitialized_memory = False
    require_device(node["accelerator"])
    if node["precision"] == "auto":
        node["precision"] = "bf16-mixed" if cost.computes_in_bf16(device_type(node["accelerator"])) else "32-true"
    if isinstance(node["profiler"], str):
        node["profiler"] = profilers.of_word(node["profiler"], run_dir)
    node |= {"_partial_": True, "max_epochs": -1, "max_steps": -1}  # the budget ends the run, after a last validation
    arguments = dict(
        **validation_intervals(cfg),
        callbacks=watchers.callbacks(on_terminal),
        logger=loggers,
        default_root_dir=run_dir,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        use_distributed_sampler=False,  # the data module's order knows the ranks
        inference_mode=False,  # validation shares compiled graphs with training
    )
    try:
        trainer = config.make(node)(**arguments)
    except (TypeError, MisconfigurationException) as error:  # of values that only Lightning can judge
        raise ValueError(f"trainer: {error}") from error
    if ranks.started_outside() and trainer.world_size != ranks.processes_outside():  # each would train alone
        raise ValueError(
            f"{ranks.processes_outside()} processes were started, and this trainer is one of {trainer.world_size}: "
            "use trainer=ddp, fsdp or tp, with trainer.devices and trainer.num_nodes as they were started"
        )
    if trainer.world_size != (wanted := world_of(cfg["trainer"])):
        raise ValueError(
            f"trainer.devices and trainer.num_nodes ask for {wanted} processes, and SLURM has started "
            f"{trainer.world_size}: give srun --ntasks-per-node=<trainer.devices>"
        )
    return trainer


def validation_intervals(cfg: dict[str, Any]) -> dict[str, Any]:
    """Lightning's arguments for `validation.every_steps`; it counts micro-batches."""
    every = cfg["validation"]["every_steps"]
    if every is None:
        return {"val_check_interval": 1.0, "check_val_every_n_epoch": 1}
    if every < 1:
        raise ValueError(f"validation.every_steps={every} must be at least 1, or null for once an epoch")
    accumulate = cfg["trainer"]["accumulate_grad_batches"]
    return {"val_check_interval": every * accumulate, "check_val_every_n_epoch": None}


def require_device(accelerator: str) -> None:
    """Raise ValueError where the device asked for is not here."""
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError("trainer=gpu: torch sees no CUDA GPU here; use trainer=cpu, or install a CUDA build of torch")
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("trainer=mps: this is no Apple machine with a GPU that torch can use; use trainer=auto")
