"""Verdicts of benchmarks, one benchmark a file.

Each is a pure function of what a judge answered, so that verdicts can be recomputed from a file of
answers without any model.
"""
