"""The engine around it all: the loop, precision, checkpoints, resume, logging."""
