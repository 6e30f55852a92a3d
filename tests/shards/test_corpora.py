"""Several shard sets read as one, compared with the single sets."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from ser_ray.corpus.manifest import replace_column
from ser_ray.errors import ConfigError, ShardsError
from ser_ray.shards.card import ShardCard
from ser_ray.shards.corpora import Corpora, corpus_name, open_corpora
from ser_ray.shards.layout import CARD_NAME, clips_name, read_table, write_table
from ser_ray.shards.read import open_shards
from tests.conftest import make_memory_shards
from tests.shard_files import write_shard_files, write_spelled

SPELLED = {"neutral": "neu", "calm": "calm", "happy": "joy", "sad": "boredom"}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """The sets `a` and `bb`; the second spells three of the four labels differently."""
    return write_spelled(tmp_path / "a"), write_spelled(tmp_path / "bb", SPELLED)


def test_the_clips_and_features_are_those_of_the_sets_one_after_the_other(pair):
    shards = open_corpora(pair[::-1])  # sorted by name
    one, two = (open_shards(location) for location in pair)
    assert shards.locations == pair
    assert shards.card.labels == ("neutral", "calm", "happy", "sad", "boredom")
    clips = shards.clips().to_pylist()
    for row, own in zip(clips[48:], two.clips().to_pylist(), strict=True):
        emotion = {"neu": "neutral", "joy": "happy"}.get(own["emotion"], own["emotion"])
        changed = {"speaker": f"bb:{own['speaker']}", "take": f"bb:{own['take']}"}
        assert row == own | changed | {"corpus": "bb", "emotion": emotion}
    assert clips[0]["speaker"] == "a:01"
    assert clips[0]["corpus"] == "a"
    expected = np.concatenate([one.features("mel"), two.features("mel")])
    np.testing.assert_array_equal(shards.features("mel"), expected)
    rows = np.array([95, 0, 48, 47, 48])
    np.testing.assert_array_equal(shards.features("mel", rows), expected[rows])
    assert shards.card.shard_sizes == (48, 48)
    assert shards.features("mel", np.array([], int)).shape == (0, *expected.shape[1:])
    with pytest.raises(IndexError, match="rows 0 to 96 of 96"):
        shards.features("mel", np.array([0, 96]))


def test_the_features_of_several_sets_are_kept_once(tmp_path):
    """Besides the array itself, memory is needed for parts of sets, here one of four sets."""
    memory = make_memory_shards(per_emotion=60)
    sets = [write_shard_files(tmp_path / name, memory) for name in "abcd"]
    shards = open_corpora(sets)
    tracemalloc.start()
    features = shards.features("mel")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert features.nbytes > 4_000_000
    assert peak < 1.4 * features.nbytes


def test_clips_of_unmapped_labels_are_left_out_and_counted(pair, tmp_path):
    shards = open_corpora(pair, "common")
    assert shards.card.labels == ("neutral", "calm", "happy")
    assert shards.card.shard_sizes == (36, 36)
    assert [corpus.left_out for corpus in shards.corpora] == [{"sad": 12}, {"boredom": 12}]
    assert [str(corpus) for corpus in shards.corpora] == [
        "a: 36 clips, 6 speakers; left out: 12 sad",
        "bb: 36 clips, 6 speakers; joy as happy, neu as neutral; left out: 12 boredom",
    ]
    two = open_shards(pair[1])
    kept = [row for row, name in enumerate(two.clips()["emotion"].to_pylist()) if name != "boredom"]
    np.testing.assert_array_equal(shards.features("mel")[36:], two.features("mel", np.array(kept)))
    path = tmp_path / "map.csv"
    path.write_text("label,as\nneu,low\njoy,high\n")
    mapped = open_corpora(pair[1], str(path))
    assert set(mapped.clips()["emotion"].to_pylist()) == {"low", "high"}
    assert mapped.clips()["speaker"].to_pylist()[0] == "01", "a single set keeps its speakers"
    path.write_text("label,as\nneu,\n")
    with pytest.raises(
        ConfigError, match=r"map.csv leaves no clip of bb, whose labels are boredom, calm"
    ):
        open_corpora(pair[1], str(path))


def test_one_set_is_itself_and_the_fingerprint_follows_from_sets_and_labels(pair):
    assert not isinstance(open_corpora(pair[0]), Corpora)
    assert not isinstance(open_corpora([pair[0]], "common"), Corpora)
    fingerprints = [
        open_corpora(sets, choice).card.fingerprint
        for sets, choice in ((pair, ""), (pair, "common"), (pair[1], "usual"), (pair[::-1], ""))
    ]
    assert len(set(fingerprints)) == 3
    assert fingerprints[0] == fingerprints[3]


def test_a_set_that_a_model_knows_keeps_its_name_and_labels_wherever_it_is(pair, tmp_path):
    trained = open_corpora(pair, "common")
    clips = trained.clips()
    (tmp_path / "bb").rename(tmp_path / "moved")
    again = open_corpora([pair[0], str(tmp_path / "moved")], known=trained.corpora)
    assert again.card == trained.card
    assert again.clips().equals(clips)
    write_spelled(tmp_path / "bb", SPELLED, fingerprint="again")
    other = open_corpora(str(tmp_path / "bb"), known=trained.corpora, labels=trained.card.labels)
    assert other.corpora[0].labels["boredom"] == "boredom", "its labels are not known"
    alone = open_corpora(str(tmp_path / "moved"), known=trained.corpora)
    assert alone.corpora == trained.corpora[1:]


def test_sets_of_ravdess_share_actors_and_other_sets_do_not(tmp_path):
    speech = write_spelled(tmp_path / "speech", corpus="ravdess")
    song = write_spelled(tmp_path / "song", corpus="ravdess")
    own = write_spelled(tmp_path / "own")
    both = open_corpora([speech, song])
    assert set(both.clips()["speaker"].to_pylist()) == {f"{n:02d}" for n in range(1, 7)}
    assert both.card.corpus == "ravdess"
    three = open_corpora([speech, song, own])
    assert {name.partition(":")[0] for name in three.clips()["speaker"].to_pylist()} == {
        "ravdess", "own",
    }  # fmt: skip
    assert three.card.corpus == "several"
    table = write_spelled(tmp_path / "tables" / "ravdess")
    for sets in ([table, speech], [speech, table]):
        with pytest.raises(ConfigError, match="another corpus is called 'ravdess' too"):
            open_corpora(sets)


@pytest.mark.parametrize("location", ["sets/emodb", "sets/emodb/", "s3://b/emodb?region=eu/x"])
def test_a_corpus_is_named_after_the_folder_of_its_shards(location):
    assert corpus_name(location) == "emodb"


def test_a_set_and_its_copy_are_refused(pair, tmp_path, monkeypatch):
    """A copy would have other speakers' names, so a clip could be for training and for the test."""
    known = open_corpora(pair, "common").corpora
    copy = write_spelled(tmp_path / "copy", SPELLED, fingerprint=known[1].fingerprint)
    for corpora in ((), known):
        with pytest.raises(ConfigError, match=r"copy is a copy of .*bb, with the same clips; give"):
            open_corpora([*pair, copy], known=corpora)
    monkeypatch.chdir(tmp_path)
    for again in (pair[0], "a", "a/"):
        with pytest.raises(ConfigError, match=r"/a is given twice; give only one"):
            open_corpora([*pair, again])
    with pytest.raises(ConfigError, match=r"is a copy of .*a, with the same clips"):
        open_corpora([pair[0], str(tmp_path / "bb" / ".." / "a")])


