"""Fine-tuning on a made task in a minute: python demo/finetune_planted.py [OUT]

Both classes hold the same kinds of tiles on the same cells; only who sits where differs. A small slide encoder learns
it from scratch; the mean of the tile embeddings, printed beside, can't. The features are written as feature files and
the labels as a CSV, so that the folder also shows what `gigapath finetune` reads and leaves.
"""

import csv
import sys
from pathlib import Path

import h5py
import numpy as np
from timm.models import register_model

from gigapath.cli.progress import Terminal
from gigapath.finetune import Inputs, ModelOptions, Settings, SplitOptions, TrainingOptions, finetune
from gigapath.slide_encoder import LongNetViT

SLIDES, SIDE, WIDTH = 180, 6, 8


@register_model
def demo_slide_enc2l64d(**kwargs) -> LongNetViT:
    """A slide encoder small enough for a laptop: 2 layers, width 64."""
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    return LongNetViT(**{"embed_dim": 64, "depth": 2, **kwargs})


def main(out: Path) -> None:
    """Write the cohort, fine-tune on it, and print where to look."""
    random = np.random.default_rng(0)
    cells = np.stack(np.meshgrid(np.arange(SIDE), np.arange(SIDE)), axis=-1).reshape(-1, 2)  # (column, row)
    left = cells[:, 0] < SIDE // 2
    (out / "features").mkdir(parents=True, exist_ok=True)
    with (out / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["slide_id", "label"])
        for number in range(SLIDES):
            label = number % 2
            features = random.standard_normal((len(cells), WIDTH)).astype(np.float32)
            features[:, 0] += np.where(left == (label == 0), 2, -2)
            with h5py.File(out / "features" / f"slide-{number:03d}.h5", "w") as slide:
                slide["features"] = features
                slide["coords"] = cells * 256
                slide["coords"].attrs["patch_size_level0"] = 256
            table.writerow([f"slide-{number:03d}", label])
    (out / "task.yaml").write_text("name: arrangement\nsetting: binary\nlabel_dict: {0: 0, 1: 1}\n")
    finetune(
        Inputs(str(out / "task.yaml"), str(out / "features"), str(out / "labels.csv"), pretrained=""),
        out / "run",
        Settings(
            split=SplitOptions(folds=3),
            model=ModelOptions(model_arch="demo_slide_enc2l64d", feat_layer="2", dropout=0.0, global_pool=True),
            training=TrainingOptions(
                epochs=6, batch_size=8, gradient_accumulation=1, base_lr=0.064, layer_decay=1.0, device="cpu"
            ),
            controls=True,
        ),
        watch=Terminal(),
    )
    print(f"Predictions, pictures and the fitted heads are in {out / 'run'}.")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "outputs/planted"))
