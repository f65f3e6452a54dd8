"""SMART with FSDP2: parameters, gradients and optimizer states spread over the processes.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py    # one machine: 2 GPUs, or 2 processes on its CPU

Several machines: the same command on each of them, with the number of machines and the address of one of them

    torchrun --nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint first-machine:29500 examples/fsdp2.py

Model, data and loop are those of ddp.py. The regularizer is called while the forward pass of the root is under way, and
`SMARTLoss` finds the sharded modules by itself: in the ascent they reduce no gradients, and the root keeps its
parameters.
"""

from __future__ import annotations

import torch.distributed as dist
from ddp import Classifier, start, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


def main() -> None:
    device = start()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    model = Classifier().to(device)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)  # what is left: embedding and head
    if dist.get_rank() == 0:
        whole = sum(each.numel() for each in model.parameters())
        here = sum(each.to_local().numel() for each in model.parameters())
        print(f"{here} of {whole} parameters here")
    train(model, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
