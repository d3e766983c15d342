"""Hand an adapter over to another engine: its rules, the files it loads, the command to type."""
