"""Labels of several corpora as one set."""

import pytest

from ser_ray.corpus.labels import USUAL_NAMES, in_order, map_labels, usual_label
from ser_ray.corpus.ravdess.names import EMOTIONS
from ser_ray.errors import ConfigError

EMODB = ("anger", "boredom", "happiness")
IEMOCAP = ("ang", "exc", "hap")


def test_every_usual_name_becomes_one_label_of_ravdess():
    assert tuple(USUAL_NAMES) == EMOTIONS
    names = [name for names in USUAL_NAMES.values() for name in names]
    assert len(names) == len({*names, *EMOTIONS}) - len(EMOTIONS), "no name is of two labels"
    assert [usual_label(name) for name in ("ANG", " Joy", "fear", "Sadness", "bored")] == [
        "angry", "happy", "fearful", "sad", "bored",
    ]  # fmt: skip


def test_equal_label_sets_stay_as_they_are_and_others_get_the_usual_names():
    same = {"a": EMODB, "b": EMODB[::-1]}
    assert map_labels(same, "") == {c: {x: x for x in EMODB} for c in same}
    usual = {
        "a": {"anger": "angry", "boredom": "boredom", "happiness": "happy"},
        "b": {"ang": "angry", "exc": "exc", "hap": "happy"},
    }
    assert map_labels({"a": EMODB, "b": IEMOCAP}, "") == usual
    assert map_labels({"a": EMODB}, "usual") == {"a": usual["a"]}


def test_the_models_spelling_wins_and_common_leaves_out_labels_it_lacks():
    known = ("anger", "happiness")
    assert map_labels({"b": IEMOCAP}, "", known)["b"] == {
        "ang": "anger", "exc": "exc", "hap": "happiness",
    }  # fmt: skip
    assert map_labels({"b": IEMOCAP}, "common", known)["b"] == {
        "ang": "anger", "hap": "happiness",
    }  # fmt: skip
    assert map_labels({"b": known}, "", (*known, "calm"))["b"] == {x: x for x in known}


def test_a_map_file_maps_its_labels_and_rows_of_a_corpus_win(tmp_path):
    path = tmp_path / "labels.csv"
    rows = ("b,exc,happy", "b,ang,furious", ",ang,angry", ", anger ,angry", "a,boredom,")
    path.write_text("\n".join(("corpus,label,as", *rows)))
    assert map_labels({"a": EMODB, "b": IEMOCAP}, str(path)) == {
        "a": {"anger": "angry"},
        "b": {"exc": "happy", "ang": "furious"},
    }
    path.write_text("corpus,label,as\n,ang,angry\n,exc,happy\nb,ang,\n")
    assert map_labels({"b": IEMOCAP}, str(path)) == {"b": {"exc": "happy"}}
    path.write_text("label,as\nhap,happy\n")
    assert map_labels({"b": IEMOCAP}, str(path)) == {"b": {"hap": "happy"}}


def test_a_map_file_may_state_a_label_twice_and_in_another_normal_form(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("label,as\nfro\u0308hlich,gl\u00fccklich\nfr\u00f6hlich,glu\u0308cklich\n")
    maps = map_labels({"a": ("fr\u00f6hlich",)}, str(path))
    assert maps == {"a": {"fr\u00f6hlich": "gl\u00fccklich"}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("label,as\nang,angry\nhap,happy\nang,sad\n",
         "line 4: 'ang' becomes 'sad' here, and 'angry' in another line"),
        ("corpus,label,as\nb,ang,angry\n,ang,angry\nb,ang,\n",
         "line 4: 'ang' becomes '' here, and 'angry' in another line"),
        ("corpus,label,as\nc,ang,angry\n", "line 2: there is no corpus 'c'; the corpora are a, b"),
        ("corpus,label,as\n,ang,angry\na,ang,angry\n",
         "line 3: there is no label 'ang' in a; the known labels are anger, boredom, happiness"),
        ("label,as\nangst,angry\n",
         "line 2: there is no label 'angst' in a and b; the known labels are ang, anger"),
        ("corpus,label,as\n\nb,hap,happy,glad\n", "line 3: has more values than the first line"),
        ("corpus;label;as\n", "needs the columns corpus,label,as"),
        ('label,as\n"' + "x" * 200_000, "cannot be read .field larger than field limit"),
        (None, "cannot be read .*--label-map accepts usual, common or a CSV file"),
    ],
)  # fmt: skip
def test_a_map_that_does_not_fit_is_refused(tmp_path, text, problem):
    path = tmp_path / "labels.csv"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        map_labels({"a": EMODB, "b": IEMOCAP}, str(path))


def test_labels_of_ravdess_come_first():
    assert in_order({"bored", "sad", "angry", "calm", "amused"}) == (
        "calm", "sad", "angry", "amused", "bored",
    )  # fmt: skip
