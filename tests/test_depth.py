"""One dial: the formulas behind `depth`, and what it may and may not set."""

import pytest
import torch
import yaml
from conftest import REPOSITORY, SMALL, compose, door

from gptlab import depth
from gptlab.model import GPT, GPTConfig


def test_depth_4_is_the_smallest_word():
    assert compose("depth=4")["model"] == compose("model=tiny")["model"]


@pytest.mark.parametrize(("layers", "word"), [(8, "small"), (12, "medium")])
def test_larger_depths_have_the_shapes_of_larger_words(layers, word):
    dial, named = (compose(override)["model"] for override in (f"depth={layers}", f"model={word}"))
    assert [dial[key] for key in ("n_layer", "n_embd", "n_head")] == [
        named[key] for key in ("n_layer", "n_embd", "n_head")
    ]


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (128, 2), (1280, 20), (384, 6), (200, 2), (96, 1), (100, 1)])
def test_heads_divide_the_width_into_even_parts_of_64_channels_or_more(width, heads):
    assert depth.heads(width) == heads
    assert width % (2 * heads) == 0


@pytest.mark.parametrize("layers", [4, 8, 20])
def test_parameters_are_those_of_the_blocks(layers):
    width = depth.width(layers)
    with torch.device("meta"):
        model = GPT(GPTConfig(vocab_size=64, n_layer=layers, n_embd=width, n_head=depth.heads(width)))
    assert depth.parameters(layers, width) == pytest.approx(
        sum(parameter.numel() for parameter in model.blocks.parameters()), rel=0.05
    )


def test_the_horizon_is_twenty_tokens_a_parameter_or_four_passes():
    assert depth.horizon(1000, None) == depth.horizon(1000, 5001) == 20_000
    assert depth.horizon(1000, 500) == 2000


def test_what_the_smallest_word_was_tuned_with_is_the_reference():
    assert depth.batch_tokens(350 * 2048) == 2048
    assert depth.learning_rate(0.003, 350 * 2048, 2048) == 0.003


def test_batch_and_rate_follow_the_horizon_by_their_powers():
    assert depth.batch_tokens(10e6) / depth.batch_tokens(1e6) == pytest.approx(10**0.383)
    assert depth.learning_rate(1, 10e6, 2048) / depth.learning_rate(1, 1e6, 2048) == pytest.approx(10**-0.32)
    assert depth.learning_rate(1, 1e6, 4096) / depth.learning_rate(1, 1e6, 1024) == pytest.approx(2)
    assert [depth.batch_windows(tokens, 128) for tokens in (1, 2048, 2800, 3000)] == [1, 16, 16, 32]


def test_weights_are_an_average_over_a_fifth_of_a_run_of_twenty_tokens_a_parameter():
    decay = depth.weight_decay(0.003, horizon=20e6, batch_tokens=20e3, parameters=10**6)
    steps = 1 / (0.003 * decay)
    assert steps / 1000 == pytest.approx(1.084 * 20**-0.527)
    assert 0.2 < steps / 1000 < 0.25


def test_all_that_grows_with_depth_grows_where_there_is_text():
    rows = [compose(f"depth={layers}", "data.text_bytes=null") for layers in (1, 2, 4, 6, 8, 12, 16, 20, 32)]
    for group, key in (("model", "n_embd"), ("model", "n_head"), ("trainer", "max_steps")):
        values = [row[group][key] for row in rows]
        assert values == sorted(set(values)), key
    batches = [row["data"]["batch_size"] for row in rows]
    assert batches == sorted(batches)
    assert batches[-1] > batches[0]
    decays = [row["optimizer"]["weight_decay"] for row in rows]
    assert decays == sorted(decays, reverse=True)
    for row in rows:
        tokens = row["data"]["batch_size"] * row["model"]["block_size"] * row["trainer"]["max_steps"]
        assert tokens == pytest.approx(240 * row["model"]["n_layer"] * row["model"]["n_embd"] ** 2, rel=0.01)


def test_a_short_text_is_seen_four_times(tmp_path):
    (tmp_path / "text.txt").write_text("word " * 20_000)
    for words, tokens in (((), 90_000 / 4), (("tokenizer=byte",), 90_000), (("data.validation_fraction=0.5",), 12_500)):
        cfg = compose("depth=8", "data.files=text.txt", *words)
        trained = cfg["trainer"]["max_steps"] * cfg["data"]["batch_size"] * cfg["model"]["block_size"]
        assert trained == pytest.approx(4 * tokens, rel=0.05)
    held_out = compose("depth=8", "data.files=text.txt", "data.validation_files=text.txt", "data.batch_size=1")
    assert held_out["trainer"]["max_steps"] == round(4 * 25_000 / 128)


