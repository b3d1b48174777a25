"""What each fact costs above its floor, in nats each time it is told: finer than the kinds of floor.json.

python -m experiments.floor.by_fact runs/<run>
"""

import sys
from collections import defaultdict
from pathlib import Path

import torch

from gptlab import checkpoint
from gptlab.data.stories import GRAMMAR, story
from gptlab.losses import document_layout, token_nll
from gptlab.model import GPT
from gptlab.tokenizer import EOS_ID, ByteTokenizer

DOCUMENTS = 240
NEAR = 32  # bytes; what stands in its own question is nearer, what stands in an earlier line is not


@torch.no_grad()
def main(run: Path) -> None:
    state = checkpoint.load(run / "checkpoints" / "last.ckpt")
    model, tokenizer = GPT(checkpoint.model_config(state), ("experiments",)).eval(), ByteTokenizer()
    model.load_state_dict(checkpoint.model_weights(state))
    above: dict[tuple[str, str, str, str], list[float]] = defaultdict(list)  # kind, fact, its line, where
    for index in range(DOCUMENTS):
        text = story(seed=99, index=index)  # not a seed that a run trains on
        row = torch.tensor([[EOS_ID, *tokenizer.encode(text).tolist(), EOS_ID]])
        document_ids, positions = document_layout(row[:, :-1], EOS_ID)
        optimum = GRAMMAR.optimum(text)
        nll = token_nll(model(row[:, :-1], positions, document_ids), row[:, 1:])[0].numpy() - optimum.nll
        at, line = 0, ""
        for choice in GRAMMAR.parse(text):
            size = len(choice.text.encode())
            if choice.kind != "grammar":
                where = ("near" if optimum.distances[at] <= NEAR else "far") if choice.kind == "recall" else ""
                key = (choice.kind, (choice.fact or "").rstrip("12"), line[:1], where)
                above[key].append(float(nll[at : at + size].sum()))
            line = (line + choice.text).rpartition("\n")[2]
            at += size
    print("| kind | fact | line | told last | times | excess each time |\n|---|---|---|---|---|---|")
    for key, costs in sorted(above.items()):
        print("| " + " | ".join([*key, str(len(costs)), f"{sum(costs) / len(costs):.3f}"]) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
