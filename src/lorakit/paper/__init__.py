"""The paper's experiments, scaled to the machine, with its numbers beside ours: `lorakit paper`."""
