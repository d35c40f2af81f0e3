"""`gigapath report`: what the page holds, without a browser."""

import base64
import dataclasses
import gzip
import hashlib
import html
import json
import re
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from made_report import MARKUP, PLANTED, REGION, SCRIPT, make_run
from PIL import Image

from gigapath.cli.main import main
from gigapath.cohort.status import read_status, write_status
from gigapath.features import read_tiles
from gigapath.file_names import folder_name
from gigapath.report import ReportOptions, write_report
from gigapath.report.pictures import distances, pick_tiles
from gigapath.report.write import project, script_text

CANARY = "Doe,JANE_1953"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a small cohort, below a folder whose name is nobody's business."""
    out = make_run(tmp_path_factory.mktemp("report") / CANARY)
    assert main(["report", str(out), "--workers", "0"]) == 0
    return out


def page_data(path: Path) -> dict[str, Any]:
    found = re.search(r'<script type="text/plain" id="data">(.*?)</script>', path.read_text(), re.S)
    assert found
    data: dict[str, Any] = json.loads(gzip.decompress(base64.b64decode(found[1])))
    return data


@pytest.fixture(scope="module")
def data(run: Path) -> dict[str, Any]:
    return page_data(run / "report.html")


def media_of(data: dict[str, Any], slide_id: str) -> dict[str, Any]:
    entry: dict[str, Any] = data["media"][data["slides"]["ids"].index(slide_id)]
    return entry


# --------------------------------------------------------------------------------------------------- what the page says


def test_slides_stand_with_their_status_and_the_manifest_columns(data: dict[str, Any]) -> None:
    slides = data["slides"]
    assert dict(zip(slides["ids"], slides["status"], strict=True)) == {
        "first": "done", "second": "done", SCRIPT: "done", PLANTED: "done", "blank": "no_tissue", "broken": "failed",
        "gone": "failed",
    }  # fmt: skip
    assert data["counts"] == {"done": 4, "no_tissue": 1, "failed": 2, "stopped": 0, "todo": 0}
    row = dict(zip(slides["columns"], slides["values"][slides["ids"].index("second")], strict=True))
    assert (row["patient_id"], row["site"], row["stain"]) == ("p0", "b", MARKUP)
    assert slides["tiles"][slides["ids"].index("blank")] == 0 < slides["tiles"][slides["ids"].index(PLANTED)]


def test_failures_are_grouped_by_reason(data: dict[str, Any]) -> None:
    assert {tuple(each["slides"]) for each in data["failures"]} == {("broken",), ("gone",)}
    assert any("slide that OpenSlide reads" in each["reason"] for each in data["failures"])


def test_foot_says_terms_options_and_versions(data: dict[str, Any]) -> None:
    assert "research use only" in data["terms"][0] and "Prov-GigaPath" in data["terms"][1]
    (run_,) = data["runs"]
    assert (run_["verb"], run_["outcome"]) == ("embed", "some slides failed")
    assert run_["options"]["tile_size"] == 64 and "numpy" in run_["versions"]


def test_page_holds_no_path_and_no_name_of_the_owner(run: Path) -> None:
    files = [run / "report.html", *(path for path in (run / "report_files").rglob("*") if path.is_file())]
    assert len(files) > 20
    for form in (CANARY, str(run.parent), "cohort.csv"):
        assert [path.name for path in files if form.encode() in path.read_bytes()] == []
        assert form not in json.dumps(page_data(run / "report.html"))


def test_names_of_slides_and_cells_are_text_not_markup(run: Path) -> None:
    text = (run / "report.html").read_text()
    assert SCRIPT not in text and MARKUP not in text and MARKUP in str(page_data(run / "report.html"))
    assert len(re.findall(r"<script\b", text, re.I)) == len(re.findall(r"</script", text, re.I)) == 3
    assert re.fullmatch(r"[A-Za-z0-9._-]+", folder_name(SCRIPT))
    assert folder_name("a b") != folder_name("a_b") != folder_name("a?b") and folder_name("S1.2-x") == "S1.2-x"
    assert folder_name("..").strip(".") and folder_name("é") != folder_name("è")


