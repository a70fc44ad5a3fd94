"""The paper's field: networks by hand, samples by their statistics, pictures by its formulas."""

import math

import numpy as np
import pytest

# Without the extra `nerf` none of this is collected, so its modules come after the question.
# ruff: noqa: E402
torch = pytest.importorskip("torch")
pytest.importorskip("PIL")

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.models.pytorch.nerf.encoding import encoded_size, perceptron, positional_encoding
from blacksmith.models.pytorch.nerf.mlp import FAR_AWAY, MlpField, Network, sample_pdf
from blacksmith.models.pytorch.nerf.rendering import camera_rays, render_image

WHITE = torch.ones(3)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads of PyTorch's would spend their time waiting for one another, where tests share few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _generator(seed=0):
    return torch.Generator().manual_seed(seed)


def _field(seed=0, **options):
    """A small field with random networks that see something."""
    options = {"coarse_samples": 12, "fine_samples": 20, "width": 16, "depth": 3} | options
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        field = MlpField(near=1.0, far=4.0, **options)
    with torch.no_grad():
        for network in (field.coarse, field.fine):
            network.to_density.weight.mul_(4)
            network.to_density.bias.fill_(0.3)
    return field


def _rays(count, seed=0):
    targets = torch.rand(count, 3, generator=_generator(seed)) - 0.5
    origins = 2.5 * torch.nn.functional.normalize(
        torch.randn(count, 3, generator=_generator(seed + 1)), dim=1
    )
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


def test_the_encoding_keeps_leading_axes_and_without_frequencies_is_the_values():
    values = torch.randn(2, 4, 3, generator=_generator())
    assert positional_encoding(values, 10).shape == (2, 4, 63)
    torch.testing.assert_close(
        positional_encoding(values, 10)[1, 2], positional_encoding(values[1, 2], 10), rtol=0, atol=0
    )
    assert torch.equal(positional_encoding(values, 0), values)
    assert encoded_size(3, 0) == 3


def test_the_highest_octave_turns_2_to_the_9th_times_as_fast():
    found = positional_encoding(torch.tensor([[1.0, 0.0, 0.0]]), 10)[0]
    # sin and cos of 512 x, of three numbers each, come last.
    assert found[57].item() == pytest.approx(math.sin(512), abs=1e-6)
    assert found[60].item() == pytest.approx(math.cos(512), abs=1e-6)


def test_a_perceptron_has_relu_between_its_layers_and_none_at_its_end():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = perceptron(5, 7, 2, layers=2)
    shapes = [tuple(p.shape) for p in network.parameters()]
    assert shapes == [(7, 5), (7,), (7, 7), (7,), (2, 7), (2,)]
    x = torch.randn(20, 5, generator=_generator()).double()
    first, b1, second, b2, last, b3 = (p.detach().double() for p in network.parameters())
    expected = ((x @ first.T + b1).clamp(min=0) @ second.T + b2).clamp(min=0) @ last.T + b3
    torch.testing.assert_close(network(x.float()).detach().double(), expected, rtol=1e-5, atol=1e-6)
    assert (expected < 0).any()
    assert [type(layer).__name__ for layer in perceptron(5, 7, 2, layers=0)] == ["Linear"]


def test_the_default_network_is_the_papers():
    network = Network()
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters() if name.endswith("weight")}
    assert shapes == {
        "layers.0.weight": (256, 63),
        "layers.1.weight": (256, 256),
        "layers.2.weight": (256, 256),
        "layers.3.weight": (256, 256),
        "layers.4.weight": (256, 256),
        # The encoded position comes in again for the sixth layer: 63 + 256.
        "layers.5.weight": (256, 319),
        "layers.6.weight": (256, 256),
        "layers.7.weight": (256, 256),
        "to_density.weight": (1, 256),
        "bottleneck.weight": (256, 256),
        # The encoded direction has 3 + 3 * 2 * 4 = 27 numbers.
        "directed.weight": (128, 283),
        "to_colour.weight": (3, 128),
    }
    # 64*256 + 4*257*256 + 320*256 + 2*257*256 + 257 + 257*256 + 284*128 + 129*3
    assert sum(p.numel() for p in network.parameters()) == 595_844
    assert sum(p.numel() for p in MlpField().parameters()) == 2 * 595_844


