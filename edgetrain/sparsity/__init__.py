"""Weight sparsity while training: which weights exist, and when that changes.

A policy (``policy.py``) decides; a ``Topology`` carries it out for one learner. The engine below knows neither: it
reads ``SparseIndex`` arrays.
"""

from __future__ import annotations

from edgetrain.sparsity.dynamic import SET, RigL
from edgetrain.sparsity.layers import SparseLayer, sparse_layers
from edgetrain.sparsity.policy import SparsityPolicy
from edgetrain.sparsity.static import StaticSparse
from edgetrain.sparsity.swat import SWAT
from edgetrain.sparsity.topology import Topology

__all__ = ["SET", "SWAT", "RigL", "SparseLayer", "SparsityPolicy", "StaticSparse", "Topology", "sparse_layers"]
