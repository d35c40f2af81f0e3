"""The kinds of maps, one table (`KINDS`, at the end): how the values of each are made, its colors, and the sentences
that state it. N tiles of a slide."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gigapath import standin
from gigapath.embedding.slide_encoding import SlideEncoder
from gigapath.features import TileEmbeddings
from gigapath.file_names import plain_name
from gigapath.finetune.data import Bag
from gigapath.finetune.fitted import FittedHead
from gigapath.linear_probe.heads import TileHead
from gigapath.maps.attribution import (
    choose_target,
    deletion_and_insertion,
    encoder_attention,
    gradient_times_input,
    head_attention,
    occlusion,
    predicted_class,
    rollout,
)
from gigapath.maps.drawing import Colors, TileMap
from gigapath.maps.embeddings import Clusters, Components, cosine_similarity
from gigapath.maps.options import MapOptions

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Shared:
    """What the maps of all slides share: options, and the parts that were fitted or loaded for the kinds asked for.

    Attributes:
        chosen: (slide_id, row, embedding (D,)) of the tile that others are compared with.
    """

    options: MapOptions
    device: torch.device
    components: Components | None = None
    clusters: Clusters | None = None
    chosen: tuple[str, int, npt.NDArray[np.float32]] | None = None
    encoder: SlideEncoder | None = None
    head: FittedHead | None = None
    tile_head: TileHead | None = None


@dataclass(frozen=True, eq=False, kw_only=True)
class Made:
    """One map: its values (N,) or (N, 3), further parts of its name, what fills the braces of the kind's sentences
    beside its facts, and the fields of `TileMap` that it sets."""

    values: Array
    name: tuple[str, ...] = ()
    words: Mapping[str, Any] = field(default_factory=dict)
    categories: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    arrays: Mapping[str, Array] = field(default_factory=dict)
    curve: Mapping[str, Any] | None = None
    mark: int | None = None


@dataclass(frozen=True)
class Kind:
    """A kind of map.

    Attributes:
        make: yields the maps of a slide, whose tiles come in row-major order, at least one.
        source: gives the facts on the model that the map is of.
        palette: of `Colors`.
        label: what the colors mean.
        title: what the map shows.
        normalization: what the values were divided by.
        scope: what a range that is not taken from the values of all slides spans.
    """

    make: Callable[[Shared, TileEmbeddings], Iterator[Made]]
    source: Callable[[Shared, TileEmbeddings], dict[str, Any]]
    palette: str
    label: str
    title: str
    normalization: str
    scope: str = "fixed"


def slide_maps(shared: Shared, tiles: TileEmbeddings) -> Iterator[TileMap]:
    """The maps of one slide, one after another. They hold no range yet: that is found when all slides are known."""
    for name in dict.fromkeys(shared.options.kind):
        kind = KINDS[name]
        facts = kind.source(shared, tiles)
        for made in kind.make(shared, tiles):
            sentences = (kind.label, kind.title, kind.normalization, kind.scope)
            label, title, normalization, scope = (each.format(**made.facts, **made.words) for each in sentences)
            yield TileMap(
                name="_".join((name, *made.name)),
                kind=name,
                values=made.values,
                colors=Colors(kind.palette, label, scope=scope, names=made.categories),
                title=title,
                facts={**facts, "normalisation": normalization, **made.facts},
                arrays=made.arrays,
                curve=made.curve,
                mark=made.mark,
            )


def _of_tiles(shared: Shared, tiles: TileEmbeddings) -> dict[str, Any]:
    trained = tiles.attrs.get("trained") is not False
    name = tiles.encoder or "an encoder that the file does not name"
    stated = "" if trained else " (UNTRAINED: random weights)"
    if trained and name == "standin":
        stated = f" (trained on {standin.TRAINED_ON})"
    return {"model": f"tile embeddings of {name}{stated}, {tiles.embed_dim}-d", "trained": trained}


def _pca(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.components is not None
    own = shared.options.range == "slide"
    found = shared.components.scaled(tiles.features) if own else shared.components
    red, green, blue = found.shares
    yield Made(
        values=found.colors(tiles.features),
        words={"red": red, "green": green, "blue": blue, "own": ", range of this slide" if own else ""},
        facts={"variance_shares": found.shares.tolist()},
        arrays={"components": found.axes, "mean": found.mean, "low": found.low, "high": found.high},
    )


def _clusters(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.clusters is not None
    count = len(shared.clusters.centers)
    yield Made(
        values=shared.clusters.labels(tiles.features),
        words={"count": count, "seed": shared.options.seed},
        categories=tuple(f"cluster {i + 1}" for i in range(count)),
        arrays={"centres": shared.clusters.centers},
    )


def _similarity(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.chosen is not None
    slide_id, row, embedding = shared.chosen
    target = f"tile {row} of {slide_id}"
    yield Made(
        values=cosine_similarity(tiles.features, embedding),
        name=(_part(slide_id), str(row)),
        facts={"target": target, "tile": {"slide_id": slide_id, "row": row}},
        mark=row if slide_id == tiles.slide_id else None,
    )


def _of_encoder(shared: Shared, tiles: TileEmbeddings) -> dict[str, Any]:
    encoder, options, on = shared.encoder, shared.options, _of_tiles(shared, tiles)
    assert encoder is not None
    untrained = "" if encoder.trained else " (UNTRAINED: random weights)"
    of_head = options.checkpoint is not None and options.slide_encoder is None
    return {
        "model": f"slide encoder {encoder.name}{untrained} on {on['model']}",
        "trained": encoder.trained and on["trained"],
        "slide_encoder": encoder.name,
        "slide_weights_sha256": encoder.weights_sha256,
        "head_sha256": encoder.weights_sha256 if of_head else None,
        "tile_encoder": tiles.encoder,
    }


def _attention(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.encoder is not None and shared.encoder.model is not None
    model, one = shared.encoder.model, shared.options.attention_head
    query, query_name, stated, mark = _query(shared.options)
    for read in encoder_attention(model, *_inputs(shared, tiles), query=query, layers=shared.options.layer):
        chosen = slice(None) if one is None else slice(one, one + 1)
        weights, heads = read.tiles[chosen].mean(axis=0), len(read.tiles)
        on_class, lost = float(read.class_token[chosen].mean()), float(read.zero_keys[chosen].mean())
        branches = zip(model.encoder.config.branches, read.branches[chosen].mean(axis=0), strict=True)
        yield Made(
            values=weights * (len(tiles) + 1),
            name=(query_name, f"layer-{read.layer}", f"head-{'mean' if one is None else one}"),
            words={
                "depth": model.depth,
                "heads": f"mean of {heads} heads" if one is None else f"head {one} of 0 to {heads - 1}",
            },
            facts={
                "layer": read.layer,
                "head": "mean" if one is None else one,
                "query": stated,
                "weight": _shares(weights.sum(), on_class, lost),
                "tiles_weight": float(weights.sum()),
                "class_token_weight": on_class,
                "zero_keys_weight": lost,
                "branches": [
                    {"segment": segment, "dilation": dilation, "weight": float(weight)}
                    for (segment, dilation), weight in branches
                ],
            },
            arrays={"weights": read.tiles}
            | {name: getattr(read, name) for name in ("class_token", "zero_keys", "branches")},
            mark=mark,
        )


def _rollout(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.encoder is not None and shared.encoder.model is not None
    depth = shared.encoder.model.depth
    query, query_name, stated, mark = _query(shared.options)
    found = rollout(shared.encoder.model, *_inputs(shared, tiles), query=query)
    yield Made(
        values=found.tiles * (len(tiles) + 1),
        name=(query_name,),
        words={"depth": depth},
        facts={
            "layer": f"1 to {depth}",
            "head": "mean",
            "query": stated,
            "weight": _shares(found.tiles.sum(), found.class_token, found.zero_keys),
            "heuristic": True,
            "class_token_weight": found.class_token,
            "zero_keys_weight": found.zero_keys,
        },
        arrays={"weights": found.tiles},
        mark=mark,
    )


def _inputs(shared: Shared, tiles: TileEmbeddings) -> tuple[torch.Tensor, torch.Tensor]:
    features = torch.from_numpy(np.ascontiguousarray(tiles.features, np.float32))
    return features.to(shared.device), torch.from_numpy(tiles.encoder_coords()).to(shared.device)


def _query(options: MapOptions) -> tuple[str | int, str, str, int | None]:
    """Whose attention: for the encoder, in a file's name, in a sentence, and as the tile to outline."""
    if options.query == "tile" and options.tile is not None:
        return options.tile, f"tile-{options.tile}", f"from tile {options.tile}", options.tile
    stated = {"pooled": "from the mean over the tiles", "class": "from the class token"}[options.query]
    return options.query, options.query, stated, None