@pytest.mark.parametrize(
    ("depth", "widths"),
    [(1, [21]), (2, [21, 8]), (3, [21, 8, 29]), (4, [21, 8, 8, 29]), (6, [21, 8, 8, 8, 29, 8])],
)
def test_the_position_comes_in_again_behind_the_middle(depth, widths):
    # 21 = 3 * (1 + 2 * 3); 29 = 21 + 8. With one or two layers there is no middle.
    network = Network(width=8, depth=depth, position_frequencies=3, direction_frequencies=1)
    assert [layer.in_features for layer in network.layers] == widths
    density, colour = network(torch.zeros(2, 5, 3), torch.zeros(2, 5, 3))
    assert (density.shape, colour.shape) == ((2, 5), (2, 5, 3))


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
    seen = np.concatenate(
        [linear(network.bottleneck, hidden), encode(directions, network.direction_frequencies)], 1
    )
    colour = linear(network.to_colour, np.maximum(linear(network.directed, seen), 0))
    return density, 1 / (1 + np.exp(-colour))


def test_densities_and_colours_are_those_of_the_same_network_in_numpy():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network(width=12, depth=5, position_frequencies=4, direction_frequencies=2)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.normal_(0, 0.4)
            network.to_density.bias.sub_(2.0)
    points = torch.randn(300, 3, generator=_generator())
    directions = torch.nn.functional.normalize(torch.randn(300, 3, generator=_generator(1)), dim=1)
    density, colour = network(points, directions)
    expected = _in_numpy(network, points.double().numpy(), directions.double().numpy())
    # Sums of up to 39 float32 products through eight layers, from angles that are rounded by 1e-6.
    np.testing.assert_allclose(density.detach().numpy(), expected[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(colour.detach().numpy(), expected[1], rtol=0, atol=1e-4)
    assert 0.1 < (expected[0] > 0).mean() < 0.9
    assert torch.equal(network.density(points), density)


def test_density_does_not_depend_on_the_direction_and_colour_does():
    field = _field()
    points = torch.randn(50, 3, generator=_generator())
    up, down = torch.tensor([0.0, 0, 1]).expand(50, 3), torch.tensor([0.0, 0, -1]).expand(50, 3)
    first, second = field.fine(points, up), field.fine(points, down)
    assert torch.equal(first[0], second[0])
    assert float((first[1] - second[1]).detach().abs().amax()) > 0.01


def test_initial_weights_are_even_within_glorots_limits_and_biases_0():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Network()
    for layer in network.modules():
        if isinstance(layer, torch.nn.Linear):
            limit = math.sqrt(6 / (layer.in_features + layer.out_features))
            largest = float(layer.weight.detach().abs().amax())
            assert 0.9 * limit < largest <= limit
            assert (layer.bias == 0).all()


# --- sampling ---


def _pieces(rays, pieces, seed):
    edges = torch.rand(rays, pieces + 1, generator=_generator(seed)).cumsum(1) + 1
    return edges, torch.rand(rays, pieces, generator=_generator(seed + 1)) ** 4


def test_quantiles_of_a_known_density_by_hand():
    edges = torch.tensor([[0.0, 1.0, 3.0, 6.0], [0.0, 2.0, 4.0, 6.0]])
    weights = torch.tensor([[1.0, 0.0, 3.0], [2.0, 2.0, 2.0]])
    # Ray 0: a quarter lies in [0, 1], three quarters in [3, 6]: the eighths fall on 1/2 and 3 + k/2.
    found = sample_pdf(edges, weights, 9)
    expected = [[0.0, 0.5, 1.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0], [0.75 * k for k in range(9)]]
    # The 1e-5 that every piece is given moves quantiles by 3e-5; one at the edge of an empty piece may lie
    # anywhere in it.
    assert 1 - 1e-4 <= float(found[0, 2]) <= 3 + 1e-4
    found[0, 2] = 1.0
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_many_samples_are_spread_like_the_density():
    edges = torch.tensor([[0.0, 1.0, 3.0, 6.0], [1.0, 2.0, 2.5, 3.0]])
    weights = torch.tensor([[1.0, 0.0, 3.0], [0.2, 0.5, 0.3]])
    count = 40000
    found = sample_pdf(edges, weights, count, _generator())
    for ray, shares in enumerate([[0.25, 0.0, 0.75], [0.2, 0.5, 0.3]]):
        for piece, share in enumerate(shares):
            low, high = edges[ray, piece : piece + 2].tolist()
            within = found[ray][(found[ray] >= low) & (found[ray] < high)]
            # Four standard deviations of a share of 40000, and of the mean of an even spread.
            assert len(within) / count == pytest.approx(share, abs=4 * 0.5 / math.sqrt(count))
            if share:
                spread = 4 * (high - low) * 0.29 / math.sqrt(len(within))
                assert float(within.mean()) == pytest.approx((low + high) / 2, abs=spread)
                assert float(within.std()) == pytest.approx((high - low) / math.sqrt(12), rel=0.03)


@pytest.mark.parametrize("seed", [None, 3], ids=["quantiles", "random"])
def test_samples_stay_within_the_edges(seed):
    edges, weights = _pieces(200, 17, seed=5)
    weights[0] = 0
    weights[1, :] = 0
    weights[1, 3] = 1e6
    weights[2, -1] = 1e6
    generator = None if seed is None else _generator(seed)
    found = sample_pdf(edges, weights, 64, generator)
    assert found.shape == (200, 64)
    assert (found >= edges[:, :1]).all()
    assert (found <= edges[:, -1:]).all()
    # All but 17e-5 / 1e6 of ray 1 lies in its fourth piece.
    inner = found[1, 1:-1]
    assert ((inner >= edges[1, 3] - 1e-5) & (inner <= edges[1, 4] + 1e-5)).all()


def test_quantiles_rise_begin_and_end_with_the_edges_and_are_the_same_each_time():
    edges, weights = _pieces(50, 9, seed=7)
    # Quantiles are found to 1e-7 of all the weight: of a hundredth of it, that is a place to 1e-5.
    weights = weights + 0.1
    found = sample_pdf(edges, weights, 31)
    assert (found.diff(dim=1) >= 0).all()
    torch.testing.assert_close(found[:, 0], edges[:, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[:, -1], edges[:, -1], rtol=3e-5, atol=0)
    assert torch.equal(found, sample_pdf(edges, weights, 31))


def test_a_ray_without_weights_is_sampled_evenly_over_its_pieces():
    found = sample_pdf(torch.tensor([[1.0, 2.0, 4.0]]), torch.zeros(1, 2), 5)
    # Half of the samples for each piece, whatever its length.
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.5, 2.0, 3.0, 4.0]]), rtol=0, atol=1e-5)


