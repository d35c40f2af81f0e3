"""Make `tests/goldens/robustness.json`: robustness indices of made embeddings by the package croma.

    pip install croma==1.0.1
    python scripts/robustness_goldens.py tests/goldens/robustness.json

In an environment of its own. The embeddings are drawn again by the test, from the same seed.
"""

import json
import sys
from pathlib import Path

import pandas as pd
from croma import RI

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from made_sites import CASES, NEIGHBORS

from scripts.bench.robustness import made_sites


def main() -> None:
    found = {}
    for name, case in CASES.items():
        vectors, labels, sites, groups = made_sites(**case)
        ids = [str(row) for row in range(len(labels))]
        columns = {"sample_id": ids, "image_path": ids, "label": labels, "group_id": groups, "site": sites}
        manifest = pd.DataFrame({key: [str(value) for value in column] for key, column in columns.items()})
        how = {"confounder_column": "site", "evaluation_design": "all"}
        chosen = RI.compute(vectors, manifest, k_candidates=list(NEIGHBORS), **how)
        curve = RI.compute_curve(vectors, manifest, k_values=list(NEIGHBORS), **how)
        found[name] = {"index": float(chosen.value), "k": int(chosen.k), "by_k": {str(k): v for k, v in curve.items()}}
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
