"""Random shifts and rotations of images, drawn with NumPy and applied inside the compiled step."""

import numpy as np
from keras import ops


class ShiftAndRotate:
    """Moves each image by up to `shift` pixels along each axis and rotates it by up to `rotate` degrees.

    Interpolation is bilinear. Pixels that come in from outside have the value `background`.
    """

    def __init__(self, shift: float, rotate: float, background: float = 0.0) -> None:
        self.shift, self.rotate, self.background = shift, rotate, background

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Shift down, shift right (pixels) and clockwise rotation (radians): float32 [count, 3]."""
        limits = np.array([self.shift, self.shift, np.deg2rad(self.rotate)])
        return (rng.uniform(-1, 1, (count, 3)) * limits).astype(np.float32)

    def apply(self, inputs: object, parameters: object) -> object:
        """Images [batch, height, width] rotated about their centers, then shifted, by parameters [batch, 3].

        Each output pixel is sampled at the point of the input that it comes from; outside is background.
        """
        height, width = inputs.shape[1:]
        down, right = parameters[:, 0, None, None], parameters[:, 1, None, None]
        cos = ops.cos(parameters[:, 2])[:, None, None]
        sin = ops.sin(parameters[:, 2])[:, None, None]
        y = (ops.arange(height, dtype="float32") - (height - 1) / 2)[None, :, None] - down
        x = (ops.arange(width, dtype="float32") - (width - 1) / 2)[None, None, :] - right
        source_y = cos * y - sin * x + (height - 1) / 2
        source_x = sin * y + cos * x + (width - 1) / 2
        # All points outside are clipped into a frame of background: one pixel before the image and two after
        # it, so that a point on the far edge has a next pixel too.
        padded = ops.pad(inputs, [[0, 0], [1, 2], [1, 2]], constant_values=float(self.background))
        source_y = ops.clip(source_y + 1, 0.0, height + 1.0)
        source_x = ops.clip(source_x + 1, 0.0, width + 1.0)
        top, left = ops.floor(source_y), ops.floor(source_x)
        part_y, part_x = source_y - top, source_x - left
        first = ops.cast(top, "int32") * (width + 3) + ops.cast(left, "int32")
        flat = ops.reshape(padded, (inputs.shape[0], (height + 3) * (width + 3)))

        def pixel(offset: int) -> object:
            places = ops.reshape(first + offset, (inputs.shape[0], height * width))
            return ops.reshape(ops.take_along_axis(flat, places, axis=1), (inputs.shape[0], height, width))

        upper = pixel(0) * (1 - part_x) + pixel(1) * part_x
        lower = pixel(width + 3) * (1 - part_x) + pixel(width + 4) * part_x
        return upper * (1 - part_y) + lower * part_y
