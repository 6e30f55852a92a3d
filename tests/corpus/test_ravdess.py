"""RAVDESS names, against the corpus's own description written out again here."""

import itertools

import pytest

from ser_ray.corpus.ravdess.names import ClipName, NameProblem, format_name, parse_name

ALL_CODES = [
    tuple(f"{code:02d}" for code in codes)
    for codes in itertools.product(
        range(1, 4), range(1, 3), range(1, 9), range(1, 3), range(1, 3), range(1, 3), range(1, 25)
    )
]


def exists(codes):
    """The corpus description's two rules about fields that do not go together."""
    _, channel, emotion, intensity, *_ = codes
    return (emotion, intensity) != ("01", "02") and (channel, emotion) not in [
        ("02", "07"),
        ("02", "08"),
    ]


def test_a_name_is_read_as_the_corpus_description_defines_it():
    # The example of the corpus's own page: "Video-only, speech, fearful, normal intensity,
    # statement 'dogs', 1st repetition, 12th actor, female".
    clip = parse_name("02-01-06-01-02-01-12.mp4")
    assert clip == ClipName("video", "speech", "fearful", "normal", 2, 1, "12")
    assert (clip.sex, clip.take) == ("female", "01-06-01-02-01-12")
    assert parse_name("03-02-04-02-01-02-07.wav") == ClipName(
        "audio", "song", "sad", "strong", 1, 2, "07"
    )


def test_every_valid_name_is_accepted_and_no_other():
    understood = 0
    for codes in ALL_CODES:
        name = "-".join(codes) + (".wav" if codes[0] == "03" else ".mp4")
        if exists(codes):
            assert format_name(parse_name(name)) == name
            understood += 1
        else:
            with pytest.raises(NameProblem):
                parse_name(name)
    assert understood == 3 * 24 * (60 + 44)


def test_a_take_is_shared_by_the_three_files_of_a_performance_and_by_no_others():
    by_take: dict[str, list] = {}
    for codes in filter(exists, ALL_CODES):
        by_take.setdefault(parse_name("-".join(codes)).take, []).append(codes)
    assert len(by_take) == 24 * (60 + 44)
    for files in by_take.values():
        assert [codes[0] for codes in files] == ["01", "02", "03"]
        assert len({codes[1:] for codes in files}) == 1


@pytest.mark.parametrize("suffix", [".wav", ".WAV", ".mp4", ".Mp4", ""])
def test_the_suffix_and_its_case_do_not_matter(suffix):
    assert parse_name("03-01-01-01-01-01-01" + suffix) == parse_name("03-01-01-01-01-01-01.wav")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("angry.wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01.wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01-01-01.wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01-01 (1).wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01-01.wav.wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01-٠١.wav", "not seven two-digit numbers"),
        ("03-01-01-01-01-01-01\n.wav", "not seven two-digit numbers"),
        ("04-01-01-01-01-01-01.wav", "modality is 04: RAVDESS has 01 to 03"),
        ("03-00-01-01-01-01-01.wav", "channel is 00: RAVDESS has 01 to 02"),
        ("03-01-09-01-01-01-01.wav", "emotion is 09: RAVDESS has 01 to 08"),
        ("03-01-02-03-01-01-01.wav", "intensity is 03"),
        ("03-01-02-01-03-01-01.wav", "statement is 03"),
        ("03-01-02-01-01-00-01.wav", "repetition is 00"),
        ("03-01-02-01-01-01-25.wav", "actor is 25: RAVDESS has 01 to 24"),
        ("03-01-01-02-01-01-01.wav", "neutral has no strong intensity"),
        ("03-02-07-01-01-01-01.wav", "disgust was not sung"),
        ("03-02-08-01-01-01-01.wav", "surprised was not sung"),
    ],
)
def test_an_invalid_name_is_refused_with_the_reason(name, reason):
    with pytest.raises(NameProblem, match=reason):
        parse_name(name)
