"""Hooked copies of a network in memory that share its weights and leave it unchanged.

TransformerLens wraps in place: its components replace a network's modules, and the weights are
renamed. So it wraps a copy of the module tree here, which holds the same parameter and buffer
objects. The copy sees every change of the network (a training step, `load_state_dict`, `to`).

Where TransformerLens splits a joint projection (GPT-2, GPT-NeoX, Phi-3), the bridge has further
parameters: views of the joint ones, or copies. Copies are made again when the joint weights have
changed, and written back if they were trained through the bridge. Before every forward, weights
are compared by identity, version, address and a few values; before every call of lensclust, by
all values, together with the network's constants, hooks and forwards.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake
from transformer_lens.model_bridge import TransformerBridge

from lensclust.arguments import checked_arguments
from lensclust.errors import InputError
from lensclust.models.added_code import AddedCode, added_code
from lensclust.models.in_place import run_again, tried_copy, writes_its_weights
from lensclust.models.marks import mark, sampled
from lensclust.models.network_settings import note_written, plain_settings, rewritten
from lensclust.storage import difference

_log = logging.getLogger(__name__)

# The attribute of a bridge that holds its `Link` to the given network.
_LINK = "_lensclust_link"
_BRIDGES: WeakKeyDictionary[nn.Module, WeakSet[TransformerBridge]] = WeakKeyDictionary()

Marks = list[tuple[int, int, int]]


def wrapped_copy(
    own: nn.Module,
    wrap: Callable[[nn.Module], TransformerBridge],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> TransformerBridge:
    """A bridge around a copy of a network that shares its weights; the network is in eval mode.

    Args:
        wrap: makes a bridge of a network, in place.
        device, dtype: if these are not the network's, the copy has separate weights, and refuses
            to run once those of the network have changed; the same holds for a network whose
            forwards write into its weights.
    """
    weight = next(own.parameters(), torch.empty(0))
    place = weight.device if device is None else torch.device(device)
    apart = not _same_device(place, weight.device) or dtype not in (None, weight.dtype)
    # A hook that is a bound method would otherwise act on a copy of its object.
    memo: dict[int, Any] = {
        id(hook): hook
        for module in own.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    }
    shared = {id(tensor): tensor for tensor in chain(own.parameters(), own.buffers())}
    modes = [(module, module.training) for module in own.modules()]
    try:
        # The test copy shares weights and nothing else, and is discarded.
        tried = tried_copy(own, memo)
        writes = writes_its_weights(own, tried)
        if not apart and not writes:
            memo |= shared
        copied = copy.deepcopy(own, memo)
    except Exception as error:  # a module may hold anything
        _log.warning(
            "load: %s cannot be copied (%s) and is wrapped in place: its weights are renamed",
            type(own).__name__,
            error,
        )
        return remember(wrap(own), own)
    # What a first forward sets is a setting with two values; what each writes is none.
    before, first = plain_settings(own), plain_settings(tried)
    run_again(own, tried)
    second = plain_settings(tried)
    lazy = {name: value for name, value in first.items() if before.get(name) != value}
    for network in (own, copied):
        note_written(network, (name for name in second if second[name] != first.get(name)))
    if writes and not apart:
        _log.warning(
            "load: %s writes into its weights in its forwards: the bridge has a copy of them, "
            "and refuses to run once those of the network have changed",
            type(own).__name__,
        )
    if apart:
        copied.to(device=place, dtype=dtype)
    # Splitting a projection draws initial weights, which are discarded.
    with torch.random.fork_rng(devices=[]):
        bridge = wrap(copied)
    own.eval()
    modules = [(module, memo[id(module)]) for module, _ in modes]
    link = Link(own, copied, modules, modes, apart, bridge.cfg, _splits(bridge, modules), lazy)
    link.follow(bridge)
    link.note()
    copied.register_forward_pre_hook(link.before_forward)
    bridge.__dict__[_LINK] = link
    hooked = any(map(_is_ours, own._forward_pre_hooks.values()))
    if not hooked and any(not split.views for split in link.splits):
        own.register_forward_pre_hook(before_own_use)
        own.register_state_dict_pre_hook(before_own_use)
    return remember(bridge, own)


def remember(bridge: TransformerBridge, own: nn.Module) -> TransformerBridge:
    """Note that a bridge was made of a network, for `known_bridge`."""
    _BRIDGES.setdefault(own, WeakSet()).add(bridge)
    return bridge


def known_bridge(
    own: nn.Module, *, device: str | torch.device | None, dtype: torch.dtype | None
) -> TransformerBridge | None:
    """The existing bridge of a network, if it is still usable."""
    for bridge in _BRIDGES.get(own, ()):
        weight = next(bridge.original_model.parameters(), None)
        if weight is None or dtype not in (None, weight.dtype):
            continue
        if device is not None and not _same_device(torch.device(device), weight.device):
            continue
        link = _link(bridge)
        if link is None:
            return bridge
        # By default, a bridge must share the network's weights.
        if link.apart and (device, dtype) == (None, None):
            continue
        if not link.released and link.is_usable():
            return bridge
    return None


def keep_up(model: Any) -> None:
    """Synchronise a bridge with the weights of its network, bit for bit.

    Unlike the check before each forward, this compares copied weights by all their values: some
    edits (``weight.data[0] = 1``) leave no other trace.

    Weights that were trained through the bridge are written into the network.

    Raises:
        InputError: if that is impossible: the network has other modules, shapes, settings, hooks
            or forwards than when it was loaded, or was released.
    """
    if (link := _link(model)) is not None:
        link.keep_up(by_value=True)
        link.require_settings()
        link.write_back()


def modules_of(model: Any) -> list[nn.Module]:
    """All modules of a bridge's network, and of the network that was given to `lensclust.load`."""
    network = getattr(model, "original_model", model)
    found = list(network.modules()) if isinstance(network, nn.Module) else []
    if (link := _link(model)) is not None:
        found += link.own.modules()
    return found