def test_random_samples_follow_their_generator():
    edges, weights = _pieces(5, 9, seed=7)
    first = sample_pdf(edges, weights, 16, _generator(1))
    assert torch.equal(first, sample_pdf(edges, weights, 16, _generator(1)))
    assert not torch.equal(first, sample_pdf(edges, weights, 16, _generator(2)))


# --- along rays ---


def test_samples_without_a_generator_are_in_the_middle_of_their_strata():
    coarse, _ = _field().trace(*_rays(3))
    # From 1 to 4 in 12 strata of a quarter.
    expected = (1.125 + 0.25 * torch.arange(12)).expand(3, 12)
    torch.testing.assert_close(coarse.samples.distance.view(3, 12), expected, rtol=0, atol=1e-6)


def test_random_samples_are_one_in_each_stratum_and_evenly_spread_there():
    coarse, _ = _field().trace(*_rays(500), _generator())
    place = (coarse.samples.distance.view(500, 12) - 1) / 0.25 - torch.arange(12)
    assert place.amin() >= -1e-5
    assert place.amax() <= 1 + 1e-5
    # Four standard deviations of the mean of 6000 even numbers.
    assert float(place.mean()) == pytest.approx(0.5, abs=4 * 0.29 / math.sqrt(6000))
    assert float(place.std()) == pytest.approx(1 / math.sqrt(12), rel=0.03)
    # Each by itself.
    assert float(torch.corrcoef(place[:, :2].T)[0, 1]) == pytest.approx(0, abs=0.2)


@pytest.mark.parametrize("seed", [None, 0], ids=["middles", "random"])
def test_fine_samples_are_in_order_and_the_coarse_ones_are_among_them(seed):
    generator = None if seed is None else _generator(seed)
    coarse, fine = _field().trace(*_rays(40), generator)
    few, many = coarse.samples.distance.view(40, 12), fine.samples.distance.view(40, 32)
    assert (many.diff(dim=1) >= 0).all()
    assert (many[:, None] == few[:, :, None]).any(2).all()
    assert coarse.samples.ray.tolist() == [ray for ray in range(40) for _ in range(12)]
    assert fine.samples.ray.tolist() == [ray for ray in range(40) for _ in range(32)]


