"""Pages of runs, parsed as a browser does and searched for what must be there."""

import base64
import dataclasses
import html
import re
import shutil
from datetime import UTC, datetime
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import f1_score

from ser_ray.evaluation import sections
from ser_ray.evaluation.evaluation import Evaluation, predictions_table
from ser_ray.evaluation.pages import (
    add_test_part,
    crossval_page,
    evaluation_page,
    range_page,
    run_page,
    search_page,
    trial_page,
)
from ser_ray.evaluation.rendering import as_artifact
from ser_ray.plots.clip import clip_figure
from ser_ray.search.tuner import OPTUNA_STUDY
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from tests.models import make_checkpoint

VOID = {"meta", "br", "hr", "img", "link"}
PROTOCOL = "emobox-6 fold 1 of 6 (speaker-independent)"
LABELS = ("happy", "sad & low", "<angry>")
HISTORY = [
    {"epoch": e, "train/loss": 1 / e, "train/wa": 0.2 * e, "val/loss": 2 / e, "val/wa": 0.15 * e,
     "val/ua": 0.1 * e, "val/f1": 0.05 * e}
    for e in (1, 2, 3)
]  # fmt: skip
RATES = [1e-4, 2e-3, 1e-5]
TAGS = {"protocol": PROTOCOL, "corpus": "ravdess", "version.torch": "2.11.0", "mlflow.user": "me"}


class Page(HTMLParser):
    """What the tests ask of a page; an element closed out of order is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.references.append(value or "")
            self.references += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def words_of(svg: str) -> str:
    """The text in a figure."""
    return " ".join("".join(ElementTree.fromstring(svg).itertext()).split())


def figure_of(text: str, description: str) -> str:
    """The one figure of a page with this description."""
    (svg,) = re.findall(rf'<svg role="img" aria-label="{description}".*?</svg>', text, re.DOTALL)
    return str(svg)


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    """The points, in pixels, of every line inside a figure's axes, but for the faint grid."""
    found = []
    for path in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}path"):
        if path.get("clip-path") and "stroke-opacity" not in path.get("style", ""):
            numbers = [float(n) for n in re.findall(r"-?[\d.]+", path.get("d", ""))]
            found.append(list(zip(numbers[::2], numbers[1::2], strict=True)))
    return found


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory) -> Evaluation:
    """Ninety clips of three speakers, three labels and both sexes, 71 of them predicted right."""
    rng = np.random.default_rng(2)
    truth = np.arange(90) // 5 % 3
    predicted = np.where(np.arange(90) < 71, truth, (truth + 1) % 3)
    probabilities = rng.dirichlet([1, 1, 1], 90)
    probabilities[np.arange(90), predicted] += 1
    clips = pa.table(
        {
            "path": [f"/nowhere/{n}.wav" for n in range(90)],
            "start": pa.nulls(90, pa.float64()),
            "take": [str(n) for n in range(90)],
            "speaker": ["01", "11", "20"] * 30,
            "sex": ["male", "female"] * 45,
            "emotion": [LABELS[label] for label in truth],
        }
    )
    card = make_checkpoint(
        tmp_path_factory.mktemp("model"),
        labels=LABELS,
        corpus="ravdess",
        config=TrainConfig(feature="mel", lr_min=1e-4, lr_max=2e-3, keep="best"),
        initial_weights='"><img src=x>',
    )
    return Evaluation(
        card=card,
        part="test",
        protocol=PROTOCOL,
        corpus="ravdess",
        is_own_test=True,
        seen_speakers=(),
        predictions=predictions_table(clips, probabilities / 2, LABELS),
    )


@pytest.fixture(scope="module")
def clip() -> dict[str, Any]:
    return {
        "name": "<clip>.wav",
        "truth": "happy",
        "predicted": "<angry>",
        "probability": 0.81,
        "figure": clip_figure(
            np.sin(np.arange(16_000) / 9).astype(np.float32),
            16_000,
            np.random.default_rng(2).normal(-40, 10, (321, 51)),
        ),
        "mp3": b"sound",
    }


def render(evaluation: Evaluation, **changes: Any) -> str:
    settings = {"name": "run <script>1</script>", "history": HISTORY, "learning_rates": RATES}
    return run_page(evaluation.card, evaluation, **(settings | {"audio": True} | changes))


