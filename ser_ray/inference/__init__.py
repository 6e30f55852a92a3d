"""Predicts the emotion in recordings with a checkpoint.

recordings  a file, stream or samples -> features of the complete recording or of its windows
predictor   features -> probabilities -> prediction, for one recording or several
prediction  the prediction as text, as a table, or in a notebook
batch       predictions for many files, by Ray Data
results     stores the predictions of a batch pass
packaged    the model for MLflow
export      the model as one ONNX or torch file
demo        a web page to record or upload clips
"""
