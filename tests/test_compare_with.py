"""scripts/compare_with.py finds one changed bit, a changed number and a missing file, and passes over times."""

import json
from pathlib import Path

import h5py
import numpy as np

from scripts.compare_with import compare


def results(folder: Path, *, value: float = 0.5, last: float = 2.0, more: bool = True) -> Path:
    (folder / "features").mkdir(parents=True)
    (folder / "runs").mkdir()
    (folder / "runs" / f"{folder.name}.json").write_text("{}")
    with h5py.File(folder / "features" / "a.h5", "w") as file:
        file["features"] = np.array([[1.0, last]], np.float32)
    (folder / "results.json").write_text(json.dumps({"scores": [{"auroc": value}], "seconds": hash(folder.name)}))
    if more:
        (folder / "summary.csv").write_text("score,value\nauroc,0.5\n")
    return folder


def found(before: Path, after: Path, *allowed: str) -> dict[str, list[str]]:
    return {file: what for file, what, _ in compare(before, after, list(allowed)) if what}


def test_equal_results_are_equal(tmp_path: Path) -> None:
    assert found(results(tmp_path / "a"), results(tmp_path / "b")) == {}


def test_what_differs_is_named_unless_it_is_allowed(tmp_path: Path) -> None:
    before = results(tmp_path / "a")
    after = results(tmp_path / "b", value=0.6, last=float(np.nextafter(np.float32(2), np.float32(3))), more=False)
    differing = found(before, after)
    assert set(differing) == {"features/a.h5", "results.json", "summary.csv"}
    assert "2.38e-07" in differing["features/a.h5"][0] and "0.5 -> 0.6" in differing["results.json"][0]
    assert set(found(before, after, "*.json:*/auroc", "summary.csv")) == {"features/a.h5"}
