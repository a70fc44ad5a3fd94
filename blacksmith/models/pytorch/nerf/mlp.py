"""The radiance field of the paper: two networks of eight layers, sampled coarse and then fine.

Mildenhall et al., NeRF: Representing Scenes as Neural Radiance Fields for View Synthesis (2020), with the
layers, encodings and initial weights of the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blacksmith.models.pytorch.nerf.encoding import encoded_size, positional_encoding
from blacksmith.models.pytorch.nerf.rendering import (
    Rendered,
    Samples,
    Traced,
    sum_along_rays,
    transmittance,
)

FAR_AWAY = 1e10  # length that the last sample of a ray represents: the rest of the ray


class Network(nn.Module):
    """Density and color of points seen along directions: the paper's figure 7.

    Args:
      width: of the hidden layers; the last one, which also reads the direction, has half of it.
      depth: hidden layers before the density; the middle one also reads the encoded position.
      position_frequencies: octaves in the encoding of the position.
      direction_frequencies: the same of the direction.
    """

    def __init__(
        self,
        width: int = 256,
        depth: int = 8,
        position_frequencies: int = 10,
        direction_frequencies: int = 4,
    ) -> None:
        super().__init__()
        self.position_frequencies = position_frequencies
        self.direction_frequencies = direction_frequencies
        self.skip = depth // 2 + 1
        place, direction = encoded_size(3, position_frequencies), encoded_size(3, direction_frequencies)
        inputs = [place, *[width] * (depth - 1)]
        if self.skip < depth:
            inputs[self.skip] += place
        self.layers = nn.ModuleList(nn.Linear(size, width) for size in inputs)
        self.to_density = nn.Linear(width, 1)
        self.bottleneck = nn.Linear(width, width)
        self.directed = nn.Linear(width + direction, width // 2)
        self.to_color = nn.Linear(width // 2, 3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, points: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Density, float32 [...], and color, float32 [..., 3], at points and unit directions [..., 3]."""
        hidden, density = self._trunk(points)
        encoded = positional_encoding(directions, self.direction_frequencies)
        directed = F.relu(self.directed(torch.cat([self.bottleneck(hidden), encoded], -1)))
        return density, torch.sigmoid(self.to_color(directed).float())

    def density(self, points: Tensor) -> Tensor:
        """Density only, float32 [...]."""
        return self._trunk(points)[1]

    def _trunk(self, points: Tensor) -> tuple[Tensor, Tensor]:
        place = positional_encoding(points, self.position_frequencies)
        hidden = place
        for number, layer in enumerate(self.layers):
            if number == self.skip:
                hidden = torch.cat([place, hidden], -1)
            hidden = F.relu(layer(hidden))
        return hidden, F.relu(self.to_density(hidden)[..., 0].float())


