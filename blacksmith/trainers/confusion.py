"""The tables of a classifier's result, for every framework."""

from typing import Any

import numpy as np


def class_tables(labels: np.ndarray, predictions: np.ndarray, classes: int) -> dict[str, Any]:
    """The confusion matrix and the accuracy of each class, as JSON values.

    Args:
      labels: int [samples], from 0.
      predictions: int [samples].
      classes: how many there are.

    Returns:
      ``confusion_matrix``, counts by true class (rows) and prediction (columns), and ``per_class_accuracy``,
      None for a class without samples.
    """
    matrix = np.bincount(classes * labels.astype(np.int64) + predictions, minlength=classes**2)
    rows = matrix.reshape(classes, classes).tolist()
    accuracies = [row[i] / sum(row) if any(row) else None for i, row in enumerate(rows)]
    return {"per_class_accuracy": accuracies, "confusion_matrix": rows}
