"""Checks decoded samples, mixes them to one channel, and cuts segments out of recordings.

`decode` and `ffmpeg` use this module for all file formats.
"""

from typing import NamedTuple

import numpy as np

from ser_ray.features.errors import ClipError

MAX_CHANNELS = 8
SAMPLE_RATES = range(1_000, 192_001)
"""Accepted sample rates in hertz. The limits on rate, channels and seconds bound the memory that a
clip needs."""
MAX_PEAK = 8.0
"""If no float sample exceeds this value, full scale is ±1. It is more than 1, because mixed sound
may exceed full scale."""
INTEGER_PEAK = 2.0**15
"""Full scale of larger float samples, because some tools write 16-bit values as floats. Samples
above this value are not sound."""
MIN_INTEGER_SHARE = 0.01
"""Float samples count as 16-bit values if at least this share of those that are not 0 exceeds
MAX_PEAK, and at most this share of these exceeds INTEGER_PEAK."""
MAX_BETWEEN = 16
"""If this many samples or fewer lie between two impossible samples, they are damaged too. Even of
random bytes, half form possible samples."""
MISSING_SECONDS = 0.25
"""The end of a file counts as lost if more than this many seconds of the declared length are
missing. Smaller differences occur in undamaged files."""
MIN_LOST_SECONDS = 0.01
"""Shorter losses are not reported."""
SILENT_CHANNEL_RATIO = 1e-6
"""A channel with less than this share (-60 dB) of the loudest channel's power is not mixed."""
MIX_SECONDS = 10.0
"""Recordings are mixed to one channel in pieces of this many seconds, to save memory."""


class Sound(NamedTuple):
    """The sound that was decoded from a clip."""

    samples: np.ndarray
    """`[num_samples]`, int16 or float32. Silence replaces sound of known length that is lost within
    the clip."""
    sample_rate: int
    """Hertz."""
    lost_seconds: float = 0.0
    """Seconds that are missing from the file or cannot be decoded."""

    @property
    def loss(self) -> str | None:
        """Describe the loss; None if nothing was lost."""
        if self.lost_seconds < MIN_LOST_SECONDS:
            return None
        return (
            f"at least {self.lost_seconds:.2f} s of the file are lost: it is damaged or incomplete"
        )


class Decoded(NamedTuple):
    """The decoded sound before it is checked."""

    samples: np.ndarray
    sample_rate: int
    lost_seconds: float
    decoded_seconds: float
    """Seconds of decoded sound, without the silence that replaces lost sound."""


def silence_impossible(sound: Decoded) -> Decoded:
    """Replace damaged float samples by silence, and count them as lost.

    A sample is damaged if it is not finite, too large, or one of at most MAX_BETWEEN samples
    between two such samples. If most samples are too large, their scale is unknown. Then only those
    that are not finite are replaced, and `to_full_scale` scales or refuses the others.
    """
    samples, sample_rate, lost, decoded = sound
    if samples.dtype == np.int16 or is_possible(samples):
        return sound
    size = np.abs(samples)
    finite, num_sounding = size[np.isfinite(size)], np.count_nonzero(size)
    num_large, num_beyond = (np.count_nonzero(finite > peak) for peak in (MAX_PEAK, INTEGER_PEAK))
    has_few_beyond = num_beyond <= num_large * MIN_INTEGER_SHARE
    has_many_large = num_large >= num_sounding * MIN_INTEGER_SHARE
    if has_few_beyond and has_many_large:  # 16-bit values
        largest = INTEGER_PEAK
    elif num_large <= num_sounding / 2:
        largest = MAX_PEAK
    else:
        largest = float(np.finfo(np.float32).max)
    is_damaged = ~(size <= largest)  # NaN is damaged too
    # Add the samples between two damaged samples that are close to each other.
    places = np.flatnonzero(is_damaged)
    is_close = np.diff(places) <= MAX_BETWEEN + 1
    steps = np.zeros(len(samples), np.int8)
    steps[places[:-1][is_close]] += 1
    steps[places[1:][is_close]] -= 1
    is_damaged |= np.cumsum(steps, dtype=np.int8) > 0
    more = np.count_nonzero(is_damaged) / sample_rate
    samples = np.where(is_damaged, np.float32(0), samples)
    return Decoded(samples, sample_rate, lost + more, max(decoded - more, 0.0))


