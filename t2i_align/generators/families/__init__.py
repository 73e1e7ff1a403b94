"""Denoiser families of diffusers, each a :class:`t2i_align.generators.layouts.FamilyLayout`."""
