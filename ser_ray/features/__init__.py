"""Turns a recording into features. Nothing here imports Ray.

decode      a file -> mono samples, by soundfile or, in `ffmpeg`, by PyAV
samples     decoded samples: checks, mixing to one channel, cutting segments
sandbox     decodes clips that hang or kill the process
transforms  samples -> spectrogram, mel, MFCC; `mel` has the filter bank
encoder     samples -> the layers of a pretrained speech encoder; `encoder_card` describes it, and
            `bundles` has those of torchaudio
conditions  simulates noise, a telephone or a room
config      the settings of the features
errors      why a clip cannot become features

Preparing shards and predicting use the same functions, so both see the same numbers.
"""
