"""The report's page in Chromium, from the disk and without network."""

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, complaints, wait_for
from made_report import MARKUP, PLANTED, REGION, SCRIPT, make_run

from gigapath.cli.main import main
from gigapath.cohort.status import Status, read_status
from gigapath.report import ReportOptions, write_report
from gigapath.report.write import Projection

pytestmark = pytest.mark.slow

# The viewer of the open slide, and what it shows.
VIEWER = "OpenSeadragon.getViewer(document.querySelector('.viewer'))"
DRAWN = f"{VIEWER} && {VIEWER}.world.getItemCount() > 1 && {VIEWER}.world.getItemAt(0).getFullyLoaded()"
IDS = "[...document.querySelectorAll('.slides tbody .link')].map(link => link.textContent)"
# Every hundredth pixel of the picture that is not clear, read from a copy that the browser lets be read often.
COLOURS = f"""(() => {{
    const copy = new OffscreenCanvas(700, 700).getContext('2d', {{willReadFrequently: true}});
    copy.drawImage({VIEWER}.drawer.canvas, 0, 0);
    const all = copy.getImageData(0, 0, 700, 700).data, found = [];
    for (let at = 0; at < all.length; at += 400) if (all[at + 3] === 255) found.push(all.slice(at, at + 3));
    return found;
}})()"""
# Pictures that were asked for although they are not in view.
EAGER = """[...document.querySelectorAll('.slides img[src]')].filter(image => {
    const box = image.getBoundingClientRect();
    return box.bottom < 0 || box.top > innerHeight;
}).length"""
# Texts whose contrast with what lies behind them is below 4.5, or 3 for large ones.
PALE = """(() => {
    const parse = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
    const light = (rgb) => rgb.slice(0, 3).map(v => v / 255)
        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
        .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = (node) => {
        for (; node; node = node.parentElement) {
            const colour = parse(getComputedStyle(node).backgroundColor);
            if (colour.length && (colour.length < 4 || colour[3] > 0.99)) return colour;
        }
        return [255, 255, 255];
    };
    const found = [];
    for (const node of document.querySelectorAll('body *')) {
        const own = [...node.childNodes].some(child => child.nodeType === 3 && child.textContent.trim());
        const style = getComputedStyle(node);
        if (!own || !node.checkVisibility() || node.closest('[disabled], svg, script, .sr, .skip, option')) continue;
        const pair = [light(parse(style.color)), light(behind(node))].sort((a, b) => b - a);
        const contrast = (pair[0] + 0.05) / (pair[1] + 0.05);
        const least = parseFloat(style.fontSize) >= 24 ? 3 : 4.5;
        if (contrast < least) found.push([node.textContent.slice(0, 40), contrast]);
    }
    return found;
})()"""
# Controls that nothing names.
UNNAMED = """[...document.querySelectorAll('button, input, select')].filter(node =>
    node.checkVisibility() && !node.textContent.trim() && !node.labels?.length && !node.ariaLabel).length"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small cohort with maps and a report."""
    pytest.importorskip("sklearn")
    out = make_run(tmp_path_factory.mktemp("browser"))
    assert main(["map", str(out), "--out", str(out / "maps"), "--clusters", "4", "--device", "cpu"]) == 0
    write_report(out, options=ReportOptions(workers=0))
    return out


@pytest.fixture
def page() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def keys(page: Any, *pressed: str) -> None:
    """Press keys where the focus is."""
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(page).send_keys(*pressed).perform()


def test_table_sorts_searches_and_filters(run: Path, page: Any) -> None:
    page.get((run / "report.html").as_uri())
    assert len(wait_for(page, IDS)) == 7
    names = page.execute_script(f"return {IDS}")
    assert SCRIPT in names and sorted(names, key=str.casefold) == sorted(names, key=str.casefold)
    button = page.find_element("xpath", "//th/button[text()='tiles']")
    button.click()
    assert page.execute_script(f"return {IDS}")[-3:] == [PLANTED, "broken", "gone"]  # what failed never had tiles: last
    button.click()
    assert page.execute_script(f"return {IDS}")[0] == PLANTED
    assert button.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    search = page.find_element("css selector", "input[type=search]")
    search.send_keys("P9")
    assert sorted(page.execute_script(f"return {IDS}")) == ["broken", "gone"]
    assert "2 of 7 slides" in page.page_source
    search.clear()
    search.send_keys("x")
    search.send_keys("\b")
    page.find_element("xpath", "//button[contains(@class, 'count')][.//span[contains(., 'no tissue')]]").click()
    assert page.execute_script(f"return {IDS}") == ["blank"]
    cells = "[...document.querySelectorAll('.slides td')].map(cell => cell.textContent)"
    page.find_element("css selector", ".count").click()
    assert MARKUP in page.execute_script(f"return {cells}")
    assert page.execute_script("return document.querySelectorAll('img[onerror]').length") == 0
    assert complaints(page) == []


