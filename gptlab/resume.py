"""Continuing a run: in its own folder, with its own config, from its newest checkpoint."""

from copy import deepcopy
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from gptlab import checkpoint
from gptlab.config import flat, is_below
from gptlab.run import RunFolder, unfinished_runs

# What may differ from the run as it began: where it runs, when it stops, and what is watched how often.
FREE = (
    *(
        "trainer.devices",
        "trainer.num_nodes",
        "trainer.accelerator",
        "trainer.max_steps",
        "trainer.max_epochs",
        "max_time",
    ),
    *("logger", "validation.every_steps", "checkpoint.every_steps", "checkpoint.every_epochs", "samples.every_steps"),
    *("log.every_steps", "trust"),
)
OF_THE_COMMAND = ("run_dir", "resume", "init_from", "parent")  # these say what to do, not what the run is


def saved_config(folder: RunFolder) -> dict[str, Any]:
    if not folder.config.is_file():
        raise ValueError(f"resume={folder.path}: no config.yaml there, so it is no run folder")
    content = OmegaConf.to_container(OmegaConf.load(folder.config))
    assert isinstance(content, dict)
    return content


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs describe one run, leaving out what may change when it is resumed."""
    leaves = [flat(config) for config in (one, other)]
    keys = {key for side in leaves for key in side if not is_below(key, FREE + OF_THE_COMMAND)}
    return all(leaves[0].get(key) == leaves[1].get(key) for key in keys)


def find_run(cfg: dict[str, Any]) -> tuple[RunFolder, Path | None] | None:
    """The folder and checkpoint that `resume` means; None for `auto` where there is no such run yet."""
    if cfg["resume"] != "auto":
        path = Path(cfg["resume"])
        if path.is_file():  # <run>/checkpoints/<name>.ckpt
            if not (path.absolute().parent.parent / "config.yaml").is_file():
                raise ValueError(
                    f"resume={path}: this file is no checkpoint in a run folder; init_from takes weights alone"
                )
            return RunFolder(path.absolute().parent.parent), path.absolute()
        if not path.is_dir():
            raise ValueError(f"resume={path}: there is no such run folder or checkpoint")
        folder = RunFolder(path)
    elif cfg["run_dir"] is not None:
        folder = RunFolder(Path(cfg["run_dir"]))
        if not folder.config.is_file():
            return None
        if not same_run(saved_config(folder), cfg):
            raise ValueError(
                f"resume=auto: run_dir={folder.path} holds a run of another config; choose another run_dir"
            )
    else:
        candidates = (run for run in unfinished_runs(Path("runs")) if run.config.is_file())
        found = next((run for run in candidates if same_run(saved_config(run), cfg)), None)
        if found is None:
            return None
        folder = found
    return folder, newest_checkpoint(folder)


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest file of a run that loads, last.ckpt first; None where the run never saved.

    Raises ValueError if there are files and none loads: starting over in silence would lose the run.
    """
    files = sorted(folder.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    files.sort(key=lambda path: path != folder.last)
    faults = []
    for path in files:
        try:
            checkpoint.load(path)
        except ValueError as error:
            faults.append(str(error))
        else:
            return path
    if faults:
        raise ValueError("\n".join(faults))
    return None


def resumed_config(
    saved: dict[str, Any], composed: dict[str, Any], overridden: dict[str, str]
) -> tuple[dict[str, Any], bool]:
    """The run's own config with the overrides that it allows; and whether `seed` was given and ignored.

    `composed` is what the command line makes, `overridden` the keys that it names, with what was typed for each.
    Raises ValueError with every other override that differs, and both values.
    """
    then, now = flat(saved), flat(composed)
    config = deepcopy(saved)
    faults, seed_ignored = [], False
    for key in sorted(set(then) | set(now)):
        named = [name for name in overridden if is_below(key, (name,))]
        if not named or is_below(key, OF_THE_COMMAND) or is_below(key, ("logger",)) or then.get(key) == now.get(key):
            continue
        if is_below(key, FREE):
            # A word like trainer=gpu says where to run; what else stands in its config was not asked for.
            if key in overridden or key == "trainer.accelerator":
                put(config, key, now[key])
        elif key in ("seed", "samples.seed"):
            seed_ignored = True
        elif named != ["trainer"]:
            typed = ", ".join(sorted({overridden[name] for name in named}))
            faults.append(f"{key}: the run has {then.get(key)!r}, the command line {now.get(key)!r} ({typed})")
    if faults:
        raise ValueError(
            "a resumed run keeps its config; leave these overrides out, or start anew (init_from takes over weights):\n"
            + "\n".join(faults[:10])
        )
    if any(is_below(name, ("logger",)) for name in overridden):
        config["logger"] = composed["logger"]
    lift_the_other_limit(config, overridden)
    return config, seed_ignored


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        config = config[parent]
    config[last] = value


def lift_the_other_limit(config: dict[str, Any], overridden: dict[str, str]) -> None:
    """Whoever gives a new max_steps or max_epochs wants the run to go on until then, whatever it ended by before."""
    steps, epochs = "trainer.max_steps" in overridden, "trainer.max_epochs" in overridden
    if steps and not epochs:
        config["trainer"]["max_epochs"] = None
    if epochs and not steps:
        config["trainer"]["max_steps"] = -1
