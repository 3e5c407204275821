"""Training: one loop, optimizers and schedules by name, checkpoints, logs. Knows nothing of vision."""

from vision3dgen.engine.checkpoint import CheckpointError as CheckpointError
from vision3dgen.engine.checkpoint import best as best
from vision3dgen.engine.checkpoint import latest as latest
from vision3dgen.engine.checkpoint import load_fitting as load_fitting
from vision3dgen.engine.checkpoint import load_weights as load_weights
from vision3dgen.engine.loading import Data as Data
from vision3dgen.engine.loading import ShuffleSampler as ShuffleSampler
from vision3dgen.engine.loading import to_device as to_device
from vision3dgen.engine.log import read_metrics as read_metrics
from vision3dgen.engine.optim import EMA as EMA
from vision3dgen.engine.optim import OPTIMIZERS as OPTIMIZERS
from vision3dgen.engine.optim import SCHEDULES as SCHEDULES
from vision3dgen.engine.optim import Optimizer as Optimizer
from vision3dgen.engine.optim import Schedule as Schedule
from vision3dgen.engine.optim import lr_factor as lr_factor
from vision3dgen.engine.seeding import seed_all as seed_all
from vision3dgen.engine.settings import Record as Record
from vision3dgen.engine.settings import Update as Update
from vision3dgen.engine.settings import Validation as Validation
from vision3dgen.engine.trainer import Objective as Objective
from vision3dgen.engine.trainer import Result as Result
from vision3dgen.engine.trainer import Trainer as Trainer
from vision3dgen.engine.trainer import main_process_first as main_process_first
