"""The embedded world.

Small pictures of flat icons with an exact judge, on which alignment can be measured.
"""
