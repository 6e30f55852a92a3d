"""Temperature scaling: one number that makes a model's probabilities agree with its accuracy.

A network may be overconfident or underconfident. Its probabilities p for a clip become
p^(1/T) / sum(p^(1/T)). The temperature T minimises the negative log-likelihood of the validation
clips (Guo et al. 2017, section 4.2). For a clip of one window, this divides the logits by T. The
order of the probabilities does not change, and neither does any accuracy.
"""

import numpy as np

LARGEST = 4.0
"""T is limited to the range from 1 / LARGEST to LARGEST. Without a limit, T goes to 0 if all
validation clips are classified correctly."""
SMALLEST_PROBABILITY = 1e-30
BISECTIONS = 40


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Scale probabilities [clips, labels], rows summing to 1. A temperature of 1 changes nothing.

    Scaling again by 1 / temperature restores the original probabilities.
    """
    if temperature == 1:
        return probabilities
    return _softmax(np.log(np.maximum(probabilities, SMALLEST_PROBABILITY)) / temperature)


def fit_temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Find the temperature that minimises the negative log-likelihood; 1 if there are no clips.

    The slope of this loss over 1 / T rises with 1 / T, so bisection finds where the slope is 0.

    Args:
        truth: label indices [clips].
        probabilities: [clips, labels], rows summing to 1.
    """
    if not len(truth):
        return 1.0
    logs = np.log(np.maximum(probabilities, SMALLEST_PROBABILITY))
    of_truth = logs[np.arange(len(truth)), truth].mean()
    low, high = 1 / LARGEST, LARGEST
    for _ in range(BISECTIONS):
        inverse = (low + high) / 2
        if (_softmax(inverse * logs) * logs).sum(axis=1).mean() > of_truth:
            high = inverse
        else:
            low = inverse
    return 2 / (low + high)


def _softmax(logits: np.ndarray) -> np.ndarray:
    shares: np.ndarray = np.exp(logits - logits.max(axis=1, keepdims=True))
    return shares / shares.sum(axis=1, keepdims=True)
