"""Every config composes, every wrong word is named with the right one, and the floors hold."""

import ast
import functools
import itertools
import re
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, compose, door

from gptlab import checks, config, manual
from gptlab.optim import cosine

GROUPS = config.groups()[:-1]
WORDS = [(group, path.stem) for group in GROUPS for path in sorted((REPOSITORY / "conf" / group).glob("*.yaml"))]
EXPERIMENTS = sorted(path.stem for path in (REPOSITORY / "experiments").glob("*.yaml"))


@pytest.mark.parametrize(("group", "word"), WORDS)
def test_every_word_composes_and_fits_its_class(group, word):
    checks.check_targets(compose(f"{group}={word}"), ())


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_composes_and_has_a_note(name):
    checks.check_targets(compose(f"experiments={name}"), ())
    note = (REPOSITORY / "experiments" / name / "README.md").read_text()
    assert f"experiments={name}" in note


def test_experiments_change_only_what_they_name():
    """An override on the command line still wins over an experiment, and over a stage."""
    cfg = compose("experiments=shakespeare_cpu", "stage=pretrain", "model.n_embd=64", "optimizer.lr=0.5")
    assert (cfg["model"]["n_embd"], cfg["optimizer"]["lr"], cfg["model"]["n_layer"]) == (64, 0.5, 4)


def test_early_stopping_is_a_word_alone_and_in_a_list():
    for override in ("callbacks=early_stopping", "callbacks=[early_stopping]"):
        assert set(compose(override)["callbacks"]) == {"early_stopping"}
    assert compose()["callbacks"] == {}


def test_max_epochs_lifts_the_default_number_of_steps():
    assert compose()["trainer"]["max_steps"] > 0
    assert compose("trainer.max_epochs=3")["trainer"]["max_steps"] == -1
    assert compose("trainer.max_epochs=3", "trainer.max_steps=7")["trainer"]["max_steps"] == 7


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("modle.n_layer=3", ("modle.n_layer", "'model.n_layer'")),
        ("model.n_layers=3", ("model.n_layers", "'model.n_layer'")),
        ("seeed=3", ("seeed", "'seed'")),
        ("optimizer.learning_rate=1", ("optimizer.learning_rate",)),
        ("model=tinny", ("model=tinny", "'tiny'", "small")),
        ("experiments=shakespere", ("experiments=shakespere", "'shakespeare_cpu'")),
        ("modell=tiny", ("modell", "'model'")),
        ("model.n_layer=four", ("model.n_layer=four", "a whole number")),
        ("model.qk_norm=perhaps", ("model.qk_norm=perhaps", "true | false")),
        ("seed=one", ("seed=one", "a whole number")),
        ("seed=null", ("seed=null", "needs a value")),
        ("validation=3", ("validation=3", "validation.every_steps")),
        ("model=null", ("null", "groups are", "model")),
        ("optimizer.lr=fast", ("optimizer.lr='fast'", "a number")),
        ("optimizer.betas=0.9", ("optimizer.betas=0.9", "[a number, a number]")),
        ("samples.prompts=hello", ("samples.prompts='hello'", "[a text]")),
        ("trainer.precision=bf16-mxed", ("trainer.precision='bf16-mxed'", "did you mean 'bf16-mixed'", "auto")),
        ("+schedule.decay=0.4", ("schedule.decay=0.4", "~schedule.decay drops it")),
        ("data.files=[3]", ("data.files=3", "no path")),
        ("trainer.max_steps=[1]", ("trainer.max_steps", "[1]")),
        ("trainer.precision=17", ("trainer.precision", "17")),
        ("data.batch_size=many", ("batch_size", "many")),
        ("checkpoint.every_steps=often", ("checkpoint.every_steps", "often")),
        ("+trainer.max_stepz=3", ("trainer.max_stepz", "'max_steps'")),
        ("optimizer._target_=os.system", ("optimizer._target_", "os.system", "trust=os")),
        ("model.n_layer=", ("n_layer",)),
        ("nonsense", ("nonsense",)),
        ("data.files=día.txt", ("data.files=día.txt", "quotes")),
        ("data.files=[a,b", ("data.files=[a,b", "bracket")),
        ("hydra.run.dir=elsewhere", ("hydra.run.dir=elsewhere", "run_dir=elsewhere")),
    ],
)
def test_wrong_words_and_values_are_named_before_anything_loads(override, says, tmp_path, capsys, monkeypatch):
    import gptlab.train
    from gptlab import assembly

    monkeypatch.setattr("sys.argv", ["train.py", override])
    monkeypatch.setattr(assembly, "build_data", lambda *_: pytest.fail("data was read"))
    with pytest.raises(SystemExit) as exit_:
        gptlab.train.main()
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert message.startswith("error: ")
    assert len(message.splitlines()) <= 15
    assert "Traceback" not in message
    for word in says:
        assert word in message, message
    assert not (tmp_path / "runs").exists()


