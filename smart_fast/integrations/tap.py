"""What a model's modules return while it runs: read, or replaced by something else."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

__all__ = ["SIDES", "Seen", "Tap", "find", "input_embeddings", "own_embeddings", "sides"]

#: Whose input embeddings ``smart_embeddings`` may ask for, where a model has an encoder and a decoder.
SIDES = ("encoder", "decoder", "both")


class Seen(NamedTuple):
    """A call of a module, and what it returned: the first floating point tensor of it."""

    module: nn.Module
    output: Tensor


class Tap:
    """Reads what modules return, or returns something else in its place, wherever a model calls them.

    Hooks, not ``inputs_embeds=``: with input ids at hand models find their padding, their positions and the token to
    pool, which they cannot from embeddings (``LlamaForSequenceClassification`` would pool padding), and a sharded
    embedding is called where its shards are gathered. The hooks stay in place, since torch.compile does not notice
    hooks that come and go; `close` removes them.

    Args:
        modules: they return a tensor, or a structure whose first floating point tensor is meant.
        of_ids: only calls whose first tensor is one of integers count (a head may share the weight of an embedding).
    """

    def __init__(self, modules: Sequence[nn.Module], of_ids: bool) -> None:
        self._of_ids = of_ids
        self._seen: list[Seen] | None = None
        self._leaves = False
        self._replacements: Sequence[Tensor | None] = ()
        self._calls = 0
        self._handles = [each.register_forward_hook(self._hook, with_kwargs=True) for each in modules]

    def _hook(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._of_ids and not _takes_ids(args, kwargs):
            return output
        if self._seen is not None:
            if not torch.is_grad_enabled():
                return output
            found = _tensor_of(module, output)
            if self._leaves and not found.requires_grad:
                found = found.detach().requires_grad_()
                output = _with_tensor(output, found)
            self._seen.append(Seen(module, found))
            return output
        if not self._replacements:
            return output
        self._calls += 1
        new = self._replacements[self._calls - 1] if self._calls <= len(self._replacements) else None
        return output if new is None else _with_tensor(output, new)

    @contextlib.contextmanager
    def recording(self, leaves: bool = False) -> Iterator[list[Seen]]:
        """Within the context, calls that build a graph are appended to the list that it gives, in their order.

        ``leaves``: outputs without a graph (of frozen embeddings) become leaves that require grad.
        """
        seen: list[Seen] = []
        self._seen, self._leaves = seen, leaves
        try:
            yield seen
        finally:
            self._seen = None

    @contextlib.contextmanager
    def replacing(self, outputs: Sequence[Tensor | None]) -> Iterator[None]:
        """Within the context the calls of the modules return ``outputs``, one each; None: what they do return.

        Raises:
            RuntimeError: there were more or fewer calls.
        """
        self._replacements, self._calls = outputs, 0
        try:
            yield
            calls = self._calls
        finally:
            self._replacements = ()
        if calls != len(outputs):
            raise RuntimeError(
                f"the model called what is perturbed {calls} times in the perturbed pass, {len(outputs)} times in the"
                " clean one"
            )

    def close(self) -> None:
        for each in self._handles:
            each.remove()


def _takes_ids(args: Any, kwargs: Any) -> bool:
    first = next((each for each in tree_iter((args, kwargs)) if isinstance(each, Tensor)), None)
    return first is not None and not first.is_floating_point()


def _tensor_of(module: nn.Module, output: Any) -> Tensor:
    for each in (output,) if isinstance(output, Tensor) else tree_iter(output):
        if isinstance(each, Tensor) and each.is_floating_point():
            return each
    raise TypeError(f"{type(module).__name__}, which is to be perturbed, returns no floating point tensor")


def _with_tensor(output: Any, new: Tensor) -> Any:
    if isinstance(output, Tensor):
        return new
    leaves, structure = tree_flatten(output)
    place = next(i for i, each in enumerate(leaves) if isinstance(each, Tensor) and each.is_floating_point())
    return tree_unflatten([*leaves[:place], new, *leaves[place + 1 :]], structure)


def find(model: nn.Module, embeddings: Any) -> tuple[list[nn.Module], bool]:
    """The modules that ``embeddings`` asks for, and whether they are embeddings of input ids.

    Args:
        model: the model without wrappers.
        embeddings: None, one of `SIDES`: see `input_embeddings`; a module; or names of modules, separated by commas,
            as in ``named_modules()`` or the end of such a name (wrappers put their own in front).

    Raises:
        ValueError: a name that no module has, or several; a side of a model that has but one; see `input_embeddings`.
    """
    if isinstance(embeddings, nn.Module):
        return [embeddings], False
    if embeddings is None or embeddings in SIDES:
        if embeddings is not None and not is_encoder_decoder(model):
            raise ValueError(
                f"smart_embeddings={embeddings!r} is for encoder-decoder models, which {type(model).__name__} is not"
            )
        return input_embeddings(model), True
    return [_named(model, each.strip()) for each in embeddings.split(",")], False


def _named(model: nn.Module, name: str) -> nn.Module:
    modules = dict(model.named_modules())
    if name in modules:
        return modules[name]
    found = [path for path in modules if name and path.endswith(f".{name}")]
    if len(found) == 1:
        return modules[found[0]]
    what = f"is the end of several names: {', '.join(found)}" if found else "is the name of no module of the model"
    raise ValueError(f"smart_embeddings={name!r} {what} ({type(model).__name__}.named_modules() lists them)")


def input_embeddings(model: nn.Module) -> list[nn.Module]:
    """The modules that may embed the input ids of ``model``: its input embeddings, those of its encoder and decoder,
    and all modules that share their weights. Which of them it does call, a pass shows.

    Models that do not know theirs (of characters, say): modules with "embed" in their names, the outermost.

    Raises:
        ValueError: there are none.
    """
    parts = [model, *(part for side in ("encoder", "decoder") if (part := _part(model, side)) is not None)]
    found = [each for part in parts if isinstance(each := own_embeddings(part), nn.Module)]
    weights = {id(each.weight) for each in found if isinstance(getattr(each, "weight", None), Tensor)}
    if found:
        chosen = _outermost(
            model, lambda name, each: each in found or id(getattr(each, "weight", None)) in weights
        ) or found  # fmt: skip
    else:
        knows = own_embeddings(model) is None
        chosen = [] if knows else _outermost(model, lambda name, each: "embed" in name.rpartition(".")[2].lower())
    if not chosen:
        raise ValueError(
            f"{type(model).__name__} has no input embeddings (get_input_embeddings() gives None): name the module whose"
            " output is to be perturbed, smart_embeddings='path.to.module'"
        )
    return chosen


def own_embeddings(model: Any) -> Any:
    """What ``get_input_embeddings()`` gives; NotImplemented where it is not to be had."""
    try:
        return model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    # Both are what transformers raises for models without embeddings of tokens, or whose base model is not in place;
    # `find` then looks for modules by their names, or says what to name.
    except (NotImplementedError, AttributeError):
        return NotImplemented


def _outermost(model: nn.Module, wanted: Callable[[str, nn.Module], bool]) -> list[nn.Module]:
    """Modules that are ``wanted``, and not parts of others that are."""
    chosen: dict[str, nn.Module] = {}
    for name, each in model.named_modules():
        if name and wanted(name, each) and not any(name.startswith(f"{other}.") for other in chosen):
            chosen[name] = each
    return list(chosen.values())


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _part(model: Any, side: str) -> Any:
    """The encoder or the decoder of a model that has both."""
    if not is_encoder_decoder(model):
        return None
    with contextlib.suppress(AttributeError, NotImplementedError):  # models whose parts have other names: the whole
        part = getattr(model, f"get_{side}")()
        return None if part is model else part
    return None


def sides(model: nn.Module, seen: Sequence[Seen]) -> list[str]:
    """For each call of an embedding, whether it belongs to the "encoder" or the "decoder".

    Of a module that both share, or that neither has, the first call is taken for the encoder's.
    """
    if not is_encoder_decoder(model):
        return ["encoder"] * len(seen)
    members = {
        side: {id(each) for each in part.modules()} if isinstance(part := _part(model, side), nn.Module) else set()
        for side in ("encoder", "decoder")
    }
    found: list[str] = []
    for each in seen:
        of = [side for side, ids in members.items() if id(each.module) in ids]
        found.append(of[0] if len(of) == 1 else "decoder" if "encoder" in found else "encoder")
    return found
