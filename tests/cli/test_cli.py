import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from ser_ray import api
from ser_ray.cli import verb
from ser_ray.cli.main import VERBS, main
from ser_ray.cli.model import Evaluate, problem_of
from ser_ray.cli.parsing import parse_verb
from ser_ray.cli.pipeline import SYNTHETIC_RECIPE
from ser_ray.cli.train import Train
from ser_ray.cli.verb import VerbResult, say
from ser_ray.shards.corpora import corpus_name
from ser_ray.tracking import registry
from ser_ray.training.recipe import AugmentConfig, TrainConfig
from ser_ray.version import __version__
from tests.shard_files import write_shard_files

# What people type and scripts depend on; a change here is a change of the interface.
FLAGS = {
    "pipeline": "--corpus --shards --feature --protocol --fold --epochs --batch-size --lr-min "
    "--lr-max --workers --seed --weights --experiment --tracking-uri --json --dry-run --storage",
    "download": "--target --parts --actors --keep-archives --json --dry-run",
    "prepare": "--corpus --shards --include --rows-per-shard --num-mels --json --dry-run",
    "train": "--shards --feature --protocol --fold --epochs --batch-size --lr-min --lr-max "
    "--validation-speakers --workers --device --ingest --seed --weights --name --experiment "
    "--tracking-uri --json --dry-run",
    "lr-range": "--shards --lowest --highest --steps --feature --fold --batch-size --weights "
    "--name --experiment --tracking-uri --json --dry-run",
    "tune": "--shards --trials --searcher --scheduler --space --refit --grace-epochs --reduction "
    "--cpus-per-worker --gpus-per-worker --feature --fold --epochs --workers --name --dry-run",
    "crossval": "--shards --seeds --folds --part --protocol --epochs --cpus-per-worker "
    "--gpus-per-worker --name --workers --json --dry-run",
    "evaluate": "--shards --corpus --protocol --fold --under --against --allow-seen-speakers "
    "--no-audio --tracking-uri --json --dry-run",
    "predict": "--model --output --min-confidence --tracking-uri --json --dry-run",
    "demo-ui": "--host --port --tracking-uri --json --dry-run",
    "export": "--format --output --tracking-uri --json --dry-run",
    "register": "--name --alias --tracking-uri --json --dry-run",
}


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_breaks_a_printed_line_between_words(is_terminal, monkeypatch):
    written = io.StringIO()
    shown = Console(
        file=written, force_terminal=is_terminal, width=40, soft_wrap=True, highlight=False
    )
    monkeypatch.setattr(verb, "stderr_console", lambda: shown)
    path = "/shards/of/a/corpus/in-a-folder-with-a-long-name"
    say("recipe", f"mel, learning rate 0.0001 to 0.002 {path}")
    broken = f"recipe       mel, learning rate 0.0001\n{' ' * 13}to 0.002\n{' ' * 13}{path}\n"
    whole = f"recipe       mel, learning rate 0.0001 to 0.002 {path}\n"
    assert written.getvalue() == (broken if is_terminal else whole)


