# SPDX-License-Identifier: Apache-2.0
"""What a model's texts are worth: predictions, metrics, losses, and the files they are kept in."""

from t5x_lite.evaluation.evaluate import Evaluator, evaluate
from t5x_lite.evaluation.predict import Prediction, Predictor

__all__ = ["Evaluator", "Prediction", "Predictor", "evaluate"]
