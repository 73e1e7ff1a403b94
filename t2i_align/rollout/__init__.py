"""Samples drawn from a model: the ``generate`` verb, later rollouts for online training."""
