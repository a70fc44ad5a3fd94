"""The paper's field: networks by hand, samples by their statistics, pictures by its formulas."""

import math

import numpy as np
import pytest

# Without the extra `nerf` nothing here can be collected, so the imports that need it come after the check.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.models.pytorch.nerf.encoding import encoded_size, positional_encoding
from blacksmith.models.pytorch.nerf.mlp import FAR_AWAY, MlpField, Network, sample_pdf

WHITE = torch.ones(3)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _field(seed=0, **options):
    """A small field with random networks that see something."""
    options = {"coarse_samples": 12, "fine_samples": 20, "width": 16, "depth": 3} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = MlpField(**options)
    field.near_far.copy_(torch.tensor([1.0, 4.0]))
    with torch.no_grad():
        for network in (field.coarse, field.fine):
            network.to_density.weight.mul_(4)
            network.to_density.bias.fill_(0.3)
    return field


def _unit(count, seed):
    return torch.nn.functional.normalize(torch.randn(count, 3, generator=_generator(seed)), dim=1)


def _rays(count, seed=0):
    targets = torch.rand(count, 3, generator=_generator(seed)) - 0.5
    origins = 2.5 * _unit(count, seed + 1)
    return origins, torch.nn.functional.normalize(targets - origins, dim=1)


# --- encodings and networks ---


def test_the_encoding_by_hand():
    values = torch.tensor([[0.5, -2.0], [0.0, 1.0]])
    sin, cos = math.sin, math.cos
    expected = [
        [0.5, -2.0, sin(0.5), sin(-2), cos(0.5), cos(-2), sin(1), sin(-4), cos(1), cos(-4)],
        [0.0, 1.0, 0.0, sin(1), 1.0, cos(1), 0.0, sin(2), 1.0, cos(2)],
    ]
    found = positional_encoding(values, 2)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-6)
    assert found.shape[1] == encoded_size(2, 2) == 10
    assert torch.equal(positional_encoding(values.view(2, 1, 2), 2), found.view(2, 1, 10))
    assert torch.equal(positional_encoding(values, 0), values)


def test_the_default_network_is_that_of_the_paper():
    network = Network()
    # Weights and biases of eight layers (the sixth also reads the encoded position), the density, the
    # bottleneck, the layer that reads the encoded direction, and the color.
    # 64*256 + 4*257*256 + 320*256 + 2*257*256 + 257 + 257*256 + 284*128 + 129*3
    assert sum(p.numel() for p in network.parameters()) == 595_844
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            # Glorot's limits for uniform weights.
            limit = math.sqrt(6 / (layer.in_features + layer.out_features))
            assert 0.9 * limit < float(layer.weight.detach().abs().amax()) <= limit
            assert (layer.bias == 0).all()


