"""The viewer: a trained field in the browser, coarse while the camera moves and sharp once it rests.

viser serves the page and reports each browser's camera; a picture is the background of its empty scene.
"""

import contextlib
import math
import socket
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import rich
import torch
import viser
from viser.transforms import SO3

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import ConfigError
from blacksmith.experiments.lightning.nerf.pictures import depth_colors, to_bytes
from blacksmith.experiments.lightning.nerf.viewer_access import guarded
from blacksmith.models.pytorch.nerf.rendering import RadianceField, camera_rays

RESPONSE_SECONDS = 0.08  # for a preview, and while refining until the next check for a newer camera
IDLE_SECONDS = 0.02  # how often to check for work when there is none
MIN_SIDE = 16  # pixels of the longer side, however slow the field
MAX_CHUNK = 1 << 15  # rays; limits memory

SHOWN = ("color", "depth", "opacity")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "gray": (0.5, 0.5, 0.5)}
RESOLUTIONS = (100, 1600)
QUALITIES = (0.5, 2.0)


class _Server(viser.ViserServer):
    """viser's server, except that a browser cannot make it open a tunnel to a public address."""

    def request_share_url(self, verbose: bool = True) -> str | None:
        return None


def serve(
    field: RadianceField,
    camera: Camera,
    *,
    background: tuple[float, float, float],
    host: str = "127.0.0.1",
    port: int = 8080,
    stop: Callable[[], bool],
) -> None:
    """Shows a field to any number of browsers until `stop()`, checked between chunks of rays; prints its URL.

    Each browser has its own camera and settings. Pages of other origins are refused, but there is no
    password: with any `host` other than the default, everyone who can reach the port can connect.

    Args:
      camera: the first view, without its roll; the horizontal field of view follows the browser's window.
      background: one of `BACKGROUNDS`, until a browser chooses a different one.

    Raises:
      ConfigError: the port is in use, or this machine does not have the address.
    """
    try:
        # Given such a port or host, viser would silently take the next port, or hang.
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        socket.create_server(address, family=family).close()
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror or error}; choose another "
            "nerf.View.port (0 takes a free one), or set nerf.View.host to an address of this machine"
        ) from error
    # A browser may disconnect while its picture is rendered; viser warns about that.
    warnings.filterwarnings("ignore", message="Queued a .* on a closed connection")
    rich.get_console().quiet = True  # viser prints a banner to stdout, which is for results
    with guarded(host), contextlib.ExitStack() as stack:
        server = _Server(host=host, port=port, label="blacksmith", verbose=False)
        stack.callback(server.stop)
        server.scene.set_up_direction("+z")
        server.gui.configure_theme(show_share_button=False, show_logo=False)
        server.initial_camera.position = camera.pose[:, 3]
        server.initial_camera.look_at = pivot(camera, field.bounds.cpu().numpy())
        server.initial_camera.fov = 2 * math.atan(0.5 * camera.height / camera.focal[1])
        browsers: dict[int, Browser] = {}

        @server.on_client_connect
        async def _(client: viser.ClientHandle) -> None:
            browsers[client.client_id] = Browser(client, field, background)

        @server.on_client_disconnect
        async def _(client: viser.ClientHandle) -> None:
            browsers.pop(client.client_id, None)

        print(f"viewer: http://{host}:{server.get_port()} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        while not stop():
            # Every browser gets its turn; a dictionary may not change while it is read.
            busy = [browser.step() for browser in list(browsers.values())]
            if not any(busy):
                time.sleep(IDLE_SECONDS)


class Browser:
    """A connected browser: its panel of settings and the picture that is being rendered for it."""

    def __init__(
        self, client: viser.ClientHandle, field: RadianceField, background: tuple[float, float, float]
    ) -> None:
        self.seconds_per_ray = 1e-4  # at the default quality; a guess at first, then measured
        self._client, self._field = client, field
        self._newest: deque[Iterator[bool]] = deque(maxlen=1)
        self._work: Iterator[bool] = iter(())
        # The one that is given comes first: viser shows the first one selected.
        backgrounds = sorted(BACKGROUNDS, key=lambda name: BACKGROUNDS[name] != background)
        gui = client.gui
        shown = gui.add_dropdown("show", SHOWN)
        behind = gui.add_dropdown("background", backgrounds)
        resolution = gui.add_slider(
            "resolution", *RESOLUTIONS, 1, 800, hint="maximum pixels of the longer side"
        )
        quality = gui.add_slider(
            "quality", *QUALITIES, 0.25, 1.0, hint="samples per ray relative to the default"
        )
        self._frame_time = gui.add_text("frame time", "", disabled=True)

        # viser runs this in its event loop: the camera cannot change meanwhile, and invalid values from a
        # broken browser raise there and not in the loop of `serve`.
        async def change(_: object) -> None:
            if (canvas := camera_of(client.camera)) is not None:
                most = int(np.clip(resolution.value, *RESOLUTIONS))
                full = min(most, max(canvas.width, canvas.height))
                samples = min(QUALITIES[1], max(QUALITIES[0], float(quality.value)))  # NaN is the lowest
                self._newest.append(
                    self._render(canvas, full, shown.value, samples, BACKGROUNDS[behind.value])
                )

        # viser also calls the camera's callback for the update that made the browser count as connected.
        for handle in (shown, behind, resolution, quality, client.camera):
            handle.on_update(change)

    def step(self) -> bool:
        """Renders a preview or a chunk of a finer picture; returns False if there is nothing left to do."""
        if self._newest:
            self._work = self._newest.pop()
        return next(self._work, False)

    @torch.no_grad()
    def _render(
        self, canvas: Camera, full: int, shown: str, quality: float, background: tuple[float, float, float]
    ) -> Iterator[bool]:
        """Sends a preview, then finer pictures up to `full` pixels wide; yields after each chunk of rays."""
        device = self._field.bounds.device
        behind = torch.tensor(background, dtype=torch.float32, device=device)
        longer = max(canvas.width, canvas.height)
        affordable = RESPONSE_SECONDS / (self.seconds_per_ray * quality)
        side = max(MIN_SIDE, int(longer * math.sqrt(affordable / (canvas.width * canvas.height))))
        preview = True
        while True:
            side = side if side < full / 1.5 else full
            sizes = (max(1, round(size * side / longer)) for size in (canvas.width, canvas.height))
            camera = canvas.resized(*sizes)
            # Rows in random order: all chunks cost about the same, even if half of the picture is empty.
            rows = torch.randperm(camera.height)
            pixels = (rows[:, None] * camera.width + torch.arange(camera.width)).flatten()
            # A preview is never interrupted, or a slow field would show nothing while the camera moves.
            chunk = MAX_CHUNK if preview else int(RESPONSE_SECONDS / (self.seconds_per_ray * quality))
            values, seconds = torch.empty(len(pixels), 5), 0.0
            for some in pixels.split(min(max(1, chunk), MAX_CHUNK)):
                start = time.perf_counter()
                seen = self._field.render(*camera_rays(camera, some, device), behind, quality=quality)
                seen = torch.cat([seen.rgb, seen.opacity[:, None], seen.depth[:, None]], dim=-1)
                values[some] = seen.float().cpu()
                seconds += time.perf_counter() - start
                if not preview:
                    yield True
            measured = max(seconds, 1e-6) / (len(pixels) * quality)
            self.seconds_per_ray = math.sqrt(self.seconds_per_ray * measured)  # evens out a hiccup
            self._send(values.view(camera.height, camera.width, 5).numpy(), shown, seconds, side == full)
            yield True
            if side == full:
                return
            side, preview = 2 * side, False

    def _send(self, values: np.ndarray, shown: str, seconds: float, final: bool) -> None:
        """Shows float [height, width, 5] (color, opacity, depth) in the browser."""
        rgb, opacity, depth = values[..., :3], values[..., 3], values[..., 4]
        pixels = to_bytes(rgb)
        if shown == "depth":
            pixels = depth_colors(depth, opacity)
        elif shown == "opacity":
            pixels = to_bytes(np.repeat(opacity[..., None], 3, axis=-1))
        self._client.scene.set_background_image(pixels, "png" if final else "jpeg", jpeg_quality=90)
        self._frame_time.value = f"{1000 * seconds:.0f} ms, {pixels.shape[1]} x {pixels.shape[0]}"
        self._client.flush()


def camera_of(seen: viser.CameraHandle) -> Camera | None:
    """Converts viser's camera, whose axes are OpenCV's: x right, y down, z forward.

    None if it cannot be rendered: a closing window may have no pixels, and a browser can send anything.
    """
    width, height = int(seen.image_width), int(seen.image_height)
    with np.errstate(invalid="ignore", divide="ignore"):
        rotation = SO3(np.asarray(seen.wxyz, np.float64)).as_matrix()
    pose = np.column_stack([rotation * (1, -1, -1), seen.position]).astype(np.float32)
    sizes_fit = 1 <= min(width, height) <= max(width, height) < 1 << 16
    if not (np.isfinite(pose).all() and 0 < seen.fov < math.pi and sizes_fit):
        return None
    focal = 0.5 * height / math.tan(0.5 * seen.fov)
    return Camera(pose, width, height, (focal, focal), (0.5 * width, 0.5 * height))


def pivot(camera: Camera, bounds: np.ndarray) -> np.ndarray:
    """The point that a browser's camera turns around at first, float [3].

    On the optical axis in front of the camera, so that the first view is that of `camera`, as near as
    possible to the middle of `bounds`, float [2, 3].
    """
    position, forward = camera.pose[:, 3], -camera.pose[:, 2]
    distance = float(forward @ (bounds.mean(axis=0) - position))
    return position + max(distance, 0.1 * float(np.linalg.norm(bounds[1] - bounds[0]))) * forward
