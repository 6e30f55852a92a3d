"""Turns a recording into features. Nothing here imports Ray.

decode      a file -> mono samples, by soundfile or, in `ffmpeg`, by PyAV
headers     what the header of a file declares; repairs headers that the libraries misread
samples     decoded samples: checks, mixing to one channel, cutting segments
sandbox     decodes in a child process, because some clips hang or kill the process
loudness    samples -> the loudness of each 10 ms; decides what is silent
transforms  samples -> sound without silent ends -> spectrogram, mel, MFCC; `mel` has the filter
            bank
encoder     samples -> the layers of a pretrained speech encoder; `encoder_card` describes it, and
            `bundles` has the encoders of torchaudio
conditions  simulates recording conditions, such as noise or a telephone, to test a model, not to
            train it (`ser_ray.training.acoustics` changes training clips)
config      the feature settings
errors      why a clip cannot become features

Preparing shards and predicting use the same functions, so both compute the same numbers.
"""