def test_slide_opens_zooms_and_closes_by_keyboard(run: Path, page: Any) -> None:
    page.get((run / "report.html").as_uri())
    wait_for(page, IDS)
    link = next(each for each in page.find_elements("css selector", ".slides .link") if each.text == PLANTED)
    page.execute_script("arguments[0].focus()", link)
    keys(page, "\ue007")
    wait_for(page, DRAWN)
    assert page.execute_script("return document.getElementById('slide').open")
    assert page.execute_script("return document.activeElement.classList.contains('openseadragon-canvas')")
    assert "#slide=planted" in page.current_url
    zoom = page.execute_script(f"return {VIEWER}.viewport.getZoom()")
    keys(page, "+")
    wait_for(page, f"{VIEWER}.viewport.getZoom() > {zoom * 1.05}")
    centre = page.execute_script(f"return {VIEWER}.viewport.getCenter().x")
    keys(page, "\ue014", "\ue014")  # right
    wait_for(page, f"{VIEWER}.viewport.getCenter().x > {centre}")
    page.find_element("css selector", "button[aria-label='Zoom out']").click()
    page.find_element("css selector", "button[aria-label='Whole slide']").click()
    wait_for(page, f"Math.abs({VIEWER}.viewport.getZoom() - {zoom}) < 0.01")
    keys(page, "r", "f")
    assert page.execute_script(f"return [{VIEWER}.viewport.getRotation(), {VIEWER}.viewport.getFlip()]") == [0, False]
    page.execute_script("arguments[0].focus()", page.find_element("css selector", ".slide .close"))
    keys(page, "\ue00c")
    wait_for(page, "!document.getElementById('slide').open")
    assert page.execute_script("return document.activeElement.textContent") == PLANTED
    assert "#slide" not in page.current_url
    assert complaints(page) == []


def test_layers_follow_their_sliders_and_unusual_tiles_lie_on_the_planted_region(run: Path, page: Any) -> None:
    page.get(f"{(run / 'report.html').as_uri()}#slide={PLANTED}")
    wait_for(page, f"{DRAWN} && {VIEWER}.world.getItemCount() === 3")
    opacity = f"[1, 2].map(i => {VIEWER}.world.getItemAt(i).getOpacity()).sort()"
    assert page.execute_script(f"return {opacity}") == [0, 0.5]
    slider = page.find_element("css selector", "input[aria-label='Opacity of the map']")
    page.execute_script("arguments[0].focus()", slider)
    keys(page, "\ue010")  # End
    assert page.execute_script(f"return {opacity}") == [0, 1]
    assert page.find_element("css selector", ".map-layer output").text == "100 %"
    titles = [each.text for each in page.find_elements("css selector", "select[aria-label='Map'] option")]
    assert titles[0] == "none" and any("clusters" in title for title in titles) and len(titles) == 3
    page.find_element("xpath", "//select[@aria-label='Map']/option[text()='none']").click()
    wait_for(page, f"{VIEWER}.world.getItemCount() === 2")
    x, y, w, h = REGION
    marks = page.execute_script(
        f"return [...document.querySelectorAll('.mark.unusual')].map(mark => {VIEWER}.getOverlayById(mark)"
        f".getBounds({VIEWER}.viewport)).map(box => [box.x, box.y, box.width, box.height].map(value => value * 1900))"
    )
    assert len(marks) == 6
    inside = [
        m for m in marks if x - 1 <= m[0] and m[0] + m[2] <= x + w + 1 and y - 1 <= m[1] and m[1] + m[3] <= y + h + 1
    ]
    assert len(inside) >= 5
    page.find_element("css selector", ".crops.unusual .crop").click()
    wait_for(page, f"{VIEWER}.viewport.getBounds().width * 1900 < 700")
    page.find_element("css selector", "input[type=checkbox]").click()
    assert page.execute_script("return [...document.querySelectorAll('.mark')].every(mark => mark.hidden)")
    assert page.execute_script(
        "return [...document.querySelectorAll('.crop img')].every(image => image.naturalWidth > 0)"
    )
    assert complaints(page) == []