class MlpField(nn.Module):
    """The coarse network on stratified samples, and the fine one with more of them where that sees matter.

    Two buffers are to be set: `near_far`, the distances between which rays have samples, in world units, and
    `bounds`, which only meshes and the viewer use.
    """

    def __init__(self, *, coarse_samples: int = 64, fine_samples: int = 128, **network: int) -> None:
        super().__init__()
        self.coarse_samples, self.fine_samples = coarse_samples, fine_samples
        self.register_buffer("bounds", torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.register_buffer("near_far", torch.tensor([0.0, 1.0]))
        self.coarse = Network(**network)
        self.fine = Network(**network)

    @property
    def unit(self) -> float:
        """A 96th of the box, for which opacities are given."""
        return float((self.bounds[1] - self.bounds[0]).mean()) / 96

    def trace(
        self,
        origins: Tensor,
        directions: Tensor,
        generator: torch.Generator | None = None,
        quality: float = 1.0,
    ) -> tuple[Traced, Traced]:
        """Follows rays, origins and unit directions [rays, 3], through the coarse and the fine network.

        The generator draws the samples within their strata; without one they are in the middle. `quality`
        scales the numbers of samples.
        """
        count = max(3, round(self.coarse_samples * quality))
        edges = torch.linspace(0, 1, count + 1, device=origins.device)
        near, far = self.near_far
        shape = (len(origins), count)
        # One sample in each of `count` equal strata from near to far (equation 2).
        if generator is None:
            within = torch.full(shape, 0.5, device=origins.device)
        else:
            within = torch.rand(shape, generator=generator, device=origins.device)
        distance = near + (far - near) * (edges[:-1] + within / count)
        coarse = self._composite(self.coarse, origins, directions, distance)
        more = max(1, round(self.fine_samples * quality))
        # A weight belongs to the piece between the middles on either side of its sample; the two at the ends
        # have a middle on one side only and are left out. No gradient flows through where samples are taken.
        middles = (distance[:, 1:] + distance[:, :-1]) / 2
        weights = coarse.weights.detach().view(shape)[:, 1:-1]
        extra = sample_pdf(middles, weights, more, generator)
        distance = torch.cat([distance, extra], 1).sort(1).values
        return coarse, self._composite(self.fine, origins, directions, distance)

    @torch.no_grad()
    def render(
        self, origins: Tensor, directions: Tensor, background: Tensor, *, quality: float = 1.0
    ) -> Rendered:
        """Renders rays; see `RadianceField`."""
        parts = []
        # With 192 samples per ray and 256 numbers per layer, memory allows only some rays at a time.
        for some in torch.arange(len(origins), device=origins.device).split(1024):
            _, fine = self.trace(origins[some], directions[some], quality=quality)
            parts.append(fine.rendered(background))
        return Rendered(*(torch.cat(part) for part in zip(*parts)))

    @torch.no_grad()
    def density(self, points: Tensor) -> Tensor:
        """Extinction per world unit; see `RadianceField`."""
        inside = ((points >= self.bounds[0]) & (points <= self.bounds[1])).all(-1)
        return torch.cat([self.fine.density(some) for some in points.split(1 << 16)]) * inside

    @torch.no_grad()
    def color(self, points: Tensor, directions: Tensor) -> Tensor:
        """Color of single points; see `RadianceField`."""
        pieces = zip(points.split(1 << 16), directions.split(1 << 16))
        return torch.cat([self.fine(some, seen)[1] for some, seen in pieces])

    def _composite(self, network: Network, origins: Tensor, directions: Tensor, distance: Tensor) -> Traced:
        rays, count = distance.shape
        points = origins[:, None] + directions[:, None] * distance[..., None]
        density, color = network(points, directions[:, None].expand_as(points))
        length = torch.cat([distance.diff(dim=1), torch.full_like(distance[:, :1], FAR_AWAY)], 1)
        ray = torch.arange(rays, device=distance.device).repeat_interleave(count)
        reaching, alpha = transmittance((density * length).view(-1), ray, rays)
        weights = reaching * alpha
        samples = Samples(ray, distance.reshape(-1), length.view(-1))
        rgb = sum_along_rays(weights[:, None] * color.view(-1, 3), ray, rays)
        opacity = sum_along_rays(weights, ray, rays)
        return Traced(rgb, opacity, weights, samples, len(ray))


def sample_pdf(
    edges: Tensor, weights: Tensor, count: int, generator: torch.Generator | None = None
) -> Tensor:
    """Inverse transform sampling of a piecewise constant density along each ray (section 5.2 of the paper).

    The pieces have edges, increasing, [rays, pieces + 1], and weights, not normalized, [rays, pieces].
    Without a generator the samples, float32 [rays, count], are evenly spaced quantiles.
    """
    weights = weights + 1e-5  # so that an empty ray is sampled evenly
    # `total` is the cumulative distribution F at the edges. A quantile u lies in the piece with
    # F_low <= u < F_high, at the fraction (u - F_low) / (F_high - F_low) of it, because F is linear there.
    total = torch.cumsum(weights / weights.sum(1, keepdim=True), 1)
    total = torch.cat([torch.zeros_like(total[:, :1]), total], 1)
    if generator is None:
        quantile = torch.linspace(0, 1, count, device=edges.device).expand(len(edges), count).contiguous()
    else:
        quantile = torch.rand(len(edges), count, generator=generator, device=edges.device)
    above = torch.searchsorted(total, quantile, right=True).clamp(1, total.shape[1] - 1)
    low, high = total.gather(1, above - 1), total.gather(1, above)
    share = (quantile - low) / (high - low).clamp(min=1e-5)
    left, right = edges.gather(1, above - 1), edges.gather(1, above)
    return left + share.clamp(0, 1) * (right - left)
