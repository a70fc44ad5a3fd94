"""Compositing along rays: cases computed by hand, and plain loops in float64 for bundles of every shape."""

import math

import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.models.pytorch.nerf import rendering
from blacksmith.models.pytorch.nerf.rendering import (
    Rendered,
    Samples,
    camera_rays,
    distortion,
    expected_depth,
    render_image,
    sum_along_rays,
    transmittance,
)

LN2 = math.log(2)
"""The optical thickness that absorbs half of the light."""

# One rounding of float32 is 6e-8; a sample takes three of them and a ray of our bundles adds at most 20.
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}


def _weights(thickness, ray, rays):
    reaching, alpha = transmittance(thickness, ray, rays)
    return reaching * alpha


def _bundle(counts, seed=0, high=1.5):
    """Rays with these numbers of samples, ordered by distance, of random lengths and thicknesses."""
    generator = torch.Generator().manual_seed(seed)
    ray = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    length = torch.rand(len(ray), generator=generator) * 0.2 + 0.01
    distance = torch.cat([2 + length[ray == r].cumsum(0) for r in range(len(counts))])
    thickness = torch.rand(len(ray), generator=generator) * high
    return thickness, Samples(ray, distance, length)


@pytest.fixture(
    params=[[1, 1, 1, 1], [3, 1, 7, 2, 20], [0, 4, 0, 0, 6, 0]],
    ids=["one sample each", "ragged", "some without samples"],
)
def counts(request):
    return request.param


# --- by hand ---


def test_an_opaque_slab_hides_what_is_behind_it():
    samples = Samples(torch.tensor([0, 0, 0]), torch.tensor([1.0, 2.0, 3.0]), 1.0)
    weights = _weights(torch.tensor([0.0, 1000.0, 5.0]), samples.ray, 1)
    # Thickness is limited to 40; what is behind weighs exp(-40) = 4e-18.
    torch.testing.assert_close(weights, torch.tensor([0.0, 1.0, 0.0]), rtol=0, atol=1e-17)
    colors = torch.tensor([[0.9, 0.9, 0.9], [0.2, 0.4, 0.6], [0.1, 0.1, 0.1]])
    rgb = sum_along_rays(weights[:, None] * colors, samples.ray, 1)
    torch.testing.assert_close(rgb, torch.tensor([[0.2, 0.4, 0.6]]), rtol=0, atol=0)
    opacity = sum_along_rays(weights, samples.ray, 1)
    assert opacity.tolist() == [1.0]
    assert expected_depth(weights, samples, opacity).tolist() == [2.0]


def test_two_half_transparent_slabs_weigh_a_half_and_a_quarter():
    samples = Samples(torch.tensor([0, 0]), torch.tensor([1.0, 3.0]), 1.0)
    reaching, alpha = transmittance(torch.tensor([LN2, LN2]), samples.ray, 1)
    weights = reaching * alpha
    opacity = sum_along_rays(weights, samples.ray, 1)
    red, green = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    rgb = sum_along_rays(weights[:, None] * torch.stack([red, green]), samples.ray, 1)
    # A few roundings of numbers below 3.
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(reaching, torch.tensor([1.0, 0.5]), **close)
    torch.testing.assert_close(alpha, torch.tensor([0.5, 0.5]), **close)
    torch.testing.assert_close(opacity, torch.tensor([0.75]), **close)
    over_white = rgb + (1 - opacity[:, None])
    torch.testing.assert_close(over_white, torch.tensor([[0.75, 0.5, 0.25]]), **close)
    # (1/2 * 1 + 1/4 * 3) / (3/4)
    torch.testing.assert_close(expected_depth(weights, samples, opacity), torch.tensor([5 / 3]), **close)


def test_distortion_of_two_weights_by_hand():
    samples = Samples(torch.tensor([0, 0, 1]), torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0.6, 1.2, 3.0]))
    weights = torch.tensor([0.5, 0.25, 1.0])
    # Scale 2. Ray 0: 2 * 0.5 * 0.25 * (3 - 1) / 2 + (0.25 * 0.6 + 0.0625 * 1.2) / (3 * 2) = 0.25 + 0.0375.
    # Ray 1: 1 * 3 / (3 * 2).
    found = distortion(weights, samples, 2, 2.0)
    torch.testing.assert_close(found, torch.tensor([0.2875, 0.5]), rtol=1e-6, atol=0)


# --- against plain loops ---


