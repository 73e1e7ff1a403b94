"""Judges: media and prompts in, one number each out; every judge is described by a card."""
