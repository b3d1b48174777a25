"""The door `python -m gptlab.train`: a composed config becomes a trained model in a run folder."""

from gptlab import start

if __name__ == "__main__":
    start.begin("train")  # before the imports, which take seconds

import logging
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything

from gptlab import assembly, checkpoint, checks, config, doors, jobs, ranks
from gptlab.callbacks.averaging import average_in
from gptlab.data.module import data_rank, tensor_ranks
from gptlab.depth import parameters
from gptlab.inherit import inherit
from gptlab.machine import keep_freed_memory
from gptlab.outcome import Outcome
from gptlab.resume import (
    config_text,
    find_run,
    require_same_config,
    resumed_config,
    save_config,
    saved_config,
    saved_tokenizer,
)
from gptlab.run import RunFolder
from gptlab.sharding import require_splittable

log = logging.getLogger("gptlab")


def train(cfg: dict[str, Any], overridden: dict[str, str], name: str) -> int:
    """Train what `cfg` describes, or continue the run that it names; the exit code.

    `overridden` are the keys given on the command line, each with what was typed for it; `name` is what a new run
    folder is called.
    """
    if cfg["resume"] is not None and cfg["init_from"] is not None:
        raise ValueError("resume continues a run and init_from starts a new one from its weights: give one of them")
    cfg = config.absolute_paths(cfg)
    leader = ranks.leader_said()
    if leader is not None:
        ranks.watch_leader()
        found = (RunFolder(Path(leader["run_dir"])), leader["checkpoint"] and Path(leader["checkpoint"]))
        found, cfg = (found if leader["resumes"] else None), cfg | {"run_dir": leader["run_dir"]}
    else:
        require_run_dir(cfg)
        found = find_run(cfg) if cfg["resume"] is not None else None
    if cfg["resume"] == "auto" and found is None:
        log.info("resume=auto: no unfinished run of this config in %s: a new one starts", cfg["run_dir"] or "runs/")
    ckpt_path = None
    if found is not None:
        folder, ckpt_path = found
        cfg, seed_ignored = resumed_config(saved_config(folder), cfg, overridden)
        if seed_ignored:
            log.warning("seed is ignored: a resumed run keeps its own, %s", cfg["seed"])
    checks.check_targets(cfg, config.trusted(cfg))
    checks.check(cfg)
    if found is None:
        folder = RunFolder(Path(cfg["run_dir"])) if cfg["run_dir"] else RunFolder.new(name)
    if not ranks.is_first():  # the folder is the first one's
        code = run(cfg, folder, overridden, resumes=found is not None, ckpt_path=ckpt_path)
        # Lightning's first process would take a follower that ends as asked for one that has failed.
        return 0 if leader is not None and code in jobs.INTERRUPTED else code
    folder.acquire(resume=found is not None)
    exit_code, start.last_words = None, f"run: {folder.path}"
    try:
        if found is None:  # before there is a status: what has one can be resumed
            save_config(cfg, folder)
        exit_code = run(cfg, folder, overridden, resumes=found is not None, ckpt_path=ckpt_path)
        return exit_code
    finally:
        # A new folder that nobody asked for by name, in which nothing has begun, would only be in the way.
        is_useless = exit_code == doors.BAD_INPUT and found is None and cfg["run_dir"] is None and not folder.has_begun
        if is_useless:
            folder.discard()
        folder.release()
        if not is_useless:
            doors.say(start.last_words)
        start.last_words = None


def require_run_dir(cfg: dict[str, Any]) -> None:
    """Raise ValueError where several processes would each choose a folder of their own."""
    apart = ranks.started_outside() or cfg["trainer"]["num_nodes"] > 1
    if apart and cfg["run_dir"] is None and cfg["resume"] in (None, "auto"):
        raise ValueError(
            "processes that torchrun or SLURM starts, or on several nodes, must know the run folder: give "
            "run_dir=<folder>, the same to all, and resume=auto to go on there after a restart"
        )