def test_standard_output_has_the_result_and_nothing_that_a_library_prints(capsys, monkeypatch):
    def register(*_: object, **__: object) -> tuple[str, str]:
        print("View run at http://server")
        return "1", "card"

    monkeypatch.setattr(api, "register", register)
    assert main(["register", "0" * 32, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == {"name": "ser-ray", "version": "1", "alias": "champion"}
    start = f"model        registering the model of run {'0' * 32} as ser-ray\n"
    assert printed.err == f"{start}View run at http://server\n"


@pytest.mark.parametrize("verb", FLAGS)
def test_help_names_the_flags_and_fits_the_terminal(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert [flag for flag in FLAGS[verb].split() if flag not in text] == []
    assert max(map(len, text.splitlines())) <= 70


def test_no_verb_prints_help_and_version_the_version(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert [verb for verb in VERBS if verb not in text] == []
    assert "--tyro-write-completion" in text
    assert max(map(len, text.splitlines()[1:])) <= 80  # argparse does not break its usage line
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"ser-ray {__version__}\n"


def test_a_mistyped_verb_or_flag_names_the_nearest_one(capsys):
    assert main(["trian", "--epochs", "3"]) == 2
    assert capsys.readouterr().err == (
        "error: there is no verb 'trian': ser-ray train is the most similar verb\n"
    )
    assert main(["fly"]) == 2
    assert "ser-ray --help lists the verbs" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", "--lr-mim", "1"])
    told = capsys.readouterr().err
    assert "--lr-min FLOAT" in told
    assert "crossval" not in told


def test_help_is_wrapped_once_and_lists_a_verbs_own_flags_first(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    flags = [line.split()[0] for line in lines if line.startswith("--")]
    order = ["--shards", "--trials", "--cpus-per-worker", "--feature", "--workers", "--address"]
    assert [flag for flag in flags if flag in order] == order
    assert flags[-2:] == ["--json", "--dry-run"]
    start = next(i for i, line in enumerate(lines) if line.startswith("--no-random-crop"))
    text = " ".join(lines[start : start + 2])
    own = "Centres the crop in longer clips, and shorter clips in the crop."
    assert text.split(maxsplit=1)[1] == own, "a switch that is on says what turning it off does"
    start = next(i for i, line in enumerate(lines) if line.startswith("--validation-speakers"))
    text = " ".join(lines[start + 1 : start + 5])
    assert text.startswith(
        "Number of speakers held out for validation, in every protocol but random"
    )
    assert min(map(len, lines[start + 1 : start + 4])) > 48, "no line is broken twice"


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom ser_ray.cli.main import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'mlflow', 'av', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_what_would_run(capsys):
    assert main(["train", "--dry-run", "--lr-max", "0.01", "--mixup", "0.3"]) == 0
    recipe = json.loads(capsys.readouterr().out)["train"]["recipe"]
    assert recipe["lr_max"] == 0.01
    assert TrainConfig.from_dict(recipe).augment.mixup == 0.3


@pytest.mark.parametrize(
    ("command", "place"),
    [
        ("train", "in this process, without Ray"),
        ("train --workers 1..2", "on Ray, started on this machine"),
        ("train --address local", "on Ray, started on this machine"),
        ("train --address head:6379", "on the Ray cluster at head:6379"),
        ("lr-range --workers 2", "in this process, without Ray"),
        ("pipeline", "in this process, without Ray"),
        ("pipeline --workers 2", "on Ray, started on this machine"),
        ("tune", "on Ray, started on this machine"),
        ("predict a.wav --model ./m", None),
    ],
)
def test_dry_run_says_where_a_training_runs(command, place, capsys, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert main([*command.split(), "--dry-run"]) == 0
    assert json.loads(capsys.readouterr().out).get("trains") == place


@pytest.mark.parametrize(
    "command",
    [
        "predict a.wav --model models:/ser-ray@champion",
        "evaluate runs:/0f/model",
        "evaluate ./m --against 0f",
        "export mel-fold0",
        "register 0f",
    ],
)
def test_dry_run_says_that_the_store_of_a_model_is_missing(command, capsys, in_tmp):
    assert main([*command.split(), "--dry-run"]) == 2
    output, error = capsys.readouterr()
    assert f"{in_tmp}/ser-ray-out/mlflow.db: there is no such MLflow store" in error
    assert not output
    assert not list(in_tmp.iterdir())


@pytest.mark.parametrize("verb", ["train", "lr-range", "tune", "crossval"])
def test_dry_run_says_that_there_are_no_shards(verb, capsys, in_tmp):
    assert main([verb, "--dry-run", "--shards", "away"]) == 0
    output, error = capsys.readouterr()
    assert json.loads(output)
    assert error == (
        f"warning: {in_tmp}/away: there are no shards; make them with `ser-ray prepare`\n"
    )
    write_shard_files(in_tmp / "away")
    assert main([verb, "--dry-run", "--shards", "away"]) == 0
    assert not capsys.readouterr().err


def test_dry_run_on_the_synthetic_corpus_shows_its_recipe_and_keeps_the_flags_given(capsys):
    flags = ["--epochs", str(TrainConfig().epochs), "--time-masks", "1"]  # as good as any other
    assert main(["pipeline", "--dry-run", *flags]) == 0
    resolved = json.loads(capsys.readouterr().out)["pipeline"]
    assert resolved["corpus"] == "ser-ray-out/synthetic"
    assert resolved["recipe"]["weights"] == "none"
    assert resolved["recipe"]["epochs"] == TrainConfig().epochs
    assert resolved["recipe"]["augment"]["time_masks"] == 1
    assert resolved["recipe"]["batch_size"] == SYNTHETIC_RECIPE.batch_size
    assert resolved["recipe"]["augment"]["mixup"] == SYNTHETIC_RECIPE.augment.mixup > 0


def test_flags_beside_like_replace_single_settings_of_that_recipe(capsys, monkeypatch):
    theirs = TrainConfig(
        lr_max=5e-3, weight_decay=0.1, balanced=True, augment=AugmentConfig(mixup=0.4, gain_db=3)
    )
    monkeypatch.setattr(registry, "recipe_of_run", lambda run_id, uri: theirs.to_dict())
    flags = "--lr-max 2e-3 --weight-decay 0 --mixup 0 --time-masks 1 --balanced --dry-run"
    assert main(["train", "--like", "f00d", *flags.split()]) == 0
    recipe = TrainConfig.from_dict(json.loads(capsys.readouterr().out)["train"]["recipe"])
    augment = replace(theirs.augment, mixup=0.0, time_masks=1)
    assert recipe == replace(theirs, lr_max=2e-3, weight_decay=0.0, augment=augment)


def test_flags_beside_like_undo_the_switches_of_that_recipe(capsys, monkeypatch):
    theirs = TrainConfig(balanced=True, augment=AugmentConfig(random_crop=False))
    monkeypatch.setattr(registry, "recipe_of_run", lambda run_id, uri: theirs.to_dict())
    flags = "--no-balanced --random-crop --dry-run"
    assert main(["train", "--like", "f00d", *flags.split()]) == 0
    recipe = TrainConfig.from_dict(json.loads(capsys.readouterr().out)["train"]["recipe"])
    assert recipe == TrainConfig()


def test_a_run_is_named_after_its_origin_alone_only_if_the_recipe_is_equal(capsys, monkeypatch):
    theirs = TrainConfig(feature="mel")
    monkeypatch.setattr(registry, "recipe_of_run", lambda run_id, uri: theirs.to_dict())

    def name_of(*flags: str) -> str:
        assert main(["train", "--like", "f00d", "--dry-run", *flags]) == 0
        return json.loads(capsys.readouterr().out)["train"]["run_config"]["name"]

    assert name_of() == name_of("--feature", "mel") == "like-f00d"
    names = {name_of(), name_of("--feature", "mfcc"), name_of("--lr-max", "0.5")}
    assert len(names) == 3
    assert name_of("--feature", "mfcc") in names
    assert name_of("--feature", "mfcc", "--name", "mine") == "mine"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --lr-min 0.1 --lr-max 0.01", "lr_min must be the smaller one (are they swapped?)"),
        ("train --workers 0", "workers is 0: it must be at least 1"),
        ("train --batch-size 0", "batch_size is 0: it must be above 0"),
        ("tune --space lr=choice(1)", "no field lr; known are balanced, "),
        ("tune --space lr_min=choice(1)", "lr_min cannot be searched: draw lr_ratio"),
        ("tune --trials 0", "trials is 0: it must be at least 1"),
        ("tune --shards nowhere", "nowhere"),
        ("crossval --seeds 0", "seeds is 0: it must be at least 1"),
        ("train --lr-max nan", "lr_max is nan: it must be a finite number"),
        ("train --gain-db inf", "gain_db is inf: it must be a finite number"),
        ("train --mixup -1", "mixup is -1.0: it must be at least 0"),
        ("train --label-smoothing 1", "label_smoothing is 1.0: it must be below 1"),
        ("train --shards nowhere", "nowhere"),
        ("evaluate nowhere", "nowhere: no checkpoint here"),
        ("predict --model nowhere", "no files given: give files, folders or patterns"),
        ("predict nowhere.wav --model nowhere", "nowhere.wav: no such file or folder"),
        ("prepare --corpus nowhere --shards out", "nowhere"),
        ("prepare --corpus= --shards out", "corpus is empty: it must be a folder or URI"),
        ("prepare --corpus a --shards b --include wav", "include is wav: it must be one or more"),
        ("prepare --corpus a --shards b --max-seconds inf", "max_seconds is inf: it must be a fin"),
        ("prepare --corpus a --shards b --trim-margin -1", "trim_margin is -1.0"),
        ("pipeline --weights nowhere.pth", "nowhere.pth: no such file"),
        ("pipeline --feature melody", "melody: pipeline prepares spectrogram, mel, mfcc; for an"),
        (
            "register 00000000000000000000000000000000 --name a --tracking-uri foo://bar",
            "foo://bar: no MLflow database can be opened",
        ),
        (
            "train --like 00000000000000000000000000000000 --tracking-uri foo://bar",
            "foo://bar: no MLflow database can be opened",
        ),
    ],
)
def test_a_users_error_prints_one_line_and_exits_with_2(arguments, message, capsys, in_tmp):
    assert main(arguments.split()) == 2
    told = capsys.readouterr().err.splitlines()
    assert [line for line in told if line.startswith("error: ")] == told[-1:]
    assert message in told[-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --workers 7 --batch-size 6", "batch_size is 6, but there are 7 workers"),
        ("train --workers 1..64 --batch-size 100", "24 training clips are too few for 64 workers"),
        ("train --feature melody", "feature is melody: the shards of "),
        ("tune --workers 40", "every trial of tune and crossval has one worker"),
        ("crossval --workers 2", "every trial of tune and crossval has one worker"),
    ],
)
def test_a_recipe_that_its_workers_cannot_train_is_refused_before_ray_starts(
    arguments, message, capsys, in_tmp, monkeypatch
):
    from ser_ray.distributed import train
    from ser_ray.search import open_study

    for module in (train, open_study):
        monkeypatch.setattr(module, "cluster", lambda address, **_: pytest.fail("Ray was asked"))
    shards = write_shard_files(in_tmp / "shards")
    given = ["--shards", shards, "--protocol", "speaker-3", "--weights", "none"]
    assert main([*arguments.split(), *given]) == 2
    assert message in capsys.readouterr().err


def test_a_full_temporary_folder_is_named_before_a_training(capsys, in_tmp, monkeypatch):
    """The trained model is copied there before MLflow stores it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000))
    shards = write_shard_files(in_tmp / "shards")
    given = ["--shards", shards, "--protocol", "speaker-3", "--weights", "none"]
    assert main(["train", *given]) == 2
    message = capsys.readouterr().err
    assert f"{tempfile.gettempdir()}, has 20 MB of free space" in message
    assert "epoch " not in message


@pytest.mark.parametrize("arguments", ["train --channel melody", "train --lr-mim 1"])
def test_flags_that_cannot_be_parsed_exit_with_2(arguments):
    with pytest.raises(SystemExit) as exit_:
        main(arguments.split())
    assert exit_.value.code == 2


def test_a_mistyped_corpus_is_reported_before_weights_are_read(capsys, in_tmp, monkeypatch):
    from ser_ray.tracking import registry

    monkeypatch.setattr(registry, "read_weights", lambda *_: pytest.fail("weights were read"))
    assert main(["pipeline", "--corpus", "RAVDES"]) == 2
    assert "RAVDES" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--protocol table", "the column split has the speaker s0 in train and in test, so"),
        ("--protocol emobox-6", "emobox-6 is defined for RAVDESS's actors 01 to 24"),
        ("--protocol loso --label-map map.csv", "line 2: there is no label 'anger' in out"),
        (
            "--protocol all",
            "protocol is all, which has no test part to score: run `ser-ray",
        ),
    ],
)
def test_what_a_table_cannot_do_is_said_before_it_is_prepared(
    flags, message, capsys, in_tmp, monkeypatch
):
    from ser_ray.cli.data import Prepare

    monkeypatch.setattr(Prepare, "run", lambda _: pytest.fail("it was prepared"))
    sides = ("train", "train", "test", "test")
    rows = [f"{n}.wav,{'joy' if n else 'sad'},s{n % 3},{side}" for n, side in enumerate(sides)]
    Path("t.csv").write_text("\n".join(["path,label,speaker,split", *rows]))
    for n in range(4):
        Path(f"{n}.wav").touch()
    Path("map.csv").write_text("label,as\nanger,angry\n")
    command = f"pipeline --corpus t.csv --shards out --weights none {flags}"
    assert main(command.split()) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_labels_that_a_model_does_not_know_are_named_before_a_corpus_is_prepared(
    capsys, in_tmp, monkeypatch, checkpoint
):
    prepare = "ser_ray.shards.prepare.prepare"
    monkeypatch.setattr(prepare, lambda *_, **__: pytest.fail("it was prepared"))
    Path("a.wav").touch()
    Path("t.csv").write_text("path,label,speaker\na.wav,bored,anna\n")
    assert main(["evaluate", str(checkpoint), "--corpus", "t.csv"]) == 2
    message = "t.csv: the model does not know the labels bored; it knows "
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("corpus", "name"),
    [
        ("people/mine.csv", "mine.csv"),
        ("s3://b/mine/", "mine"),
        ("s3://b/mine?region=eu", "mine"),
        ("~/a", "a"),
        ("sub/..", "here"),
    ],
)
def test_a_corpus_that_a_model_scores_keeps_its_name(tmp_path, monkeypatch, corpus, name):
    """Not the name of the folder of its shards, which is the same for every corpus."""
    (tmp_path / "here" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    verb = parse_verb(VERBS, ["evaluate", "model", "--corpus", corpus])
    assert isinstance(verb, Evaluate)
    assert corpus_name(verb.shards[0]) == name
    assert verb.shards[0].startswith("ser-ray-out/scored-")


def test_a_corpus_is_listed_once_for_a_model_that_scores_it(in_tmp, monkeypatch, checkpoint):
    from ser_ray.corpus import manifest

    listed: list[manifest.Corpus] = []
    list_corpus = manifest.list_corpus

    def count(corpus: str, *settings: Any) -> manifest.Corpus:
        listed.append(list_corpus(corpus, *settings))
        return listed[-1]

    def stop(rows: object, include: str) -> None:
        assert rows is listed[0].manifest
        raise KeyboardInterrupt

    for place in ("ser_ray.corpus.manifest.list_corpus", "ser_ray.shards.prepare.list_corpus"):
        monkeypatch.setattr(place, count)
    monkeypatch.setattr("ser_ray.shards.prepare.exclude", stop)
    Path("a.wav").touch()
    Path("t.csv").write_text("path,label,speaker\na.wav,happy,anna\n")
    with pytest.raises(KeyboardInterrupt):
        api.prepare_for(checkpoint, "t.csv", "shards")
    assert len(listed) == 1


def test_what_the_package_logs_is_printed_while_a_verb_runs(capsys, monkeypatch):
    def run(verb: object) -> VerbResult:
        logging.getLogger("ser_ray.anything").info("starting [bold]Ray[/bold]")
        logging.getLogger("ser_ray.anything").warning("no room")
        return VerbResult({"done": True}, "done")

    monkeypatch.setattr(Train, "run", run)
    assert main(["train", "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == "starting [bold]Ray[/bold]\nwarning: no room\n"
    assert json.loads(captured.out) == {"done": True}


@pytest.mark.parametrize(
    ("counts", "problem"),
    [
        ({"ok": 1, "silent": 2}, ""),
        ({"unsure": 1}, ""),
        ({"silent": 1, "unreadable": 1}, "none of these files could be scored"),
        ({"ok": 5, "unreachable": 2}, "unreachable files: 2; the same command"),
    ],
)
def test_predict_fails_if_no_file_is_scored_or_one_is_unreachable(counts, problem):
    assert problem_of(counts).startswith(problem)
    assert bool(problem_of(counts)) == bool(problem)


def test_every_verb_has_a_job():
    from pathlib import Path

    jobs = {path.stem for path in (Path(__file__).parents[2] / "jobs").glob("*.py")}
    verbs = set(VERBS) - {"demo-ui"}  # a page for the person at this machine
    assert {verb.replace("-", "_") for verb in verbs} <= jobs


def test_importing_the_package_loads_nothing_and_offers_the_api():
    program = (
        "import sys\nimport ser_ray\n"
        "own = sorted(name for name in sys.modules if name.startswith('ser_ray.'))\n"
        "assert own == ['ser_ray.version'], own\n"
        "missing = [name for name in ser_ray.__all__ if getattr(ser_ray, name, None) is None]\n"
        "assert missing == [], missing\n"
        "heavy = {'torch', 'ray', 'mlflow', 'av', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", [["--version"], ["download", "--dry-run"], ["train", "--help"]])
@pytest.mark.parametrize("target", ["closed pipe", "/dev/full"])
def test_output_that_cannot_be_written_has_a_status_and_no_warning_of_python(words, target):
    """Python buffers the output if it is no terminal, and writes it after `main` has returned."""
    if target == "/dev/full":
        output, status, message = os.open(target, os.O_WRONLY), 2, "No space left on device"
    else:
        reader, output = os.pipe()
        os.close(reader)
        status, message = 1, ""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, "-m", "ser_ray", *words]
    done = subprocess.run(
        command, env=environment, stdout=output, stderr=subprocess.PIPE, text=True
    )
    os.close(output)
    assert done.returncode == status
    assert done.stderr == (f"error: {message}\n" if message else "")
