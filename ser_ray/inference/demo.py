"""A web page where a person records or uploads a clip and sees the model's prediction.

Gradio makes the page. No data goes to other servers: there is no share link and no analytics, and a
content security policy lets the browser load fonts and scripts only from this server. Recordings
are kept in a temporary folder, which is deleted when the server stops.
"""

import html
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from ser_ray.errors import ConfigError, SerRayError
from ser_ray.features.decode import MAX_RECORDING_SECONDS
from ser_ray.features.errors import ClipError
from ser_ray.features.sandbox import Sandbox
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.inference.prediction import UNSURE, Prediction
from ser_ray.inference.predictor import Predictor
from ser_ray.inference.recordings import Decode
from ser_ray.plots.clip import clip_figure
from ser_ray.plots.svg import inline_svg
from ser_ray.progress import stderr_console

if TYPE_CHECKING:
    from fastapi import FastAPI

DRAWN_SECONDS = 60.0
"""Length of the drawn part of a recording. The rest of a longer recording is not drawn."""

SYNTHETIC_WARNING = (
    '<p role="alert">This model was trained on synthetic sounds, not on speech. It shows that the '
    "program works; its predictions for voices mean nothing.</p>"
)
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'"
_STYLE = """
.ser-ray svg { display: block; width: 100%; height: auto } .ser-ray svg text { fill: currentColor }
.ser-ray pre { max-height: 20rem; overflow: auto; font-size: .875rem }
.ser-ray [role=alert] { font-size: 1.125rem; overflow-wrap: anywhere }
.ser-ray [role=alert] { border-left: 4px solid #D55E00; padding-left: .75rem }
.ser-ray summary { cursor: pointer }
"""
MAX_PORT = 65_535


def serve(
    predictor: Predictor,
    about: str,
    examples: Sequence[tuple[str, str]],
    host: str,
    port: int,
) -> None:
    """Serve the page until Ctrl-C or a signal, and print its URL on standard error.

    Args:
        predictor: the model.
        about: text about the model, as Markdown.
        examples: local path and true label of each clip that the page offers to try.
        host: address to listen on.
        port: port to listen on; 0 chooses a free port.

    Raises:
        SerRayError: gradio is not installed.
        ConfigError: there is no such port, or the server cannot listen on the address.
        KeyboardInterrupt: the subclass that a signal other than Ctrl-C raises (`ser_ray.cli.stop`).
    """
    if not 0 <= port <= MAX_PORT:
        raise ConfigError(f"port is {port}: it must be from 0 (a free port) to {MAX_PORT}")
    try:
        listening = socket.create_server((host, port))
    except OSError as error:
        raise ConfigError(
            f"{host}:{port}: the server cannot listen there ({error.strerror}); choose another "
            "--host or --port (--port 0 chooses a free port)"
        ) from error
    with listening, TemporaryDirectory() as recordings, Sandbox() as sandbox:
        os.environ["GRADIO_TEMP_DIR"] = recordings  # read when gradio is imported
        app = _make_app(predictor, about, examples, sandbox.decode)
        import uvicorn

        url = f"http://{host}:{listening.getsockname()[1]}"
        try:
            stderr_console().print(f"{url} (Ctrl-C stops it)")
            uvicorn.Server(uvicorn.Config(app, log_level="warning")).run([listening])
        except KeyboardInterrupt as stop:
            if type(stop) is not KeyboardInterrupt:  # of SIGTERM or SIGHUP
                raise


def answer(
    predictor: Predictor, decode: Decode, path: str | None
) -> tuple[dict[str, float] | None, str]:
    """Return what the page shows for a clip: the probabilities, and HTML with a figure or an error.

    Without a clip, both are empty. A clip that cannot be scored has no probabilities.
    """
    if path is None:
        return None, ""
    name = Path(path).name
    try:
        sound = decode(path, max_seconds=MAX_RECORDING_SECONDS)
        samples, sample_rate, _ = sound
    except ClipError as error:
        prediction = Prediction(path=name, status=error.status, reason=error.reason)
    else:
        prediction = predictor.predict_samples(samples, sample_rate, name)
    if prediction.probabilities is None:
        return None, f'<p role="alert">{html.escape(str(prediction))}</p>'
    timeline = ""
    if prediction.timeline:
        lines = "\n".join(str(window) for window in prediction.timeline)
        timeline = (
            "<details><summary>The prediction is the mean over these windows</summary>"
            f"<pre>{html.escape(lines)}</pre></details>"
        )
    picture = _picture(predictor, samples, sample_rate, prediction)
    doubts = [text for text in (sound.loss, prediction.warning) if text]
    notes = "".join(f"<p>{html.escape(doubt)}</p>" for doubt in doubts)
    return prediction.probabilities, notes + picture + timeline


def _picture(
    predictor: Predictor, samples: np.ndarray, sample_rate: int, prediction: Prediction
) -> str:
    """Draw a recording with its silent ends and its timeline, as SVG.

    The result is empty if the drawn part of the recording is silent or too short, or if its
    features would be larger than `FeatureConfig` allows.
    """
    seconds = DRAWN_SECONDS
    try:
        extract = FeatureExtractor(
            replace(predictor.card.features, max_seconds=seconds, trim_margin=seconds)
        )
        waveform = extract.waveform(samples[: round(seconds * sample_rate)], sample_rate)
    except (ClipError, ConfigError):
        return ""
    spectrogram = extract.features(waveform)["spectrogram"]
    timeline = [
        (window.start, min(window.end, seconds), window.emotion or UNSURE)
        for window in prediction.timeline
        if window.start < seconds
    ]
    rate = predictor.card.features.sample_rate
    figure = clip_figure(waveform, rate, spectrogram, timeline)
    return inline_svg(figure, f"Waveform and spectrogram of {prediction.path}")


def _make_app(
    predictor: Predictor, about: str, examples: Sequence[tuple[str, str]], decode: Decode
) -> "FastAPI":
    """Build the page as a web application."""
    try:
        import gradio as gr
    except ImportError as error:
        raise SerRayError(
            "the demo page needs the package gradio; in the clone, run pip install -e '.[demo]'"
        ) from error
    from fastapi import FastAPI, Request

    def show(path: str | None) -> tuple[Any, str]:
        probabilities, text = answer(predictor, decode, path)
        return gr.Label(probabilities, visible=probabilities is not None), text

    with gr.Blocks(title="ser_ray", analytics_enabled=False) as page:
        gr.Markdown("## What emotion does a voice resemble?")
        if predictor.card.corpus == "synthetic":
            gr.HTML(SYNTHETIC_WARNING, elem_classes="ser-ray")
        with gr.Row():
            with gr.Column():
                clip = gr.Audio(
                    type="filepath", label="A clip", sources=["upload", "microphone"], buttons=[]
                )
                if examples:
                    gr.Examples(
                        [[path] for path, _ in examples],
                        clip,
                        label="Test clips, named by their true emotion",
                        example_labels=[label for _, label in examples],
                    )
            with gr.Column():
                emotion = gr.Label(label="Emotion", visible=False)
                details = gr.HTML(elem_classes="ser-ray")
        gr.Markdown(about)
        clip.change(show, clip, [emotion, details])

    app = FastAPI(openapi_url=None)

    @app.middleware("http")
    async def add_policy(request: Request, call_next: Callable[[Request], Any]) -> Any:
        response = await call_next(request)
        response.headers["Content-Security-Policy"] = _POLICY
        return response

    return gr.mount_gradio_app(
        app, page, "/", css=_STYLE, footer_links=[], run_history=False, ssr_mode=False
    )