@pytest.fixture(scope="module")
def text(evaluation: Evaluation, clip: dict[str, Any]) -> str:
    """A training's page with both parts, and in each two clips, the second without a player."""
    views = [[clip], [clip | {"mp3": b""}]]
    order = iter([*views, *views])
    validation = dataclasses.replace(evaluation, part="validation", is_own_test=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sections, "read_clips", lambda *_, **__: next(order))
        return add_test_part(render(validation), evaluation, audio=True)


def search_rows() -> list[dict[str, Any]]:
    found = []
    for number, (state, val_ua) in enumerate(
        [("pruned", 0.1), ("finished", 0.6), ("failed", None)], start=1
    ):
        lr_max = 0.001 * number
        found.append(
            {
                "trial": number, "state": state, "lr_max": lr_max, "lr_ratio": 25.0,
                "feature": "mel", "lr_min": lr_max / 25, "completed": number,
                "selected/ua": val_ua, "selected/wa": val_ua, "selected/loss": 1.0,
            }
        )  # fmt: skip
    return found


def render_search(**changes: Any) -> str:
    settings: dict[str, Any] = {
        "counts": "1 pruned, 1 finished, 1 failed",
        "best": 2,
        "selected": HISTORY[1],
        "recipe": TrainConfig(feature="mel"),
        "searched": {"lr_max": "loguniform 0.0003 to 0.01", "lr_ratio": "choice 25"},
        "importance": {"lr_max": 0.75, "lr_ratio": 0.25},
        "tags": TAGS,
        "train_command": "ser-ray train --like <id>",
        "pages": {number: f"trials/00{number}.html" for number in (1, 2, 3)},
        "num_labels": 3,
        "run_id": "0123",
    }
    return search_page("search", search_rows(), **(settings | changes))


def render_trial(**changes: Any) -> str:
    settings: dict[str, Any] = {
        "recipe": TrainConfig(lr_min=1e-4, lr_max=2e-3, keep="best"),
        "history": HISTORY,
        "learning_rates": RATES,
        "confusion": [[3, 1, 0], [0, 2, 0], [0, 0, 9]],
        "labels": LABELS,
        "tags": TAGS,
        "study": "search",
        "run_id": "0123",
    }
    return trial_page("search-002", "Trial 2 of search: finished.", **(settings | changes))


def render_range() -> str:
    found = {
        "learning_rates": [1e-5, 1e-4, 1e-3, 1e-2],
        "losses": [2.0, 1.0, 1.5, 3.0],
        "smooth": [2.0, 1.4, 1.6, 2.5],
        "lr_min": 2e-5,
        "lr_max": 5e-4,
    }
    return range_page(
        "range",
        found,
        recipe=TrainConfig(augment=AugmentConfig(noise=0.25)),
        test={"steps": 200},
        tags=TAGS,
        run_id="0123",
    )


def render_crossval(evaluation: Evaluation) -> str:
    return crossval_page(
        evaluation,
        name="folds",
        summary="UA 41.0%",
        folds=[{"fold": 4, "seed": 0, "speakers": "01, <02>", "clips": 90, "ua": 0.41}],
        pages=["trials/001.html"],
        run_id="0123",
        audio=False,
    )


@pytest.mark.parametrize("kind", ["run", "trial", "search", "range", "crossval"])
def test_every_page_is_well_formed_and_loads_nothing(
    kind: str, text: str, evaluation: Evaluation
) -> None:
    others = {"trial": render_trial, "search": render_search, "range": render_range}
    others["crossval"] = partial(render_crossval, evaluation)
    shown = others[kind]() if kind in others else text
    page = Page(shown)
    assert len(page.ids) == len(set(page.ids))
    assert page.references, "figures refer to their own parts"
    for reference in page.references:
        inside = reference.strip("'\"")
        data = ("data:image/png;base64,", "data:audio/mpeg;base64,")
        assert inside.startswith(("#", *data, "trials/", "../report.html"))
        assert not inside.startswith("#") or inside[1:] in page.ids
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert "@import" not in shown
    assert "url(" not in re.search(r"<style>(.*?)</style>", shown, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_every_figure_is_an_svg_with_a_description(text: str) -> None:
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) == 12
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "#000000" not in figure, "black vanishes on a dark page"
    assert "<angry>" in words_of(figure_of(text, "test: confusion matrix"))


