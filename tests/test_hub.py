"""Downloads against a server of the test's own: checked, whole or absent, one sentence when they fail."""

import dataclasses
import hashlib
import http.server
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import huggingface_hub.utils
import pytest

from gigapath import hub
from gigapath.cli.main import main
from gigapath.files import OutputError, digest_of
from gigapath.hub import download, hub_error, hub_file
from gigapath.releases import DOWNLOADS, RELEASES, SLIDE_FILE, TILE_FILE, Download, RemoteFile

CONTENT = bytes(range(256)) * 5000  # 1.28 MB: several blocks
DIGEST = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@dataclass
class Site:
    """What the server does; tests change it."""

    address: str = ""
    content: bytes = CONTENT
    statuses: list[int] = field(default_factory=list)  # given to the first requests, in order
    breaks: list[int] = field(default_factory=list)  # bytes after which the first answers break off
    asked: list[str] = field(default_factory=list)  # path of each request


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append(self.path)
            if self.path == "/moved":
                self.send_response(302)
                self.send_header("Location", "/file")
                self.end_headers()
                return
            status = site.statuses.pop(0) if site.statuses else 200
            if status != 200:
                self.send_error(status)
                return
            body = site.content
            self.send_response(200)
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


def one_file(site: Site, monkeypatch: pytest.MonkeyPatch, *, path: str = "/file", digest: str = DIGEST) -> str:
    """A download of one file of the test's server."""
    made = Download("made for the test", (RemoteFile("out/a.bin", f"{site.address}{path}", digest=digest),))
    monkeypatch.setitem(DOWNLOADS, "one", made)
    return "one"


@pytest.mark.parametrize("kind", ["sha256", "git", "md5"])
@pytest.mark.parametrize("path", ["/file", "/moved"])
def test_a_file_is_checked_by_each_kind_of_digest(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, path: str
) -> None:
    (tmp_path / "known").write_bytes(CONTENT)
    digest = digest_of(tmp_path / "known", kind)
    (file,) = download(one_file(site, monkeypatch, path=path, digest=digest), tmp_path / "to")
    assert file.path.read_bytes() == CONTENT and file.digest == digest
    assert files_in(tmp_path / "to") == ["out/a.bin"]


@pytest.mark.parametrize("fault", ["another content", "breaks off"])
def test_a_file_that_is_not_the_recorded_one_leaves_nothing(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    if fault == "breaks off":
        site.breaks = [300_000]
    else:
        site.content = b"another"
    with pytest.raises((ValueError, ConnectionError), match=r"a\.bin"):
        download(one_file(site, monkeypatch), tmp_path)
    assert files_in(tmp_path) == []


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (401, PermissionError),
        (403, PermissionError),
        (404, FileNotFoundError),
        (410, FileNotFoundError),
        (429, ConnectionError),
        (500, ConnectionError),
        (503, ConnectionError),
    ],
)
def test_a_server_that_refuses_is_named_with_its_answer(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, error: type[Exception]
) -> None:
    site.statuses = [status]
    with pytest.raises(error, match=rf"a\.bin.*127\.0\.0\.1.*\({status}") as caught:
        download(one_file(site, monkeypatch), tmp_path)
    assert "reached" not in str(caught.value) and files_in(tmp_path) == [] and len(site.asked) == 1


def test_without_network_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConnectionError, match=r"a\.bin"):
        download(one_file(Site("http://127.0.0.1:1"), monkeypatch), tmp_path)
    assert files_in(tmp_path) == []


def test_a_folder_that_can_not_be_made_is_one_sentence(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match="a file of that name"):
        download(one_file(site, monkeypatch), tmp_path)
    assert site.asked == []


# ----------------------------------------------------------------------------------------------------- the table


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
        RemoteFile("tables/a.bin", f"{site.address}/file", digest=DIGEST),
        RemoteFile("b.bin", "http://127.0.0.1:1/b", digest=DIGEST, optional=True),
    )
    monkeypatch.setitem(DOWNLOADS, "panda", dataclasses.replace(DOWNLOADS["panda"], files=files, note="Now unzip it."))
    return "panda"


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
    assert main(["download", "no-such-name"]) == 2
    with pytest.raises(ValueError, match="demo-slide"):
        download("no-such-name")


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
    assert len(calls) == 2  # a file that is not the recorded one is fetched anew once


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


def test_git_digest_is_gits_own(tmp_path: Path) -> None:
    file = tmp_path / "a"
    for content, known in (
        (b"hello\n", "ce013625030ba8dba906f756967f9e9ca394464a"),
        (b"what is up, doc?", "bd9dbf5aae1a3862dd1526723246b20206e5fc37"),  # the example of git's own book
        (b"", "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"),
    ):
        file.write_bytes(content)
        assert digest_of(file, "git") == f"git:{known}"


def test_a_file_of_the_hub_that_was_altered_on_the_disk_is_fetched_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = RELEASES["gigapath"]
    made = replace(release, tile_sha256=hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setitem(RELEASES, "gigapath", made)
    contents = [b"cut short", CONTENT]
    calls: list[str] = []

    def hf_hub_download(repo_id: str, filename: str, local_dir: Any = None, **_: Any) -> str:
        calls.append(filename)
        path = Path(local_dir) / filename
        path.write_bytes(contents.pop(0))
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)
    path = hub_file(f"hf_hub:{release.repo}", "pytorch_model.bin", local_dir=tmp_path, strict=True)
    assert path.read_bytes() == CONTENT and len(calls) == 2


@pytest.mark.parametrize(
    ("status", "headers", "error", "words"),
    [
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, PermissionError, "token"),
        (403, {}, PermissionError, "access"),
        (404, {}, FileNotFoundError, "404"),
        (429, {}, ConnectionError, "429"),
        (500, {}, ConnectionError, "500"),
        (503, {}, ConnectionError, "503"),
    ],
)
def test_what_the_hub_answered_is_told_though_its_client_wraps_it(
    status: int, headers: dict[str, str], error: type[Exception], words: str
) -> None:
    answer = types.SimpleNamespace(status_code=status, headers=headers)
    wrapped = huggingface_hub.utils.LocalEntryNotFoundError("An error happened while trying to locate the file")
    cause = RuntimeError("of the hub's client")
    cause.response = answer  # type: ignore[attr-defined]
    wrapped.__cause__ = cause
    told = hub_error(wrapped, "somebody/model", "weights.bin", Path("cache"))
    assert isinstance(told, error) and words in str(told) and "reached" not in str(told)


@pytest.mark.parametrize(
    ("file", "ways"),
    [(TILE_FILE, ["--tile-encoder standin"]), (SLIDE_FILE, ["--random-weights", "mean", "finetune: --pretrained ''"])],
)
def test_weights_that_are_not_to_be_had_name_what_works_without_them(file: str, ways: list[str]) -> None:
    told = str(hub_error(ConnectionError("no network"), RELEASES["gigapath"].repo, file, Path("cache")))
    assert all(way in told for way in ways)


def test_a_hub_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        threading.Event().wait(60)

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", silent)
    monkeypatch.setattr(hub, "_SILENT_SECONDS", -0.9)
    with pytest.raises(ConnectionError, match="did not answer"):
        hub_file("hf_hub:somebody/model", "weights.bin", local_dir=tmp_path)