class Shell(torch.nn.Module):
    """Matter between two distances from the origin, white outside and black inside of their middle."""

    def __init__(self, low, high, density=100.0):
        super().__init__()
        self.low, self.high, self.value = low, high, density

    def forward(self, points, directions):
        assert points.shape == directions.shape
        return self.density(points), (points.norm(dim=-1) > (self.low + self.high) / 2).float()[
            ..., None
        ].expand_as(points)

    def density(self, points):
        radius = points.norm(dim=-1)
        return self.value * ((radius > self.low) & (radius < self.high)).float()


def _away(count=4):
    """Rays that start at the origin, along which the distance is the radius."""
    directions = torch.nn.functional.normalize(torch.randn(count, 3, generator=_generator(9)), dim=1)
    return torch.zeros(count, 3), directions


def test_fine_samples_gather_where_the_coarse_network_saw_something():
    field = _field(coarse_samples=30, fine_samples=60)
    field.coarse = field.fine = Shell(2.0, 2.3, density=3.0)
    _, fine = field.trace(*_away(), _generator())
    distance = fine.samples.distance.view(4, 90)
    within = ((distance > 1.9) & (distance < 2.4)).sum(1)
    # A sixth of the 30 coarse ones, and all of the 60 fine ones; between middles, so 0.1 to either side.
    assert (within >= 63).all()
    assert (within <= 70).all()


def test_fine_samples_lie_between_the_middles_around_a_coarse_one_that_saw_something():
    field = _field(coarse_samples=30, fine_samples=62)
    field.coarse = field.fine = Shell(2.0, 2.1, density=50.0)
    coarse, fine = field.trace(*_away())
    # Strata of 0.1: the one at 2.05 is the only one inside, half-way to its neighbours are 2.0 and 2.1.
    assert ((coarse.weights > 0.9).sum(1) == 1).all()
    distance = fine.samples.distance.view(4, 92)
    # All 62 but the first and the last quantile, which are where the empty pieces begin and end.
    assert (((distance > 2.0 - 1e-4) & (distance < 2.1 + 1e-4)).sum(1) == 61).all()


def test_the_last_sample_stands_for_all_the_rest_of_its_ray():
    field = _field()
    field.coarse = field.fine = Shell(3.9, 9.0, density=1e-3)
    coarse, fine = field.trace(*_away(), _generator())
    # Only the last stratum, from 3.75 to 4, can be thin fog, which 1e10 of make opaque.
    last = coarse.samples.distance.view(4, 12)[:, -1] > 3.9
    assert last.any()
    torch.testing.assert_close(coarse.opacity, last.float(), rtol=0, atol=1e-6)
    assert (coarse.samples.length.view(4, 12)[:, -1] == FAR_AWAY).all()
    assert (fine.samples.length.view(4, 32)[:, -1] == FAR_AWAY).all()
    rendered = field.render(*_away(), torch.zeros(3))
    # The middle of the last stratum, 3.875, is still empty.
    assert (rendered.opacity == 0).all()


def test_a_dense_last_sample_makes_any_ray_opaque_and_an_empty_one_none():
    field = _field()
    field.coarse = field.fine = Shell(0.0, 9.0, density=1e-5)
    assert field.render(*_away(), WHITE).opacity.tolist() == pytest.approx([1.0] * 4, abs=1e-6)
    field.coarse = field.fine = Shell(0.0, 9.0, density=0.0)
    rendered = field.render(*_away(), torch.tensor([0.2, 0.4, 0.6]))
    assert rendered.opacity.tolist() == [0.0] * 4
    assert rendered.depth.tolist() == [0.0] * 4
    torch.testing.assert_close(rendered.rgb, torch.tensor([[0.2, 0.4, 0.6]] * 4), rtol=0, atol=0)


def test_an_opaque_shell_is_seen_from_inside_where_it_is():
    field = _field(coarse_samples=60, fine_samples=60)
    field.coarse = field.fine = Shell(2.0, 3.0, density=1000.0)
    rendered = field.render(*_away(), WHITE)
    assert rendered.opacity.tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    # Strata of 0.05 around the inner side, which is black.
    assert rendered.depth.tolist() == pytest.approx([2.0] * 4, abs=0.05)
    assert float(rendered.rgb.abs().amax()) < 1e-5