def own_network(model: Any) -> nn.Module | None:
    """The network that a bridge was made of; None if it was not given in memory."""
    link = _link(model)
    return None if link is None else link.own


def followed_network(model: Any) -> nn.Module | None:
    """As `own_network`; None also if the bridge's weights differ from the network's."""
    link = _link(model)
    if link is None or link.released or link.has_other_weights(model):
        return None
    return link.own


@checked_arguments
def release(model: nn.Module) -> nn.Module:
    """Detach the network that was given to `lensclust.load` from its bridge and return it.

    Its weights include what was trained through the bridge. The bridge is unusable afterwards.
    Not needed to train, save or load the network: it can be used at any time.

    Args:
        model: the bridge, or the network itself.

    Raises:
        InputError: if a bridge is given that was not made of a network in memory.

    >>> import lensclust as lc
    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> network = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1))
    >>> model = lc.load(network)
    >>> lc.release(model) is network is lc.release(network)
    True
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"release: {type(model).__name__} given, expected what lc.load returned")
    if not isinstance(model, TransformerBridge):
        for bridge in list(_BRIDGES.get(model, ())):
            if (link := _link(bridge)) is not None:
                link.release()
        return model
    link = _link(model)
    if link is None:
        raise InputError(
            f"release: {model.cfg.model_name} was not made of a network in memory, or was wrapped "
            "in place: there is no network to give back"
        )
    link.release()
    return link.own


def before_own_use(module: nn.Module, *_: Any) -> None:
    """Write weights that were trained through a bridge into the network's joint weights."""
    for bridge in list(_BRIDGES.get(module, ())):
        if (link := _link(bridge)) is not None:
            link.write_back()


