"""Continuing a run: in its own folder, with its own config, from its newest checkpoint."""

import logging
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gptlab import checkpoint
from gptlab.config import flat, is_below
from gptlab.files import Manifest, write_atomically
from gptlab.run import RunFolder, unfinished_runs
from gptlab.tokenizer import Tokenizer, load_tokenizer, tokenizer_from_state

log = logging.getLogger("gptlab")

# What may differ from the run as it began: where it runs, when it stops, and what is watched how often.
WHERE = tuple(f"trainer.{name}" for name in ("accelerator", "devices", "num_nodes", "strategy"))
FREE = (
    *WHERE,
    *("compile", "trainer.max_steps", "trainer.max_epochs", "max_time"),
    *("callbacks.early_stopping.patience", "callbacks.early_stopping.min_delta"),
    *("logger", "validation.every_steps", "samples.every_steps", "log.every_steps", "trust"),
    *(f"checkpoint.{name}" for name in ("every_steps", "every_epochs", "every_minutes", "keep_last", "background")),
)
PARTS = (
    *("seed", "validation", "log", "checkpoint", "samples", "model", "data", "tokenizer"),
    *("task", "optimizer", "schedule", "trainer", "logger", "callbacks"),
)
KEEPS_ITS_CONFIG = (
    "a resumed run keeps its config; leave these overrides out, or start anew (init_from takes over weights):"
)
BOTH = "{}: the run has {!r}, the command line {!r} ({})"
OF_THE_COMMAND = ("run_dir", "resume", "init_from", "parent")  # these say what to do, not what the run is


class DamagedConfig(ValueError):  # noqa: N818 - what a user reads is its message
    """A config.yaml that is none, or not there."""


def save_config(cfg: dict[str, Any], folder: RunFolder) -> None:
    write_atomically(folder.config, lambda file: file.write(config_text(cfg).encode()))


def config_text(cfg: dict[str, Any]) -> str:
    """What config.yaml holds."""
    return yaml.safe_dump({"format": RUN_FORMAT} | cfg, sort_keys=False, allow_unicode=True)


def saved_config(folder: RunFolder) -> dict[str, Any]:
    """The config of a run, in the form that this version has; where config.yaml is damaged, a checkpoint's copy of it.

    Raises ValueError where there is none that it knows.
    """
    try:
        if not folder.config.is_file():
            raise DamagedConfig(f"resume={folder.path}: no config.yaml there, so it is no run folder")
        return parsed_config(folder.config.read_bytes(), folder.config)
    except DamagedConfig as error:
        path, text = copy_of_config(folder)
        if text is None:
            raise
        fault = error if folder.config.is_file() else f"{folder.config} is missing"
        log.warning("%s; going on with the copy in %s", fault, path)
        return parsed_config(text.encode(), path)


