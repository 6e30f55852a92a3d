"""The demo page: its answers, and a browser that uploads and records a clip."""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from ser_ray.cli.main import main
from ser_ray.features.decode import decode
from ser_ray.inference.demo import answer
from tests.clips import voice, write_wav

RUN = "import sys; from ser_ray.cli.main import main; sys.exit(main())"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A clip of RAVDESS where there is one, else something shaped like speech."""
    if corpus := os.environ.get("SER_RAY_TEST_CORPUS"):
        return next(Path(corpus).rglob("03-01-05-02-01-01-12.wav"))
    return write_wav(tmp_path_factory.mktemp("clips") / "clip.wav", voice(2.5))


def test_a_clip_is_answered_as_predict_does_and_drawn_completely(predictor, clip):
    probabilities, seen = answer(predictor, decode, str(clip))
    assert probabilities == predictor.predict(str(clip)).probabilities
    svg = ElementTree.fromstring(seen[seen.index("<svg") : seen.index("</div>")])
    assert svg.get("aria-label") == f"Waveform and spectrogram of {clip.name}"
    assert "kHz" in "".join(svg.itertext())


def test_a_long_recording_shows_its_windows(predictor, tmp_path):
    path = write_wav(tmp_path / "talk.wav", voice(5, 16_000), 16_000)
    found = predictor.predict(str(path))
    _, seen = answer(predictor, decode, str(path))
    assert len(found.timeline) > 2
    shown = seen[seen.index("<pre>") + 5 : seen.index("</pre>")]
    assert shown.splitlines() == [str(segment) for segment in found.timeline]
    svg = ElementTree.fromstring(seen[seen.index("<svg") : seen.index("</div>")])
    drawn = {text.strip() for text in svg.itertext()}
    assert drawn >= {segment.emotion for segment in found.timeline}, "the timeline is in the figure"


def test_a_reason_to_doubt_the_prediction_is_shown(predictor, tmp_path):
    noise = np.random.default_rng(0).normal(0, 0.1, 48_000)
    path = write_wav(tmp_path / "noise.wav", noise)
    warning = predictor.predict(str(path)).warning
    assert "may contain no voice" in warning
    assert f"<p>{warning}</p>" in answer(predictor, decode, str(path))[1]


def test_the_reason_of_a_refusal_is_shown_as_text(predictor, tmp_path):
    write_wav(tmp_path / "silent.wav", np.zeros(48_000))
    (tmp_path / "<b>.wav").write_text("no sound")
    for name, problem in (("silent.wav", "silent: silent"), ("<b>.wav", "unreadable")):
        probabilities, seen = answer(predictor, decode, str(tmp_path / name))
        assert probabilities is None
        assert problem.partition(": ")[2] in seen
        assert "<b>" not in seen
        assert "svg" not in seen
    assert answer(predictor, decode, None) == (None, "")


def test_without_gradio_the_command_that_installs_it_is_named(checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo-ui", str(checkpoint), "--port", "0"]) == 2
    assert "pip install -e '.[demo]'" in capsys.readouterr().err


def test_a_port_in_use_is_named(checkpoint, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo-ui", str(checkpoint), "--port", str(port)]) == 2
    assert f"127.0.0.1:{port}: the server cannot listen there" in capsys.readouterr().err


def test_an_invalid_port_is_named(checkpoint, capsys):
    assert main(["demo-ui", str(checkpoint), "--port", "70000"]) == 2
    assert "port is 70000: it must be from 0 (a free port) to 65535" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_recordings_are_deleted_however_the_server_is_stopped(checkpoint, tmp_path, how, status):
    before = signal.signal(how, signal.SIG_DFL)  # under `nohup pytest` it would ignore SIGHUP
    try:
        server = subprocess.Popen(
            [sys.executable, "-c", RUN, "demo-ui", str(checkpoint), "--port", "0"],
            env=os.environ | {"TMPDIR": str(tmp_path)},
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        signal.signal(how, before)
    assert server.stderr is not None
    try:
        assert any("http://" in line for line in server.stderr)
        assert list(tmp_path.iterdir())
        server.send_signal(how)
        assert server.wait(20) == status
    finally:
        server.kill()
        server.wait()
        server.stderr.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def page_url(checkpoint, tmp_path_factory) -> Iterator[str]:
    """The URL of the running program, whose proxy is a socket that notices any request."""
    folder = tmp_path_factory.mktemp("server")
    with socket.create_server(("127.0.0.1", 0)) as proxy_socket:
        proxy = f"http://127.0.0.1:{proxy_socket.getsockname()[1]}"
        server = subprocess.Popen(
            [sys.executable, "-c", RUN, "demo-ui", str(checkpoint), "--port", "0"],
            env=os.environ | {"TMPDIR": str(folder), "HTTP_PROXY": proxy, "HTTPS_PROXY": proxy},
            stderr=subprocess.PIPE,
            text=True,
        )
        assert server.stderr is not None
        line = next((line for line in server.stderr if "http://" in line), "")
        yield line.split()[0]
        server.send_signal(signal.SIGINT)
        assert server.wait(20) == 0
        assert server.stderr.read() == ""
        server.stderr.close()
        proxy_socket.setblocking(False)
        with pytest.raises(BlockingIOError):  # nothing was requested from outside
            proxy_socket.accept()
    assert list(folder.iterdir()) == [], "recordings are deleted with the server"


@pytest.fixture
def browser_page(clip) -> Iterator:
    """A page of a real browser, at the width of a phone, with `clip` as its microphone."""
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    with contextlib.ExitStack() as stack:
        browsers = stack.enter_context(playwright.sync_playwright())
        browser = browsers.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox", "--disable-gpu", "--use-fake-ui-for-media-stream",
                "--use-fake-device-for-media-stream", f"--use-file-for-fake-audio-capture={clip}",
            ],
        )  # fmt: skip
        stack.callback(browser.close)
        yield browser.new_page(viewport={"width": 390, "height": 844})


@pytest.mark.slow
def test_a_browser_drops_a_clip_and_records_one(page_url, browser_page, predictor, clip, tmp_path):
    page, asked, complaints = browser_page, [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_url)
    drop = page.locator("input[type=file]")
    drop.set_input_files(clip)
    expected = predictor.predict(str(clip))
    emotion = page.get_by_test_id("label-output-value")
    emotion.wait_for()
    assert emotion.inner_text().strip() == expected.emotion
    shown = page.locator("body").inner_text()
    assert all(f"{share:.0%}" in shown for share in expected.probabilities.values())
    picture = page.get_by_role("img", name="Waveform and spectrogram").bounding_box()
    assert picture["width"] > 300
    assert picture["x"] + picture["width"] <= 390
    assert page.evaluate("document.documentElement.scrollWidth") <= 390

    silent = write_wav(tmp_path / "silent.wav", np.zeros(48_000))
    page.get_by_label("Clear").click()
    drop.set_input_files(silent)
    page.get_by_text("silent.wav: silent (nothing but clicks is louder").wait_for()
    assert emotion.count() == 0

    page.get_by_label("Clear").click()
    page.get_by_label("Record audio").click()
    page.get_by_role("button", name="Record", exact=True).click()
    page.wait_for_timeout(2500)
    page.locator("button:visible", has_text="Stop").click()
    emotion.wait_for()
    assert emotion.inner_text().strip() in predictor.labels

    hosts = {re.sub("^blob:", "", url).split("/")[2] for url in asked if "data:" not in url[:5]}
    assert hosts == {page_url.split("/")[2]}
    assert complaints == []
