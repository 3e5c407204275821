"""Checks before a run: of the machine, of a data folder, of a configured experiment. Findings are data."""

from vision3dgen.doctor.environment import ENVIRONMENT_CHECKS as ENVIRONMENT_CHECKS
from vision3dgen.doctor.environment import examine_environment as examine_environment
from vision3dgen.doctor.fault import examine_fault as examine_fault
from vision3dgen.doctor.fault import is_fault as is_fault
from vision3dgen.doctor.finding import Finding as Finding
from vision3dgen.doctor.finding import is_sound as is_sound
from vision3dgen.doctor.finding import print_findings as print_findings
from vision3dgen.doctor.finding import write_findings as write_findings
from vision3dgen.doctor.folder import examine_folder as examine_folder
from vision3dgen.doctor.training import TRAINING_CHECKS as TRAINING_CHECKS
from vision3dgen.doctor.training import Subject as Subject
from vision3dgen.doctor.training import draw as draw
from vision3dgen.doctor.training import examine_experiment as examine_experiment