@pytest.mark.parametrize(
    ("depth", "widths"), [(2, [21, 8]), (3, [21, 8, 29]), (8, [21, 8, 8, 8, 8, 29, 8, 8])]
)
def test_the_layer_behind_the_middle_reads_the_position(depth, widths):
    # 21 = 3 * (1 + 2 * 3); 29 = 21 + 8. With two layers there is no layer behind the middle.
    network = Network(width=8, depth=depth, position_frequencies=3, direction_frequencies=1)
    assert [layer.in_features for layer in network.layers] == widths
    density, color = network(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
    assert (density.shape, color.shape) == ((2, 5), (2, 5, 3))


def _in_numpy(network, points, directions):
    """The paper's figure 7 in float64."""

    def encode(values, frequencies):
        parts = [values]
        for octave in range(frequencies):
            parts += [np.sin(2**octave * values), np.cos(2**octave * values)]
        return np.concatenate(parts, 1)

    def linear(layer, x):
        return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()

    place = encode(points, network.position_frequencies)
    hidden = place
    for number, layer in enumerate(network.layers):
        if number == 3:
            hidden = np.concatenate([place, hidden], 1)
        hidden = np.maximum(linear(layer, hidden), 0)
    density = np.maximum(linear(network.to_density, hidden)[:, 0], 0)
    encoded = encode(directions, network.direction_frequencies)
    seen = np.concatenate([linear(network.bottleneck, hidden), encoded], 1)
    color = linear(network.to_color, np.maximum(linear(network.directed, seen), 0))
    return density, 1 / (1 + np.exp(-color))


def test_the_network_equals_the_same_network_in_numpy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(width=12, depth=5, position_frequencies=4, direction_frequencies=2)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.4)
            network.to_density.bias.sub_(2.0)
    points, directions = torch.randn(300, 3, generator=_generator()), _unit(300, 1)
    density, color = network(points, directions)
    expected = _in_numpy(network, points.double().numpy(), directions.double().numpy())
    # Sums of up to 39 float32 products through eight layers, from angles that are rounded by 1e-6.
    np.testing.assert_allclose(density.detach().numpy(), expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(color.detach().numpy(), expected[1], rtol=0, atol=1e-4)
    assert 0.1 < (expected[0] > 0).mean() < 0.9
    assert torch.equal(network.density(points), density)


# --- sampling ---


def test_quantiles_of_a_known_density_by_hand():
    edges = torch.tensor([[0.0, 1.0, 3.0, 6.0], [0.0, 2.0, 4.0, 6.0]])
    weights = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    # Ray 0: a quarter lies in [0, 1], three quarters in [3, 6]: the eighths fall on 1/2 and 3 + k/2.
    found = sample_pdf(edges, weights, 9)
    expected = [[0.0, 0.5, 1.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0], [0.75 * k for k in range(9)]]
    # The 1e-5 that is added to every piece moves quantiles by 3e-5, and a quantile at the edge of an empty
    # piece may lie anywhere in that piece.
    assert 1 - 1e-4 <= float(found[0, 2]) <= 3 + 1e-4
    found[0, 2] = 1.0
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_many_samples_are_distributed_like_the_density():
    edges = torch.tensor([[0.0, 1.0, 3.0, 6.0], [1.0, 2.0, 2.5, 3.0]])
    weights = torch.tensor([[1.0, 0.0, 3.0], [0.2, 0.5, 0.3]])
    count = 40000
    found = sample_pdf(edges, weights, count, _generator())
    for ray, shares in enumerate([[0.25, 0.0, 0.75], [0.2, 0.5, 0.3]]):
        for piece, share in enumerate(shares):
            low, high = edges[ray, piece : piece + 2].tolist()
            within = found[ray][(found[ray] >= low) & (found[ray] < high)]
            # Four standard deviations of a share of 40000, and of the mean of a uniform distribution.
            assert len(within) / count == pytest.approx(share, abs=4 * 0.5 / math.sqrt(count))
            if share:
                spread = 4 * (high - low) * 0.29 / math.sqrt(len(within))
                assert float(within.mean()) == pytest.approx((low + high) / 2, abs=spread)
                assert float(within.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.03)


@pytest.mark.parametrize("seed", [None, 3], ids=["quantiles", "random"])
def test_samples_stay_within_the_edges(seed):
    edges = torch.rand(200, 18, generator=_generator(5)).cumsum(1) + 1
    weights = torch.rand(200, 17, generator=_generator(6)) ** 4
    weights[0] = 0
    weights[1] = 0
    weights[1, 3] = 1e6
    found = sample_pdf(edges, weights, 64, None if seed is None else _generator(seed))
    assert found.shape == (200, 64)
    assert (found >= edges[:, :1]).all()
    assert (found <= edges[:, -1:]).all()
    # All but 17e-5 / 1e6 of ray 1 lies in its fourth piece.
    inner = found[1, 1:-1]
    assert ((inner >= edges[1, 3] - 1e-5) & (inner <= edges[1, 4] + 1e-5)).all()


def test_a_ray_without_weights_is_sampled_evenly_over_its_pieces():
    found = sample_pdf(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 2), 5)
    # Half of the samples for each piece, whatever its length.
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.5, 2.0, 3.0, 4.0]]), rtol=0, atol=1e-5)


# --- along rays ---


def test_without_a_generator_samples_are_mid_stratum():
    coarse, _ = _field().trace(*_rays(3))
    # From 1 to 4 in 12 strata of a quarter.
    expected = (1.125 + 0.25 * torch.arange(12)).expand(3, 12)
    torch.testing.assert_close(coarse.samples.distance.view(3, 12), expected, rtol=0, atol=1e-6)


def test_random_samples_are_uniform_within_their_strata():
    coarse, _ = _field().trace(*_rays(500), _generator())
    place = (coarse.samples.distance.view(500, 12) - 1) / 0.25 - torch.arange(12)
    assert place.amin() >= -1e-5
    assert place.amax() <= 1 + 1e-5
    # Four standard deviations of the mean of 6000 uniform numbers.
    assert float(place.mean()) == pytest.approx(0.5, abs=4 * 0.29 / math.sqrt(6000))
    assert float(place.std()) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    # Independent of each other.
    assert float(torch.corrcoef(place[:, :2].T)[0, 1]) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("seed", [None, 0], ids=["middles", "random"])
def test_fine_samples_are_in_order_and_include_the_coarse_ones(seed):
    coarse, fine = _field().trace(*_rays(40), None if seed is None else _generator(seed))
    few, many = coarse.samples.distance.view(40, 12), fine.samples.distance.view(40, 32)
    assert (many.diff(dim=1) >= 0).all()
    assert (many[:, None] == few[:, :, None]).any(2).all()
    assert fine.samples.ray.tolist() == [ray for ray in range(40) for _ in range(32)]


