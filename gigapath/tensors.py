"""One tensor from a `.pt` file, without running what a pickle may hold."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray


def read_tensor(path: Path | str) -> NDArray[np.floating]:
    """The tensor of a `.pt` file as an array of its own floating type (bfloat16, which numpy lacks, as float32).

    Hand it to `gigapath.read_features` as `read_tensor` for slide2vec's `.pt` files.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a file of one tensor of floats; one sentence that names it.
    """
    import torch  # takes seconds, which only `.pt` files need

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises a dozen types for damaged files
        reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
        raise ValueError(f"{path.name}: expected a .pt file of one tensor, could not be read ({reason}).") from error
    if not isinstance(held, torch.Tensor) or not held.is_floating_point():
        what = f"one of {held.dtype}" if isinstance(held, torch.Tensor) else type(held).__name__
        raise ValueError(f"{path.name}: expected a .pt file of one tensor of floats, got {what}.")
    return np.asarray((held.float() if held.dtype == torch.bfloat16 else held).numpy())
