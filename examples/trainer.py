"""Train an attached adapter with transformers.Trainer.

Run: python examples/trainer.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lorakit as lk


def main() -> None:
    """A model with an adapter is an ordinary module: Trainer needs to know nothing of it."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    ).eval()
    frozen = model.model.layers[0].mlp.up_proj.weight.clone()
    lk.attach(model, lk.LoraSpec(r=4, alpha=16, dropout=0.05, targets="attention"), name="task")

    ids = torch.randint(3, 64, (16, 12))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=directory,
            max_steps=20,
            per_device_train_batch_size=8,
            learning_rate=2e-2,
            logging_steps=5,
            save_steps=10,  # checkpoints hold the adapter, not the base
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)
        trainer.train()
        losses = [float(line["loss"]) for line in trainer.state.log_history if "loss" in line]
        print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
        assert losses[-1] < losses[0]
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-10")  # a stopped run goes on
        adapter = lk.save_adapter(model, Path(directory) / "adapter", name="task")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, frozen)
    print(f"saved {adapter.num_params():,} parameters; the base is unchanged")


if __name__ == "__main__":
    main()
