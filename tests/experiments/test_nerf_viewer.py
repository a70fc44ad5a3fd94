"""The viewer of radiance fields: cameras, the order of pictures, the server, and a real browser."""

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import types
import urllib.parse
import urllib.request

import numpy as np
import psutil
import pytest
import torch
import viser
from PIL import Image
from pinhole import camera_of, project
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from blacksmith.datasets.blender.cameras import look_at
from blacksmith.errors import ConfigError
from blacksmith.experiments.lightning.nerf import viewer
from blacksmith.experiments.lightning.nerf.pictures import depth_colors, to_bytes
from blacksmith.experiments.lightning.nerf.viewer_access import refusal
from blacksmith.models.pytorch.nerf.rendering import Rendered, render_image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHITE = (1.0, 1.0, 1.0)


class Ball:
    """An opaque ball around the origin whose color is its normal, so that no two views are alike.

    Remembers the quality, the background and the first ray's origin of the latest call, and counts rays.
    """

    bounds = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    radius = 0.8

    def __init__(self):
        self.rays = 0

    def render(self, origins, directions, background, *, quality=1.0):
        self.rays += len(origins)
        self.quality, self.background, self.position = quality, tuple(background.tolist()), origins[0].numpy()
        closest = -(origins * directions).sum(-1)
        past = (origins + closest[:, None] * directions).square().sum(-1)
        depth = closest - (self.radius**2 - past).clamp(min=0).sqrt()
        opacity = (past < self.radius**2).float()
        color = 0.5 + 0.5 * torch.nn.functional.normalize(origins + depth[:, None] * directions, dim=-1)
        rgb = color * opacity[:, None] + background * (1 - opacity)[:, None]
        return Rendered(rgb, opacity, depth * opacity)


CAMERA = camera_of(look_at(np.array([2.5, -2.0, 1.5]), np.zeros(3)), 400, 300, 0.8)


def expected(camera):
    seen = render_image(Ball(), camera, torch.tensor(WHITE))
    return to_bytes(seen.rgb.numpy())


# --- cameras ---


def viser_camera(**changes):
    camera = {"wxyz": (1, 0, 0, 0), "position": (0, 0, 0), "fov": 1.0, "image_width": 40, "image_height": 20}
    return types.SimpleNamespace(**{**camera, **changes})


