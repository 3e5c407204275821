"""Hyper-parameter search. Ray is imported when a sweep runs, and not before."""

from vision3dgen.sweep.trials import Source as Source
from vision3dgen.sweep.trials import Sweep as Sweep
from vision3dgen.sweep.trials import Trial as Trial
from vision3dgen.sweep.trials import as_overrides as as_overrides
from vision3dgen.sweep.trials import draw as draw
from vision3dgen.sweep.trials import read_space as read_space
from vision3dgen.sweep.trials import table as table
