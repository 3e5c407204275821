"""Assemblies of backbones and heads, classifiers, and the baselines they are held against."""

from collections.abc import Callable

from torch import nn

from vision3dgen.models.baselines import MeanDepth as MeanDepth
from vision3dgen.models.baselines import MeanShape as MeanShape
from vision3dgen.models.baselines import OracleNeighbor as OracleNeighbor
from vision3dgen.models.baselines import Retrieval as Retrieval
from vision3dgen.models.baselines import ShapeLibrary as ShapeLibrary
from vision3dgen.models.captioning import Captioner as Captioner
from vision3dgen.models.completion import Completion as Completion
from vision3dgen.models.decoders import DECODERS as DECODERS
from vision3dgen.models.decoders import AttentionDecoder as AttentionDecoder
from vision3dgen.models.decoders import RecurrentDecoder as RecurrentDecoder
from vision3dgen.models.decoders import SequenceDecoder as SequenceDecoder
from vision3dgen.models.decoders import TransformerDecoder as TransformerDecoder
from vision3dgen.models.language import MaskedLanguageModel as MaskedLanguageModel
from vision3dgen.models.multi_view import MultiView as MultiView
from vision3dgen.models.panoptic import PanopticFPN as PanopticFPN
from vision3dgen.models.panoptic import panoptic_fpn as panoptic_fpn
from vision3dgen.models.rcnn import RCNN as RCNN
from vision3dgen.models.rcnn import fast_rcnn as fast_rcnn
from vision3dgen.models.rcnn import faster_rcnn as faster_rcnn
from vision3dgen.models.rcnn import mask_rcnn as mask_rcnn
from vision3dgen.models.rcnn import mesh_rcnn as mesh_rcnn
from vision3dgen.models.rcnn import sliding_window as sliding_window
from vision3dgen.models.rcnn import slow_rcnn as slow_rcnn
from vision3dgen.models.recognition import Classifier as Classifier
from vision3dgen.models.recognition import FullyConnected as FullyConnected
from vision3dgen.models.recognition import LinearClassifier as LinearClassifier
from vision3dgen.models.recognition import NearestNeighbors as NearestNeighbors
from vision3dgen.models.recognition import Neighbors as Neighbors
from vision3dgen.models.recognition import Recognition as Recognition
from vision3dgen.models.reconstruction import IMAGENET_MEAN as IMAGENET_MEAN
from vision3dgen.models.reconstruction import IMAGENET_STD as IMAGENET_STD
from vision3dgen.models.reconstruction import Reconstruction as Reconstruction
from vision3dgen.models.resizing import Resizing as Resizing
from vision3dgen.models.search import beam_search as beam_search
from vision3dgen.models.segmentation import SemanticSegmentation as SemanticSegmentation
from vision3dgen.models.segmentation import fcn as fcn
from vision3dgen.models.segmentation import unet as unet
from vision3dgen.models.single_view import SingleView as SingleView

MODELS: dict[str, Callable[..., nn.Module]] = {
    "single_view": SingleView,
    "completion": Completion,
    "multi_view": MultiView,
    "linear_classifier": LinearClassifier,
    "fully_connected": FullyConnected,
    "classifier": Classifier,
    "captioning": Captioner,
    "masked_language": MaskedLanguageModel,
    "sliding_window": sliding_window,
    "slow_rcnn": slow_rcnn,
    "fast_rcnn": fast_rcnn,
    "faster_rcnn": faster_rcnn,
    "mask_rcnn": mask_rcnn,
    "mesh_rcnn": mesh_rcnn,
    "panoptic_fpn": panoptic_fpn,
    "fcn": fcn,
    "unet": unet,
}
