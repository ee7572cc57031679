"""Faster forms of the plain formulas in nn/ and losses/, under the same names.

The plain form is the definition, and the tests compare the fast one with it. Each is chosen in one place: the layer or
loss that calls it, or `layers.use_fast_layers`.
"""
