"""One of two ranks that train under plain DDP over gloo, without end. For tests, under torchrun.

After a step that both shared it writes its pid to rank-N in the directory given.
"""

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank = dist.get_rank()
assert dist.get_world_size() == 2
torch.manual_seed(0)
model = DistributedDataParallel(torch.nn.Linear(4, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
told = False
while True:
    optimizer.zero_grad()
    # Rows of its own: only DDP makes the gradients of both ranks the same.
    model(torch.full((2, 4), float(rank + 1))).sum().backward()
    if not told:
        gradients = [torch.zeros(1, 4), torch.zeros(1, 4)]
        dist.all_gather(gradients, next(model.parameters()).grad)
        assert torch.equal(*gradients) and torch.all(gradients[0] == 3.0), gradients
        name = os.path.join(sys.argv[1], f"rank-{rank}")
        with open(name + ".new", "w") as file:
            file.write(str(os.getpid()))
        os.rename(name + ".new", name)
        told = True
    optimizer.step()
    time.sleep(0.01)