@dataclass(eq=False)
class Split:
    """A joint projection, and the parts into which TransformerLens split it.

    Attributes:
        module: the network's module that holds the joint projection.
        split: splits it into parts.
        parts: the parts that the bridge runs.
        joint: names of the split parameters in that module.
        views: whether all parts share the memory of the joint weights.
        ahead: the parts were trained and not yet written into the joint weights.
    """

    module: nn.Module
    split: Callable[[nn.Module], Sequence[nn.Module]]
    parts: list[nn.Module]
    joint: list[str]
    views: bool = False
    ahead: bool = False
    _sources: Marks = field(default_factory=list)
    _made: Marks = field(default_factory=list)
    _sources_digest: list[bytes | Tensor] = field(default_factory=list)
    _made_digest: list[bytes | Tensor] = field(default_factory=list)
    _sample: Tensor = field(default_factory=lambda: torch.empty(0))

    def note(self) -> None:
        self.views = self._share_memory()
        self._sources, self._made = self._marks_now()
        if not self.views:
            self._sources_digest = _digests(self._joint())
            self._made_digest = _digests(self._copies())
            self._sample = sampled(self._joint())

    def settle(self, name: str, *, by_value: bool = False) -> None:
        """Bring the parts up to date."""
        sources, made = self._marks_now()
        if not self.views and not by_value and sources == self._sources and made == self._made:
            # Most edits that leave the version unchanged (a swap of averages) change the sample.
            by_value = not torch.equal(sampled(self._joint()), self._sample)
        if sources == self._sources and made == self._made and (self.views or not by_value):
            return
        if self.views:
            if not self._share_memory():  # one of them was moved or cast
                self._take(self._fresh())
            return self.note()
        if sources == self._sources and made != self._made and not by_value:
            self.ahead, self._made = True, made
            return None
        fresh = self._fresh()
        if _equal(fresh, self.parts):
            self.ahead = False
            return self.note()
        # Which of the two has changed since they last agreed?
        if not _alike(_digests(self._copies()), self._made_digest):
            if not _alike(_digests(self._joint()), self._sources_digest):
                raise InputError(
                    f"{name}: joint projections were changed both in the network and through the "
                    "bridge, expected one of the two: load the network again"
                )
            self.ahead, self._sources, self._made = True, sources, made
            return None
        self.ahead = False
        self._take(fresh)
        return self.note()

    def write_back(self, name: str) -> None:
        """Write the values of trained parts into the joint weights."""
        if not self.ahead and self._marks_now()[1] == self._made:
            return
        self.settle(name)
        if not self.ahead:
            return
        # Splitting a tensor of indices shows where each part's weights come from.
        weights = {id(weight): weight for weight in self._joint()}
        before = [weight.detach().clone() for weight in weights.values()]
        memo: dict[int, Any] = {id(weight): weight for weight in self.module.parameters()}
        starts, total = {}, 0
        for key, weight in weights.items():
            numbers = torch.arange(total, total + weight.numel(), dtype=torch.float64)
            memo[key] = nn.Parameter(numbers.view(weight.shape))
            starts[key], total = total, total + weight.numel()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            numbered = self.split(copy.deepcopy(self.module, memo))
            for numbers, values in zip(_tensors(numbered), _tensors(self.parts), strict=True):
                index = numbers.long().reshape(-1)
                for key, weight in weights.items():
                    here = (index >= starts[key]) & (index < starts[key] + weight.numel())
                    flat = weight.detach().clone().reshape(-1)
                    places = (index[here] - starts[key]).to(flat.device)
                    flat[places] = values.reshape(-1)[here.to(values.device)].to(flat)
                    weight.copy_(flat.view_as(weight))
        if not _equal(self._fresh(), self.parts):
            with torch.no_grad():
                for weight, values in zip(weights.values(), before, strict=True):
                    weight.copy_(values)
            raise InputError(
                f"{name}: weights trained through the bridge cannot be written into its joint "
                "projections, expected the network itself to be trained"
            )
        self.ahead = False
        self.note()

    def _marks_now(self) -> tuple[Marks, Marks]:
        version = not self.views
        sources = _marks(self._joint(), version)
        made = _tensors(self.parts) if self.views else self._copies()
        return sources, _marks(made, version)

    def _joint(self) -> list[nn.Parameter]:
        return [self.module.get_parameter(name) for name in self.joint]

    def is_there(self) -> bool:
        """Whether the joint weights are in the network now.

        Pruning renames them; `torch.func` and `torch.export` put other tensors in their place.
        """
        held = dict(self.module.named_parameters(remove_duplicate=False))
        there = [held.get(name) for name in self.joint]
        return all(isinstance(weight, nn.Parameter) and not is_fake(weight) for weight in there)

    def _share_memory(self) -> bool:
        return not self._copies()

    def _copies(self) -> list[Tensor]:
        """Weights of the parts that do not share memory with the joint weights."""
        storages = {weight.untyped_storage().data_ptr() for weight in self._joint()}
        return [
            each
            for each in _tensors(self.parts)
            if each.untyped_storage().data_ptr() not in storages
        ]

    def _fresh(self) -> Sequence[nn.Module]:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return self.split(self.module)

    def _take(self, fresh: Sequence[nn.Module]) -> None:
        for tensor, values in zip(_tensors(self.parts), _tensors(fresh), strict=True):
            tensor.data = values.detach()


