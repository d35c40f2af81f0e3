"""What is trained: the classifier on the slide encoder, gated attention over tokens or tiles, a layer on vectors; and
how much of an encoder: low-rank adapters (LoRA, Hu et al. 2021), its last blocks, or all of it.

Each head offers `forward_packed(features (T, D), coords (T, 2), lengths) -> logits (B, C)` and
`parameter_groups(learning_rate, weight_decay, layer_decay, published=)`. An adapter adds alpha / r * B A to the weight
W (out, in) of a layer, A (r, in) drawn, B (out, r) zero at first; W is kept. peft is imported where it is asked for.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import timm
import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from gigapath.classification_head import ClassificationHead
from gigapath.devices import send
from gigapath.evaluation.labels import Task
from gigapath.finetune.data import Bag
from gigapath.finetune.options import ModelOptions
from gigapath.slide_encoder import ARCHITECTURES, WEIGHTS_FILE, LongNetViT, is_architecture, layer_id
from gigapath.weights import find_weights, load_state_dict

ATTENTION_WIDTH = 256  # of the gate
EMBEDDING_WIDTH = 512  # of tiles in ABMIL without a slide encoder


class GatedAttention(nn.Module):
    """Attention-based pooling with a gate (Ilse, Tomczak and Welling 2018, equation 9).

    a_k = softmax over the tiles of w^T (tanh(V h_k) * sigmoid(U h_k)); the bag's vector is sum_k a_k h_k.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.values = nn.Linear(width, ATTENTION_WIDTH)
        self.gates = nn.Linear(width, ATTENTION_WIDTH)
        self.scores = nn.Linear(ATTENTION_WIDTH, 1, bias=False)  # softmax knows no offset

    def forward(self, tiles: Tensor, lengths: Sequence[int]) -> Tensor:
        """Pool (T, width), the tiles of B bags one after another, to (B, width)."""
        bags = torch.split(tiles, list(lengths))
        pairs = zip(self.weights(tiles, lengths), bags, strict=True)
        return torch.stack([(weight.to(bag.dtype) * bag).sum(dim=0) for weight, bag in pairs])

    def weights(self, tiles: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """a_k of each bag, (tiles of the bag, 1), float32; they sum to 1."""
        scores = self.scores(torch.tanh(self.values(tiles)) * torch.sigmoid(self.gates(tiles))).float()
        return [torch.softmax(part, dim=0) for part in torch.split(scores, list(lengths))]


class OneRate(nn.Module):
    """A model whose parameters all have one rate."""

    def parameter_groups(
        self, learning_rate: float, weight_decay: float, layer_decay: float, *, published: bool = False
    ) -> list[dict[str, Any]]:
        """Two groups for AdamW of one rate: decayed (two dimensions and more) and not."""
        groups = []
        for name, decayed in (("decay", True), ("no_decay", False)):
            params = [p for p in self.parameters() if p.requires_grad and (p.ndim > 1) == decayed]
            decay = weight_decay if decayed else 0.0
            groups.append({"name": name, "params": params, "lr": learning_rate, "lr_scale": 1.0, "weight_decay": decay})
        return groups


class TileAttention(OneRate):
    """ABMIL on tile embeddings, without a slide encoder."""

    def __init__(self, input_dim: int, n_classes: int) -> None:
        super().__init__()
        self.embedding = nn.Sequential(nn.Linear(input_dim, EMBEDDING_WIDTH), nn.ReLU())
        self.attention = GatedAttention(EMBEDDING_WIDTH)
        self.classifier = nn.Sequential(nn.Linear(EMBEDDING_WIDTH, n_classes))

    def forward_packed(self, images: Tensor, coords: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (B, C) of bags (T, D); the coordinates play no part."""
        logits: Tensor = self.classifier(self.attention(self.embedding(images), lengths))
        return logits


class TokenAttention(ClassificationHead):
    """The slide encoder with gated attention over the tile tokens of the chosen states instead of one token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.attention = GatedAttention(self.feat_dim)
        self.frozen = not any(p.requires_grad for p in self.slide_encoder.parameters())

    def train(self, mode: bool = True) -> "TokenAttention":
        """Training mode for what is trained; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.slide_encoder.eval()
        return self

    def forward_packed(self, images: Tensor, coords: Tensor, lengths: Any) -> Tensor:
        """Logits (B, C) of slides given one after another."""
        encoder = self.slide_encoder
        states = encoder.forward_packed(
            images, coords, lengths, all_layer_embed=True, pool=lambda tokens, lengths: tokens
        )
        is_tile = torch.ones(states[0].shape[1], dtype=torch.bool, device="cpu")
        tiles_of = [int(length) for length in lengths]
        is_tile[np.cumsum([0, *(count + 1 for count in tiles_of)])[:-1]] = False
        rows = send(is_tile.nonzero()[:, 0], states[0].device)
        tiles = torch.cat([encoder.norm(states[i][0].index_select(0, rows)) for i in self.feat_layer], dim=-1)
        logits: Tensor = self.classifier(self.attention(tiles, tiles_of))
        return logits


class VectorHead(OneRate):
    """One linear layer on one vector a slide."""

    def __init__(self, width: int, n_classes: int, *, grades: bool = False) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(width, n_classes), *([CumulativeLogits()] if grades else []))

    def forward_packed(self, images: Tensor, coords: Tensor, lengths: Sequence[int]) -> Tensor:
        """Logits (B, C) of vectors (B, D)."""
        logits: Tensor = self.classifier(images)
        return logits


class CumulativeLogits(nn.Module):
    """Log-probabilities of C grades from C - 1 outputs o: the log-odds of a grade above k are o_0 less the softplus of
    o_1 to o_k, so that they fall (McCullagh 1980; the steps may differ from slide to slide)."""

    def forward(self, outputs: Tensor) -> Tensor:
        """(B, C - 1) to (B, C)."""
        outputs = outputs if outputs.dtype == torch.float64 else outputs.float()
        steps = outputs[:, 1:]
        above = outputs[:, :1] - F.pad(torch.cumsum(F.softplus(steps), dim=1), (1, 0))  # (B, C - 1)
        # A grade's share is a difference of sigmoids:
        # sigmoid(a) - sigmoid(a - softplus(s)) = sigmoid(a) sigmoid(softplus(s) - a) sigmoid(s).
        of_steps = F.pad(F.logsigmoid(steps), (1, 1))
        return F.pad(F.logsigmoid(above), (1, 0)) + F.pad(F.logsigmoid(-above), (0, 1)) + of_steps


def build_head(options: ModelOptions, task: Task, *, pretrained: str, input_dim: int) -> Any:
    """The model that the options describe, with the outputs of a task (of grades log-probabilities); its own weights
    are drawn from torch's generator.

    Args:
        pretrained: weights of the slide encoder: "hf_hub:REPO", a file, "" for random ones.

    Raises:
        ValueError: features that the weights can't take, an architecture that timm does not know.
    """
    model: Any
    if options.head == "abmil-tiles":
        model = TileAttention(input_dim, task.outputs)
    else:
        if pretrained:  # the checkpoint is mapped, not read
            projection = load_state_dict(find_weights(pretrained, WEIGHTS_FILE)).get("patch_embed.proj.weight")
            if projection is not None and (width := projection.shape[-1]) != input_dim:
                raise ValueError(
                    f"--features: expected embeddings of width {width}, which the slide encoder of --pretrained takes, "
                    f"got {input_dim}. Take the slide encoder that belongs to their tile encoder."
                )
        if not is_architecture(options.model_arch):
            raise ValueError(
                f"--model-arch: expected {', '.join(ARCHITECTURES)}, got {options.model_arch!r}. Choose one of these, "
                "or register your own with timm."
            )
        with torch.device("meta"):  # its width, without its memory
            sketch: Any = timm.create_model(options.model_arch, pretrained=False, in_chans=8)
        kind = TokenAttention if options.head == "abmil" else ClassificationHead
        model = kind(
            input_dim=input_dim,
            latent_dim=sketch.embed_dim,
            feat_layer=options.feat_layer,
            n_classes=task.outputs,
            model_arch=options.model_arch,
            pretrained=pretrained,
            freeze=options.adapt == "head",
            global_pool=options.global_pool,
            dropout=options.dropout,
            drop_path_rate=options.drop_path_rate,
            max_wsi_size=options.max_wsi_size,
            checkpoint_activations=options.checkpoint_activations,
        )
    if task.setting == "ordinal":
        model.classifier.append(CumulativeLogits())
    return model


def adapt(encoder: nn.Module, options: ModelOptions) -> None:
    """Leave to training what the options say, in place.

    Adapters lie on every linear layer and every plain convolution but the embedding of patches; of the slide encoder on
    q, k, v, out and both layers of the FFN.

    Raises:
        ValueError: timm does not say which parameters are the last blocks.
    """
    if options.adapt == "full":
        return
    encoder.requires_grad_(False)
    if options.adapt == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        # Convolutions that pad or scale their weights themselves, which types of their own do, can't be merged with
        # theirs; grouped ones have too few inputs a channel for a rank.
        layers = [
            name
            for name, module in encoder.named_modules()
            if not name.startswith("patch_embed")
            and (isinstance(module, nn.Linear) or (type(module) is nn.Conv2d and module.groups == 1))
        ]
        config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=options.lora_dropout,
            target_modules=layers,
        )
        inject_adapter_in_model(config, encoder)
    elif options.adapt == "last":
        if isinstance(encoder, LongNetViT):
            ids = {name: min(layer_id(name, encoder.depth), encoder.depth) for name, _ in encoder.named_parameters()}
        elif hasattr(encoder, "group_matcher"):
            ids = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
        else:
            raise ValueError("--adapt last: expected an encoder whose blocks timm knows. Take --adapt lora.")
        chosen = sorted(set(ids.values()))[-options.last_blocks :]  # with what stands behind them
        for name, parameter in encoder.named_parameters():
            parameter.requires_grad_(ids[name] in chosen)


def merge(model: nn.Module) -> None:
    """Add each adapter to the weights of its layer, and put the layer back in its place: an ordinary model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


def cache_states(
    head: ClassificationHead, rows: Sequence[int], bags: Iterable[Bag], device: torch.device
) -> dict[int, npt.NDArray[np.float32]]:
    """The chosen states of a frozen slide encoder, in eval mode, side by side: row -> (feat_dim,)."""
    head.eval()
    cached = {}
    with torch.no_grad():
        for row, bag in zip(rows, bags, strict=True):
            features, coords, lengths = pack([bag], device)
            states = head.slide_encoder.forward_packed(features, coords, lengths, all_layer_embed=True)
            chosen = torch.cat([states[i] for i in head.feat_layer], dim=-1)
            cached[row] = chosen[0].float().cpu().numpy()
    return cached


class Packed(NamedTuple):
    """Bags one after another in the host's memory: features (T, D), coords (T, 2), and the tiles of each."""

    features: Tensor
    coords: Tensor
    lengths: list[int]


def pack_on_host(bags: Sequence[Bag], dtype: torch.dtype = torch.float32, *, pinned: bool = False) -> Packed:
    """Bags one after another; `pinned` in memory that a GPU copies from by itself."""
    features = torch.from_numpy(np.concatenate([bag.features for bag in bags])).to(dtype)
    coords = torch.from_numpy(np.concatenate([bag.coords for bag in bags]))
    return Packed(features.pin_memory() if pinned else features, coords, [len(bag) for bag in bags])


def pack(
    bags: Sequence[Bag] | Packed, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, list[int]]:
    """(features (T, D) on the device, coords (T, 2) in the host's memory, lengths) of bags one after another; those
    that are packed keep their dtype."""
    packed = bags if isinstance(bags, Packed) else pack_on_host(bags, dtype)
    return send(packed.features, device), packed.coords, packed.lengths
