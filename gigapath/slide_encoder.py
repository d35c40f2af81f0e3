"""The slide encoder: tile embeddings and their coordinates to the embedding of a slide.

Legend: B slides, L tiles of a slide, T tiles of all slides, D width of the encoder. Coordinates are (x, y) in pixels,
`tile_size` of which make a cell of the `slide_ngrids` x `slide_ngrids` grid.

Importing this module registers the architectures with timm.
"""

import inspect
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import timm
import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from timm.models import is_model, register_model
from torch import Tensor, nn

from gigapath.longnet.config import LongNetConfig, optimal_segment_lengths, parse_lengths
from gigapath.longnet.encoder import LongNetEncoder
from gigapath.longnet.linear import Linear
from gigapath.pos_embed import LazyPosEmbed, cells_of, checked_coords
from gigapath.releases import RELEASES
from gigapath.weights import assign_weights, find_weights, load_state_dict, tell_architecture

__all__ = ["Embeddings", "LongNetViT", "create_model"]  # timm adds the architectures


def __dir__() -> list[str]:
    """Tab completion shows the public names alone."""
    return __all__


ARCHITECTURES = (
    "gigapath_slide_enc12l768d",
    "gigapath_slide_enc24l1024d",
    "gigapath_slide_enc12l1536d",
    "gigapath_slide_enc12l384d",
)
WEIGHTS_FILE = "slide_encoder.pth"
_SIZES = re.compile(r"gigapath_slide_enc([1-9][0-9]*)l([1-9][0-9]*)d")
CONFIG_FILE = "slide_encoder.json"  # config.json beside it is timm's, of the tile encoder

# What timm hands to every model of its registry, and what means nothing here.
_FROM_TIMM = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained_model_args"}
# Options besides the published ones.
_OURS = {"mlp_ratio", "checkpoint_activations", "linear_precision"}
_HUB_OPTIONS = ("token", "force_download", "local_files_only")
_CONFIG = {
    *("in_chans", "embed_dim", "depth", "slide_ngrids", "global_pool", "tile_size", "norm_eps", "mlp_ratio", "dropout"),
    *("drop_path_rate", "segment_lengths", "segments_of"),
}
_AUTOCAST_TAKES = (torch.float32, torch.float16, torch.bfloat16)

Pool = Callable[..., Tensor]  # (tokens, lengths) -> embeddings


class Embeddings(list[Tensor]):
    """The (B, D) embeddings of a call: one, or one per state."""

    def squeeze(self) -> Tensor:
        """The one embedding, or all states stacked, without dimensions of size 1."""
        return (self[0] if len(self) == 1 else torch.stack(list(self))).squeeze()


