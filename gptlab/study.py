"""`hydra/sweeper=optuna`: the values of a sweep's jobs are proposed one after another, from what came of those before.

The study is Optuna's own, in a journal in the sweep's folder, and its trials are the sweep's jobs. A trial is proposed
in a copy of the study as it was before its batch, by a sampler with a seed of its own, and enters the journal whole: so
trial k does not depend on how often the study was interrupted.
"""

import random
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from gptlab import jobs
from gptlab.checks import check_targets, misfits
from gptlab.config import plain
from gptlab.explain import nearest
from gptlab.files import write_atomically
from gptlab.given import strip_key
from gptlab.jobs import INTERRUPTED
from gptlab.launchers import launcher_of, needed
from gptlab.sweep import OF_THE_SWEEP, read_result

JOURNAL = "study.journal"


class Optuna(Sweeper):
    """Runs `n_trials` jobs, `n_jobs` at a time (null: as many as the launcher does), for the best `metric`."""

    def __init__(
        self,
        n_trials: int,
        n_jobs: int | None,
        seed: int,
        metric: str,
        direction: str,
        sampler: dict[str, Any],
        params: dict[str, str] | None,
    ):
        self.n_trials, self.n_jobs, self.seed = n_trials, n_jobs, seed
        self.metric, self.direction, self.sampler, self.params = metric, direction, sampler, params or {}

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        self.optuna = needed("optuna", "hydra/sweeper=optuna")
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        faults = list(misfits("hydra.sweeper", type(self), plain(config.hydra.sweeper)))
        if self.direction not in ("minimize", "maximize"):
            faults.append(f"hydra.sweeper.direction={self.direction!r} is neither minimize nor maximize")
        if faults:
            raise ValueError("; ".join(faults))
        check_targets({"hydra": {"sweeper": {"sampler": self.sampler}}}, ("optuna",))
        self.hydra_context, self.config = hydra_context, config
        self.launcher = launcher_of(hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> None:
        given = [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
        parsed = OverridesParser.create(self.hydra_context.config_loader).parse_overrides(given)
        overrides = {override.get_key_element(): override for override in parsed}  # the last of a key wins
        self.space = {key: self.distribution(o) for key, o in overrides.items() if o.is_sweep_override()}
        self.fixed = [o.input_line for o in overrides.values() if not o.is_sweep_override()]
        if not self.space:
            raise ValueError(
                "hydra/sweeper=optuna has nothing to vary; give a key several values, "
                "such as optimizer.lr=tag(log,interval(1e-4,1e-2)) or model.n_layer=choice(2,4)"
            )
        self.require_composable()
        folder = self.launcher.sweep.folder
        study = self.open_study(folder)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        size = self.n_jobs or self.launcher.at_once
        for first in range(0, self.n_trials, size):
            if not self.run_batch(study, range(first, min(first + size, self.n_trials))):
                break
        self.report(study, folder)

    def run_batch(self, study: Any, numbers: range) -> bool:
        """Propose, run and tell these trials, as far as that was not done before; False if the sweep is to end."""
        for number in range(len(study.trials), numbers.stop):
            self.propose(study, number, numbers.start)
        trials = study.trials[numbers.start : numbers.stop]
        begun = [self.overrides_of(trial) for trial in trials]
        told = sum(trial.state.is_finished() for trial in trials)  # in the order of their numbers
        for number, overrides in zip(numbers, begun[:told], strict=False):
            self.launcher.sweep.job(number, overrides)  # for the table
        if begun[told:]:
            self.launcher.launch(begun[told:], initial_job_idx=numbers.start + told)
        for number in numbers[told:]:
            record = jobs.records(self.launcher.sweep.folder).get(number)
            if record is None or record["exit_code"] in INTERRUPTED:
                return False
            value = self.value_of(record)
            state = self.optuna.trial.TrialState
            study.tell(number, value, state=state.FAIL if value is None else state.COMPLETE)
        return True

    def value_of(self, record: dict[str, Any]) -> float | None:
        """What a job came to; None where it failed or the figure is null."""
        if record["exit_code"] != 0:
            return None
        result = read_result(Path(record["run_dir"]))
        value = result.get(self.metric)
        if self.metric not in result or not isinstance(value, int | float | None):
            known = [key for key, value in result.items() if isinstance(value, int | float)]
            raise ValueError(
                f"hydra.sweeper.metric={self.metric}: result.json has no such figure"
                f"{nearest(self.metric, known)} Known: {', '.join(known)}"
            )
        return value

    def propose(self, study: Any, number: int, first: int) -> None:
        """Add trial `number` of the batch that begins with `first`: of that batch only the values are known then."""
        seed = random.Random(f"{self.seed}/{number}").randrange(2**32)
        known = self.optuna.create_study(direction=self.direction, sampler=instantiate(self.sampler)(seed=seed))
        for trial in study.trials[:number]:
            if trial.number >= first:  # told meanwhile, perhaps, where n_trials has grown
                trial.state, trial.values, trial.datetime_complete = self.optuna.trial.TrialState.RUNNING, None, None
            known.add_trial(trial)
        known.ask(self.space)
        study.add_trial(known.trials[-1])

    def open_study(self, folder: Path) -> Any:
        """The study of this folder, new or as it was left. Raises ValueError where it was begun in another way."""
        journal = folder / JOURNAL
        if not journal.exists() and jobs.records(folder):
            raise ValueError(f"run_dir={folder} holds a sweep without a study; choose another folder")
        Path(f"{journal}.lock").unlink(missing_ok=True)  # left by a process that was killed: the folder is ours
        if journal.exists():
            text = journal.read_bytes()
            write_atomically(journal, lambda file: file.write(text[: text.rfind(b"\n") + 1]))  # whole lines
        storage = self.optuna.storages
        study = self.optuna.create_study(
            storage=storage.JournalStorage(storage.journal.JournalFileBackend(str(journal))),
            study_name="sweep",
            direction=self.direction,
            load_if_exists=True,
        )
        began = {"seed": self.seed, "metric": self.metric, "direction": self.direction, "sampler": self.sampler}
        began |= {"fixed": [o for o in self.fixed if strip_key(o) not in OF_THE_SWEEP]}
        began |= {key: str(distribution) for key, distribution in self.space.items()}
        then = study.user_attrs.get("began")
        if then is None:
            study.set_user_attr("began", began)
        elif then != began:
            other = [f"{key}: {then.get(key)} then, {began.get(key)} now" for key in then | began]
            other = [line for line, key in zip(other, then | began, strict=True) if then.get(key) != began.get(key)]
            raise ValueError(f"run_dir={folder} holds another study; choose another folder:\n" + "\n".join(other))
        return study

    def distribution(self, override: Override) -> Any:
        """The values that a swept key may take, in Optuna's terms."""
        kinds, value = self.optuna.distributions, override.value()
        log = "log" in getattr(value, "tags", ())
        if isinstance(value, IntervalSweep):
            kind = kinds.IntDistribution if isinstance(value.start, int) else kinds.FloatDistribution
            return kind(value.start, value.end, log=log)
        written = list(override.sweep_string_iterator())
        if isinstance(value, RangeSweep):
            steps = sorted(float(step) for step in written)
            if all(step.is_integer() for step in steps):
                return kinds.IntDistribution(int(steps[0]), int(steps[-1]), step=int(abs(value.step)))
            return kinds.FloatDistribution(steps[0], steps[-1], step=abs(value.step))
        return kinds.CategoricalDistribution(written)  # as typed, whatever they are

    def overrides_of(self, trial: Any) -> list[str]:
        return [*self.fixed, *(f"{key}={trial.params[key]}" for key in self.space)]

    def require_composable(self) -> None:
        """Raise now for a word that is wrong, not when it is its turn."""
        options = {key: getattr(kind, "choices", None) or [kind.low] for key, kind in self.space.items()}
        first = {key: choices[0] for key, choices in options.items()}
        several = [first | {key: choice} for key, choices in options.items() for choice in choices]
        self.validate_batch_is_legal([[*self.fixed, *(f"{k}={v}" for k, v in values.items())] for values in several])

    def report(self, study: Any, folder: Path) -> None:
        """Leave best.yaml, if any trial came to something."""
        state = self.optuna.trial.TrialState
        if not study.get_trials(states=[state.COMPLETE]):
            return
        best, overrides = study.best_trial, self.overrides_of(study.best_trial)
        content = {
            "job": best.number,
            "metric": self.metric,
            "value": best.value,
            "varied": [f"{key}={best.params[key]}" for key in self.space],
            "overrides": [override for override in overrides if strip_key(override) not in OF_THE_SWEEP],
            "run_dir": jobs.records(folder)[best.number]["run_dir"],
        }
        text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
        write_atomically(folder / "best.yaml", lambda file: file.write(text.encode()))
