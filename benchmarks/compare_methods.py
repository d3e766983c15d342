"""Run the comparisons of the paper's Tables 2 and 3 with all methods; keep their compare.json.

    python benchmarks/compare_methods.py glue --data DIR
    python benchmarks/compare_methods.py e2e --data DIR
    python benchmarks/compare_methods.py glue_mrpc --data DIR budget.steps=60

DIR holds GLUE as DIR/mrpc/train.jsonl.gz (for `glue`), E2E as DIR/e2e/train.jsonl.gz (for `e2e`).
Finished runs are not run again; a comparison that was stopped goes on. `lorakit paper run table2`
and `table3` run the paper's methods alone, at a stated scale.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lorakit.compare.config import CompareConfig
from lorakit.compare.run import compare
from lorakit.errors import LorakitError
from lorakit.files import write_json
from lorakit.paper.experiments import CONFIGS

HERE = Path(__file__).parent
GLUE = ("glue_mrpc", "glue_cola", "glue_stsb", "glue_sst2")


def main() -> int:
    """Run what is named, and copy the results; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("name", choices=["glue", *GLUE, "e2e"])
    parser.add_argument("--data", required=True, help="directory of the data")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("override", nargs="*", help="key=value of the comparison")
    args = parser.parse_intermixed_args()
    for name in GLUE if args.name == "glue" else (args.name,):
        overrides = [f"data={json.dumps(args.data)}", *args.override]
        config = CompareConfig.from_yaml(CONFIGS / f"{name}.yaml", overrides)
        try:
            result = compare(config)
        except LorakitError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        write_json(args.results / f"compare_{name}.json", result.document)
    return 0


if __name__ == "__main__":
    sys.exit(main())
