"""Every supported format is decoded to its samples; any other file is refused with a reason."""

import io
import os
import struct
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from moto.moto_server.werkzeug_app import MotoRequestHandler
from pyarrow import fs

from ser_ray.features.decode import decode
from ser_ray.features.errors import ClipError
from ser_ray.storage.paths import filesystem_of
from tests.clips import audio_frame, voice, write_sound, write_video, write_wav
from tests.s3_server import s3_bucket


@pytest.fixture
def samples() -> np.ndarray:
    """One second at 48 kHz, as 16-bit numbers."""
    return np.round(voice() * 20_000).astype(np.int16)


def failure(path: Path, max_seconds: float = 600.0) -> ClipError:
    with pytest.raises(ClipError) as caught:
        decode(str(path), max_seconds=max_seconds)
    return caught.value


def failure_of_stream(path: Path) -> ClipError:
    with path.open("rb") as file, pytest.raises(ClipError) as caught:
        decode(file)
    return caught.value


def test_16_bit_samples_are_returned_as_stored(tmp_path: Path, samples: np.ndarray) -> None:
    path = write_wav(tmp_path / "A.WAV", samples, 44_100)
    decoded, sample_rate, _ = decode(str(path))
    assert decoded.dtype == np.int16
    assert sample_rate == 44_100
    np.testing.assert_array_equal(decoded, samples)


def test_channels_are_averaged(tmp_path: Path, samples: np.ndarray) -> None:
    both = np.stack([samples, samples[::-1]], axis=1)
    path = write_wav(tmp_path / "a.wav", both)
    decoded, *_ = decode(str(path))
    assert decoded.dtype == np.float32
    np.testing.assert_allclose(decoded, both.astype(np.float64).mean(axis=1) / 32768, atol=1e-6)


@pytest.mark.parametrize(
    ("subtype", "step"),
    [("PCM_U8", 2**-7), ("PCM_24", 2**-23), ("PCM_32", 2**-30), ("FLOAT", 0), ("DOUBLE", 2**-24)],
)
@pytest.mark.parametrize("sample_rate", [8_000, 96_000])
def test_a_wav_may_have_any_bit_depth_and_sample_rate(
    tmp_path: Path, subtype: str, step: float, sample_rate: int
) -> None:
    sound = voice(0.5, sample_rate)
    path = write_wav(tmp_path / "a.wav", sound, sample_rate, subtype=subtype)
    decoded, rate, _ = decode(str(path))
    assert rate == sample_rate
    np.testing.assert_allclose(decoded, sound, atol=step)


def test_extra_chunks_of_a_wav_are_skipped(tmp_path: Path, samples: np.ndarray) -> None:
    plain = write_wav(tmp_path / "a.wav", samples).read_bytes()
    filler = b"FLLR" + struct.pack("<I", 4004) + bytes(4004)
    trailer = b"_PMX" + struct.pack("<I", 10) + b"<xmp/>    "
    whole = plain[12:36] + filler + plain[36:] + trailer
    path = tmp_path / "b.wav"
    path.write_bytes(b"RIFF" + struct.pack("<I", len(whole) + 4) + b"WAVE" + whole)
    np.testing.assert_array_equal(decode(str(path))[0], samples)


def test_a_stream_is_decoded_like_its_path(tmp_path: Path, samples: np.ndarray) -> None:
    paths = [
        write_wav(tmp_path / "a.wav", samples),
        write_video(tmp_path / "a.mp4", voice()),
    ]
    for path in paths:
        with fs.LocalFileSystem().open_input_file(str(path)) as stream:
            from_stream = decode(stream)[0]
        np.testing.assert_array_equal(from_stream, decode(str(path))[0])


def test_a_uri_is_decoded(samples: np.ndarray) -> None:
    import fsspec

    buffer = io.BytesIO()
    soundfile.write(buffer, samples, 16_000, format="WAV")
    with fsspec.open("memory://clips/a.wav", "wb") as file:
        file.write(buffer.getvalue())
    decoded, sample_rate, _ = decode("memory://clips/a.wav")
    np.testing.assert_array_equal(decoded, samples)
    assert sample_rate == 16_000


@pytest.mark.parametrize(("name", "sample_rate"), [("a.wav", 48_000), ("a.flac", 16_000)])
def test_a_clip_in_a_bucket_takes_two_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, sample_rate: int
) -> None:
    """One request is for its size and one for its bytes. A large file is read in pieces."""
    sound = np.round(voice(3.7, sample_rate) * 20_000).astype(np.int16)
    soundfile.write(tmp_path / name, sound, sample_rate)
    asked: list[str] = []
    monkeypatch.setattr(
        MotoRequestHandler, "log_request", lambda self, *_: asked.append(self.command)
    )
    with s3_bucket("clips") as uri:
        filesystem, path = filesystem_of(uri.format(name))
        fs.copy_files(str(tmp_path / name), path, destination_filesystem=filesystem)
        asked.clear()
        whole, *_ = decode(uri.format(name))
        assert asked == ["HEAD", "GET"]
        monkeypatch.setattr("ser_ray.features.decode.SMALL_FILE", 0)
        in_pieces, *_ = decode(uri.format(name))
        assert len(asked) > 4
    expected, *_ = decode(str(tmp_path / name))
    np.testing.assert_array_equal(whole, expected)
    np.testing.assert_array_equal(in_pieces, expected)


