"""A Llama of transformers in its Trainer: with defaults, or with bf16, torch.compile and fused AdamW."""

import contextlib
import sys
import tempfile

import torch
from clock import Clock, given, report
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

task = given()
clock = Clock(task.steps, task.device)


class Windows(torch.utils.data.Dataset):
    """Random tokens; the model itself shifts the labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(task.vocab_size, (100_000,), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens) - task.block_size

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.tokens[index : index + task.block_size]
        return {"input_ids": window, "labels": window}


class Ticks(TrainerCallback):
    def on_step_end(self, *arguments: object, **more: object) -> None:
        clock.tick()


config = LlamaConfig(
    vocab_size=task.vocab_size,
    hidden_size=task.n_embd,
    intermediate_size=task.mlp_width,
    num_hidden_layers=task.n_layer,
    num_attention_heads=task.n_head,
    max_position_embeddings=task.block_size,
    tie_word_embeddings=True,
    use_cache=False,
)
model = LlamaForCausalLM(config)
best = {"bf16": True, "torch_compile": True, "optim": "adamw_torch_fused"} if task.best else {}
with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
    arguments = TrainingArguments(
        folder,
        max_steps=clock.total,
        per_device_train_batch_size=task.batch_size,
        use_cpu=task.device == "cpu",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **best,
    )
    Trainer(model, arguments, train_dataset=Windows(), callbacks=[Ticks()]).train()
report(clock, model)
