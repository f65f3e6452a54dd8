"""Launchers of the Triton kernels, and the operators ``torch.ops.smart_fast.*`` that torch.compile sees.

Each launcher is written once over ``kernel``: the plain kernel in eager mode, `torch.library.wrap_triton` of it inside
the registered operator. Under TRITON_INTERPRET=1 the operator is opaque (`custom_op`), since interpreted kernels cannot
be traced. Operators return tensors only; an empty one stands for "not wanted".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, triton_op, wrap_triton
from triton.runtime import JITFunction

from ..kernels import launch, tuning
from ..kernels.ascend import NORMS, UPDATES, ascend_kernel, norm_kernel
from ..kernels.divergence import (
    divergence_backward_elementwise_kernel,
    divergence_backward_kernel,
    divergence_forward_kernel,
)
from ..kernels.divergence_formulas import KINDS, WITH_MOMENTS
from ..kernels.divergence_split import (
    divergence_collect_kernel,
    divergence_finish_kernel,
    divergence_merge_kernel,
    divergence_parts_kernel,
)
from ..kernels.fisher import fisher_direction_kernel
from ..kernels.perturb import perturb_kernel
from ..kernels.philox import NOISES
from .base import PARTS, STATISTICS, Rows, as_rows
from .steps import (
    fake_ascend,
    fake_ascend_norm,
    fake_divergence_backward,
    fake_divergence_finish,
    fake_divergence_forward,
    fake_divergence_parts,
    fake_fisher_direction,
)
from .triton_plan import new_output, total

INTERPRETED = not isinstance(perturb_kernel, JITFunction)  # asked in this way, it takes no numpy
MIN_SKEWED = 256  # narrower rows come several to a program
MAX_GROUP = 4096  # partial norms one program reduces; longer groups are reduced by torch first

Wrap = Callable[[Any], Any]


def _plain(kernel: Any) -> Any:
    return kernel


def _known(what: str, name: str, known: tuple[str, ...]) -> None:
    """Raises for what would not compile. The compiler's own error shows a line of a kernel."""
    if name not in known:
        raise ValueError(f"the Triton kernels know no {what} {name!r}, only {', '.join(known)}")


def _resources(tile: launch.Tile, wrap: Wrap) -> dict[str, int]:
    """Launch options. Left alone, ptxas spills a few bytes where that rounds the occupancy up. A register limit that
    hardly is one (128 x 512 threads fill a multiprocessor) keeps it from that. HIP has none, Inductor passes none on.
    """
    options = {"num_warps": tile.warps}
    if wrap is not wrap_triton and torch.version.hip is None:
        options["maxnreg"] = 128 if tile.warps <= 16 else 64
    return options


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; of an H100 where nothing is known (interpreted, compiled for elsewhere)."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return 132