def test_viser_cameras_keep_axes_and_field_of_view():
    # Unturned, viser's camera looks along z with y down: ours has its y and z axes the other way round.
    camera = viewer.camera_of(viser_camera(position=(1, 2, 3), fov=np.pi / 2))
    np.testing.assert_allclose(camera.pose, [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3]], atol=1e-7)
    assert camera.focal == pytest.approx((10, 10)), "90 degrees over 20 pixels"
    seen, depth = project(camera, np.array([[1.0, 2.0, 5.0], [2.0, 2.0, 5.0], [1.0, 3.0, 5.0]]))
    np.testing.assert_allclose(depth, 2)
    np.testing.assert_allclose(seen, [[20, 10], [25, 10], [20, 15]], err_msg="x is right, y is down")
    # A quarter turn about x takes what was down to where it looks: viser's z axis becomes -y, its y axis z.
    camera = viewer.camera_of(viser_camera(wxyz=(2, 2, 0, 0)))
    np.testing.assert_allclose(camera.pose[:, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-7)


@pytest.mark.parametrize(
    "wrong",
    [
        {"wxyz": (0, 0, 0, 0)},
        {"position": (np.inf, 0, 0)},
        {"fov": np.nan},
        {"image_width": 0},
        {"image_width": 10**200},
    ],
)
def test_unusable_cameras_are_ignored(wrong):
    assert viewer.camera_of(viser_camera(**wrong)) is None


def test_the_pivot_is_on_the_axis_and_in_front():
    bounds = Ball.bounds.numpy()
    aside = camera_of(look_at(np.array([3.0, 0.5, 0.0]), np.array([0.0, 0.5, 0.0])), 4, 4, 1.0)
    np.testing.assert_allclose(viewer.pivot(aside, bounds), [0, 0.5, 0], atol=1e-6)
    away = camera_of(look_at(np.array([3.0, 0.0, 0.0]), np.array([9.0, 0.0, 0.0])), 4, 4, 1.0)
    assert viewer.pivot(away, bounds)[0] > 3


# --- the order of pictures ---


class Field:
    """A field of viser's panel, or its camera: changes are reported to the viewer's callback."""

    def __init__(self, **values):
        vars(self).update(values)

    def on_update(self, callback):
        self._callback = callback

    def change(self, **values):
        vars(self).update(values)
        with contextlib.suppress(StopIteration):
            self._callback(None).send(None)


class Client:
    """Stands for viser's handle of a browser; records the pictures that are sent to it."""

    def __init__(self, width=800, height=600):
        wxyz = viser.transforms.SO3.from_matrix(CAMERA.pose[:, :3] * (1, -1, -1)).wxyz
        camera = {"wxyz": wxyz, "position": CAMERA.pose[:, 3], "fov": 0.6}
        self.camera = Field(**camera, image_width=width, image_height=height)
        self.gui = self.scene = self
        self.panel, self.pictures, self.formats = {}, [], []

    def add_dropdown(self, name, options):
        return self.panel.setdefault(name, Field(value=options[0]))

    def add_slider(self, name, low, high, step, value, hint):
        return self.panel.setdefault(name, Field(value=value))

    def add_text(self, name, value, disabled):
        return self.panel.setdefault(name, Field(value=value))

    def set_background_image(self, pixels, format, jpeg_quality):
        self.pictures.append(pixels)
        self.formats.append(format)

    def flush(self):
        pass

    @property
    def widths(self):
        return [pixels.shape[1] for pixels in self.pictures]


def connected(client, seconds_per_ray=1e-5):
    """A browser whose field takes so long, and its field."""
    field = Ball()
    browser = viewer.Browser(client, field, WHITE)
    browser.seconds_per_ray = seconds_per_ray
    client.camera.change()
    return browser, field


def finish(browser):
    while browser.step():
        pass


def test_a_resting_camera_gets_a_preview_then_the_full_picture():
    client = Client()
    browser, field = connected(client)
    browser.step()
    # 8,000 rays take 0.08 seconds: a sixtieth of 800 x 600 pixels.
    assert client.widths == [int(800 / 60**0.5)]
    finish(browser)
    assert client.widths == [103, 206, 412, 800]
    assert client.formats == ["jpeg", "jpeg", "jpeg", "png"]
    np.testing.assert_array_equal(client.pictures[-1], expected(viewer.camera_of(client.camera)))
    assert "800 x 600" in client.panel["frame time"].value
    rays = field.rays
    assert not browser.step()
    assert field.rays == rays, "a finished picture costs nothing"


@pytest.mark.parametrize(("seconds", "width"), [(1e-3, viewer.MIN_SIDE), (1e-9, 800)])
def test_previews_fit_the_speed_of_the_field(seconds, width):
    client = Client()
    browser, _ = connected(client, seconds)
    browser.step()
    assert client.widths == [width]


def test_the_newest_camera_replaces_a_picture_in_progress():
    client = Client()
    browser, field = connected(client)
    browser.step()
    browser.step()
    assert len(client.pictures) == 1, "the second picture is in progress"
    field.rays = 0
    client.camera.change(image_width=500)
    client.camera.change(image_width=400)
    finish(browser)
    assert client.pictures[1].shape[1] / client.pictures[1].shape[0] == pytest.approx(4 / 6, rel=0.05)
    assert client.pictures[-1].shape == (600, 400, 3)
    assert field.rays == sum(pixels.shape[0] * pixels.shape[1] for pixels in client.pictures[1:])


def test_a_moving_camera_still_gets_previews():
    client = Client()
    browser, _ = connected(client, 1e-3)
    for step in range(5):
        client.camera.change(position=CAMERA.pose[:, 3] * (1 + step / 10))
        browser.step()
    assert len(client.pictures) == 5


def test_settings_change_the_picture():
    client = Client(40, 30)
    browser, field = connected(client)
    seen = render_image(Ball(), viewer.camera_of(client.camera), torch.zeros(3))
    wanted = {
        "color": to_bytes(seen.rgb.numpy()),
        "depth": depth_colors(seen.depth.numpy(), seen.opacity.numpy()),
        "opacity": to_bytes(np.repeat(seen.opacity.numpy()[..., None], 3, axis=-1)),
    }
    assert tuple(wanted) == viewer.SHOWN
    client.panel["background"].change(value="black")
    for shown, pixels in wanted.items():
        client.panel["show"].change(value=shown)
        finish(browser)
        np.testing.assert_array_equal(client.pictures[-1], pixels)
    for sent, used in ((1.5, 1.5), (1e9, 2.0), (np.nan, 0.5)):
        client.panel["quality"].change(value=sent)
        browser.step()
        assert field.quality == used, "a browser can send a value beyond the slider"


# --- the server ---


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(field):
    """A server in a thread; yields its port."""
    port, stop, failures = free_port(), threading.Event(), []

    def main():
        try:
            viewer.serve(field, CAMERA, background=WHITE, port=port, stop=stop.is_set)
        except BaseException as error:
            failures.append(error)

    def listening():
        assert failures == []
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True

    thread = threading.Thread(target=main)
    thread.start()
    try:
        wait_for(listening)
        yield port
    finally:
        stop.set()
        thread.join(30)
    assert not thread.is_alive()
    assert failures == []


def test_a_port_in_use_is_an_error():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*in use.*choose another nerf.View.port"):
            viewer.serve(Ball(), CAMERA, background=WHITE, port=port, stop=lambda: True)


def test_an_address_of_another_machine_is_an_error():
    # 192.0.2.1 is reserved for documentation: no machine has it.
    with pytest.raises(ConfigError, match=r"of 192\.0\.2\.1: .*nerf\.View\.host"):
        viewer.serve(Ball(), CAMERA, background=WHITE, host="192.0.2.1", port=0, stop=lambda: True)


def test_only_this_machine_is_served_and_nothing_is_left_behind(capfd):
    before = set(threading.enumerate())
    with serving(Ball()) as port:
        connections = psutil.Process().net_connections(kind="tcp")
        listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        assert [address.ip for address in listening] == ["127.0.0.1"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as page:
            assert b"<html" in page.read()
    with socket.create_server(("127.0.0.1", port), reuse_port=False):
        pass
    wait_for(lambda: set(threading.enumerate()) <= before)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"viewer: http://127.0.0.1:{port} (Ctrl-C ends it)\n"


def test_a_client_cannot_make_the_server_public(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a tunnel was opened")

    monkeypatch.setattr("viser._viser.ViserTunnel", refuse)
    server = viewer._Server(host="127.0.0.1", port=0, verbose=False)
    try:
        assert server.request_share_url() is None
    finally:
        server.stop()


def reply(port, *, upgrade=False, **headers):
    """Status and body of the answer to a request with these headers."""
    headers = {"Host": f"127.0.0.1:{port}"} | headers
    if upgrade:
        key = {"Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==", "Sec-WebSocket-Version": "13"}
        headers |= {"Upgrade": "websocket", "Connection": "Upgrade"} | key
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", "/", headers=headers)
    answer = connection.getresponse()
    body = b"" if answer.status == 101 else answer.read()
    connection.close()
    return answer.status, body


@pytest.mark.parametrize("upgrade", [False, True], ids=["page", "websocket"])
def test_only_the_viewers_own_page_is_answered(upgrade):
    welcome = 101 if upgrade else 200
    with serving(Ball()) as port:
        own = f"http://127.0.0.1:{port}"
        assert reply(port, upgrade=upgrade)[0] == welcome  # not a browser: it sends no Origin
        assert reply(port, upgrade=upgrade, Origin=own)[0] == welcome
        tunnel = {"Host": "localhost:9000", "Origin": "http://localhost:9000"}
        assert reply(port, upgrade=upgrade, **tunnel)[0] == welcome
        for origin in ("https://example.org", "null", f"http://127.0.0.1:{port + 1}"):
            assert reply(port, upgrade=upgrade, Origin=origin) == (
                403,
                b"refused: it comes from a page of another origin\n",
            )
        status, body = reply(
            port, upgrade=upgrade, Host="rebound.example.org", Origin="http://rebound.example.org"
        )
        assert status == 403
        assert b"'rebound.example.org' is not a name of this machine" in body


@pytest.mark.parametrize(
    ("host", "hosts", "refused"),
    [
        ("0.0.0.0", ["192.0.2.7:8080"], False),
        ("0.0.0.0", ["[::1]:8080"], False),
        ("gpu.lan", ["GPU.lan:8080"], False),
        ("0.0.0.0", [f"{socket.gethostname()}:8080"], False),
        ("0.0.0.0", ["gpu.lan:8080"], True),
        ("127.0.0.1", ["localhost.example.org"], True),
        ("127.0.0.1", ["127.0.0.1.example.org"], True),
        ("127.0.0.1", [], True),
        ("127.0.0.1", ["127.0.0.1", "127.0.0.1"], True),
        ("127.0.0.1", ["[::1"], True),
        ("127.0.0.1", [""], True),
    ],
)
def test_hosts_are_addresses_or_names_of_this_machine(host, hosts, refused):
    assert (refusal(host, hosts, []) is not None) == refused


def test_junk_is_one_line_and_the_viewer_goes_on(capfd):
    junk = [
        b"",
        b"\x00",
        b"\xc1" * 40,
        b"\x91" * 5000,
        b"\x81\xa4type\xa9NoSuchOne",
        "text",
        b"\x82\xa4type\x01",
    ]
    with serving(Ball()) as port:
        for message in junk * 3:
            address = f"ws://127.0.0.1:{port}"
            with connect(address, subprotocols=[f"viser-v{viser.__version__}"]) as page:
                page.send(message)
                with contextlib.suppress(ConnectionClosed):
                    while True:
                        page.recv(timeout=10)
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            stranger.sendall(b"\x16\x03\x01 not HTTP\r\n\r\n")
            stranger.recv(1000)
        assert reply(port)[0] == 200
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("viewer: http")
    assert 1 <= len(lines[1:]) <= len(junk)
    assert all(line.startswith("viewer: ignored a message that is not from its page (") for line in lines[1:])


# --- a browser ---

SIZE = (640, 480)
# A field of the panel is found by its value, an option of its list by its text.
FIELD = "[...document.querySelectorAll('input:not([type=hidden])')].find((input) => input.value === {!r})"
OPTION = "[...document.querySelectorAll('[role=option]')].find((option) => option.innerText === {!r})"


class Browser:
    """A headless Chromium that can reach this machine only, controlled through its DevTools protocol."""

    def __init__(self, profile, width, height):
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
                "--disable-gpu",
                "--disable-quic",
                "--disable-dev-shm-usage",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
                "--no-proxy-server",
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
                # WebGL without a graphics card.
                "--use-gl=angle",
                "--use-angle=swiftshader",
                "--enable-unsafe-swiftshader",
                "--remote-debugging-port=0",
                f"--user-data-dir={profile}",
                "about:blank",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._count, self.events = 0, []
        try:
            target = wait_for(lambda: self._page(profile / "DevToolsActivePort"))
            self._socket = connect(target, max_size=None, proxy=None)
            for domain in ("Page", "Network", "Runtime"):
                self.call(f"{domain}.enable")
            self.call(
                "Emulation.setDeviceMetricsOverride",
                width=width,
                height=height,
                deviceScaleFactor=1,
                mobile=False,
            )
        except BaseException:
            self._process.kill()
            raise

    @staticmethod
    def _page(file):
        with contextlib.suppress(OSError, IndexError, StopIteration):
            url = f"http://127.0.0.1:{file.read_text().split()[0]}/json"
            with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as answer:
                pages = json.load(answer)
            return next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with contextlib.suppress(Exception):
            self.call("Browser.close")
        self._socket.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def call(self, method, **parameters):
        self._count += 1
        self._socket.send(json.dumps({"id": self._count, "method": method, "params": parameters}))
        while True:
            message = json.loads(self._socket.recv(timeout=60))
            if message.get("id") == self._count:
                assert "error" not in message, message
                return message["result"]
            self.events.append(message)

    def open(self, port):
        """Opens the viewer and waits for its panel."""
        self.call("Page.navigate", url=f"http://127.0.0.1:{port}")
        wait_for(lambda: self.evaluate(f"{FIELD.format('800')} !== undefined"))

    def evaluate(self, expression):
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self):
        content = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))

    def mouse(self, kind, x, y, buttons=1):
        self.call(
            "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=buttons, clickCount=1
        )

    def choose(self, value, option):
        """Selects an option in the list of the field that has a value."""
        # Not with the mouse: a closing list still covers the next field.
        for element in (FIELD.format(value), OPTION.format(option)):
            wait_for(lambda element=element: self.evaluate(f"(() => {{{element}.click(); return true}})()"))
        wait_for(lambda: self.evaluate(f"{FIELD.format(option)} !== undefined"))

    def type(self, value, text):
        """Replaces the text of the field that has a value."""
        element = FIELD.format(value)
        self.evaluate(f"{element}.focus(); {element}.select()")
        self.call("Input.insertText", text=text)
        wait_for(lambda: self.evaluate(f"{FIELD.format(text)} !== undefined"))

    def drag(self, start, end, steps=12):
        self.mouse("mousePressed", *start)
        for x, y in np.linspace(start, end, steps):
            self.mouse("mouseMoved", float(x), float(y))
            time.sleep(0.02)
        self.mouse("mouseReleased", *end, buttons=0)

    def requested(self):
        sent = [event for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["params"]["request"]["url"] for event in sent]


