"""Where the jobs of a sweep run: the words of `hydra/launcher`.

A job is a command that starts a process of its own, so a launcher has only to say where, and how many at a time.
Hydra's published launchers run a job inside their workers instead, and end those without letting the job save.
"""

import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from types import ModuleType
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig

from gptlab import jobs
from gptlab.checks import misfits
from gptlab.config import plain
from gptlab.jobs import INTERRUPTED, Job, Runner, processors
from gptlab.sweep import Sweep

POLL_S = 0.2


def register(*plugins: type) -> None:
    """Make plugins known to Hydra, which takes launchers and sweepers only from a package called hydra_plugins."""
    known, place = Plugins.instance(), ModuleType("hydra_plugins.gptlab")
    for plugin in plugins:
        plugin.__module__ = place.__name__
        setattr(place, plugin.__name__, plugin)
        known.register(plugin)
    sys.modules[place.__name__] = place
    sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins")).gptlab = place


def needed(module: str, word: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(f'{word} is not installed ({error}): pip install "gptlab[sweep]"') from error


def launcher_of(hydra_context: Any, task_function: Any, config: DictConfig) -> "Basic":
    """The launcher that a sweep's config names, for a sweeper that chooses its own jobs."""
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=hydra_context, task_function=task_function, config=config
    )
    assert isinstance(launcher, Basic)
    return launcher


