"""The doors generate and chat: what they print, what they refuse, and what they do not import."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import door

from gptlab import chat, checkpoint, loading
from gptlab.engine import Request
from gptlab.model import GPT, GPTConfig
from gptlab.tokenizer import EOS_ID, ByteTokenizer


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose network has opinions."""
    return make(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """The same, said to have been trained on conversations."""
    return make(tmp_path_factory.mktemp("talker"), knows_turns=True)


def make(folder, **own):
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=269, block_size=64, n_layer=2, n_head=2, n_embd=16, init_std=0.5, tie_embeddings=False
    )
    weights = {f"model.{name}": tensor for name, tensor in GPT(config).state_dict().items()}
    described = checkpoint.describe(config, ByteTokenizer()) | own
    checkpoint.save(
        {"state_dict": weights, checkpoint.OWN_KEY: described, "global_step": 1}, folder / "checkpoints/last.ckpt"
    )
    return folder


def answer(run, *words: str, code: int = 0, **kwargs):
    done = door("generate", str(run), *words, **kwargs)
    assert done.returncode == code, done.stderr
    return done


def test_json_has_the_fields_of_the_contract(run):
    done = answer(run, "--prompt", "ab", "--max_tokens=20", "--seed", "3", "--json")
    said = json.loads(done.stdout)
    assert set(said) == {
        *("text", "samples", "prompt", "prompt_tokens", "completion_tokens", "finish_reason", "metrics")
    }
    assert set(said["metrics"]) == {
        *("tokens_per_sec", "latency_first_ms", "latency_p50_ms", "latency_p95_ms", "rss_mb", "peak_mb", "load_s")
    }
    assert (said["prompt"], said["prompt_tokens"], said["completion_tokens"]) == ("ab", 3, 20)
    assert said["finish_reason"] == "length"
    assert said["samples"] == [said["text"]]
    assert 0 < said["metrics"]["latency_p50_ms"] <= said["metrics"]["latency_p95_ms"]
    assert 50 < said["metrics"]["rss_mb"] <= said["metrics"]["peak_mb"]
    plain = answer(run, "--prompt=ab", "--max-tokens=20", "--seed=3")
    assert plain.stdout == said["text"] + "\n"
    loaded = loading.load(run)
    assert loaded.generate("ab", 20, seed=3, temperature=0.8) == said["text"]


def test_several_samples_a_stop_and_a_prompt_by_standard_input(run):
    loaded = loading.load(run)
    whole = loaded.generate("ab", 30, seed=1, temperature=0.8)
    stop = whole[10:12]
    stopped = json.loads(answer(run, "--prompt=ab", "--max-tokens=30", "--seed=1", "--json", "--stop", stop).stdout)
    assert stopped["text"] == whole[: whole.index(stop)]
    assert stopped["finish_reason"] == "stop"
    several = json.loads(answer(run, "--prompt=ab", "--max-tokens=30", "--seed=1", "--json", "--num-samples=3").stdout)
    assert several["samples"][0] == whole
    assert len(set(several["samples"])) == 3
    assert several["completion_tokens"] == 90
    lines = answer(run, "--prompt=ab", "--max-tokens=5", "--num_samples", "2").stdout
    assert lines.startswith("--- 1\n")
    assert "\n--- 2\n" in lines
    piped = subprocess.run(
        [sys.executable, "-m", "gptlab.generate", str(run), "--prompt", "-", "--json", "--max-tokens=3"],
        input="ab\n",
        capture_output=True,
        text=True,
    )
    assert json.loads(piped.stdout)["prompt"] == "ab\n"


def test_a_long_prompt_is_refused_or_cut(run):
    done = answer(run, "--prompt", "x" * 100, code=2)
    assert "--prompt has 101 tokens" in done.stderr
    assert "the context 64" in done.stderr
    assert "--truncate" in done.stderr
    cut = json.loads(answer(run, "--prompt", "x" * 100, "--truncate", "--json", "--max-tokens=2").stdout)
    assert cut["prompt_tokens"] == 64
    full = json.loads(answer(run, "--prompt=x", "--past-context=stop", "--json", "--max-tokens=500").stdout)
    assert (full["finish_reason"], full["completion_tokens"]) in (("length", 63), ("stop", full["completion_tokens"]))


