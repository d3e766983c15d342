"""The verbs of the command line: module, one line, group and examples of each.

Only the chosen verb's module is imported: the help must not wait for torch.
"""

from __future__ import annotations

VERBS: dict[str, tuple[str, str]] = {
    "demo": ("lorakit.cli.demo", "teach a small real model a task and prove it, in minutes"),
    "doctor": ("lorakit.cli.doctor", "show what a config would train on, before it trains"),
    "plan": ("lorakit.cli.plan", "count parameters, memory and time of a run, nothing loaded"),
    "train": ("lorakit.cli.train", "train an adapter from a YAML config"),
    "compare": ("lorakit.cli.compare", "compare methods on one task under one budget"),
    "sweep": (
        "lorakit.cli.sweep",
        "train many adapters over one base in one batch, and keep the best",
    ),
    "eval": ("lorakit.cli.eval", "compare the base and an adapter on a data file"),
    "generate": ("lorakit.cli.generate", "answer one prompt, or a file of prompts"),
    "chat": ("lorakit.cli.chat", "talk with a model, with or without its adapter"),
    "serve": ("lorakit.cli.serve", "serve many adapters over one base, behind OpenAI's interface"),
    "inspect": ("lorakit.cli.inspect", "look inside an adapter's files"),
    "analyze": ("lorakit.cli.analyze", "see what an adapter has learned, or two have in common"),
    "report": ("lorakit.cli.report", "write one HTML file from what a run left"),
    "merge": ("lorakit.cli.merge", "fold an adapter into its base, with a certificate"),
    "compose": ("lorakit.cli.compose", "compose several adapters into one"),
    "prune": ("lorakit.cli.prune", "cut an adapter's ranks down, and measure what that costs"),
    "extract": ("lorakit.cli.extract", "make an adapter of a fine-tuned model"),
    "convert": ("lorakit.cli.convert", "convert an adapter from or to another tool's format"),
    "export": ("lorakit.cli.export", "write an adapter for another engine, print its command"),
    "paper": ("lorakit.cli.paper", "run the LoRA paper's experiments, its numbers beside ours"),
}

GROUPS: dict[str, tuple[str, ...]] = {
    "Start": ("demo", "doctor", "plan"),
    "Train": ("train", "compare", "sweep"),
    "Measure and use": ("eval", "generate", "chat", "serve"),
    "Look inside": ("inspect", "analyze", "report"),
    "Merge, combine, convert": (
        "merge",
        "compose",
        "prune",
        "extract",
        "convert",
        "export",
    ),
    "The paper": ("paper",),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "demo": ("lorakit demo", "lorakit demo --task reviews --minutes 5 -o runs/film"),
    "doctor": (
        "lorakit doctor train.yaml",
        "lorakit doctor --model smollm2-135m-instruct --data train.jsonl",
    ),
    "plan": (
        "lorakit plan smollm2-135m-instruct --r 8 --targets all-linear",
        "lorakit plan llama-3-8b --r 16 --batch-size 4 --length 2048 --device cuda",
    ),
    "train": (
        "lorakit train train.yaml",
        "lorakit train train.yaml lr=1e-4 train.epochs=5 output=runs/second",
        "lorakit train runs/second/config.yaml --resume",
    ),
    "compare": (
        "lorakit compare compare.yaml --dry-run",
        "lorakit compare compare.yaml budget.steps=100",
    ),
    "sweep": (
        "lorakit sweep sweep.yaml --dry-run",
        "lorakit sweep sweep.yaml train.max_steps=200 sweep.together=4",
    ),
    "eval": (
        "lorakit eval held_out.jsonl --adapter runs/first/adapter",
        "lorakit eval held_out.jsonl --adapter runs/first/adapter --metrics rouge_l",
    ),
    "generate": (
        'lorakit generate "What is LoRA?" --model smollm2-135m-instruct',
        'lorakit generate "What is LoRA?" --adapter runs/first/adapter --compare',
    ),
    "chat": (
        "lorakit chat --adapter runs/first/adapter",
        "lorakit chat --model smollm2-135m-instruct --temperature 0.7",
    ),
    "serve": (
        "lorakit serve --model smollm2-135m-instruct --adapters runs",
        "lorakit serve --model path/to/base --adapters adapters --pin sql --port 8080",
    ),
    "inspect": ("lorakit inspect runs/first/adapter --sort norm --top 3",),
    "analyze": (
        "lorakit analyze runs/first -o analysis",
        "lorakit analyze runs/r8/adapter runs/r64/adapter --sites q_proj",
    ),
    "report": ("lorakit report runs/first",),
    "merge": ("lorakit merge runs/first/adapter -o merged",),
    "compose": (
        "lorakit compose adapters/sql=0.7 adapters/chat=0.3 -o adapters/both",
        "lorakit compose adapters/sql adapters/chat -o adapters/small --how svd -r 16",
    ),
    "prune": ('lorakit prune runs/first/adapter -o smaller --budget "4 MB"',),
    "extract": ("lorakit extract --base path/to/base --tuned path/to/tuned -o adapters/tuned",),
    "convert": (
        "lorakit convert runs/first/adapter --to gguf -o out/gguf",
        "lorakit convert adapter.gguf -o adapters/first --base smollm2-135m-instruct",
    ),
    "export": ("lorakit export runs/first/adapter --for vllm --base OWNER/MODEL -o out/first",),
    "paper": (
        "lorakit paper list",
        "lorakit paper run table6 --data datasets -o runs/paper",
        "lorakit paper report runs/paper",
    ),
}