def device_name(device: torch.device) -> str:
    """What a table of launch choices calls ``device``. Interpreted kernels run on a device called "cpu"."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if device.type == "xpu" and torch.xpu.is_available():
        return torch.xpu.get_device_name(device)
    return device.type


@functools.cache
def _table(device: torch.device) -> tuning.Table | None:
    return tuning.load(device_name(device))


def _choice(kernel: str, width: int, tensor: Tensor) -> launch.Choice | None:
    if tuning.overriding:
        return tuning.overriding.get(kernel)
    table = _table(tensor.device)
    return None if table is None else table.find(kernel, width, tensor.dtype.itemsize)


def _tile(kernel: str, width: int, tensor: Tensor) -> launch.Tile:
    """What was measured for a kernel of `tuning.KERNELS` at the width and dtype of ``tensor``, or the default."""
    choice = _choice(kernel, width, tensor)
    return launch.DEFAULTS[kernel](width) if choice is None else launch.chosen_tile(choice, width)


def _split_tile(rows: Rows, skew: int) -> tuple[launch.Tile, int]:
    """The tile for divergences of these rows, and how many programs share one."""
    tensor = rows.tensors[0]
    width = tensor.shape[-1]
    choice, processors = _choice("divergence_split", width, tensor), _processors(tensor.device)
    if choice is None:
        tile = launch.split_tile(rows.count, width, processors)
    else:
        tile = launch.split_tile(rows.count, width, processors, choice)
    if launch.splits(tile, width) == 1:
        return launch.covering(tile, width, skew), 1
    return tile, launch.splits(tile, launch.span(width, skew))


def _skew(rows: Rows) -> int:
    """What `skewed` of the kernels takes: the elements of 16 bytes where rows of whole tensors begin within them, or 0.

    Loads must stay within the tensors, hence the question for the number of elements.
    """
    x, t = rows.tensors[:2]
    width = x.shape[-1]
    size = 16 // x.dtype.itemsize
    dense = (width, 0, 0)
    if width < MIN_SKEWED or width % size == 0 or rows.count * width % size != 0 or x.dtype != t.dtype:
        return 0
    return size if rows.strides[0] == dense and rows.strides[1] == dense else 0


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.reshape(-1).contiguous().view(torch.uint8)


def _flags(mask: Tensor | None, unit: Tensor | None, width: int) -> dict[str, bool]:
    return {"MASKED": mask is not None, "IN_UNITS": unit is not None, "ALIGNED": _aligned(width)}


def _aligned(width: int) -> bool:
    return width % 4 == 0


def perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, unit: Tensor | None, noise_kind: str = "normal",
    wrap: Wrap = _plain,
) -> Tensor:  # fmt: skip
    """See `Backend.perturb`."""
    _known("noise", noise_kind, NOISES)
    out = new_output(embed.shape, embed.dtype, embed.device)
    width = embed.shape[-1]
    rows = as_rows(embed)
    if mask is None and unit is None and rows.tensors[0].is_contiguous():
        # One long row: the element index is what counts, so that any width is aligned.
        rows = Rows(1, 1, 1, rows.tensors, ((0, 0, 0),))
        width = embed.numel()
        tile = _tile("perturb_stream", width, embed)
    else:
        tile = _tile("perturb", width, embed)
    wrap(perturb_kernel)[(launch.grid(tile, rows.count, whole_rows=False),)](
        rows.tensors[0], seed, _bytes(mask), unit, out, rows.count, width, rows.size1, rows.size2, *rows.strides[0],
        noise_var, MASKED=mask is not None, IN_UNITS=unit is not None, ALIGNED=rows.count == 1 or _aligned(width),
        ROWS=tile.rows, BLOCK=tile.block, NOISE=noise_kind, **_resources(tile, wrap),
    )  # fmt: skip
    return out


def _grouped(norm: Tensor, group: int, kind: str, update: str) -> tuple[Tensor, int]:
    """Partial norms, and how many consecutive ones a program folds: of a long group one, what is folded here."""
    if group <= MAX_GROUP:
        return norm, group
    rows = norm.view(-1, group)
    if kind == "inf":
        folded = rows.amax(1)
    elif kind == "l2" and update == "paper":  # of norms: squares of what the largest of them has divided
        peak = rows.amax(1, keepdim=True).clamp(1e-37, 1e37)
        folded = peak.squeeze(1) * torch.linalg.vector_norm(rows / peak, dim=1)
    else:
        folded = rows.sum(1)
    return folded.repeat_interleave(group), 1


def ascend_norm(
    grad: Tensor, noise: Tensor, norm: Tensor | None, mask: Tensor | None, unit: Tensor | None, kind: str,
    noise_var: float, step_size: float, update: str, noise_kind: str = "normal", wrap: Wrap = _plain,
) -> Tensor:  # fmt: skip
    """What the norm is taken of (fp32 like ``grad``, kind "opaque"), or its partial norm per row (fp32 ``[N]``).

    For paper that is the gradient, or, given its partial ``norm`` per row, grouped by the first dimension, what will be
    projected.
    """
    _known("norm", kind, (*NORMS, "opaque"))
    _known("update", update, UPDATES)
    _known("noise", noise_kind, NOISES)
    width = grad.shape[-1]
    rows = as_rows(grad)
    shape = grad.shape if kind == "opaque" else (rows.count,)
    out = new_output(shape, torch.float32, grad.device)
    norm, group = (None, 1) if norm is None else _grouped(norm, rows.count // grad.shape[0], kind, update)
    tile = _tile("ascend_norm", width, grad)
    from_seed = noise.dtype == torch.int64
    wrap(norm_kernel)[(launch.grid(tile, rows.count, whole_rows=True),)](
        rows.tensors[0], noise, noise if from_seed else rows.tensors[0], norm, _bytes(mask), unit, out, rows.count,
        width, rows.size1, rows.size2, *rows.strides[0], group, noise_var, step_size, UPDATE=update, NORM=kind,
        GIVEN=norm is not None, GROUP_BLOCK=launch.next_power_of_two(group), NOISE=noise_kind if from_seed else "kept",
        **_flags(mask, unit, width), ROWS=tile.rows, BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages,
        **_resources(tile, wrap),
    )  # fmt: skip
    return out


def ascend(
    embed: Tensor, grad: Tensor, noise: Tensor, norm: Tensor | None, moved_norm: Tensor | None, mask: Tensor | None,
    unit: Tensor | None, kind: str, scope: str, noise_var: float, step_size: float, update: str, epsilon: float,
    keep_noise: bool, noise_kind: str = "normal", wrap: Wrap = _plain,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `Backend.ascend`. ``scope`` "row" needs no ``norm``; "group" takes the partial norms of
    `ascend_norm`, grouped by the first dimension, for paper and "l2" also those of what is projected, ``moved_norm``;
    "given" one norm per row.
    """
    _known("norm", kind, NORMS)
    _known("update", update, UPDATES)
    _known("noise", noise_kind, NOISES)
    width = embed.shape[-1]
    rows = as_rows(embed, grad)
    group = 1
    if scope == "group":
        assert norm is not None
        members = rows.count // embed.shape[0]
        norm, group = _grouped(norm, members, kind, update)
        moved_norm = None if moved_norm is None else _grouped(moved_norm, members, kind, update)[0]
    out = new_output(embed.shape, embed.dtype, embed.device)
    noise_out = new_output(embed.shape if keep_noise else (0,), torch.float32, embed.device)
    tile = _tile("ascend", width, embed)
    from_seed = noise.dtype == torch.int64
    wrap(ascend_kernel)[(launch.grid(tile, rows.count, whole_rows=True),)](
        *rows.tensors, noise, noise if from_seed else rows.tensors[0], norm, moved_norm, _bytes(mask), unit, out,
        noise_out, rows.count, width, rows.size1, rows.size2, *rows.strides[0], *rows.strides[1], group, noise_var,
        step_size, epsilon, UPDATE=update, NORM=kind, SCOPE=scope, GROUP_BLOCK=launch.next_power_of_two(group),
        NOISE=noise_kind if from_seed else "kept", KEEP_NOISE=keep_noise, **_flags(mask, unit, width),
        ROWS=tile.rows, BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
    )  # fmt: skip
    return out, noise_out


