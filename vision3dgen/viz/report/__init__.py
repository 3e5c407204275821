"""One page of HTML about runs: what they were, how they trained, how they score, and what they predict."""

from vision3dgen.viz.report.comparison import Comparison as Comparison
from vision3dgen.viz.report.comparison import compare as compare
from vision3dgen.viz.report.page import write_page as write_page
from vision3dgen.viz.report.record import Evaluation as Evaluation
from vision3dgen.viz.report.record import Record as Record
from vision3dgen.viz.report.record import read_run as read_run
from vision3dgen.viz.report.record import read_runs as read_runs
