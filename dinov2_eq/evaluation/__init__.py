"""Trained encoders, read from files, and the results of evaluating them."""
