"""The commands that verbs print for the user to run next, and the first lines of a verb."""

import shlex
from dataclasses import replace
from typing import Any

import numpy as np

from ser_ray.cli.main import VERBS
from ser_ray.cli.parsing import parse_verb
from ser_ray.cli.pipeline import prediction_lines
from ser_ray.cli.train import Crossval, Train, say_training
from ser_ray.command import flags_of, next_command
from ser_ray.distributed.mlflow_run import command_like
from ser_ray.distributed.run_config import RunConfig
from ser_ray.search.config import CrossvalConfig
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from tests.conftest import cut_into_windows, make_memory_shards
from tests.shard_files import write_shard_files


def test_a_command_gives_its_verb_the_same_settings_again():
    recipe = TrainConfig(
        feature="mfcc", lr_min=1.3e-5, lr_max=0.00123456789, balanced=True,
        weights="my weights.pth", augment=AugmentConfig(random_crop=False, mixup=0.0),
    )  # fmt: skip
    run_config = RunConfig(workers="1..4", device="cpu", audio=False)
    command = next_command(
        "train", shards=("a b", "c"), like="", recipe=recipe, run_config=run_config
    )
    assert parse_verb(VERBS, shlex.split(command)[1:]) == Train(
        shards=("a b", "c"), recipe=recipe, run_config=run_config
    )
    assert "--like" not in command
    config = CrossvalConfig(folds=(0, 3), part="validation")
    command = next_command("crossval", crossval=config)
    assert parse_verb(VERBS, shlex.split(command)[1:]) == Crossval(crossval=config)
    assert flags_of(recipe, without=("feature", "weights")) == [
        "--lr-min", "1.3e-05", "--lr-max", "0.00123456789", "--balanced",
        "--no-random-crop", "--mixup", "0",
    ]  # fmt: skip


def test_the_command_that_trains_the_recipe_of_a_run_has_all_settings_of_this_run_but_its_name():
    run = RunConfig(
        tracking_uri="http://host:5000", experiment="my own", storage="s3://b/runs?region=x&y=z",
        device="gpu", max_failures=0, audio=False,
    )  # fmt: skip
    assert command_like("abc", ["s3://b/shards"], replace(run, name="mine")) == (
        "ser-ray train --like abc --shards s3://b/shards --device gpu "
        "--storage 's3://b/runs?region=x&y=z' --experiment 'my own' "
        "--tracking-uri http://host:5000 --no-audio --max-failures 0"
    )
    assert command_like("abc", ("a", "b"), RunConfig()) == "ser-ray train --like abc --shards a b"
    assert command_like("abc", "a", RunConfig(), "h:6379") == (
        "ser-ray train --like abc --shards a --address h:6379"
    )


def test_the_first_lines_count_the_clips_and_speakers_of_every_part(tmp_path, capsys):
    shards = write_shard_files(tmp_path / "shards")  # 6 speakers with 8 clips of 4 emotions
    recipe = TrainConfig(protocol="speaker-3", weights="none", epochs=3, batch_size=4)
    say_training([shards], recipe, [1])
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith("shards: 48 clips, 6 speakers, 4 labels")
    assert lines[1] == "protocol     speaker-3 fold 1 (speaker-independent)"
    counts = {line.split()[0]: line.split()[1:] for line in lines[2:5]}
    assert {name: int(words[0]) for name, words in counts.items()} == {
        name: 8 * int(words[2]) for name, words in counts.items()
    }
    assert sum(int(words[0]) for words in counts.values()) == 48
    steps = int(counts["train"][0]) // 4
    assert f"mel, 3 epochs, {steps} steps of 4 clips each" in lines[5]
    say_training([shards], recipe, [0, 1, 2])
    assert "speaker-3, every fold has" in capsys.readouterr().err


def test_the_first_lines_count_a_clip_that_is_cut_into_windows_once(tmp_path, capsys):
    whole = make_memory_shards()
    cut = cut_into_windows(whole, np.full(len(whole.table), 2))
    recipe = TrainConfig(protocol="speaker-3", weights="none", epochs=3, batch_size=4)
    lines = []
    for name, memory in (("cut", cut), ("whole", whole)):
        say_training([write_shard_files(tmp_path / name, memory)], recipe, [1])
        lines.append(capsys.readouterr().err.replace(name, "").splitlines())
    assert lines[0][:5] == lines[1][:5]
    assert lines[0][5] != lines[1][5], "a training has more steps"


def test_the_pipeline_marks_correct_predictions():
    predictions: list[dict[str, Any]] = [
        {"path": "/a/1.wav", "emotion": "sad", "probabilities": {"sad": 0.75}, "status": "ok"},
        {"path": "/a/2.wav", "emotion": "sad", "probabilities": {"sad": 0.5}, "status": "ok"},
        {"path": "/a/3.wav", "emotion": None, "probabilities": None, "status": "unreachable"},
    ]
    truth = {"/a/1.wav": "sad", "/a/2.wav": "happy", "/a/3.wav": "calm"}
    lines = prediction_lines(truth, predictions)
    assert lines[1].split() == ["right", "sad", "sad", "75%", "1.wav"]
    assert lines[2].split() == ["WRONG", "happy", "sad", "50%", "2.wav"]
    assert lines[3].split() == ["WRONG", "calm", "unreachable", "3.wav"]