@pytest.mark.slow
def test_a_phone_shows_the_scores_of_the_longest_label_without_scrolling(text: str) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine")
    widest = text.replace("sad &amp; low", "surprised").replace("<td>30</td>", "<td>999</td>")
    widest = re.sub(r"<td>[\d.]+%</td>", "<td>100.0%</td>", widest)
    with playwright.sync_playwright() as browsers:
        browser = browsers.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 390, "height": 844})
        page.set_content(widest)
        table = page.locator(".scroll:has(table.numbers)").first
        assert "surprised 100.0% 100.0% 100.0%" in " ".join(table.inner_text().split())
        assert table.evaluate("box => box.scrollWidth - box.clientWidth") == 0
        browser.close()


def test_labels_and_names_are_escaped(text: str) -> None:
    page = Page(text)
    for words in ("run <script>1</script>", "sad & low", "<angry>", '"><img src=x>', "<clip>.wav"):
        assert words in page.text
    assert "keeps the model: ser-ray train --like <id>" in Page(render_search()).text


def test_every_page_says_above_its_scores_what_they_were_measured_on(text: str) -> None:
    for part in ("test", "validation"):
        measured_on = f"{part}, {PROTOCOL}, RAVDESS, 90 clips"
        assert re.search(rf"{re.escape(measured_on)}</strong></p>\s*<dl class=\"scores\">", text)
    validated = f"epoch 3, validation, {PROTOCOL}, RAVDESS, 15 clips</strong></p>"
    assert re.search(rf"{re.escape(validated)}\s*<dl class=\"scores\">", render_trial())
    validated = f"<strong>validation, {PROTOCOL}, RAVDESS</strong></p>"
    assert re.search(rf"{re.escape(validated)}\s*<dl class=\"scores\">", render_search())
    assert f"training loss, {PROTOCOL}, RAVDESS" in Page(render_range()).text


def test_a_page_of_a_run_holds_the_numbers(text: str, evaluation: Evaluation) -> None:
    page, scores = Page(text), evaluation.scores
    shown = [f"{share:.1%}" for share in (scores.ua, scores.wa, scores.macro_f1)]
    assert re.findall(r'class="value">([\d.]+%)</dd>', text) == shown * 2
    low, high = evaluation.intervals.ua
    assert f"{low:.1%} to {high:.1%}" in page.text
    assert page.text.count("95% interval by bootstrap over 3 speakers") == 2
    assert page.text.count("mean recall of the 3 labels") == 2
    assert page.text.count("Guessing scores a UA of 33.3%") == 2
    for kind, rows in evaluation.groups.items():
        for row in rows:
            assert f"{row[kind]} {row['clips']} {row['wa']:.1%} {row['ua']:.1%}" in page.text
    shares = [row["wa"] for row in evaluation.speaker_rows]
    assert shares == sorted(shares, reverse=True)
    order = [page.text.index(f" {row['speaker']} 30 ") for row in evaluation.speaker_rows]
    assert order == sorted(order)
    assert f"calibration error is {evaluation.calibration.ece:.1%}" in page.text
    confusion = words_of(figure_of(text, "test: confusion matrix"))
    for label, count in zip(LABELS, np.diag(scores.confusion), strict=True):
        assert f"{label} (30)" in confusion
        assert f" {count}" in confusion
    assert "feature mel" in page.text
    assert "version.torch 2.11.0" in page.text
    assert page.text.count("run <script>1</script>") == 2, "as the heading and the tab's title"
    assert f"Date {datetime.now(UTC).date()} Corpus RAVDESS Protocol" in page.text


def test_a_part_begins_with_the_best_and_worst_label(text: str) -> None:
    assert text.count('<p class="lead">The model recognises happy best (83% of its clips)') == 2
    trial = Page(render_trial()).text
    assert "recognises sad & low best (100% of its clips) and happy worst (75%)." in trial


def test_the_contents_lead_to_every_heading_of_the_finished_page(text: str) -> None:
    (contents,) = re.findall(r"<nav.*?</nav>", text, re.DOTALL)
    main = text[text.index("<main>") :]
    headings = re.findall(r'<h[23] id="([\w-]+)">(.*?)</h', main)
    assert re.findall(r'href="#([\w-]+)">(.*?)</a>', contents) == headings
    assert [title for _, title in headings if "part" in title] == ["Test part", "Validation part"]


