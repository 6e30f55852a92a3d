"""Reads several shard sets as one: the clips of all corpora, with one label set.

    shards = open_corpora(["ser-ray-out/emodb", "ser-ray-out/iemocap"], "common")

The result has the interface of a `ShardSet`, so training and evaluation need not know whether they
read one shard set or several. The column `corpus` has the name of each clip's corpus, which is
usually the folder of its shard set. The names of speakers and takes get the name of their corpus as
a prefix, so that equal names in two corpora do not become one speaker or take. All shard sets of
RAVDESS, such as its speech and its song, have the prefix `ravdess`, because they have the same
actors. All shard sets of the synthetic corpus have the prefix `synthetic`. If all sets have the
same prefix, the names do not change.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations, product

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ser_ray.corpus.labels import COMMON, in_order, map_labels, only_among
from ser_ray.corpus.manifest import replace_column
from ser_ray.errors import ConfigError
from ser_ray.shards.card import ShardCard, UsedCorpus, have_prefixes
from ser_ray.shards.config import ShardLocations
from ser_ray.shards.read import ShardSet, open_shards
from ser_ray.storage.paths import absolute


@dataclass(frozen=True)
class Member:
    """One shard set, and which of its clips are used."""

    shards: ShardSet
    corpus: UsedCorpus
    rows: np.ndarray
    """Rows of the used clips, ascending [num_rows]."""

    @property
    def shard_sizes(self) -> tuple[int, ...]:
        """Number of used rows in each shard of the shard set."""
        sizes = self.shards.card.shard_sizes
        owners = np.searchsorted(np.cumsum(sizes), self.rows, side="right")
        return tuple(np.bincount(owners, minlength=len(sizes)).tolist())


@dataclass(frozen=True, repr=False)
class Corpora(ShardSet):
    """Several shard sets as one, or one shard set with mapped labels.

    The rows are those of the members, one member after the other.
    """

    members: tuple[Member, ...]

    @property
    def locations(self) -> tuple[str, ...]:
        """Folder or URI of each shard set."""
        return tuple(member.shards.uri for member in self.members)

    @property
    def corpora(self) -> tuple[UsedCorpus, ...]:
        """Which clips of each shard set are used."""
        return tuple(member.corpus for member in self.members)

    def clips(self) -> pa.Table:
        """Return every column except the features, with mapped labels."""
        tables = []
        has_prefixes = have_prefixes(self.corpora)
        for member in self.members:
            table = member.shards.clips().take(member.rows)
            old, new = map(pa.array, zip(*member.corpus.labels.items(), strict=True))
            index = pc.index_in(table["emotion"].combine_chunks(), value_set=old)
            table = replace_column(table, "emotion", new.take(index))
            for name in ("speaker", "take") if has_prefixes else ():
                named = pc.binary_join_element_wise(member.corpus.prefix, table[name], ":")
                table = replace_column(table, name, named)
            if len(self.members) > 1:
                corpus = pa.array([member.corpus.name] * len(table))
                table = table.append_column("corpus", corpus)
            tables.append(table)
        return pa.concat_tables(tables)

    def outcomes(self) -> pa.Table:
        """Return the outcomes of all sets."""
        return pa.concat_tables(member.shards.outcomes() for member in self.members)

    def read_into(
        self, features: np.ndarray, places: np.ndarray, kind: str, rows: np.ndarray
    ) -> None:
        """Read features of rows of `clips()` into an array, like `ShardSet.read_into`."""
        starts = np.cumsum([0, *(len(member.rows) for member in self.members)])
        owners = np.searchsorted(starts, rows, side="right") - 1
        for index, member in enumerate(self.members):
            wanted = np.flatnonzero(owners == index)
            member_rows = member.rows[rows[wanted] - starts[index]]
            member.shards.read_into(features, places[wanted], kind, member_rows)


def open_corpora(
    locations: ShardLocations,
    label_map: str = "",
    *,
    known: Sequence[UsedCorpus] = (),
    labels: Sequence[str] = (),
) -> ShardSet:
    """Open one shard set, or several as one.

    Args:
        locations: folder or URI of each set.
        label_map: how labels are mapped (`ser_ray.corpus.labels`).
        known: the corpora in the card of the model to evaluate. A set with the fingerprint of a
            known corpus gets its name and, if `label_map` is empty, its mapping of labels.
        labels: the labels of the model to evaluate, if there is one.

    Raises:
        ShardsError: a location has no committed shard set, or a set cannot be read.
        ResourcesError: as for `open_shards`.
        ConfigError: no location is given, or no filesystem can open one. Two sets have the same
            name, different features, or clips with the same sound. The label map cannot be read,
            names unknown corpora or labels, or leaves no clip of a set.
    """
    given = [locations] if isinstance(locations, str | os.PathLike) else locations
    if not given:
        raise ConfigError("no shard set is given; give one or several, as in --shards a b")
    sets = _by_name([open_shards(absolute(os.fspath(location))) for location in given], known)
    _require_same_features(sets)
    set_labels = {name: shards.card.labels for name, shards in sets.items()}
    maps = map_labels(set_labels, label_map, labels)
    if not label_map:
        known_maps = {corpus.fingerprint: corpus.labels for corpus in known}
        for name, shards in sets.items():
            maps[name] = known_maps.get(shards.card.fingerprint, maps[name])
    if len(sets) == 1:  # one set without changed labels needs no `Corpora`
        [(name, shards)] = sets.items()
        if maps[name] == {label: label for label in set_labels[name]}:
            return shards
    tables = {name: shards.clips() for name, shards in sets.items()}
    _require_no_shared_clips(tables)
    found = {name: set(table["emotion"].unique().to_pylist()) for name, table in tables.items()}
    if label_map == COMMON:
        occurring = ({maps[name].get(label, "") for label in found[name]} for name in sets)
        maps = only_among(maps, set.intersection(*occurring))
    for name in sets:
        if not found[name] & maps[name].keys():
            raise ConfigError(
                f"{label_map or 'the label map'} leaves no clip of {name}, whose labels are "
                f"{', '.join(set_labels[name])}; leave out this corpus, or map its labels"
            )
    members = [_member(name, sets[name], tables[name], maps[name]) for name in sets]
    kept = [maps[name][label] for name in sets for label in found[name] & maps[name].keys()]
    return Corpora(", ".join(map(str, given)), _card(members, in_order(kept)), tuple(members))


def corpus_name(location: str) -> str:
    """Return the name of the corpus in a shard set, which is the last folder of its location."""
    return location.partition("?")[0].rstrip("/").rpartition("/")[2]


def _by_name(sets: Sequence[ShardSet], known: Sequence[UsedCorpus]) -> dict[str, ShardSet]:
    """Return {name: shard set}, sorted by name.

    The name is that of the known corpus with the same fingerprint, or else that of the folder.

    Raises:
        ConfigError: two sets have the same clips or the same name.
    """
    uris: dict[str, str] = {}
    for shards in sets:
        if (other := uris.get(shards.card.fingerprint)) is not None:
            what = (
                "given twice" if other == shards.uri else f"a copy of {other}, with the same clips"
            )
            raise ConfigError(
                f"{shards.uri} is {what}; give only one, so that no clip counts twice"
            )
        uris[shards.card.fingerprint] = shards.uri
    names = {corpus.fingerprint: corpus.name for corpus in known}
    kinds = {shards.card.corpus for shards in sets} - {"table"}
    named: dict[str, ShardSet] = {}
    # The error asks to rename the folder of the later corpus. Known corpora come first, because
    # renaming their folders would not change their names.
    for shards in sorted(sets, key=lambda shards: shards.card.fingerprint not in names):
        name = names.get(shards.card.fingerprint, corpus_name(shards.uri))
        if name in named or (shards.card.corpus == "table" and name in kinds):
            raise ConfigError(
                f"{shards.uri}: another corpus is called {name!r} too. A corpus is named after the "
                "folder of its shard set, so rename this folder"
            )
        named[name] = shards
    return dict(sorted(named.items()))


def _require_no_shared_clips(tables: Mapping[str, pa.Table]) -> None:
    """Refuse sets that have clips with the same sound, because these would count twice."""
    for (first, clips), (second, others) in combinations(tables.items(), 2):
        is_shared = pc.is_in(others["content"], value_set=clips["content"].combine_chunks())
        shared = others.filter(is_shared)["path"].unique().to_pylist()
        if shared:
            raise ConfigError(
                f"{first} and {second} have {len(shared)} recordings in common, such as "
                f"{shared[0]}, which would count twice: give only one of the sets, or prepare one "
                "of them without these recordings"
            )


def _require_same_features(sets: Mapping[str, ShardSet]) -> None:
    (first, shards), *others = sets.items()
    for (name, other), (setting, value) in product(others, asdict(shards.card.features).items()):
        if (theirs := getattr(other.card.features, setting)) != value:
            raise ConfigError(
                f"{first} and {name} were prepared with different features ({setting} is {value} "
                f"and {theirs}): prepare one corpus again, with the settings of the other"
            )


def _member(name: str, shards: ShardSet, clips: pa.Table, labels: Mapping[str, str]) -> Member:
    is_kept = pc.is_in(clips["emotion"], value_set=pa.array(list(labels), pa.string())).to_numpy()
    lost = clips.filter(~is_kept & (clips["window"].to_numpy() == 0))["emotion"]
    kept = clips.filter(is_kept)
    corpus = UsedCorpus(
        name=name,
        kind=shards.card.corpus,
        fingerprint=shards.card.fingerprint,
        labels=dict(labels),
        clips=int((kept["window"].to_numpy() == 0).sum()),
        speakers=len(kept["speaker"].unique()),
        left_out=dict(sorted(Counter(lost.to_pylist()).items())),
    )
    return Member(shards, corpus, np.flatnonzero(is_kept))


def _card(members: Sequence[Member], labels: tuple[str, ...]) -> ShardCard:
    """Return a card that describes all sets together."""
    cards = [member.shards.card for member in members]
    kinds = {card.corpus for card in cards}
    kind = cards[0].corpus if len(kinds) == 1 else "several"
    counts = sum((Counter(card.counts) for card in cards), Counter())
    sizes = [size for member in members for size in member.shard_sizes]
    identity = [(m.corpus.name, m.corpus.fingerprint, m.corpus.labels) for m in members]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    shared = [item for item in cards[0].encoders if all(item in card.encoders for card in cards)]
    return ShardCard(
        corpus="synthetic" if "synthetic" in kinds else kind,  # captions must say so
        source=", ".join(member.corpus.name for member in members),
        labels=labels,
        features=cards[0].features,
        counts=dict(counts),
        shard_numbers=tuple(range(len(sizes))),
        shard_sizes=tuple(sizes),
        encoders=tuple(shared),
        fingerprint=digest.hexdigest()[:16],
    )
