"""Scores of a checkpoint against scikit-learn, who may be scored, and what a run keeps of them."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score

import ser_ray
from ser_ray.cli.main import main
from ser_ray.cli.model import Evaluate
from ser_ray.corpus.words import CorpusKind
from ser_ray.errors import CheckpointError, ConfigError, CorpusError, ShardsError, TrackingError
from ser_ray.evaluation import robustness, to_mlflow
from ser_ray.evaluation.evaluate import _seen_speakers, compare, evaluate, origin_of, shards_of
from ser_ray.evaluation.evaluation import Evaluation
from ser_ray.evaluation.pages import run_page
from ser_ray.evaluation.sections import read_clips
from ser_ray.evaluation.to_mlflow import record_evaluation, record_training
from ser_ray.shards.card import UsedCorpus
from ser_ray.tracking import views
from ser_ray.tracking.tracker import Tracker
from ser_ray.tracking.views import RunLinks
from ser_ray.training.data import Normalisation
from ser_ray.training.parts import describe_split, select_rows
from ser_ray.training.recipe import TrainConfig
from tests.clips import voice, write_wav
from tests.conftest import MemoryShards, make_memory_shards
from tests.mlflow_store import new_store
from tests.models import make_checkpoint

CONFIG = TrainConfig(protocol="speaker-3", crop_frames=16, weights="none")


@pytest.fixture
def shards(monkeypatch) -> MemoryShards:
    """Six speakers, found under the location `here`; four others under `elsewhere`."""
    here = make_memory_shards()
    others = make_memory_shards(speakers=4, seed=1)
    names = [f"x{name}" for name in others.table["speaker"].to_pylist()]
    place = others.table.schema.get_field_index("speaker")
    others.table = others.table.set_column(place, "speaker", pa.array(names))
    others.card.fingerprint = "beef"
    others.card.source = "other.csv"
    known = {"here": here, "elsewhere": others}

    def open_shards(location: str) -> MemoryShards:
        name = Path(location).name
        if name not in known:
            raise ShardsError(location)
        return known[name]

    monkeypatch.setattr("ser_ray.shards.corpora.open_shards", open_shards)
    here.card.elsewhere = others
    return here


def checkpoint_for(
    shards: MemoryShards, folder: Path, fold: int = 0, seed: int = 0, validation_speakers: int = 0
) -> Path:
    config = dataclasses.replace(CONFIG, fold=fold, validation_speakers=validation_speakers)
    make_checkpoint(
        folder,
        seed=seed,
        labels=shards.card.labels,
        config=config,
        features=shards.card.features,
        normalisation=Normalisation(np.full(16, 3.0), np.full(16, 5.0)),
        split=describe_split(select_rows(shards.table, config)),
    )
    return folder


@pytest.fixture
def checkpoint(shards, tmp_path) -> Path:
    return checkpoint_for(shards, tmp_path / "model")


def test_scores_are_those_of_scikit_learn_on_the_test_speakers(shards, checkpoint):
    found = evaluate(checkpoint, "here")
    table = found.predictions
    assert found.is_own_test
    assert set(table["speaker"].to_pylist()) == set(found.card.split["test_speakers"])
    truth, predicted = table["emotion"].to_pylist(), table["predicted"].to_pylist()
    assert found.scores.ua == pytest.approx(balanced_accuracy_score(truth, predicted))
    assert found.scores.wa == pytest.approx(np.mean(np.equal(truth, predicted)))
    assert found.scores.macro_f1 == pytest.approx(
        f1_score(truth, predicted, average="macro", zero_division=0)
    )
    low, high = found.intervals.ua
    assert low <= found.scores.ua <= high
    sexes = {row["sex"]: row for row in found.groups["sex"]}
    for sex, row in sexes.items():
        own = np.equal(table["sex"].to_pylist(), sex)
        assert row["clips"] == own.sum()
        assert row["wa"] == pytest.approx(np.equal(truth, predicted)[own].mean())
    assert json.loads(json.dumps(found.to_dict()))["clips"] == table.num_rows


def test_calibration_is_shown_before_and_after_the_temperature(shards, checkpoint, tmp_path):
    plain = evaluate(checkpoint, "here")
    assert plain.uncalibrated.ece == plain.calibration.ece
    scaled = tmp_path / "scaled"
    shutil.copytree(checkpoint, scaled)
    card = dataclasses.replace(plain.card, temperature=0.5)
    (scaled / "card.json").write_text(card.to_json())
    found = evaluate(scaled, "here")
    squares = plain.probabilities**2
    np.testing.assert_allclose(found.probabilities, squares / squares.sum(axis=1, keepdims=True))
    assert found.uncalibrated.ece == pytest.approx(plain.calibration.ece)
    assert found.calibration.ece != pytest.approx(plain.calibration.ece)
    assert found.scores.ua == plain.scores.ua
    assert found.to_dict()["ece_uncalibrated"] == found.uncalibrated.ece
    page = run_page(found.card, found, name="run", audio=False)
    assert (
        "The probabilities are scaled with a temperature of 0.50, fitted on the validation clips. "
        f"Without it, the error is {plain.calibration.ece:.1%}."
    ) in page
    assert "A temperature of" not in run_page(plain.card, plain, name="run", audio=False)


def test_hardest_clips_are_wrong_and_sorted_by_confidence(shards, checkpoint):
    found = evaluate(checkpoint, "here")
    rows = found.hardest()[:3]
    assert len(rows) == 3
    assert (found.predicted[rows] != found.truth[rows]).all()
    sure = found.probabilities.max(axis=1)
    assert sure[rows].tolist() == sorted(sure[found.predicted != found.truth], reverse=True)[:3]


def test_typical_rows_are_one_clip_of_each_label(shards, checkpoint):
    found = evaluate(checkpoint, "here")
    rows = found.typical()
    assert found.truth[rows].tolist() == [0, 1, 2, 3]
    for row in rows:
        label = found.truth[row]
        own = found.probabilities[found.truth == label, label]
        assert abs((own < found.probabilities[row, label]).mean() - 0.5) <= 0.5 / len(own) + 1e-9


def test_speakers_seen_in_training_are_refused_unless_allowed(shards, checkpoint):
    with pytest.raises(
        CheckpointError, match=r"trained or validated on 2 of these speakers.*--allow-seen"
    ):
        evaluate(checkpoint, "here", fold=1)
    allowed = evaluate(checkpoint, "here", fold=1, allow_seen_speakers=True)
    assert not allowed.is_own_test
    assert "SPEAKERS SEEN IN TRAINING" in allowed.label
    assert set(allowed.seen_speakers) == set(allowed.predictions["speaker"].to_pylist())


def used(name: str, kind: CorpusKind = "table") -> UsedCorpus:
    return UsedCorpus(
        name=name, kind=kind, fingerprint=name, labels={}, clips=1, speakers=1, left_out={}
    )


EMODB, IEMOCAP, RAVDESS = used("emodb"), used("iemocap"), used("actors", "ravdess")


@pytest.mark.parametrize(
    ("corpora", "trained", "scored", "seen"),
    [
        # One set, with and without mapped labels, and then several sets.
        ((EMODB,), ["01"], [("emodb:01", "emodb"), ("emodb:02", "emodb")], ["emodb:01"]),
        ((), ["01"], [("emodb:01", "emodb"), ("emodb:02", "emodb")], ["emodb:01"]),
        ((RAVDESS,), ["01"], [("ravdess:01", "actors"), ("emodb:02", "emodb")], ["ravdess:01"]),
        # Several sets, and then one without prefixes, or several with other names.
        ((RAVDESS, EMODB), ["ravdess:01", "emodb:03"], [("01", ""), ("02", ""), ("03", "")],
         ["01", "03"]),
        ((RAVDESS, EMODB), ["ravdess:01"], [("01", "actors"), ("01", "emodb")], ["01"]),
        ((RAVDESS, EMODB), ["emodb:03"], [("new:03", "new"), ("new:04", "new")], ["new:03"]),
        # Different people of the same name, in two corpora that the model knows.
        ((EMODB, IEMOCAP), ["emodb:03", "iemocap:04"],
         [("iemocap:03", "iemocap"), ("emodb:04", "emodb")], []),
        ((EMODB, IEMOCAP), ["emodb:03", "iemocap:04"],
         [("iemocap:04", "iemocap"), ("emodb:03", "emodb")], ["emodb:03", "iemocap:04"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("part", ["train_speakers", "validation_speakers"])
def test_a_speaker_is_known_with_and_without_the_prefix_of_the_corpus(
    corpora, trained, scored, seen, part
):
    card: Any = SimpleNamespace(
        corpora=corpora, split={"train_speakers": [], "validation_speakers": []} | {part: trained}
    )
    columns = {"speaker": ["unscored", *(speaker for speaker, _ in scored)]}
    if scored[0][1]:
        columns["corpus"] = ["unscored", *(corpus for _, corpus in scored)]
    rows = np.arange(1, len(scored) + 1)
    assert _seen_speakers(card, pa.table(columns), rows) == tuple(seen)


def test_the_number_of_validation_speakers_does_not_matter_for_another_protocol(shards, tmp_path):
    """Three of six speakers validated; a fold of speaker-2 has only three that it does not test."""
    checkpoint = checkpoint_for(shards, tmp_path / "three", validation_speakers=3)
    found = evaluate(checkpoint, "here", protocol="speaker-2", allow_seen_speakers=True)
    assert len(set(found.predictions["speaker"].to_pylist())) == 3


def test_all_clips_of_other_shards_are_scored_if_their_speakers_are_unseen(shards, checkpoint):
    found = evaluate(checkpoint, "elsewhere")
    assert found.predictions.num_rows == shards.card.elsewhere.table.num_rows
    assert found.label == "all speakers of other.csv"
    assert not found.is_own_test
    others = shards.card.elsewhere
    place = others.table.schema.get_field_index("channel")
    spoken, sung = others.table, pa.array(["song"] * others.table.num_rows)
    others.table = others.table.set_column(place, "channel", sung)
    with pytest.raises(ConfigError, match="these shards hold no speech clip"):
        evaluate(checkpoint, "elsewhere")
    others.table = spoken
    with pytest.raises(ConfigError, match=r"fold is 1, but .*: give a --protocol too"):
        evaluate(checkpoint, "elsewhere", fold=1)
    shards.card.fingerprint = "prepared again"
    with pytest.raises(CheckpointError, match="trained or validated on 4 of these speakers"):
        evaluate(checkpoint, "here")


def test_shards_of_other_features_or_labels_are_refused(shards, checkpoint):
    elsewhere = shards.card.elsewhere.card
    features = elsewhere.features
    elsewhere.features = dataclasses.replace(features, num_mels=17)
    with pytest.raises(CheckpointError, match="other features"):
        evaluate(checkpoint, "elsewhere")
    elsewhere.features = features
    elsewhere.labels = (*elsewhere.labels, "bored")
    with pytest.raises(CheckpointError, match="does not know the labels bored"):
        evaluate(checkpoint, "elsewhere")


def test_a_model_equals_itself_and_pairs_need_the_same_clips(shards, checkpoint, tmp_path):
    first = evaluate(checkpoint, "here")
    same = compare(first, evaluate(checkpoint, "here"))
    assert [same.wa_difference, same.ua_difference, same.mcnemar_p] == [0, 0, 1]
    assert list(same.ua_interval) == [0, 0]
    other = evaluate(checkpoint_for(shards, tmp_path / "other", seed=5), "here")
    found = compare(first, other)
    assert found.ua_difference == pytest.approx(first.scores.ua - other.scores.ua)
    assert found.only_first_right - found.only_second_right == pytest.approx(
        found.wa_difference * first.scores.num_clips
    )
    elsewhere = evaluate(checkpoint_for(shards, tmp_path / "third", fold=1), "here")
    with pytest.raises(ConfigError, match="scored on different clips"):
        compare(first, elsewhere)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_a_damaged_record_of_the_run_is_a_checkpoint_error(text, checkpoint):
    (checkpoint / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json: is damaged .*; restore or delete it"):
        origin_of(checkpoint)


def test_the_learning_rates_on_the_page_are_those_of_the_loop(shards, tmp_path):
    """The page is drawn from those of the newest checkpoint."""
    from ser_ray.training.loop import fit
    from ser_ray.training.model import Pretrained

    config = dataclasses.replace(CONFIG, epochs=2, batch_size=8)
    reported: list[float] = []
    kept: list[list[float]] = []

    def report(epoch, make_snapshot):
        reported.extend(epoch.learning_rates)
        kept.append(make_snapshot().progress["learning_rates"])

    fit(config, shards, Pretrained("fresh", {}), report)
    assert kept[1] == reported
    assert kept[0] == reported[: len(reported) // 2]


class Recorder:
    """A tracker that keeps what it is asked to store."""

    uri, run_id, run_name = "somewhere", "0123", "the run"

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.files: dict[str, Any] = {}
        self.lines: dict[str, str] = {}
        self.calls: list[str] = []

    def log_scores(self, scores: Mapping[str, float], timestamp_ms: int) -> None:
        self.metrics |= scores

    def describe(self, **lines: str) -> None:
        self.lines |= lines

    def log_files(self, files: Mapping[str, Any]) -> None:
        self.files |= files

    def read_text(self, name: str) -> str:
        return str(self.files[name])

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: self.calls.append(name)


def test_an_evaluation_stores_its_scores_and_tables_and_adds_to_the_page_of_the_run(
    shards, checkpoint, tmp_path, monkeypatch
):
    report, tracker = tmp_path / "report.html", Recorder()
    origin = {"run_id": "0123", "tracking_uri": "somewhere", "report": str(report)}
    (checkpoint / "run.json").write_text(json.dumps(origin))
    monkeypatch.setattr(Tracker, "of_run", lambda uri, run_id: tracker)
    validation = evaluate(checkpoint, "here", part="validation")
    first = run_page(validation.card, validation, name="the run", audio=False)
    report.write_text(first)
    evaluation = evaluate(checkpoint, "here")
    assert evaluation.report == str(report)
    assert validation.report == ""
    record_evaluation(evaluation, audio=False)
    page = report.read_text()
    assert tracker.files["report.html"] == page
    parts = [f'class="value">{item.scores.ua:.1%}</dd>' for item in (evaluation, validation)]
    assert 0 < page.index(parts[0]) < page.index("Validation part</h2>") < page.rindex(parts[1])
    assert f"<strong>test, {evaluation.label}, " in page
    record_evaluation(evaluation, audio=False)
    assert report.read_text() == page, "the test part replaces the earlier one"
    report.unlink()
    tracker.files["report.html"] = first
    record_evaluation(evaluation, audio=False)
    assert tracker.files["report.html"] == page, "the page is on another machine"
    assert tracker.metrics["test/ua"] == evaluation.scores.ua
    low, high = evaluation.intervals.ua
    assert tracker.lines["Test"].startswith(
        f"UA {evaluation.scores.ua:.1%} [{low:.1%}, {high:.1%}], WA "
    )
    assert evaluation.label in tracker.lines["Test"]
    assert json.loads(json.dumps(tracker.files["tables/test.json"]))["ua"] == evaluation.scores.ua
    assert tracker.files["tables/test_predictions.csv"].num_rows == len(evaluation.truth)


def test_the_report_of_an_evaluation_is_a_page_that_exists(shards, checkpoint, in_tmp, monkeypatch):
    """The page of the training may be gone, and is not the page of another fold."""
    report = in_tmp / "report.html"
    origin = {"run_id": "0123", "tracking_uri": "somewhere", "report": str(report)}
    (checkpoint / "run.json").write_text(json.dumps(origin))
    monkeypatch.setattr(to_mlflow, "record_evaluation", lambda *_, **__: None)
    gone = ser_ray.evaluate(checkpoint, "here", audio=False)
    assert gone.is_own_test
    report.write_text("the page of the training")
    found = ser_ray.evaluate(checkpoint, "here", audio=False)
    other = ser_ray.evaluate(checkpoint, "here", fold=1, allow_seen_speakers=True, audio=False)
    assert found.report == str(report)
    for evaluation in (gone, other):
        assert Path(evaluation.report).parent == Path("ser-ray-out/evaluations")
        assert f"{evaluation.scores.ua:.1%}" in Path(evaluation.report).read_text()
    assert gone.report != other.report
    for evaluation in (gone, found, other):
        assert evaluation.to_dict()["report"] == evaluation.report


@pytest.mark.parametrize("answers", [True, False])
def test_with_a_server_the_verb_links_to_the_run_that_has_the_scores(
    shards, checkpoint, in_tmp, monkeypatch, answers
):
    origin = {"run_id": "0123", "tracking_uri": "http://server:5000", "report": ""}
    (checkpoint / "run.json").write_text(json.dumps(origin))

    def record(evaluation: Evaluation, *, audio: bool) -> None:
        if not answers:
            raise TrackingError("http://server:5000 does not answer")

    monkeypatch.setattr(to_mlflow, "record_evaluation", record)
    links = RunLinks("http://server:5000/#/experiments/1/runs/0123", "", "")
    monkeypatch.setattr(views, "run_links", lambda uri, run_id: links)
    last = Evaluate(model=str(checkpoint), shards=("here",)).run().next_step
    assert (f"MLflow run   0123: {links.run}" in last.splitlines()) == answers
    assert "report       ser-ray-out/evaluations/" in last


def test_scores_under_conditions_stand_beside_those_of_the_clips_as_they_are(
    shards, checkpoint, tmp_path, monkeypatch
):
    clean = evaluate(checkpoint, "here")
    paths, answers = clean.predictions["path"].to_pylist(), clean.predictions["predicted"]
    truth = clean.predictions["emotion"].to_pylist()
    given = {"level-plus-20": answers.to_pylist(), "level-minus-20": [None, None, *truth[2:]]}

    def predict_under(clips, conditions, predictor):
        assert clips == [(path, None, None) for path in paths]
        for name in conditions:
            rows = [
                {"condition": name, "clip": clip, "emotion": emotion, "reason": "",
                 "status": "ok" if emotion else "too_short"}
                for clip, emotion in enumerate(given[name])
            ]  # fmt: skip
            yield pa.Table.from_pylist(rows[::-1])

    monkeypatch.setattr(robustness, "predict_under", predict_under)
    predicted = robustness.predict_conditions(clean, cast(Any, None), ("level",))
    rows: Any = robustness.score_under(clean, predicted)
    assert [row["condition"] for row in rows] == ["clean", "level-plus-20", "level-minus-20"]
    for row in rows[:2]:
        assert (row["ua"], row["wa"]) == pytest.approx((clean.scores.ua, clean.scores.wa))
        assert (row["ua_change"], row["low"], row["high"], row["unscored"]) == (0, 0, 0, 0)
    right = [True] * len(truth)
    right[:2] = [False, False]
    recalls = [np.mean([r for r, t in zip(right, truth, strict=True) if t == label])
               for label in set(truth)]  # fmt: skip
    assert rows[2]["ua"] == pytest.approx(np.mean(recalls))
    assert rows[2]["wa"] == pytest.approx(np.mean(right))
    assert rows[2]["ua_change"] == pytest.approx(np.mean(recalls) - clean.scores.ua)
    assert rows[2]["low"] <= rows[2]["ua_change"] <= rows[2]["high"]
    assert rows[2]["unscored"] == 2

    tracker = Recorder()
    monkeypatch.setattr(Tracker, "of_run", lambda uri, run_id: tracker)
    validation = evaluate(checkpoint, "here", part="validation")
    page = run_page(validation.card, validation, name="the run", audio=False)
    tracker.files["report.html"] = page
    origin = {"run_id": "0123", "tracking_uri": "somewhere"}
    scored = dataclasses.replace(clean, under=rows, origin=origin, report=str(tmp_path / "none"))
    record_evaluation(scored, audio=False)
    assert tracker.metrics["test/under/level-minus-20/ua"] == rows[2]["ua"]
    assert "Recording conditions</h3>" in tracker.files["report.html"]
    shown = f"20 dB quieter; 2 clips not scored</span></th><td>{rows[2]['ua']:.1%}</td>"
    assert shown in tracker.files["report.html"]
    assert f"level-minus-20 UA {rows[2]['ua']:6.1%}" in str(scored)
    assert scored.to_dict()["under"][2] == rows[2]
    gone = pa.table({"condition": ["level-plus-20"], "path": ["/a.wav"], "emotion": [None],
                     "status": ["unreadable"], "reason": ["the file does not exist"]})  # fmt: skip
    monkeypatch.setattr(robustness, "predict_under", lambda *_: [gone])
    with pytest.raises(CorpusError, match=r"/a.wav: --under needs the sound .* --corpus"):
        robustness.predict_conditions(clean, cast(Any, None), ("level",))


def test_scores_of_other_clips_have_a_page_of_their_own(shards, checkpoint, in_tmp, capsys):
    assert main(["evaluate", str(checkpoint), "--shards", "elsewhere", "--no-audio"]) == 0
    (page,) = (in_tmp / "ser-ray-out" / "evaluations").glob("*.html")
    assert str(page.relative_to(in_tmp)) in capsys.readouterr().out
    assert f"{evaluate(checkpoint, 'elsewhere').scores.ua:.1%}</dd>" in page.read_text()


def test_scores_go_to_the_named_store_if_it_has_the_run(shards, checkpoint, in_tmp, capsys):
    """The store that the training recorded may have moved."""
    uri = new_store(in_tmp / "moved")
    run = Tracker.start(uri, "test", name="run", params={}, tags={})
    origin = {
        "run_id": run.run_id,
        "tracking_uri": "http://127.0.0.1:9",
        "report": "report.html",
        "shards": ["where it was trained"],
    }
    scored = evaluate(checkpoint, "here")
    page = run_page(scored.card, scored, name="run", audio=False)
    Path("report.html").write_text(page)
    (checkpoint / "run.json").write_text(json.dumps(origin))
    command = ["evaluate", str(checkpoint), "--shards", "here", "--tracking-uri", uri, "--json"]
    assert main(command) == 0
    printed = json.loads(capsys.readouterr().out)
    assert run.read().data.metrics["test/ua"] == printed["ua"]
    assert printed["tracking_uri"] == uri
    assert printed["shards"] == list(scored.shards)


@pytest.mark.parametrize("uri", ["sqlite:///{folder}/gone.db", "http://127.0.0.1:9"])
def test_scores_are_printed_although_their_run_is_unreachable(
    shards, checkpoint, tmp_path, uri, capsys, caplog
):
    report = tmp_path / "report.html"
    origin = {
        "run_id": "0123",
        "tracking_uri": uri.format(folder=tmp_path),
        "report": str(report),
    }
    scored = evaluate(checkpoint, "here")
    report.write_text(run_page(scored.card, scored, name="run", audio=False))
    (checkpoint / "run.json").write_text(json.dumps(origin))
    assert main(["evaluate", str(checkpoint), "--shards", "here", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["ua"] == evaluate(checkpoint, "here").scores.ua
    assert "the scores are not recorded in the training's MLflow run" in caplog.text
    assert not (tmp_path / "gone.db").exists()
    assert "Test part</h2>" in report.read_text()


def test_if_no_store_has_the_run_the_warning_names_the_store_that_the_user_named(
    shards, checkpoint, tmp_path, monkeypatch, caplog
):
    recorded, named = f"sqlite:///{tmp_path}/recorded.db", f"sqlite:///{tmp_path}/named.db"
    origin = {"run_id": "0123", "tracking_uri": recorded, "report": str(tmp_path / "report.html")}
    (checkpoint / "run.json").write_text(json.dumps(origin))
    command = ["evaluate", str(checkpoint), "--shards", "here"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert main(command) == 0
    assert f"{named}: there is no such MLflow store" in caplog.text
    assert recorded not in caplog.text
    caplog.clear()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(command) == 0
    assert recorded in caplog.text


def test_the_places_of_a_moved_run_are_those_beside_it_now(shards, tmp_path):
    old, new = tmp_path / "old" / "ser-ray-out", tmp_path / "new" / "ser-ray-out"
    selected = checkpoint_for(shards, old / "runs" / "a" / "selected")
    origin = {
        "run_id": "0123",
        "tracking_uri": f"sqlite:///{old}/mlflow.db",
        "report": f"{old}/runs/a/report.html",
        "shards": [f"{tmp_path}/old/shards"],
    }
    (selected / "run.json").write_text(json.dumps(origin))
    assert origin_of(selected) == origin
    shutil.copytree(old, new)
    (tmp_path / "new" / "shards").mkdir()
    moved = json.loads(json.dumps(origin).replace(str(tmp_path / "old"), str(tmp_path / "new")))
    assert origin_of(new / "runs" / "a" / "selected") == moved
    served = origin | {"tracking_uri": "http://127.0.0.1:9", "shards": ["s3://bucket/shards"]}
    (new / "runs" / "a" / "selected" / "run.json").write_text(json.dumps(served))
    expected = served | {"report": moved["report"]}
    assert origin_of(new / "runs" / "a" / "selected") == expected


def test_a_models_own_shards_are_found_where_they_were_or_in_the_usual_places(shards, checkpoint):
    assert shards_of(checkpoint, ("elsewhere", "here")) == ("here",)
    (checkpoint / "run.json").write_text(json.dumps({"shards": ["here"]}))
    assert shards_of(checkpoint, ("elsewhere",)) == ("here",)
    (checkpoint / "run.json").write_text(json.dumps({"shards": ["gone"]}))
    with pytest.raises(ShardsError, match="not in gone or elsewhere: give their location"):
        shards_of(checkpoint, ("elsewhere",))


def test_clips_with_equal_file_names_are_told_apart(shards, checkpoint, tmp_path):
    paths = [str(tmp_path / name) for name in ("a/x.wav", "b/x.wav", "b/y.wav")]
    for seed, path in enumerate(paths):
        Path(path).parent.mkdir(exist_ok=True)
        write_wav(Path(path), voice(1.0, 16_000, seed), 16_000)
    table = evaluate(checkpoint, "here").predictions.slice(0, 3)
    table = table.set_column(table.schema.get_field_index("path"), "path", pa.array(paths))
    moved = dataclasses.replace(evaluate(checkpoint, "here"), predictions=table)
    shown = read_clips(moved, [0, 1, 2], audio=False)
    assert [clip["name"] for clip in shown] == [*paths[:2], "y.wav"]


@pytest.mark.parametrize("place", ["/gone/a.wav", "s3://user:password@bucket/a.wav", "no://b/a"])
def test_a_page_has_no_clips_if_the_corpus_is_unreachable(shards, checkpoint, place):
    evaluation = evaluate(checkpoint, "here")
    paths = pa.array([place] * len(evaluation.truth))
    table = evaluation.predictions
    table = table.set_column(table.schema.get_field_index("path"), "path", paths)
    moved = dataclasses.replace(evaluation, predictions=table)
    assert read_clips(moved, [0, 1], audio=False) == []
    assert "Examples</h3>" not in run_page(moved.card, moved, name="run", audio=False)


def test_a_finished_training_leaves_its_page_in_the_run(shards, checkpoint):
    history = [
        {"epoch": epoch, "train/loss": 1.0, "train/wa": 0.5, "val/loss": 1.2, "val/wa": 0.4,
         "val/ua": 0.1 * epoch}
        for epoch in (1, 2)
    ]  # fmt: skip
    progress = {
        "selected": history[1],
        "history": history,
        "selected_confusion": np.eye(4, dtype=int),
    }
    validation, tracker = evaluate(checkpoint, "here", part="validation"), Recorder()
    page = run_page(
        validation.card,
        validation,
        name="run",
        history=history,
        learning_rates=[1e-4, 1e-3],
        audio=False,
    )
    record_training(cast(Tracker, tracker), checkpoint, validation.card, validation, progress, page)
    assert tracker.files["report.html"] == page
    assert f'class="value">{validation.scores.ua:.1%}</dd>' in page
    assert "marked: epoch 2, validation UA 20.0%" in page
    assert tracker.metrics["selected/ua"] == 0.2
    assert tracker.lines["Validation"].startswith(f"UA {validation.scores.ua:.1%} [")
    assert tracker.calls[-2:] == ["log_model", "finish"]