def test_title_is_escaped(run: Path, tmp_path: Path) -> None:
    write_report(run, to=tmp_path, options=ReportOptions(title="<b>&", side=256, workers=0))
    assert "<title>&lt;b&gt;&amp;</title>" in (tmp_path / "report.html").read_text()


def test_only_the_scripts_of_the_page_may_run_and_nothing_is_fetched(run: Path) -> None:
    text = (run / "report.html").read_text()
    policy = html.unescape(re.search(r'Policy" content="(.*?)"', text)[1])  # type: ignore[index]
    scripts = re.findall(r"<script>(.*?)</script>", text, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    assert len(hashes) == 2 and all(f"'sha256-{digest}'" in policy for digest in hashes)
    assert "default-src 'none'" in policy and "connect-src" not in policy
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.S)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|@import|url\(|@font-face", markup)
    assert "sourceMappingURL" not in text
    ours = scripts[1]
    assert not re.search(r"\bfetch\(|XMLHttpRequest|innerHTML|insertAdjacentHTML|document\.write|\beval\(", ours)


def test_a_script_cannot_end_its_element() -> None:
    assert "</script" not in script_text("x = '</script>'; y = '</SCRIPT>';\n//# sourceMappingURL=a.map\n").lower()


# ------------------------------------------------------------------------------------------------------------- pictures


def test_pictures_lie_where_the_page_says(run: Path, data: dict[str, Any]) -> None:
    for slide_id in ("first", SCRIPT, PLANTED):
        entry = media_of(data, slide_id)
        folder = run / "report_files" / entry["folder"]
        for level in [*entry["levels"], entry["thumbnail"]]:
            with Image.open(folder / level["file"]) as image:
                assert image.size == (level["w"], level["h"])
        assert entry["levels"][-1]["w"] == entry["frame"]["w"] and entry["frame"]["mpp"] == 0.5
        assert len(entry["levels"]) == 1 or entry["levels"][-2]["w"] * 2 == entry["levels"][-1]["w"]
    planted = cv2.imread(str(run / "report_files" / PLANTED / "level_1.jpg")).astype(int)
    x, y, w, h = REGION
    inside = planted[y + 8 : y + h - 8, x + 8 : x + w - 8].mean((0, 1))
    around = planted[y + h + 16 : y + h + 60, x : x + w].mean((0, 1))
    assert np.abs(inside - around).max() > 40


def test_slides_without_a_picture_have_none_named(data: dict[str, Any]) -> None:
    assert "thumbnail" in media_of(data, "blank") and "tiles" not in media_of(data, "blank")
    for slide_id in ("broken", "gone"):
        entry = media_of(data, slide_id)
        assert "thumbnail" not in entry and "levels" not in entry and entry["maps"] == []


def test_tiles_lie_on_their_places(run: Path, data: dict[str, Any]) -> None:
    tiles = read_tiles(run / "tiles" / f"{PLANTED}.h5")
    layer = media_of(data, PLANTED)["tiles"]
    with Image.open(run / "report_files" / PLANTED / layer["file"]) as image:
        assert list(image.size) == layer["pixels"]
        alpha = np.asarray(image.convert("RGBA"))[..., 3]
    scale = layer["w"] / alpha.shape[1], layer["h"] / alpha.shape[0]
    rows, columns = np.mgrid[: alpha.shape[0], : alpha.shape[1]]
    x, y = layer["x"] + (columns + 0.5) * scale[0], layer["y"] + (rows + 0.5) * scale[1]
    wanted = np.zeros(alpha.shape, bool)
    for left, top in tiles.coords_level0.tolist():
        wanted |= (x >= left) & (x < left + 64) & (y >= top) & (y < top + 64)
    assert np.array_equal(alpha > 0, wanted) and 0 < wanted.mean() < 1
    assert (alpha == 255).any() and np.median(alpha[alpha > 0]) < 255


def test_planted_region_is_what_stands_out(data: dict[str, Any]) -> None:
    crops = media_of(data, PLANTED)["crops"]
    x, y, w, h = REGION
    of_region = {(left, top) for left in range(x, x + w, 64) for top in range(y, y + h, 64)}
    unusual = {(left, top) for left, top, *_ in crops["unusual"]}
    assert len(unusual & of_region) / len(unusual | of_region) >= 0.5
    assert not {(left, top) for left, top, *_ in crops["typical"]} & of_region
    assert crops["unusual"][0][4] > 2 > 1 > crops["typical"][0][4]


def test_typical_tiles_lie_near_the_mean() -> None:
    random = np.random.default_rng(0)
    features = random.standard_normal((5000, 6)).astype(np.float16)
    features[[7, 4500]] += 20
    wide = features.astype(np.float64)
    np.testing.assert_allclose(distances(features), np.linalg.norm(wide - wide.mean(0), axis=1), rtol=1e-9)
    typical, unusual = pick_tiles(features)
    assert {pick.index for pick in unusual[:2]} == {7, 4500} and len(typical) == len(unusual) == 6
    for count in (0, 1, 2, 5):
        typical, unusual = pick_tiles(features[:count])
        assert len({pick.index for pick in [*typical, *unusual]}) == count
    assert [pick.distance for pick in pick_tiles(np.ones((3, 2), np.float32))[0]] == [0, 0]


def test_pictures_are_drawn_once(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out)
    before = {path: path.stat().st_mtime_ns for path in (out / "report_files").rglob("*.jpg")}
    write_report(out, options=ReportOptions(workers=0))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    (out / "report_files" / "first" / "crops.jpg").unlink()
    write_report(out, options=ReportOptions(workers=0))
    assert (out / "report_files" / "first" / "crops.jpg").is_file()
    write_report(out, options=ReportOptions(workers=0, side=500))
    with Image.open(out / "report_files" / "first" / "level_0.jpg") as image:
        assert max(image.size) == 500


def test_slides_that_are_gone_are_shown_by_their_previews(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("report*", "private"))
    report = write_report(out, options=ReportOptions(workers=0))
    entry = media_of(page_data(report.page), PLANTED)
    assert entry["note"].startswith("Drawn from the preview: where the slide lies is not recorded")
    assert entry["crops"]["file"] is None and len(entry["crops"]["unusual"]) == 6
    level = entry["levels"][-1]
    assert level["w"] / level["h"] == pytest.approx(1900 / 1400, rel=0.01)
    picture = cv2.imread(str(out / "report_files" / PLANTED / level["file"]))
    assert picture[-20:].mean() > 200  # glass at the lower edge, no caption


def test_maps_are_laid_over_and_what_is_no_map_is_left_out(tmp_path: Path) -> None:
    from gigapath.report.pictures import Sources, write_maps

    cells = np.zeros((3, 5, 4), np.uint8)
    cells[1, 2] = 10, 20, 30, 255
    Image.fromarray(cells).save(tmp_path / "a_overlay.png")
    said = {
        **{"format": 1, "name": "a", "title": "rollout over layers", "heuristic": True, "model": "at /home/doe/x.pth"},
        **{"overlay": {"level0": [128, 64, 320, 192]}, "files": {"overlay": "a_overlay.png"}},
        "colour": {"palette": "sequential", "label": "w", "scope": "all", "low": 0, "high": 2, "colormap": "viridis"},
    }
    (tmp_path / "a.json").write_text(json.dumps(said))
    (tmp_path / "b.json").write_text(json.dumps({**said, "format": 9}))
    (tmp_path / "c.json").write_text(json.dumps({**said, "overlay": {"level0": None}}))
    (tmp_path / "d.json").write_text("{")
    (layer,) = write_maps(tmp_path / "out", tmp_path, Sources("a"))
    assert layer["stale"] == layer["cohort"] == ""  # it does not say what it was made from
    assert layer["title"] == "Rollout over layers (a heuristic)" and layer["facts"] == {"model": "at <path>"}
    assert (layer["legend"]["low"], layer["legend"]["high"], len(layer["legend"]["stops"])) == (0, 2, 9)
    assert [layer[side] for side in "xywh"] == [128, 64, 320, 192]
    with Image.open(tmp_path / "out" / layer["file"]) as image:
        assert list(image.size) == layer["pixels"] == [5, 3]
        assert np.array_equal(np.asarray(image), cells)
    assert write_maps(tmp_path / "out", tmp_path / "no such slide", Sources("a")) == []


def test_maps_that_are_out_of_date_say_so(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gigapath.maps.drawing.DPI", 20)
    out, options = tmp_path / "out", ReportOptions(side=256, workers=0)
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("report*"))
    for names in (["first", "second"], [PLANTED]):
        files = [str(out / "features_tiny" / f"{name}.h5") for name in names]
        assert main(["map", *files, "--out", str(out / "maps"), "--kind", "pca", "--device", "cpu"]) == 0

    def maps() -> tuple[dict[str, str], list[str]]:
        data = page_data(write_report(out, options=options).page)
        return {name: media_of(data, name)["maps"][0]["stale"] for name in ("first", "second", PLANTED)}, data["notes"]

    stale, notes = maps()
    assert set(stale.values()) == {""}
    assert [note.partition(":")[0] for note in notes] == [
        "Tile embeddings, principal components as red, green and blue"
    ]
    assert "2 runs of gigapath map" in notes[0] and "all slides at once" in notes[0]
    status = read_status(out / "features_tiny", "first")
    assert status is not None
    write_status(out / "features_tiny", dataclasses.replace(status, digest="another"))
    (out / "features_tiny" / f"{PLANTED}.json").unlink()
    stale, notes = maps()
    assert stale["first"].startswith("Out of date: the slide's tiles or embeddings were made anew")
    assert "no longer there" in stale[PLANTED] and stale["second"] == ""
    assert "2 maps of 2 slides are out of date" in notes[0]
    assert len(notes) == 2 and "older than their tile embeddings" in notes[1]
    write_status(out / "features_tiny", status)
    assert maps()[0]["first"] == ""
    (out / "fold_0").mkdir()
    (out / "fold_0" / "head.json").write_text('{"sha256": "of this head"}')
    path = out / "maps" / "first" / "pca.json"
    values = json.loads(path.read_text())
    for head, said in (("of this head", ""), ("of another", "Of another head")):
        path.write_text(json.dumps({**values, "made_from": {**values["made_from"], "head_sha256": head}}))
        assert maps()[0]["first"].partition(":")[0] == said
    capsys.readouterr()


def test_pictures_that_are_shown_no_more_are_removed_and_nothing_else(run: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ReportOptions(workers=0)
    shutil.copytree(run, out)
    files = out / "report_files"
    (files / "first" / "mine.txt").write_text("the user's")
    (files / "second" / "map_0123456789.png").write_bytes(b"of a map that is gone")
    (files / "second" / "level_9.jpg").write_bytes(b"of a larger picture")
    (files / "second" / "notes.jpg").write_bytes(b"the user's")
    (files / "album").mkdir()
    (files / "album" / "thumbnail.jpg").write_bytes(b"the user's: no record of ours beside it")
    (files / "elsewhere").symlink_to(tmp_path / "other")
    shutil.copytree(files / PLANTED, tmp_path / "other")
    whole = {path.name for path in (tmp_path / "other").iterdir()}
    for name in ("first", PLANTED):
        assert main(["remove", name, str(out)]) == 0
    write_report(out, options=options)
    assert [path.name for path in (files / "first").iterdir()] == ["mine.txt"]
    assert not (files / PLANTED).exists()
    left = {path.name for path in (files / "second").iterdir()}
    assert "notes.jpg" in left and "thumbnail.jpg" in left and not left & {"map_0123456789.png", "level_9.jpg"}
    assert [path.name for path in (files / "album").iterdir()] == ["thumbnail.jpg"]
    assert {path.name for path in (tmp_path / "other").iterdir()} == whole
    write_report(out, options=ReportOptions(workers=0, single_file=True, side=256))
    assert sorted(path.name for path in files.iterdir()) == ["album", "elsewhere", "first", "second"]
    assert [path.name for path in (files / "second").iterdir()] == ["notes.jpg"]  # the page holds the others itself


# --------------------------------------------------------------------------------------------------------------- layout


def test_slides_are_laid_out_by_their_embeddings(data: dict[str, Any]) -> None:
    (projection,) = data["projections"]
    assert projection["method"] == "PCA" and projection["axes"][0].startswith("component 1 (")
    assert sorted(projection["ids"]) == sorted([SCRIPT, "first", "second", PLANTED])
    assert np.asarray(projection["points"]).shape == (4, 2) and projection["trained"]


def test_principal_components_keep_distances_of_a_plane() -> None:
    plane = np.random.default_rng(1).standard_normal((12, 2)) @ np.array([[3.0, 0, 4, 0], [0, 1, 0, 0]])
    points, words, axes = project(plane, "auto")
    assert words == "PCA" and "% of the variance" in axes[1]
    apart = np.linalg.norm(plane[:, None] - plane[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(points[:, None] - points[None], axis=-1), apart, atol=1e-9)


@pytest.mark.parametrize(
    ("method", "module", "said"),
    [("tsne", "sklearn", "t-SNE (perplexity "), pytest.param("umap", "umap", "UMAP (15 ", marks=pytest.mark.slow)],
)
def test_layouts_keep_groups_together(method: str, module: str, said: str) -> None:
    pytest.importorskip(module)
    random = np.random.default_rng(2)
    vectors = random.standard_normal((60, 5)) + np.array([20, 20, 0, 0, 0])
    vectors[30:, 1] -= 40
    points, words, _ = project(vectors, method)
    assert words.startswith(said)
    middle = points[:30].mean(0), points[30:].mean(0)
    nearer = np.linalg.norm(points - middle[0], axis=1) < np.linalg.norm(points - middle[1], axis=1)
    assert nearer[:30].all() and not nearer[30:].any()


# ------------------------------------------------------------------------------------------------------------- one file


def test_single_file_holds_everything(run: Path, tmp_path: Path) -> None:
    report = write_report(run, to=tmp_path, options=ReportOptions(single_file=True, side=400, workers=0))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    data = page_data(report.page)
    entry = media_of(data, PLANTED)
    content = data["files"][f"{entry['folder']}/{entry['thumbnail']['file']}"]
    assert base64.b64decode(content.removeprefix("data:image/jpeg;base64,"))[:2] == b"\xff\xd8"
    assert {name.split("/")[0] for name in data["files"]} >= {"first", "second", PLANTED}


def test_single_file_is_for_few_slides(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("gigapath.report.write.MAX_IN_ONE_FILE", 3)
    assert main(["report", str(run), "--single-file"]) == 1
    said = capsys.readouterr().err
    assert "--single-file: expected at most 3 slides, got 7. Leave it out" in said and said.count("\n") == 1


def test_a_page_made_from_other_folders_is_kept_unless_overwritten(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, page = tmp_path / "other", tmp_path / "page" / "report.html"
    shutil.copytree(run, other, ignore=shutil.ignore_patterns("report*"))

    def report(folder: Path, *words: str) -> int:
        return main(["report", str(folder), "--to", str(page.parent), "--side", "256", "--workers", "0", *words])

    assert report(run) == report(run) == 0  # the same one is drawn anew
    first = page.read_bytes()
    assert report(other) == 1 and "--overwrite" in capsys.readouterr().err and page.read_bytes() == first
    assert report(other, "--overwrite") == 0 and page.read_bytes() != first
    assert report(run) == 1
    page.write_text("<html>the user's own</html>")
    assert report(run) == 1 and page.read_text() == "<html>the user's own</html>"
    for folder in (run, other):  # a page of an earlier version, in the folder of the run that it is of
        older = re.sub('<meta name="gigapath-report".*?>', "", (run / "report.html").read_text())
        (folder / "report.html").write_text(older)
        assert main(["report", str(folder), "--workers", "0"]) == 0
    shutil.move(other, tmp_path / "moved")
    assert main(["report", str(tmp_path / "moved"), "--workers", "0"]) == 0


def test_folders_that_are_none_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "no")]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["report", str(tmp_path)]) == 1
    assert "found neither slides nor results" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--projection", "umap", "--embedding", "nonsense"]) == 2
    assert "expected default, state:I" in capsys.readouterr().err


def test_damaged_files_spoil_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out, ignore=shutil.ignore_patterns("report*"))
    (out / "tiles" / "first.h5").write_bytes(b"no h5")
    (out / "features_tiny" / "second.h5").write_bytes(b"")
    (out / "features_tiny" / "second.json").write_text("{")
    (out / "runs" / "x.json").write_text("[]")
    (out / "results.json").write_text('{"summary": 3}')
    data = page_data(write_report(out, options=ReportOptions(workers=0, side=300)).page)
    assert "thumbnail" in media_of(data, "first") and "crops" not in media_of(data, "second")
    assert data["slides"]["status"][data["slides"]["ids"].index("second")] == "todo"
    assert "run the command again" in data["results"][0]["blocks"][0]["sentences"][0]


# -------------------------------------------------------------------------------------------------------------- results


def test_fine_tuning_is_shown_with_its_slides(run: Path, tmp_path: Path) -> None:
    from made_cohort import NARROW, write_cohort, write_task

    features, labels = write_cohort(tmp_path, [n % 2 for n in range(12)], encoder="made", mpp=0.5, numerics_version=1)
    task = write_task(tmp_path / "task.yaml", classes=2)
    words = ["finetune", "--task", task, "--features", features, "--labels", labels, "--out", tmp_path / "tuned"]
    recipe = ["--model-arch", NARROW, "--feat-layer", "2", "--pretrained", "", "--replicates", "20", "--epochs", "2"]
    assert main([*map(str, words), *recipe, "--folds", "3", "--device", "cpu", "--warmup-epochs", "0"]) == 0
    assert main(["report", str(tmp_path / "tuned"), "--slides", str(run), "--to", str(tmp_path / "page")]) == 0
    data = page_data(tmp_path / "page" / "report.html")
    (result,) = data["results"]
    assert result["title"] == "Fine-tuning: made"
    folds = [block for block in result["blocks"] if block["kind"] == "group" and block["title"].startswith("Fold")]
    assert len(folds) == 3 and "not finished" not in json.dumps(result)
    assert result["blocks"][0]["columns"] == ["from random weights", "site alone"]
    scores = {name: cell for name, cell, _ in result["blocks"][0]["rows"]}
    assert 0 <= scores["accuracy"]["value"] <= 1 and scores["AUROC"]["sd"] is not None
    inner = {block["kind"]: block for block in reversed(folds[0]["blocks"])}  # the first of each kind
    assert np.sum(inner["confusion"]["counts"]) == 4 and inner["confusion"]["classes"] == ["0", "1"]
    assert len(inner["curves"]["panels"][0]["lines"][0]["y"]) == 2
    assert any(row[1]["low"] is not None for row in inner["scores"]["rows"] if row[1])
    shown = next(block for block in result["blocks"] if block["kind"] == "predictions")
    assert len(shown["rows"]) == 12 and shown["of_slides"] and str(tmp_path) not in json.dumps(data)
    assert result["options"]["training"]["epochs"] == 2


def test_probe_is_shown(tmp_path: Path) -> None:
    words = ["probe", "--demo", "--out", str(tmp_path), "--replicates", "20", "--steps", "200"]
    assert main(words) == 0
    assert main(["report", str(tmp_path)]) == 0
    data = page_data(tmp_path / "report.html")
    assert data["slides"] is None
    (result,) = data["results"]
    blocks = {block["kind"]: block for block in reversed(result["blocks"])}  # the first of each kind
    assert blocks["scores"]["columns"] == ["probe", "chance", "validation"]
    assert len(blocks["curves"]["panels"]) == 2 and blocks["curves"]["mark"]["words"].startswith("kept: step")
    assert np.sum(blocks["confusion"]["counts"]) == len(blocks["predictions"]["rows"])
