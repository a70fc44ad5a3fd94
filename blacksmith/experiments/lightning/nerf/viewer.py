"""The viewer: a trained field in the browser, coarse while the camera moves and fine once it rests.

`serve` is what the experiment calls. viser serves the page and reports each client's camera; the pictures are
rendered here, one slice of rays at a time by the thread that called `serve`, and sent as the background of an
empty scene. Nothing but the installed packages is needed: no screen, no network.
"""

import contextlib
import dataclasses
import math
import socket
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import rich
import torch
import viser

from blacksmith.datasets.blender.cameras import Camera
from blacksmith.errors import ConfigError
from blacksmith.experiments.lightning.nerf.pictures import depth_colours, to_bytes
from blacksmith.models.pytorch.nerf.rendering import RadianceField, camera_rays

# An update that comes just after a picture was begun waits for that picture and then for its own.
PREVIEW_SECONDS = 0.08
# How long refining may go on before it looks whether the camera has moved.
SLICE_SECONDS = 0.04
# How often `stop` is asked while there is nothing to do.
IDLE_SECONDS = 0.05
# How long the end waits for viser's threads.
CLOSING_SECONDS = 0.8

# No preview has fewer pixels along its longer side, however slow the field.
SMALLEST_SIDE = 16
# At a time, for the sake of memory.
MOST_RAYS = 1 << 15

RESOLUTIONS = (100, 1600)
QUALITIES = (0.5, 2.0)
SHOWN = ("colour", "depth", "opacity")
BACKGROUNDS = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0), "grey": (0.5, 0.5, 0.5)}

JPEG_QUALITY = 90

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True)
class Look:
    """What one client wants to see.

    Attributes:
      camera: with as many pixels as the client's canvas has.
      background: colour in [0, 1].
      shown: one of `SHOWN`.
      quality: samples relative to the field's default.
      resolution: the most pixels along the longer side.
    """

    camera: Camera
    background: tuple[float, float, float]
    shown: str = "colour"
    quality: float = 1.0
    resolution: int = 800

    @property
    def side(self) -> int:
        """Pixels along the longer side of the finished picture; it never has more than the canvas."""
        return min(self.resolution, max(self.camera.width, self.camera.height))

    def at(self, side: int) -> Camera:
        """The camera with `side` pixels along its longer side."""
        scale = side / max(self.camera.width, self.camera.height)
        sizes = (max(1, round(length * scale)) for length in (self.camera.width, self.camera.height))
        return self.camera.resized(*sizes)


class Picture(NamedTuple):
    """A picture that was sent.

    Attributes:
      client: viser's number of the client.
      look: what it had asked for.
      camera: what was rendered, at the picture's own size.
      pixels: uint8 [height, width, 3].
      seconds: spent on rendering it.
      asked: when the first camera update came that this picture answers, by the painter's clock; None for a
        refinement.
      sent: when it was handed to the connection, by the same clock.
    """

    client: int
    look: Look
    camera: Camera
    pixels: np.ndarray
    seconds: float
    asked: float | None
    sent: float

    @property
    def final(self) -> bool:
        """Whether it is the last one until the client asks again."""
        return self.asked is None and max(self.camera.width, self.camera.height) == self.look.side