def test_the_sound_of_a_video_is_decoded(tmp_path: Path) -> None:
    sound = voice(2.0)
    path = write_video(tmp_path / "a.mp4", sound, seconds=2.0)
    decoded, sample_rate, _ = decode(str(path))
    assert sample_rate == 48_000
    assert len(sound) <= len(decoded) <= len(sound) + 1024  # the last AAC frame is filled up
    error = decoded[: len(sound)] - sound
    assert np.sum(error**2) < 0.01 * np.sum(sound**2)  # lossy, but in step


def test_no_picture_is_decoded(tmp_path: Path) -> None:
    """The sound is the same when every byte that belongs to a picture is overwritten."""
    whole = write_video(tmp_path / "a.mp4", voice(2.0), seconds=2.0)
    data = bytearray(whole.read_bytes())
    with av.open(str(whole)) as container:
        pictures = [packet for packet in container.demux(video=0) if packet.size]
        assert len(pictures) == 50
        for picture in pictures:
            assert picture.pos is not None
            data[picture.pos : picture.pos + picture.size] = b"\xff" * picture.size
    broken = tmp_path / "b.mp4"
    broken.write_bytes(data)
    np.testing.assert_array_equal(decode(str(broken))[0], decode(str(whole))[0])


class CountingFile(io.BytesIO):
    num_read = 0

    def readinto(self, buffer: Any) -> int:
        num_bytes = super().readinto(buffer)
        self.num_read += num_bytes
        return num_bytes


def test_only_the_header_of_a_video_without_sound_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ser_ray.features.decode.READ_AHEAD", 1 << 15)  # the clip is small too
    path = write_video(tmp_path / "a.mp4", None, seconds=2.0, size=320)
    file = CountingFile(path.read_bytes())
    with pytest.raises(ClipError, match="no audio stream") as caught:
        decode(file)
    assert caught.value.status == "no_audio"
    assert 0 < file.num_read < 0.1 * path.stat().st_size


def test_a_stream_stays_open(tmp_path: Path, samples: np.ndarray) -> None:
    file = io.BytesIO(write_wav(tmp_path / "a.wav", samples).read_bytes())
    decode(file)
    file.seek(0)
    np.testing.assert_array_equal(decode(file)[0], samples)


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp3", "libmp3lame", "mp3"),
        ("really_mp3.wav", "libmp3lame", "mp3"),
        ("a.flac", "flac", "flac"),
        ("a.ogg", "libopus", "ogg"),
        ("a.webm", "libopus", "webm"),
        ("a.m4a", "aac", "mp4"),
        ("adpcm.wav", "adpcm_ms", "wav"),
    ],
)
def test_other_formats_are_recognised_by_their_content(
    tmp_path: Path, name: str, codec: str, container: str
) -> None:
    sound = voice(1.0)
    path = write_sound(tmp_path / name, sound, codec, container)
    decoded, sample_rate, _ = decode(str(path))
    assert sample_rate == 48_000
    assert abs(len(decoded) - len(sound)) <= 2048
    error = decoded[:40_000] - sound[:40_000]
    assert np.sum(error**2) < 0.05 * np.sum(sound[:40_000] ** 2)


@pytest.mark.parametrize("name", ["a.wav", "a.flac"])
def test_a_clip_above_the_longest_length_is_refused(tmp_path: Path, name: str) -> None:
    codec, container = ("pcm_s16le", "wav") if name == "a.wav" else ("flac", "flac")
    path = write_sound(tmp_path / name, voice(3.0), codec, container)
    assert len(decode(str(path), max_seconds=3.0)[0]) == 3 * 48_000
    assert failure(path, max_seconds=2.9).status == "too_long"


def test_a_playlist_opens_no_other_file(tmp_path: Path) -> None:
    """FFmpeg would open any file that these name."""
    secret = write_wav(tmp_path / "secret.wav", np.zeros(100, np.int16))
    for text in (
        f"ffconcat version 1.0\nfile {secret.name}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{secret}\n#EXT-X-ENDLIST\n",
    ):
        path = tmp_path / "a.wav"
        path.write_text(text)
        assert failure(path).status == "unreadable"


def test_the_number_of_channels_may_change_in_the_middle(tmp_path: Path) -> None:
    parts = []
    for channels in (1, 2):
        file = io.BytesIO()
        soundfile.write(file, np.stack([voice()] * channels, axis=1), 48_000, format="MP3")
        parts.append(file.getvalue())
    path = tmp_path / "a.mp3"
    path.write_bytes(b"".join(parts))
    decoded, sample_rate, _ = decode(str(path))
    assert len(decoded) / sample_rate == pytest.approx(2.0, abs=0.2)


def test_a_wav_is_decoded_whatever_its_name(tmp_path: Path, samples: np.ndarray) -> None:
    path = write_wav(tmp_path / "a.wav", samples).rename(tmp_path / "a.raw")
    np.testing.assert_allclose(decode(str(path))[0], samples / 32768, atol=1e-4)


def test_float_samples_in_the_range_of_16_bits_are_scaled_to_1(tmp_path: Path) -> None:
    sound = voice()
    path = write_wav(tmp_path / "a.wav", sound * 32768, subtype="FLOAT")
    np.testing.assert_allclose(decode(str(path))[0], sound, atol=1e-6)
    assert (
        "as large as 1e+06"
        in failure(write_wav(tmp_path / "b.wav", np.full(9, 1e6), subtype="FLOAT")).reason
    )


