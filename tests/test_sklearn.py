"""The estimators for scikit-learn: its own checks of every estimator, and what people do with one."""

import pickle

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_iris
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

from cronos_flax.sklearn import CronosClassifier, CronosRegressor

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")


@parametrize_with_checks([CronosClassifier(16, max_iter=20), CronosRegressor(16, max_iter=20)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)