class PatchEmbed(nn.Module):
    """The projection of tile embeddings to the width of the encoder."""

    def __init__(self, in_chans: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = Linear(in_chans, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_chans) to (..., D)."""
        out: Tensor = self.proj(x)
        return out


class LongNetViT(nn.Module, PyTorchModelHubMixin, library_name="gigapath"):
    """LongNet over the tiles of a slide, with fixed 2-D positions and a class token.

    `save_pretrained` and `push_to_hub` write `slide_encoder.pth`, which `create_model` and other tools read, and
    `slide_encoder.json`, from which `from_pretrained` builds the model; it also reads the released repositories.
    """

    def __init__(
        self,
        in_chans: int = 1536,
        embed_dim: int = 256,
        depth: int = 12,
        slide_ngrids: int = 1000,
        tile_size: int = 256,
        max_wsi_size: int = 262144,
        norm_layer: Callable[[int], nn.Module] = nn.LayerNorm,
        global_pool: bool = False,
        dropout: float = 0.25,
        drop_path_rate: float = 0.1,
        **kwargs: Any,
    ) -> None:
        """Build the encoder with random weights.

        Args:
            in_chans: width of the tile embeddings.
            embed_dim: D.
            depth: number of layers.
            slide_ngrids: cells of a side of the position grid.
            tile_size: pixels of a cell's side, in the unit of the coordinates; may be assigned later.
            max_wsi_size: pixels of the largest slide's side; the segment lengths derive from it.
            norm_layer: makes the last norm from a width.
            global_pool: True for the mean over the tiles, False for the class token.
            dropout: rate after the embedding, the attention and the feed-forward network.
            drop_path_rate: rate of the last layer.
            kwargs: `mlp_ratio` (4, at width 512 with its 8 heads 2; all others have 16 heads),
                `checkpoint_activations` (False), `linear_precision` ("fp32", see
                `LongNetEncoder.set_linear_precision`); what is unknown is ignored with one warning.
        """
        super().__init__()
        self._hub_mixin_config = None  # what the mixin gathers of the arguments; `config` says it
        unknown = sorted(set(kwargs) - _OURS - _FROM_TIMM)
        if unknown:
            _warn_ignored(unknown)
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.depth = depth
        self.slide_ngrids = slide_ngrids
        self.tile_size: Any = tile_size
        self._segments_of = {"max_wsi_size": int(max_wsi_size), "tile_size": int(tile_size)}
        self.global_pool = global_pool
        self.encoder_name = f"LongNet_{depth}_layers_{embed_dim}_dim"
        heads, ffn_ratio = (8, 2) if embed_dim == 512 else (16, 4)  # as published
        segments = parse_lengths(self.get_optimal_segment_length(max_wsi_size, tile_size))

        self.patch_embed = PatchEmbed(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = LazyPosEmbed(embed_dim, slide_ngrids)
        self.encoder = LongNetEncoder(
            LongNetConfig(
                embed_dim=embed_dim,
                depth=depth,
                num_heads=heads,
                ffn_ratio=int(kwargs.get("mlp_ratio") or ffn_ratio),
                segment_lengths=segments,
                dilations=tuple(2**i for i in range(len(segments))),
                dropout=dropout,
                drop_path_rate=drop_path_rate,
            )
        )
        self.encoder.checkpoint_activations = bool(kwargs.get("checkpoint_activations"))
        self.encoder.set_linear_precision(kwargs.get("linear_precision") or "fp32")
        self.norm = norm_layer(embed_dim)
        nn.init.normal_(self.cls_token, std=0.02)

    @property
    def config(self) -> dict[str, Any]:
        """What the model is built from, as `slide_encoder.json` holds it; ValueError for a norm of another kind."""
        if type(self.norm) is not nn.LayerNorm:
            raise ValueError(
                f"LongNetViT: expected nn.LayerNorm as the last norm, got {type(self.norm).__name__}, which "
                f"{CONFIG_FILE} can't say. Save the state dict instead."
            )
        encoder = self.encoder.config
        return {
            **{name: getattr(self, name) for name in ("in_chans", "embed_dim", "depth", "slide_ngrids", "global_pool")},
            "tile_size": float(self.tile_size),
            "norm_eps": self.norm.eps,
            "mlp_ratio": encoder.ffn_ratio,
            "dropout": encoder.dropout,
            "drop_path_rate": encoder.drop_path_rate,
            "segment_lengths": list(encoder.segment_lengths),
            "segments_of": self._segments_of,
        }

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> str | None:
        """Write the weights, what the model is built from, and a model card into a folder.

        Args:
            save_directory: a folder, made where it is not there.
            kwargs: `push_to_hub=True` with `repo_id`, and what the mixin of huggingface_hub takes besides.

        Raises:
            ValueError: the folder holds a config.json, such as a tile encoder's: the mixin would remove it.
        """
        if (Path(save_directory) / "config.json").exists():
            raise ValueError(
                f"save_pretrained: expected a folder without config.json, got {str(save_directory)!r}, which holds "
                "another model. Choose a folder of its own."
            )
        return super().save_pretrained(save_directory, **kwargs)

    def _save_pretrained(self, save_directory: Path) -> None:
        from gigapath.files import write_bytes_atomic, write_json_atomic  # where a model is saved

        state = {name: tensor.cpu() for name, tensor in self.state_dict().items()}
        buffer = io.BytesIO()
        torch.save({"model": state}, buffer)
        write_bytes_atomic(save_directory / WEIGHTS_FILE, buffer.getvalue())
        write_json_atomic(save_directory / CONFIG_FILE, self.config)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        **model_kwargs: Any,
    ) -> Self:
        """Load a model that `save_pretrained` or `push_to_hub` wrote, or a released one, in eval mode.

        Args:
            pretrained_model_name_or_path: a repository of the hub, the name of a release, or a folder.
            revision: branch, tag or commit; of the released repositories by default the pinned one.
            cache_dir: another folder for the hub's cache.
            token: of the hub, where HF_TOKEN is not the one.
            force_download: fetch again what the cache has.
            local_files_only: take what the cache has.
            model_kwargs: options of the constructor over the stored ones, such as `global_pool=True`.

        Raises:
            FileNotFoundError, PermissionError, ConnectionError: the weights are not to be had (never random ones).
            ValueError: weights that lack entries, or have others or other shapes than the model; a checkpoint
                without `slide_encoder.json` of no released architecture.
        """
        # Not the mixin's: it takes config.json, here that of timm's tile encoder, for arguments of this model.
        return cls._from_pretrained(
            model_id=str(pretrained_model_name_or_path),
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
            **model_kwargs,
        )

    @classmethod
    def _from_pretrained(
        cls, *, model_id: str, revision: str | None, cache_dir: str | Path | None, **kwargs: Any
    ) -> Self:
        hub = {name: value for name in _HUB_OPTIONS if (value := kwargs.pop(name, None))}
        path, stored = _pretrained_files(model_id, revision, cache_dir, hub)
        state = load_state_dict(path)
        config = _released_config(state, path) if stored is None else _read_config(stored)
        lengths, segments_of = config.pop("segment_lengths", None), config.pop("segments_of", {})
        tile_size = config.pop("tile_size", 256)
        norm_layer = partial(nn.LayerNorm, eps=config.pop("norm_eps", 1e-6))
        with torch.device("meta"):  # nothing is initialised that the checkpoint replaces
            model = cls(**{"norm_layer": norm_layer, **config, **segments_of, **kwargs})
        made = list(model.encoder.config.segment_lengths)
        if lengths not in (None, made) and not {"max_wsi_size", "tile_size"} & kwargs.keys():
            raise ValueError(
                f"{model_id}: expected the segments {lengths}, got {made}. It was saved from a model whose "
                "get_optimal_segment_length is another: replace it here in the same way."
            )
        model.tile_size = kwargs.get("tile_size", tile_size)
        unexpected = sorted(set(state) - set(model.state_dict()))
        if unexpected:
            raise ValueError(
                f"{model_id}: expected the entries of this model alone, got {len(unexpected)} more, such as "
                f"{unexpected[0]}. The weights belong to another model."
            )
        assign_weights(model_id, model, state)
        return model.eval()

    def get_optimal_segment_length(self, max_wsi_size: int = 262144, tile_size: int = 256) -> str:
        """The segment lengths as text, such as "[1024, 5792, 32768, 185363, 1048576]"; callers may replace it."""
        return str(list(optimal_segment_lengths(max_wsi_size, tile_size)))

    def coords_to_pos(self, coords: Tensor, tile_size: Any = 256) -> Tensor:
        """Rows of the position table (...,) int64 for pixel coordinates (..., 2), as (x, y)."""
        cells = cells_of(coords, float(tile_size)).long()
        return (cells[..., 0] * self.slide_ngrids + cells[..., 1] + 1).to(coords.device)

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: all of one dimension."""
        return {name for name, parameter in self.named_parameters() if parameter.ndim == 1}

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Register a buffer; one called `pos_embed` takes the place of the table, as it would of the published one."""
        if name == "pos_embed":
            self.__dict__.pop(name, None)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "LongNetViT":
        """Move or convert the model, the table of positions with it, as if that were a buffer."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._place_positions()
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        """Load; `load_state_dict(..., assign=True)` changes device and dtype without `_apply`."""
        super()._load_from_state_dict(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._place_positions()

    def _place_positions(self) -> None:
        if isinstance(self.pos_embed, LazyPosEmbed):
            self.pos_embed.device, self.pos_embed.dtype = self.cls_token.device, self.cls_token.dtype

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep one activation per layer in training and compute the others again in the backward pass."""
        self.encoder.checkpoint_activations = enable

    def forward(
        self, x: Tensor, coords: Tensor, all_layer_embed: bool = False, *, valid_mask: Tensor | None = None
    ) -> Embeddings:
        """Embed slides.

        Args:
            x: tile embeddings (B, L, in_chans), or (L, in_chans) for one slide.
            coords: (B, L, 2) or (L, 2), (x, y) in pixels of which `tile_size` make a cell; further columns count
                nothing.
            all_layer_embed: True for the depth + 1 states (without `encoder.layer_norm`), state 0 being the input.
            valid_mask: (B, L) bool, True = real tile; whatever stands elsewhere changes nothing and costs nothing.

        Returns:
            A list of one (B, D) tensor, or of depth + 1.
        """
        _refuse_arrays(x=x, coords=coords, valid_mask=valid_mask)
        x, coords = x if x.ndim != 2 else x[None], coords if coords.ndim != 2 else coords[None]
        if coords.ndim == 3 and coords.shape[0] == 1 != x.shape[0]:
            coords = coords.expand(x.shape[0], -1, -1)
        coords = coords[..., :2]
        self._check(x, coords)
        if valid_mask is None:
            return self._embed(x, coords, (x.shape[1] + 1,) * x.shape[0], all_layer_embed)
        valid = valid_mask if valid_mask.ndim != 1 else valid_mask[None]
        if valid.shape != x.shape[:2]:
            raise ValueError(
                f"slide encoder: expected valid_mask {tuple(x.shape[:2])}, got {tuple(valid.shape)}. "
                "Give one True or False per tile."
            )
        valid = valid.to(device=x.device, dtype=torch.bool)
        lengths = valid.sum(1).tolist()
        return self.forward_packed(x[valid], coords[valid.to(coords.device)], lengths, all_layer_embed)

    def forward_packed(
        self,
        x: Tensor,
        coords: Tensor,
        lengths: Sequence[int] | Tensor,
        all_layer_embed: bool = False,
        *,
        pool: Pool | None = None,
    ) -> Embeddings:
        """Embed slides of several lengths, given one after another; see `forward`.

        Args:
            x: tile embeddings of all slides (T, in_chans).
            coords: (T, 2).
            lengths: tiles of each slide, T in all, none empty.
            all_layer_embed: as in `forward`.
            pool: makes embeddings from tokens (1, T + B, D) and the tokens of each slide (its class token first)
                instead of the model's own pooling.
        """
        _refuse_arrays(x=x, coords=coords)
        coords = coords[..., :2]
        tiles = tuple(int(length) for length in lengths)
        self._check(x[None], coords[None])
        if min(tiles, default=0) < 1 or sum(tiles) != x.shape[0]:
            raise ValueError(
                f"slide encoder: expected lengths of at least 1 that add up to {x.shape[0]} tiles, got {tiles}. "
                "Leave empty slides out."
            )
        return self._embed(x[None], coords[None], tuple(length + 1 for length in tiles), all_layer_embed, pool)

    def _check(self, x: Tensor, coords: Tensor) -> None:
        """Raise ValueError unless x is (B, L, in_chans) and coords (B, L, 2), L at least 1."""
        if x.ndim != 3 or x.shape[-1] != self.in_chans:
            raise ValueError(
                f"slide encoder: expected tile embeddings (B, L, {self.in_chans}), got {tuple(x.shape)}. "
                "Use embeddings of the tile encoder that this slide encoder was trained with."
            )
        if coords.shape != (*x.shape[:2], 2):
            raise ValueError(
                f"slide encoder: expected coordinates {(*x.shape[:2], 2)} for embeddings {tuple(x.shape)}, got "
                f"{tuple(coords.shape)}. Give one (x, y) per tile."
            )
        if 0 in x.shape[:2]:
            raise ValueError("slide encoder: expected at least one tile, got none. Leave empty slides out.")

    def embed_tokens(self, x: Tensor, coords: Tensor, lengths: Sequence[int]) -> Tensor:
        """What the encoder starts from: projected tiles with their positions, behind the class token of their slide.

        Args:
            x: tile embeddings (B, L, in_chans), or (1, T, in_chans) of slides one after another.
            coords: (B, L, 2) or (1, T, 2), as in `forward`; in the host's memory a GPU need not be waited for.
            lengths: tokens of each slide, its class token counted.

        Returns:
            (B, L + 1, D) or (1, T + slides, D); float32 under autocast, as the sums of the layers are then.

        Raises:
            ValueError: a coordinate outside of the grid.
        """
        self._place_positions()  # accelerate, for one, replaces parameters one by one
        tile_size = float(self.tile_size)
        counts = [length - 1 for length in lengths]
        coords = checked_coords(coords, tile_size, self.slide_ngrids, counts)
        # Autocast brings float32 and half precision to its own type, and nothing else.
        if not torch.is_autocast_enabled(x.device.type) or x.dtype not in _AUTOCAST_TAKES:
            x = x.to(self.cls_token.dtype)
        tiles = self.patch_embed(x)
        # In the weights' dtype, so that autocast leaves the sum in float32.
        positions, table = self.coords_to_pos(coords, tile_size), self.pos_embed
        places = table.rows(positions, x.device) if isinstance(table, LazyPosEmbed) else table[:, positions, :][0]
        tiles = tiles + places.to(self.cls_token.dtype)
        token = (self.cls_token + self.pos_embed[:, :1, :].to(self.cls_token)).to(tiles.dtype)
        parts = torch.split(tiles.flatten(0, 1), counts)
        tokens = torch.cat([piece for part in parts for piece in (token[0], part)])
        return tokens.view(x.shape[0], -1, self.embed_dim)

    def _embed(
        self, x: Tensor, coords: Tensor, lengths: tuple[int, ...], all_layer_embed: bool, pool: Pool | None = None
    ) -> Embeddings:
        """The embeddings of slides with `lengths` tokens, the class token counted, from (B, L, .) or (1, T, .)."""
        pooled = partial(pool or self._pool, lengths=lengths)
        answer = self.encoder(
            src_tokens=None,
            token_embeddings=self.embed_tokens(x, coords, lengths),
            return_all_hiddens=all_layer_embed,
            lengths=lengths,
            summarise=pooled,
        )
        return Embeddings(answer["encoder_states"] if all_layer_embed else [pooled(answer["encoder_out"])])

    def _pool(self, tokens: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Tokens (B, N, D) or (1, T, D) to embeddings (B, D): the mean over tiles or the class token, then `norm`."""
        slides = torch.split(tokens.flatten(0, 1), list(lengths))
        pooled = torch.stack([slide[1:].mean(0) if self.global_pool else slide[0] for slide in slides])
        out: Tensor = self.norm(pooled)
        return out


def _refuse_arrays(**given: Any) -> None:
    """Raise TypeError where something else than a tensor (or None) is given."""
    for name, value in given.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"slide encoder: expected a tensor as {name}, got {type(value).__name__}. Convert it with "
                "torch.as_tensor."
            )


def _warn_ignored(names: Sequence[str]) -> None:
    warnings.warn(f"slide encoder: ignored arguments that it does not know: {', '.join(names)}.", stacklevel=4)


def _build(embed_dim: int, depth: int, kwargs: dict[str, Any]) -> LongNetViT:
    if kwargs.get("pretrained"):
        raise ValueError(
            "slide encoder: expected pretrained=False from timm's registry, got True. "
            "Load weights with gigapath.slide_encoder.create_model."
        )
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return LongNetViT(
        **{"norm_layer": partial(nn.LayerNorm, eps=1e-6), "embed_dim": embed_dim, "depth": depth, **kwargs}
    )


@register_model
def gigapath_slide_enc12l768d(**kwargs: Any) -> LongNetViT:
    """Prov-GigaPath: 12 layers, width 768, tile embeddings of 1536."""
    return _build(768, 12, kwargs)


@register_model
def gigapath_slide_enc24l1024d(**kwargs: Any) -> LongNetViT:
    """24 layers, width 1024."""
    return _build(1024, 24, kwargs)


@register_model
def gigapath_slide_enc12l1536d(**kwargs: Any) -> LongNetViT:
    """12 layers, width 1536."""
    return _build(1536, 12, kwargs)


@register_model
def gigapath_slide_enc12l384d(**kwargs: Any) -> LongNetViT:
    """GigaPath-Flash: 12 layers, width 384, tile embeddings of 384 (say so with `in_chans`)."""
    return _build(384, 12, kwargs)


def _pretrained_files(
    model_id: str, revision: str | None, cache_dir: str | Path | None, options: Mapping[str, Any]
) -> tuple[Path, Path | None]:
    """The weights of a folder or a repository, and what its model is built from where that is stored."""
    if Path(model_id).is_dir():
        stored = Path(model_id) / CONFIG_FILE
        return find_weights(model_id, WEIGHTS_FILE), stored if stored.exists() else None
    repo = RELEASES[model_id].repo if model_id in RELEASES else model_id
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or Path(model_id).exists():
        raise FileNotFoundError(
            f"from_pretrained: expected a folder, OWNER/NAME on the hub or {' or '.join(RELEASES)}, got {model_id!r}. "
            "create_model reads a file of weights."
        )
    from gigapath.hub import hub_file  # where it is on the hub

    fetch = partial(hub_file, f"hf_hub:{repo}" + f"@{revision}" * bool(revision), cache_dir=cache_dir, options=options)
    if any(repo == release.repo for release in RELEASES.values()):
        return fetch(WEIGHTS_FILE), None
    try:
        stored = fetch(CONFIG_FILE)
    except FileNotFoundError as error:
        cause: Any = error.__cause__
        if not isinstance(cause, EntryNotFoundError) or isinstance(cause, LocalEntryNotFoundError):
            raise
        return fetch(WEIGHTS_FILE), None  # the published layout
    return fetch(WEIGHTS_FILE), stored


def _released_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The sizes of a released model, which has no file for them; ValueError where the weights are no such model's."""
    arch = tell_architecture(state, "slide", path)
    if all(arch != release.slide_arch for release in RELEASES.values()):
        raise ValueError(
            f"{path.name}: expected {CONFIG_FILE} beside it, got none, and {arch} is no released size. Save "
            "it with save_pretrained, or give its architecture to create_model."
        )
    projection = state["patch_embed.proj.weight"]
    return {"in_chans": projection.shape[1], "embed_dim": projection.shape[0]}


def _read_config(path: Path) -> dict[str, Any]:
    """What `slide_encoder.json` holds; ValueError where it is no such file."""
    from gigapath.files import small_json  # where one was saved

    found = small_json(path)
    if not isinstance(found, dict) or set(found) != _CONFIG:
        raise ValueError(f"{path.name}: expected the keys {', '.join(sorted(_CONFIG))} alone. Save the model anew.")
    return found


def is_architecture(name: str) -> bool:
    """Whether timm's registry has this model; `gigapath_slide_enc<depth>l<width>d` is put there for any size."""
    sizes = _SIZES.fullmatch(name)
    if sizes and not is_model(name):
        depth, width = int(sizes[1]), int(sizes[2])

        def entry(**kwargs: Any) -> LongNetViT:
            return _build(width, depth, kwargs)

        entry.__name__ = name
        register_model(entry)
    return is_model(name)


def layer_id(name: str, depth: int, *, published: bool = False) -> int:
    """Where a parameter of `LongNetViT` stands: 0 at the input, i + 1 in layer i, depth + 1 in the last norms.

    Args:
        name: the parameter's name, such as "encoder.layers.3.ffn.fc1.weight".
        depth: number of layers.
        published: True puts the input projection at depth + 1, where a mismatch of names put it in the published
            code; it belongs with the class token.
    """
    if name.startswith("cls_token") or (name.startswith("patch_embed") and not published):
        return 0
    if name.startswith("encoder.layers."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def create_model(
    pretrained: str,
    model_arch: str | None = None,
    in_chans: int | None = None,
    local_dir: str | None = None,
    **kwargs: Any,
) -> LongNetViT:
    """Build a slide encoder and load its weights.

    Args:
        pretrained: the name of a release ("gigapath", "gigapath-flash"), "hf_hub:REPO", the path of a checkpoint, or ""
            for random weights.
        model_arch: an architecture of timm's registry, such as "gigapath_slide_enc12l768d"; a release has its own.
        in_chans: width of the tile embeddings; a release has its own.
        local_dir: where a download goes; the hub's cache by default.
        kwargs: options of `LongNetViT`; what it does not know is ignored with one warning.

    Raises:
        FileNotFoundError: the checkpoint is not there.
        ValueError: unknown architecture, or weights of the encoder that are missing or of another shape.
    """
    if pretrained is None:  # a forgotten option must not become random weights
        raise ValueError(
            "create_model: expected weights, got None. Give hf_hub:REPO, a file, or '' for random weights."
        )
    release = RELEASES.get(pretrained)
    if release is not None:
        model_arch, in_chans = model_arch or release.slide_arch, in_chans or release.tile_dim
    if in_chans is None:
        raise ValueError(
            f"create_model: expected in_chans, the width of the tile embeddings, beside {pretrained!r}. Only "
            f"{' and '.join(RELEASES)} have their own."
        )
    if model_arch is None or not is_architecture(model_arch):
        raise ValueError(
            f"create_model: expected an architecture such as {', '.join(ARCHITECTURES)}, got {model_arch!r}. "
            "Choose one of these or other sizes, or register your own with timm."
        )
    known = set(inspect.signature(LongNetViT).parameters) | _OURS | _FROM_TIMM
    unknown = sorted(set(kwargs) - known)
    if unknown:
        _warn_ignored(unknown)
    options = {name: value for name, value in kwargs.items() if name in known - _FROM_TIMM and value is not None}
    if not pretrained:
        return _make(model_arch, in_chans, options)
    state = load_state_dict(find_weights(pretrained, WEIGHTS_FILE, local_dir))
    with torch.device("meta"):  # nothing is initialised that the checkpoint replaces
        model = _make(model_arch, in_chans, options)
    assign_weights(model_arch, model, state)
    return model


def _make(model_arch: str, in_chans: int, options: dict[str, Any]) -> LongNetViT:
    return cast(LongNetViT, timm.create_model(model_arch, pretrained=False, in_chans=in_chans, **options))
