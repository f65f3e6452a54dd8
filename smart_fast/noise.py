"""Where noise comes from: torch's generators, so that `torch.manual_seed` reproduces a run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_SEEDS = 2**63 - 1


def draw_normal(embed: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal values like ``embed``: the values, and the generator state after, of `torch.randn_like`."""
    return torch.empty_like(embed).normal_(generator=generator)


def draw_uniform(embed: Tensor, generator: torch.Generator | None) -> Tensor:
    """Values like ``embed``, uniform on [-sqrt(3), sqrt(3)]: their standard deviation is one, as that of the others."""
    return torch.empty_like(embed).uniform_(-(3.0**0.5), 3.0**0.5, generator=generator)


#: The initial noises, one row each: what draws one, of mean zero and standard deviation one. kernels/philox.py and
#: csrc/philox.h make theirs from a seed.
NOISES: dict[str, Callable[[Tensor, torch.Generator | None], Tensor]] = {
    "normal": draw_normal,
    "uniform": draw_uniform,
}


def draw_noise(embed: Tensor, generator: torch.Generator | None, noise: str = "normal") -> Tensor:
    """Noise like ``embed``, not scaled.

    Raises:
        ValueError: no noise has that name; the message lists those that there are.
    """
    if noise not in NOISES:
        raise ValueError(f"noise must be one of {list(NOISES)}, got {noise!r}")
    return NOISES[noise](embed, generator)


def draw_seed(device: torch.device, generator: torch.Generator | None) -> Tensor:
    """A seed for counter-based noise: int64 ``[1]`` on ``device``, drawn there and never read by the host."""
    return torch.randint(_SEEDS, (1,), device=device, generator=generator)


def remember_generators(device: torch.device) -> Callable[[], None]:
    """Calling the result sets torch's generators of the CPU and of ``device`` back to where they are now."""
    on_cpu = torch.get_rng_state()
    module = getattr(torch, device.type) if device.type in ("cuda", "xpu") else None
    on_device = module.get_rng_state(device) if module else None

    def rewind() -> None:
        torch.set_rng_state(on_cpu)
        if module:
            module.set_rng_state(on_device, device)

    return rewind


def token_rms(embed: Tensor) -> Tensor:
    """Root mean square over the last dimension, ``[..., D] -> [..., 1]``, fp32 (fp64 of fp64): the unit of a token."""
    dtype = torch.promote_types(embed.dtype, torch.float32)
    norm = torch.linalg.vector_norm(embed.detach(), dim=-1, keepdim=True, dtype=dtype)
    return norm * embed.shape[-1] ** -0.5