@pytest.mark.parametrize("files", ["nowhere.txt", "[]", "[3]", "3"])
def test_text_that_is_not_there_is_for_the_reader_to_say(files):
    assert compose("depth=2", f"data.files={files}")["trainer"] == compose("depth=2", "data.text_bytes=null")["trainer"]


@pytest.mark.parametrize("word", ["pydocs", "pysource"])
def test_the_size_of_what_every_python_has_is_about_right(word):
    """Judged by this Python's, of which there are several sizes."""
    from gptlab import config

    cfg = compose(f"data={word}")["data"]
    text = "".join(document.text for document in config.make(cfg["source"]).documents())
    assert cfg["text_bytes"] == pytest.approx(len(text.encode()), rel=0.25)


@pytest.mark.parametrize("word", ["shakespeare", "tinystories"])
def test_the_size_of_a_download_is_that_of_its_files(word):
    cfg = compose(f"data={word}")["data"]
    assert cfg["text_bytes"] == sum(file["size_bytes"] for file in cfg["source"]["files"])


def test_without_depth_nothing_changes():
    assert compose("depth=null") == compose()
    assert compose()["depth"] is None


@pytest.mark.parametrize(
    "override",
    [
        "model.n_layer=3",
        "model.n_embd=192",
        "model.n_head=2",
        "data.batch_size=5",
        "trainer.max_steps=7",
        "trainer.max_epochs=3",
        "optimizer.lr=0.5",
        "optimizer.weight_decay=0.25",
    ],
)
def test_what_is_given_wins(override):
    key, value = override.split("=")
    group, name = key.split(".")
    assert compose("depth=8", override)[group][name] == float(value)
    assert compose(override, "depth=8") == compose("depth=8", override)


def test_what_follows_follows_from_what_is_given():
    words = ("data.text_bytes=null", "data.batch_size=8", "trainer.accumulate_grad_batches=4")
    cfg = compose("depth=8", "model.n_embd=256", *words)
    assert cfg["model"]["n_head"] == 4
    assert cfg["trainer"]["max_steps"] == 20 * 12 * 8 * 256**2 // (8 * 4 * 128)
    rates = [compose("depth=4", f"data.batch_size={windows}")["optimizer"]["lr"] for windows in (16, 64)]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.01)


def test_who_gives_epochs_means_these():
    assert compose("depth=2", "trainer.max_epochs=9")["trainer"]["max_steps"] == -1


def test_an_experiment_wins_and_leaves_the_rest_to_the_dial():
    cfg = compose("experiments=gutenberg", "depth=6")
    assert (cfg["data"]["batch_size"], cfg["optimizer"]["weight_decay"], cfg["trainer"]["max_steps"]) == (32, 0.3, 780)
    assert (cfg["model"]["n_layer"], cfg["model"]["n_embd"], cfg["trainer"]["max_epochs"]) == (6, 384, None)


def test_an_experiment_of_the_user_may_turn_the_dial(tmp_path):
    (tmp_path / "experiments").mkdir()
    (tmp_path / "experiments/mine.yaml").write_text("# @package _global_\n# Mine\ndepth: 3\nmodel: {n_head: 1}\n")
    cfg = compose("experiments=mine")["model"]
    assert (cfg["n_layer"], cfg["n_embd"], cfg["n_head"]) == (3, 192, 1)


