"""The notebooks in demo/ and docs/tutorials/: run top to bottom, their outputs made small and the same in every run.

    python scripts/notebooks.py [NAME ...]    runs them on the demo slide with the stand-in, and writes their outputs

They run in a copy of the checkout's layout, so that nothing of an earlier run helps.
"""

import base64
import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "demo"
TUTORIALS = ROOT / "docs" / "tutorials"
SLIDE = "CMU-1-Small-Region.svs"
SECONDS = 300  # a cell
PICTURE_WIDTH = 900
FEW_COLOURS = 40_000  # bytes: a larger PNG is a photograph


def notebooks() -> list[Path]:
    """Those that are shipped."""
    return sorted([*DEMO.glob("*.ipynb"), *TUTORIALS.glob("*.ipynb")])


def lay_out(folder: Path, slide: Path | None) -> None:
    """A checkout for the notebooks: their folders, and the slide in data/ where there is one."""
    for shipped in (DEMO, TUTORIALS):
        ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        shutil.copytree(shipped, folder / shipped.relative_to(ROOT), ignore=ignored)
    (folder / "data").mkdir()
    if slide is not None:
        shutil.copyfile(slide, folder / "data" / SLIDE)


def environment(folder: Path) -> dict[str, str]:
    """Of a child that finds this checkout's package, no network, no token and no released weights."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE_"))}
    inherited = os.environ.get("PYTHONPATH")
    return {
        **kept,
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([inherited] if inherited else [])]),
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder / "hf"),
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    }


def client_of(notebook: nbformat.NotebookNode, folder: Path) -> NotebookClient:
    """Runs it in `folder` with the interpreter that runs this, whatever somebody's Jupyter calls python3."""
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.km = client.create_kernel_manager()
    client.km.kernel_spec_manager.kernel_dirs = []  # so that ipykernel's own is left
    return client


def executed(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook, all cells run in the copy of its folder that lies in `folder`; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    client_of(notebook, folder / path.parent.relative_to(ROOT)).execute(env=environment(folder))
    return notebook


def cleaned(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it is committed: pictures small, streams joined, ids in order, versions and paths left out."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {}
        if cell.cell_type == "code":
            cell.outputs = joined([output for output in cell.outputs if output.get("name") != "stderr"])  # warnings
        for output in cell.get("outputs", ()):
            if output.output_type in ("display_data", "execute_result"):
                output.metadata = {}
                png = output.data.pop("image/png", None)
                if png is not None:
                    kind, content = small_picture(base64.b64decode(png))
                    output.data[kind] = base64.b64encode(content).decode()
    return notebook


def joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """`outputs` with neighbouring pieces of one stream as one: where they were cut depends on the time they took."""
    whole: list[nbformat.NotebookNode] = []
    for output in outputs:
        if whole and output.output_type == "stream" and whole[-1].get("name") == output.name:
            whole[-1].text += output.text
        else:
            whole.append(output)
    return whole


def small_picture(png: bytes) -> tuple[str, bytes]:
    """A picture's MIME type and bytes: drawings as PNG with few colours, photographs as JPEG."""
    image = Image.open(io.BytesIO(png)).convert("RGB")
    if image.width > PICTURE_WIDTH:
        image = image.resize(
            (PICTURE_WIDTH, round(image.height * PICTURE_WIDTH / image.width)), Image.Resampling.LANCZOS
        )
    drawing, photograph = io.BytesIO(), io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(drawing, "PNG", optimize=True)
    if drawing.tell() <= FEW_COLOURS:
        return "image/png", drawing.getvalue()
    image.save(photograph, "JPEG", quality=72, optimize=True)
    return "image/jpeg", photograph.getvalue()


def main(names: list[str]) -> None:
    """Run the named notebooks, or all, and write them with their outputs."""
    slide = ROOT / "data" / SLIDE
    if not slide.exists():
        raise SystemExit("The outputs are those of the demo slide: first run `gigapath download demo-slide`.")
    for path in notebooks():
        if names and path.name not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            lay_out(Path(folder), slide)
            notebook = cleaned(executed(path, Path(folder)))
        nbformat.validate(notebook)
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
