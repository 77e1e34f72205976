"""What will work on this machine and with this model, tried rather than assumed."""

from __future__ import annotations

import importlib.util
import shutil
import time
from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lensclust.cached_generation import cached_generation
from lensclust.downloads import PINS, cache_folder
from lensclust.run_directory import machine
from lensclust.sharing import summary
from lensclust.sites import KINDS, additivity_error, first_site, heads_add_up, hook_name

EXTRAS = {"peft": "peft", "ray": "ray", "umap": "umap"}
# The prompts that an estimate is made from.
_ROWS, _LENGTH = 4, 64
EDITS = {
    "residual stream": "blocks.0.hook_resid_post",
    "head outputs": "blocks.0.attn.hook_z",
    "attention output": "blocks.0.hook_attn_out",
    "MLP output": "blocks.0.hook_mlp_out",
    "attention pattern": "blocks.0.attn.hook_pattern",
}


def examine(source: Any = None) -> dict[str, str]:
    """Versions and devices; with a model, its sites, which edits take effect, and prefixes.

    Args:
        source: anything `lensclust.load` takes, or None for the machine alone.

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
    error = additivity_error(model)
    report["model"] = (
        f"{model.cfg.model_name}: {model.cfg.n_layers} blocks, {model.cfg.n_heads} heads"
    )
    for kind in KINDS:
        present = hook_name(model, first_site(kind)) in model.hook_dict
        report[f"site {kind}"] = "yes" if present else "no"
    if not heads_add_up(error):
        report["site head"] = f"no: heads do not add up to the attention output (error {error:.2g})"
    report["shared prefixes"] = summary(model)
    report["cached generation"] = cached_generation(model).why
    report |= {f"edit {name}": _try_edit(model, hook) for name, hook in EDITS.items()}
    report["gradients"] = _try_gradient(model)
    report["texts"] = "yes" if model.tokenizer is not None else "no tokenizer: token ids only"
    return report | _estimate(model)


def _extra(module: str, name: str) -> str:
    there = importlib.util.find_spec(module) is not None
    return "installed" if there else f"no: pip install 'lensclust[{name}]'"


def _downloads() -> dict[str, str]:
    """Which pinned downloads are there already, and how much room there is for others."""
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


def _try_gradient(model: TransformerBridge) -> str:
    """Does a gradient reach the residual stream of block 0?"""
    nudge = torch.zeros(1, device=model.cfg.device, requires_grad=True)
    tokens = torch.arange(4, device=model.cfg.device)[None] % model.cfg.d_vocab
    hook = (EDITS["residual stream"], lambda value, hook: value + nudge.to(value.dtype))
    try:
        with torch.enable_grad():
            logits = model.run_with_hooks(tokens, fwd_hooks=[hook])
            (slope,) = torch.autograd.grad(logits.float().square().mean(), nudge)
    except RuntimeError as error:
        return f"no: {str(error).splitlines()[0]}"
    return "reach the residual stream" if float(slope) != 0 else "do not reach the residual stream"


@torch.no_grad()
def _estimate(model: TransformerBridge) -> dict[str, str]:
    """Time and room for the residual streams of 1,000 prompts, from a few of them."""
    length = min(_LENGTH, model.cfg.n_ctx or _LENGTH)
    tokens = torch.arange(_ROWS * length, device=model.cfg.device).view(_ROWS, length)
    tokens = tokens % model.cfg.d_vocab
    model(tokens[:1])
    start = time.perf_counter()
    model(tokens)
    seconds = 1000 / _ROWS * (time.perf_counter() - start)
    room = 1000 * (model.cfg.n_layers + 1) * model.cfg.d_model * 4 / 1e6
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
    """Does zeroing this tensor in block 0 change the logits?"""
    if hook not in model.hook_dict:
        return "no such hook"
    tokens = torch.arange(4, device=model.cfg.device)[None] % model.cfg.d_vocab
    fired: list[bool] = []

    def zero(value: torch.Tensor, hook: Any) -> torch.Tensor:
        fired.append(True)
        return torch.zeros_like(value)

    run: Callable[..., torch.Tensor] = model.run_with_hooks
    changed = run(tokens, fwd_hooks=[(hook, zero)])
    if not fired:
        return "the hook never fires"
    return "takes effect" if not torch.allclose(changed, model(tokens)) else "has no effect"
