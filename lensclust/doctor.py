"""What will work on this machine and with this model, tried rather than assumed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformer_lens.model_bridge import TransformerBridge

from lensclust.run_directory import machine
from lensclust.sharing import trial
from lensclust.sites import KINDS, additivity_error, first_site, heads_add_up, hook_name

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
    why_not = trial(model)
    report["shared prefixes"] = "yes" if why_not is None else f"no: {why_not}"
    return report | {f"edit {name}": _try_edit(model, hook) for name, hook in EDITS.items()}


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
