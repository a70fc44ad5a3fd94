"""The tables of a classifier's result."""

import numpy as np

from blacksmith.trainers.confusion import class_tables


def test_rows_are_true_classes_and_a_class_without_samples_has_no_accuracy():
    labels, predictions = np.array([0, 0, 0, 2], np.int32), np.array([0, 0, 1, 1])
    assert class_tables(labels, predictions, 3) == {
        "per_class_accuracy": [2 / 3, None, 0.0],
        "confusion_matrix": [[2, 1, 0], [0, 0, 0], [0, 1, 0]],
    }
