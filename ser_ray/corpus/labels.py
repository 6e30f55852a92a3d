"""Maps the labels of each corpus to one label set, so that several corpora can be used together.

`--label-map` chooses the map. `usual` replaces the usual names of an emotion by RAVDESS's name, and
does not change other labels. `common` does the same, and only uses labels that all corpora have.
Any other value is a CSV file that lists every label to use. A row without a corpus applies to all
corpora that have no row of their own for the label:

    corpus,label,as
    iemocap,exc,happy
    ,ang,angry
    ,anger,angry
"""

import csv
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from ser_ray.corpus.ravdess.names import EMOTIONS
from ser_ray.corpus.words import shorten
from ser_ray.errors import ConfigError
from ser_ray.storage.paths import read_file

USUAL_NAMES = {
    "neutral": ("neu", "neutrality"),
    "calm": ("calmness",),
    "happy": ("happiness", "hap", "joy", "joyful"),
    "sad": ("sadness",),
    "angry": ("anger", "ang"),
    "fearful": ("fear", "fea", "afraid"),
    "disgust": ("disgusted", "dis"),
    "surprised": ("surprise", "sur"),
}
"""{label: names that `usual` replaces by this label, in upper or lower case}."""
COMMON = "common"
LabelMaps = dict[str, dict[str, str]]
"""{corpus: {label in the corpus: new label}}. Clips with other labels are left out."""

_LABEL_OF = {name: label for label, names in USUAL_NAMES.items() for name in (label, *names)}


def usual_label(name: str) -> str:
    """Return RAVDESS's label for the name of an emotion, or the name itself if there is none."""
    return _LABEL_OF.get(name.strip().lower(), name)


def map_labels(
    labels: Mapping[str, Sequence[str]], choice: str, known: Sequence[str] = ()
) -> LabelMaps:
    """Map the labels of each corpus to one label set.

    With an empty choice, labels do not change if all corpora have the same labels, and the model,
    if there is one, has them too. Otherwise the map is `usual`, because two spellings of one
    emotion must not become two classes.

    Args:
        labels: {corpus: its labels}.
        choice: `usual`, `common`, the location of a file, or empty.
        known: the labels of the model, if a model is evaluated. `usual` then spells a label as the
            model does, and `common` only keeps labels of the model. With `common`, the caller must
            also remove the labels that some corpus lacks.

    Raises:
        ConfigError: the file cannot be read, or names an unknown corpus or label.
    """
    if choice not in ("", "usual", COMMON):
        return _read_map(choice, labels)
    label_sets = [set(names) for names in labels.values()]
    is_same = all(names == label_sets[0] for names in label_sets)
    if not choice and is_same and (not known or label_sets[0] <= set(known)):
        return {corpus: {name: name for name in names} for corpus, names in labels.items()}
    spelling = {usual_label(name): name for name in known}
    maps = {
        corpus: {name: spelling.get(usual := usual_label(name), usual) for name in names}
        for corpus, names in labels.items()
    }
    return only_among(maps, known) if choice == COMMON and known else maps


def only_among(maps: LabelMaps, kept: Iterable[str]) -> LabelMaps:
    """Keep only the labels that are mapped to one of the labels `kept`."""
    wanted = set(kept)
    return {
        corpus: {name: label for name, label in names.items() if label in wanted}
        for corpus, names in maps.items()
    }


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Sort labels: the labels of RAVDESS first, in its order, then the others by name."""
    names = set(labels)
    return *(label for label in EMOTIONS if label in names), *sorted(names.difference(EMOTIONS))


def _read_map(location: str, labels: Mapping[str, Sequence[str]]) -> LabelMaps:
    """Read a label map from a CSV file, and check its names."""
    try:
        reader = csv.DictReader(io.StringIO(read_file(location).decode("utf-8-sig")))
        rows = {f"{location}, line {reader.line_num}": row for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"{location}: this label map cannot be read ({error}); --label-map accepts usual, "
            "common or a CSV file with the columns corpus,label,as"
        ) from error
    if not {"label", "as"} <= set(reader.fieldnames or ()):
        raise ConfigError(f"{location}: a label map needs the columns corpus,label,as")
    entries = []
    for where, row in rows.items():
        if None in row:
            raise ConfigError(f"{where}: has more values than the first line")
        texts = ((row.get(name) or "").strip() for name in ("corpus", "label", "as"))
        composed = (unicodedata.normalize("NFC", text) for text in texts)  # as in tables of clips
        entries.append((where, *composed))
    maps: LabelMaps = {corpus: {} for corpus in labels}
    stated: dict[tuple[str, str], str] = {}
    for where, corpus, label, new in sorted(entries, key=lambda entry: entry[1] != ""):
        if corpus and corpus not in labels:
            raise ConfigError(
                f"{where}: there is no corpus {corpus!r}; the corpora are {', '.join(labels)}"
            )
        named = [corpus] if corpus else list(labels)
        with_label = [name for name in named if label in labels[name]]
        if not with_label:
            known = in_order(label for name in named for label in labels[name])
            raise ConfigError(
                f"{where}: there is no label {label!r} in {' and '.join(named)}; the known labels "
                f"are {shorten(known)}"
            )
        if stated.setdefault((corpus, label), new) != new:
            raise ConfigError(
                f"{where}: {label!r} becomes {new!r} here, and {stated[corpus, label]!r} in "
                "another line"
            )
        for name in with_label:
            maps[name][label] = new
    return {
        corpus: {label: new for label, new in names.items() if new}
        for corpus, names in maps.items()
    }