def _loads(mask: Tensor | None, scale: float, from_difference: bool) -> dict[str, bool]:
    return {"MASKED": mask is not None, "FROM_DIFFERENCE": from_difference, "SCALED": scale != 1.0}


def divergence_forward(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, from_difference: bool, keep: bool, wrap: Wrap = _plain,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `Backend.divergence_forward`."""
    _known("divergence", kind, KINDS)
    width = input.shape[-1]
    rows = as_rows(input, target)
    skew = 0 if output == "terms" else _skew(rows)
    tile, splits = _split_tile(rows, skew)
    if splits == 1:
        tile = launch.covering(_tile("divergence_forward", width, input), width, skew)
        measured = _choice("divergence_forward", width, input) is not None
        if output == "sum" and not measured and type(rows.count) is int:  # a symbolic number of rows stays one
            tile = launch.together(tile, rows.count)
    merge = launch.merge_tile(splits)
    last = launch.grid(tile if splits == 1 else merge, rows.count, whole_rows=True)
    form = "rows" if output == "sum" and last > 1 else output  # a single program adds the rows as well
    dtype = torch.promote_types(input.dtype, target.dtype) if output == "terms" else torch.float32
    shape = {"terms": input.shape, "rows": input.shape[:-1], "sum": ()}
    out = new_output((rows.count,) if form != output else shape[output], dtype, input.device)
    stats = new_output((rows.count, STATISTICS) if keep else (0,), torch.float32, input.device)
    if splits == 1:
        moments = 0 if output == "terms" else WITH_MOMENTS.get(kind, 0)
        wrap(divergence_forward_kernel)[(last,)](
            *rows.tensors, _bytes(mask), out, stats, rows.count, width, rows.size1, rows.size2, *rows.strides[0],
            *rows.strides[1], alpha, weight, scale, KIND=kind, OUTPUT=form, SKEW=skew,
            MOMENTS=moments, KEEP=keep, **_loads(mask, scale, from_difference),
            ROWS=tile.rows, BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
        )  # fmt: skip
    else:
        shared = tile, splits, skew
        partials = _parts(rows, mask, *shared, scale, from_difference, wrap)
        terms = out if output == "terms" else None
        sums = _finish(rows, mask, *shared, partials, stats, terms, kind, alpha, scale, from_difference, keep, wrap)
        if keep or output != "terms":
            wrap(divergence_collect_kernel)[(last,)](
                sums, out, stats, rows.count, splits, alpha, weight, KIND=kind, OUTPUT=form, KEEP=keep,
                SPLITS=merge.block, ROWS=merge.rows, **_resources(merge, wrap),
            )  # fmt: skip
    return total(out) if form != output else out, stats


def _parts(
    rows: Rows, mask: Tensor | None, tile: launch.Tile, splits: int, skew: int, scale: float, from_difference: bool,
    wrap: Wrap,
) -> Tensor:  # fmt: skip
    """Partial statistics, fp32 ``[rows, splits, PARTS]``."""
    width = rows.tensors[0].shape[-1]
    partials = new_output((rows.count, splits, PARTS), torch.float32, rows.tensors[0].device)
    wrap(divergence_parts_kernel)[(launch.grid(tile, rows.count, whole_rows=True) * splits,)](
        *rows.tensors, _bytes(mask), partials, rows.count, width, splits, rows.size1, rows.size2, *rows.strides[0],
        *rows.strides[1], scale, **_loads(mask, scale, from_difference), SKEW=skew, ROWS=tile.rows, BLOCK=tile.block,
        BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
    )  # fmt: skip
    return partials


def _finish(
    rows: Rows, mask: Tensor | None, tile: launch.Tile, splits: int, skew: int, partials: Tensor | None, stats: Tensor,
    terms: Tensor | None, kind: str, alpha: float, scale: float, from_difference: bool, keep: bool, wrap: Wrap,
) -> Tensor:  # fmt: skip
    """Parts of the row sums, fp32 ``[rows, splits, 2]``, from partial statistics or, without them, from ``stats``."""
    width = rows.tensors[0].shape[-1]
    sums = new_output((rows.count, splits, 2), torch.float32, rows.tensors[0].device)
    wrap(divergence_finish_kernel)[(launch.grid(tile, rows.count, whole_rows=True) * splits,)](
        *rows.tensors, _bytes(mask), partials, stats, terms, sums, rows.count, width, splits, rows.size1,
        rows.size2, *rows.strides[0], *rows.strides[1], alpha, scale, KIND=kind,
        OUTPUT="rows" if terms is None else "terms", **_loads(mask, scale, from_difference), SKEW=skew,
        MERGE=partials is not None, KEEP=keep, SPLITS=1 if partials is None else launch.next_power_of_two(splits),
        ROWS=tile.rows, BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
    )  # fmt: skip
    return sums


def divergence_parts(
    input: Tensor, target: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float, weight: float,
    scale: float, from_difference: bool, wrap: Wrap = _plain,
) -> Tensor:  # fmt: skip
    """See `Backend.divergence_parts`."""
    _known("divergence", kind, KINDS)
    rows = as_rows(input, target)
    skew = _skew(rows)
    tile, splits = _split_tile(rows, skew)
    partials = _parts(rows, mask, tile, splits, skew, scale, from_difference, wrap)
    if splits == 1:
        return partials.view(rows.count, PARTS)
    merged = new_output((rows.count, PARTS), torch.float32, input.device)
    merge = launch.merge_tile(splits)
    wrap(divergence_merge_kernel)[(launch.grid(merge, rows.count, whole_rows=True),)](
        partials, merged, rows.count, splits, scale, SPLITS=merge.block, ROWS=merge.rows, **_resources(merge, wrap)
    )
    return merged


def divergence_finish(
    input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str, alpha: float,
    weight: float, scale: float, from_difference: bool, wrap: Wrap = _plain,
) -> Tensor:  # fmt: skip
    """See `Backend.divergence_finish`."""
    _known("divergence", kind, KINDS)
    rows = as_rows(input, target)
    skew = _skew(rows)
    tile, splits = _split_tile(rows, skew)
    given = None, stats.contiguous(), None
    sums = _finish(rows, mask, tile, splits, skew, *given, kind, alpha, scale, from_difference, False, wrap)
    if splits == 1:
        return sums.view(rows.count, 2)
    out = new_output((rows.count, 2), torch.float32, input.device)
    merge = launch.merge_tile(splits)
    wrap(divergence_collect_kernel)[(launch.grid(merge, rows.count, whole_rows=True),)](
        sums, out, out, rows.count, splits, alpha, 1.0, KIND=kind, OUTPUT="sums", KEEP=False, SPLITS=merge.block,
        ROWS=merge.rows, **_resources(merge, wrap),
    )  # fmt: skip
    return out


def divergence_backward(
    grad: Tensor, input: Tensor, target: Tensor, stats: Tensor, mask: Tensor | None, kind: str, output: str,
    alpha: float, weight: float, scale: float, from_difference: bool, want_input: bool, want_target: bool,
    wrap: Wrap = _plain,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `Backend.divergence_backward`."""
    _known("divergence", kind, KINDS)
    width, stats = input.shape[-1], stats.contiguous()
    dx = new_output(input.shape if want_input else (0,), input.dtype, input.device)
    dt = new_output(target.shape if want_target else (0,), target.dtype, target.device)
    flags = {"KIND": kind, "WANT_X": want_input, "WANT_T": want_target, **_loads(mask, scale, from_difference)}
    if output == "terms":
        rows = as_rows(input, target, free=grad)  # often expanded: any strides will do
        tile = _tile("divergence_backward_elementwise", width, input)
        wrap(divergence_backward_elementwise_kernel)[(launch.grid(tile, rows.count, whole_rows=True),)](
            rows.tensors[2], *rows.tensors[:2], _bytes(mask), stats, dx, dt, rows.count, width, rows.size1, rows.size2,
            *rows.strides[0], *rows.strides[1], *rows.strides[2], rows.tensors[2].stride(-1), alpha, scale, **flags,
            ROWS=tile.rows, BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
        )  # fmt: skip
        return dx, dt
    if output == "rows":
        rows = as_rows(input, target, free=grad.unsqueeze(-1).expand(input.shape))
        grad, grad_strides = rows.tensors[2], rows.strides[2]
    else:
        rows, grad_strides = as_rows(input, target), (0, 0, 0)
    tile, skew = _tile("divergence_backward", width, input), _skew(rows)
    tile = launch.covering(tile, width, skew + 1 if skew else 0)
    wrap(divergence_backward_kernel)[(launch.grid(tile, rows.count, whole_rows=False),)](
        grad, *rows.tensors[:2], _bytes(mask), stats, dx, dt, rows.count, width, rows.size1, rows.size2,
        *rows.strides[0], *rows.strides[1], *grad_strides, alpha, weight * scale, scale, **flags, SKEW=skew,
        ROWS=tile.rows, BLOCK=tile.block, **_resources(tile, wrap),
    )  # fmt: skip
    return dx, dt


def fisher_direction(logits: Tensor, wide: bool, wrap: Wrap = _plain) -> Tensor:
    """See `Backend.fisher_direction`."""
    width = logits.shape[-1]
    rows = as_rows(logits)
    out = new_output(logits.shape, torch.float32 if wide else logits.dtype, logits.device)
    tile = _tile("fisher_direction", width, logits)
    wrap(fisher_direction_kernel)[(launch.grid(tile, rows.count, whole_rows=True),)](
        rows.tensors[0], out, rows.count, width, rows.size1, rows.size2, *rows.strides[0], ROWS=tile.rows,
        BLOCK=tile.block, BLOCKS=tile.blocks, STAGES=tile.stages, **_resources(tile, wrap),
    )  # fmt: skip
    return out


def _fake_perturb(
    embed: Tensor, seed: Tensor, noise_var: float, mask: Tensor | None, unit: Tensor | None, noise_kind: str = "normal"
) -> Tensor:
    return new_output(embed.shape, embed.dtype, embed.device)


def _register(function: Callable[..., Any], fake: Callable[..., Any]) -> None:
    qualified = f"smart_fast::{function.__name__}"
    if INTERPRETED:
        schema = torch.library.infer_schema(fake, mutates_args=())
        custom_op(qualified, function, mutates_args=(), schema=schema).register_fake(fake)
        return

    # The schema is read from the signature, which must not show `wrap`: that of the fake is the operator's own.
    @functools.wraps(fake)
    def traced(*args: Any) -> Any:
        return function(*args, wrap=wrap_triton)

    triton_op(qualified, traced, mutates_args=())


_register(perturb, _fake_perturb)
_register(ascend_norm, fake_ascend_norm)
_register(ascend, fake_ascend)
_register(divergence_forward, fake_divergence_forward)
_register(divergence_backward, fake_divergence_backward)
_register(divergence_parts, fake_divergence_parts)
_register(divergence_finish, fake_divergence_finish)
_register(fisher_direction, fake_fisher_direction)