def test_the_folder_to_rename_is_that_of_the_set_that_the_model_does_not_know(pair, tmp_path):
    known = open_corpora(pair).corpora
    (tmp_path / "a").rename(tmp_path / "moved")
    new = write_spelled(tmp_path / "a", fingerprint="2" * 16)
    for sets in ([new, str(tmp_path / "moved")], [str(tmp_path / "moved"), new]):
        with pytest.raises(ConfigError, match=f"{new}: another corpus is called 'a' too"):
            open_corpora(sets, known=known)


def test_sets_that_do_not_go_together_are_refused(pair, tmp_path):
    with pytest.raises(ConfigError, match=r"another corpus is called 'a' too.*rename this"):
        open_corpora([pair[0], write_spelled(tmp_path / "other" / "a", fingerprint="2" * 16)])
    features = json.loads((Path(pair[0]) / CARD_NAME).read_text())["features"]
    other = write_spelled(tmp_path / "c", features=features | {"num_mfcc": 9})
    with pytest.raises(ConfigError, match=r"a and c were .* \(num_mfcc is 8 and 9\): prepare one"):
        open_corpora([pair[0], other])
    with pytest.raises(ShardsError, match="there are no shards"):
        open_corpora([pair[0], str(tmp_path / "none")])


def test_the_shards_of_a_set_count_the_clips_that_are_kept(pair):
    """As streaming needs it: the shards of all sets, one after the other."""
    shards = open_corpora(pair, "common")
    assert isinstance(shards, Corpora)
    member = shards.members[0]
    card: ShardCard = replace(member.shards.card, shard_numbers=(0, 1, 2), shard_sizes=(5, 0, 43))
    cut = replace(member, shards=replace(member.shards, card=card))
    inside = (member.rows < 5).sum()
    assert cut.shard_sizes == (inside, 0, 36 - inside)


def test_recordings_in_two_sets_are_refused(tmp_path):
    sets = [write_shard_files(tmp_path / name) for name in "ab"]
    one, two = (read_table(location, clips_name(0)) for location in sets)
    content = [*one["content"].to_pylist()[:3], *two["content"].to_pylist()[3:]]
    write_table(sets[1], clips_name(0), replace_column(two, "content", pa.array(content)))
    with pytest.raises(ConfigError, match="a and b have 3 recordings in common, such as /"):
        open_corpora(sets)
