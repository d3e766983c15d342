"""An adapter saved here gives the same logits in PEFT, and one saved by PEFT the same here.

Run: python examples/peft_round_trip.py (needs: pip install peft)
"""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import lorakit as lk

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}


def shake(model: torch.nn.Module) -> None:
    """Give the trainable parameters values, as training would."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)


def main() -> None:
    """Both directions on the same base."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=2, num_attention_heads=4)).eval()
    ids = torch.randint(3, 64, (2, 9))
    with tempfile.TemporaryDirectory() as directory:
        ours, theirs = Path(directory) / "ours", Path(directory) / "theirs"

        model = copy.deepcopy(base)
        lk.attach(model, lk.LoraSpec(r=4, alpha=12, targets="all-linear"), name="a")
        shake(model)
        lk.save_adapter(model, ours, name="a")
        in_peft = PeftModel.from_pretrained(copy.deepcopy(base), str(ours)).eval()
        with torch.no_grad():
            torch.testing.assert_close(in_peft(input_ids=ids).logits, model(input_ids=ids).logits)
        print("lorakit -> PEFT: the same logits")

        model = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=12)).eval()
        shake(model)
        model.save_pretrained(str(theirs))
        in_lorakit = copy.deepcopy(base)
        adapter = lk.load_adapter(in_lorakit, theirs, name="b")
        with torch.no_grad():
            found = in_lorakit(input_ids=ids).logits
            torch.testing.assert_close(found, model(input_ids=ids).logits)
        print(f"PEFT -> lorakit: the same logits, {adapter.num_params():,} parameters")


if __name__ == "__main__":
    main()