@pytest.mark.parametrize("scale", [1, 32768])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_damaged_bytes_of_a_float_wav_are_lost_and_the_rest_is_used(
    tmp_path: Path, scale: int, subtype: str
) -> None:
    sound = voice(2.0)
    path = write_wav(tmp_path / "a.wav", sound * scale, subtype=subtype)
    data, rng = bytearray(path.read_bytes()), np.random.default_rng(0)
    size = 4 if subtype == "FLOAT" else 8
    middle = len(data) // 2 // size * size
    num_bytes = 4_800 * size if scale == 1 else size
    data[middle : middle + num_bytes] = rng.bytes(num_bytes) if scale == 1 else b"\x7e" * size
    path.write_bytes(data)
    found = decode(str(path))
    lost = num_bytes / size / 48_000
    assert found.lost_seconds == pytest.approx(lost, rel=0.02)
    first, last = 40_000, 60_000
    np.testing.assert_allclose(found.samples[:first], sound[:first], atol=1e-6)
    np.testing.assert_allclose(found.samples[last:], sound[last:], atol=1e-6)


def test_a_wav_of_random_floats_has_no_sound(tmp_path: Path) -> None:
    bits = np.frombuffer(np.random.default_rng(0).bytes(400_000), np.float32)
    error = failure(write_wav(tmp_path / "a.wav", bits, subtype="FLOAT"))
    assert error.reason.startswith("only 0.00 s of its 2.08 s can be decoded")


def test_a_damaged_frame_with_impossible_samples_is_lost(tmp_path: Path) -> None:
    """Damaged AAC may be decoded to samples that are thousands of times as large as full scale."""
    sound = voice(4.0)
    damaged = sound.copy()
    damaged[96_000:105_600] *= 10_000
    found = decode(str(write_sound(tmp_path / "a.m4a", damaged, "aac", "mp4")))
    assert 0.02 <= found.lost_seconds <= 0.25
    np.testing.assert_allclose(found.samples[:80_000], sound[:80_000], atol=0.15)
    np.testing.assert_allclose(found.samples[120_000:192_000], sound[120_000:], atol=0.15)


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.wav", "pcm_s16le", "wav"),
        ("a.m4a", "aac", "mp4"),
        ("a.wv", "wavpack", "wv"),
        ("a.ac3", "ac3", "ac3"),
        ("a.flac", "flac", "flac"),
    ],
)
def test_a_tag_before_or_after_the_sound_is_skipped(
    tmp_path: Path, name: str, codec: str, container: str
) -> None:
    path = write_sound(tmp_path / name, voice(2.0), codec, container)
    data, plain = path.read_bytes(), decode(str(path))
    tag = b"ID3\x04\0\0\0\0\x0f\x76" + b"TIT2" + bytes((0x0F << 7 | 0x76) - 4)
    path.write_bytes(tag + data)
    found = decode(str(path))
    np.testing.assert_array_equal(found.samples, plain.samples)
    assert found.loss is None
    with path.open("rb") as file:
        np.testing.assert_array_equal(decode(file).samples, plain.samples)
    if name == "a.wav":
        path.write_bytes(data + b"TAG" + b"a" * 125)
        np.testing.assert_array_equal(decode(str(path)).samples, plain.samples)
        path.write_bytes(tag + data[: len(data) * 3 // 4])
        assert decode(str(path)).lost_seconds == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("declared", [0xFFFFFFFF, 0x80000000, 0x7FFFFFFF, 0x7FFFF000])
def test_a_wav_from_a_pipe_is_decoded_to_its_end(
    tmp_path: Path, samples: np.ndarray, declared: int
) -> None:
    data = bytearray(write_wav(tmp_path / "a.wav", samples).read_bytes())
    data[40:44] = struct.pack("<I", declared)
    (tmp_path / "a.wav").write_bytes(data)
    np.testing.assert_array_equal(decode(str(tmp_path / "a.wav"))[0], samples)


@pytest.mark.parametrize("form", ["RIFF", "RIFX"])
@pytest.mark.parametrize("chunk", [0, 7, 4004])
def test_a_wav_that_is_cut_short_is_used_and_the_loss_is_reported(
    tmp_path: Path, samples: np.ndarray, form: str, chunk: int
) -> None:
    """The byte order and a chunk before the samples, even of odd length, make no difference."""
    endian = "BIG" if form == "RIFX" else "LITTLE"
    path = tmp_path / "a.wav"
    soundfile.write(path, samples, 48_000, endian=endian, subtype="PCM_16")
    data = path.read_bytes()
    assert data[:4] == form.encode()
    size = struct.pack(">I" if form == "RIFX" else "<I", chunk)
    data = data[:36] + b"FLLR" + size + bytes(chunk + chunk % 2) + data[36:]
    path.write_bytes(data)
    np.testing.assert_array_equal(decode(str(path))[0], samples)
    path.write_bytes(data[: -2 * 18_000])
    sound = decode(str(path))
    np.testing.assert_array_equal(sound.samples, samples[:30_000])
    assert sound.loss == "at least 0.38 s of the file are lost: it is damaged or incomplete"
    path.write_bytes(data[: -2 * 36_000])
    for found in (failure(path), failure_of_stream(path)):
        assert found.reason.startswith("only 0.25 s of its 1.00 s can be decoded")
    path.write_bytes(data[: -2 * 6_000])
    assert len(decode(str(path))[0]) == 42_000, "an eighth of a second is a sloppy header"
    assert decode(str(path)).loss is None


def test_an_aiff_that_lost_most_of_itself_is_refused(tmp_path: Path) -> None:
    path = write_sound(tmp_path / "a.aiff", voice(2.0), "pcm_s16be", "aiff")
    assert len(decode(str(path))[0]) == 96_000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 4])
    assert failure(path).reason.startswith("only 0.5")