def is_possible(samples: np.ndarray) -> bool:
    """Return whether all float samples are finite and at most MAX_PEAK."""
    # `max` and `min` need no copy of the samples, as `np.abs` would. Both are NaN if a sample is.
    return not samples.size or bool(samples.max() <= MAX_PEAK and samples.min() >= -MAX_PEAK)


def to_full_scale(samples: np.ndarray) -> np.ndarray:
    """Scale float samples `[num_samples]` to full scale ±1; int16 samples are returned unchanged.

    Raises:
        ClipError: the samples are not finite or too large to be sound.
    """
    if samples.dtype == np.int16 or not samples.size:
        return samples
    peak = float(np.abs(samples).max())
    if peak <= MAX_PEAK:
        return samples
    if peak <= INTEGER_PEAK:
        return samples / np.float32(INTEGER_PEAK)
    what = f"as large as {peak:g}" if np.isfinite(peak) else "that are not finite numbers"
    raise ClipError("unreadable", f"it has samples {what}")


def cut(sound: Sound, start: float | None, end: float | None) -> tuple[Sound, str | None]:
    """Cut a segment out of a recording.

    Args:
        sound: the recording.
        start: start of the segment in seconds; None for the whole recording.
        end: end of the segment in seconds; None for the end of the recording.

    Returns:
        The segment, and a description of lost or missing sound; None if nothing is missing.

    Raises:
        ClipError: `beyond_end`, if less than half of the segment is inside the recording.
    """
    if start is None:
        return sound, sound.loss
    rate, num_samples = sound.sample_rate, len(sound.samples)
    first, last = round(start * rate), num_samples if end is None else round(end * rate)
    samples = sound.samples[first:last]
    missing = (last - first - len(samples)) / rate
    if not len(samples) or len(samples) / rate < missing:
        until = "the end" if end is None else f"{end:.2f} s"
        raise ClipError(
            "beyond_end",
            f"the segment is from {start:.2f} s to {until}, and the file ends at "
            f"{num_samples / rate:.2f} s",
        )
    losses = [sound.loss] if sound.loss else []
    if missing >= MIN_LOST_SECONDS:
        losses.append(f"{missing:.2f} s of the segment are after the end of the file")
    return sound._replace(samples=samples), "; ".join(losses) or None


def to_mono(channels: np.ndarray) -> np.ndarray:
    """Mix `[channels, num_samples]` to one channel, `[num_samples]`.

    The result is the mean of the channels, without channels that are almost silent. If the channels
    cancel each other because their phases are opposite, the result is the loudest channel instead.
    This is assumed if the mean has less than half the power that it would have if the channels were
    unrelated. Constant offsets do not count as power.
    """
    with np.errstate(invalid="ignore", over="ignore"):  # `silence_impossible` finds these samples
        if len(channels) == 1 or not channels.size:
            return channels.mean(axis=0)
        powers = channels.var(axis=1)
        if np.isfinite(powers).all():
            is_heard = powers >= powers.max() * SILENT_CHANNEL_RATIO
            channels, powers = channels[is_heard], powers[is_heard]
        mean = channels.mean(axis=0)
        if mean.var() < powers.mean() / (2 * len(channels)):
            return channels[int(np.argmax(powers))]
    return mean


def require_shape(num_channels: int, sample_rate: int) -> None:
    """Check the number of channels and the sample rate.

    Raises:
        ClipError: `unreadable`, if one of them is not accepted.
    """
    if num_channels not in range(1, MAX_CHANNELS + 1) or sample_rate not in SAMPLE_RATES:
        raise ClipError(
            "unreadable",
            f"{num_channels} channels at {sample_rate} Hz: only 1 to {MAX_CHANNELS} channels at "
            f"{SAMPLE_RATES[0]} to {SAMPLE_RATES[-1]} Hz are read",
        )


def require_length(seconds: float, max_seconds: float) -> None:
    """Raise ClipError `too_long` for a clip that is longer than `max_seconds`."""
    if seconds > max_seconds:
        raise ClipError("too_long", f"longer than {max_seconds:g} s")