class Shell(torch.nn.Module):
    """Black matter between two distances from the origin."""

    def __init__(self, low, high, density):
        super().__init__()
        self.low, self.high, self.value = low, high, density

    def forward(self, points, directions):
        assert points.shape == directions.shape
        radius = points.norm(dim=-1)
        return self.value * ((radius > self.low) & (radius < self.high)).float(), torch.zeros_like(points)


def _away(count=4):
    """Rays that start at the origin, along which the distance is the radius."""
    return torch.zeros(count, 3), _unit(count, 9)


def test_fine_samples_lie_where_a_coarse_sample_saw_something():
    field = _field(coarse_samples=30, fine_samples=62)
    field.coarse = field.fine = Shell(2.0, 2.1, density=50.0)
    coarse, fine = field.trace(*_away())
    # Strata of 0.1: the one at 2.05 is the only one inside, half-way to its neighbors are 2.0 and 2.1.
    assert ((coarse.weights.view(4, -1) > 0.9).sum(1) == 1).all()
    distance = fine.samples.distance.view(4, 92)
    # All 62 but the first and the last quantile, which are where the empty pieces begin and end.
    assert (((distance > 2.0 - 1e-4) & (distance < 2.1 + 1e-4)).sum(1) == 61).all()


def test_the_last_sample_represents_the_rest_of_its_ray():
    field = _field()
    # Thin fog is opaque over 1e10, but only if the last stratum, from 3.75 to 4, has its sample in it.
    field.coarse = field.fine = Shell(3.9, 9.0, density=1e-3)
    coarse, fine = field.trace(*_away(), _generator())
    last = coarse.samples.distance.view(4, 12)[:, -1] > 3.9
    assert last.any()
    torch.testing.assert_close(coarse.opacity, last.float(), rtol=0, atol=1e-6)
    assert (coarse.samples.length.view(4, 12)[:, -1] == FAR_AWAY).all()
    assert (fine.samples.length.view(4, 32)[:, -1] == FAR_AWAY).all()
    # The middle of the last stratum, 3.875, is still empty.
    rendered = field.render(*_away(), torch.tensor([0.2, 0.4, 0.6]))
    assert (rendered.opacity == 0).all()
    assert (rendered.depth == 0).all()
    assert torch.equal(rendered.rgb, torch.tensor([[0.2, 0.4, 0.6]] * 4))


@pytest.mark.parametrize("seed", [None, 1], ids=["evaluation", "training"])
def test_both_networks_are_composited_by_the_formulas_of_the_paper(seed):
    field = _field()
    origins, directions = _rays(50)
    generator = None if seed is None else _generator(seed)
    for network, seen in zip((field.coarse, field.fine), field.trace(origins, directions, generator)):
        distance = seen.samples.distance.view(50, -1)
        points = origins[:, None] + directions[:, None] * distance[..., None]
        density, color = network(points, directions[:, None].expand_as(points))
        density, color = density.detach().double(), color.detach().double()
        length = torch.cat([distance.double().diff(dim=1), torch.full((50, 1), 1e10)], 1)
        alpha = 1 - torch.exp(-density * length)
        reaching = torch.cumprod(torch.cat([torch.ones(50, 1).double(), 1 - alpha], 1), 1)[:, :-1]
        weights = reaching * alpha
        # float32's rounding of exp(-x) and of distances: 32 samples of 1e-6.
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(seen.weights.detach().view(50, -1).double(), weights, **close)
        torch.testing.assert_close(seen.opacity.detach().double(), weights.sum(1), **close)
        rgb = (weights[..., None] * color).sum(1)
        torch.testing.assert_close(seen.rgb.detach().double(), rgb, **close)
        # Some rays stop early, and some pass all but the last sample.
        assert reaching[:, -1].amin() < 0.3
        assert weights[:, :-1].amax() > 0.05


def test_rendering_is_the_view_of_the_fine_network():
    field = _field()
    # More rays than are rendered at a time.
    origins, directions = _rays(1500)
    background = torch.tensor([0.1, 0.5, 0.8])
    with torch.no_grad():
        _, fine = field.trace(origins, directions)
    rendered = field.render(origins, directions, background)
    # Different sizes of a matrix product may round differently.
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rendered.opacity, fine.opacity, **close)
    torch.testing.assert_close(rendered.rgb, fine.rgb + (1 - fine.opacity[:, None]) * background, **close)
    weights, distance = fine.weights.view(1500, -1).double(), fine.samples.distance.view(1500, -1).double()
    depth = (weights * distance).sum(1) / weights.sum(1)
    torch.testing.assert_close(rendered.depth.double(), depth, rtol=0, atol=1e-4)
    assert not rendered.rgb.requires_grad