@dataclass(eq=False)
class Link:
    """The link between a bridge and the network that it was made of.

    Attributes:
        own: the network.
        copied: the copy that the bridge wraps.
        modules: modules of the network, each with its copy.
        modes: which modules of the network were in training mode.
        apart: the copy has separate weights, on another device or in another precision.
        config: the bridge's configuration.
        splits: joint projections.
        lazy: settings after the network's first forward, where that sets them.
        detached: the bridge has weights that are not the network's.
    """

    own: nn.Module
    copied: nn.Module
    modules: list[tuple[nn.Module, nn.Module]]
    modes: list[tuple[nn.Module, bool]]
    apart: bool
    config: Any
    splits: list[Split]
    lazy: dict[str, Any]
    detached: bool = False
    released: bool = False
    owners: nn.Module | None = None
    _tree: list[tuple[nn.Module, list[Any]]] = field(default_factory=list)
    _slots: list[tuple[dict[str, Any], dict[str, Any], str, Any, Any]] = field(default_factory=list)
    _versions: Marks = field(default_factory=list)
    _sample: Tensor = field(default_factory=lambda: torch.empty(0))
    _digest: list[bytes | Tensor] = field(default_factory=list)
    _home: tuple[Any, Any] = (None, None)
    _shapes: list[Any] = field(default_factory=list)
    _settings: dict[str, Any] = field(default_factory=dict)
    _added: list[AddedCode] = field(default_factory=list)

    def note(self) -> None:
        """Record the network's present state as the one that the copy matches."""
        self._tree = [(module, list(module._modules.values())) for module, _ in self.modules]
        self._slots = [
            (held, held_by_copy, name, tensor, held_by_copy.get(name))
            for module, copied in self.modules
            for held, held_by_copy in (
                (module._parameters, copied._parameters),
                (module._buffers, copied._buffers),
            )
            for name, tensor in held.items()
        ]
        self._versions = self._versions_now()
        self._note_values()
        self._shapes = [slot[3].shape if slot[3] is not None else None for slot in self._slots]
        self._home = self._home_now()
        self._settings = plain_settings(self.own)
        self._added = added_code(self.own)
        for split in self.splits:
            split.note()

    def follow(self, bridge: TransformerBridge) -> None:
        """Determine whether all weights of a bridge can follow the network's."""
        self.owners = bridge._modules.get("_container_state_owners")
        self.detached = self.apart or self.has_other_weights(bridge)

    def has_other_weights(self, bridge: nn.Module) -> bool:
        """Whether a bridge runs with weights that are not the network's."""
        weights = {id(weight) for weight in self.own.parameters()}
        weights |= {id(each) for split in self.splits for each in _tensors(split.parts)}
        held = chain(bridge.parameters(), self.copied.parameters())
        return self.detached or any(id(weight) not in weights for weight in held)

    def is_usable(self) -> bool:
        """Whether the bridge is still usable."""
        try:
            self.keep_up()
            self.require_settings()
        except InputError:
            return False
        return True

    def require_settings(self) -> None:
        """Refuse a network whose constants, hooks or forwards have changed since it was copied.

        Raises:
            InputError: names the first of them.
        """
        now = plain_settings(self.own)
        for name, value in self.lazy.items():
            if now.get(name) == value and name in self._settings:
                now[name] = self._settings[name]
        if now != self._settings:
            raise InputError(
                f"{self.config.model_name}: the network has other settings than when it was "
                f"loaded ({difference(now, self._settings)[:200]}): load it again"
            )
        added, known = added_code(self.own), self._added
        changed = [*(each for each in added if each not in known)]
        changed += [each for each in known if each not in added]
        if changed:
            raise InputError(
                f"{self.config.model_name}: the network has other hooks or forwards than when it "
                f"was loaded ({changed[0]}): load it again"
            )

    def before_forward(self, *_: Any) -> None:
        self.keep_up()

    def keep_up(self, *, by_value: bool = False) -> None:
        """Apply the network's changes to the copy; as `lensclust.models.keep_up`."""
        try:
            self._keep_up(by_value)
        except RuntimeError as error:  # split projections of other shapes, found while copying
            reason = str(error).splitlines()[0]
            raise InputError(
                f"{self.config.model_name}: the network has other shapes than when it was loaded "
                f"({reason}): load it again"
            ) from error

    def _keep_up(self, by_value: bool) -> None:
        name = self.config.model_name
        if self.released:
            raise InputError(f"{name}: this bridge was released: load the network again")
        for module, children in self._tree:
            if list(module._modules.values()) != children:
                raise InputError(
                    f"{name}: the network has other modules than when it was loaded (in "
                    f"{_path(self.own, module)}): load it again"
                )
        stale = [
            slot
            for slot in self._slots
            if slot[0].get(slot[2]) is not slot[3] or slot[1].get(slot[2]) is not slot[4]
        ]
        # Parameters whose contents were replaced in place.
        for slot, shape in zip(self._slots, self._shapes, strict=True):
            if slot[3] is not None and shape is not None and slot[3].shape != shape:
                raise InputError(
                    f"{name}: {slot[2]!r} of shape {tuple(slot[3].shape)} was {tuple(shape)} when "
                    "the network was loaded: load it again"
                )
        if stale:
            self._replace(stale, name)
        if self.detached and self._has_moved(by_value):
            raise InputError(
                f"{name}: the network has changed, but this bridge has separate weights (folded, "
                "converted or cast), which cannot follow: load the network again"
            )
        if self._home_now() != self._home:
            self._move()
        if not self.detached:
            for split in self.splits:
                split.settle(name, by_value=by_value)
            self._versions = self._versions_now()

    def write_back(self) -> None:
        """Write weights that were trained through the bridge into the network."""
        if not self.detached and not self.released:
            for split in self.splits:
                if not split.views and split.is_there():
                    split.write_back(self.config.model_name)

    def release(self) -> None:
        if self.released:
            return
        self.write_back()
        self.released = True
        if not any(module.training for module, _ in self.modes):
            for module, training in self.modes:
                module.training = training
        if not any(_active(bridge) for bridge in _BRIDGES.get(self.own, ())):
            for hooks in (self.own._forward_pre_hooks, self.own._state_dict_pre_hooks):
                for key in [key for key, hook in hooks.items() if _is_ours(hook)]:
                    del hooks[key]

    def _replace(self, stale: list[Any], name: str) -> None:
        """Update the copy for tensors that were replaced by others."""
        tables: dict[int, set[str]] = {}
        for path in rewritten(self.own):
            owner, _, key = path.rpartition(".")
            tables.setdefault(id(self.own.get_submodule(owner)._buffers), set()).add(key)
        for held, held_by_copy, key, before, in_copy in stale:
            tensor, copied = held.get(key), held_by_copy.get(key)
            if tensor is before:
                # A buffer is often recomputed in a forward; another parameter means that the
                # bridge was given separate weights (`enable_compatibility_mode`).
                if isinstance(copied, nn.Parameter) or isinstance(in_copy, nn.Parameter):
                    if not self.detached:
                        self.detached = True
                        self._note_values()
                elif copied is not None and tensor is not None and copied.device != tensor.device:
                    held[key] = tensor.to(copied.device)
                continue
            shapes = ["none" if each is None else tuple(each.shape) for each in (before, tensor)]
            is_weight = isinstance(before, nn.Parameter) or isinstance(tensor, nn.Parameter)
            if is_weight and shapes[0] != shapes[1]:
                raise InputError(
                    f"{name}: {key!r} of shape {shapes[1]} was {shapes[0]} when the network was "
                    "loaded: load it again"
                )
            if tensor is not None and key in tables.get(id(held), ()):
                # The copy computes these itself, for the lengths that it is given.
                if copied is not None:
                    held_by_copy[key] = copied.to(tensor.device, tensor.dtype)
                continue
            held_by_copy[key] = tensor
        self._slots = [
            (held, held_by_copy, key, held.get(key), held_by_copy.get(key))
            for held, held_by_copy, key, *_ in self._slots
        ]
        for owner in () if self.owners is None else self.owners.modules():
            if (refresh := getattr(owner, "_refresh_from_original_container", None)) is not None:
                refresh()

    def _move(self) -> None:
        """Update the copy after the network was moved or cast."""
        dtype_before = self._home[1]
        self._home = device, dtype = self._home_now()
        self.config.device, self.config.dtype = str(device), dtype
        # Tensors that TransformerLens has added, such as a bias of zeros.
        for module, copied in self.modules:
            for name, buffer in copied._buffers.items():
                if name not in module._buffers and buffer is not None:
                    cast = dtype if buffer.dtype == dtype_before else buffer.dtype
                    copied._buffers[name] = buffer.to(device, cast)

    def _versions_now(self) -> Marks:
        parameters = (slot[0].get(slot[2]) for slot in self._slots)
        return _marks((each for each in parameters if isinstance(each, nn.Parameter)), True)

    def _note_values(self) -> None:
        """Record the network's values, for a bridge with separate weights."""
        if self.detached:
            self._sample = sampled(self._values())
            self._digest = _digests(list(self._values()))

    def _has_moved(self, by_value: bool) -> bool:
        """Whether the network's weights have changed since the bridge copied them."""
        if self._versions_now() != self._versions:
            return True
        if not torch.equal(sampled(self._values()), self._sample):
            return True
        return by_value and not _alike(_digests(list(self._values())), self._digest)

    def _values(self) -> Iterator[Tensor]:
        """The network's parameters and the buffers in its state dict."""
        for module, _ in self.modules:
            for name, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    yield tensor

    def _home_now(self) -> tuple[Any, Any]:
        weight = next(self.copied.parameters(), None)
        return (None, None) if weight is None else (weight.device, weight.dtype)


