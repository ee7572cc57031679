"""Convert the weights that the authors of the published systems released to exports.

`checkpoints` reads the files of weights and `captions` the vocabularies; `layouts` describes which tensors identify a
network and which settings follow from their shapes; `importing` writes the exports.
"""