def test_any_error_of_a_library_is_the_outcome_of_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, samples: np.ndarray
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise IndexError("nobody thought of this")

    monkeypatch.setattr(soundfile.SoundFile, "read", fail)
    found = failure(write_wav(tmp_path / "a.wav", samples))
    assert (found.status, found.failed) == ("unreadable", "clip")
    assert found.reason == "its content is damaged in a way that stops the decoder (IndexError)"


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    (tmp_path / "b.wav").mkdir()
    assert failure(tmp_path / "a.wav").reason == "a device or pipe, not a file"
    assert failure(Path("/dev/zero")).reason == "a device or pipe, not a file"
    assert failure(tmp_path / "b.wav").reason == "a folder, not a file"


def test_a_missing_file_is_distinguished_from_missing_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert failure(tmp_path / "a.wav").failed == failure(Path("~/a.wav")).failed == "file"
    assert failure(tmp_path / "unmounted" / "a.wav").failed == "storage"
    with pytest.raises(ClipError, match="no filesystem opens") as caught:
        decode("nowhere://a.wav")
    assert caught.value.failed == "storage"

    def fail(*_: object, **__: object) -> None:
        raise OSError("the network is down")

    import fsspec

    with fsspec.open("memory://clips/b.wav", "wb") as file:
        file.write(b"RIFF" + bytes(99))
    monkeypatch.setattr(fsspec.implementations.memory.MemoryFileSystem, "_open", fail)
    with pytest.raises(ClipError, match="the network is down") as caught:
        decode("memory://clips/b.wav")
    assert caught.value.failed == "storage"


@pytest.mark.parametrize(
    ("name", "codec", "container", "at_least"),
    [
        ("a.mp3", "libmp3lame", "mp3", 0.02),
        ("a.m4a", "aac", "mp4", 0.02),
        ("a.aac", "aac", "adts", 0.02),
        ("a.ogg", "libopus", "ogg", 0.5),
        ("a.webm", "libopus", "webm", 0.02),
        ("a.flac", "flac", "flac", 0.02),
    ],
)
def test_damage_loses_only_the_damaged_sound_and_is_reported(
    tmp_path: Path, name: str, codec: str, container: str, at_least: float
) -> None:
    """All sound after it keeps its place where a format has time stamps."""
    path = write_sound(tmp_path / name, voice(6.0), codec, container)
    whole = decode(str(path))
    assert whole.loss is None
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 1500] = np.random.default_rng(0).bytes(1500)
    path.write_bytes(data)
    found = decode(str(path))
    assert at_least <= found.lost_seconds < 2.5
    assert found.loss is not None
    assert f"{found.lost_seconds:.2f} s" in found.loss
    assert (
        abs(len(found.samples) - len(whole.samples)) <= 0.2 * 48_000
    )  # an mp3 or aac has no time stamps
    first = slice(0, 48_000)
    np.testing.assert_allclose(found.samples[first], whole.samples[first], atol=1e-3)


def test_a_damaged_packet_of_many_frames_keeps_its_length(tmp_path: Path) -> None:
    """A damaged header of AAC may say that its frame is as long as many frames."""
    path = write_sound(tmp_path / "a.aac", voice(6.0), "aac", "adts")
    whole, data = decode(str(path)), bytearray(path.read_bytes())
    with av.open(str(path)) as clip:
        starts = [packet.pos for packet in clip.demux() if packet.size and packet.pos is not None]
    first = starts[len(starts) // 3]
    number = sum(first <= start < first + 8000 for start in starts) - 1
    size = starts[len(starts) // 3 + number] - first
    data[first + 3] = data[first + 3] & 0xFC | size >> 11
    data[first + 4] = size >> 3 & 0xFF
    data[first + 5] = data[first + 5] & 0x1F | (size & 7) << 5
    data[first + 7 : first + size] = np.random.default_rng(0).bytes(size - 7)
    path.write_bytes(data)
    found = decode(str(path))
    assert found.lost_seconds == pytest.approx(number * 1024 / 48_000, rel=0.2)
    assert len(found.samples) == pytest.approx(len(whole.samples), abs=0.1 * 48_000)


def delayed(plain: Path, path: Path, seconds: float, after: float) -> Path:
    """Write a copy in which the packets after a second have later time stamps."""
    with av.open(str(plain)) as source, av.open(str(path), "w") as out:
        stream = out.add_stream_from_template(source.streams.audio[0])
        for packet in source.demux(audio=0):
            if packet.pts is None or packet.dts is None or packet.time_base is None:
                continue
            if packet.pts * packet.time_base > after:
                packet.dts += int(seconds / packet.time_base)
                packet.pts += int(seconds / packet.time_base)
            packet.stream = stream
            out.mux(packet)
    return path


@pytest.mark.parametrize("name", ["a.m4a", "a.mka"])
def test_sound_that_begins_later_than_its_recording_keeps_its_time(
    tmp_path: Path, name: str
) -> None:
    """As in a video whose microphone was switched on later."""
    sound = voice(2.0)
    write_sound(tmp_path / name, sound, "aac", {"a.m4a": "mp4", "a.mka": "matroska"}[name])
    samples, rate, lost = decode(str(delayed(tmp_path / name, tmp_path / f"b{name}", 1.5, -1)))
    assert lost == 0
    assert len(samples) / rate == pytest.approx(3.5, abs=0.1)
    assert np.abs(samples[: round(1.3 * rate)]).max() < 1e-4
    peak = np.argmax(np.correlate(samples[::48], sound[::48], "valid"))
    assert peak * 48 / rate == pytest.approx(1.5, abs=0.1)


@pytest.mark.parametrize("container", ["mp4", "matroska"])
@pytest.mark.parametrize("spoken", [0, 1])
def test_of_several_audio_streams_the_first_that_is_not_silent_is_decoded(
    tmp_path: Path, container: str, spoken: int
) -> None:
    path, sound = tmp_path / "a.bin", voice(2.0)
    with av.open(str(path), "w", format=container) as out:
        streams = [out.add_stream("aac", rate=48_000, layout="mono") for _ in range(2)]
        for start in range(0, len(sound), 1024):
            for number, stream in enumerate(streams):
                block = sound[start : start + 1024] * np.float32(number == spoken)
                out.mux(stream.encode(audio_frame(block, start)))
        for stream in streams:
            out.mux(stream.encode(None))
    found, *_ = decode(str(path))
    assert np.var(found) == pytest.approx(np.var(sound), rel=0.1)
    with path.open("rb") as file:
        np.testing.assert_array_equal(decode(file).samples, found)


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.m4a", "aac", "mp4"),
        ("a.mka", "aac", "matroska"),
        ("a.webm", "libopus", "webm"),
        ("a.opus", "libopus", "ogg"),
        ("a.ts", "aac", "mpegts"),
    ],
)
def test_a_pause_of_the_recorder_is_silent_and_not_a_loss(
    tmp_path: Path, name: str, codec: str, container: str
) -> None:
    plain = write_sound(tmp_path / name, voice(3.0), codec, container)
    samples, rate, lost = decode(str(delayed(plain, tmp_path / f"pause.{name}", 2.0, 1.0)))
    assert lost == 0
    assert len(samples) / rate == pytest.approx(5.0, abs=0.1)
    assert np.abs(samples[round(1.2 * rate) : round(2.8 * rate)]).max() == 0
    assert np.abs(samples[round(3.2 * rate) :]).max() > 0.1


