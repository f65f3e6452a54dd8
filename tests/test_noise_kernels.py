"""The noise: the right function of seed and element index, the right distribution, wherever it is computed."""

from __future__ import annotations

import math
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from scipy import stats
from smart_fast.kernels.philox import NOISES, noise_tile

from smart_fast import autograd, noise
from smart_fast.backends import triton_launch
from tests import oracle
from tests.helpers import ROOT, exhaustively

if TYPE_CHECKING:
    from smart_fast.backends.native import Native


def noise_like(
    backend: ModuleType, embed: torch.Tensor, seed: int, mask: torch.Tensor | None = None, kind: str = "normal"
) -> torch.Tensor:
    """The noise that `perturb` adds to zeros of the shape and strides of ``embed``."""
    seeds = torch.tensor([seed], dtype=torch.int64, device=embed.device)
    return backend.perturb(torch.zeros_like(embed), seeds, 1.0, mask, False, None, kind)[0]


@pytest.fixture
def large_tiles(backend: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays by the program, not by the element."""
    from smart_fast.kernels import launch

    if backend.name == "triton" and triton_launch.INTERPRETED:
        monkeypatch.setattr(launch, "stream_tile", lambda count: launch.Tile(1, 2**17, -(-count // 2**17), 1))


def row_major(*shape: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(shape, device=device)


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**40 + 12345, 2**63 - 2])
def test_matches_the_papers(seed: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    got = noise_like(backend, row_major(4097, device=device), seed).cpu().double().numpy()
    want = oracle.philox_normal(seed, 4097)
    assert np.abs(got - want).max() < 2e-6


def test_philox_known_answer() -> None:
    """Random123's published vector for ten rounds checks the oracle's round function and key schedule."""
    assert oracle._philox((0, 0, 0, 0), 0, rounds=10) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_distribution(backend: ModuleType, device: torch.device, large_tiles: None) -> None:
    interpreted = backend.name == "triton" and triton_launch.INTERPRETED
    count = 100_000 if interpreted else 1_000_000
    sample = noise_like(backend, row_major(count, device=device), 42).cpu().double().numpy()
    spread = 1 / math.sqrt(count)
    assert stats.kstest(sample, "norm").pvalue > 1e-3
    assert abs(sample.mean()) < 4 * spread
    assert abs(sample.std() - 1) < 3 * spread
    assert abs(stats.skew(sample)) < 10 * spread
    assert abs(stats.kurtosis(sample)) < 20 * spread
    # The four lanes of a counter, neighboring counters, and far tails.
    lanes = sample.reshape(-1, 4)
    correlation = np.corrcoef(np.concatenate([lanes[:-1], lanes[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 10 * spread
    squares = np.corrcoef(lanes.T**2)
    assert np.abs(squares - np.eye(4)).max() < 10 * spread
    assert 4.0 < np.abs(sample).max() < 6.8


@pytest.mark.parametrize("seed", [0, *exhaustively(1, 2**40 + 12345, 2**63 - 2)])
def test_uniform_noise_is_the_same_everywhere(
    seed: int, backend: ModuleType, device: torch.device, poison: None
) -> None:
    """To the last bit: words as signed numbers in fp32, times a constant in fp32."""
    want = oracle.philox_uniform(seed, 4097) * (2**31 / math.sqrt(3))
    want = torch.from_numpy(want).round().float() * torch.tensor(math.sqrt(3) / 2**31)
    got = noise_like(backend, row_major(4097, device=device), seed, None, "uniform").cpu()
    assert torch.equal(got, want)
    rows = noise_like(backend, row_major(17, 241, device=device), seed, torch.arange(17, device=device) > 0, "uniform")
    assert torch.equal(rows.cpu(), torch.where(torch.arange(17)[:, None] > 0, want.view(17, 241), 0.0))


def test_uniform_distribution(backend: ModuleType, device: torch.device, large_tiles: None) -> None:
    """Of 10^6; of fewer where they are interpreted, which have the same bits."""
    interpreted = backend.name == "triton" and triton_launch.INTERPRETED
    count = 100_000 if interpreted else 1_000_000
    sample = noise_like(backend, row_major(count, device=device), 42, None, "uniform").cpu().double().numpy()
    edge = math.sqrt(3)
    assert stats.kstest(sample, "uniform", args=(-edge, 2 * edge)).pvalue > 1e-3
    assert 0.9999 * edge < np.abs(sample).max() < 1.0000001 * edge
    assert abs(sample.mean()) < 4 / math.sqrt(count)
    assert abs(sample.std() - 1) < 3 / math.sqrt(count)
    lanes = sample.reshape(-1, 4)
    correlation = np.corrcoef(np.concatenate([lanes[:-1], lanes[1:]], axis=1).T)
    assert np.abs(correlation - np.eye(8)).max() < 10 / math.sqrt(count)


def test_uniform_distribution_of_pytorch() -> None:
    sample = noise.draw_noise(torch.empty(1_000_000), None, "uniform").double().numpy()
    assert stats.kstest(sample, "uniform", args=(-math.sqrt(3), 2 * math.sqrt(3))).pvalue > 1e-3


def test_seeds_and_rows_are_independent(backend: ModuleType, device: torch.device, large_tiles: None) -> None:
    noise = (
        torch.stack([noise_like(backend, row_major(64, 1024, device=device), seed) for seed in range(8)]).cpu().double()
    )
    rows = noise.flatten(0, 1).numpy()
    correlation = np.corrcoef(rows)
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 5.5 / np.sqrt(1024)
    columns = np.corrcoef(noise.flatten(1).numpy())
    assert np.abs(columns - np.eye(8)).max() < 4.5 / np.sqrt(65536)


@pytest.mark.parametrize("width", [30, *exhaustively(768, 7, 1)])
def test_pure_function_of_the_index(width: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    """The same values under another shape, stride, mask or kernel."""
    rows = 24
    flat = noise_like(backend, row_major(rows * width, device=device), 7)
    shaped = flat.view(2, 3, 4, width)
    assert torch.equal(noise_like(backend, row_major(rows, width, device=device), 7).flatten(), flat)
    assert torch.equal(noise_like(backend, row_major(2, 3, 4, width, device=device), 7), shaped)

    seed = torch.tensor([7], device=device)
    strided = row_major(4, 2, 3, width, device=device).permute(1, 2, 0, 3)
    assert torch.equal(backend.perturb(strided, seed, 1.0, None, False, None)[0], shaped)
    mask = torch.rand(2, 3, 4, device=device) < 0.5
    masked = backend.perturb(strided, seed, 1.0, mask, False, None)[0]
    assert torch.equal(masked, torch.where(mask.unsqueeze(-1), shaped, 0.0))


def test_another_block_size(monkeypatch: pytest.MonkeyPatch, backend: ModuleType, device: torch.device) -> None:
    from smart_fast.kernels import launch

    embed = row_major(5, 100, device=device)
    before = noise_like(backend, embed, 3)
    masked = noise_like(backend, embed, 3, torch.ones(5, dtype=torch.bool, device=device))
    monkeypatch.setattr(launch, "stream_tile", lambda count: launch.Tile(1, 64, -(-count // 64), 1))
    monkeypatch.setattr(launch, "flat_tile", lambda width: launch.Tile(2, 32, -(-width // 32), 1))
    assert torch.equal(noise_like(backend, embed, 3), before)
    assert torch.equal(noise_like(backend, embed, 3, torch.ones(5, dtype=torch.bool, device=device)), masked)
    assert torch.equal(before, masked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_added_in_fp32(dtype: torch.dtype, backend: ModuleType, device: torch.device, poison: None) -> None:
    embed = torch.randn(6, 20, device=device).to(dtype)
    seed = torch.tensor([5], device=device)
    got = backend.perturb(embed, seed, 0.1, None, False, None)[0]
    exact = embed.cpu().double() + 0.1 * torch.from_numpy(oracle.philox_normal(5, 120)).view(6, 20)
    ulp = {torch.float32: 2**-23, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    assert got.dtype == dtype
    assert ((got.cpu().double() - exact).abs() <= ulp * exact.abs() + 1e-7).all()


@pytest.mark.exhaustive
@pytest.mark.parametrize("width", [1, 7, 768, 1500])
def test_units_scale_the_noise_of_rows(width: int, backend: ModuleType, device: torch.device, poison: None) -> None:
    embed, seed = torch.randn(4, 2, 3, width, device=device).permute(1, 2, 0, 3), torch.tensor([5], device=device)
    unit = torch.rand(2, 3, 4, 1, device=device)
    unit[0, 0, 0] = 0.0
    mask = torch.rand(2, 3, 4, device=device) < 0.5
    normal = torch.from_numpy(oracle.philox_normal(5, embed.numel())).view(embed.shape)
    for rows in (None, mask):
        got, _ = backend.perturb(embed, seed, 0.1, rows, False, unit)
        noise = 0.1 * unit.cpu().double() * normal
        noise = noise if rows is None else torch.where(rows.cpu().unsqueeze(-1), noise, 0.0)
        assert oracle.relative_error(got, embed.cpu().double() + noise) < 2e-7


@triton.jit
def _noise_from(seed_ptr, out_ptr, first, BLOCK: tl.constexpr, ALIGNED: tl.constexpr):
    start = tl.full((1, 1), 0, tl.int64) + first
    noise = noise_tile(tl.load(seed_ptr), start, 0, 1, BLOCK, ALIGNED)
    tl.store(out_ptr + tl.arange(0, BLOCK)[None, :], noise)


@pytest.mark.parametrize("first", [2**31, 2**34, 2**40 + 4, 2**40 + 3])
def test_beyond_32_bits(first: int, device: torch.device) -> None:
    """Counters have 64 bits: no tensor is long enough for its noise to repeat."""
    got = torch.empty(1, 16, device=device)
    _noise_from[(1,)](torch.tensor([9], device=device), got, first, BLOCK=16, ALIGNED=first % 4 == 0)
    want = oracle.philox_normal(9, 16, start=first)
    assert np.abs(got.cpu().double().numpy()[0] - want).max() < 2e-6


@triton.jit
def _unknown(seed_ptr, out_ptr):
    tl.store(
        out_ptr + tl.arange(0, 4)[None, :],
        noise_tile(tl.load(seed_ptr), tl.full((1, 1), 0, tl.int64), 0, 1, 4, True, NOISE="other"),
    )


UNKNOWN = """
#include "philox.h"
struct One { using F = float; using U = unsigned; };
void draw(float& x, float& y) { smart_fast::draw_noise<One, smart_fast::Noise(7)>(0u, 0u, 1.0f, x, y); }
"""


def test_every_language_knows_the_same_noises(native: Native) -> None:
    assert list(NOISES) == native.extension.built_with()["noises"] == list(noise.NOISES)


def test_unknown_noises_are_errors() -> None:
    with pytest.raises(ValueError, match=r"noise must be one of \['normal', 'uniform'\], got 'other'"):
        noise.draw_noise(torch.zeros(2), None, "other")
    seed = torch.ones(1, dtype=torch.int64, device="cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(Exception, match="unknown noise"):
        _unknown[(1,)](seed, torch.empty(4, device=seed.device))


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ on PATH")
def test_unknown_noises_do_not_compile(tmp_path: Path) -> None:
    (tmp_path / "unknown.cpp").write_text(UNKNOWN)
    command = ["g++", "-std=c++17", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(tmp_path / "unknown.cpp")]
    assert "unknown noise" in subprocess.run(command, capture_output=True, text=True, check=False).stderr


def test_seeds_follow_torch(backend: ModuleType, device: torch.device) -> None:
    embed = torch.zeros(3, 8, device=device)
    torch.manual_seed(0)
    first = autograd.perturb(backend, embed, 1.0, None, None, False, None)[0]
    second = autograd.perturb(backend, embed, 1.0, None, None, False, None)[0]
    torch.manual_seed(0)
    again = autograd.perturb(backend, embed, 1.0, None, None, False, None)[0]
    own = torch.Generator(device).manual_seed(9)
    state = torch.get_rng_state()
    private = autograd.perturb(backend, embed, 1.0, own, None, False, None)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert not torch.equal(first, private)
    assert torch.equal(torch.get_rng_state(), state)
