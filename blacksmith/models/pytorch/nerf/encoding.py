"""Positional encoding."""

import torch
from torch import Tensor


def positional_encoding(values: Tensor, frequencies: int) -> Tensor:
    """The values, [..., d], then sin and cos of 2^k times them for k < `frequencies`: [..., `encoded_size`].

    Equation 4 of Mildenhall et al., NeRF (2020), without its factor of pi, as in the authors' code.
    """
    scale = 2.0 ** torch.arange(frequencies, device=values.device, dtype=values.dtype)
    angles = values[..., None, :] * scale[:, None]
    waves = torch.stack([torch.sin(angles), torch.cos(angles)], -2)
    return torch.cat([values, waves.flatten(-3)], -1)


def encoded_size(size: int, frequencies: int) -> int:
    """Width of the encoding of `size` values."""
    return size * (1 + 2 * frequencies)
