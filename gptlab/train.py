"""The door `python -m gptlab.train`: a composed config becomes a trained model in a run folder."""

import time

PROCESS_START = time.time()  # before the imports, which count as start-up

import logging  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import yaml  # noqa: E402
from lightning.pytorch import seed_everything  # noqa: E402

from gptlab import assembly, checkpoint, config, doors  # noqa: E402
from gptlab.data.module import TextDataModule  # noqa: E402
from gptlab.outcome import Outcome  # noqa: E402
from gptlab.resume import find_run, resumed_config, saved_config  # noqa: E402
from gptlab.run import RunFolder, write_atomically  # noqa: E402
from gptlab.tokenizer import load_tokenizer  # noqa: E402

log = logging.getLogger("gptlab")


def train(cfg: dict[str, Any], overridden: set[str], name: str) -> int:
    """Train what `cfg` describes, or continue the run that it names; the exit code.

    `overridden` are the keys given on the command line, `name` is what a new run folder is called.
    """
    if cfg["resume"] is not None and cfg["init_from"] is not None:
        raise ValueError("resume continues a run and init_from starts a new one from its weights: give one of them")
    found = find_run(cfg) if cfg["resume"] is not None else None
    ckpt_path = None
    if found is not None:
        folder, ckpt_path = found
        cfg, seed_ignored = resumed_config(saved_config(folder), cfg, overridden)
        if seed_ignored:
            log.warning("seed is ignored: a resumed run keeps its own, %s", cfg["seed"])
    else:
        folder = RunFolder(Path(cfg["run_dir"])) if cfg["run_dir"] else RunFolder.new(name)
    config.check_targets(cfg, config.trusted(cfg))
    assembly.check(cfg, folder)
    folder.acquire(resume=found is not None)
    try:
        return run(cfg, folder, overridden, resumes=found is not None, ckpt_path=ckpt_path)
    finally:
        folder.release()
        doors.say(f"run: {folder.path}")


def run(cfg: dict[str, Any], folder: RunFolder, overridden: set[str], resumes: bool, ckpt_path: Path | None) -> int:
    """Build everything, train, and leave a result; the run folder is ours."""
    with doors.logging_to(folder.log), Outcome(folder, cfg, PROCESS_START) as outcome:
        seed_everything(cfg["seed"], workers=True, verbose=False)
        parent = tokenizer = None
        if cfg["init_from"] and ckpt_path is not None:  # the parent has done its part, and may be gone
            tokenizer = load_tokenizer(folder.tokenizer, config.trusted(cfg))
        elif cfg["init_from"]:
            cfg, parent, tokenizer = assembly.start_weights(cfg, overridden)
        assembly.require_device(cfg["trainer"]["accelerator"])
        data = assembly.build_data(cfg, tokenizer)
        model = assembly.build_model(cfg, data.tokenizer)
        if parent is not None:
            model.load_state_dict(checkpoint.model_weights(parent))

        accumulate = cfg["trainer"]["accumulate_grad_batches"]
        steps_an_epoch = len(data.order(accumulate)) // accumulate
        total_steps = assembly.steps_to_train(cfg["trainer"], steps_an_epoch)
        task = assembly.build_task(cfg, model, data.tokenizer, total_steps)
        watchers = assembly.Watchers(cfg, folder, total_steps)
        outcome.watch(task, data, watchers, cfg.get("parent"))
        resumed_step = None
        if resumes:  # a run that never saved starts over
            resumed_step = 0 if ckpt_path is None else checkpoint.load(ckpt_path)["global_step"]
            folder.truncate_after(resumed_step)
        loggers = assembly.build_loggers(cfg["logger"], folder, resumed_step)
        trainer = assembly.build_trainer(cfg, watchers, loggers, doors.on_terminal(), folder.path)

        save_config(cfg, folder)
        data.tokenizer.save(folder.tokenizer)
        log.info(describe_data(data))
        log.info(assembly.describe_cost(model.config, data.config.batch_size, trainer.precision, config.trusted(cfg)))
        log.info("%s steps of %s windows on %s, %s", f"{total_steps:,}", data.config.batch_size * accumulate,
                 trainer.strategy.root_device, trainer.precision)  # fmt: skip
        if resumed_step is not None:
            log.info("continuing from %s, at step %s", ckpt_path or "the start", f"{resumed_step:,}")
        if resumed_step is not None and resumed_step >= total_steps:
            log.info("nothing to do: the run has ended at step %s; a larger trainer.max_steps extends it", resumed_step)
            outcome.nothing_to_do()
            return 0
        trainer.fit(task, data, ckpt_path=ckpt_path)
    return outcome.exit_code


def describe_data(data: TextDataModule) -> str:
    """One line on the text that a run is about to see."""
    train, validation = (data.prepared.meta["splits"][side] for side in ("train", "validation"))
    return (
        f"{train['tokens']:,} training tokens of {train['documents']:,} documents "
        f"in {len(data.train_windows):,} windows, "
        f"{validation['tokens']:,} validation tokens; vocabulary {data.tokenizer.vocab_size:,}"
    )


def save_config(cfg: dict[str, Any], folder: RunFolder) -> None:
    text = yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True)
    write_atomically(folder.config, lambda file: file.write(text.encode()))


def main() -> None:
    doors.hydra_door("train", train)


if __name__ == "__main__":
    main()
