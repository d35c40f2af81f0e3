"""What a report can be told."""

from dataclasses import dataclass

from gigapath.features import parse_embedding
from gigapath.options import Options, option

MAX_IN_ONE_FILE = 20  # slides
SIDE, SIDE_IN_ONE_FILE = 4096, 2048


@dataclass(frozen=True)
class ReportOptions(Options):
    """How the report is made."""

    single_file: bool = option(False, f"all pictures inside report.html, for up to {MAX_IN_ONE_FILE} slides")
    title: str = option("gigapath report", "what stands at the head of the page", metavar="TEXT")
    side: int | None = option(
        None,
        f"the longer side of a slide's largest picture, in pixels (default: {SIDE}; {SIDE_IN_ONE_FILE} with "
        "--single-file)",
        at_least=256,
        at_most=8192,
    )
    embedding: str | None = option(
        None,
        "the slide embedding that is drawn (default: default, or tile-mean without a slide encoder)",
        metavar="NAME",
    )
    projection: str = option(
        "auto",
        "how slides are laid out in two dimensions; auto is UMAP where installed, else t-SNE, and PCA for fewer than "
        "20 slides or more than 5,000",
        choices=("auto", "umap", "tsne", "pca"),
    )
    overwrite: bool = option(False, "write over a page that was made from other folders")
    workers: int | None = option(None, "threads that read slides (default: one per core)", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.embedding is not None and parse_embedding(self.embedding).pooling == "tiles":
            raise ValueError(f"--embedding: expected one vector a slide, got {self.embedding!r}.")

    @property
    def picture_side(self) -> int:
        """The longer side of a slide's largest picture, in pixels."""
        return self.side or (SIDE_IN_ONE_FILE if self.single_file else SIDE)
