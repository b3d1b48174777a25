"""LitGPT's GPT in the loop of its pretrain.py: compiled, in Fabric, as there; at best fused AdamW and one loss.

Its pretrain itself wants a tokenizer, a checkpoint folder and litdata; what a step does is copied line by line.
"""

import torch
from clock import Clock, given, report
from lightning.fabric import Fabric
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy, get_default_supported_precision

task = given()
clock = Clock(task.steps, task.device)
fabric = Fabric(accelerator=task.device, devices=1, precision=get_default_supported_precision(training=True))
config = Config(
    n_layer=task.n_layer,
    n_head=task.n_head,
    n_embd=task.n_embd,
    intermediate_size=task.mlp_width,
    block_size=task.block_size,
    vocab_size=task.vocab_size,
    padded_vocab_size=task.vocab_size,
    norm_class_name="RMSNorm",
    mlp_class_name="LLaMAMLP",
    bias=False,
    parallel_residual=False,
    rotary_percentage=1.0,
)
with fabric.init_module():
    plain = GPT(config)
plain.apply(plain._init_weights)
plain.transformer.wte.weight = plain.lm_head.weight  # its option --train.tie_embeddings
model = fabric.setup(torch.compile(plain))
fused = task.best or task.device == "cuda"
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=fused)
optimizer = fabric.setup_optimizers(optimizer)
tokens = torch.randint(task.vocab_size, (100_000,), generator=torch.Generator().manual_seed(0))
windows = torch.utils.data.TensorDataset(tokens.unfold(0, task.block_size + 1, 1))
loader = torch.utils.data.DataLoader(windows, batch_size=task.batch_size, shuffle=True, drop_last=True)
loader = fabric.setup_dataloaders(loader)

for _, (batch,) in zip(range(clock.total), loader, strict=False):
    input_ids = batch[:, : task.block_size].contiguous().long()
    targets = batch[:, 1:].contiguous().long()
    logits = model(input_ids)
    loss = chunked_cross_entropy(logits, targets, chunk_size=0 if task.best else 128)
    fabric.backward(loss)
    fabric.clip_gradients(model, optimizer, max_norm=1.0)
    optimizer.step()
    optimizer.zero_grad()
    clock.tick()
report(clock, plain)