# In CSS pixels of the viewer: rectangles [left, top, right, bottom] of what is drawn at all, of the drawn green of the
# planted region, of the frames of unusual tiles; and of the slide as the viewport has it.
SEEN = f"""(() => {{
    const canvas = {VIEWER}.drawer.canvas, [w, h] = [canvas.width, canvas.height];
    const copy = new OffscreenCanvas(w, h).getContext('2d', {{willReadFrequently: true}});
    copy.drawImage(canvas, 0, 0);
    const all = copy.getImageData(0, 0, w, h).data;
    const around = (holds) => {{
        const box = [w, h, 0, 0];
        for (let at = 0; at < w * h; at++) if (holds(all[4 * at], all[4 * at + 1], all[4 * at + 2], all[4 * at + 3])) {{
            const x = at % w, y = (at - x) / w;
            [box[0], box[1], box[2], box[3]] = [
                Math.min(box[0], x), Math.min(box[1], y), Math.max(box[2], x + 1), Math.max(box[3], y + 1)];
        }}
        return box;
    }};
    const corner = document.querySelector('.viewer').getBoundingClientRect();
    const frames = [...document.querySelectorAll('.mark.unusual')].map(mark => mark.getBoundingClientRect());
    const ends = (how, side) => Math[how](...frames.map(box => box[side]));
    const slide = {VIEWER}.viewport.viewportToViewerElementRectangle({VIEWER}.world.getItemAt(0).getBounds(true));
    return {{
        drawn: around((r, g, b, alpha) => alpha > 0),
        region: around((r, g, b) => g > r + 20 && g > b + 20),
        frames: [ends('min', 'left') - corner.left, ends('min', 'top') - corner.top,
            ends('max', 'right') - corner.left, ends('max', 'bottom') - corner.top],
        slide: [Math.max(0, slide.x), Math.max(0, slide.y),
            Math.min(w, slide.x + slide.width), Math.min(h, slide.y + slide.height)],
    }};
}})()"""
SIZES = [(1000, 700), (1000, 1000), (1000, 620), (1500, 620), (600, 900)]


def test_what_lies_over_a_slide_stays_on_it_at_every_size_of_the_window(run: Path, page: Any, tmp_path: Path) -> None:
    # In one file, so that the browser lets its pixels be read.
    write_report(run, to=tmp_path, options=ReportOptions(single_file=True, side=1200, workers=0))

    def resize(size: tuple[int, int]) -> None:
        given = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": False}
        page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", given)

    def settled() -> dict[str, list[float]]:
        """What is seen once the viewer has drawn for the window as it is."""
        wait_for(page, f"{VIEWER}.drawer.canvas.clientHeight === document.querySelector('.viewer').clientHeight")
        page.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
        return dict(page.execute_script(f"return {SEEN}"))

    def check(seen: dict[str, list[float]]) -> None:
        assert seen["drawn"] == pytest.approx(seen["slide"], abs=2.5)  # no bars beside the slide

    resize(SIZES[0])
    page.get(f"{(tmp_path / 'report.html').as_uri()}#slide={PLANTED}")
    for size in SIZES:  # opened anew at each size
        resize(size)
        page.refresh()
        wait_for(page, DRAWN)
        check(settled())
    for size in SIZES:
        resize(size)
        check(settled())
    page.find_element("xpath", "//select[@aria-label='Map']/option[text()='none']").click()
    for size in SIZES:
        resize(size)
        seen = settled()
        check(seen)
        assert seen["region"] == pytest.approx(seen["frames"], abs=6)
    assert complaints(page) == []


