"""LoRA and every baseline behind one protocol."""