def test_the_readme_shows_what_the_dial_gives():
    table = (REPOSITORY / "README.md").read_text().partition("| depth | width |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
    assert [row[0] for row in rows] == ["2", "4", "8", "12", "20"]
    for layers, width, heads, _, *cells in rows:
        for words, (steps, rate, decay) in (((), cells[:3]), (("data.text_bytes=null",), (cells[4], *cells[6:8]))):
            cfg = compose(f"depth={layers}", *words)
            assert (cfg["model"]["n_embd"], cfg["model"]["n_head"]) == (int(width), int(heads))
            assert f"{cfg['trainer']['max_steps']:,} of {cfg['data']['batch_size']}" == steps
            assert (cfg["optimizer"]["lr"], cfg["optimizer"]["weight_decay"]) == (float(rate), float(decay))


def test_a_word_brings_all_but_its_size():
    cfg = compose("model=gpt2", "depth=6")["model"]
    assert (cfg["norm"], cfg["block_size"], cfg["n_layer"], cfg["n_embd"]) == ("layernorm", 1024, 6, 384)


def test_an_optimizer_without_these_keys_keeps_its_own():
    cfg = compose("depth=8", "~optimizer.weight_decay", "optimizer._target_=torch.optim.Adam")
    assert "weight_decay" not in cfg["optimizer"]


def test_cfg_job_shows_the_numbers(tmp_path):
    words = ("depth=2", "optimizer=adamw", "data.text_bytes=null")
    shown = yaml.safe_load(door("train", *words, "--cfg", "job", cwd=tmp_path).stdout)
    assert shown["depth"] == 2
    assert (shown["model"]["n_embd"], shown["model"]["n_head"], shown["data"]["batch_size"]) == (128, 2, 32)
    assert shown["trainer"]["max_steps"] == 240 * 2 * 128**2 // (32 * 128)
    assert shown["optimizer"]["lr"] == pytest.approx(1e-3 * 2**0.5 * (240 * 2 * 128**2 / 716_800) ** -0.32, rel=0.01)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("depth=0",), "depth=0 must be at least 1"),
        (("depth=-3",), "depth=-3 must be at least 1"),
        (("depth=x",), "depth=x is not what it takes: a whole number"),
        (("depth=1.5",), "depth=1.5 is not what it takes: a whole number"),
        (("depth=2", "model.n_embd=0"), "model.n_embd=0 must be at least 1"),
        (("depth=2", "model.block_size=0"), "model.block_size=0 must be at least 1"),
        (("depth=2", "optimizer.lr=fast"), "optimizer.lr='fast' is not what it takes"),
        (("depth=2", "init_from=runs/a"), "depth=2: init_from brings its own network"),
    ],
)
def test_what_cannot_be_is_refused(overrides, says, tmp_path):
    done = door("train", *overrides, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: {says}")
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_sweep_may_turn_the_dial(composed, tmp_path):
    """Each job is a process that derives its own; what stands in the sweep's config is none of theirs."""
    commands, code = composed("depth=1,2", "optimizer.lr=0.1,0.2", f"run_dir={tmp_path / 'sweep'}")
    assert code == 0
    assert [[word for word in command if word.startswith(("depth", "model", "optimizer"))] for command in commands] == [
        [f"depth={layers}", f"optimizer.lr={rate}"] for layers in (1, 2) for rate in (0.1, 0.2)
    ]


OWN = [word for word in SMALL if not word.startswith(("model.n_", "data.batch_size"))]


def test_a_run_goes_as_the_dial_says_and_a_resumed_one_keeps_its_numbers(text_file, tmp_path):
    words = [*OWN, f"data.files={text_file}", "depth=1", f"run_dir={tmp_path / 'run'}"]
    begun = door("train", *words, cwd=tmp_path)
    assert begun.returncode == 0, begun.stderr
    cfg = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    result = yaml.safe_load((tmp_path / "run/result.json").read_text())
    assert (cfg["model"]["n_embd"], result["status"]) == (64, "completed")
    assert result["steps"] == cfg["trainer"]["max_steps"]
    assert result["train_tokens"] == pytest.approx(4 * 0.9 * text_file.stat().st_size, rel=0.05)
    assert f"; depth=1: {result['train_tokens'] / (12 * 64**2):.2g} tokens a parameter" in begun.stdout

    on = door("train", f"resume={tmp_path / 'run'}", f"trainer.max_steps={result['steps'] + 2}", cwd=tmp_path)
    assert on.returncode == 0, on.stderr
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert (kept["depth"], kept["model"], kept["optimizer"]) == (1, cfg["model"], cfg["optimizer"])
    assert yaml.safe_load((tmp_path / "run/result.json").read_text())["steps"] == result["steps"] + 2

    other = door("train", f"resume={tmp_path / 'run'}", "depth=2", cwd=tmp_path)
    assert other.returncode == 2
    assert "depth: the run has 1, the command line 2 (depth=2)" in other.stderr
    same = door("train", *words, "resume=auto", cwd=tmp_path)
    assert same.returncode == 0, same.stderr


def test_ranks_share_the_batch_of_the_dial(text_file, tmp_path):
    where = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=1")
    words = [word for word in OWN if word != "trainer=cpu"]
    done = door("train", *words, f"data.files={text_file}", "depth=1", *where, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    windows = compose(*OWN, f"data.files={text_file}", "depth=1")["data"]["batch_size"]
    assert f"1 steps of {windows} windows on 2 x cpu" in done.stdout
