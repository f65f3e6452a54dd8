"""Counter-based noise: Philox-4x32, followed by Box-Muller where it is to be normal.

The counter map is the one thing every implementation must agree on. For a 64-bit seed and the logical (row-major)
index ``e`` of an element of the tensor that receives the noise:

    key     = (seed mod 2**32, seed >> 32)
    counter = (i mod 2**32, i >> 32, 0, 0)      with i = e // 4
    words   = Philox-4x32-7(counter, key)       four 32-bit words w0 … w3
    normal    n0, n1 = box_muller(w0, w1);  n2, n3 = box_muller(w2, w3)
    uniform   n0 … n3 = uniform(w0) … uniform(w3)
    noise   = n[e % 4]

Seven rounds are the fewest that pass BigCrush (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011,
table 2). Nothing depends on tiles, strides, grids or devices, so a block may be regenerated anywhere.
"""

import triton
import triton.language as tl

ROUNDS = tl.constexpr(7)
#: The initial noises that `noise4` knows, a row of `smart_fast.noise.NOISES` each. Any other name does not compile.
NOISES = ("normal", "uniform")


@triton.jit
def box_muller(word_a, word_b):
    """Two independent standard normals from two 32-bit words (Box & Muller, 1958).

    The radius uses 32 bits, u = fp32((a + 1/2) / 2**32): tails to 6.7 sigma. The angle is a quadrant and an offset in
    [-pi/4, pi/4), for which short polynomials are accurate to fp32 rounding: no range reduction, no local memory, and
    the same values on every device.
    """
    u = word_a.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10  # (a + 1/2) / 2**32, in (0, 1]
    radius = tl.sqrt(-1.3862943611198906 * tl.log2(u))  # sqrt(-2 log u)

    offset = (word_b & 0x3FFFFFFF).to(tl.int32) - 536870912
    theta = offset.to(tl.float32) * 1.4629180792671596e-09  # (pi / 2) / 2**30
    s = theta * theta
    sin = theta * (1.0 + s * (-1.0 / 6 + s * (1.0 / 120 + s * (-1.0 / 5040 + s * (1.0 / 362880)))))
    cos = 1.0 + s * (-0.5 + s * (1.0 / 24 + s * (-1.0 / 720 + s * (1.0 / 40320))))

    odd = (word_b & 0x40000000) != 0
    x = tl.where(odd, sin, cos)
    y = tl.where(odd, cos, sin)
    # Of the four quadrants x is negative in the second and third, y in the last two: as is the top bit of these words.
    return radius * _signed(x, word_b + 0x40000000), radius * _signed(y, word_b)


@triton.jit
def _signed(x, word):
    """x, its sign turned where the top bit of ``word`` is set."""
    return (x.to(tl.uint32, bitcast=True) ^ (word & 0x80000000)).to(tl.float32, bitcast=True)


@triton.jit
def uniform(word):
    """A number uniform on [-sqrt(3), sqrt(3)], so that its standard deviation is one: the word as a signed one, which
    is uniform on [-2**31, 2**31), in fp32, times sqrt(3) / 2**31. Two roundings, the same on every device."""
    return word.to(tl.int32, bitcast=True).to(tl.float32) * 8.065489942588044e-10


@triton.jit
def noise4(seed, group, NOISE: tl.constexpr):
    """The four numbers of each ``group`` = element index // 4 (int64 tensor), as four tensors of its shape."""
    low = group.to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    zero = low * 0
    a, b, c, d = tl.philox(seed, low, high, zero, zero, ROUNDS)
    if NOISE == "normal":
        n0, n1 = box_muller(a, b)
        n2, n3 = box_muller(c, d)
    elif NOISE == "uniform":
        n0, n1, n2, n3 = uniform(a), uniform(b), uniform(c), uniform(d)
    else:
        tl.static_assert(False, "unknown noise")
    return n0, n1, n2, n3


@triton.jit
def noise_tile(
    seed, first, block, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALIGNED: tl.constexpr, BITS: tl.constexpr = 32,
    NOISE: tl.constexpr = "normal",
):  # fmt: skip
    """Noise for a ``[ROWS, BLOCK]`` tile: columns ``block * BLOCK …`` of rows whose element index starts at ``first``.

    ``first``: int64 ``[ROWS, 1]``. ALIGNED (every ``first`` a multiple of four, BLOCK at least four) computes each
    counter once; otherwise groups straddle rows and every element computes its own. BITS of the dtype that the tile is
    added to: a thread that loads eight elements of 16 bits makes the noise of eight, so that none changes threads.
    """
    if ALIGNED and (BITS == 16 and BLOCK >= 8):
        pair = (first >> 2) + (block * (BLOCK // 4) + 2 * tl.arange(0, BLOCK // 8))[None, :]
        n0, n1, n2, n3 = noise4(seed, pair, NOISE)
        m0, m1, m2, m3 = noise4(seed, pair + 1, NOISE)
        even = tl.interleave(tl.interleave(n0, m0), tl.interleave(n2, m2))
        noise = tl.interleave(even, tl.interleave(tl.interleave(n1, m1), tl.interleave(n3, m3)))
    elif ALIGNED:
        group = (first >> 2) + (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))[None, :]
        n0, n1, n2, n3 = noise4(seed, group, NOISE)
        noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))
    else:
        index = first + (block * BLOCK + tl.arange(0, BLOCK))[None, :]
        n0, n1, n2, n3 = noise4(seed, index >> 2, NOISE)
        lane = index & 3
        noise = tl.where(lane == 0, n0, tl.where(lane == 1, n1, tl.where(lane == 2, n2, n3)))
    return noise