def test_points_lead_to_slides(run: Path, page: Any) -> None:
    page.get((run / "report.html").as_uri())
    wait_for(page, "document.querySelectorAll('.point').length === 4")
    page.execute_script("document.querySelector('.plot svg').focus()")
    keys(page, "\ue014")
    first = wait_for(page, "document.querySelector('.plot-tip strong')").text
    assert page.execute_script("return document.querySelector('.plot-tip img').dataset.src").startswith("report_files/")
    keys(page, "\ue007")
    wait_for(page, "document.getElementById('slide').open")
    assert page.find_element("id", "slide-title").text == first
    keys(page, "\ue00c")
    wait_for(page, "!document.getElementById('slide').open")
    colours = "new Set([...document.querySelectorAll('.point')].map(point => point.getAttribute('fill'))).size"
    select = page.find_element("css selector", ".controls select")
    by_column = {}
    for option in select.find_elements("tag name", "option"):
        option.click()
        by_column[option.text] = page.execute_script(f"return {colours}")
    assert by_column["site"] == 2 and by_column["stain"] == 2 and by_column["status"] == 1
    assert complaints(page) == []


def test_missing_pictures_are_said_and_never_broken(run: Path, page: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(run, out)
    shutil.rmtree(out / "report_files" / "first")
    page.get((out / "report.html").as_uri())
    wait_for(page, "document.querySelector('.slides tbody')")
    page.execute_script("document.querySelector('.slides').scrollIntoView()")
    wait_for(page, "[...document.querySelectorAll('.thumb.none')].some(box => box.textContent === 'picture missing')")
    broken = "[...document.images].filter(image => image.src && image.complete && !image.naturalWidth).length"
    assert page.execute_script(f"return {broken}") == 0
    page.get(f"{(out / 'report.html').as_uri()}#slide=gone")
    page.refresh()
    assert "No picture of this slide" in wait_for(page, "document.querySelector('.stage .empty')").text
    page.get(f"{(out / 'report.html').as_uri()}#slide=first")
    page.refresh()
    wait_for(page, "(document.querySelector('.stage .empty') || {textContent: ''}).textContent.includes('missing')")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_is_readable(run: Path, width: int, dark: bool) -> None:
    with chromium(width, 844, dark=dark, touch=width < 500) as page:
        for address in ("", "#slide=planted"):
            page.get("about:blank")
            page.get((run / "report.html").as_uri() + address)
            wait_for(page, DRAWN if address else IDS)
            assert page.execute_script("return document.documentElement.scrollWidth") == width
            assert page.execute_script(f"return {PALE}") == []
            assert page.execute_script(f"return {UNNAMED}") == 0
        ground = page.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, ground[4:-1].split(","))) < 200) is dark
        assert complaints(page) == []


def test_printed_pages_hold_all_columns_and_pictures(run: Path, page: Any) -> None:
    page.get((run / "report.html").as_uri())
    wait_for(page, IDS)
    page.execute_cdp_cmd("Page.printToPDF", {})
    without = "document.querySelectorAll('.slides img[data-src]:not([src])').length"
    assert page.execute_script(f"return {without}") == 0
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 700, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    )
    edges = "[...document.querySelectorAll('.slides th')].map(head => head.getBoundingClientRect().right)"
    assert max(page.execute_script(f"return {edges}")) <= 700
    assert complaints(page) == []


def test_single_file_needs_nothing_beside_it(run: Path, page: Any, tmp_path: Path) -> None:
    write_report(run, to=tmp_path, options=ReportOptions(single_file=True, side=600, workers=0))
    page.get(f"{(tmp_path / 'report.html').as_uri()}#slide={PLANTED}")
    wait_for(page, DRAWN)
    wait_for(page, f"{COLOURS}.length > 0")
    # Beneath a map the slide is grey, so that its stain does not mix with the map's colours; at opacity 0 it is seen.
    stained = f"{COLOURS}.filter(([r, g, b]) => Math.max(r, g, b) - Math.min(r, g, b) > 40).length"
    page.execute_script(
        "arguments[0].focus()", page.find_element("css selector", "input[aria-label='Opacity of the map']")
    )
    keys(page, "\ue011")  # Home
    wait_for(page, f"{stained} > 100")
    keys(page, "\ue014")  # 1 %
    wait_for(page, f"{stained} === 0")
    assert complaints(page) == []


