"""Columns of encoders: beside the clips, row by row, and only what is missing."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from ser_ray.corpus.manifest import list_corpus
from ser_ray.errors import ConfigError, EncoderError, ShardsError
from ser_ray.features.config import FeatureConfig
from ser_ray.features.decode import decode
from ser_ray.features.encoder import EncoderWeights
from ser_ray.features.samples import Sound
from ser_ray.features.transforms import FeatureExtractor
from ser_ray.shards.card import write_card
from ser_ray.shards.config import PrepareConfig
from ser_ray.shards.encode import load_encoders, missing_shards
from ser_ray.shards.encode_shard import encode_shard
from ser_ray.shards.layout import CLIPS, ENCODERS, feature_name, weights_name
from ser_ray.shards.prepare import prepare
from ser_ray.shards.read import ShardSet, open_shards
from tests.clips import small_corpus, voice, write_wav
from tests.encoders import tiny_card, tiny_weights, write_tiny
from tests.shards.test_shards import files_of, write_shards

FEATURES = FeatureConfig(max_seconds=2.0)


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    """Shards of four files; a long clip has three windows."""
    root = small_corpus(tmp_path / "corpus", num_wavs=10)
    write_wav(root / "03-02-01-01-01-01-05.wav", voice(5.0, seed=9))
    return write_shards(list_corpus(str(root)), tmp_path / "set")


def encode(shards: ShardSet, numbers: list[int], seed: int = 0) -> ShardSet:
    """Encode some shards as the job does, in this process, and list the encoder in the card."""
    weights = tiny_weights(seed=seed)
    (Path(shards.uri) / ENCODERS / "tiny").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        encode_shard(shards.uri, number, FeatureExtractor(FEATURES), weights.build(), threads=2)
    card = dataclasses.replace(shards.card, encoders=(weights.card,))
    write_card(shards.uri, card)
    return open_shards(shards.uri)


def test_each_row_has_the_layers_of_its_clip(shards: ShardSet) -> None:
    shards = encode(shards, list(shards.card.shard_numbers))
    clips, values = shards.clips().to_pylist(), shards.features("tiny")
    assert values.shape == (len(clips), 2, 16)
    assert max(clip["window"] for clip in clips) == 2
    encoder, extract = tiny_weights().build(), FeatureExtractor(FEATURES)
    for clip, value in zip(clips, values, strict=True):
        sound = decode(clip["path"])
        wave = extract.windows(sound.samples, sound.sample_rate)[clip["window"]]
        np.testing.assert_allclose(value, encoder.encode([wave])[0], atol=2e-3)
    sounds = {(clip["content"], clip["window"]) for clip in clips}
    assert len(np.unique(values.reshape(len(clips), -1), axis=0)) == len(sounds) > 10
    rows = np.array([5, 0, len(clips) - 1])
    np.testing.assert_array_equal(shards.features("tiny", rows), values[rows])


def test_the_outcomes_name_the_encoder_and_the_hash_of_its_weights(shards: ShardSet) -> None:
    assert all(row["encoders"] == [] for row in shards.outcomes().to_pylist())
    rows = encode(shards, list(shards.card.shard_numbers)).outcomes().to_pylist()
    named = {row["path"] for row in rows if row["encoders"]}
    assert named == set(shards.clips()["path"].to_pylist())
    assert len(named) < len(rows)
    found = {name for row in rows for name in row["encoders"]}
    assert found == {f"tiny:{tiny_weights().card.weights}"}


def test_a_file_is_decoded_once_for_all_its_segments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = voice(6.0, 16_000)
    write_wav(tmp_path / "long.wav", sound, 16_000)
    rows = [f"long.wav,{start},{start + 1},x,1" for start in (3, 0, 4)]
    (tmp_path / "t.csv").write_text("\n".join(["path,start,end,label,speaker", *rows]))
    shards = write_shards(list_corpus(str(tmp_path / "t.csv")), tmp_path / "set", 16)
    decoded: list[str] = []

    def count(path: str, **limits: float) -> Sound:
        decoded.append(Path(path).name)
        return decode(path, **limits)

    monkeypatch.setattr("ser_ray.shards.encode_shard.decode", count)
    values = encode(shards, [0]).features("tiny")
    assert decoded == ["long.wav"]
    encoder, extract = tiny_weights().build(), FeatureExtractor(FEATURES)
    for clip, value in zip(shards.clips().to_pylist(), values, strict=True):
        segment = decode(clip["path"]).samples[int(clip["start"] * 16_000) :][:16_000]
        np.testing.assert_allclose(
            value, encoder.encode(extract.windows(segment, 16_000))[0], atol=2e-3
        )


def test_the_clips_and_the_fingerprints_of_other_kinds_stay_as_they_are(shards: ShardSet) -> None:
    before = {name: text for name, text in files_of(Path(shards.uri)).items() if CLIPS in name}
    with_encoder = encode(shards, list(shards.card.shard_numbers))
    after = files_of(Path(shards.uri))
    assert {name: text for name, text in after.items() if CLIPS in name} == before
    assert with_encoder.card.fingerprint == shards.card.fingerprint
    for kind in ("spectrogram", "mel", "mfcc"):
        assert with_encoder.card.fingerprint_of(kind) == shards.card.fingerprint
    own = with_encoder.card.fingerprint_of("tiny")
    assert own != shards.card.fingerprint
    other = encode(shards, list(shards.card.shard_numbers), seed=1)
    assert other.card.fingerprint_of("tiny") not in (own, shards.card.fingerprint)


def test_reading_an_encoder_reads_no_clips_and_an_unknown_kind_lists_the_known(
    shards: ShardSet,
) -> None:
    shards = encode(shards, list(shards.card.shard_numbers))
    schema = pq.read_schema(f"{shards.uri}/{feature_name('tiny', 0)}")
    assert schema.names == ["tiny"]
    with pytest.raises(ConfigError, match=r"have spectrogram, mel, mfcc, tiny; .*--encoder wavlm"):
        shards.features("wavlm")


def test_an_interrupted_job_goes_on_with_the_missing_shards(shards: ShardSet) -> None:
    numbers = list(shards.card.shard_numbers)
    card = tiny_weights().card
    assert missing_shards(shards.uri, shards.card, card) == numbers
    encode(shards, [1])
    assert missing_shards(shards.uri, shards.card, card) == [0, *numbers[2:]]
    assert missing_shards(shards.uri, shards.card, tiny_weights(seed=1).card) == numbers
    whole = encode(shards, numbers)
    assert missing_shards(shards.uri, shards.card, card) == []
    (Path(shards.uri) / feature_name("tiny", 99)).write_text("of a shard that is no more")
    (Path(shards.uri) / feature_name("tiny", 2)).write_text("damaged")
    assert missing_shards(shards.uri, whole.card, card) == [2]
    assert not (Path(shards.uri) / feature_name("tiny", 99)).exists()
    # A shard of other clips needs another column.
    files = sorted((Path(shards.uri) / CLIPS).iterdir())
    files[0].write_bytes(files[5].read_bytes())
    assert missing_shards(shards.uri, whole.card, card) == [0, 2]


def test_a_recording_that_changed_since_is_named(shards: ShardSet) -> None:
    path = Path(shards.clips()["path"][0].as_py())
    write_wav(path, voice(0.8, seed=99))
    with pytest.raises(OSError, match=rf"{path}: the file has changed since"):
        encode(shards, [0])
    path.unlink()
    with pytest.raises(OSError, match=rf"{path}: the file does not exist"):
        encode(shards, [0])


def test_what_cannot_be_encoded_is_said_before_the_pass(tmp_path: Path) -> None:
    file = tmp_path / "tiny.safetensors"
    write_tiny(file)
    source = f"tiny={file}"
    with pytest.raises(ConfigError, match="sample_rate is 8000: encoders need 16000 Hz"):
        load_encoders(str(tmp_path), [source], FeatureConfig(sample_rate=8_000))
    with pytest.raises(ConfigError, match="a name must occur only once"):
        PrepareConfig(corpus="x", encoder=(source, "tiny"))
    [weights] = load_encoders(str(tmp_path), [source], FEATURES)
    stored = tmp_path / "set" / weights_name("tiny")
    stored.parent.mkdir(parents=True)
    weights.write(stored)
    file.unlink()
    [again] = load_encoders(str(tmp_path / "set"), ["tiny"], FEATURES)  # needs no network
    assert again.card == weights.card
    write_tiny(file, tiny_card(), seed=1)
    with pytest.raises(EncoderError, match=rf"hash {weights.card.weights[:16]}; choose another"):
        load_encoders(str(tmp_path / "set"), [source], FEATURES)


@pytest.mark.ray
@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_a_shard_set_gets_the_column_of_an_encoder(tmp_path: Path) -> None:
    """A job that a file ends goes on where it was, and makes no feature again."""
    import ray

    corpus = small_corpus(tmp_path / "corpus", num_wavs=12)
    write_tiny(tmp_path / "tiny.safetensors")
    config = PrepareConfig(
        corpus=str(corpus), shards=str(tmp_path / "set"), rows_per_shard=3, features=FEATURES
    )
    ray.init(num_cpus=2, include_dashboard=False, address="local", log_to_driver=False)
    try:
        prepare(config, progress=lambda *_: None)
        shards = open_shards(config.shards)
        before = files_of(tmp_path / "set" / CLIPS)
        last = Path(shards.clips()["path"][-1].as_py())
        content, times = last.read_bytes(), last.stat()
        both = dataclasses.replace(config, encoder=(f"tiny={tmp_path}/tiny.safetensors",))
        last.write_bytes(bytes(len(content)))
        os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(ShardsError, match=r"encoders/tiny/shard-\d+.parquet: .*damaged"):
            prepare(both, progress=lambda *_: None)
        assert open_shards(config.shards).card.encoders == ()
        written = {p: p.stat().st_mtime_ns for p in (tmp_path / "set").rglob("encoders/tiny/*")}
        last.write_bytes(content)
        os.utime(last, ns=(times.st_atime_ns, times.st_mtime_ns))
        seen: list[tuple[str, float, float]] = []
        summary = prepare(both, progress=lambda *now: seen.append(now))
    finally:
        ray.shutdown()
    assert files_of(tmp_path / "set" / CLIPS) == before
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert seen[-1][1:] == (14, 14)
    assert "encoder tiny: 2 layers of 16 values a clip, MIT License" in str(summary)
    after = open_shards(config.shards)
    assert after.card.fingerprint == shards.card.fingerprint
    assert [item.name for item in after.card.encoders] == ["tiny"]
    values = after.features("tiny")
    assert np.isfinite(values).all()
    assert values.shape == (14, 2, 16)
    prepare(config, progress=lambda *_: pytest.fail("a shard was missing"))
    assert open_shards(config.shards).card == after.card
    (tmp_path / "set" / weights_name("tiny")).unlink()
    prepare(both, progress=lambda *_: pytest.fail("a shard was missing"))
    assert EncoderWeights.read(str(tmp_path / "set" / weights_name("tiny"))).card.name == "tiny"
    (tmp_path / "set" / feature_name("tiny", 0)).unlink()
    summary = prepare(config, progress=lambda *_: pytest.fail("a shard was missing"))
    assert "the column tiny lacks clips, so it cannot be trained on" in str(summary)
    assert open_shards(config.shards).card.encoders == ()
