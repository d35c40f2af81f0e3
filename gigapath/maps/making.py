"""The maps of one slide, from its tile embeddings and what was fitted or loaded once for all slides."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gigapath.embedding.slide_encoding import SlideEncoder
from gigapath.features import TileEmbeddings
from gigapath.file_names import plain_name
from gigapath.finetune.data import Bag
from gigapath.finetune.fitted import FittedHead
from gigapath.maps.attention import encoder_attention, rollout
from gigapath.maps.data import Colours, TileMap
from gigapath.maps.embeddings import Clusters, Components, cosine_similarity
from gigapath.maps.heads import (
    check_target,
    choose_target,
    deletion_and_insertion,
    gradient_times_input,
    head_attention,
    occlusion,
    predicted_class,
)
from gigapath.maps.options import MapOptions


@dataclass(frozen=True, eq=False)
class ChosenTile:
    """The tile that others are compared with."""

    slide_id: str
    tile: int
    embedding: npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes the maps of a slide. They hold no range yet: that is found when all slides are known.

    Attributes:
        options: which maps.
        device: where models run.
        components: of the tile embeddings, for pca.
        clusters: of the tile embeddings.
        chosen: the tile for similarity.
        encoder: the slide encoder for attention and rollout.
        head: the fitted head for its maps.
    """

    options: MapOptions
    device: torch.device
    components: Components | None = None
    clusters: Clusters | None = None
    chosen: ChosenTile | None = None
    encoder: SlideEncoder | None = None
    head: FittedHead | None = None

    def maps(self, tiles: TileEmbeddings, bag: Callable[[], Bag]) -> Iterator[TileMap]:
        """The maps of one slide, one after another.

        Args:
            tiles: its tile embeddings, in row-major order, N at least 1.
            bag: reads them as the fitted head gets them, in the same order.
        """
        makers: dict[str, Callable[[], Iterator[TileMap]]] = {
            "pca": lambda: self._pca(tiles),
            "clusters": lambda: self._clusters(tiles),
            "similarity": lambda: self._similarity(tiles),
            "attention": lambda: self._attention(tiles),
            "rollout": lambda: self._rollout(tiles),
            "head-attention": lambda: self._head_attention(bag()),
            "gradient": lambda: self._gradient(bag()),
            "occlusion": lambda: self._occlusion(bag()),
        }
        for kind in dict.fromkeys(self.options.kind):
            yield from makers[kind]()

    # ------------------------------------------------------------------------------------------- tile embeddings

    def _pca(self, tiles: TileEmbeddings) -> Iterator[TileMap]:
        assert self.components is not None
        found = self.components
        if self.options.range == "slide":
            found = found.scaled(tiles.features)
        red, green, blue = found.shares
        shares = f"red {red:.0%}, green {green:.0%}, blue {blue:.0%}"
        yield TileMap(
            name="pca",
            kind="pca",
            values=found.colours(tiles.features),
            colours=Colours(
                "rgb",
                f"first three components, each from its 1st to its 99th percentile; share of variance: {shares}",
                scope="fitted on all slides given" + (", range of this slide" if self.options.range == "slide" else ""),
            ),
            title="tile embeddings, principal components as red, green and blue",
            facts={
                **_of_tiles(tiles),
                "normalisation": "each component from its 1st to its 99th percentile to 0..1",
                "variance_shares": found.shares.tolist(),
            },
            arrays={"components": found.axes, "mean": found.mean, "low": found.low, "high": found.high},
        )

    def _clusters(self, tiles: TileEmbeddings) -> Iterator[TileMap]:
        assert self.clusters is not None
        count = len(self.clusters.centres)
        yield TileMap(
            name="clusters",
            kind="clusters",
            values=self.clusters.labels(tiles.features),
            colours=Colours(
                "categories",
                "k-means cluster",
                scope="fitted on all slides given",
                names=tuple(f"cluster {i + 1}" for i in range(count)),
            ),
            title=f"tile embeddings in {count} clusters (k-means, seed {self.options.seed})",
            facts={**_of_tiles(tiles), "normalisation": "none; the largest cluster of all slides is number 1"},
            arrays={"centres": self.clusters.centres},
        )

    def _similarity(self, tiles: TileEmbeddings) -> Iterator[TileMap]:
        assert self.chosen is not None
        chosen = f"tile {self.chosen.tile} of {self.chosen.slide_id}"
        yield TileMap(
            name=f"similarity_{_fit(self.chosen.slide_id)}_{self.chosen.tile}",
            kind="similarity",
            values=cosine_similarity(tiles.features, self.chosen.embedding),
            colours=Colours("sequential", "cosine similarity"),
            title=f"similarity of tile embeddings to {chosen}",
            facts={
                **_of_tiles(tiles),
                "target": chosen,
                "normalisation": "cosine of the embeddings as stored, not centred",
                "tile": {"slide_id": self.chosen.slide_id, "row": self.chosen.tile},
            },
            mark=self.chosen.tile if self.chosen.slide_id == tiles.slide_id else None,
        )

    # --------------------------------------------------------------------------------------------- slide encoder

    def _attention(self, tiles: TileEmbeddings) -> Iterator[TileMap]:
        assert self.encoder is not None and self.encoder.model is not None
        options, model = self.options, self.encoder.model
        features, coords = self._inputs(tiles)
        for read in encoder_attention(model, features, coords, query=self._query(), layers=options.layer):
            one = options.attention_head
            chosen = slice(None) if one is None else slice(one, one + 1)
            weights = read.tiles[chosen].mean(axis=0)
            heads = f"mean of {len(read.tiles)} heads" if one is None else f"head {one} of 0 to {len(read.tiles) - 1}"
            lost, on_class = float(read.zero_keys[chosen].mean()), float(read.class_token[chosen].mean())
            yield TileMap(
                name=f"attention_{self._query_name()}_layer-{read.layer}_head-{'mean' if one is None else one}",
                kind="attention",
                values=weights * (len(tiles) + 1),
                colours=Colours("sequential", "attention weight x number of tokens (1 = even)"),
                title=f"attention of the slide encoder, layer {read.layer} of {model.depth}, {heads}, "
                f"{self._query_words()}",
                facts={
                    **self._of_encoder(tiles),
                    "layer": read.layer,
                    "head": "mean" if one is None else one,
                    "query": self._query_words(),
                    "weight": _shares(weights.sum(), on_class, lost),
                    "normalisation": "drawn: weight x number of tokens; in the npz the weights themselves, of which "
                    "tiles, class token and zero keys add up to 1 in each head, nothing renormalised",
                    "tiles_weight": float(weights.sum()),
                    "class_token_weight": on_class,
                    "zero_keys_weight": lost,
                    "branches": [
                        {"segment": segment, "dilation": dilation, "weight": float(weight)}
                        for (segment, dilation), weight in zip(
                            model.encoder.config.branches, read.branches[chosen].mean(axis=0), strict=True
                        )
                    ],
                },
                arrays={
                    "weights": read.tiles,
                    "class_token": read.class_token,
                    "zero_keys": read.zero_keys,
                    "branches": read.branches,
                },
                mark=self._query_tile,
            )

    def _rollout(self, tiles: TileEmbeddings) -> Iterator[TileMap]:
        assert self.encoder is not None and self.encoder.model is not None
        depth = self.encoder.model.depth
        found = rollout(self.encoder.model, *self._inputs(tiles), query=self._query())
        yield TileMap(
            name=f"rollout_{self._query_name()}",
            kind="rollout",
            values=found.tiles * (len(tiles) + 1),
            colours=Colours("sequential", "rolled-out weight x number of tokens (1 = even)"),
            title=f"attention rollout over layers 1 to {depth}, a heuristic, {self._query_words()}",
            facts={
                **self._of_encoder(tiles),
                "layer": f"1 to {depth}",
                "head": "mean",
                "query": self._query_words(),
                "weight": _shares(found.tiles.sum(), found.class_token, found.zero_keys),
                "heuristic": True,
                "normalisation": "drawn: weight x number of tokens; each layer counts attention (mean of heads) and "
                "residual path half each, nothing renormalised",
                "class_token_weight": found.class_token,
                "zero_keys_weight": found.zero_keys,
            },
            arrays={"weights": found.tiles},
            mark=self._query_tile,
        )

    def _inputs(self, tiles: TileEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.from_numpy(np.ascontiguousarray(tiles.features, np.float32)).to(self.device)
        return features, torch.from_numpy(tiles.encoder_coords()).to(self.device)

    @property
    def _query_tile(self) -> int | None:
        return self.options.tile if self.options.query == "tile" else None

    def _query(self) -> str | int:
        return self.options.query if self._query_tile is None else self._query_tile

    def _query_name(self) -> str:
        return f"tile-{self.options.tile}" if self.options.query == "tile" else self.options.query

    def _query_words(self) -> str:
        words = {"pooled": "from the mean over the tiles", "class": "from the class token"}
        return words.get(self.options.query, f"from tile {self.options.tile}")

    def _of_encoder(self, tiles: TileEmbeddings) -> dict[str, Any]:
        assert self.encoder is not None
        on = _of_tiles(tiles)
        untrained = "" if self.encoder.trained else " (UNTRAINED: random weights)"
        of_head = self.options.checkpoint is not None and self.options.slide_encoder is None
        return {
            "model": f"slide encoder {self.encoder.name}{untrained} on {on['model']}",
            "trained": self.encoder.trained and on["trained"],
            "slide_encoder": self.encoder.name,
            "slide_weights_sha256": self.encoder.weights_sha256,
            "head_sha256": self.encoder.weights_sha256 if of_head else None,
            "tile_encoder": tiles.encoder,
        }

    # ----------------------------------------------------------------------------------------------- fitted head

    def _head_attention(self, bag: Bag) -> Iterator[TileMap]:
        weights = head_attention(self._head, bag, self.device)
        # Attention is of no class: what it ranks is the tiles that made the head answer as it does.
        name = self.options.target or self._head.task.classes[predicted_class(self._head, bag, self.device)]
        target = check_target(self._head.task, name)
        yield self._of_head(
            bag,
            weights,
            target,
            name="head-attention",
            kind="head-attention",
            drawn=weights * len(bag),
            colours=Colours("sequential", "attention weight x number of tiles (1 = even)"),
            title="attention of the fitted head (ABMIL)",
            normalisation="drawn: weight x number of tiles; in the npz the weights themselves, which add up to 1",
        )

    def _gradient(self, bag: Bag) -> Iterator[TileMap]:
        target = choose_target(self._head, self.options.target, bag, self.device)
        name = self._head.task.classes[target]
        values = gradient_times_input(self._head, bag, target, self.device)
        yield self._of_head(
            bag,
            values,
            target,
            name=f"gradient_{_fit(name)}",
            kind="gradient",
            drawn=values,
            colours=Colours("diverging", f"gradient x input, {self._score(target)}"),
            title=f"contribution of each tile to class {name} by gradient x input",
            normalisation="none; sum over the embedding of value times gradient",
        )

    def _occlusion(self, bag: Bag) -> Iterator[TileMap]:
        target = choose_target(self._head, self.options.target, bag, self.device)
        name = self._head.task.classes[target]
        values, side = occlusion(self._head, bag, target, self.device)
        squares = "tile by tile" if side == 1 else f"in squares of {side} x {side} cells"
        yield self._of_head(
            bag,
            values,
            target,
            name=f"occlusion_{_fit(name)}",
            kind="occlusion",
            drawn=values,
            colours=Colours("diverging", f"score lost without the tile, {self._score(target)}"),
            title=f"contribution of each tile to class {name} by occlusion, left out {squares}",
            normalisation=f"none; tiles left out {squares}",
            more={"square_cells": side},
        )

    @property
    def _head(self) -> FittedHead:
        assert self.head is not None
        return self.head

    def _score(self, target: int) -> str:
        name = self._head.task.classes[target]
        return f"logit of {name}" if self._head.task.multi_label else f"log-odds of class {name} against the others"

    def _of_head(
        self,
        bag: Bag,
        values: npt.NDArray[np.float32],
        target: int,
        *,
        name: str,
        kind: str,
        drawn: npt.NDArray[np.float32],
        colours: Colours,
        title: str,
        normalisation: str,
        more: dict[str, Any] | None = None,
    ) -> TileMap:
        """A head's map with its curve."""
        head, curves = self._head, None
        if np.isfinite(values).all():
            curves = deletion_and_insertion(head, bag, values, target, self.device, seed=self.options.seed)
        made_of = head.made.get("encoder") or "an encoder that the head does not name"
        of_tiles = head.options.head == "abmil-tiles"
        on = "" if of_tiles else f" on state {head.options.feat_layer} of {head.options.model_arch}"
        return TileMap(
            name=name,
            kind=kind,
            values=drawn,
            colours=colours,
            title=title,
            facts={
                "model": f"fitted head {head.options.head}{on}, task {head.task.name}; tile embeddings of {made_of}",
                "trained": True,
                "layer": None if of_tiles else head.options.feat_layer,
                "head": head.options.head,
                "target": head.task.classes[target],
                "normalisation": normalisation,
                "check": None if curves is None else f"{self._score(target)}; {curves.in_words()}",
                "score": self._score(target),
                "head_sha256": head.sha256,
                **(more or {}),
            },
            arrays={"scores": values},
            curve=None if curves is None else curves.to_dict(),
        )


def _of_tiles(tiles: TileEmbeddings) -> dict[str, Any]:
    """The tile encoder in words, and whether it was trained."""
    trained = tiles.attrs.get("trained") is not False
    name = tiles.encoder or "an encoder that the file does not name"
    return {
        "model": f"tile embeddings of {name}{'' if trained else ' (UNTRAINED: random weights)'}, {tiles.embed_dim}-d",
        "trained": trained,
    }


def _shares(on_tiles: float, on_class: float, lost: float) -> str:
    return f"{on_tiles:.1%} on tiles, {on_class:.1%} on the class token, {lost:.1%} on zero keys of padding"


def _fit(name: str) -> str:
    """A word that can be part of a file's name."""
    return plain_name(name)[:60]