def copy_of_config(folder: RunFolder) -> tuple[Path, str] | tuple[None, None]:
    """The newest checkpoint that can be read, and the config.yaml that it keeps."""
    files = sorted(folder.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files:
        try:
            if text := checkpoint.load(path)["callbacks"]["RunRecord"].get("config"):
                return path, text
        except (ValueError, KeyError):
            continue
    return None, None


def saved_tokenizer(folder: RunFolder, path: Path, state: dict[str, Any], trust: tuple[str, ...]) -> Tokenizer:
    """The tokenizer of a run; where its folder is damaged or gone, the copy in `state`, the checkpoint in `path`."""
    try:
        return load_tokenizer(folder.tokenizer, trust)
    except ValueError as error:
        fault = str(error).partition(": give ")[0]  # the remedy for who has named another
        log.warning("%s; going on with the copy in %s", fault, path)
        return tokenizer_from_state(state[checkpoint.OWN_KEY]["tokenizer"], trust)


def parsed_config(text: bytes, path: Path) -> dict[str, Any]:
    try:
        content = OmegaConf.to_container(OmegaConf.create(text.decode()))
    except (yaml.YAMLError, OmegaConfBaseException, UnicodeDecodeError) as error:
        raise DamagedConfig(f"{path}: damaged, it is no YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(content, dict) or not isinstance(found := content.pop("format", 1), int):
        raise DamagedConfig(f"{path}: damaged, it holds no config of a run")
    if found > RUN_FORMAT:
        raise ValueError(
            f"{path}: a run folder of format {found}, this gptlab knows up to {RUN_FORMAT}; use a newer one"
        )
    try:
        for migrate in MIGRATIONS[found - 1 :]:
            migrate(content)
    except (KeyError, TypeError) as error:
        raise DamagedConfig(f"{path}: damaged, it holds no config of a run ({error} is missing)") from error
    if missing := [key for key in PARTS if key not in content]:
        raise DamagedConfig(f"{path}: damaged, it holds no config of a run ({missing[0]} is missing)")
    return content


def require_same_config(cfg: dict[str, Any], state: dict[str, Any], folder: RunFolder) -> None:
    """Raise ValueError where config.yaml is no longer the one that a checkpoint was made with.

    Where text is found may change, as it does on another machine: its fingerprint says whether it is the same.
    """
    if not (text := state["callbacks"]["RunRecord"].get("config")):
        return
    then, now = flat(parsed_config(text.encode(), folder.config)), flat(cfg)
    names = ("files", "validation_files", "tokens", "validation_tokens", "source.folders", "stream.folder")
    holders = ("data", *(f"data.mix.{name}" for name in cfg["data"].get("mix") or ()))
    files = (f"{holder}.{name}" for holder in holders for name in names)
    free = (*FREE, *OF_THE_COMMAND, *files, "tokenizer.path", "tokenizer.files")
    changed = sorted(key for key in {*then, *now} if then.get(key) != now.get(key) and not is_below(key, free))
    if changed:
        faults = [f"{key}: {now.get(key)!r}, and {then.get(key)!r} in the checkpoint" for key in changed[:10]]
        raise ValueError(
            f"{folder.config} is not the one that the run was trained with; restore it, or delete it to go on with the "
            "checkpoint's copy:\n" + "\n".join(faults)
        )


def _from_1(config: dict[str, Any]) -> None:
    config["checkpoint"] |= {"every_minutes": None, "background": False}
    config["nonfinite"] = "stop"


def _from_2(config: dict[str, Any]) -> None:
    config["depth"] = config["data"]["text_bytes"] = None
    if config["optimizer"].get("_target_") == "gptlab.optim.Muon":
        config["optimizer"].setdefault("width", None)


def _from_3(config: dict[str, Any]) -> None:
    config["model"].setdefault("head_dim", None)


MIGRATIONS = (_from_1, _from_2, _from_3)  # of the config, from format 1 to 2 and so on
RUN_FORMAT = len(MIGRATIONS) + 1


def same_run(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two configs describe one run, leaving out what may change when it is resumed."""
    leaves = [flat(config) for config in (one, other)]
    keys = {key for side in leaves for key in side if not is_below(key, FREE + OF_THE_COMMAND)}
    return all(leaves[0].get(key) == leaves[1].get(key) for key in keys)


def is_run_of(run: RunFolder, cfg: dict[str, Any]) -> bool:
    """Whether a run is one of this config; one that cannot be read is passed over, and said."""
    try:
        return same_run(saved_config(run), cfg)
    except ValueError as error:
        log.warning("passed over: %s", error)
        return False


def find_run(cfg: dict[str, Any]) -> tuple[RunFolder, Path | None] | None:
    """The folder and checkpoint that `resume` means; None for `auto` where there is no such run yet."""
    if cfg["resume"] != "auto":
        path = Path(cfg["resume"])
        if path.is_file():  # <run>/checkpoints/<name>.ckpt
            if not (path.absolute().parent.parent / "config.yaml").is_file():
                raise ValueError(
                    f"resume={path}: this file is no checkpoint in a run folder; init_from takes weights alone"
                )
            path = path.absolute()
            if fault := fault_of(path, Manifest(path.parent)):
                raise ValueError(fault)
            return RunFolder(path.parent.parent), path
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
        found = next((run for run in candidates if is_run_of(run, cfg)), None)
        if found is None:
            return None
        folder = found
    return folder, newest_checkpoint(folder)


def newest_checkpoint(folder: RunFolder) -> Path | None:
    """The newest file of a run that is whole; None where the run never saved. Says what is wrong with newer ones.

    Raises ValueError if there are or were files and none is whole: starting over in silence would lose the run.
    """
    manifest = Manifest(folder.checkpoints)
    files = sorted(folder.checkpoints.glob("*.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True)
    files.sort(key=lambda path: (-manifest.place_of(path), path != folder.last))
    if files and manifest.fault:
        log.warning("%s in %s: each file is held to its own checksums", manifest.fault, folder.checkpoints)
    faults = []
    for path in files:
        if fault := fault_of(path, manifest):
            faults.append(fault)
            continue
        for passed_over in faults:
            log.warning("passed over: %s", passed_over)
        return path
    remedy = "put a whole one there, or begin anew with another run_dir"
    if faults:
        raise ValueError("\n".join([*faults, f"no whole checkpoint is left: {remedy}"]))
    if had_checkpoints(folder, manifest):
        raise ValueError(f"{folder.checkpoints}: no checkpoint is left of a run that had some: {remedy}")
    return None


def had_checkpoints(folder: RunFolder, manifest: Manifest) -> bool:
    """Whether a run has saved before, where no file is left: a crash in the first save leaves traces of one step."""
    entered = {entry["step"] for entry in manifest.entries}
    return len(entered) > 1 or len(folder.validated_steps()) > 1 or folder.status().get("status") == "completed"


def fault_of(path: Path, manifest: Manifest) -> str | None:
    """Why a checkpoint cannot be resumed from, if so. One that somebody put there is held to its own checksums."""
    unknown = None if manifest.fault else manifest.fault_of(path)
    try:
        checkpoint.load(path)
        fault = checkpoint.checksum_fault(path) if manifest.fault or unknown else None
    except ValueError as error:
        fault = str(error)
    if unknown and fault:
        return f"{path}: {unknown}"
    if unknown:
        log.warning("%s: %s does not know it; by its own checksums it is whole", path, manifest.path.name)
    return fault


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
            if key in overridden and not is_below(key, WHERE):
                put(config, key, now[key])
        elif key in ("seed", "samples.seed"):
            seed_ignored = True
        elif named != ["trainer"]:
            typed = ", ".join(sorted({overridden[name] for name in named}))
            faults.append(BOTH.format(key, then.get(key), now.get(key), typed))
    if faults:
        raise ValueError("\n".join([KEEPS_ITS_CONFIG, *faults[:10]]))
    # A word like trainer=gpu says where to run; what else stands in its config was not asked for.
    for name in WHERE:
        if "trainer" in overridden or any(is_below(given, (name,)) for given in overridden):
            config["trainer"].pop(name.partition(".")[2], None)
            config["trainer"] |= {key: value for key, value in composed["trainer"].items() if f"trainer.{key}" == name}
    if any(is_below(name, ("logger",)) for name in overridden):
        config["logger"] = composed["logger"]
    lift_the_other_limit(config, overridden)
    return config, seed_ignored


def put(config: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        if not isinstance(config.get(parent), dict):  # what is missing around it is an error of its own
            config[parent] = {}
        config = config[parent]
    config[last] = value


def lift_the_other_limit(config: dict[str, Any], overridden: dict[str, str]) -> None:
    """Whoever gives a new max_steps or max_epochs wants the run to go on until then, whatever it ended by before."""
    steps, epochs = "trainer.max_steps" in overridden, "trainer.max_epochs" in overridden
    if steps and not epochs:
        config["trainer"]["max_epochs"] = None
    if epochs and not steps:
        config["trainer"]["max_steps"] = -1