def run(
    cfg: dict[str, Any], folder: RunFolder, overridden: dict[str, str], resumes: bool, ckpt_path: Path | None
) -> int:
    """Build everything, train, and leave a result; the run folder is ours."""
    with doors.logging_to(folder.log), Outcome(folder, cfg) as outcome:
        seed_everything(cfg["seed"], workers=True, verbose=False)
        keep_freed_memory()
        parent = tokenizer = state = None
        step, saved_cfg, world = 0, cfg, assembly.data_world(cfg["trainer"])
        if ckpt_path is not None:  # the run's own; what it was made from may be gone
            state = checkpoint.load(ckpt_path)
            tokenizer = saved_tokenizer(folder, ckpt_path, state, config.trusted(cfg))
            step = state["global_step"]
            log.info("continuing from %s, at step %s", ckpt_path, f"{step:,}")
            cfg = assembly.fit_to_ranks(cfg, state[assembly.data_kind(cfg).__qualname__]["windows_a_step"], world)
        else:
            if resumes:
                log.info("no checkpoint yet: the run begins at step 0")
            cfg = assembly.share_dial(cfg, overridden, world)
        if state is None and cfg["init_from"]:
            cfg, parent, tokenizer = inherit(cfg, overridden)
            saved_cfg = cfg
        data = assembly.build_data(cfg, tokenizer)
        assembly.import_compiler(cfg)
        model = assembly.build_model(cfg, data.tokenizer)
        if parent is not None:
            model.load_state_dict(parent)

        accumulate = cfg["trainer"]["accumulate_grad_batches"]
        total_steps = assembly.steps_to_train(cfg["trainer"], len(data.order(accumulate, 0, world)) // accumulate)
        task = assembly.build_task(cfg, model, data.tokenizer, total_steps)
        watchers = assembly.Watchers(cfg, folder, total_steps)
        outcome.watch(task, data, watchers, cfg.get("parent"))
        loggers = assembly.build_loggers(cfg["logger"], folder, step if resumes else None)
        trainer = assembly.build_trainer(cfg, watchers, loggers, doors.on_terminal(), folder.path)
        if (sharing := tensor_ranks(trainer)) > 1:
            require_splittable(model, sharing)
        if state is not None:
            require_same_config(saved_cfg, state, folder)
            data.require_same(state[type(data).__qualname__], trainer)
            if checkpoint.model_config(state) != model.config:
                raise ValueError(f"{ckpt_path}: its network is not the one that {folder.config} describes")
            if ended := why_ended(state, watchers, overridden):
                log.info("nothing to do: %s", ended)
                outcome.nothing_to_do(state)
                return 0
        # Nothing that was there before has been touched up to here.
        if ranks.is_first():
            if resumes:
                folder.truncate_after(step, {} if state is None else state["callbacks"]["RunRecord"].get("tails", {}))
            save_config(saved_cfg, folder)
            data.tokenizer.save(folder.tokenizer)
        watchers.record.config_text = config_text(saved_cfg)
        ranks.tell_followers(
            {"run_dir": str(folder.path), "checkpoint": ckpt_path and str(ckpt_path), "resumes": resumes}
        )
        log.info(data.describe())
        sizes = (data.config.batch_size, trainer.precision, config.trusted(cfg))
        log.info(assembly.describe_cost(model.config, *sizes, averaged=average_in(trainer) is not None))
        log.info(describe_steps(cfg, total_steps, trainer))
        state = parent = None  # Lightning reads the file itself: no memory for it twice
        trainer.fit(task, data, ckpt_path=ckpt_path)
    return outcome.exit_code


def why_ended(state: dict[str, Any], watchers: assembly.Watchers, overridden: dict[str, str]) -> str | None:
    """What to say where a checkpoint is of a run that ended by itself, and nothing given lets it go on."""
    budget = state["callbacks"]["Budget"]
    if watchers.budget.is_spent(state["global_step"], budget["seconds"]):
        return "the run has ended; a larger trainer.max_steps or max_time extends it"
    if budget.get("stopped_early") and not any(
        config.is_below(key, ("callbacks.early_stopping",)) for key in overridden
    ):
        return "the run has stopped early; a larger +callbacks.early_stopping.patience lets it go on"
    return None


def describe_steps(cfg: dict[str, Any], total_steps: int, trainer: Trainer) -> str:
    """One line on the steps to come, and a word where the learning rate never reaches its peak."""
    windows = cfg["data"]["batch_size"] * cfg["trainer"]["accumulate_grad_batches"] * data_rank(trainer)[1]
    device, count = trainer.strategy.root_device, trainer.world_size
    where = device if count == 1 else f"{count} x {device.type}"
    line = f"{total_steps:,} steps of {windows} windows on {where}, {trainer.precision}"
    warmup = cfg["schedule"].get("warmup_steps") or 0
    if warmup >= total_steps:
        line += f"; schedule.warmup_steps={warmup}: the learning rate will not reach its peak"
    if cfg["depth"] is not None:
        tokens = total_steps * windows * cfg["model"]["block_size"]
        each = tokens / parameters(cfg["model"]["n_layer"], cfg["model"]["n_embd"])
        line += f"; depth={cfg['depth']}: {each:.2g} tokens a parameter"
    return line


def main() -> None:
    doors.hydra_door("train", train)


if __name__ == "__main__":
    main()
