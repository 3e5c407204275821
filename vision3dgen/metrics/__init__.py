"""Protocols, scores of single predictions, and the evaluation of a run (`EVALUATIONS`)."""

from vision3dgen.metrics.depth import DEPTH_PROTOCOLS as DEPTH_PROTOCOLS
from vision3dgen.metrics.depth import DepthErrors as DepthErrors
from vision3dgen.metrics.depth import DepthEvaluator as DepthEvaluator
from vision3dgen.metrics.depth import DepthProtocol as DepthProtocol
from vision3dgen.metrics.depth import align_depth as align_depth
from vision3dgen.metrics.depth import depth_errors as depth_errors
from vision3dgen.metrics.detection import DetectionEvaluator as DetectionEvaluator
from vision3dgen.metrics.detection import DetectionScores as DetectionScores
from vision3dgen.metrics.detection import summarize_detections as summarize_detections
from vision3dgen.metrics.detection_protocols import DETECTION_PROTOCOLS as DETECTION_PROTOCOLS
from vision3dgen.metrics.detection_protocols import DetectionProtocol as DetectionProtocol
from vision3dgen.metrics.evaluation import evaluate as evaluate
from vision3dgen.metrics.evaluation import evaluate_distributed as evaluate_distributed
from vision3dgen.metrics.evaluator import Evaluator as Evaluator
from vision3dgen.metrics.evaluator import Scores as Scores
from vision3dgen.metrics.evaluator import ShapeEvaluator as ShapeEvaluator
from vision3dgen.metrics.generation import Features as Features
from vision3dgen.metrics.generation import GenerationEvaluator as GenerationEvaluator
from vision3dgen.metrics.generation import GenerationScores as GenerationScores
from vision3dgen.metrics.generation import InceptionScore as InceptionScore
from vision3dgen.metrics.generation import Kid as Kid
from vision3dgen.metrics.generation import Manifold as Manifold
from vision3dgen.metrics.generation import Moments as Moments
from vision3dgen.metrics.generation import Pair as Pair
from vision3dgen.metrics.generation import SetScores as SetScores
from vision3dgen.metrics.generation import fid as fid
from vision3dgen.metrics.generation import frechet_distance as frechet_distance
from vision3dgen.metrics.generation import inception_score as inception_score
from vision3dgen.metrics.generation import jensen_shannon as jensen_shannon
from vision3dgen.metrics.generation import kid as kid
from vision3dgen.metrics.generation import manifold as manifold
from vision3dgen.metrics.generation import moments as moments
from vision3dgen.metrics.generation import polynomial_mmd as polynomial_mmd
from vision3dgen.metrics.generation import quantize as quantize
from vision3dgen.metrics.generation import set_distances as set_distances
from vision3dgen.metrics.generation import set_scores as set_scores
from vision3dgen.metrics.language import Bleu as Bleu
from vision3dgen.metrics.language import Caption as Caption
from vision3dgen.metrics.language import CaptionEvaluator as CaptionEvaluator
from vision3dgen.metrics.language import CaptionScores as CaptionScores
from vision3dgen.metrics.language import Guesses as Guesses
from vision3dgen.metrics.language import LanguageEvaluator as LanguageEvaluator
from vision3dgen.metrics.language import LanguageScores as LanguageScores
from vision3dgen.metrics.language import Pointing as Pointing
from vision3dgen.metrics.language import bleu as bleu
from vision3dgen.metrics.language import perplexity as perplexity
from vision3dgen.metrics.language import pointing as pointing
from vision3dgen.metrics.likelihood import LikelihoodEvaluator as LikelihoodEvaluator
from vision3dgen.metrics.likelihood import LikelihoodScores as LikelihoodScores
from vision3dgen.metrics.likelihood import bits_per_dim as bits_per_dim
from vision3dgen.metrics.maps import MapEvaluator as MapEvaluator
from vision3dgen.metrics.maps import MapScores as MapScores
from vision3dgen.metrics.maps import summarize_maps as summarize_maps
from vision3dgen.metrics.normals import NormalErrors as NormalErrors
from vision3dgen.metrics.normals import NormalsEvaluator as NormalsEvaluator
from vision3dgen.metrics.normals import angles_between as angles_between
from vision3dgen.metrics.normals import normal_errors as normal_errors
from vision3dgen.metrics.overlap import ImageRecord as ImageRecord
from vision3dgen.metrics.overlap import Truths as Truths
from vision3dgen.metrics.overlap import record_of as record_of
from vision3dgen.metrics.panoptic import PanopticEvaluator as PanopticEvaluator
from vision3dgen.metrics.panoptic import PanopticScores as PanopticScores
from vision3dgen.metrics.panoptic import match_segments as match_segments
from vision3dgen.metrics.panoptic import panoptic_quality as panoptic_quality
from vision3dgen.metrics.panoptic import summarize_panoptic as summarize_panoptic
from vision3dgen.metrics.precision import AveragePrecision as AveragePrecision
from vision3dgen.metrics.precision import average_precision as average_precision
from vision3dgen.metrics.prediction import Prediction as Prediction
from vision3dgen.metrics.protocols import PROTOCOLS as PROTOCOLS
from vision3dgen.metrics.protocols import Protocol as Protocol
from vision3dgen.metrics.recognition import ClassEvaluator as ClassEvaluator
from vision3dgen.metrics.recognition import ClassScores as ClassScores
from vision3dgen.metrics.recognition import confusion_matrix as confusion_matrix
from vision3dgen.metrics.recognition import rank_of_label as rank_of_label
from vision3dgen.metrics.recognition import summarize_classes as summarize_classes
from vision3dgen.metrics.recognition import top_k_accuracy as top_k_accuracy
from vision3dgen.metrics.recognition import wilson as wilson
from vision3dgen.metrics.results import read_results as read_results
from vision3dgen.metrics.segmentation import SegmentationEvaluator as SegmentationEvaluator
from vision3dgen.metrics.segmentation import SegmentationScores as SegmentationScores
from vision3dgen.metrics.segmentation import segmentation_matrix as segmentation_matrix
from vision3dgen.metrics.segmentation import summarize_segmentation as summarize_segmentation
from vision3dgen.metrics.shape import ShapeScore as ShapeScore
from vision3dgen.metrics.shape import SurfaceDistances as SurfaceDistances
from vision3dgen.metrics.shape import chamfer as chamfer
from vision3dgen.metrics.shape import f_score as f_score
from vision3dgen.metrics.shape import normal_consistency as normal_consistency
from vision3dgen.metrics.shape import point_iou as point_iou
from vision3dgen.metrics.shape import score_shape as score_shape
from vision3dgen.metrics.shape import surface_distances as surface_distances
from vision3dgen.metrics.shape import voxel_iou as voxel_iou
from vision3dgen.metrics.shape_sets import SHAPE_DISTANCES as SHAPE_DISTANCES
from vision3dgen.metrics.shape_sets import Clouds as Clouds
from vision3dgen.metrics.shape_sets import ShapeSetEvaluator as ShapeSetEvaluator
from vision3dgen.metrics.shape_sets import ShapeSetScores as ShapeSetScores
from vision3dgen.metrics.shape_sets import compare_sets as compare_sets
from vision3dgen.metrics.summary import Summary as Summary
from vision3dgen.metrics.summary import summarize as summarize

EVALUATIONS: dict[str, type[Evaluator]] = {
    "shapes": ShapeEvaluator,
    "classes": ClassEvaluator,
    "captions": CaptionEvaluator,
    "generated_shapes": ShapeSetEvaluator,
    "generation": GenerationEvaluator,
    "language": LanguageEvaluator,
    "likelihood": LikelihoodEvaluator,
    "depth": DepthEvaluator,
    "normals": NormalsEvaluator,
    "detection": DetectionEvaluator,
    "segmentation": SegmentationEvaluator,
    "panoptic": PanopticEvaluator,
}
