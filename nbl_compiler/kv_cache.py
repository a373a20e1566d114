"""``nbl.cache``: a KV cache whose linearized layers allocate (next to) nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from nbl_compiler.errors import ConfigError
from nbl_compiler.plans import Plan
from nbl_compiler.value_states import States, states_of

if TYPE_CHECKING:
    from transformers import Cache


def cache(
    model: nn.Module,
    plan: Plan,
    max_cache_len: int | None = None,
    implementation: Literal["static", "dynamic"] = "static",
) -> Cache:
    """Build a transformers cache for a model that runs a plan.

    Layers that the plan linearizes keep their length and nothing else, or, where their maps read
    value states, a few rows that do not grow; the others are ordinary.
    Run with this cache, the model must be compiled with the same plan: a linearized layer that
    runs dense after all raises ``CacheMismatchError`` rather than attending to nothing.

    Args:
        model: The calibrated decoder (or the module ``torch.compile`` made of it).
        plan: The plan it is compiled with.
        max_cache_len: Number of positions of a static cache.
        implementation: ``"static"`` (``StaticCache``) or ``"dynamic"`` (``DynamicCache``).

    Returns:
        A ``transformers.Cache``; hand it to the model or to ``generate`` as ``past_key_values``.

    Raises:
        ConfigError: for an encoder, an encoder-decoder, an unknown implementation, or a static
            cache without ``max_cache_len``.
    """
    from transformers import DynamicCache, StaticCache

    from nbl_compiler.cache_layers import length_only

    config = getattr(model, "config", None)
    if config is None or getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            "nbl.cache serves decoder-only transformers models; use an ordinary cache"
        )
    if implementation == "static":
        if max_cache_len is None:
            raise ConfigError("nbl.cache: a static cache needs max_cache_len=<number of positions>")
        built: Cache = StaticCache(config=config, max_cache_len=max_cache_len)
    elif implementation == "dynamic":
        built = DynamicCache(config=config)
    else:
        raise ConfigError(
            f"nbl.cache: implementation={implementation!r}: give 'static' or 'dynamic'"
        )
    for index, states in linearized_layers(model, plan).items():
        built.layers[index] = length_only(built.layers[index], states)
    return built


def linearized_layers(model: nn.Module, plan: Plan) -> dict[int, States]:
    """Return the cache layers of the sites that the plan linearizes, with their value states.

    Raises:
        ConfigError: if a site of the plan is not an attention module of the model.
    """
    modules = dict(model.named_modules())
    layers: dict[int, States] = {}
    for site in plan.rewritten:
        if site.kind != "attention":
            continue
        paths = [p for p in modules if p == site.name or p.endswith("." + site.name)]
        paths = paths or [p for p in modules if p and site.name.endswith("." + p)]
        index = getattr(modules[paths[0]], "layer_idx", None) if paths else None
        if index is None:
            raise ConfigError(
                f"nbl.cache: {site.name} is no attention module with a cache layer in this model; "
                "was the plan made for it?"
            )
        layers[int(index)] = states_of(site.details)
    return dict(sorted(layers.items()))


def cache_bytes(cache: Cache) -> int:
    """Return the bytes of memory that a cache's keys and values really occupy."""
    storages = {}
    for layer in cache.layers:
        own = getattr(layer, "state_tensors", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None), *own):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
