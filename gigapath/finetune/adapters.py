"""What is trained of an encoder, of slides or of tiles: low-rank adapters (LoRA, Hu et al. 2021) or its last blocks.

An adapter adds alpha / r * B A to the weight W (out, in) of a layer, A (r, in) drawn, B (out, r) zero at first; W is
kept. peft lays the adapters, and is imported where they are asked for alone.
"""

from timm.models import group_parameters
from torch import nn

from gigapath.finetune.options import AdapterOptions
from gigapath.slide_encoder import LongNetViT, layer_id


def adapt(encoder: nn.Module, options: AdapterOptions) -> None:
    """Leave to training what the options say, in place.

    Raises:
        ValueError: timm does not say which parameters are the last blocks.
    """
    if options.adapt == "full":
        return
    encoder.requires_grad_(False)
    if options.adapt == "lora":
        from peft import LoraConfig, inject_adapter_in_model

        config = LoraConfig(
            r=options.lora_rank,
            lora_alpha=options.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=options.lora_dropout,
            target_modules=adapted_layers(encoder),
        )
        inject_adapter_in_model(config, encoder)
    elif options.adapt == "last":
        for parameter in last_parameters(encoder, options.last_blocks):
            parameter.requires_grad_(True)


def adapted_layers(encoder: nn.Module) -> list[str]:
    """Names of the layers that get adapters: every linear layer and every plain convolution but the embedding of
    patches; of the slide encoder q, k, v, out and both layers of the FFN.

    Convolutions that pad or scale their weights themselves, which types of their own do, can't be merged with theirs;
    grouped ones have too few inputs a channel for a rank.
    """
    return [
        name
        for name, module in encoder.named_modules()
        if not name.startswith("patch_embed")
        and (isinstance(module, nn.Linear) or (type(module) is nn.Conv2d and module.groups == 1))
    ]


def last_parameters(encoder: nn.Module, blocks: int) -> list[nn.Parameter]:
    """The parameters of the last blocks and of what stands behind them."""
    if isinstance(encoder, LongNetViT):
        ids = {name: min(layer_id(name, encoder.depth), encoder.depth) for name, _ in encoder.named_parameters()}
    elif hasattr(encoder, "group_matcher"):
        ids = group_parameters(encoder, encoder.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    else:
        raise ValueError("--adapt last: expected an encoder whose blocks timm knows. Take --adapt lora.")
    chosen = sorted(set(ids.values()))[-blocks:]
    return [parameter for name, parameter in encoder.named_parameters() if ids[name] in chosen]


def merge(model: nn.Module) -> None:
    """Add each adapter to the weights of its layer, and put the layer back in its place: an ordinary model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())