def test_channels_of_opposite_phase_do_not_cancel(tmp_path: Path) -> None:
    sound = voice()
    for others in ([-sound], [-0.7 * sound], [-sound, 0 * sound], [0.3 + 0 * sound - sound]):
        channels = np.stack([sound, *others], axis=1)
        path = write_wav(tmp_path / "a.wav", channels, subtype="FLOAT")
        found = decode(str(path)).samples
        assert np.var(found) == pytest.approx(np.var(sound), rel=0.01)


def test_silent_channels_do_not_lower_the_others(tmp_path: Path) -> None:
    """A voice is recorded by one channel of a stereo device, or is the centre of a film's sound."""
    sound = voice()
    hiss = 1e-4 * np.std(sound) * np.random.default_rng(0).standard_normal(len(sound))
    for count, place in ((2, 0), (2, 1), (6, 2)):
        channels = np.tile(hiss[:, None], count)
        channels[:, place] = sound
        found = decode(str(write_wav(tmp_path / "a.wav", channels, subtype="FLOAT"))).samples
        np.testing.assert_allclose(found, sound, atol=1e-6)


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "ALAW", "ULAW", "IMA_ADPCM", "MS_ADPCM"])
@pytest.mark.parametrize("container", ["WAV", "AU", "AIFF"])
def test_codecs_of_telephones_are_decoded(tmp_path: Path, subtype: str, container: str) -> None:
    if not soundfile.check_format(container, subtype):
        pytest.skip(f"libsndfile writes no {subtype} in {container}")
    sound = voice(1.0, 8_000)
    path = tmp_path / "a.bin"
    soundfile.write(path, sound, 8_000, format=container, subtype=subtype)
    found, rate, lost = decode(str(path))
    assert (rate, lost) == (8_000, 0)
    assert np.corrcoef(found[:7_000], sound[:7_000])[0, 1] > 0.8


@pytest.mark.parametrize("codec", ["libopencore_amrnb", "amr"])
def test_amr_is_decoded_and_other_bytes_are_refused(tmp_path: Path, codec: str) -> None:
    """AMR has no checksums, but every packet begins with bits that are always 0."""
    path = tmp_path / "a.amr"
    if codec == "amr":
        path.write_bytes(b"#!AMR-WB\n" + np.random.default_rng(0).bytes(5000))
        assert "can be decoded: the file is damaged" in failure(path).reason
        return
    try:
        write_sound(path, voice(2.0), codec, "amr", 8_000)
    except av.codec.codec.UnknownCodecError:
        pytest.skip("this FFmpeg writes no AMR")
    found, rate, lost = decode(str(path))
    assert (rate, lost) == (8_000, 0)
    assert len(found) / rate == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize("suffix", ["au", "vox", "gsm", "snd"])
def test_bytes_with_an_audio_suffix_are_refused(tmp_path: Path, suffix: str) -> None:
    """libsndfile would read any bytes in a file with such a name."""
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"This is no sound.\n" * 99)
    assert failure(path).reason == "damaged, or not a supported audio or video format"


@pytest.mark.parametrize("declared", [0, 1_000, 0x7FFFFFFF])
def test_a_wav_whose_header_has_a_wrong_length_is_read_to_its_end(
    tmp_path: Path, samples: np.ndarray, declared: int
) -> None:
    path = write_wav(tmp_path / "a.wav", samples)
    data = bytearray(path.read_bytes())
    data[40:44] = struct.pack("<I", declared)
    path.write_bytes(data)
    found, _, lost = decode(str(path))
    assert lost == 0
    scale = 1 if found.dtype == np.int16 else 32768
    np.testing.assert_array_equal(found * scale, samples)


