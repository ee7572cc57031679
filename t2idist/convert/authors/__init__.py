"""The weights that the authors of the published systems gave out, made into exports of ours.

`checkpoints` reads their files, `captions` their vocabulary, `recipes` says which tensor is which and reads the sizes
off the shapes, `importing` puts it together.
"""
