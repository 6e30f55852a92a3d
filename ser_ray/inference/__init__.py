"""Names the emotion in any audio file, with a trained checkpoint."""