def test_a_page_of_several_seeds_shows_the_means_of_their_scores(evaluation: Evaluation) -> None:
    """The mean F1 of two seeds is not the F1 of their counts together."""
    rng = np.random.default_rng(4)
    others = evaluation.predictions.take(np.arange(90))
    for label, column in zip(LABELS, rng.dirichlet([1, 1, 1], 90).T, strict=True):
        place = others.schema.get_field_index(f"p_{label}")
        others = others.set_column(place, f"p_{label}", pa.array(column))
    other = dataclasses.replace(evaluation, predictions=others)
    seeds = pa.array([0] * 90 + [1] * 90)
    pooled = dataclasses.replace(
        evaluation,
        predictions=pa.concat_tables([evaluation.predictions, others]).append_column("seed", seeds),
    )
    truth = evaluation.truth
    expected = np.mean(
        [f1_score(truth, item.predicted, average=None) for item in (evaluation, other)], axis=0
    )
    together = f1_score(np.tile(truth, 2), pooled.predicted, average="macro")
    assert f"{expected.mean():.1%}" != f"{together:.1%}"
    text = render_crossval(pooled)
    assert re.findall(r'class="value">([\d.]+%)</dd>', text)[2] == f"{expected.mean():.1%}"
    low, high = pooled.intervals.f1
    assert low < expected.mean() < high
    page = Page(text).text
    assert "means over 2 seeds" in page
    assert ", 90 clips" in page, "each clip counts once"
    assert re.search(r"\(\d+ of \d+ predictions\)", page)
    assert sum(row["clips"] for row in pooled.speaker_rows) == 90
    for label, share in zip(LABELS, expected, strict=True):
        assert re.search(rf"{re.escape(label)} [\d.]+% [\d.]+% {share:.1%} 60", page)


def test_an_artifact_has_no_links_to_other_pages(evaluation: Evaluation) -> None:
    for text in (render_search(), render_trial(), render_crossval(evaluation)):
        inside = [link for link in Page(text).references if link.startswith("#")]
        assert Page(as_artifact(text)).references == inside
        assert Page(as_artifact(text)).text == Page(text).text


def test_a_notebook_draws_a_result_with_its_page_but_without_its_clips(
    evaluation: Evaluation, text: str, tmp_path: Path
) -> None:
    assert "<iframe" not in evaluation._repr_html_()
    (tmp_path / "report.html").write_text(text, encoding="utf-8")
    cell = dataclasses.replace(evaluation, report=str(tmp_path / "report.html"))._repr_html_()
    shown, frame = cell.split("<iframe ")
    assert Page(shown).text == " ".join(repr(evaluation).split())
    page = html.unescape(frame)
    assert "confusion matrix" in page
    assert "Recipe and versions" in page
    for left_out in ("<audio", "waveform and spectrogram", "<nav", "Hardest clips"):
        assert left_out in text
        assert left_out not in page


def test_the_page_of_other_clips_says_what_was_scored_and_what_trained_the_model(
    evaluation: Evaluation,
) -> None:
    other = dataclasses.replace(
        evaluation, protocol="all speakers of other shards", corpus="table", is_own_test=False
    )
    text = evaluation_page(other, model="my-model", audio=False)
    page = Page(text)
    assert "Scored on all speakers of other shards Trained on" in page.text
    assert "Measured on: test, all speakers of other shards, a custom corpus, 90 clips" in page.text
    assert f'class="value">{other.scores.ua:.1%}</dd>' in text
    assert not [link for link in page.references if not link.startswith("#")]


def test_pages_of_a_study_and_of_its_trials_are_linked(evaluation: Evaluation) -> None:
    assert '<a href="trials/002.html">2</a>' in render_search()
    assert '<a href="../report.html">search</a>' in render_trial()
    folds = render_crossval(evaluation)
    assert '<a href="trials/001.html">4</a>' in folds
    assert "4 0 01, <02> 90 41.0%" in Page(folds).text


@pytest.mark.parametrize("kind", ["run", "trial"])
def test_the_curve_of_the_page_is_the_learning_rate_of_every_step(kind: str, text: str) -> None:
    page = text if kind == "run" else render_trial()
    low, high, curve = polylines(figure_of(page, "Learning rate of every step"))
    assert len(curve) == len(RATES)
    steps = [x for x, _ in curve]
    assert steps[1] - steps[0] == pytest.approx(steps[2] - steps[1])
    # The bounds, whose values are known, calibrate the logarithmic axis.
    per_decade = (high[0][1] - low[0][1]) / np.log10(2e-3 / 1e-4)
    drawn = [1e-4 * 10 ** ((y - low[0][1]) / per_decade) for _, y in curve]
    assert drawn == pytest.approx(RATES, rel=1e-3)


