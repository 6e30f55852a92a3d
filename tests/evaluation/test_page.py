"""The page of a run: parsed as a reader's browser would, and searched for what must be there."""

import base64
import dataclasses
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest

from ser_ray.evaluation.page import ClipView, RunReport, render_report
from ser_ray.plots.scores import group_rows

VOID = {"meta", "br", "hr", "img", "link"}
PROTOCOL = "emobox-6 fold 1 of 6 (speaker-independent)"


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


@pytest.fixture(scope="module")
def report() -> RunReport:
    rng = np.random.default_rng(2)
    truth, predicted = rng.integers(0, 3, (2, 90))
    confusion = np.zeros((3, 3), dtype=int)
    np.add.at(confusion, (truth, predicted), 1)
    waveform = np.sin(np.arange(16_000) / 9).astype(np.float32)
    clip = ClipView(
        name="<clip>.wav",
        truth="happy",
        predicted="<angry>",
        probability=0.81,
        waveform=waveform,
        sample_rate=16_000,
        spectrogram=rng.normal(-40, 10, (321, 51)),
        mp3=b"sound",
    )
    epochs = [{"epoch": e, "train_loss": 1 / e, "train_wa": 0.2 * e} for e in (1, 2, 3)]
    return RunReport(
        title="run <script>alert(1)</script>",
        corpus="ravdess",
        protocol=PROTOCOL,
        part="test",
        scores={"UA": 0.7123, "WA": 0.7001},
        labels=("happy", "sad & low", "<angry>"),
        confusion=confusion,
        intervals={"UA": (0.61, 0.79)},
        drawn="over draws of 3 speakers",
        groups={
            "speaker": group_rows("speaker", ["01", "11", "20"] * 30, truth, predicted),
            "sex": group_rows("sex", ["male", "female"] * 45, truth, predicted),
        },
        calibration=([0.15, float("nan")], [0.2, float("nan")], [90, 0]),
        ece=0.05,
        examples=[clip],
        hardest=[dataclasses.replace(clip, mp3=None)],
        history=[{**row, "val_loss": 1.0, "val_wa": 0.4, "val_ua": 0.3} for row in epochs],
        selected={**epochs[-1], "val_loss": 1.0, "val_wa": 0.4, "val_ua": 0.3},
        lr_per_step=[1e-4, 2e-3, 1e-5],
        lr_min=1e-4,
        lr_max=2e-3,
        config={"feature": "mel", "shards": '"><img src=x>'},
        versions={"torch": "2.11.0"},
    )


def test_page_is_well_formed_and_loads_nothing(report: RunReport) -> None:
    text = render_report(report)
    page = Page(text)
    assert len(page.ids) == len(set(page.ids))
    assert page.references, "figures refer to their own parts"
    for reference in page.references:
        inside = reference.strip("'\"")
        assert inside.startswith(("#", "data:image/png;base64,", "data:audio/mpeg;base64,"))
        assert not inside.startswith("#") or inside[1:] in page.ids
    assert not page.tags & {"script", "img", "link", "iframe", "object"}
    assert "@import" not in text
    assert "url(" not in re.search(r"<style>(.*?)</style>", text, re.DOTALL).group(1)  # type: ignore[union-attr]


def test_every_figure_is_an_svg_with_a_description(report: RunReport) -> None:
    figures = re.findall(r"<svg.*?</svg>", render_report(report), re.DOTALL)
    assert len(figures) == 7
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img"
        assert root.get("aria-label")
        assert "#000000" not in figure, "black vanishes on a dark page"
    words = [
        "".join(node.itertext()) for node in ElementTree.fromstring(figures[0]).iter()
        if node.tag.endswith("text")
    ]  # fmt: skip
    assert "<angry>" in words


def test_text_of_others_is_shown_as_text(report: RunReport) -> None:
    page = Page(render_report(report))
    for words in ("run <script>alert(1)</script>", "sad & low", "<angry>", '"><img src=x>'):
        assert words in page.text


def test_protocol_stands_beside_every_score(report: RunReport) -> None:
    text = render_report(report)
    tiles = re.findall(
        r'class="value">([\d.]+%)</dd>(?:<dd>.*?</dd>)?<dd class="quiet">(.*?)</dd>', text
    )
    assert tiles == [(value, f"test, {PROTOCOL}, RAVDESS") for value in ("71.2%", "70.0%")]
    captions = re.findall(r"<caption>(.*?)</caption>", text)
    assert captions == [f"test, {PROTOCOL}, RAVDESS"] * 3
    scored = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    for figure in (*scored[:3], scored[5]):  # between them are the clips
        words = " ".join("".join(ElementTree.fromstring(figure).itertext()).split())
        assert PROTOCOL in words


def test_tables_hold_the_numbers(report: RunReport) -> None:
    page = Page(render_report(report))
    for kind, rows in report.groups.items():
        for row in rows:
            wanted = f"{row[kind]} {row['clips']} {row['wa']:.1%} {row['ua']:.1%}"
            assert wanted in page.text
    assert "95 % interval 61.0% to 79.0%, over draws of 3 speakers" in page.text
    assert "expected calibration error 5.0%" in page.text
    assert "feature mel" in page.text
    assert "torch 2.11.0" in page.text


def test_stand_in_is_named_wherever_its_results_are(report: RunReport) -> None:
    synthetic = render_report(dataclasses.replace(report, corpus="synthetic"))
    assert "not results on RAVDESS" in Page(synthetic).text
    assert Page(synthetic).text.count("synthetic corpus") >= 1 + 2 + 3 + 4
    assert "tand-in" not in Page(render_report(report)).text


def test_a_clip_is_shown_with_its_verdict_and_played_where_it_may_be(report: RunReport) -> None:
    page = Page(render_report(report))
    assert page.text.count("happy : named <angry> (81%), wrong <clip>.wav") == 2
    players = [item for item in page.references if item.startswith("data:audio")]
    assert players == [f"data:audio/mpeg;base64,{base64.b64encode(b'sound').decode()}"]


def test_a_page_without_history_or_clips_has_no_such_sections(report: RunReport) -> None:
    bare = dataclasses.replace(report, history=[], lr_per_step=[], examples=[], hardest=[])
    text = Page(render_report(bare)).text
    assert not {"Training", "Examples", "Hardest"} & set(text.split())


def test_the_same_run_gives_the_same_page(report: RunReport) -> None:
    assert render_report(report) == render_report(report)