@pytest.mark.parametrize("declared", [0, 24, 1_024, 2**32 - 1, 2**63, 2**64 - 1])
def test_a_w64_whose_header_has_a_wrong_length_is_read_to_its_end(
    tmp_path: Path, samples: np.ndarray, declared: int
) -> None:
    path = tmp_path / "a.w64"
    soundfile.write(path, samples, 48_000, format="W64", subtype="PCM_16")
    data = bytearray(path.read_bytes())
    place = data.index(b"data") + 16
    data[place : place + 8] = declared.to_bytes(8, "little")
    path.write_bytes(data)
    found, _, lost = decode(str(path))
    assert lost == 0
    scale = 1 if found.dtype == np.int16 else 32768
    np.testing.assert_array_equal(found * scale, samples)


@pytest.mark.parametrize("size", [0, 8])
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT", "ULAW"])
@pytest.mark.parametrize("form", ["AU", "AIFF"])
def test_an_au_or_aiff_of_an_interrupted_recorder_is_read_to_its_end(
    tmp_path: Path, form: str, subtype: str, size: int
) -> None:
    """Its header declares no samples. In an AIFF, the size may include the 8 bytes before them."""
    path = tmp_path / "a.bin"
    soundfile.write(path, voice(), 48_000, format=form, subtype=subtype)
    whole, data = decode(str(path)), bytearray(path.read_bytes())
    if form == "AU":
        data[8:12] = bytes(4)
    else:
        data[4:8] = bytes(4)
        frames, samples = data.index(b"COMM") + 10, data.index(b"SSND") + 4
        data[frames : frames + 4] = bytes(4)
        data[samples : samples + 4] = size.to_bytes(4)
    path.write_bytes(data)
    found = decode(str(path))
    assert found.loss is None
    scale = 32768 if found.samples.dtype == np.int16 else 1
    np.testing.assert_array_equal(found.samples / np.float32(scale), whole.samples)


@pytest.mark.parametrize("form", ["RIFF", "RIFX"])
@pytest.mark.parametrize("place", [12, 36, -1])
def test_the_byte_after_a_chunk_of_odd_size_may_be_missing(
    tmp_path: Path, samples: np.ndarray, form: str, place: int
) -> None:
    path, order = tmp_path / "a.wav", ">" if form == "RIFX" else "<"
    soundfile.write(path, samples, 48_000, "PCM_16", "BIG" if form == "RIFX" else "LITTLE")
    data = path.read_bytes()
    note = b"LIST" + struct.pack(f"{order}I4s", 7, b"INFO") + b"abc"
    place = len(data) if place < 0 else place
    path.write_bytes(data[:place] + note + data[place:])
    sound = decode(str(path))
    np.testing.assert_array_equal(sound.samples, samples)
    assert sound.loss is None


@pytest.mark.parametrize("before", [b"\0", bytes(512), b"HTTP/1.1 200 OK\r\nServer: x\r\n\r\n"])
def test_zeros_or_text_before_a_wav_are_skipped(
    tmp_path: Path, samples: np.ndarray, before: bytes
) -> None:
    path = write_wav(tmp_path / "a.wav", samples)
    path.write_bytes(before + path.read_bytes())
    np.testing.assert_array_equal(decode(str(path)).samples, samples)
    with path.open("rb") as file:
        np.testing.assert_array_equal(decode(file).samples, samples)


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_a_tag_before_the_header_is_skipped(tmp_path: Path, samples: np.ndarray, form: str) -> None:
    plain = tmp_path / "plain"
    soundfile.write(plain, samples, 48_000, format=form, subtype="PCM_16")
    path = tmp_path / "tagged.wav"
    path.write_bytes(b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + plain.read_bytes())
    found = decode(str(path)).samples
    scale = 1 if found.dtype == np.int16 else 32768
    np.testing.assert_array_equal(found * scale, samples)


def test_samples_that_are_not_finite_are_lost(tmp_path: Path) -> None:
    sound = voice()
    sound[10_000:20_000] = np.nan
    found = decode(str(write_wav(tmp_path / "a.wav", sound, subtype="FLOAT")))
    assert found.lost_seconds == pytest.approx(10_000 / 48_000)
    assert not found.samples[10_000:20_000].any()
    sound[:30_000] = np.inf
    path = write_wav(tmp_path / "a.wav", sound, subtype="FLOAT")
    assert "only 0.38 s of its 1.00 s" in failure(path).reason


