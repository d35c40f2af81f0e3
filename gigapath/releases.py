"""The released models and everything else that is fetched: names, addresses, revisions, sizes, digests.

Sizes and digests are recorded facts; where none is known the entry says None and nothing is made up.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RemoteFile:
    """One file of a download: its path under the folder that the user names; its source, `https://...` or
    `hf_hub:REPO[@REVISION]` (a dataset's REPO starts with `datasets/`; the file's name there is the last part of
    `file`); bytes; `sha256:...`, `git:...` (a git blob id) or `md5:...`; None where not known. The download goes on
    without an optional one."""

    file: str
    source: str
    size: int | None = None
    digest: str | None = None
    optional: bool = False


@dataclass(frozen=True)
class Release:
    """A released pair of encoders: its repository, pinned revision, files and architectures."""

    name: str
    repo: str
    revision: str
    tile_sha256: str
    slide_sha256: str
    tile_arch: str
    slide_arch: str
    tile_dim: int

    @property
    def tile_file(self) -> RemoteFile:
        """The tile encoder's checkpoint."""
        return self._file(TILE_FILE, self.tile_sha256)

    @property
    def slide_file(self) -> RemoteFile:
        """The slide encoder's checkpoint."""
        return self._file(SLIDE_FILE, self.slide_sha256)

    def _file(self, file: str, sha256: str) -> RemoteFile:
        return RemoteFile(file, f"hf_hub:{self.repo}@{self.revision}", digest=f"sha256:{sha256}")


@dataclass(frozen=True)
class Download:
    """What `gigapath download NAME` fetches, and what to say about it."""

    about: str
    files: tuple[RemoteFile, ...]
    note: str = ""


HUB_PREFIXES = ("hf_hub:", "hf-hub:")  # of names of repositories
TILE_FILE = "pytorch_model.bin"
SLIDE_FILE = "slide_encoder.pth"

RELEASES = {
    "gigapath": Release(
        name="gigapath",
        repo="prov-gigapath/prov-gigapath",
        revision="eba85dd46097c3eedfcc2a3a9a930baecb6bcc19",
        tile_sha256="877947214318afa9e011754b74bbc3894a1f480a253afc7bc8045b8321dedd63",
        slide_sha256="04194a4c393e6a713b144356791c0d2e27ca769ee50c6e111fd6abc1f17ed551",
        tile_arch="gigapath_tile_enc_vitg",
        slide_arch="gigapath_slide_enc12l768d",
        tile_dim=1536,
    ),
    "gigapath-flash": Release(
        name="gigapath-flash",
        repo="prov-gigapath/prov-gigapath-flash",
        revision="f5c3a709ad81d3a5605bb2eb38cd5c2e53da0375",
        tile_sha256="ea5e36c2b3593b073868f91b9016559a620f0d6752e3861cb2bb0b5312238473",
        slide_sha256="1539cdcb0dae4628ccdcee9910991d541a254c1647aec0a0225a20257b590cba",
        tile_arch="gigapath_tile_enc_dinov2s",
        slide_arch="gigapath_slide_enc12l384d",
        tile_dim=384,
    ),
}


# How other tools call the released tile encoders in their files, in small letters and without separators.
_RELEASE_BY_WORD = {
    **dict.fromkeys(("gigapath", "provgigapath", "hfhub:provgigapath/provgigapath"), "gigapath"),
    **dict.fromkeys(("gigapathflash", "provgigapathflash", "hfhub:provgigapath/provgigapathflash"), "gigapath-flash"),
}


def release_of(tile_encoder: str) -> str:
    """Our name of the released tile encoder that a file names, however its tool writes it; another name stays."""
    return _RELEASE_BY_WORD.get(re.sub(r"[-_ ]", "", tile_encoder.lower()), tile_encoder)


def check_encoder(kind: str, name: str) -> None:
    """Refuse the name of a `kind` ("tile" or "slide") encoder that is neither known nor the path of a checkpoint.

    Raises:
        ValueError: lists the names.
    """
    others = ("standin", "timm:NAME") if kind == "tile" else ("mean", "none")
    prefixes = HUB_PREFIXES if kind == "slide" else (*HUB_PREFIXES, "timm:")
    if name not in (*RELEASES, *others) and not name.startswith(prefixes) and not Path(name).expanduser().exists():
        known = ", ".join([*RELEASES, *others])
        raise ValueError(
            f"--{kind}-encoder: expected {known} or the path of a checkpoint, got {name!r}. Check the name or the path."
        )


