"""Supervised training of scikit-learn's ``SGDClassifier``. Importing this package imports no scikit-learn."""