def test_the_curves_of_the_page_are_those_of_the_history(text: str) -> None:
    figure = figure_of(text, "Loss and accuracy of every epoch")
    assert "marked: epoch 3, validation UA 30.0%" in words_of(figure)
    curves = [line for line in polylines(figure) if len(line) == len(HISTORY)]
    keys = ("train/loss", "val/loss", "train/wa", "val/wa", "val/ua")
    for key, curve in zip(keys, curves, strict=True):
        heights = [-y for _, y in curve]
        values = [row[key] for row in HISTORY]
        between = (values[1] - values[0]) / (values[2] - values[0])
        assert (heights[1] - heights[0]) / (heights[2] - heights[0]) == pytest.approx(between)


def test_results_on_the_synthetic_corpus_are_marked_as_such(evaluation: Evaluation) -> None:
    card = dataclasses.replace(evaluation.card, corpus="synthetic")
    synthetic = Page(render(dataclasses.replace(evaluation, card=card, corpus="synthetic"))).text
    assert "not results on RAVDESS" in synthetic
    assert f"Measured on: test, {PROTOCOL}, the synthetic corpus" in synthetic
    assert "ynthetic" not in render(evaluation)


def test_a_clip_is_shown_with_its_verdict_and_a_player_where_there_is_sound(text: str) -> None:
    page = Page(text)
    assert page.text.count("happy : ✗ predicted <angry> (81%) <clip>.wav") == 4
    players = [item for item in page.references if item.startswith("data:audio")]
    assert players == [f"data:audio/mpeg;base64,{base64.b64encode(b'sound').decode()}"] * 2


def test_a_page_without_history_or_clips_has_no_such_sections(evaluation: Evaluation) -> None:
    text = Page(render(evaluation, history=(), learning_rates=())).text
    assert not {"learning", "Examples", "Hardest"} & set(text.split())


def test_the_page_of_a_trial_without_an_epoch_shows_only_its_recipe() -> None:
    text = render_trial(history=(), learning_rates=(), confusion=(), tags=TAGS | {"kind": "search"})
    assert '<th scope="row">kind</th>' not in text
    assert "Trial 2 of search: finished." in Page(text).text
    assert "<svg" not in text
    assert 'class="value"' not in text
    assert "lr_max 0.002" in Page(text).text


def test_the_page_of_a_search_shows_every_trial() -> None:
    text = render_search()
    page = Page(text)
    counts = "1 pruned, 1 finished, 1 failed"
    best = f"The best of 3 trials ({counts}) is trial 2, with lr_max 0.002, lr_ratio 25."
    assert f"{best} Its selected epoch is 2." in page.text
    assert "lr_max loguniform 0.0003 to 0.01" in page.text
    assert f"optuna-dashboard {OPTUNA_STUDY} shows it" in page.text
    assert re.findall(r'class="value">([\d.]+%)</dd>', text) == ["20.0%", "30.0%", "10.0%"]
    rows = text.split('<th scope="row"><a href="trials/')[1:4]
    assert [row[2] for row in rows] == ["2", "1", "3"], "the best first, those without a score last"
    assert " ".join(re.findall("<td>(.*?)</td>", rows[0])) == "60.0% 60.0% 0.002 25 2 finished"
    assert text.count("<svg") == 4, "the history, each searched name, and the importance"
    assert render_search(importance={}).count("<svg") == 3


def test_the_page_of_a_range_test_shows_the_loss_and_the_proposed_bounds() -> None:
    text = render_range()
    assert "A test of 4 steps proposes learning rates from 2.0e-05 to 5.0e-04." in Page(text).text
    assert "--lr-min 2.0e-05 --lr-max 5.0e-04" in Page(text).text
    lines = polylines(figure_of(text, "Loss by learning rate"))
    assert [len(line) for line in lines] == [4, 4, 2, 2]
    assert "mlflow.user" not in text
    settings = {"changed settings": "--noise 0.25", "noise": "0.25", "steps": "200"}
    for name, value in settings.items():
        assert f'<tr><th scope="row">{name}</th><td>{value}</td></tr>' in text


def test_the_same_run_gives_the_same_page(evaluation: Evaluation) -> None:
    assert render(evaluation) == render(evaluation)


def test_the_settings_of_a_page_begin_with_those_that_differ_from_the_defaults() -> None:
    settings = sections.settings_of(TrainConfig(crop_frames=64))
    assert next(iter(settings.items())) == ("changed settings", "--crop-frames 64")
    assert settings["mixup"] == TrainConfig().augment.mixup
    assert not [value for value in settings.values() if isinstance(value, dict)]
    assert sections.settings_of(TrainConfig())["changed settings"] == "none"
