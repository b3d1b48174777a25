"""`hydra/sweeper=staged`: the jobs of a sweep come from a function, which sees what came of those before.

The function is a generator. It is called with the sweep's folder, and with `compose`, which gives the plain config of
a job. It yields a list of jobs, each a list of overrides; it is sent what they came to, the content of each result.json
with its `run_dir`; it yields the next list, and so on. When a sweep goes on, all that is asked anew, and what is done
is only shown: the jobs must follow from what was sent.
"""

from pathlib import Path
from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gptlab import jobs
from gptlab.checks import check_targets
from gptlab.config import plain, trusted
from gptlab.given import strip_key
from gptlab.launchers import launcher_of
from gptlab.sweep import OF_THE_SWEEP, read_result, swept_keys


class Staged(Sweeper):
    """Runs one list of jobs after another, as `stages` yields them, until there are none or one has failed."""

    def __init__(self, stages: dict[str, Any] | None):
        self.stages = stages

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        if not (self.stages or {}).get("_target_"):
            raise ValueError(
                "hydra/sweeper=staged needs hydra.sweeper.stages._target_=<a generator function of the sweep's folder>"
            )
        check_targets({"hydra": {"sweeper": {"stages": dict(self.stages)}}}, trusted({"trust": config.trust}))
        self.hydra_context, self.config = hydra_context, config
        self.launcher = launcher_of(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        if several := swept_keys(arguments):
            raise ValueError(
                f"{several.pop()}: hydra/sweeper=staged takes one value of it, and chooses the jobs itself"
            )
        folder = self.launcher.sweep.folder
        require_same_stages(folder, self.config)
        OmegaConf.save(self.config, folder / "multirun.yaml")

        def compose(job: list[str]) -> dict[str, Any]:
            composed = self.hydra_context.config_loader.load_sweep_config(self.config, [*arguments, *job])
            return plain(OmegaConf.masked_copy(composed, [key for key in composed if key != "hydra"]))

        stages = instantiate(self.stages, _partial_=True, _convert_="all")(folder, compose)
        batch, number = next(stages, []), 0
        while batch:
            results = self.run_batch(arguments, batch, number)
            number += len(batch)
            try:
                batch = [] if results is None else stages.send(results)
            except StopIteration:
                batch = []

    def run_batch(self, arguments: list[str], batch: list[list[str]], number: int) -> list[dict[str, Any]] | None:
        """Run these jobs, the first of which is `number`; what they came to, or None where one was not completed."""
        given, chosen = {strip_key(a): a for a in arguments}, {strip_key(o) for job in batch for o in job}
        if common := [given[key] for key in given if key in chosen]:
            raise ValueError(
                f"{', '.join(common)}: this sweep chooses that itself; see hydra.sweeper.stages in --cfg all"
            )
        self.launcher.sweep.swept |= chosen
        overrides = [[*arguments, *job] for job in batch]
        self.validate_batch_is_legal(overrides)
        self.launcher.launch(overrides, initial_job_idx=number)
        folder = self.launcher.sweep.folder
        records = [jobs.records(folder).get(place) for place in range(number, number + len(batch))]
        if any(record is None or record["exit_code"] for record in records):
            return None
        places = [folder / Path(record["run_dir"]).name for record in records if record]
        return [read_result(place) | {"run_dir": str(place)} for place in places]


def require_same_stages(folder: Path, config: DictConfig) -> None:
    """Raise ValueError where the sweep in `folder` has other stages, or was given other overrides."""
    try:
        then = OmegaConf.load(folder / "multirun.yaml")
    except FileNotFoundError:
        return
    one, other = told(then), told(config)
    if one != other:
        changed = [f"{key}: {one.get(key)} then, {other.get(key)} now" for key in one | other]
        changed = [line for line, key in zip(changed, one | other, strict=True) if one.get(key) != other.get(key)]
        raise ValueError(f"run_dir={folder} holds another sweep; choose another folder:\n" + "\n".join(changed))


def told(config: DictConfig) -> dict[str, Any]:
    """What the jobs of a staged sweep follow from."""
    stages = OmegaConf.to_container(config, resolve=False)["hydra"]["sweeper"].get("stages") or {}
    given = [override for override in config.hydra.overrides.task if strip_key(override) not in OF_THE_SWEEP]
    return {"command line": given, **{f"hydra.sweeper.stages.{key}": value for key, value in stages.items()}}
