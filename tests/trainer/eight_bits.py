"""Plugin for --external_plugins: the optimizer is called Adam, and whether its moments are like the parameters only it knows:
so do those of 8 bits. For tests.
"""

import torch


class AdamW8bit(torch.optim.AdamW):
    pass


torch.optim.AdamW = AdamW8bit