def test_strict_mode_caps_and_blocks(run, tmp_path):
    (tmp_path / "blocked.txt").write_text("secret\n")
    strict = ("--safety-mode=strict", "--blocklist", str(tmp_path / "blocked.txt"), "--json")
    said = json.loads(answer(run, "--prompt=a Secret", *strict).stdout)
    assert (said["finish_reason"], said["text"], said["completion_tokens"]) == ("content_filter", "", 0)
    assert said["metrics"]["tokens_per_sec"] is None
    looping = json.loads(answer(run, "--prompt=ab", "--temperature=0", "--max-tokens=5000", *strict).stdout)
    assert looping["finish_reason"] in ("content_filter", "stop", "length")
    assert looping["completion_tokens"] <= 1024


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--prompt=a", "--temperatur=1"), ("--temperatur", "did you mean --temperature?")),
        (("--prompt=a", "--temperature=-1"), ("temperature=-1.0",)),
        (("--prompt=a", "--top-p=0"), ("top_p=0.0",)),
        (("--prompt=a", "--max-tokens=many"), ("--max-tokens", "many")),
        (("--prompt=a", "--max-tokens=-1"), ("max_tokens=-1",)),
        (("--prompt=a", "--device=tpu"), ("--device tpu", "cpu")),
        (("--prompt=a", "--threads=0"), ("--threads 0",)),
        (("--prompt=a", "--checkpoint=best2.ckpt"), ("best2.ckpt", "last.ckpt")),
        (("--prompt=a", "--stop="), ("stop=''",)),
        (("--prompt=a", "--num-samples=0"), ("n=0",)),
        ((), ("--prompt",)),
    ],
    ids=str,
)
def test_what_cannot_be_is_said_in_one_message(run, words, says):
    done = answer(run, *words, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    for word in says:
        assert word in done.stderr


def test_runs_that_are_none(tmp_path, run):
    (tmp_path / "empty").mkdir()
    (tmp_path / "half.ckpt").write_bytes((run / "checkpoints/last.ckpt").read_bytes()[:5000])
    for name, says in (("none", "no such run"), ("empty", "holds no checkpoints"), ("half.ckpt", "damaged")):
        done = answer(tmp_path / name, "--prompt=a", code=2)
        assert says in done.stderr
        assert str(tmp_path / name) in done.stderr


def test_weights_that_are_not_finite(tmp_path, run):
    state = checkpoint.load(run / "checkpoints/last.ckpt")
    state["state_dict"]["model.norm.weight"].fill_(float("nan"))
    checkpoint.save(state, tmp_path / "nan.ckpt")
    done = answer(tmp_path / "nan.ckpt", "--prompt=a", code=2)
    assert "not finite" in done.stderr


def test_nothing_heavy_is_imported(run):
    program = (
        "import sys, runpy; sys.argv = ['generate', sys.argv[1], '--prompt=a', '--max-tokens=2']\n"
        "try: runpy.run_module('gptlab.generate', run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "import gptlab.chat\n"
        "heavy = ('lightning', 'torchmetrics', 'hydra', 'omegaconf', 'transformers')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(run)], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_weights_are_read_from_their_file(run):
    """Whoever loads a checkpoint holds no copy of it, and what the optimizer keeps is not read."""
    loaded = loading.load(run)
    own = torch.load(run / "checkpoints/last.ckpt", mmap=True, weights_only=True)["state_dict"]
    for name, parameter in loaded.model.named_parameters():
        assert torch.equal(parameter, own[f"model.{name}"])
    before = loaded.generate("ab", 10, seed=0)
    torch.manual_seed(0)
    copied = GPT(loaded.model.config)
    copied.load_state_dict(loaded.model.state_dict())
    assert loading.Loaded(copied.eval(), loaded.tokenizer, loaded.path).generate("ab", 10, seed=0) == before


def talk(run, lines: str, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "gptlab.chat", str(run), "--seed=1", "--max-tokens=12", *words],
        input=lines,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_a_base_model_goes_on_with_the_text_and_says_so(run):
    said = talk(run, "ab\n\n/temp 0.5\n/help\n/nonsense\n/system be kind\n/exit\nnever\n")
    assert "a base model: it knows no turns" in said
    assert loading.load(run).generate("ab", 12, seed=1, temperature=0.8) in said
    assert "temperature 0.5" in said
    assert "/reset" in said
    assert "/nonsense: there is no such command" in said
    assert "/system: this model knows no turns" in said


def test_a_conversation_is_kept_and_taken_up(talker, tmp_path):
    kept = tmp_path / "talk.json"
    talk(talker, f"ab\n/system be kind\ncd\n/save {kept}\n")
    content = json.loads(kept.read_text())
    assert content["system"] == "be kind"
    assert [message["role"] for message in content["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in content["messages"][::2]] == ["ab", "cd"]
    said = talk(talker, f"/load {kept}\n/reset\n/save {kept}\n/load {tmp_path}/none.json\n/temp hot\n/save\n")
    assert f"load: {kept}, 4 messages" in said
    assert json.loads(kept.read_text())["messages"] == []
    assert "none.json: no conversation" in said
    assert "/temp hot: give a number" in said
    assert "/save: give a file" in said


def test_the_oldest_turns_go_first_and_the_system_stays(talker):
    loaded = loading.load(talker)
    talked = chat.Conversation(loaded, chat.Sampling(seed=1), chat.Safety(), 12, system="S")
    for text in ("aaaaaaaa", "bbbbbbbb", "cccccccc", "dddddddd"):
        talked.say(text, lambda _: None)
    request: Request = talked.request([*talked.messages, {"role": "user", "content": "eeeeeeee"}])
    assert len(request.prompt) <= 64 - 12
    marks = {loaded.tokenizer.special_id(f"<|{role}|>"): role for role in ("system", "user", "assistant")}
    roles = [marks[token] for token in request.prompt if token in marks]
    assert roles[:2] == ["system", "user"]
    assert roles[-2:] == ["user", "assistant"]
    assert request.prompt[0] == EOS_ID
    text = loaded.tokenizer.decode(request.prompt)
    assert "eeeeeeee" in text
    assert "aaaaaaaa" not in text
    with pytest.raises(ValueError, match="the last turn has"):
        talked.say("x" * 60, lambda _: None)