def test_scores_are_shown(page: Any, tmp_path: Path) -> None:
    assert main(["probe", "--demo", "--out", str(tmp_path), "--replicates", "20", "--steps", "200"]) == 0
    assert main(["report", str(tmp_path)]) == 0
    page.get((tmp_path / "report.html").as_uri())
    wait_for(page, "document.querySelectorAll('.block').length >= 4")
    assert "AUROC" in page.find_element("tag name", "main").text
    assert len(page.find_elements("css selector", ".curves svg[role=img] path")) == 2
    page.find_element("css selector", ".predictions .more").click()
    assert len(page.find_elements("css selector", ".predictions tbody tr")) > 100
    assert complaints(page) == []


def test_twenty_thousand_slides_are_one_page_whose_pictures_wait(
    run: Path, page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, count = tmp_path / "out", 20_000
    names = [f"slide-{number:05d}" for number in range(count)]
    for stage in ("tiles", "features_tiny", "slides_tinynet__tiny"):
        (out / stage).mkdir(parents=True)

    def statuses(folder: Path) -> dict[str, Status]:
        one = read_status(run / folder.name, PLANTED)
        assert one is not None
        return {name: dataclasses.replace(one, slide_id=name) for name in names}

    points = np.random.default_rng(0).standard_normal((count, 2))
    projection = Projection("slides_tinynet__tiny", "default", "PCA", ("1", "2"), tuple(names), points, True)
    whole = run / "report_files" / PLANTED
    maps = [path for path in whole.iterdir() if path.name.startswith("map_")]
    record = json.loads((whole / "pictures.json").read_text())["pictures"]

    def link(folder: Path, *_: object, **__: object) -> dict[str, Any]:
        if folder.name in {*names[:300], *names[-300:]}:  # the others are not looked at
            folder.mkdir(parents=True)
            for picture in [*whole.glob("*.jpg"), *whole.glob("*.png")]:
                os.link(picture, folder / picture.name)
        return dict(record)

    layers = [{"title": "map", "file": path.name, **dict.fromkeys("xywh", 1), "pixels": [9, 9]} for path in maps]
    facts = {
        "stale": "",
        "cohort": "",
        "legend": {"label": "k-means cluster"},
        "facts": {"model": "tile embeddings of tiny", "trained": True},
    }
    monkeypatch.setattr("gigapath.report.collecting.read_statuses", statuses)
    monkeypatch.setattr("gigapath.report.write.project_folder", lambda *_: projection)
    monkeypatch.setattr("gigapath.report.write.write_pictures", link)
    monkeypatch.setattr("gigapath.report.write.write_maps", lambda *_: [{**layer, **facts} for layer in layers])
    report = write_report(out)
    assert report.slides == count
    assert report.page.stat().st_size < 25e6
    page.get(report.page.as_uri())
    assert len(wait_for(page, IDS)) == 200
    assert page.execute_script(f"return {EAGER}") == 0
    page.execute_script("document.querySelector('.slides tbody tr:nth-child(100)').scrollIntoView()")
    wait_for(page, "document.querySelectorAll('.slides img[src]').length > 3")
    page.execute_script("document.querySelector('.slides tbody tr:nth-child(100)').scrollIntoView()")
    asked = page.execute_script("return document.querySelectorAll('.slides img[src]').length")
    assert asked <= 40
    assert page.execute_script("return document.querySelectorAll('.point').length") == count
    page.find_element("css selector", ".slides .more").click()
    assert len(page.execute_script(f"return {IDS}")) == 1200
    page.execute_script("document.querySelector('.slides th button').focus()")
    keys(page, "\ue007")  # the other way round
    assert page.execute_script(f"return {IDS}")[0] == names[-1]
    page.execute_script("document.querySelector('input[type=search]').focus()")
    keys(page, names[-1])
    assert page.execute_script(f"return {IDS}") == [names[-1]]
    page.execute_script("document.querySelector('.slides tbody .link').focus()")
    keys(page, "\ue007")
    wait_for(page, DRAWN)
    keys(page, "\ue00c")
    wait_for(page, "!document.getElementById('slide').open")
    assert complaints(page) == []