class Pace:
    """How long a ray takes: the median of the last three slices, so that one hiccup changes nothing.

    Args:
      seconds: for a ray at the default quality, to begin with.
    """

    def __init__(self, seconds: float = 1e-4) -> None:
        self._last = deque([max(seconds, 1e-9)], maxlen=3)

    @property
    def seconds(self) -> float:
        """For a ray at the default quality."""
        return sorted(self._last)[len(self._last) // 2]

    def learn(self, rays: int, quality: float, seconds: float) -> None:
        """Takes note that so many rays took `seconds`."""
        self._last.append(max(seconds, 1e-9) / (rays * quality))

    def rays(self, seconds: float, quality: float) -> int:
        """How many rays `seconds` are enough for, at least one."""
        return max(1, int(seconds / (self.seconds * quality)))

    def preview_side(self, look: Look, seconds: float) -> int:
        """Pixels along the longer side of a picture that takes about `seconds`, `SMALLEST_SIDE` or more."""
        camera = look.camera
        scale = math.sqrt(self.rays(seconds, look.quality) / (camera.width * camera.height))
        side = max(int(max(camera.width, camera.height) * scale), SMALLEST_SIDE)
        return min(side, look.side)


def refinements(preview: int, full: int) -> list[int]:
    """The longer sides of the pictures that follow a preview, each twice the one before, up to `full`."""
    sides = [full]
    while sides[0] // 2 >= 1.5 * preview:
        sides.insert(0, sides[0] // 2)
    return sides


class Drawing:
    """A picture that is being rendered.

    Its rows come in an order in which every stretch of them is spread over the whole height. So any slice
    costs about as much as another of its length, whatever part of the picture is empty.

    Args:
      look: what is to be seen.
      side: pixels along the longer side.
      asked: see `Picture`.
    """

    def __init__(self, look: Look, side: int, asked: float | None) -> None:
        self.look, self.asked = look, asked
        self.camera = look.at(side)
        self.seconds = 0.0
        rows = np.argsort(np.arange(self.camera.height) * _GOLDEN % 1)
        pixels = rows[:, None] * self.camera.width + np.arange(self.camera.width)
        self._pixels = torch.from_numpy(pixels.ravel())
        self._values = torch.empty(len(self._pixels), 5)
        self._done = 0

    @property
    def rays_left(self) -> int:
        """How many rays are still to be rendered."""
        return len(self._pixels) - self._done

    @torch.no_grad()
    def render(self, field: RadianceField, rays: int) -> None:
        """Renders the next `rays` rays."""
        pixels = self._pixels[self._done : self._done + rays]
        device = field.bounds.device
        background = torch.tensor(self.look.background, dtype=torch.float32, device=device)
        origins, directions = camera_rays(self.camera, pixels, device)
        seen = field.render(origins, directions, background, quality=self.look.quality)
        values = torch.cat([seen.rgb, seen.opacity[:, None], seen.depth[:, None]], dim=-1)
        self._values[pixels] = values.float().cpu()
        self._done += len(pixels)

    def pixels(self) -> np.ndarray:
        """The finished picture, uint8 [height, width, 3]."""
        values = self._values.view(self.camera.height, self.camera.width, 5).numpy()
        rgb, opacity, depth = values[..., :3], values[..., 3], values[..., 4]
        if self.look.shown == "depth":
            return depth_colours(depth, opacity)
        if self.look.shown == "opacity":
            return to_bytes(np.repeat(opacity[..., None], 3, axis=-1))
        return to_bytes(rgb)


@dataclass
class _View:
    """One client, as the painter sees it."""

    send: Callable[[Picture], None]
    pace: Pace
    look: Look | None = None
    asked: float | None = None
    drawing: Drawing | None = None
    sides: list[int] = dataclasses.field(default_factory=list)
    served: float = -math.inf

    @property
    def busy(self) -> bool:
        return self.asked is not None or self.drawing is not None or bool(self.sides)

    def begin(self, seconds: float) -> Drawing:
        """What to go on with: a preview is finished, a refinement is given up when the camera has moved."""
        if self.asked is not None and (self.drawing is None or self.drawing.asked is None):
            side = self.pace.preview_side(self.look, seconds)
            self.drawing = Drawing(self.look, side, self.asked)
            self.sides = refinements(side, self.look.side)
            self.asked = None
        elif self.drawing is None:
            self.drawing = Drawing(self.look, self.sides.pop(0), None)
        return self.drawing


class Painter:
    """Renders for all clients in one thread: each in turn gets a slice of rays.

    The time of a preview is divided among those that wait, so that a round over all takes no longer than one
    preview for a single client. `join`, `ask` and `leave` may be called from any thread, `turn` from one.

    Args:
      field: what is rendered.
      on_picture: called in the rendering thread with every picture that was sent.
      clock: seconds, increasing.
    """

    def __init__(
        self,
        field: RadianceField,
        on_picture: Callable[[Picture], None] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._field, self._on_picture, self._clock = field, on_picture, clock
        self._pace = Pace()
        self._views: dict[int, _View] = {}
        self._changed = threading.Condition()

    def warm_up(self, look: Look) -> None:
        """Renders two small pictures: the first meets what happens once, the second shows the pace."""
        for side in (SMALLEST_SIDE // 2, SMALLEST_SIDE):
            drawing = Drawing(look, side, None)
            seconds, rays = self._slice(drawing, drawing.rays_left)
            self._pace = Pace(seconds / (rays * look.quality))

    def join(self, client: int, send: Callable[[Picture], None]) -> None:
        """A new client; `send` is called in the rendering thread."""
        with self._changed:
            self._views[client] = _View(send, Pace(self._pace.seconds))

    def ask(self, client: int, look: Look) -> None:
        """A client wants to see something else; only the latest counts. Nothing happens if it has left."""
        with self._changed:
            if (view := self._views.get(client)) is not None:
                view.look = look
                view.asked = self._clock() if view.asked is None else view.asked
                self._changed.notify()

    def leave(self, client: int) -> None:
        """A client is gone, and its work with it."""
        with self._changed:
            self._views.pop(client, None)

    def wait(self, seconds: float) -> None:
        """Waits until somebody asks for something, `seconds` at most."""
        with self._changed:
            if not any(view.busy for view in self._views.values()):
                self._changed.wait(seconds)

    def turn(self) -> bool:
        """Renders a slice for the client whose last turn is longest ago; False if there is nothing to do."""
        with self._changed:
            busy = {client: view for client, view in self._views.items() if view.busy}
            if not busy:
                return False
            client, view = min(busy.items(), key=lambda item: item[1].served)
            drawing = view.begin(PREVIEW_SECONDS / len(busy))
        preview = drawing.asked is not None
        limit = (PREVIEW_SECONDS if preview else SLICE_SECONDS) / len(busy)
        rays = min(view.pace.rays(limit, drawing.look.quality), MOST_RAYS)
        # A small rest is not worth a turn of its own, and would say little about the pace.
        seconds, rays = self._slice(drawing, rays if drawing.rays_left > 1.25 * rays else drawing.rays_left)
        view.pace.learn(rays, drawing.look.quality, seconds)
        view.served = self._clock()
        if drawing.rays_left == 0:
            pixels = drawing.pixels()
            with self._changed:
                view.drawing = None
                wanted = client in self._views and (preview or view.asked is None)
            if wanted:
                self._send(client, view, drawing, pixels)
        return True

    def _slice(self, drawing: Drawing, rays: int) -> tuple[float, int]:
        """Renders up to so many rays; the seconds that took and how many there were."""
        rays, start = min(rays, drawing.rays_left), self._clock()
        drawing.render(self._field, rays)
        seconds = self._clock() - start
        drawing.seconds += seconds
        return seconds, rays

    def _send(self, client: int, view: _View, drawing: Drawing, pixels: np.ndarray) -> None:
        picture = Picture(
            client, drawing.look, drawing.camera, pixels, drawing.seconds, drawing.asked, self._clock()
        )
        view.send(picture)
        if self._on_picture is not None:
            self._on_picture(picture._replace(sent=self._clock()))


def camera_of(wxyz: np.ndarray, position: np.ndarray, fov: float, width: int, height: int) -> Camera:
    """Our camera from viser's, whose axes are those of OpenCV: x right, y down, z where it looks.

    Args:
      wxyz: its rotation in the world as a quaternion, float [4], of any length but 0.
      position: in the world, float [3].
      fov: vertical field of view, in radians.
      width: of the picture, in pixels, which are square.
      height: of the picture, in pixels.

    Raises:
      ValueError: a number is not finite, or there is no such camera.
    """
    w, x, y, z = np.asarray(wxyz, np.float64) / np.linalg.norm(wxyz)
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.column_stack([rotation * (1, -1, -1), position]).astype(np.float32)
    if not (np.isfinite(pose).all() and 0 < fov < math.pi and min(width, height) >= 1):
        raise ValueError(f"no camera has pose {pose.tolist()}, fov {fov}, size {width} x {height}")
    focal = 0.5 * height / math.tan(0.5 * fov)
    return Camera(pose, int(width), int(height), (focal, focal), (0.5 * width, 0.5 * height))


def pivot(camera: Camera, bounds: np.ndarray) -> np.ndarray:
    """What a client's camera turns around at first, float [3].

    The point on the optical axis that is nearest to the centre of `bounds`, float [2, 3], so that the first
    view is that of `camera` also where it does not look at the centre itself.
    """
    position, forward = camera.pose[:, 3], -camera.pose[:, 2]
    distance = float(forward @ (bounds.mean(axis=0) - position))
    return position + max(distance, 0.1 * float(np.linalg.norm(bounds[1] - bounds[0]))) * forward


class _Server(viser.ViserServer):
    """viser's server without its way out: a client cannot make it open a tunnel to a public address."""

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
    up: str = "+z",
    resolution: int = 800,
    ready: Callable[[int], None] | None = None,
    on_picture: Callable[[Picture], None] | None = None,
) -> None:
    """Shows a field to any number of browsers until `stop()`; its URL goes to stderr.

    Each client has a camera and a panel of its own, all share the calling thread, which renders. Nobody is
    asked for a password: with any other `host` than the default, whoever reaches the port can look.

    Args:
      field: what is shown.
      camera: where a client begins, without its roll; its horizontal field of view follows the window.
      background: the colour behind the field, in [0, 1], until a client chooses another.
      host: address to listen on.
      port: to listen on; 0 takes a free one.
      stop: asked about 20 times a second.
      up: the direction that stays upwards, "+z" or another axis with its sign.
      resolution: the most pixels along the longer side until a client chooses another.
      ready: called with the port once connections are accepted.
      on_picture: called with every picture that was sent.

    Raises:
      ConfigError: the port is taken or cannot be bound.
    """
    _check_free(host, port)
    painter = Painter(field, on_picture)
    painter.warm_up(Look(camera, background))
    # A picture may be finished just when its client goes; that is no news to anybody.
    warnings.filterwarnings("ignore", message="Queued a .* on a closed connection")
    with _quiet():
        server = _Server(host=host, port=port, label="blacksmith", verbose=False)
    try:
        if port not in (0, server.get_port()):
            raise ConfigError(f"port {port} on {host} was taken just now; choose another, 0 for any free one")
        bounds = field.bounds.detach().cpu().numpy().astype(np.float64)
        server.scene.set_up_direction(up)
        server.initial_camera.position = camera.pose[:, 3]
        server.initial_camera.look_at = pivot(camera, bounds)
        server.initial_camera.fov = 2 * math.atan(0.5 * camera.height / camera.focal[1])
        server.gui.configure_theme(show_share_button=False, show_logo=False)

        @server.on_client_connect
        async def _(client: viser.ClientHandle) -> None:
            _welcome(client, painter, background, resolution)

        @server.on_client_disconnect
        async def _(client: viser.ClientHandle) -> None:
            painter.leave(client.client_id)

        print(f"viewer: {_url(host, server.get_port())} (Ctrl-C ends it)", file=sys.stderr, flush=True)
        if ready is not None:
            ready(server.get_port())
        while not stop():
            if not painter.turn():
                painter.wait(IDLE_SECONDS)
    finally:
        # In a thread, since viser waits for seconds for a browser that is frozen. The port is free at once.
        closing = threading.Thread(target=server.stop, daemon=True)
        with _quiet():
            closing.start()
            closing.join(CLOSING_SECONDS)


def _welcome(
    client: viser.ClientHandle, painter: Painter, background: tuple[float, float, float], resolution: int
) -> None:
    """Gives a client its panel and follows its camera; runs in viser's event loop, as the callbacks do."""
    backgrounds = {name: colour for name, colour in BACKGROUNDS.items() if colour != tuple(background)}
    given = next((name for name, colour in BACKGROUNDS.items() if colour == tuple(background)), "as given")
    backgrounds = {given: tuple(background), **backgrounds}
    gui = client.gui
    shown = gui.add_dropdown("show", SHOWN)
    behind = gui.add_dropdown("background", tuple(backgrounds))
    low, high = RESOLUTIONS
    cap = gui.add_slider(
        "resolution",
        min(low, resolution),
        max(high, resolution),
        1,
        resolution,
        hint="the most pixels along the longer side",
    )
    quality = gui.add_slider(
        "quality", *QUALITIES, 0.25, 1.0, hint="samples along each ray, relative to the default"
    )
    frame_time = gui.add_text("frame time", "", disabled=True)

    def look() -> Look:
        seen = client.camera
        return Look(
            camera_of(seen.wxyz, seen.position, seen.fov, seen.image_width, seen.image_height),
            backgrounds[behind.value],
            shown.value,
            min(QUALITIES[1], max(QUALITIES[0], float(quality.value))),
            min(max(high, resolution), max(1, int(cap.value))),
        )

    def send(picture: Picture) -> None:
        width, height = picture.camera.width, picture.camera.height
        if picture.final:
            client.scene.set_background_image(picture.pixels, "png")
        else:
            client.scene.set_background_image(picture.pixels, "jpeg", jpeg_quality=JPEG_QUALITY)
        frame_time.value = f"{1000 * picture.seconds:.0f} ms, {width} x {height}"
        client.flush()

    async def changed(_: object) -> None:
        # A window that is being closed or hidden can report a canvas without pixels.
        with contextlib.suppress(ValueError):
            painter.ask(client.client_id, look())

    # viser calls the camera's callback for the update that made it call this function, too.
    for handle in (shown, behind, cap, quality, client.camera):
        handle.on_update(changed)
    painter.join(client.client_id, send)


def _check_free(host: str, port: int) -> None:
    """Binds the port and lets go of it: viser would take the next one without a word.

    Raises:
      ConfigError: it cannot be bound.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} is not one of 0..65535")
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, kind, protocol, _, address in addresses:
            with socket.socket(family, kind, protocol) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {reason}; choose another port, 0 for any free one, "
            "or an address of this machine"
        ) from error


def _url(host: str, port: int) -> str:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps viser's banner and farewell off stdout, which is for results."""
    console = rich.get_console()
    before, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = before