def wait_for(condition, seconds=120):
    """Returns what `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.05)
    return value


BLOCK = 8
BELOW_THE_PANELS = 232


def blocks(pixels):
    """Means over blocks of the part of a page that no panel covers."""
    part = pixels[BELOW_THE_PANELS:].astype(np.float64)
    height, width = part.shape[0] // BLOCK, part.shape[1] // BLOCK
    return part[: height * BLOCK, : width * BLOCK].reshape(height, BLOCK, width, BLOCK, 3).mean(axis=(1, 3))


def shows(page, pixels):
    """Whether a page shows pixels, stretched, with a mean difference below 1 of 255, and 24 at most.

    Outlines differ most: the browser smooths a picture that has fewer pixels than the page.
    """
    wanted = np.asarray(Image.fromarray(pixels).resize(SIZE, Image.Resampling.BILINEAR))
    difference = np.abs(blocks(page) - blocks(wanted))
    return difference.mean() < 1 and difference.max() < 24


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
def test_a_browser_shows_turns_and_configures_the_field(tmp_path):
    field = Ball()
    with serving(field) as port, Browser(tmp_path / "profile", *SIZE) as browser:
        browser.open(port)

        def shown(pose):
            return shows(browser.screenshot(), expected(dataclasses.replace(first, pose=pose)))

        # viser was given a position, a point to look at and an angle; its camera must be the same as ours.
        first = CAMERA.resized(*SIZE)
        wait_for(lambda: shown(CAMERA.pose))
        before = blocks(browser.screenshot())

        browser.drag((250, 300), (350, 360))
        wait_for(lambda: np.abs(blocks(browser.screenshot()) - before).mean() > 5)
        wait_for(lambda: shown(look_at(field.position, np.zeros(3))))
        # The scene follows the mouse, to the right and down: the camera goes to the left and up, as far away.
        moved = (field.position - CAMERA.pose[:, 3]) @ CAMERA.pose[:, :3]
        assert moved[0] < -0.1
        assert moved[1] > 0.1
        radius = np.linalg.norm(field.position)
        assert radius == pytest.approx(np.linalg.norm(CAMERA.pose[:, 3]), rel=1e-3)

        # One after another: viser sends only the last of the changes within 50 ms, of whatever field.
        browser.choose("white", "black")
        wait_for(lambda: field.background == viewer.BACKGROUNDS["black"])
        browser.type("1", "1.5")
        wait_for(lambda: field.quality == 1.5)
        browser.type("800", "200")
        inputs = "[...document.querySelectorAll('input')]"
        wait_for(lambda: browser.evaluate(f"{inputs}.some((input) => / ms, 200 x 150/.test(input.value))"))
        browser.choose("color", "depth")
        second = dataclasses.replace(first, pose=look_at(field.position, np.zeros(3)))
        seen = render_image(Ball(), second.resized(200, 150), torch.zeros(3))
        depth = depth_colors(seen.depth.numpy(), seen.opacity.numpy())
        wait_for(lambda: shows(browser.screenshot(), depth))

        # A second browser has a camera and settings of its own.
        with Browser(tmp_path / "other", *SIZE) as other:
            other.open(port)
            wait_for(lambda: shows(other.screenshot(), expected(first)))
        assert shows(browser.screenshot(), depth)

        assert "share" not in browser.evaluate("document.body.innerText").lower()
        hosts = {urllib.parse.urlsplit(url).hostname for url in browser.requested()}
        assert hosts <= {"127.0.0.1", None}, "None is the host of data: and blob: URLs"
