"""Predicts the emotion in recordings with a checkpoint.

recordings  a file, stream or samples -> features of all its sound, or of its windows
predictor   features -> probabilities -> answer; everything below calls it
prediction  the answer, as text, as a table, in a notebook
batch       many files at once, by Ray Data
results     the answers of a batch pass: parts while it runs, one table at its end
packaged    the model as MLflow packages it
export      one ONNX or torch file with the complete computation
demo        a page where people record or drop clips
"""
