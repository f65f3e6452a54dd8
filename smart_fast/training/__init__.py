"""What training brings along: DDP and FSDP2, checkpointing, torch.compile."""
