"""Draws figures for pages, the demo, notebooks and MLflow.

style     colours, width, frame, legend and title of all figures
training  curves of a training, its learning rate, the learning-rate range test
scores    confusion matrix, scores by speaker, calibration
search    trials of a search
clip      waveform, spectrogram and timeline of a recording
svg       writes a figure into an HTML page
"""
