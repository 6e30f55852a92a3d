"""Temperature scaling: one number makes a model's probabilities agree with its accuracy.

A network may be overconfident or underconfident. Its probabilities p for a clip become
p^(1/T) / sum(p^(1/T)). The temperature T minimises the negative log-likelihood of the validation
clips (Guo et al. 2017, section 4.2). For a clip with one window, the formula divides the logits by
T. The order of the probabilities does not change, so accuracies do not change either.
"""

import numpy as np
from scipy.special import softmax

MAX_TEMPERATURE = 4.0
"""T is between 1 / MAX_TEMPERATURE and MAX_TEMPERATURE. Without a limit, T goes to 0 if all
validation clips are classified correctly."""
MIN_PROBABILITY = 1e-30  # log(0) is infinite
NUM_BISECTIONS = 40


def apply_temperature(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Scale probabilities [clips, labels], whose rows sum to 1, by a temperature.

    A temperature of 1 changes nothing. Scaling the result by 1 / temperature restores the original
    up to rounding, unless a probability is below `MIN_PROBABILITY`.
    """
    if temperature == 1:
        return probabilities
    return softmax(np.log(np.maximum(probabilities, MIN_PROBABILITY)) / temperature, axis=1)


def fit_temperature(truth: np.ndarray, probabilities: np.ndarray) -> float:
    """Return the temperature that minimises the negative log-likelihood; 1 if there are no clips.

    The derivative of this loss with respect to 1 / T rises with 1 / T, so bisection finds its zero.

    Args:
        truth: label indices [clips].
        probabilities: [clips, labels], whose rows sum to 1.
    """
    if not len(truth):
        return 1.0
    logs = np.log(np.maximum(probabilities, MIN_PROBABILITY))
    mean_log_of_truth = logs[np.arange(len(truth)), truth].mean()
    low, high = 1 / MAX_TEMPERATURE, MAX_TEMPERATURE  # bounds of 1 / T
    for _ in range(NUM_BISECTIONS):
        inverse = (low + high) / 2
        if (softmax(inverse * logs, axis=1) * logs).sum(axis=1).mean() > mean_log_of_truth:
            high = inverse
        else:
            low = inverse
    return 2 / (low + high)
