"""Blocks with parameters that know no task; only what torch itself does not have."""

from vision3dgen.layers.norm import ConditionalBatchNorm1d as ConditionalBatchNorm1d