def _link(model: Any) -> Link | None:
    return getattr(model, "__dict__", {}).get(_LINK)


def _active(bridge: TransformerBridge) -> bool:
    link = _link(bridge)
    return link is not None and not link.released


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "hook", hook) is before_own_use


def _splits(
    bridge: TransformerBridge, modules: Sequence[tuple[nn.Module, nn.Module]]
) -> list[Split]:
    own = {id(copied): module for module, copied in modules}
    found: dict[int, Split] = {}
    for component in chain(bridge.modules(), bridge.original_model.modules()):
        known: Any = component
        module = own.get(id(getattr(known, "original_component", None)))
        if module is None or id(component) in found:
            continue
        for how, joint, names in (
            ("split_qkv_matrix", "qkv", ("q", "k", "v")),
            ("split_gate_up_matrix", "gate_up", ("gate", "in")),
        ):
            split: Any = getattr(known, how, None)
            parts: list[Any] = [
                getattr(getattr(known, name, None), "original_component", None) for name in names
            ]
            if split is not None and all(isinstance(part, nn.Module) for part in parts):
                others = {
                    id(weight)
                    for name, other in known.submodules.items()
                    if name not in (joint, *names)
                    for weight in other.parameters()
                }
                own_names = [n for n, w in module.named_parameters() if id(w) not in others]
                found[id(component)] = Split(module, split, parts, own_names)
    return list(found.values())