def _shares(on_tiles: float, on_class: float, lost: float) -> str:
    return f"{on_tiles:.1%} on tiles, {on_class:.1%} on the class token, {lost:.1%} on zero keys of padding"


def _of_head(shared: Shared, tiles: TileEmbeddings) -> dict[str, Any]:
    head = _head(shared)
    on_tiles = head.options.head == "abmil-tiles"
    on = "" if on_tiles else f" on state {head.options.feat_layer} of {head.options.model_arch}"
    made_of = head.made.get("encoder") or "an encoder that the head does not name"
    return {
        "model": f"fitted head {head.options.head}{on}, task {head.task.name}; tile embeddings of {made_of}",
        "trained": True,
        "layer": None if on_tiles else head.options.feat_layer,
        "head": head.options.head,
        "head_sha256": head.sha256,
    }


def _head_attention(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    head, bag, wanted = _head(shared), _bag(tiles), shared.options.target
    weights = head_attention(head, bag, shared.device)
    # Attention is of no class: what it ranks is the tiles that made the head answer as it does.
    target = predicted_class(head, bag, shared.device) if wanted is None else head.task.classes.index(wanted)
    yield _explained(shared, bag, weights, target, drawn=weights * len(bag), name=())


def _gradient(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    head, bag = _head(shared), _bag(tiles)
    target = choose_target(head, shared.options.target, bag, shared.device)
    yield _explained(shared, bag, gradient_times_input(head, bag, target, shared.device), target)


def _occlusion(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    head, bag = _head(shared), _bag(tiles)
    target = choose_target(head, shared.options.target, bag, shared.device)
    values, side = occlusion(head, bag, target, shared.device)
    yield _explained(shared, bag, values, target, square_cells=side)


def _explained(
    shared: Shared,
    bag: Bag,
    scores: npt.NDArray[np.float32],
    target: int,
    *,
    drawn: npt.NDArray[np.float32] | None = None,
    name: tuple[str, ...] | None = None,
    **facts: int,
) -> Made:
    """A head's map, with the curve that tells whether its ranking of the tiles holds."""
    head, curves = _head(shared), None
    of_class = head.task.classes[target]
    score = f"log-odds of class {of_class} against the others"
    if not head.task.of_classes:
        score = of_class if head.task.setting == "survival" else f"{of_class}, in standard deviations of training"
    elif head.task.multi_label:
        score = f"logit of {of_class}"
    if np.isfinite(scores).all():
        curves = deletion_and_insertion(head, bag, scores, target, shared.device, seed=shared.options.seed)
    side = facts.get("square_cells", 1)
    squares = "tile by tile" if side == 1 else f"in squares of {side} x {side} cells"
    check = None if curves is None else f"{score}; {curves.verdict()}"
    return Made(
        values=scores if drawn is None else drawn,
        name=(_part(of_class),) if name is None else name,
        words={"squares": squares, "what": f"class {of_class}" if head.task.of_classes else f"the {of_class}"},
        facts={"target": of_class, "check": check, "score": score, **facts},
        arrays={"scores": scores},
        curve=None if curves is None else curves.to_dict(),
    )


def _of_tile_head(shared: Shared, tiles: TileEmbeddings) -> dict[str, Any]:
    assert shared.tile_head is not None
    made_of = shared.tile_head.made.get("encoder") or "an encoder that the head does not name"
    return {
        "model": f"linear layer on tile embeddings of {made_of}, classes {', '.join(shared.tile_head.classes)}",
        "trained": True,
        "head": "tiles",
        "head_sha256": shared.tile_head.sha256,
    }


def _classes(shared: Shared, tiles: TileEmbeddings) -> Iterator[Made]:
    assert shared.tile_head is not None
    shares = shared.tile_head.probabilities(tiles)
    yield Made(
        values=shares.argmax(axis=1),
        categories=shared.tile_head.classes,
        arrays={"probabilities": shares.astype(np.float32)},
    )


def _head(shared: Shared) -> FittedHead:
    assert shared.head is not None
    return shared.head


def _bag(tiles: TileEmbeddings) -> Bag:
    return Bag(np.asarray(tiles.features, dtype=np.float32), tiles.encoder_coords())


def _part(name: str) -> str:
    """A word that can be part of a file's name."""
    return plain_name(name)[:60]


KINDS = {
    "pca": Kind(
        _pca,
        _of_tiles,
        "rgb",
        "first three components, each from its 1st to its 99th percentile; share of variance: red {red:.0%}, "
        "green {green:.0%}, blue {blue:.0%}",
        "tile embeddings, principal components as red, green and blue",
        "each component from its 1st to its 99th percentile to 0..1",
        "fitted on all slides given{own}",
    ),
    "clusters": Kind(
        _clusters,
        _of_tiles,
        "categories",
        "k-means cluster",
        "tile embeddings in {count} clusters (k-means, seed {seed})",
        "none; the largest cluster of all slides is number 1",
        "fitted on all slides given",
    ),
    "similarity": Kind(
        _similarity,
        _of_tiles,
        "sequential",
        "cosine similarity",
        "similarity of tile embeddings to {target}",
        "cosine of the embeddings as stored, not centered",
    ),
    "attention": Kind(
        _attention,
        _of_encoder,
        "sequential",
        "attention weight x number of tokens (1 = even)",
        "attention of the slide encoder, layer {layer} of {depth}, {heads}, {query}",
        "drawn: weight x number of tokens; in the npz the weights themselves, of which tiles, class token and zero "
        "keys add up to 1 in each head, nothing renormalized",
    ),
    "rollout": Kind(
        _rollout,
        _of_encoder,
        "sequential",
        "rolled-out weight x number of tokens (1 = even)",
        "attention rollout over layers 1 to {depth}, a heuristic, {query}",
        "drawn: weight x number of tokens; each layer counts attention (mean of heads) and residual path half each, "
        "nothing renormalized",
    ),
    "head-attention": Kind(
        _head_attention,
        _of_head,
        "sequential",
        "attention weight x number of tiles (1 = even)",
        "attention of the fitted head (ABMIL)",
        "drawn: weight x number of tiles; in the npz the weights themselves, which add up to 1",
    ),
    "gradient": Kind(
        _gradient,
        _of_head,
        "diverging",
        "gradient x input, {score}",
        "contribution of each tile to {what} by gradient x input",
        "none; sum over the embedding of value times gradient",
    ),
    "occlusion": Kind(
        _occlusion,
        _of_head,
        "diverging",
        "score lost without the tile, {score}",
        "contribution of each tile to {what} by occlusion, left out {squares}",
        "none; tiles left out {squares}",
    ),
    "classes": Kind(
        _classes,
        _of_tile_head,
        "categories",
        "most probable class",
        "class of each tile by a head of tiles",
        "none; in the npz the probability of each class",
    ),
}
