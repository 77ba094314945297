"""Plugin for --external_plugins with --lazy_tokenize true: to encode a row draws random numbers, and some rows cannot be
encoded, so that ms-swift takes the next of its own order instead. For tests.
"""

import functools
import importlib
import random

import numpy
import torch


def drawing(encode):
    @functools.wraps(encode)
    def draw(row, **kwargs):
        random.random(), numpy.random.rand(), torch.rand(1)
        if len(str(row)) % 5 == 0:
            raise ValueError("this row cannot be encoded")
        return encode(row, **kwargs)

    return draw


for name in ("swift.llm.dataset.utils", "swift.dataset.utils"):
    try:
        lazy = importlib.import_module(name).LazyLLMDataset
    except ImportError:
        continue
    lazy.__init__ = (
        lambda original: lambda self, dataset, encode_func, **kwargs: original(
            self, dataset, drawing(encode_func), **kwargs
        )
    )(lazy.__init__)
