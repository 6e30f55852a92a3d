"""A checkpoint to answers: scores on its test part, or the emotion in any file."""
