"""Probes: what the activations of a model say about the task, each beside its control."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lensclust import own_packages

if TYPE_CHECKING:
    from probes.attention.label_words import LabelWordFlow, label_word_flow
    from probes.attention.ratio import AttentionRatio, attention_ratio
    from probes.attention.samples import AttentionSamples, sample_attention
    from probes.clustering.baselines import bag_of_tokens
    from probes.clustering.clustering import Clustering, cluster
    from probes.clustering.maps import ClusterMap, cluster_map
    from probes.clustering.nearest_clusters import membership
    from probes.components.calibration import calibrate, select_prompt
    from probes.components.component_logits import ComponentLogits
    from probes.components.decomposition import decompose
    from probes.components.reweighting import Reweighting, reweight, reweight_many
    from probes.design.centroids import mean_states
    from probes.heads.activation import HeadActivation, head_activation
    from probes.heads.composition import Composition, compose
    from probes.heads.pattern_changes import PatternChange, change
    from probes.heads.view import head_view
    from probes.linear.linear_probe import ProbeSweep, probe
    from probes.linear.paired_decoding import PairedDecoding, decode
    from probes.patching.attribution import AttributionCheck, rank
    from probes.patching.patching import Patching, patch
    from probes.similarity.dissimilarity import combined, hypothesis, with_nuisances
    from probes.similarity.kernel_alignment import CKA, cka
    from probes.similarity.neighbours import nearest_neighbour, silhouettes
    from probes.similarity.piecewise_fits import PiecewiseFit, change_points
    from probes.similarity.representational import RSA, rsa
    from probes.steering.directions import add_direction, project
    from probes.steering.erasure import erase, erase_random, erase_reassigned
    from probes.steering.function_vectors import FunctionVector, function_vector
    from probes.steering.interchanges import Interchange, interchange
    from probes.steering.interventions import Intervention, dealt, replace, shift, transport
    from probes.steering.linear_maps import linear_transport
    from probes.steering.steering import steer
    from probes.steering.tuning import Tuning, tune

# Name -> module. No module shares its name with what it exports.
_HOMES = {
    "AttentionRatio": "attention_ratios",
    "AttentionSamples": "attention_samples",
    "AttributionCheck": "attribution",
    "CKA": "kernel_alignment",
    "ClusterMap": "cluster_maps",
    "Clustering": "clustering",
    "ComponentLogits": "component_logits",
    "Composition": "pattern_composition",
    "FunctionVector": "function_vectors",
    "HeadActivation": "activation_patterns",
    "Interchange": "interchanges",
    "Intervention": "interventions",
    "LabelWordFlow": "label_word_flows",
    "PairedDecoding": "paired_decoding",
    "Patching": "patching",
    "PatternChange": "pattern_changes",
    "PiecewiseFit": "piecewise_fits",
    "ProbeSweep": "sweeps",
    "RSA": "rdm_sweeps",
    "Reweighting": "component_weights",
    "Tuning": "validation",
    "add_direction": "directions",
    "attention_ratio": "attention",
    "bag_of_tokens": "baselines",
    "calibrate": "calibration",
    "change": "pattern_changes",
    "change_points": "piecewise_fits",
    "cka": "kernel_alignment",
    "cluster": "clustering",
    "cluster_map": "cluster_maps",
    "combined": "rdms",
    "compose": "pattern_composition",
    "dealt": "interventions",
    "decode": "paired_decoding",
    "decompose": "components",
    "erase": "erasure",
    "erase_random": "erasure",
    "erase_reassigned": "erasure",
    "function_vector": "function_vectors",
    "head_activation": "head_activations",
    "head_view": "head_views",
    "hypothesis": "rdms",
    "interchange": "interchanges",
    "label_word_flow": "label_word_flows",
    "linear_transport": "linear_maps",
    "mean_states": "centroids",
    "membership": "nearest_clusters",
    "nearest_neighbour": "similarity",
    "patch": "patching",
    "probe": "linear",
    "project": "directions",
    "rank": "attribution",
    "replace": "interventions",
    "reweight": "reweighting",
    "reweight_many": "reweighting",
    "rsa": "rdm_alignment",
    "sample_attention": "attention_samples",
    "select_prompt": "calibration",
    "shift": "interventions",
    "silhouettes": "similarity",
    "steer": "steering",
    "transport": "interventions",
    "tune": "validation",
    "with_nuisances": "rdms",
}

__all__ = [
    "CKA",
    "RSA",
    "AttentionRatio",
    "AttentionSamples",
    "AttributionCheck",
    "ClusterMap",
    "Clustering",
    "ComponentLogits",
    "Composition",
    "FunctionVector",
    "HeadActivation",
    "Interchange",
    "Intervention",
    "LabelWordFlow",
    "PairedDecoding",
    "Patching",
    "PatternChange",
    "PiecewiseFit",
    "ProbeSweep",
    "Reweighting",
    "Tuning",
    "add_direction",
    "attention_ratio",
    "bag_of_tokens",
    "calibrate",
    "change",
    "change_points",
    "cka",
    "cluster",
    "cluster_map",
    "combined",
    "compose",
    "dealt",
    "decode",
    "decompose",
    "erase",
    "erase_random",
    "erase_reassigned",
    "function_vector",
    "head_activation",
    "head_view",
    "hypothesis",
    "interchange",
    "label_word_flow",
    "linear_transport",
    "mean_states",
    "membership",
    "nearest_neighbour",
    "patch",
    "probe",
    "project",
    "rank",
    "replace",
    "reweight",
    "reweight_many",
    "rsa",
    "sample_attention",
    "select_prompt",
    "shift",
    "silhouettes",
    "steer",
    "transport",
    "tune",
    "with_nuisances",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"probes.{_HOMES[name]}"), name)
    raise own_packages.missing("probes", name)


def __dir__() -> list[str]:
    return sorted(__all__)
