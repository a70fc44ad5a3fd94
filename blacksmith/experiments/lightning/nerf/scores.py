"""How close a rendered picture is to the true one, both float [height, width, 3] in [0, 1].

LPIPS needs ImageNet weights, which are never downloaded; without them it is left out.
"""

import math
import os
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from blacksmith.errors import DataError
from blacksmith.files import cache_dir, file_sha256
from blacksmith.run.run import Run

PSNR_CAP = 100.0  # of identical pictures, instead of infinity
SSIM_WINDOW_PIXELS = 11
LPIPS_SMALLEST_PIXELS = 31

# torchvision's name of AlexNet's ImageNet weights; it ends with the start of their sha256.
ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_SHA256 = "7be5be79"


def psnr(
    render: Tensor | np.ndarray, truth: Tensor | np.ndarray, used: Tensor | np.ndarray | None = None
) -> float:
    """Peak signal-to-noise ratio in dB: -10 log10 of the mean squared error, at most `PSNR_CAP`.

    `used`, bool [height, width], are the pixels that count; None: all.
    """
    error = torch.as_tensor(render) - torch.as_tensor(truth)
    if used is not None:
        error = error[torch.as_tensor(used, device=error.device)]
    mean_squared = float(error.square().mean())
    return -10 * math.log10(max(mean_squared, 10 ** (-PSNR_CAP / 10)))


def ssim(render: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> float:
    """Structural similarity (Wang, Bovik, Sheikh and Simoncelli 2004), 1 for identical pictures.

    The paper's settings on each channel: a Gaussian window of 11x11 pixels with sigma 1.5, K1 = 0.01 and
    K2 = 0.03. The mean is over the pixels whose window lies inside the picture, as in scikit-image and
    TensorFlow.
    """
    _, similarity = structural_similarity_index_measure(
        _batch(render),
        _batch(truth),
        gaussian_kernel=True,
        sigma=1.5,
        kernel_size=SSIM_WINDOW_PIXELS,
        data_range=1.0,
        return_full_image=True,
    )
    # torchmetrics' own mean includes the border, for which it mirrors the picture; published figures do not.
    border = SSIM_WINDOW_PIXELS // 2
    return float(similarity[..., border:-border, border:-border].mean())


class Lpips(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 on AlexNet; 0 for identical pictures.

    The features of both pictures after each ReLU are normalized to unit length at every position. Their
    squared differences are weighted per channel, averaged over positions and summed over layers, with the
    published weights that torchmetrics ships. torchmetrics' own LPIPS would need torchvision too.
    """

    def __init__(self, alexnet: Path) -> None:
        super().__init__()
        # Numbered as in torchvision, whose weights are loaded here.
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, kernel_size=11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(64, 192, kernel_size=5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(kernel_size=3, stride=2),
            nn.Conv2d(192, 384, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(384, 256, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 256, kernel_size=3, padding=1),
            nn.ReLU(),
        )
        weights = torch.load(alexnet, map_location="cpu", weights_only=True)
        self.load_state_dict({k: v for k, v in weights.items() if k.startswith("features.")})
        learned = resources.files("torchmetrics.functional.image") / "lpips_models" / "alex.pth"
        with learned.open("rb") as stream:
            linear = torch.load(stream, map_location="cpu", weights_only=True)
        for layer in range(5):
            self.register_buffer(f"linear{layer}", linear[f"lin{layer}.model.1.weight"].view(-1, 1, 1))
        # ImageNet's mean and standard deviation for inputs in [-1, 1].
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, render: Tensor | np.ndarray, truth: Tensor | np.ndarray) -> float:
        """The distance of two pictures of at least `LPIPS_SMALLEST_PIXELS`, on any device."""
        x = torch.cat([_batch(render), _batch(truth)]).to(self.shift)
        x = (2 * x - 1 - self.shift) / self.scale
        distance, layer = torch.zeros((), device=x.device), 0
        for module in self.features:
            x = module(x)
            if isinstance(module, nn.ReLU):
                # As in torchmetrics; the authors add 1e-10 outside the root, which differs for tiny features.
                unit = x / (x.square().sum(1, keepdim=True) + 1e-8).sqrt()
                difference = (unit[0] - unit[1]).square()
                distance = distance + (difference * self.get_buffer(f"linear{layer}")).sum(0).mean()
                layer += 1
        return float(distance)


def find_lpips(run: Run) -> Lpips | None:
    """LPIPS, if its weights are present; raises DataError if the configuration names a wrong file."""
    path = find_lpips_weights(run.config.results.lpips_weights)
    return None if path is None else Lpips(path).to(run.device)


def find_lpips_weights(path: str | None = None) -> Path | None:
    """The file of AlexNet's ImageNet weights: `path`, or `ALEXNET_FILE` in our cache or that of `torch.hub`.

    Raises:
      DataError: the file at `path` cannot be read or has the wrong hash.
    """
    if path is None:
        folders = (cache_dir() / "lpips", Path(torch.hub.get_dir()) / "checkpoints")
        files = (folder / ALEXNET_FILE for folder in folders)
        return next((f for f in files if f.is_file() and file_sha256(f).startswith(ALEXNET_SHA256)), None)
    given = Path(os.path.expanduser(path))
    try:
        digest = file_sha256(given)
    except OSError as error:
        raise DataError(f"LPIPS weights: cannot read {path}: {error.strerror or error}") from error
    if not digest.startswith(ALEXNET_SHA256):
        raise DataError(
            f"LPIPS weights: {path} has sha256 {digest[:8]}..., but torchvision's {ALEXNET_FILE} has "
            f"{ALEXNET_SHA256}..."
        )
    return given


def _batch(picture: Tensor | np.ndarray) -> Tensor:
    """[height, width, 3] as a batch of one, float32 [1, 3, height, width]."""
    return torch.as_tensor(picture).float().permute(2, 0, 1)[None]