@pytest.mark.parametrize("seed", [None, 1], ids=["evaluation", "training"])
def test_both_networks_are_composited_by_the_formulas_of_the_paper(seed):
    field = _field()
    origins, directions = _rays(50)
    generator = None if seed is None else _generator(seed)
    for network, seen in zip((field.coarse, field.fine), field.trace(origins, directions, generator)):
        distance = seen.samples.distance.view(50, -1)
        points = origins[:, None] + directions[:, None] * distance[..., None]
        density, colour = network(points, directions[:, None].expand_as(points))
        density, colour = density.detach().double(), colour.detach().double()
        length = torch.cat([distance.double().diff(dim=1), torch.full((50, 1), 1e10)], 1)
        alpha = 1 - torch.exp(-density * length)
        reaching = torch.cumprod(torch.cat([torch.ones(50, 1).double(), 1 - alpha], 1), 1)[:, :-1]
        weights = reaching * alpha
        # float32's rounding of exp(-x) and of distances: 32 samples of 1e-6.
        close = {"rtol": 0, "atol": 1e-5}
        torch.testing.assert_close(seen.weights.detach().double(), weights, **close)
        torch.testing.assert_close(seen.opacity.detach().double(), weights.sum(1), **close)
        rgb = (weights[..., None] * colour).sum(1)
        torch.testing.assert_close(seen.rgb.detach().double(), rgb, **close)
        # Something of everything: rays that stop early, and some that pass all but the last sample.
        passing = reaching[:, -1]
        assert passing.amin() < 0.3
        assert weights[:, :-1].amax() > 0.05


def test_rendering_is_the_fine_networks_view_without_a_generator():
    field = _field()
    # More rays than are rendered at a time.
    origins, directions = _rays(1500)
    background = torch.tensor([0.1, 0.5, 0.8])
    with torch.no_grad():
        _, fine = field.trace(origins, directions)
    rendered = field.render(origins, directions, background)
    # Other sizes of a matrix product may round otherwise.
    close = {"rtol": 0, "atol": 1e-5}
    torch.testing.assert_close(rendered.opacity, fine.opacity, **close)
    expected = fine.rgb + (1 - fine.opacity[:, None]) * background
    torch.testing.assert_close(rendered.rgb, expected, **close)
    weights, distance = fine.weights.double(), fine.samples.distance.view(1500, -1).double()
    depth = (weights * distance).sum(1) / weights.sum(1)
    torch.testing.assert_close(rendered.depth.double(), depth, rtol=0, atol=1e-4)
    assert not rendered.rgb.requires_grad
    assert torch.equal(rendered.rgb, field.render(origins, directions, background).rgb)


@pytest.mark.parametrize(("quality", "coarse", "fine"), [(0.5, 6, 10), (1.0, 12, 20), (2.0, 24, 40)])
def test_quality_scales_the_numbers_of_samples(quality, coarse, fine):
    for seen, count in zip(_field().trace(*_rays(3), quality=quality), (coarse, coarse + fine)):
        assert seen.weights.shape == (3, count)


@pytest.mark.parametrize("quality", [0.3, 0.1, 0.01])
def test_the_lowest_quality_still_renders(quality):
    rendered = _field(coarse_samples=8, fine_samples=8).render(*_rays(3), WHITE, quality=quality)
    assert rendered.rgb.isfinite().all()
    assert rendered.rgb.shape == (3, 3)


def test_no_rays_give_no_pixels():
    rendered = _field().render(torch.zeros(0, 3), torch.zeros(0, 3), WHITE)
    assert [part.shape for part in rendered] == [(0, 3), (0,), (0,)]


def test_the_same_seed_gives_the_same_bits_and_another_seed_others():
    field, rays = _field(), _rays(20)
    first = field.trace(*rays, _generator(1))[1].rgb
    before = torch.random.get_rng_state()
    assert torch.equal(first, field.trace(*rays, _generator(1))[1].rgb)
    assert not torch.equal(first, field.trace(*rays, _generator(2))[1].rgb)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_every_parameter_has_a_gradient_also_where_nothing_is():
    field = _field()
    for bias in (0.3, -100.0):
        for network in (field.coarse, field.fine):
            torch.nn.init.constant_(network.to_density.bias, bias)
        field.zero_grad()
        seen = field.trace(*_rays(20), _generator())
        sum((part.rgb + 1 - part.opacity[:, None]).square().sum() for part in seen).backward()
        for name, parameter in field.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any() == (bias > 0), name


@pytest.mark.parametrize("name", ["coarse.layers.0.weight", "fine.to_density.weight", "fine.to_colour.bias"])
def test_gradients_are_finite_differences(name):
    # One octave, so that nothing turns fast; fine samples are drawn from detached weights, so the coarse
    # network's own picture is looked at alone.
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