def test_help_names_every_word_and_every_key(capsys):
    page = manual.manual("train")
    for group, word in WORDS:
        if group != "schema":
            assert f"{group}=" in page
            assert f"  {word} " in page, word
    for key in config.flat(compose()):
        if "_target_" in key or "_partial_" in key or key.startswith(("data.source", "samples.prompts[")):
            continue
        assert f"{key}=" in page, key
    for name in EXPERIMENTS:
        assert name in page


def test_help_gives_the_values_that_a_run_without_overrides_has():
    """The default word's values, not those of the dataclass below it or of another word."""
    rows = dict(row.split()[0].split("=", 1) for row in manual.manual("train").splitlines() if re.match(r"  \S+=", row))
    leaves = config.flat(compose())
    compared = 0
    for key, shown in rows.items():
        if key in leaves and "${" not in shown and not shown.startswith(("[", '"')):
            assert yaml.safe_load(shown) == leaves[key] or float(shown) == leaves[key], key
            compared += 1
    assert compared > 50


def test_help_marks_the_default_word_of_each_group():
    marked = re.findall(r"^  (\w+) \(the default\)", manual.manual("train"), re.MULTILINE)
    root = yaml.safe_load((REPOSITORY / "conf/train.yaml").read_text())["defaults"]
    defaults = {group: word for entry in root if isinstance(entry, dict) for group, word in entry.items()}
    defaults |= dict.fromkeys(manual.SWEEPS, "basic")
    assert marked == [defaults[group] for group in manual.SHOWN["train"] if isinstance(defaults[group], str)]


def test_every_key_of_the_root_and_the_schemas_is_explained():
    unexplained = [row for row in manual.keys_of((REPOSITORY / "conf/train.yaml").read_text()) if not row[40:].strip()]
    assert unexplained == []


def test_version_and_help_as_commands(tmp_path):
    import gptlab

    assert door("train", "--version", cwd=tmp_path).stdout.strip() == f"gptlab {gptlab.__version__}"
    assert "optimizer.lr=" in door("train", "--help", cwd=tmp_path).stdout


# The floors: imports only point down. See the table at the end of the README.
FLOORS = {
    0: "formulas attention names signals ranks meeting files machine sharding tensors model architectures weight_names "
    "cache tokenizer dialogue losses optim cost depth chunks vocabulary pieces words borrowed",
    1: "engine sampling texts safety checkpoint bundle exported loading run jobs data.batches data.changes "
    "data.checking data.cleaning data.code data.corpus data.datatrove data.document data.encoding data.formats "
    "data.grammar data.ids data.listed data.mixture data.opening data.overlap data.remote data.shards data.sources "
    "data.states data.stories data.stream data.survey data.tokenizer_report data.tokens data.windows data.workers "
    "scoring excess evaluate.copies evaluate.quality evaluate.writing",
    2: "strategies profilers data.litdata_stream data.module data.mixed data.streaming data.tokenized tasks.lm "
    "tasks.metrics callbacks.steps callbacks.averaging callbacks.floor callbacks.saving callbacks.record "
    "callbacks.watching evaluate.pairs",
    3: "manual start options flags config explain mixing assembly checks doors outcome inherit given dial resume sweep "
    "launchers soundness study staged train prepare validate_data generate chat evaluate.subject evaluate.held_out "
    "evaluate.parts evaluate.harness evaluate.table evaluate.__main__ export.__main__ export.facts export.folder "
    "export.ggml_vocabulary export.gguf export.template export.vocabulary serve.__main__ serve.options serve.api "
    "serve.service serve.prepare serve.schema serve.shapes serve.limits serve.metrics serve.worker serve.errors "
    "__main__",
}
MAY_IMPORT = {
    0: {"torch", "sentencepiece", "numpy"},
    1: {
        "torch",
        "numpy",
        "filelock",
        "pooch",
        "tqdm",
        "fsspec",
        "pyarrow",
        "zstandard",
        "compression",
        "datasketch",
        "datatrove",
    },
    2: {"torch", "numpy", "lightning", "torchmetrics", "rich", "litdata"},
    3: {
        "torch",
        "numpy",
        "lightning",
        "hydra",
        "omegaconf",
        "rich",
        "tqdm",
        "yaml",
        "typeguard",
        "filelock",
        "lm_eval",
        "transformers",
        "fastapi",
        "starlette",
        "uvicorn",
        "pydantic",
        "pydantic_core",
    },
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}