def test_transmittance_and_alpha_are_those_of_plain_loops(counts):
    thickness, samples = _bundle(counts)
    reaching, alpha = transmittance(thickness, samples.ray, len(counts))
    tau, ray = thickness.double().tolist(), samples.ray.tolist()
    before = [sum(tau[j] for j in range(i) if ray[j] == ray[i]) for i in range(len(ray))]
    assert (reaching.dtype, alpha.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(reaching.double(), torch.tensor(before).double().neg().exp(), **ROUNDING)
    torch.testing.assert_close(alpha.double(), -torch.tensor(tau).double().neg().expm1(), **ROUNDING)


def test_sums_along_rays_are_those_of_plain_loops(counts):
    _, samples = _bundle(counts)
    values = torch.randn(len(samples.ray), 2, 3, generator=torch.Generator().manual_seed(2))
    expected = torch.zeros(len(counts), 2, 3, dtype=torch.float64)
    for index, ray in enumerate(samples.ray.tolist()):
        expected[ray] += values[index].double()
    found = sum_along_rays(values, samples.ray, len(counts))
    torch.testing.assert_close(found.double(), expected, **ROUNDING)
    found = sum_along_rays(values[:, 0, 0], samples.ray, len(counts))
    torch.testing.assert_close(found.double(), expected[:, 0, 0], **ROUNDING)


def test_expected_depth_is_that_of_plain_loops(counts):
    thickness, samples = _bundle(counts)
    weights = _weights(thickness, samples.ray, len(counts))
    opacity = sum_along_rays(weights, samples.ray, len(counts))
    depth = expected_depth(weights, samples, opacity)
    for ray, count in enumerate(counts):
        own = samples.ray == ray
        pairs = list(zip(weights[own].double().tolist(), samples.distance[own].double().tolist()))
        expected = sum(w * s for w, s in pairs) / sum(w for w, _ in pairs) if count else 0.0
        assert float(depth[ray]) == pytest.approx(expected, rel=1e-5)


def test_the_depth_of_an_almost_transparent_ray_is_not_scaled():
    samples = Samples(torch.tensor([0, 0]), torch.tensor([2.0, 4.0]), 1.0)
    weights = torch.tensor([1e-3, 1e-3])
    opacity = torch.tensor([2e-3])
    assert float(expected_depth(weights, samples, opacity)[0]) == pytest.approx(3.0, rel=1e-6)


@pytest.mark.parametrize("length", [None, 0.1], ids=["lengths", "one length"])
def test_distortion_is_the_double_sum_of_its_equation(counts, length):
    thickness, samples = _bundle(counts)
    if length is not None:
        samples = samples._replace(length=length)
    scale = 2.5
    weights = _weights(thickness, samples.ray, len(counts))
    found = distortion(weights, samples, len(counts), scale)
    rays, w = samples.ray.tolist(), weights.double().tolist()
    s = (samples.distance.double() / scale).tolist()
    lengths = torch.as_tensor(samples.length).double().expand(len(rays)).tolist()
    expected = [0.0] * len(counts)
    for i in range(len(rays)):
        expected[rays[i]] += w[i] ** 2 * lengths[i] / scale / 3
        for j in range(len(rays)):
            if rays[i] == rays[j]:
                expected[rays[i]] += w[i] * w[j] * abs(s[i] - s[j])
    torch.testing.assert_close(found.double(), torch.tensor(expected).double(), rtol=1e-5, atol=1e-7)


# --- extremes ---


@pytest.mark.parametrize("huge", [1e10, math.inf])
def test_a_huge_thickness_is_opaque_and_its_gradient_finite(huge):
    thickness = torch.tensor([0.5, huge, 0.5, 0.7], requires_grad=True)
    weights = _weights(thickness, torch.tensor([0, 0, 0, 1]), 2)
    weights.sum().backward()
    expected = torch.tensor([1 - math.exp(-0.5), math.exp(-0.5), 0.0, 1 - math.exp(-0.7)])
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-6, atol=1e-7)
    # Ray 0 is opaque whatever its first sample is: only ray 1 has a slope, exp(-0.7).
    slopes = torch.tensor([0.0, 0.0, 0.0, math.exp(-0.7)])
    torch.testing.assert_close(thickness.grad, slopes, rtol=0, atol=1e-6)


@pytest.mark.parametrize("per_ray", [1, 50, 1000])
def test_bundles_of_a_million_samples_stay_accurate(per_ray):
    rays = 1_000_000 // per_ray
    generator = torch.Generator().manual_seed(4)
    # Thick rays precede thin ones in the same cumulative sum; a length of 1e10 ends every fourth ray.
    scale = torch.where(torch.arange(rays) % 2 == 0, 30.0, 2.0 / per_ray)
    thickness = torch.rand(rays, per_ray, generator=generator) * scale[:, None]
    thickness[::4, -1] = 1e10
    ray = torch.arange(rays).repeat_interleave(per_ray)
    reaching, alpha = transmittance(thickness.view(-1), ray, rays)
    exact = thickness.double()
    expected = torch.exp(-(exact.cumsum(1) - exact))
    # The last sample's own 1e10 cancels in `exact` up to 1e-6.
    assert float((reaching.view(rays, -1).double() - expected).abs().amax()) < 3e-6
    assert float((alpha.view(rays, -1).double() + torch.expm1(-exact)).abs().amax()) < 1e-6