def _tensors(parts: Sequence[nn.Module]) -> list[Tensor]:
    return [tensor for part in parts for tensor in part.parameters()]


def _digests(tensors: Sequence[Tensor]) -> list[bytes | Tensor]:
    return [mark(tensor.detach()) for tensor in tensors]


def _equal(some: Sequence[nn.Module], others: Sequence[nn.Module]) -> bool:
    pairs = zip(_tensors(some), _tensors(others), strict=True)
    return all(a.dtype == b.dtype and a.device == b.device and torch.equal(a, b) for a, b in pairs)


def _alike(some: Sequence[bytes | Tensor], others: Sequence[bytes | Tensor]) -> bool:
    return len(some) == len(others) and all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a is b or a == b
        for a, b in zip(some, others, strict=True)
    )


def _marks(tensors: Iterable[Tensor], version: bool) -> Marks:
    """Identity, memory and, if asked for, the number of edits of each tensor."""
    return [
        (id(each), each.data_ptr(), each._version if version and not each.is_inference() else 0)
        for each in tensors
    ]


def _same_device(one: torch.device, other: torch.device) -> bool:
    return one.type == other.type and (one.index or 0) == (other.index or 0)


def _path(own: nn.Module, module: nn.Module) -> str:
    paths = {id(each): name for name, each in own.named_modules()}
    return repr(paths.get(id(module)) or type(module).__name__)