def imports_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", sorted((REPOSITORY / "gptlab").rglob("*.py")), ids=lambda path: path.stem)
def test_imports_only_point_down(path):
    import sys

    if path.name == "__init__.py":
        assert not any(name.startswith("gptlab") for name in imports_of(path))
        return
    name = ".".join(path.relative_to(REPOSITORY / "gptlab").with_suffix("").parts)
    floor = FLOOR_OF[name]
    for imported in imports_of(path):
        top = imported.split(".")[0]
        assert top != "experiments", imported
        if top == "gptlab":
            own = imported.removeprefix("gptlab.")
            known = [module for module in FLOOR_OF if own == module or own.startswith(f"{module}.")]
            assert all(FLOOR_OF[module] <= floor for module in known), imported
        elif top not in sys.stdlib_module_names:
            assert top in MAY_IMPORT[floor], f"{name} imports {imported}"


def test_no_circle_of_imports():
    edges = {}
    for path in (REPOSITORY / "gptlab").rglob("*.py"):
        name = ".".join(path.relative_to(REPOSITORY / "gptlab").with_suffix("").parts)
        own = {imported.removeprefix("gptlab.") for imported in imports_of(path) if imported.startswith("gptlab.")}
        edges[name] = {module for module in FLOOR_OF if any(o == module or o.startswith(f"{module}.") for o in own)}
    reached = {name: set(below) for name, below in edges.items()}
    for middle, start in itertools.product(edges, edges):
        if middle in reached[start]:
            reached[start] |= reached[middle]
    assert [name for name, below in reached.items() if name in below] == []


def test_yaml_files_are_small():
    for path in (REPOSITORY / "conf").rglob("*.yaml"):
        assert len(path.read_text().splitlines()) <= 55, path
        yaml.safe_load(path.read_text())


def test_the_console_script_offers_the_same_doors_and_imports_from_the_current_folder(tmp_path):
    import subprocess
    import sys

    def gptlab(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-P", "-m", "gptlab", *arguments]  # -P: as the script, without the current folder
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert "train" in gptlab("--help").stdout
    assert gptlab("--version").stdout.startswith("gptlab ")
    assert gptlab("trian").returncode == 2
    assert "optimizer.lr=" in gptlab("train", "--help").stdout
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/own.py").write_text("from gptlab.model import Attention as OwnAttention\n")
    (tmp_path / "text.txt").write_text("A few words, many times over.\n" * 300)
    small = "tokenizer=byte model.n_embd=16 model.block_size=16 trainer.max_steps=1 compile=false data.files=text.txt"
    done = gptlab("train", "model.attention=experiments.own.OwnAttention", *small.split())
    assert done.returncode == 0, done.stderr


def test_what_is_made_is_called_without_hydra():
    """Whose partials ask for leave at every call, half a millisecond that a schedule would take at every step."""
    schedule = config.make(compose()["schedule"])
    assert type(schedule) is functools.partial
    assert schedule(0, 100) == cosine(0, 100, warmup_steps=50, final_factor=0.1)
