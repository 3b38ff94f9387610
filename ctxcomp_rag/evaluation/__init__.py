"""Evaluation: test material and measures of answer quality."""
