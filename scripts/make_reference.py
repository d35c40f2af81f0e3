"""Make `reference.npz` for `gigapath doctor --verify --reference`, in the environment of the PUBLISHED package.

    python make_reference.py hf_hub:prov-gigapath/prov-gigapath --out reference.npz

It needs nothing of this repository: copy the file there. Only `create_model` and `forward` are used. The published
package computes on a GPU, in half precision. Inputs are seeded, so the file holds answers alone.
"""

import argparse
import hashlib
import json

import numpy as np
import torch

import gigapath.slide_encoder

GRID = 150  # cells of a side
POOLINGS = {"mean": True, "class": False}


def made_inputs(seed, length, in_chans):
    """Tile embeddings (L, in_chans) float32, and (x, y) (L, 2) float32, row by row, in the last pixel of each cell."""
    random = np.random.RandomState(seed)  # its numbers are the same in every version of NumPy
    x = random.standard_normal((length, in_chans)).astype(np.float32)
    cells = np.sort(random.choice(GRID * GRID, length, replace=False))
    return x, np.stack([cells % GRID, cells // GRID], axis=1).astype(np.float32) * 256 + 255


def main(argv=None):
    """Read the command line, ask the package, write the file."""
    parser = argparse.ArgumentParser(description="Make reference.npz with the published package.")
    parser.add_argument("weights", help="hf_hub:REPO, or slide_encoder.pth")
    parser.add_argument("--arch", default="gigapath_slide_enc12l768d")
    parser.add_argument("--in-chans", type=int, default=1536)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1, 7, 300, 1100, 6000])
    parser.add_argument("--precision", choices=["fp32", "fp16", "bf16"], default="fp16")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default="reference.npz")
    words = parser.parse_args(argv)

    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(words.precision)
    arrays, cases, digests = {}, [], {}
    for pooling, global_pool in POOLINGS.items():
        model = gigapath.slide_encoder.create_model(words.weights, words.arch, words.in_chans, global_pool=global_pool)
        model = model.to(words.device).eval()
        for name, value in model.state_dict().items():
            if name != "pos_embed":
                digests[name] = hashlib.sha256(value.float().cpu().contiguous().numpy().tobytes()).hexdigest()
        for seed, length in enumerate(words.lengths):
            x, coords = made_inputs(seed, length, words.in_chans)
            tensors = [torch.from_numpy(a)[None].to(words.device) for a in (x, coords)]
            with torch.inference_mode(), torch.autocast(words.device.split(":")[0], dtype, enabled=dtype is not None):
                states = model(*tensors, all_layer_embed=True)
                default = model(*tensors)
            arrays[f"{length}/states_{pooling}"] = torch.cat(list(states)).float().cpu().numpy()
            arrays[f"{length}/default_{pooling}"] = default[0].float().cpu().numpy()
            if pooling == "mean":
                inputs = hashlib.sha256(x.tobytes() + coords.tobytes()).hexdigest()
                cases.append({"seed": seed, "length": length, "inputs_sha256": inputs})
    facts = {"arch": words.arch, "in_chans": words.in_chans, "precision": words.precision, "cases": cases}
    facts["torch"] = torch.__version__
    facts["implementation"] = getattr(gigapath, "__implementation__", "published")
    np.savez(words.out, facts=json.dumps(facts), weights=json.dumps(digests), **arrays)
    print(f"{len(cases)} lengths, {len(digests)} weights, written to {words.out}.")


if __name__ == "__main__":
    main()