def test_the_coarse_network_learns_nothing_from_the_fine_networks_picture():
    field = _field()
    _, fine = field.trace(*_rays(20), _generator())
    fine.rgb.sum().backward()
    assert all(p.grad is None for p in field.coarse.parameters())
    assert any(p.grad.any() for p in field.fine.parameters())


# --- points, state ---


def test_densities_and_colours_of_points_are_the_fine_networks_inside_of_the_bounds():
    field = _field()
    field.bounds.copy_(torch.tensor([[-1.0, -0.5, 0.0], [1.0, 0.5, 2.0]]))
    points = torch.rand(300, 3, generator=_generator()) * 4 - 2
    directions = torch.nn.functional.normalize(torch.randn(300, 3, generator=_generator(1)), dim=1)
    inside = ((points >= field.bounds[0]) & (points <= field.bounds[1])).all(1)
    with torch.no_grad():
        density, colour = field.fine(points, directions)
    found = field.density(points)
    torch.testing.assert_close(found[inside], density[inside], rtol=1e-5, atol=1e-6)
    assert (found[~inside] == 0).all()
    assert (density[~inside] > 0).any()
    torch.testing.assert_close(field.colour(points, directions), colour, rtol=0, atol=1e-6)
    assert field.density(points[:0]).shape == (0,)
    assert field.colour(points[:0], points[:0]).shape == (0, 3)


def test_a_field_that_is_loaded_into_a_new_one_renders_the_same_bits():
    field = _field(seed=1)
    field.range.copy_(torch.tensor([0.5, 3.0]))
    field.bounds.mul_(2)
    fresh = _field(seed=2)
    fresh.load_state_dict(field.state_dict())
    for a, b in zip(field.render(*_rays(50), WHITE), fresh.render(*_rays(50), WHITE)):
        assert torch.equal(a, b)
    points = torch.full((1, 3), 1.5)
    assert torch.equal(field.density(points), fresh.density(points))
    assert torch.equal(fresh.bounds, field.bounds)


# --- a coloured ball ---


def _cameras(count, size):
    number = np.arange(count) + 0.5
    height = 1 - 2 * number / count
    turn, out = np.pi * (1 + 5**0.5) * number, np.sqrt(1 - height**2)
    places = 3 * np.stack([out * np.cos(turn), out * np.sin(turn), height], 1)
    return [Camera.of_angle(look_at(place, np.zeros(3)), size, size, 0.7) for place in places]


def _picture(camera, parts=4):
    """A ball of radius 0.6 at the origin over white, coloured by its normal, from 4x4 rays a pixel."""
    fine = camera.resized(camera.width * parts, camera.height * parts)
    origins, directions = camera_rays(fine, torch.arange(fine.width * fine.height))
    along = -(origins * directions).sum(1)
    half = 0.6**2 - origins.square().sum(1) + along.square()
    normals = (origins + (along - half.clamp(min=0).sqrt())[:, None] * directions) / 0.6
    rgb = torch.where(half[:, None] > 0, (normals + 1) / 2, torch.ones(3))
    return rgb.view(camera.height, parts, camera.width, parts, 3).mean((1, 3)).view(-1, 3)


def test_a_small_field_learns_a_ball_to_24_decibels():
    cameras = _cameras(12, 24)
    truth = torch.cat([_picture(camera) for camera in cameras])
    bundles = [camera_rays(camera, torch.arange(24 * 24)) for camera in cameras]
    origins, directions = (torch.cat(part) for part in zip(*bundles))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        field = MlpField(
            near=2.0,
            far=4.0,
            coarse_samples=16,
            fine_samples=16,
            width=32,
            depth=2,
            position_frequencies=5,
            direction_frequencies=2,
        )
    steps, generator = 150, _generator()
    optimizer = torch.optim.Adam(field.parameters())
    for step in range(steps):
        rays = torch.randint(len(truth), (256,), generator=generator)
        seen = field.trace(origins[rays], directions[rays], generator)
        loss = sum((p.rgb + 1 - p.opacity[:, None] - truth[rays]).square().mean() for p in seen)
        optimizer.param_groups[0]["lr"] = 1e-2 * 0.1 ** (step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    errors = [
        (render_image(field, camera, WHITE).rgb.view(-1, 3) - _picture(camera)).square().mean()
        for camera in cameras[::5]
    ]
    # It reaches 26 to 28 dB; an empty picture has 13 or less.
    assert -10 * math.log10(max(float(error) for error in errors)) > 24