class Basic(Launcher):
    """One job after another, from this process."""

    library: str | None = None  # what the word needs besides gptlab
    at_once = 1

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        if self.library is not None:
            self.imported = needed(self.library, f"hydra/launcher={self.library}")
        if faults := list(misfits("hydra.launcher", type(self), plain(config.hydra.launcher))):
            raise ValueError("; ".join(faults))
        self.sweep = Sweep.open(config, hydra_context.config_loader)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Run what is not done yet. The results are on disk; Hydra only wants to hear that there are some."""
        made = [self.job(initial_job_idx + k, overrides, job_overrides) for k, overrides in enumerate(job_overrides)]
        due = [job for job in made if not self.sweep.is_done(job)]
        for job in made:
            if job not in due:
                print(f"job {job.number}: {' '.join(job.varied)}: done before", flush=True)
        with self.sweep.heeding_signals():
            self.run_all(due)
        return [JobReturn(overrides=job.overrides, status=JobStatus.COMPLETED) for job in made]

    def job(self, number: int, overrides: Sequence[str], of: Sequence[Sequence[str]]) -> Job:
        return self.sweep.job(number, overrides)

    def run_all(self, due: list[Job]) -> None:
        for job in due:
            self.run_here(job)

    def run_here(self, job: Job) -> None:
        record = Runner()(job)
        if record is not None and record["exit_code"] in INTERRUPTED and not self.sweep.received:
            jobs.stop(self.sweep.folder, signal.SIGTERM)  # whoever stopped that job wants the sweep to end

    def lost(self, job: Job, error: BaseException) -> None:
        """Keep that a job ended, elsewhere, without a word of its own."""
        reason = f"{type(error).__name__}: {error}".strip()
        record = {"job": job.number, "overrides": job.overrides, "varied": job.varied, "run_dir": job.run_dir}
        jobs.append(self.sweep.folder, record | {"exit_code": 1, "seconds": 0, "error": reason})


class Joblib(Basic):
    """`n_jobs` at a time on this machine, which share its threads."""

    library = "joblib"

    def __init__(self, n_jobs: int):
        self.n_jobs = n_jobs

    @property
    def at_once(self) -> int:
        return self.n_jobs if self.n_jobs > 0 else max(processors() + 1 + self.n_jobs, 1)

    def job(self, number: int, overrides: Sequence[str], of: Sequence[Sequence[str]]) -> Job:
        at_once = min(self.at_once, len(of))
        given = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(given) if given.isdigit() else processors()
        return self.sweep.job(number, overrides, threads=max(threads // at_once, 1), labelled=at_once > 1)

    def run_all(self, due: list[Job]) -> None:
        # Threads are enough to watch processes, and signals reach this one alone.
        parallel = self.imported.Parallel(n_jobs=self.at_once, backend="threading", batch_size=1)
        parallel(self.imported.delayed(self.run_here)(job) for job in due)


class Requeued(Runner):
    """A job of submitit, which calls `checkpoint` when the time that the job was given is up, or its machine wanted."""

    def __call__(self, job: Job) -> dict[str, Any] | None:
        os.environ["SLURM_JOB_NAME"] = "interactive"  # Lightning would else take this task for one rank of many
        return super().__call__(job)

    def checkpoint(self, job: Job) -> Any:
        self.end(signal.SIGTERM)
        helpers = needed("submitit.helpers", "hydra/launcher=submitit")
        return helpers.DelayedSubmission(Requeued(), replace(job, resume=True))


class Submitit(Basic):
    """Jobs of SLURM, or processes of this machine all at a time; see submitit's `AutoExecutor` for `parameters`."""

    library = "submitit"

    def __init__(self, cluster: str | None, parameters: dict[str, Any]):
        self.cluster, self.parameters = cluster, dict(parameters)

    def job(self, number: int, overrides: Sequence[str], of: Sequence[Sequence[str]]) -> Job:
        return self.sweep.job(number, overrides, threads=self.parameters.get("cpus_per_task"))

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        try:
            self.executor = self.imported.AutoExecutor(self.sweep.folder / ".submitit", cluster=self.cluster)
            self.executor.update_parameters(**self.parameters)
        except (AssertionError, NameError, RuntimeError, TypeError, ValueError) as error:  # as submitit says it
            raise ValueError(f"hydra.launcher.cluster={self.cluster}, {self.parameters}: {error}") from error

    def run_all(self, due: list[Job]) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # Ctrl-C here is for this process, not for those
        try:
            submitted = dict(zip(self.executor.map_array(Requeued(), due), due, strict=True)) if due else {}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        for queued, job in submitted.items():
            print(f"job {job.number}: {' '.join(job.varied)}: {queued.job_id} of submitit", flush=True)
        while submitted:
            time.sleep(POLL_S)
            for queued in [queued for queued in submitted if self.sweep.received and queued.state == "PENDING"]:
                queued.cancel(check=False)
                del submitted[queued]
            for ended in [queued for queued in submitted if queued.done()]:
                self.tell(ended, submitted.pop(ended))

    def tell(self, ended: Any, job: Job) -> None:
        """Say what a job came to: its own words are in a file of submitit's."""
        error = ended.exception()
        if error is not None and not self.sweep.received:
            self.lost(job, error)
        record = ended.result() if error is None else jobs.records(self.sweep.folder).get(job.number)
        if record is None:  # nothing of it ran
            print(f"job {job.number}: ended", flush=True)
        elif record["exit_code"] == 0:
            print(f"job {job.number}: ended well", flush=True)
        else:
            said = (record["error"] or "no error was said").splitlines()[0]
            print(f"job {job.number}: exit code {record['exit_code']}: {said} (log: {ended.paths.stderr})", flush=True)


class Ray(Basic):
    """Tasks of a Ray cluster, or of one made here; see `ray.init` for `init` and `ray.remote` for `options`."""

    library = "ray"

    def __init__(self, init: dict[str, Any], options: dict[str, Any]):
        self.init, self.options = dict(init), dict(options)

    def job(self, number: int, overrides: Sequence[str], of: Sequence[Sequence[str]]) -> Job:
        return self.sweep.job(number, overrides, threads=max(int(self.options.get("num_cpus") or 1), 1))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        if not self.imported.is_initialized():  # before signals are heeded: it sets handlers of its own
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told without having been asked
            self.imported.init(**self.init)
        return super().launch(job_overrides, initial_job_idx)

    def run_all(self, due: list[Job]) -> None:
        remote = self.imported.remote(max_retries=0, **self.options)(run)
        waiting = {remote.remote(job): job for job in due}
        while waiting:
            ended, _ = self.imported.wait(list(waiting), timeout=POLL_S)
            for reference in ended:
                job = waiting.pop(reference)
                try:
                    self.imported.get(reference)
                except self.imported.exceptions.RayError as error:
                    self.lost(job, error)


def run(job: Job) -> None:
    """A job as a task of Ray."""
    Runner()(job)


WORDS = (Basic, Joblib, Submitit, Ray)
