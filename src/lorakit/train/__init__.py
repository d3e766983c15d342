"""Train an adapter: the config, the trainer on transformers.Trainer, checkpoints, the run."""
