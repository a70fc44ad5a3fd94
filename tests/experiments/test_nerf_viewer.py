"""The viewer of radiance fields: cameras, pace and turns by hand, the server, and what a browser shows."""

import base64
import contextlib
import io
import json
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse
import urllib.request

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from websockets.sync.client import connect

from blacksmith.datasets.blender.cameras import Camera, look_at
from blacksmith.errors import ConfigError
from blacksmith.experiments.lightning.nerf import viewer
from blacksmith.experiments.lightning.nerf.pictures import depth_colours, to_bytes
from blacksmith.models.pytorch.nerf.rendering import Rendered, render_image

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WHITE = (1.0, 1.0, 1.0)


class Clock:
    """Stands still until it is told how much time has gone."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Ball:
    """An opaque ball around the origin whose colour is its normal, so that no two views are alike.

    With a clock, every ray of the default quality takes `cost` seconds of it.
    """

    bounds = torch.tensor([[-1.0, -1.0, -1.0], [1.0, 1.0, 1.0]])
    radius = 0.8

    def __init__(self, clock=None, cost=0.0):
        self.clock, self.cost = clock, cost

    def render(self, origins, directions, background, *, quality=1.0):
        if self.clock is not None:
            self.clock.now += self.cost * quality * len(origins)
        closest = -(origins * directions).sum(-1)
        past = (origins + closest[:, None] * directions).square().sum(-1)
        depth = closest - (self.radius**2 - past).clamp(min=0).sqrt()
        opacity = (past < self.radius**2).float()
        colour = self.colour(origins + depth[:, None] * directions, directions)
        rgb = colour * opacity[:, None] + background * (1 - opacity)[:, None]
        return Rendered(rgb, opacity, depth * opacity)

    def density(self, points):
        return 1e3 * (points.norm(dim=-1) < self.radius).float()

    def colour(self, points, directions):
        return 0.5 + 0.5 * torch.nn.functional.normalize(points, dim=-1)


CAMERA = Camera.of_angle(look_at(np.array([2.5, -2.0, 1.5]), np.zeros(3)), 400, 300, 0.8)


def look(width=800, height=600, **options):
    return viewer.Look(CAMERA.resized(width, height), WHITE, **options)


def expected(camera, background=WHITE, quality=1.0):
    seen = render_image(Ball(), camera, torch.tensor(background), quality=quality)
    return to_bytes(seen.rgb.numpy())


def test_a_camera_of_viser_keeps_its_axes_and_its_field_of_view():
    # Unturned, viser's camera looks along z with y down: ours has its y and z axes the other way round.
    camera = viewer.camera_of((1, 0, 0, 0), (1, 2, 3), np.pi / 2, 40, 20)
    np.testing.assert_allclose(camera.pose, [[1, 0, 0, 1], [0, -1, 0, 2], [0, 0, -1, 3]], atol=1e-7)
    assert camera.focal == pytest.approx((10, 10)), "90 degrees over 20 pixels"
    assert camera.center == (20, 10)
    seen, depth = camera.project(np.array([[1.0, 2.0, 5.0], [2.0, 2.0, 5.0], [1.0, 3.0, 5.0]]))
    np.testing.assert_allclose(depth, 2)
    np.testing.assert_allclose(seen, [[20, 10], [25, 10], [20, 15]], err_msg="x is right, y is down")
    # A quarter turn about x takes what was down to where it looks: viser's z axis becomes -y, its y axis z.
    camera = viewer.camera_of((2, 2, 0, 0), (0, 0, 0), 1.0, 40, 20)
    np.testing.assert_allclose(camera.pose[:, :3], [[1, 0, 0], [0, 0, 1], [0, -1, 0]], atol=1e-7)


def test_any_rotation_of_viser_stays_a_rotation():
    import viser.transforms

    for wxyz in np.random.default_rng(0).normal(size=(20, 4)):
        pose = viewer.camera_of(wxyz, np.zeros(3), 1.0, 4, 4).pose[:, :3]
        theirs = viser.transforms.SO3(wxyz / np.linalg.norm(wxyz)).as_matrix()
        np.testing.assert_allclose(pose * (1, -1, -1), theirs, atol=1e-6)
        assert np.linalg.det(pose) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    "wrong", [{"wxyz": (np.nan, 0, 0, 0)}, {"position": (np.inf, 0, 0)}, {"fov": np.nan}, {"width": 0}]
)
def test_a_camera_that_is_none_is_refused(wrong):
    right = {"wxyz": (1, 0, 0, 0), "position": (0, 0, 0), "fov": 1.0, "width": 4, "height": 4}
    with pytest.raises(ValueError, match="no camera has"):
        viewer.camera_of(**{**right, **wrong})


def test_the_pivot_is_on_the_axis_beside_the_centre_and_in_front():
    bounds = Ball.bounds.numpy()
    aside = Camera.of_angle(look_at(np.array([3.0, 0.5, 0.0]), np.array([0.0, 0.5, 0.0])), 4, 4, 1.0)
    np.testing.assert_allclose(viewer.pivot(aside, bounds), [0, 0.5, 0], atol=1e-6)
    away = Camera.of_angle(look_at(np.array([3.0, 0.0, 0.0]), np.array([9.0, 0.0, 0.0])), 4, 4, 1.0)
    assert viewer.pivot(away, bounds)[0] > 3


def test_a_look_keeps_its_shape_at_every_size_and_never_exceeds_the_canvas():
    wide = look(900, 300)
    assert wide.side == 800
    assert (wide.at(300).width, wide.at(300).height) == (300, 100)
    assert (wide.at(1).width, wide.at(1).height) == (1, 1)
    assert look(640, 480).side == 640
    assert look(640, 480, resolution=100).side == 100


def test_refinements_double_up_to_the_full_size():
    assert viewer.refinements(100, 800) == [200, 400, 800]
    assert viewer.refinements(140, 800) == [400, 800], "200 would be hardly finer"
    assert viewer.refinements(800, 800) == [800], "once more, without loss"


def test_a_hiccup_does_not_change_the_pace_but_a_slower_view_does():
    pace = viewer.Pace(1e-4)
    pace.learn(1000, 1.0, 0.1)
    pace.learn(1000, 1.0, 5.0)
    assert pace.seconds == pytest.approx(1e-4)
    pace.learn(1000, 2.0, 1.0)
    assert pace.seconds == pytest.approx(5e-4), "at the default quality"
    assert pace.rays(1.0, 2.0) == 1000


class Studio:
    """A painter with a clock that only rendering moves, and everything it sent."""

    def __init__(self, cost, warm=True):
        self.clock = Clock()
        self.field = Ball(self.clock, cost)
        self.sent = []
        self.painter = viewer.Painter(self.field, self.sent.append, self.clock)
        if warm:
            self.painter.warm_up(look())

    def join(self, client, wanted=None):
        self.painter.join(client, lambda picture: None)
        self.painter.ask(client, wanted or look())

    def finish(self):
        while self.painter.turn():
            pass

    def of(self, client):
        return [picture for picture in self.sent if picture.client == client]


def waited(picture):
    return picture.sent - picture.asked


@pytest.mark.parametrize("cost", [1e-8, 1e-6, 1e-5, 6e-5])
def test_the_first_picture_is_quick_and_the_last_one_full(cost):
    studio = Studio(cost)
    studio.join(1)
    studio.finish()
    first, *later = studio.sent
    assert waited(first) <= 1.1 * viewer.PREVIEW_SECONDS
    assert [picture.asked for picture in later] == [None] * len(later)
    assert [picture.final for picture in studio.sent] == [False] * len(later) + [True]
    widths = [picture.camera.width for picture in studio.sent]
    assert widths == sorted(widths)
    assert studio.sent[-1].pixels.shape == (600, 800, 3)
    np.testing.assert_array_equal(studio.sent[-1].pixels, expected(look().camera))


def test_a_preview_shrinks_and_grows_with_the_time_of_a_ray():
    studio = Studio(1e-5)
    studio.join(1)
    sides = []
    for cost in (1e-5, 1e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-5):
        studio.field.cost = cost
        studio.painter.ask(1, look())
        while studio.sent == [] or studio.sent[-1].asked is None or len(sides) == len(studio.sent):
            studio.painter.turn()
        sides.append(studio.sent[-1].camera.width)
    assert sides[0] == sides[-1] == pytest.approx(3.16 * sides[3], rel=0.05), "ten times the rays"
    # Two pictures show that the first was no hiccup.
    assert studio.sent[3].seconds <= 1.1 * viewer.PREVIEW_SECONDS


def test_a_move_is_answered_within_a_fifth_of_a_second_whatever_is_being_rendered():
    studio = Studio(1e-5)
    studio.join(1)
    for turns in range(1, 12):
        # Between the slices of a picture that is being refined, or of the one before.
        for _ in range(turns):
            studio.painter.turn()
        studio.painter.ask(1, look(resolution=700 + turns))
    studio.finish()
    answers = [picture for picture in studio.sent if picture.asked is not None]
    assert len(answers) == 12
    assert max(map(waited, answers)) <= 0.2
    assert answers[-1].look.resolution == 711


def test_a_move_in_the_middle_of_a_slice_throws_the_refinement_away():
    studio = Studio(1e-5)
    studio.join(1)
    studio.painter.turn()
    studio.painter.turn()
    assert len(studio.sent) == 1
    render, moves = studio.field.render, []

    def move_once(*arguments, **options):
        if not moves:
            moves.append(studio.clock.now)
            studio.painter.ask(1, look(resolution=300))
            studio.painter.ask(1, look(resolution=400))
        return render(*arguments, **options)

    studio.field.render = move_once
    studio.painter.turn()
    studio.painter.turn()
    assert len(studio.sent) == 2
    assert studio.sent[1].look.resolution == 400, "what was asked last"
    assert studio.sent[1].asked == moves[0], "but waited for since the first"
    assert waited(studio.sent[1]) <= viewer.SLICE_SECONDS + 1.1 * viewer.PREVIEW_SECONDS
    studio.finish()
    assert studio.sent[-1].final
    assert studio.sent[-1].camera.width == 400


def test_a_field_too_slow_for_any_preview_still_shows_one():
    studio = Studio(1e-3)
    studio.join(1)
    for _ in range(40):
        studio.painter.turn()
        studio.painter.ask(1, look())
    pictures = [picture for picture in studio.sent if picture.asked is not None]
    assert len(pictures) >= 2, "a preview is finished also when the camera moves on"
    assert {picture.camera.width for picture in pictures} == {viewer.SMALLEST_SIDE}


def test_one_client_refining_or_moving_does_not_starve_another():
    studio = Studio(1e-5)
    studio.join(1)
    studio.join(2, look(resolution=200))
    for _ in range(100):
        studio.painter.ask(1, look())
        studio.painter.turn()
    assert any(picture.final for picture in studio.of(2)), "while the first one never rests"
    answers = [picture for picture in studio.of(1) if picture.asked is not None]
    assert len(answers) >= 30
    assert max(map(waited, answers[1:])) <= 0.2


def test_a_client_that_has_left_costs_nothing_more():
    studio = Studio(1e-5)
    studio.join(1)
    for _ in range(3):
        studio.painter.turn()
    studio.painter.leave(1)
    studio.painter.ask(1, look())
    now, sent = studio.clock.now, len(studio.sent)
    assert not studio.painter.turn()
    assert (studio.clock.now, len(studio.sent)) == (now, sent)


def test_settings_change_what_is_rendered():
    studio = Studio(0.0)
    camera = look(40, 30).camera
    seen = render_image(Ball(), camera, torch.zeros(3))
    wanted = {
        "colour": to_bytes(seen.rgb.numpy()),
        "depth": depth_colours(seen.depth.numpy(), seen.opacity.numpy()),
        "opacity": to_bytes(np.repeat(seen.opacity.numpy()[..., None], 3, axis=-1)),
    }
    assert tuple(wanted) == viewer.SHOWN
    for client, (shown, pixels) in enumerate(wanted.items()):
        studio.join(client, viewer.Look(camera, (0.0, 0.0, 0.0), shown))
        studio.finish()
        np.testing.assert_array_equal(studio.of(client)[-1].pixels, pixels)
    studio.field.cost = 1e-5
    studio.join(9, look(40, 30, quality=2.0))
    studio.finish()
    assert studio.of(9)[-1].seconds == pytest.approx(2e-5 * 40 * 30)


@contextlib.contextmanager
def serving(**options):
    """A server in a thread; yields its port, the pictures it sent and a function that ends it."""
    ready, stop, pictures, failures, port = threading.Event(), threading.Event(), [], [], []

    def main():
        try:
            viewer.serve(
                Ball(),
                CAMERA,
                background=WHITE,
                stop=stop.is_set,
                ready=lambda number: (port.append(number), ready.set()),
                on_picture=pictures.append,
                **{"port": 0, **options},
            )
        except BaseException as error:
            failures.append(error)
        finally:
            ready.set()

    thread = threading.Thread(target=main)

    def end():
        stop.set()
        thread.join(30)
        assert not thread.is_alive()
        assert failures == []

    thread.start()
    assert ready.wait(30)
    assert failures == []
    try:
        yield port[0], pictures, end
    finally:
        end()


def test_a_port_in_use_is_one_line_that_names_it():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .*in use; choose another port") as error:
            viewer.serve(Ball(), CAMERA, background=WHITE, port=port, stop=lambda: True)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("options", [{"port": 70000}, {"host": "192.0.2.1", "port": 0}])
def test_an_impossible_address_is_refused(options):
    # 192.0.2.1 is reserved for documentation: no machine has it.
    with pytest.raises(ConfigError, match="port"):
        viewer.serve(Ball(), CAMERA, background=WHITE, stop=lambda: True, **options)


def test_only_this_machine_is_served_and_the_end_leaves_nothing_behind(capfd):
    before = set(threading.enumerate())
    with serving() as (port, _, end):
        connections = psutil.Process().net_connections(kind="tcp")
        listening = [c.laddr for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port]
        assert [address.ip for address in listening] == ["127.0.0.1"]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}", timeout=10) as page:
            assert b"<html" in page.read()
        end()
        with socket.create_server(("127.0.0.1", port), reuse_port=False):
            pass
    deadline = time.monotonic() + 10
    while left := set(threading.enumerate()) - before:
        assert time.monotonic() < deadline, f"threads left behind: {left}"
        time.sleep(0.02)
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


SIZE = (640, 480)
# A field of the panel is found by its value, what a click on it opens by its text.
FIELD = "[...document.querySelectorAll('input:not([type=hidden])')].find((input) => input.value === {!r})"
OPTION = "[...document.querySelectorAll('[role=option]')].find((option) => option.innerText === {!r})"


class Browser:
    """A headless Chromium that can reach this machine only, spoken to over its DevTools protocol."""

    def __init__(self, profile, width, height):
        self._process = subprocess.Popen(
            [
                CHROMIUM,
                "--headless=new",
                "--no-sandbox",
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
            target = wait_for(lambda: self._page(profile / "DevToolsActivePort"), 60)
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
        """Opens the list of the field with a value and takes another from it."""
        # Not with the mouse: while one list folds up, it covers the next field.
        for element in (FIELD.format(value), OPTION.format(option)):
            wait_for(lambda element=element: self.evaluate(f"(() => {{{element}.click(); return true}})()"))
        wait_for(lambda: self.evaluate(f"{FIELD.format(option)} !== undefined"))

    def type(self, value, text):
        """Puts a text into the field with a value in place of what is there."""
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


def wait_for(condition, seconds=40):
    """What `condition` returns once it is true."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, "nothing came"
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

    The largest are on outlines: the browser smooths a picture that has fewer pixels than the page.
    """
    wanted = np.asarray(Image.fromarray(pixels).resize(SIZE, Image.Resampling.BILINEAR))
    difference = np.abs(blocks(page) - blocks(wanted))
    return difference.mean() < 1 and difference.max() < 24


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
def test_a_browser_shows_the_field_turns_it_and_changes_its_settings(tmp_path):
    with serving() as (port, pictures, end), Browser(tmp_path / "profile", *SIZE) as browser:

        def settled(condition):
            """The page and its picture, once it shows a final one that fulfils the condition."""

            def look():
                if not pictures or not pictures[-1].final or not condition(pictures[-1]):
                    return None
                picture, page = pictures[-1], browser.screenshot()
                return (page, picture) if shows(page, picture.pixels) and picture is pictures[-1] else None

            return wait_for(look)

        browser.call("Page.navigate", url=f"http://127.0.0.1:{port}")
        # viser was given a position, a point to look at and an angle; what it reports, after a first view of
        # its own, must be the same camera.
        before, picture = settled(lambda picture: np.abs(picture.camera.pose - CAMERA.pose).max() < 1e-4)
        first = picture.camera
        assert shows(before, expected(first))
        assert first.focal[1] / first.height == pytest.approx(CAMERA.focal[1] / CAMERA.height, rel=1e-4)
        assert first.width / first.height == pytest.approx(640 / 480, rel=0.01)

        browser.drag((250, 300), (350, 360))
        after, picture = settled(lambda picture: np.abs(picture.camera.pose - first.pose).max() > 0.1)
        second = picture.camera
        assert shows(after, expected(second))
        assert np.abs(blocks(after) - blocks(before)).mean() > 5
        # The scene follows the mouse, to the right and down: the camera goes to the left and up, as far away.
        moved = (second.pose[:, 3] - first.pose[:, 3]) @ first.pose[:, :3]
        assert moved[0] < -0.1
        assert moved[1] > 0.1
        radii = [np.linalg.norm(camera.pose[:, 3]) for camera in (first, second)]
        assert radii[0] == pytest.approx(radii[1], rel=1e-3)
        assert second.pose[2, 0] == pytest.approx(0, abs=1e-4), "the horizon stays level"
        answers = [picture for picture in pictures if picture.asked is not None]
        assert max(map(waited, answers)) < 10, "a fifth of a second by itself; the machine may be busy"

        # One after another: viser sends only the last of the changes within 50 ms, of whatever field.
        browser.choose("colour", "depth")
        settled(lambda picture: picture.look.shown == "depth")
        browser.choose("white", "black")
        settled(lambda picture: picture.look.background == viewer.BACKGROUNDS["black"])
        browser.type("800", "200")
        settled(lambda picture: picture.camera.width == 200)
        browser.type("1", "1.5")
        _, picture = settled(lambda picture: picture.look.quality == 1.5)
        assert picture.look.shown == "depth"
        wait_for(
            lambda: browser.evaluate(
                "[...document.querySelectorAll('input')].some((i) => / ms, 200 x 150/.test(i.value))"
            )
        )

        assert "share" not in browser.evaluate("document.body.innerText").lower()
        hosts = {urllib.parse.urlsplit(url).hostname for url in browser.requested()}
        assert hosts <= {"127.0.0.1", None}, "None is the host of data: and blob: URLs"
        end()