def test_the_distortion_of_the_last_of_many_rays_stays_accurate():
    thickness, samples = _bundle([100] * 50, seed=5)
    thickness, distance = thickness.repeat(100) * 0.05, samples.distance.repeat(100)
    ray = torch.arange(5000).repeat_interleave(100)
    weights = _weights(thickness, ray, 5000)
    found = distortion(weights, Samples(ray, distance, samples.length.repeat(100)), 5000, 1.0)
    # The cumulative sums have grown to 1e4 by then, of which float64 keeps 1e-12.
    torch.testing.assert_close(found[-50:], found[:50], rtol=1e-6, atol=1e-9)


# --- gradients ---

SCORES = {
    "color": lambda weights, samples, rays: (
        sum_along_rays(weights[:, None] * torch.linspace(0, 1, len(weights))[:, None], samples.ray, rays)
        .square()
        .sum()
    ),
    "opacity": lambda weights, samples, rays: sum_along_rays(weights, samples.ray, rays).square().sum(),
    "depth": lambda weights, samples, rays: expected_depth(
        weights, samples, sum_along_rays(weights, samples.ray, rays)
    ).sum(),
    "distortion": lambda weights, samples, rays: distortion(weights, samples, rays, 1.0).sum(),
}


@pytest.mark.parametrize("name", SCORES)
def test_gradients_are_finite_differences(name):
    counts = [0, 3, 1, 0, 6, 0]
    thickness, samples = _bundle(counts, seed=6)

    def score(values):
        return SCORES[name](_weights(values, samples.ray, len(counts)), samples, len(counts))

    thickness = (thickness + 0.05).requires_grad_()
    score(thickness).backward()
    slopes, step = [], 1e-2
    for move in step * torch.eye(len(thickness)):
        up, down = thickness.detach() + move, thickness.detach() - move
        slopes.append((score(up).double() - score(down).double()) / (up - down).double().sum())
    # With a step of 0.01, the curvature costs 2e-5 of values and slopes of order 1, rounding 1e-7 / 0.01.
    torch.testing.assert_close(thickness.grad.double(), torch.stack(slopes), rtol=2e-3, atol=2e-4)
    assert float(thickness.grad.abs().amax()) > 0.01


def test_no_gradient_crosses_from_one_ray_to_another():
    thickness, samples = _bundle([3, 4, 2])
    thickness.requires_grad_()
    weights = _weights(thickness, samples.ray, 3)
    sum_along_rays(weights, samples.ray, 3)[1].backward()
    # They cancel in the cumulative sum up to float32's rounding.
    assert float(thickness.grad[samples.ray != 1].abs().amax()) < 1e-7
    assert float(thickness.grad[samples.ray == 1].abs().amin()) > 0.01


# --- samples and pictures ---


@pytest.mark.parametrize("kept", [[True, False, True], [0, 2]])
def test_samples_are_taken_by_mask_and_by_number(kept):
    samples = Samples(torch.tensor([0, 1, 1]), torch.tensor([1.0, 2.0, 3.0]), 0.5)
    some = samples.take(torch.tensor(kept))
    assert some.ray.tolist() == [0, 1]
    assert some.distance.tolist() == [1.0, 3.0]
    assert some.length == 0.5


class Directions:
    """Renders each ray's direction as its color, and records the calls."""

    bounds = torch.tensor([[-1.0] * 3, [1.0] * 3])

    def __init__(self):
        self.calls = []

    def render(self, origins, directions, background, *, quality=1.0):
        self.calls.append((len(origins), background.tolist()))
        return Rendered(directions, origins[:, 0] + directions[:, 0], directions[:, 1])


@pytest.mark.parametrize(("chunk", "sizes"), [(4, [4, 4, 4, 3]), (100, [15])])
def test_a_picture_has_each_ray_in_its_row_and_column(monkeypatch, chunk, sizes):
    monkeypatch.setattr(rendering, "CHUNK_RAYS", chunk)
    camera = Camera(look_at((1.0, 2.0, 3.0), (0, 0, 0)), 5, 3, (6.0, 7.0), (2.2, 1.7))
    origins, directions = camera_rays(camera, torch.arange(15))
    field, background = Directions(), torch.tensor([0.25, 0.5, 1.0])
    rendered = render_image(field, camera, background)
    assert field.calls == [(size, [0.25, 0.5, 1.0]) for size in sizes]
    # Row 2, column 1 is pixel 2 * 5 + 1. Chunks of different sizes may round differently.
    torch.testing.assert_close(rendered.rgb[2, 1], directions[11], rtol=0, atol=1e-6)
    torch.testing.assert_close(rendered.rgb, directions.view(3, 5, 3), rtol=0, atol=1e-6)
    expected = (origins + directions)[:, 0].view(3, 5)
    torch.testing.assert_close(rendered.opacity, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(rendered.depth, directions[:, 1].view(3, 5), rtol=0, atol=1e-6)
