"""Volume rendering: rays of a camera, compositing of samples along rays, whole pictures in chunks.

Samples of a bundle of rays are flat arrays, so that each ray can have a different number of them.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from blacksmith.datasets.blender.cameras import Camera

OPAQUE = 40.0  # optical thickness that counts as opaque: what lies behind has a weight of 4e-18
CHUNK_RAYS = 16384  # number of a picture's rays that are rendered at a time


class Rendered(NamedTuple):
    """Rendered rays; the leading axes are those of the rays."""

    rgb: Tensor  # float32 [..., 3], over the background; may leave [0, 1] if the colors of the field do
    opacity: Tensor  # float32 [...], the sum of the weights; 0 for an empty ray
    depth: Tensor  # float32 [...], the expected distance at which the ray ends; 0 for an empty ray


def not_finite(rendered: Rendered) -> str | None:
    """What is not finite in a picture, and in how many pixels; None if all is."""
    for name, values in zip(Rendered._fields, rendered):
        pixels = values.isfinite() if values.dim() < 3 else values.isfinite().all(-1)
        if not pixels.all():
            return f"{name} is not finite in {int((~pixels).sum()):,} of {pixels.numel():,} pixels"
    return None


class Samples(NamedTuple):
    """Samples of a bundle of rays, ordered by ray and then by distance; lengths are in world units."""

    ray: Tensor  # int64 [samples], the ray of each sample
    distance: Tensor  # float32 [samples], from the ray's origin
    length: Tensor | float  # of the segment that a sample represents: float32 [samples] or one number

    def take(self, kept: Tensor) -> "Samples":
        """The samples at bool or int64 `kept`, if all have one length."""
        return Samples(self.ray[kept], self.distance[kept], self.length)


class Traced(NamedTuple):
    """A bundle of rays followed through a field, with gradients."""

    rgb: Tensor  # color without background, float32 [rays, 3]
    opacity: Tensor  # float32 [rays]
    weights: Tensor  # float32 [samples]
    samples: Samples  # those with a color, to which the weights belong
    num_samples: int  # how many have a density with a gradient

    def over(self, background: Tensor) -> Tensor:
        """Colors over a background, float32 [3] or [rays, 3]: float32 [rays, 3]."""
        return self.rgb + (1 - self.opacity[:, None]) * background

    def rendered(self, background: Tensor) -> Rendered:
        """The rays over a background, float32 [3]."""
        depth = expected_depth(self.weights, self.samples, self.opacity)
        return Rendered(self.over(background), self.opacity, depth)


def transmittance(thickness: Tensor, ray: Tensor, rays: int) -> tuple[Tensor, Tensor]:
    """The light that reaches each sample, and the fraction of it that the sample absorbs.

    T_i = exp(-sum_{j<i} tau_j) over the samples of the same ray, and alpha_i = 1 - exp(-tau_i): equation 3 of
    Mildenhall et al., NeRF (2020). The weight of sample i is T_i alpha_i.

    Args:
      thickness: tau = density * length, not negative, float32 [samples] like T and alpha.
      ray: int64 [samples], not decreasing.
      rays: number of rays.
    """
    # Without the clamp, one huge tau (the last sample of a ray may be 1e10 long) would swamp the sum below.
    thickness = thickness.clamp(max=OPAQUE)
    before = _sum_before(thickness, ray, rays)
    # expm1 keeps the digits of a small tau, which 1 - exp(-tau) would lose.
    return torch.exp((-before).float()), -torch.expm1(-thickness)


def _sum_before(values: Tensor, ray: Tensor, rays: int) -> Tensor:
    """The sums of the values of earlier samples of the same ray, float64 [samples]."""
    # One cumulative sum over all rays, less its value where each ray starts, is the sum within the ray: a
    # fixed number of kernels for rays of any length. In float64, because it grows over the whole bundle.
    before = values.double().cumsum(0) - values
    first = torch.ones_like(ray, dtype=torch.bool)
    first[1:] = ray[1:] != ray[:-1]
    start = before.new_zeros(rays).index_put((ray[first],), before[first])
    return before - start[ray]


def sum_along_rays(values: Tensor, ray: Tensor, rays: int) -> Tensor:
    """Adds up [samples, ...] values ray by ray: [rays, ...]."""
    return values.new_zeros(rays, *values.shape[1:]).index_add(0, ray, values)


def expected_depth(weights: Tensor, samples: Samples, opacity: Tensor) -> Tensor:
    """The mean distance at which rays end, float32 [rays]; 0 for rays that pass through."""
    depth = sum_along_rays(weights * samples.distance, samples.ray, len(opacity))
    return torch.where(opacity > 1e-4, depth / opacity.clamp(min=1e-4), torch.zeros_like(depth))


def distortion(weights: Tensor, samples: Samples, rays: int, scale: float) -> Tensor:
    """How spread out the weights are along each ray, float32 [rays].

    sum_ij w_i w_j |s_i - s_j| + 1/3 sum_i w_i^2 l_i, equation 15 of Barron et al., Mip-NeRF 360 (2022), with
    distances s and lengths l divided by `scale`.
    """
    # Samples are sorted, so for j < i |s_i - s_j| = s_i - s_j, and the double sum becomes
    # 2 sum_i w_i (s_i sum_{j<i} w_j - sum_{j<i} w_j s_j): linear time with two cumulative sums.
    weight, place = weights.double(), samples.distance.double() / scale
    lighter = _sum_before(weight, samples.ray, rays)
    between = 2 * weight * (place * lighter - _sum_before(weight * place, samples.ray, rays))
    within = weight.square() * samples.length / (3 * scale)
    return sum_along_rays((between + within).float(), samples.ray, rays)


class RadianceField(Protocol):
    """What pictures, videos, meshes and the viewer need of a trained field."""

    bounds: Tensor
    """float32 [2, 3]: the lower and the upper corner of the box that holds the scene, in world units."""

    unit: float
    """The length in world units for which opacities are given."""

    def render(
        self, origins: Tensor, directions: Tensor, background: Tensor, *, quality: float = 1.0
    ) -> Rendered:
        """Renders rays, given by origins and unit directions [rays, 3], over a background [3].

        `quality` scales the number of samples: below 1 is faster and coarser.
        """

    def density(self, points: Tensor) -> Tensor:
        """Extinction per world unit, float32 [points], at world positions float32 [points, 3]; 0 outside."""

    def color(self, points: Tensor, directions: Tensor) -> Tensor:
        """Colors in [0, 1] of world positions seen along unit directions: all float32 [points, 3]."""


def rays_through(x: Tensor, y: Tensor, pose: Tensor) -> tuple[Tensor, Tensor]:
    """Origins and unit directions, float32 [rays, 3], in world coordinates.

    The rays of a camera with this pose, [3, 4] or [rays, 3, 4], go through points x, [rays], to the right and
    y downwards in the plane at distance 1.
    """
    local = torch.stack([x, -y, -torch.ones_like(x)], -1)
    # Not a matrix product: autocast would compute it in half precision, which moves rays by pixels.
    directions = torch.nn.functional.normalize((pose[..., :3] * local[:, None, :]).sum(-1), dim=-1)
    return pose[..., 3].expand_as(directions), directions


def camera_rays(camera: Camera, pixels: Tensor, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Origins and unit directions, float32 [rays, 3], through pixels row * width + column, int64 [rays]."""
    pixels = pixels.to(device)
    x = (pixels % camera.width + 0.5 - camera.center[0]) / camera.focal[0]
    y = (pixels.div(camera.width, rounding_mode="floor") + 0.5 - camera.center[1]) / camera.focal[1]
    return rays_through(x, y, torch.as_tensor(camera.pose, device=device))


@torch.no_grad()
def render_image(field: RadianceField, camera: Camera, background: Tensor) -> Rendered:
    """Renders one picture, [height, width] rays, on the field's device."""
    device = field.bounds.device
    parts = []
    for pixels in torch.arange(camera.height * camera.width).split(CHUNK_RAYS):
        parts.append(field.render(*camera_rays(camera, pixels, device), background.to(device)))
    rgb, opacity, depth = (torch.cat(part) for part in zip(*parts))
    shape = (camera.height, camera.width)
    return Rendered(rgb.view(*shape, 3), opacity.view(shape), depth.view(shape))