@pytest.mark.parametrize(
    "text",
    [
        b"a", b"This is no sound.\n" * 99, b"RIFF", b"RIFF\0\0\0\0WAVE", b"riff", b"OggS",
        b"\x1a\x45\xdf\xa3\x18\x53\x80\x67", b"\x30\x26\xb2\x75\xa1\xdc\xab\x8c\x47\xa9\xcf\x11",
    ],
)  # fmt: skip
def test_a_text_file_is_reported_as_unsupported(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(text)
    assert failure(path).reason == "damaged, or not a supported audio or video format"


@pytest.mark.parametrize(
    ("name", "codec", "container"),
    [
        ("a.mp3", "libmp3lame", "mp3"),
        ("a.webm", "libopus", "webm"),
        ("a.flac", "flac", "flac"),
        ("a.au", "pcm_s16be", "au"),
        ("a.caf", "pcm_s16le", "caf"),
        ("a.flv", "libmp3lame", "flv"),
        ("a.avi", "libmp3lame", "avi"),
        ("b.avi", "pcm_s16le", "avi"),
        ("a.w64", "pcm_s16le", "w64"),
        ("mp3.wav", "libmp3lame", "wav"),
        ("rf64.wav", "pcm_s16le", "wav"),
    ],
)
def test_a_lost_end_is_reported_if_the_header_declares_the_length(
    tmp_path: Path, name: str, codec: str, container: str
) -> None:
    path = write_sound(tmp_path / name, voice(6.0), codec, container)
    data = path.read_bytes()
    if name == "rf64.wav":
        ds64 = struct.pack("<4sIQQQI", b"ds64", 28, len(data) + 28, 6 * 96_000, 6 * 48_000, 0)
        fmt = data[data.index(b"fmt ") :][:24]
        data = b"RF64\xff\xff\xff\xffWAVE" + ds64 + fmt + b"data\xff\xff\xff\xff" + data[-576_000:]
        path.write_bytes(data)
        assert decode(str(path)).loss is None
    path.write_bytes(data[: len(data) * 7 // 10])
    assert decode(str(path)).lost_seconds == pytest.approx(1.8, abs=0.2)
    path.write_bytes(data[: len(data) // 5])
    assert float(failure(path).reason.split()[5]) == pytest.approx(6.0, abs=0.1)


@pytest.mark.parametrize("form", ["RIFF", "RIFX"])
def test_all_samples_of_a_wav_are_read_if_they_are_in_several_chunks(
    tmp_path: Path, samples: np.ndarray, form: str
) -> None:
    path, order = tmp_path / "a.wav", ">" if form == "RIFX" else "<"
    soundfile.write(path, samples, 48_000, "PCM_16", "BIG" if form == "RIFX" else "LITTLE")
    data = path.read_bytes()
    pieces = data[44:30_044], data[30_044:]
    chunks = [b"data" + struct.pack(f"{order}I", len(piece)) + piece for piece in pieces]
    note = b"LIST" + struct.pack(f"{order}I4s", 4, b"INFO")
    path.write_bytes(data[:36] + chunks[0] + note + chunks[1])
    sound = decode(str(path))
    np.testing.assert_array_equal(sound.samples, samples)
    assert sound.loss is None
    with path.open("rb") as file:
        np.testing.assert_array_equal(decode(file).samples, samples)
    path.write_bytes(path.read_bytes()[:-30_000])
    assert decode(str(path)).lost_seconds == pytest.approx(15_000 / 48_000)


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16"])
def test_the_lost_end_of_a_voc_is_reported(tmp_path: Path, subtype: str) -> None:
    """Its blocks declare their length."""
    path = tmp_path / "a.voc"
    soundfile.write(path, voice(4.0, 8_000), 8_000, format="VOC", subtype=subtype)
    assert decode(str(path)).loss is None
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 3 // 4])
    assert decode(str(path)).lost_seconds == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(("codec", "seconds"), [("libopus", 4.0), ("flac", 4.2)])
def test_the_loss_of_an_incomplete_ogg_is_that_of_its_last_page(
    tmp_path: Path, codec: str, seconds: float
) -> None:
    """The last page declares the time at which it ends."""
    path = write_sound(tmp_path / "a.ogg", voice(seconds), codec, "ogg")
    data = path.read_bytes()
    for share in (7, 8, 9):
        path.write_bytes(data[: len(data) * share // 10])
        found = decode(str(path))
        assert 0.5 <= found.lost_seconds <= 1.1


@pytest.mark.parametrize("codec", ["libopus", "flac"])
def test_the_incomplete_last_page_of_an_ogg_is_lost(tmp_path: Path, codec: str) -> None:
    """No header of an ogg declares how many pages there were."""
    path = write_sound(tmp_path / "a.ogg", voice(6.0), codec, "ogg")
    data = path.read_bytes()
    assert decode(str(path)).loss is None
    last = data.rindex(b"OggS", 0, data.rindex(b"OggS"))
    path.write_bytes(data[: last + 300])
    assert decode(str(path)).lost_seconds == pytest.approx(1.0, abs=0.5)
    path.write_bytes(data[:last])
    assert decode(str(path)).loss is None


@pytest.mark.parametrize("codec", ["libopus", "flac"])
def test_a_missing_page_of_an_ogg_is_lost(tmp_path: Path, codec: str) -> None:
    """The pages are numbered. The file has no unread bytes, as after a pause of the recorder."""
    path = write_sound(tmp_path / "a.ogg", voice(10.0), codec, "ogg")
    data, whole = path.read_bytes(), decode(str(path))
    pages = [place for place in range(len(data)) if data.startswith(b"OggS", place)]
    path.write_bytes(data[: pages[5]] + data[pages[6] :])
    found = decode(str(path))
    assert len(found.samples) == len(whole.samples)
    assert found.lost_seconds == pytest.approx(1.0, abs=0.1)
    assert not found.samples[4 * 48_000 : 5 * 48_000].all()


def test_a_damaged_fragment_of_an_mp4_is_lost_with_all_after_it(tmp_path: Path) -> None:
    """FFmpeg reads no further. If the fragment is missing, the others keep their times."""
    path, sound = tmp_path / "a.mp4", voice(10.0)
    options = {"movflags": "empty_moov+default_base_moof", "frag_duration": "500000"}
    with av.open(str(path), "w", format="mp4", options=options) as out:
        stream = out.add_stream("aac", rate=48_000, layout="mono")
        for start in range(0, len(sound), 1024):
            out.mux(stream.encode(audio_frame(sound[start : start + 1024], start)))
        out.mux(stream.encode(None))
    data, whole = path.read_bytes(), decode(str(path))
    assert whole.loss is None
    first = [place for place in range(len(data)) if data.startswith(b"moof", place)][12] - 4
    after = data.index(b"moof", first + 8) - 4
    path.write_bytes(data[:first] + data[after:])
    found = decode(str(path))
    assert found.lost_seconds == pytest.approx(0.5, abs=0.05)
    np.testing.assert_allclose(found.samples[-48_000:], whole.samples[-48_000:], atol=0.02)
    path.write_bytes(data[:first] + bytes(after - first) + data[after:])
    found = decode(str(path))
    lost = (len(whole.samples) - len(found.samples)) / 48_000
    assert found.lost_seconds == pytest.approx(lost, rel=0.1)
    assert lost > 3


@pytest.mark.parametrize(
    ("codec", "container"), [("aac", "matroska"), ("libopus", "webm"), ("wmav2", "asf")]
)
def test_the_lost_end_of_a_film_is_reported_but_not_a_short_soundtrack(
    tmp_path: Path, codec: str, container: str
) -> None:
    """Its header declares the length of the pictures."""
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w", format=container) as out:
        sound = out.add_stream(codec, rate=48_000, layout="mono")
        pictures = out.add_stream("libvpx" if container == "webm" else "mpeg4", rate=25)
        assert isinstance(sound, av.AudioStream)
        assert isinstance(pictures, av.VideoStream)
        sound.bit_rate = 64_000
        pictures.width = pictures.height = 64
        pictures.pix_fmt = "yuv420p"
        samples, rng = voice(6.0), np.random.default_rng(0)
        step = sound.frame_size or 960
        for number in range(200):
            picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
            out.mux(pictures.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            for start in range(-(-number * 1920 // step) * step, (number + 1) * 1920, step):
                if start < len(samples):
                    out.mux(sound.encode(audio_frame(samples[start : start + step], start)))
        out.mux(sound.encode(None))
        out.mux(pictures.encode(None))
    data = path.read_bytes()
    assert decode(str(path)).loss is None
    path.write_bytes(data[: len(data) * 6 // 10])
    assert decode(str(path)).lost_seconds > 1.2
    if container != "asf":  # the length of each stream is in a tag
        middle = len(data) * 6 // 10  # FFmpeg continues with the next cluster, if there is one
        path.write_bytes(data[:middle] + bytes(9_000) + data[middle + 9_000 :])
        found = decode(str(path))
        total = len(found.samples) / found.sample_rate
        assert found.lost_seconds > max(6.0 - total, 0.05) - 0.05


def test_of_a_joined_ogg_with_another_sample_rate_the_first_part_is_used(tmp_path: Path) -> None:
    path, parts = tmp_path / "a.ogg", []
    for rate, seconds in ((48_000, 16.0), (44_100, 12.0)):
        soundfile.write(path, voice(seconds), rate, format="OGG", subtype="VORBIS")
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    sound = decode(str(path))
    assert len(sound.samples) == 16 * 48_000
    assert sound.lost_seconds == pytest.approx(13, abs=2)


def test_damage_that_soundfile_skips_in_a_wav_is_reported(tmp_path: Path) -> None:
    """libsndfile returns fewer samples than it declared, and reports no error."""
    path = write_sound(tmp_path / "a.wav", voice(6.0), "libmp3lame", "wav")
    assert decode(str(path)).loss is None
    data = path.read_bytes()
    path.write_bytes(data[:24_000] + bytes(300) + data[24_300:])
    assert 0.02 < decode(str(path)).lost_seconds < 0.1


def test_data_attached_to_an_mp3_is_not_lost_sound(tmp_path: Path) -> None:
    """FFmpeg would distrust the declared length, and estimate another one from the size."""
    path, sound = tmp_path / "a.mp3", voice(6.0)
    soundfile.write(path, sound, 48_000, format="MP3")
    data = path.read_bytes()
    for attached in (data, bytes(20_000), b"APETAGEX" + bytes(20_000)):
        path.write_bytes(data + attached)
        assert decode(str(path)).lost_seconds < 0.1
    picture = b"ID3\x04\0\0\0\0\x7f\x7f" + bytes(0x7F << 7 | 0x7F)
    path.write_bytes(picture + data[: len(data) * 7 // 10])
    assert decode(str(path)).lost_seconds == pytest.approx(1.8, abs=0.2)


def test_a_table_of_an_mp3_without_a_number_of_frames_declares_no_length(tmp_path: Path) -> None:
    """Bit 0 of the table's flags, after its name, says whether the number of frames follows."""
    path = write_sound(tmp_path / "a.mp3", voice(), "libmp3lame", "mp3")
    data = bytearray(path.read_bytes())
    table = max(data.find(b"Xing"), data.find(b"Info"))
    assert data[table + 7] & 1
    data[table + 7] = 0
    data[table + 8 : table + 12] = (1000).to_bytes(4)  # 24 s, if it were a number of frames
    path.write_bytes(data)
    sound = decode(str(path))
    assert sound.lost_seconds == 0
    assert len(sound.samples) == pytest.approx(48_000, abs=4 * 1152)


@pytest.mark.parametrize(("codec", "container"), [("flac", "flac"), ("wavpack", "wv")])
def test_damage_that_a_checksum_finds_is_not_loud_noise(
    tmp_path: Path, codec: str, container: str
) -> None:
    path, sound = write_sound(tmp_path / "a.bin", voice(6.0), codec, container), voice(6.0)
    data = path.read_bytes()
    for place in (len(data) * quarter // 4 for quarter in (1, 2, 3)):
        path.write_bytes(data[:place] + bytes(300) + data[place + 300 :])
        found = decode(str(path))
        assert found.lost_seconds > 0.01
        assert np.abs(found.samples).max() <= np.abs(sound).max() + 0.01
