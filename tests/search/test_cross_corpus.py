"""Two corpora of other labels all the way: trained, evaluated, and a model that begins another.

The clips are those of `tests.shard_files.write_spelled`, in bands of frequency that can be learned.
"""

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient

from ser_ray.cli.main import main
from ser_ray.training.checkpoint import read_card
from tests.shard_files import write_spelled

ONE = {"neutral": "bored", "calm": "excited", "happy": "joy", "sad": "sadness"}
OTHER = {"neutral": "bored", "calm": "tired", "happy": "happy", "sad": "sad"}
SMALL = [
    "--weights", "none", "--epochs", "1", "--batch-size", "8", "--crop-frames", "24",
    "--device", "cpu", "--no-audio", "--tracking-uri", "sqlite:///store.db",
    "--noise", "0", "--echo", "0", "--band-limit", "0",
]  # fmt: skip


@pytest.fixture
def corpora(in_tmp: Path) -> tuple[str, ...]:
    """Relative locations of the sets `one` and `other`."""
    write_spelled(in_tmp / "one", ONE)
    write_spelled(in_tmp / "other", OTHER)
    return "one", "other"


def ran(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict:
    """Run a verb, and return what it prints as JSON."""
    code = main([*arguments, "--json"])
    printed = capsys.readouterr()
    assert code == 0, printed.err[-2000:]
    return json.loads(printed.out)


@pytest.mark.slow
def test_a_model_of_two_corpora_is_scored_and_begins_another(corpora, capsys, in_tmp):
    protocol = ("--protocol", "cross-corpus", "--fold", "1", "--label-map", "common")
    trained = ran(capsys, "train", "--shards", *corpora, *protocol, "--corpus-balance", "1", *SMALL)
    assert trained["protocol"] == "cross-corpus fold 1, tests other (speaker-independent)"
    selected = Path(trained["checkpoint"])
    card = read_card(selected)
    assert card.labels == ("happy", "sad", "bored")
    assert card.trained_on == "a custom corpus (one and other)"
    page = Path(trained["report"]).read_text()
    assert "one: 36 clips, 6 speakers; joy as happy, sadness as sad; left out: 12 excited" in page

    own = ran(capsys, "evaluate", str(selected))
    assert own["clips"] == 36
    assert [row["corpus"] for row in own["groups"]["corpus"]] == ["other"]
    run = MlflowClient(f"sqlite:///{in_tmp}/store.db").get_run(trained["run_id"])
    assert run.data.metrics["test/corpus/other/ua"] == own["ua"]

    # The first corpus trained it, also alone and under another name; new ones have to be mapped.
    Path("one").rename("renamed")
    assert main(["evaluate", str(selected), "--shards", "renamed"]) == 2
    assert "trained or validated on 6 of these speakers" in capsys.readouterr().err
    write_spelled(in_tmp / "third", {"happy": "anger"}, fingerprint="3" * 16)
    new = ("evaluate", str(selected), "--shards", "third", "--allow-seen-speakers")
    assert main([*new]) == 2
    assert "does not know the labels angry, calm, neutral" in capsys.readouterr().err
    before = ran(capsys, *new, "--label-map", "common")
    assert before["clips"] == 12
    assert before["corpora"][0]["left_out"] == {"anger": 12, "calm": 12, "neutral": 12}

    again = [*SMALL, "--protocol", "speaker-3", "--weights", str(selected)]
    tuned = ran(capsys, "train", "--shards", "third", *again)
    begun = read_card(Path(tuned["checkpoint"]))
    assert begun.labels == ("anger", "calm", "neutral", "sad")
    assert begun.initial_weights.endswith("; fresh: fc, because its labels are happy, sad, bored")
    assert ran(capsys, "evaluate", tuned["checkpoint"])["clips"] == 16


@pytest.mark.ray
@pytest.mark.slow
def test_a_cross_validation_over_corpora_has_a_table_of_them(corpora, two_cpus, capsys, in_tmp):
    found = ran(
        capsys, "crossval", "--shards", *corpora, "--protocol", "cross-corpus", "--label-map",
        "common", *SMALL,
    )  # fmt: skip
    assert [(row["corpus"], row["clips"]) for row in found["by_corpus"]] == [
        ("one", 36), ("other", 36),
    ]  # fmt: skip
    client, run_id = MlflowClient(f"sqlite:///{in_tmp}/store.db"), found["run_id"]
    metrics = client.get_run(run_id).data.metrics
    for row in found["by_corpus"]:
        assert metrics[f"test/corpus/{row['corpus']}/ua"] == row["ua"]
        assert row["ua_low"] <= row["ua"] <= row["ua_high"]
    table = Path(client.download_artifacts(run_id, "tables/corpora.csv", str(in_tmp))).read_text()
    assert table.splitlines()[0] == '"corpus","clips","wa","ua","ua_low","ua_high"'
    page = Path("ser-ray-out/runs", found["name"], "report.html").read_text()
    assert page.index("UA from") < page.index(">other</th>")
