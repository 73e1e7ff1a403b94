"""t2i-align: preference alignment for image, speech and 3D generators."""

__version__ = "0.1.0"
