"""Pictures, figures and windows."""

from vision3dgen.viz.gallery import curves as curves
from vision3dgen.viz.gallery import figure_of as figure_of
from vision3dgen.viz.gallery import gallery as gallery
from vision3dgen.viz.gallery import image_grid as image_grid
from vision3dgen.viz.gallery import reconstruction_gallery as reconstruction_gallery
from vision3dgen.viz.gallery import save_figure as save_figure
from vision3dgen.viz.gallery import threshold_curve as threshold_curve
from vision3dgen.viz.offscreen import OffscreenError as OffscreenError
from vision3dgen.viz.recognition import class_accuracy_figure as class_accuracy_figure
from vision3dgen.viz.recognition import class_templates as class_templates
from vision3dgen.viz.recognition import confusion_figure as confusion_figure
from vision3dgen.viz.recognition import mistakes as mistakes
from vision3dgen.viz.scene import PALETTE as PALETTE
from vision3dgen.viz.scene import TRUTH_COLOR as TRUTH_COLOR
from vision3dgen.viz.scene import Job as Job
from vision3dgen.viz.scene import Rendering as Rendering
from vision3dgen.viz.scene import Renderings as Renderings
from vision3dgen.viz.scene import Sample as Sample
from vision3dgen.viz.scene import Voxels as Voxels
from vision3dgen.viz.scene import fit_camera as fit_camera
from vision3dgen.viz.scene import render as render
from vision3dgen.viz.scene import render_many as render_many
from vision3dgen.viz.scene import turntable as turntable
from vision3dgen.viz.window import Shown as Shown
from vision3dgen.viz.window import show as show
