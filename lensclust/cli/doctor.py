"""Diagnosis of a machine and a model by running small tests."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lensclust.activations import rectangle
from lensclust.errors import InputError
from lensclust.inference.prefix_sharing import summary
from lensclust.models import KINDS, PINS, blocks_of, cache_folder, described, resolve
from lensclust.runs import machine

EXTRAS = {"peft": "peft", "ray": "ray", "umap": "umap"}
# The prompts on which an estimate is based.
_ROWS, _LENGTH = 4, 64
EDITS = {
    "residual stream": "blocks.{}.hook_resid_post",
    "head outputs": "blocks.{}.attn.hook_z",
    "attention output": "blocks.{}.hook_attn_out",
    "MLP output": "blocks.{}.hook_mlp_out",
    "attention pattern": "blocks.{}.attn.hook_pattern",
}


def examine(source: Any = None) -> dict[str, str]:
    """Versions and devices; with a model, its sites, which edits take effect, and prefixes.

    Args:
        source: anything `lensclust.load` takes, or None for the machine only.

    >>> report = examine("native:sif-small")
    >>> report["edit head outputs"], report["site resid_mid"]
    ('takes effect', 'yes')
    """
    found = machine()
    report = {name: str(number) for name, number in found["versions"].items()}
    report["machine"] = found["machine"]
    report["devices"] = ", ".join(_devices())
    report |= {f"extra {name}": _extra(module, name) for name, module in EXTRAS.items()}
    report |= _downloads()
    if source is None:
        return report
    from lensclust.models import load

    model = load(source)
    report["model"] = _shape(model)
    report |= {f"site {kind}": _try_site(model, kind) for kind in KINDS}
    report["shared prefixes"] = summary(model)
    report["cached generation"] = described(model)
    report |= {f"edit {name}": _try_edit(model, hook) for name, hook in EDITS.items()}
    report["gradients"] = _try_gradient(model)
    report["texts"] = "yes" if model.tokenizer is not None else "no tokenizer: token ids only"
    return report | _estimate(model)


def _extra(module: str, name: str) -> str:
    there = importlib.util.find_spec(module) is not None
    return "installed" if there else f"no: pip install 'lensclust[{name}]'"


def _downloads() -> dict[str, str]:
    """Which pinned downloads are cached, and the free space for others."""
    folder = cache_folder()
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(above).free / 1e9
    models = folder / "models"
    there = {name: (models / f"{name}-{pin.version}").exists() for name, pin in PINS.items()}
    return {
        "cache": f"{folder} ({free:.0f} GB free)",
        **{
            f"download {name}": "there" if found else "not yet: made when asked for"
            for name, found in there.items()
        },
    }


def _shape(model: TransformerBridge) -> str:
    """Number of blocks, and of heads per block; blocks without attention have none."""
    blocks = blocks_of(model)
    heads = sorted({block.heads for block in blocks if block.heads})
    without = sum(not block.heads for block in blocks)
    there = f"{' or '.join(map(str, heads))} heads" if heads else "no heads"
    return f"{model.cfg.model_name}: {len(blocks)} blocks, {there}" + (
        f" ({without} blocks without)" if heads and without else ""
    )


def _try_site(model: TransformerBridge, kind: str) -> str:
    """Whether this kind of site can be read, and in which blocks."""
    try:
        sites = resolve(model, kind)
    except InputError as error:
        return f"no: {error}"
    try:
        blocks = {site.layer for site in rectangle(model, sites)}
    except InputError as error:
        return f"in part: {error}"
    if len(blocks) >= len(blocks_of(model)):
        return "yes"
    return f"yes, in blocks {', '.join(map(str, sorted(blocks)))}"


def _some_tokens(model: TransformerBridge) -> torch.Tensor:
    return torch.arange(4, device=model.cfg.device)[None] % model.cfg.d_vocab


def _try_gradient(model: TransformerBridge) -> str:
    """Whether a gradient reaches the residual stream of block 0."""
    size = blocks_of(model)[0].d_model
    # Not the same everywhere: a norm takes a constant out again.
    nudge = torch.randn(size, generator=torch.Generator().manual_seed(0))
    nudge = nudge.to(model.cfg.device or "cpu").requires_grad_()
    hook = ("blocks.0.hook_resid_post", lambda value, hook: value + nudge.to(value))
    try:
        with torch.enable_grad():
            logits = model.run_with_hooks(_some_tokens(model), fwd_hooks=[hook])
            (slope,) = torch.autograd.grad(logits.float().square().mean(), nudge)
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0]}"
    reach = bool(slope.isfinite().all()) and bool(slope.any())
    return "reach the residual stream" if reach else "do not reach the residual stream"


@torch.no_grad()
def _estimate(model: TransformerBridge) -> dict[str, str]:
    """Estimated time and space for the residual streams of 1,000 prompts, from a few of them."""
    length = min(_LENGTH, model.cfg.n_ctx or _LENGTH)
    tokens = torch.arange(_ROWS * length, device=model.cfg.device).view(_ROWS, length)
    tokens = tokens % model.cfg.d_vocab
    model(tokens[:1])
    start = time.perf_counter()
    model(tokens)
    seconds = 1000 / _ROWS * (time.perf_counter() - start)
    blocks = blocks_of(model)
    room = 1000 * (len(blocks) + 1) * blocks[0].d_model * 4 / 1e6
    return {
        f"1,000 prompts of {length} tokens": f"about {seconds:.0f} s without shared prefixes; "
        f"{room:.0f} MB for one position of every layer"
    }


def _devices() -> list[str]:
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    mps = ["mps"] if torch.backends.mps.is_available() else []
    return [*cuda, *mps, f"cpu ({torch.get_num_threads()} threads)"]


@torch.no_grad()
def _try_edit(model: TransformerBridge, hook: str) -> str:
    """Whether zeroing this tensor, in the first block that has it, changes the logits."""
    there = [b for b in range(len(blocks_of(model))) if hook.format(b) in model.hook_dict]
    if not there:
        return "no such hook"
    fired: list[bool] = []

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(True)
        return torch.zeros_like(value)

    tokens = _some_tokens(model)
    run: Callable[..., torch.Tensor] = model.run_with_hooks
    changed = run(tokens, fwd_hooks=[(hook.format(there[0]), zero)])
    if not fired:
        return "the hook never fires"
    found = "takes effect" if not torch.allclose(changed, model(tokens)) else "has no effect"
    return found if there[0] == 0 else f"{found} (block {there[0]})"