def _published(path: str, blob: str, size: int | None = None) -> RemoteFile:
    """A file of the published code repository, at the pinned revision and under the path it has there."""
    address = "https://raw.githubusercontent.com/prov-gigapath/prov-gigapath/09d8e876afb98a1dda01cc531b1087c58fffc9f7"
    return RemoteFile(path, f"{address}/{path}", size=size, digest=f"git:{blob}")


def _pcam_meta(split: str, md5: str) -> RemoteFile:
    """PCam's own table of the slide that each tile was cut from."""
    file = f"camelyonpatch_level_2_split_{split}_meta.csv"
    address = f"https://zenodo.org/records/2546921/files/{file}"
    return RemoteFile(f"pcam/{file}", address, digest=f"md5:{md5}", optional=True)


_EMBEDDINGS = "hf_hub:datasets/prov-gigapath/prov-gigapath-tile-embeddings"

DOWNLOADS = {
    **{
        release.name: Download(
            about=f"the released pair {release.repo} (tile and slide encoder; gated)",
            files=(release.tile_file, release.slide_file),
            note="The weights' terms are their authors': research only, see the model card.",
        )
        for release in RELEASES.values()
    },
    "demo-slide": Download(
        about="CMU-1-Small-Region.svs, an H&E slide of 1.9 MB (CC0, OpenSlide test data)",
        files=(
            RemoteFile(
                "CMU-1-Small-Region.svs",
                "https://openslide.cs.cmu.edu/download/openslide-testdata/Aperio/CMU-1-Small-Region.svs",
                size=1938955,
                digest="sha256:ed92d5a9f2e86df67640d6f92ce3e231419ce127131697fbbce42ad5e002c8a7",
            ),
        ),
    ),
    "demo-tile": Download(
        about="a tile of the published repository and the released tile encoder's output for it (Apache-2.0)",
        files=(
            _published("images/prov_normal_000_1.png", "ea8dbdd2960b1cc2944f52701827f21a1d232334", 35892),
            _published("images/prov_normal_000_1.pt", "2d26fb18abdd5bba95d86faa16b784bf8912c835", 1211145),
        ),
    ),
    "pcam": Download(
        about="PCam: the published tile embeddings (about 2 GB), labels, and PCam's table of slides",
        files=(
            _published("dataset_csv/pcam/pcam.csv", "9f7990809c79c77580baca6db03a0c4c0c6f3d83"),
            RemoteFile("GigaPath_PCam_embeddings.zip", _EMBEDDINGS),
            _pcam_meta("train", "5a3dd671e465cfd74b5b822125e65b0a"),
            _pcam_meta("valid", "67589e00a4a37ec317f2d1932c7502ca"),
            _pcam_meta("test", "3455fd69135b66734e1008f3af684566"),
        ),
    ),
    "panda": Download(
        about="PANDA: the published labels and split",
        files=(
            _published("dataset_csv/PANDA/PANDA.csv", "a51c36a4318ee53b578276e8ea7d1b06a739eef5", 425864),
            _published("dataset_csv/PANDA/train_0.csv", "699eebd63231c6859369dfdff99f8bf5aadd28b9", 340838),
            _published("dataset_csv/PANDA/val_0.csv", "471948bef3bd1a951c75ee1125cbf6e1620dbd24", 42542),
            _published("dataset_csv/PANDA/test_0.csv", "5917eb56d17998aaf6a74e1c85591a53413720b7", 42542),
        ),
        note="The embeddings are GigaPath_PANDA_embeddings.zip (about 32 GB) in the hub's dataset "
        "prov-gigapath/prov-gigapath-tile-embeddings: `gigapath download panda-embeddings`, then unzip it.",
    ),
    "panda-embeddings": Download(
        about="PANDA: the published tile embeddings (about 32 GB, one h5 a slide in a zip)",
        files=(RemoteFile("GigaPath_PANDA_embeddings.zip", _EMBEDDINGS),),
        note="Unzip it: `unzip -n GigaPath_PANDA_embeddings.zip`.",
    ),
    "mutation": Download(
        about="LUAD 5-gene mutations, TCGA: the published labels",
        files=(_published("dataset_csv/mutation/LUAD-5-gene_TCGA.csv", "e69ee45b1aae77593a26e91c7e57456458507abe"),),
    ),
}
