"""Nothing in a run directory is executed by its page, which requests nothing; a browser draws every plot."""

import json
import re
import shutil
import subprocess
import urllib.parse

import pytest

from blacksmith import report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def write(make, kind, directory):
    """Writes a page of each kind."""
    if kind == "run":
        return report.write(make.run(directory / "run"))
    if kind == "hostile":
        return report.write(make.hostile_run(directory / "hostile <script>"))
    if kind == "parity":
        return report.write_parity(directory / "parity.html", **make.parity)
    second = make.run(directory / "b", "torch")
    first = make.run(directory / "a") if kind == "comparison" else make.hostile_run(directory / "a")
    return report.write_comparison(directory / "both.html", [first, second])


@pytest.mark.parametrize("kind", ["run", "hostile", "comparison", "hostile comparison", "parity"])
def test_a_page_has_no_reference_and_no_injected_script(tmp_path, make, page, kind):
    shown = page(write(make, kind, tmp_path))
    assert [attrs for tag, attrs in shown.elements if tag == "script"] == [
        {},
        {"type": "application/json", "id": "figures"},
        {},
    ]
    assert not {tag for tag, _ in shown.elements} & {"link", "iframe", "object", "embed", "base"}
    for _, attrs in shown.elements:
        assert not [name for name in attrs if name.startswith("on")]
        for name in ("src", "href"):
            assert attrs.get(name, "data:").startswith("data:")
    style = re.search(r"<style>(.*?)</style>", shown.source, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert "default-src 'none'" in shown.source
    if "hostile" in kind:
        assert make.hostile in shown.text
        assert all("<" not in trace["name"] for trace in shown.figure("Loss")["data"])


def test_class_names_are_text_to_plotly(tmp_path, make, page):
    axis = page(write(make, "hostile", tmp_path)).figure("Confusion matrix")["layout"]["xaxis"]
    assert axis["ticktext"][3] == "3&lt;/script&gt;&lt;sc…"


# Looks at the plots, then presses the buttons and looks again; what it found goes to the console.
PROBE = """
<script>
addEventListener("load", () => setTimeout(() => {
  const plots = [...document.querySelectorAll(".js-plotly-plot")];
  const drawn = plots.filter((plot) => plot.querySelector("svg.main-svg .mlayer :is(path, image)"));
  const found = {
    drawn: drawn.map((plot) => plot.getAttribute("aria-label").replace("plot: ", "")),
    width: innerWidth,
    overflow: document.documentElement.scrollWidth - innerWidth,
  };
  for (const button of ["[data-axis=epoch]", "[data-log]", ".key"])
    document.querySelector(button)?.click();
  setTimeout(() => {
    found.axes = plots.map((plot) => plot.layout.xaxis.title?.text);
    found.log = plots[0].layout.yaxis.type;
    found.visible = plots[0].data.map((trace) => trace.visible);
    found.hacked = window.hacked ?? null;
    console.info("found " + encodeURIComponent(JSON.stringify(found)));
  }, 500);
}, 500));
</script></body>"""
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1400,1100 --virtual-time-budget=10000
--enable-logging=stderr --v=0 --dump-dom"""


def open_in_chromium(path, directory, width):
    """What PROBE found in the page, and every other message of its console.

    The page is opened in a frame, since a window of its own is never narrower than 500 px.
    """
    probed, frame = directory / "probed.html", directory / "frame.html"
    probed.write_text(path.read_text(encoding="utf-8").replace("</body>", PROBE), encoding="utf-8")
    frame.write_text(f'<iframe src="probed.html" width="{width}" height="1000"></iframe>')
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={directory / 'profile'}", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    console = re.findall(r'CONSOLE[^\]]*\] "(.*)", source:', done.stderr)
    found = [message for message in console if message.startswith("found ")]
    assert len(found) == 1, f"the probe did not run: {console}"
    console.remove(found[0])
    return json.loads(urllib.parse.unquote(found[0].removeprefix("found "))), console


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser or google-chrome here")
@pytest.mark.parametrize(
    ("kind", "width", "visible"),
    [
        ("run", 1280, [False, True]),  # the legend's first key is the split "train"
        ("hostile", 400, [False]),
        ("comparison", 400, [False, False, True, True]),  # its first key is the first run
        ("parity", 1280, [False, True, True]),
    ],
)
def test_a_browser_draws_every_plot_and_logs_no_error(tmp_path, make, page, kind, width, visible):
    path = write(make, kind, tmp_path)
    found, console = open_in_chromium(path, tmp_path, width)
    assert console == []
    assert found["width"] == width
    assert found["drawn"] == page(path).titles
    assert found["overflow"] <= 0, "the page must not scroll sideways"
    assert found["axes"][0] == ("step" if kind == "parity" else "epoch")
    assert found["log"] == "log"
    assert found["visible"] == visible
    assert found["hacked"] is None
