"""Random shifts and rotations of images small enough to check by hand."""

import numpy as np
import pytest

IMAGES = np.random.default_rng(0).normal(0, 1, (3, 7, 7)).astype(np.float32)
BACKGROUND = -0.5


def changed(backend, parameters, images=IMAGES, background=BACKGROUND):
    """The images, all changed by the same (down, right, radians)."""
    return backend.run(
        "augment",
        images=images.tolist(),
        parameters=[list(parameters)] * len(images),
        background=background,
    )["images"]


def shifted(images, down, right):
    """`np.roll` with the background where pixels came in from outside."""
    out = np.roll(images, (down, right), axis=(1, 2))
    rows, columns = np.indices(images.shape[1:])
    inside = (
        (rows - down >= 0)
        & (rows - down < images.shape[1])
        & (columns - right >= 0)
        & (columns - right < images.shape[2])
    )
    return np.where(inside, out, np.float32(BACKGROUND))


def test_zero_parameters_change_no_bit(backend):
    assert np.array_equal(changed(backend, (0, 0, 0)), IMAGES)


@pytest.mark.parametrize(
    ("down", "right"), [(1, 0), (-1, 0), (0, 2), (0, -2), (3, -1), (7, 0), (0, -9), (20, 20)]
)
def test_shifts_by_whole_pixels(backend, down, right):
    assert np.array_equal(changed(backend, (down, right, 0)), shifted(IMAGES, down, right))


def test_a_shift_by_half_a_pixel_averages_two(backend):
    padded = np.concatenate([np.full((3, 1, 7), BACKGROUND, np.float32), IMAGES], axis=1)
    expected = (padded[:, :-1] + padded[:, 1:]) / 2
    np.testing.assert_allclose(changed(backend, (0.5, 0, 0)), expected, atol=1e-6)


@pytest.mark.parametrize("side", [7, 6])
@pytest.mark.parametrize("turns", [1, -1, 2])
def test_positive_rotation_is_clockwise(backend, turns, side):
    images = IMAGES[:, :side, :side]
    # The cosine of pi / 2 in float32 moves points by 4e-7 of a pixel.
    expected = np.rot90(images, -turns, axes=(1, 2))
    np.testing.assert_allclose(changed(backend, (0, 0, turns * np.pi / 2), images), expected, atol=1e-5)


def test_rotation_comes_before_the_shift(backend):
    expected = shifted(np.rot90(IMAGES, -1, axes=(1, 2)), 2, -1)
    np.testing.assert_allclose(changed(backend, (2, -1, np.pi / 2)), expected, atol=1e-5)


def test_corners_outside_a_rotated_image_are_background(backend):
    turned = changed(backend, (0, 0, np.pi / 4), np.full((1, 9, 9), 3.0, np.float32))[0]
    # The corners are 5.66 from the center, the edge 4 and its last interpolated pixel 5.
    assert [turned[i, j] for i in (0, -1) for j in (0, -1)] == [BACKGROUND] * 4
    assert turned[4, 4] == pytest.approx(3.0, abs=1e-6)


def test_every_image_has_its_own_parameters(backends):
    parameters = [(1, 0, 0), (0, 1, 0), (0.3, -0.7, 0.2)]
    jax, torch = backends.both(
        "augment", images=IMAGES.tolist(), parameters=parameters, background=BACKGROUND
    )
    assert np.array_equal(jax["images"][0], shifted(IMAGES, 1, 0)[0])
    assert np.array_equal(jax["images"][1], shifted(IMAGES, 0, 1)[1])
    np.testing.assert_allclose(jax["images"], torch["images"], atol=1e-5)


def test_drawn_parameters_fill_their_limits(backend):
    drawn = backend.run("draw_augmentation", shift=2.0, rotate=30.0, count=2000)["parameters"]
    assert drawn.dtype == np.float32
    limits = np.array([2.0, 2.0, np.pi / 6])
    assert (np.abs(drawn) <= limits * (1 + 1e-6)).all()
    # Of 2,000 uniform draws the extremes come within 1% and the mean within 5% of the range.
    assert (drawn.max(axis=0) > 0.99 * limits).all()
    assert (drawn.min(axis=0) < -0.99 * limits).all()
    assert (np.abs(drawn.mean(axis=0)) < 0.05 * limits).all()


AUGMENT = {"shift": 1.0, "rotate": 20.0, "background": 0.1}


def test_augmented_training_agrees_on_both_backends(backends):
    jax, torch = backends.both("train", lengths=[14], augment=AUGMENT)
    plain = backends.on("jax", "train", lengths=[14])
    np.testing.assert_allclose(jax["loss"], torch["loss"], rtol=2e-5)
    assert not np.isclose(jax["loss"], plain["loss"], rtol=1e-3).all()


def test_augmented_training_resumes_bit_for_bit(backend):
    whole = backend.run("train", lengths=[14], augment=AUGMENT)
    half = backend.run("train", lengths=[5], augment=AUGMENT)
    rest = backend.run("train", lengths=[9], start=5, load=half.path, augment=AUGMENT)
    for name, array in whole.under("state/").items():
        assert array.tobytes() == rest[f"state/{name}"].tobytes(), name


def test_accumulation_augments_like_the_whole_batch(backend):
    whole, parts = (
        backend.run("train", lengths=[7], augment=AUGMENT, accumulate=n, optimizer={"name": "sgd"})
        for n in (1, 4)
    )
    np.testing.assert_allclose(parts["loss"], whole["loss"], rtol=1e-6)
