"""The linear layer of the encoder."""

from torch import nn


class Linear(nn.Linear):
    """A linear layer that starts with Xavier-uniform weights and zero biases, written once."""

    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        nn.init.xavier_uniform_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
