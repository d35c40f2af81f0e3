"""A batch of pixels to tile embeddings, and tile embeddings to the embeddings of a slide.

B tiles of a batch, N tiles of a slide, D width of a tile embedding, E width of the slide encoder.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gigapath.devices import AUTOCAST_TYPES, computing, is_out_of_memory, resolve_device, resolve_precision, send
from gigapath.embedding.forward import EncoderError, first_line
from gigapath.features import TileEmbeddings, parse_embedding
from gigapath.file_names import plain_name
from gigapath.files import remembered_sha256
from gigapath.longnet.attention import choose_kernel
from gigapath.longnet.linear import between_steps
from gigapath.longnet.norm import choose_one_pass
from gigapath.releases import RELEASES, check_encoder, release_of
from gigapath.slide_encoder import WEIGHTS_FILE, LongNetViT, create_model
from gigapath.tile_encoder import TileEncoder
from gigapath.weights import find_weights, load_state_dict, tell_architecture

# Gets the number of layers that are through, and of all.
AfterLayer = Callable[[int, int], None]

_RANDOM_SEED = 0
# Rows summed at once for the mean of a slide's tiles: the sum must not depend on how they were batched.
_MEAN_ROWS = 1024


@dataclass(frozen=True)
class SlideEncoder:
    """A slide encoder on its device, in eval mode, or the plain mean of the tiles (`model` None).

    `name` is short and fit for a folder's name, and says so where the weights are random (not `trained`);
    `weights_sha256` is of the file of weights, or None; `tile_encoder` the one that it was trained with, None where it
    takes any of the right width; `precision` "fp32", the type of autocast, or "half" for a model that is float16
    itself.
    """

    name: str
    trained: bool
    weights_sha256: str | None
    tile_encoder: str | None
    description: str
    device: torch.device
    precision: str
    model: LongNetViT | None

    def check_pair(self, tile_encoder: str | None, embed_dim: int) -> None:
        """Refuse tile embeddings (of width D; where `tile_encoder` is None only that is checked) of another encoder
        than the slide encoder was trained with: ValueError names both."""
        known = None if tile_encoder is None else release_of(tile_encoder)
        if self.tile_encoder is not None and known is not None and known != self.tile_encoder:
            raise ValueError(
                f"slide encoder {self.name}: expected embeddings of its own tile encoder, {self.tile_encoder}, got "
                f"those of {tile_encoder!r}. Take the pair that belongs together, or --slide-encoder mean."
            )
        if self.model is not None and embed_dim != self.model.in_chans:
            raise ValueError(
                f"slide encoder {self.name}: expected tile embeddings of width {self.model.in_chans}, got {embed_dim}. "
                "Take the pair that belongs together, or --slide-encoder mean."
            )

    @property
    def facts(self) -> dict[str, Any]:
        """What a run's record says of the encoder."""
        own = {"precision": self.precision, "attention_kernel": self.kernel}
        return {**encoder_facts(self), **own, "one_pass_norms": self._norms_take_one_pass()}

    @property
    def kernel(self) -> str | None:
        """The attention kernel that serves this device and precision, or None without a model."""
        if self.model is None:
            return None
        dtype = AUTOCAST_TYPES.get(self.precision, self.model.cls_token.dtype)
        attention: Any = self.model.encoder.layers[0].self_attn
        q = torch.empty((1, attention.num_heads, 1, attention.head_dim), device=self.device, dtype=dtype)
        return choose_kernel(q).name

    def _norms_take_one_pass(self) -> bool:
        if self.model is None:
            return False
        norm: Any = self.model.encoder.layers[0].self_attn_layer_norm
        with computing(self.precision, self.device):
            return choose_one_pass(norm, norm.weight, norm.weight.dtype, gelu=False) is not None

    def at(self, precision: str) -> "SlideEncoder":
        """The same encoder in another precision, one of a `Recipe`."""
        model = copy.deepcopy(self.model).half() if precision == "half" and self.model is not None else self.model
        return replace(self, precision=precision, model=model)

    def embed(
        self,
        tiles: TileEmbeddings,
        *,
        check: Callable[[], None] = lambda: None,
        progress: AfterLayer = lambda done, layers: None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """The embeddings of a slide by name, from its tile embeddings as stored, with cells, N at least 1, in the order
        given. `check` is called within the layers, every few seconds at the least, and may raise to stop; `progress`
        after each.

        Raises:
            EncoderError: the encoder failed, for want of memory or otherwise.
            ValueError: a tile lies outside of the encoder's grid, or an embedding is not finite.
        """
        if self.model is None:
            return {"tile_mean": mean_of_rows(tiles.features)[None]}
        with self._failures(len(tiles)):
            states, default = self._states(self.model, tiles, check, progress)
            mean = mean_of_rows(tiles.features)[None]  # while a GPU computes
            found = torch.cat([states, default[None]]).float().cpu().numpy()  # (depth + 2, 2, E)
        self._check_finite(tiles, found)
        return {
            "states_mean": found[:-1, 0],
            "states_class": found[:-1, 1],
            "default_mean": found[-1:, 0],
            "default_class": found[-1:, 1],
            "tile_mean": mean,
        }

    def embed_tiles(
        self,
        tiles: TileEmbeddings,
        name: str = "default:tiles",
        *,
        check: Callable[[], None] = lambda: None,
        progress: AfterLayer = lambda done, layers: None,
    ) -> npt.NDArray[np.float32]:
        """One vector a tile, which knows the tiles around it: the tokens that the mean is taken of, before `norm`. (N,
        E) float32 for a `name` of an embedding that ends with `:tiles`; for all-states (N, (depth + 1) * E).

        Raises:
            EncoderError: the encoder failed, for want of memory or otherwise.
            ValueError: another name, a state that is not there, a tile outside of the grid, a vector not finite.
        """
        wanted = parse_embedding(name)
        if wanted.pooling != "tiles" or self.model is None:
            raise ValueError(
                f"slide encoder {self.name}: expected a name that ends with :tiles, and an encoder with layers, got "
                f"{name!r}. The tile embeddings themselves are in the features' file."
            )
        depth = self.model.depth
        if wanted.state is not None and wanted.state > depth:
            raise ValueError(f"slide encoder {self.name}: expected a state of 0 to {depth}, got {wanted}.")
        places = {"default": [depth + 1], "last-state": [depth], "all-states": list(range(depth + 1))}
        states = places.get(wanted.kind, [wanted.state])
        kept: list[npt.NDArray[np.float32]] = []

        def keep(state: int, tokens: Tensor) -> None:
            if state in states:
                kept.append(tokens.float().cpu().numpy())

        with self._failures(len(tiles)):
            self._states(self.model, tiles, check, progress, keep)
        for value in kept:
            self._check_finite(tiles, value)
        return kept[0] if len(kept) == 1 else np.concatenate(kept, axis=1)

    def _check_finite(self, tiles: TileEmbeddings, value: npt.NDArray[np.float32]) -> None:
        if not np.isfinite(value).all():
            raise ValueError(
                f"slide encoder {self.name}: an embedding of {tiles.slide_id} is not finite in {self.precision}. "
                "Try --precision fp32."
            )

    @contextlib.contextmanager
    def _failures(self, count: int) -> Iterator[None]:
        """What a device says when it fails, as one sentence."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise EncoderError(
                    f"{self.name}: {self.device} has too little memory for a slide of {count} tiles. "
                    "Use --device cpu, or --max-tiles when tiling."
                ) from error
            raise EncoderError(f"{self.name} failed on {self.device}: {first_line(error)}") from error

    def _states(
        self,
        model: LongNetViT,
        tiles: TileEmbeddings,
        check: Callable[[], None],
        progress: AfterLayer,
        keep_tokens: Callable[[int, Tensor], None] = lambda state, tokens: None,
    ) -> tuple[Tensor, Tensor]:
        """`pooled_states` of a slide; a GPU may still be computing them."""

        def see_tokens(state: int, tokens: Tensor) -> None:
            check()
            keep_tokens(state, tokens)
            if 1 <= state <= model.depth:
                progress(state, model.depth)

        features = torch.from_numpy(np.ascontiguousarray(tiles.features))
        coords = torch.from_numpy(tiles.encoder_coords())
        with torch.inference_mode(), computing(self.precision, self.device), between_steps(check):
            return pooled_states(model, send(features, self.device), coords, see_tokens)


def encoder_facts(encoder: SlideEncoder | TileEncoder) -> dict[str, Any]:
    """What a run's record says of an encoder of either kind."""
    release = RELEASES.get(encoder.name)
    return {
        "name": encoder.name,
        "description": encoder.description,
        "trained": encoder.trained,
        "weights_sha256": encoder.weights_sha256,
        "repository": release.repo if release else None,
        "revision": release.revision if release else None,
    }


def pooled_states(
    model: LongNetViT,
    features: Tensor,
    coords: Tensor,
    see_tokens: Callable[[int, Tensor], None] = lambda state, tokens: None,
) -> tuple[Tensor, Tensor]:
    """Every state and the default output of one slide, pooled both ways, in one pass of the encoder.

    Args:
        model: the slide encoder, in eval mode.
        features: (N, D) tile embeddings.
        coords: (N, 2) (x, y) in pixels, of which `model.tile_size` make a cell.
        see_tokens: gets the number of each state, depth + 1 for the default output, and its tile tokens (N, E).

    Returns: states (depth + 1, 2, E) and the default output (2, E); of each pair the first is the mean over the tiles,
    the second the class token.
    """

    def pool(tokens: Tensor) -> Tensor:  # (1, N + 1, E) -> (2, E)
        see_tokens(next(numbers), tokens[0, 1:])
        pooled: Tensor = model.norm(torch.stack([tokens[0, 1:].mean(0), tokens[0, 0]]))
        return pooled

    numbers = itertools.count()
    tokens = model.embed_tokens(features[None], coords[None], (len(features) + 1,))  # (1, N + 1, E)
    answer = model.encoder(token_embeddings=tokens, return_all_hiddens=True, summarise=pool)
    return torch.stack(answer["encoder_states"]), pool(answer["encoder_out"])


def mean_of_rows(features: Any) -> npt.NDArray[np.float32]:
    """Mean (D,) of an array or h5 dataset (N, D), summed in float64, a fixed number of rows at a time."""
    total = np.zeros(features.shape[1])
    for start in range(0, len(features), _MEAN_ROWS):
        total += features[start : start + _MEAN_ROWS].sum(axis=0, dtype=np.float64)
    return (total / len(features)).astype(np.float32)


def load_slide_encoder(
    name: str,
    *,
    in_chans: int,
    device: str | torch.device = "cpu",
    precision: str = "fp32",
    random_weights: bool = False,
) -> SlideEncoder:
    """Load a slide encoder by the name that the command line knows it by.

    Args:
        name: "mean", "gigapath", "gigapath-flash", or a checkpoint (or a folder with `slide_encoder.pth`) of one of the
            two released architectures, or of another size, such as `gigapath pretrain` makes.
        in_chans: width D of the tile embeddings that it is going to get.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        precision: "auto" (fp16 autocast on CUDA, fp32 elsewhere), "fp32", "fp16" or "bf16".
        random_weights: leave the weights untrained, for trying things; any `in_chans` will do then.

    Raises:
        ValueError: an unknown name, a checkpoint of another architecture or width, a device that is not there.
        FileNotFoundError, PermissionError, ConnectionError: the weights are not to be had.
    """
    resolved = resolve_device(device)
    precision = resolve_precision(precision, resolved)
    if name == "mean":
        described = "the mean of the tile embeddings"
        return SlideEncoder("mean", True, None, None, described, resolved, precision, None)
    release = RELEASES.get(name)
    sha256 = None
    if release is None:
        check_encoder("slide", name)
        path = find_weights(name, WEIGHTS_FILE)
        if random_weights:
            raise ValueError(f"--random-weights: expected the name of a slide encoder, got {name!r}. Drop one.")
        state = load_state_dict(path)
        arch, sha256, pretrained = tell_architecture(state, "slide", path), remembered_sha256(path), str(path)
        width = int(state["patch_embed.proj.weight"].shape[-1])
        release = next((known for known in RELEASES.values() if known.slide_sha256 == sha256), None)
        short = release.name if release else f"{plain_name(path.stem)}-{sha256[:8]}"
    else:
        arch, short, pretrained, width = release.slide_arch, release.name, "", release.tile_dim
        if not random_weights:
            path = find_weights(f"hf_hub:{release.repo}", WEIGHTS_FILE, strict=True)
            sha256, pretrained = remembered_sha256(path), str(path)
    if not random_weights and in_chans != width:
        raise ValueError(
            f"--slide-encoder {name}: expected tile embeddings of width {width}, as its tile encoder makes them, got "
            f"{in_chans}. Take the pair that belongs together, or --slide-encoder mean."
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_RANDOM_SEED)  # random weights are the same ones every time
        model = create_model(pretrained, arch, in_chans, global_pool=True).eval().requires_grad_(False)
    described = f"{release.repo}'s slide encoder ({arch})" if release else f"{arch} from a checkpoint ({sha256})"
    return SlideEncoder(
        name=f"{short}-random" if random_weights else short,
        trained=not random_weights,
        weights_sha256=sha256,
        tile_encoder=release.name if release and not random_weights else None,
        description=f"{described}, UNTRAINED: random weights" if random_weights else described,
        device=resolved,
        precision=precision,
        model=model.to(resolved),
    )


def usual_slide_encoder(tile_encoder: str | None, *, random_weights: bool) -> str:
    """The slide encoder where nobody names one: that of the tile encoder's own release, else the mean, or with
    `random_weights` an untrained one."""
    release = release_of((tile_encoder or "").removesuffix("-random" if random_weights else ""))
    return release if release in RELEASES else "gigapath" if random_weights else "mean"
