"""From a checkpoint to the emotion in any audio file."""