@pytest.mark.parametrize(("quality", "coarse", "fine"), [(0.01, 3, 1), (0.5, 6, 10), (2.0, 24, 40)])
def test_quality_scales_the_numbers_of_samples(quality, coarse, fine):
    field = _field()
    with torch.no_grad():
        both = field.trace(*_rays(3), quality=quality)
    assert [len(seen.weights) for seen in both] == [3 * coarse, 3 * (coarse + fine)]
    assert torch.equal(field.render(*_rays(3), WHITE, quality=quality).opacity, both[1].opacity)


def test_no_rays_and_no_points_give_empty_results():
    nothing = torch.zeros(0, 3)
    rendered = _field().render(nothing, nothing, WHITE)
    assert [part.shape for part in rendered] == [(0, 3), (0,), (0,)]
    assert _field().density(nothing).shape == (0,)
    assert _field().color(nothing, nothing).shape == (0, 3)


def test_results_depend_on_the_generator_only():
    field, rays = _field(), _rays(20)
    first = field.trace(*rays, _generator(1))[1].rgb
    before = torch.random.get_rng_state()
    assert torch.equal(first, field.trace(*rays, _generator(1))[1].rgb)
    assert not torch.equal(first, field.trace(*rays, _generator(2))[1].rgb)
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("bias", [0.3, -100.0], ids=["something", "nothing"])
def test_every_parameter_has_a_gradient_also_where_nothing_is(bias):
    # DDP waits for the gradient of every parameter.
    field = _field()
    for network in (field.coarse, field.fine):
        torch.nn.init.constant_(network.to_density.bias, bias)
    seen = field.trace(*_rays(20), _generator())
    sum((part.rgb + 1 - part.opacity[:, None]).square().sum() for part in seen).backward()
    for name, parameter in field.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.any() == (bias > 0), name


@pytest.mark.parametrize("name", ["coarse.layers.0.weight", "fine.to_density.weight", "fine.to_color.bias"])
def test_gradients_are_finite_differences(name):
    # One octave, so that nothing changes fast. Fine samples are drawn from detached weights, so only the
    # coarse network's own picture depends on it.
    field = _field(position_frequencies=1, direction_frequencies=1)
    number = 0 if name.startswith("coarse") else 1
    parameter, rays = dict(field.named_parameters())[name], _rays(30)

    def score():
        return field.trace(*rays, _generator(4))[number].rgb.double().square().sum()

    score().backward()
    flat, step = parameter.data.view(-1), 2e-3
    for index in parameter.grad.view(-1).abs().topk(2).indices.tolist():
        slopes, before = [], float(flat[index])
        for side in (step, -step):
            flat[index] = before + side
            slopes.append(float(score().detach()))
        flat[index] = before
        found = (slopes[0] - slopes[1]) / (2 * step)
        # Rounding: 1e-5 / 4e-3; and a few ReLUs that bend within the step.
        assert float(parameter.grad.view(-1)[index]) == pytest.approx(found, rel=2e-2, abs=1e-2)
        assert abs(found) > 0.1


def test_the_coarse_network_gets_no_gradient_from_the_fine_picture():
    field = _field()
    _, fine = field.trace(*_rays(20), _generator())
    fine.rgb.sum().backward()
    assert all(p.grad is None for p in field.coarse.parameters())
    assert any(p.grad.any() for p in field.fine.parameters())


# --- points, state ---


def test_densities_and_colors_of_points_are_the_fine_networks():
    field = _field()
    field.bounds.copy_(torch.tensor([[-1.0, -0.5, 0.0], [1.0, 0.5, 2.0]]))
    points, directions = torch.rand(300, 3, generator=_generator()) * 4 - 2, _unit(300, 1)
    inside = ((points >= field.bounds[0]) & (points <= field.bounds[1])).all(1)
    with torch.no_grad():
        density, color = field.fine(points, directions)
    found = field.density(points)
    torch.testing.assert_close(found[inside], density[inside], rtol=1e-5, atol=1e-6)
    assert (found[~inside] == 0).all()
    assert (density[~inside] > 0).any()
    torch.testing.assert_close(field.color(points, directions), color, rtol=0, atol=1e-6)


def test_a_loaded_field_renders_the_same_bits():
    field = _field(seed=1)
    field.near_far.copy_(torch.tensor([0.5, 3.0]))
    field.bounds.mul_(2)
    fresh = _field(seed=2)
    fresh.load_state_dict(field.state_dict())
    for a, b in zip(field.render(*_rays(50), WHITE), fresh.render(*_rays(50), WHITE)):
        assert torch.equal(a, b)
    points = torch.full((1, 3), 1.5)
    assert torch.equal(field.density(points), fresh.density(points))
    assert torch.equal(fresh.bounds, field.bounds)
