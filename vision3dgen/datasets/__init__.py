"""Data: made (`PREPARE`), read (`DATASETS`), augmented, preprocessed, joined into batches (`collate`), mixed."""

from collections.abc import Callable
from typing import Any

from vision3dgen.datasets.augment import AUGMENTATIONS as AUGMENTATIONS
from vision3dgen.datasets.augment import Augment as Augment
from vision3dgen.datasets.augment import Augmented as Augmented
from vision3dgen.datasets.augment import DropInvisible as DropInvisible
from vision3dgen.datasets.camera_files import load_cameras as load_cameras
from vision3dgen.datasets.captions import CaptionedObject as CaptionedObject
from vision3dgen.datasets.captions import Captions as Captions
from vision3dgen.datasets.coco import COCODetection as COCODetection
from vision3dgen.datasets.coco import COCOPanoptic as COCOPanoptic
from vision3dgen.datasets.collate import collate as collate
from vision3dgen.datasets.damage import DAMAGES as DAMAGES
from vision3dgen.datasets.damage import damage as damage
from vision3dgen.datasets.depth import KITTIDepth as KITTIDepth
from vision3dgen.datasets.depth import NYUDepth as NYUDepth
from vision3dgen.datasets.depth import NYUDepthScenes as NYUDepthScenes
from vision3dgen.datasets.images import CIFAR10 as CIFAR10
from vision3dgen.datasets.images import CIFAR100 as CIFAR100
from vision3dgen.datasets.images import MNIST as MNIST
from vision3dgen.datasets.images import Classification as Classification
from vision3dgen.datasets.images import FashionMNIST as FashionMNIST
from vision3dgen.datasets.images import ImageFolder as ImageFolder
from vision3dgen.datasets.images import ImageList as ImageList
from vision3dgen.datasets.images import read_idx as read_idx
from vision3dgen.datasets.images import resize_crop as resize_crop
from vision3dgen.datasets.instances import SceneInstances as SceneInstances
from vision3dgen.datasets.layouts import LAYOUTS as LAYOUTS
from vision3dgen.datasets.layouts import Layout as Layout
from vision3dgen.datasets.layouts import find_layout as find_layout
from vision3dgen.datasets.layouts import open_layout as open_layout
from vision3dgen.datasets.manifest import SplitManifest as SplitManifest
from vision3dgen.datasets.mixing import MIXINGS as MIXINGS
from vision3dgen.datasets.mixing import CutMix as CutMix
from vision3dgen.datasets.mixing import Cutout as Cutout
from vision3dgen.datasets.mixing import Mixed as Mixed
from vision3dgen.datasets.mixing import Mixup as Mixup
from vision3dgen.datasets.mixing import OneOf as OneOf
from vision3dgen.datasets.objects import SceneObjects as SceneObjects
from vision3dgen.datasets.packing import Packing as Packing
from vision3dgen.datasets.packing import pack as pack
from vision3dgen.datasets.packing import unpack as unpack
from vision3dgen.datasets.pennfudan import PennFudan as PennFudan
from vision3dgen.datasets.photographs import Photographs as Photographs
from vision3dgen.datasets.pix3d import Pix3D as Pix3D
from vision3dgen.datasets.prepare import Prepared as Prepared
from vision3dgen.datasets.prepare import prepare_meshes as prepare_meshes
from vision3dgen.datasets.prepare import prepare_procedural as prepare_procedural
from vision3dgen.datasets.prepare import prepare_shapenet as prepare_shapenet
from vision3dgen.datasets.prepared import Limits as Limits
from vision3dgen.datasets.prepared import Settings as Settings
from vision3dgen.datasets.prepared import Watertight as Watertight
from vision3dgen.datasets.preprocess import PCA as PCA
from vision3dgen.datasets.preprocess import PREPROCESSING as PREPROCESSING
from vision3dgen.datasets.preprocess import Normalize as Normalize
from vision3dgen.datasets.preprocess import Whiten as Whiten
from vision3dgen.datasets.procedural import CATEGORIES as CATEGORIES
from vision3dgen.datasets.procedural import make_shape as make_shape
from vision3dgen.datasets.scenes import make_scene as make_scene
from vision3dgen.datasets.scenes import prepare_scenes as prepare_scenes
from vision3dgen.datasets.scenes import sentences as sentences
from vision3dgen.datasets.shapenet import InputCloud as InputCloud
from vision3dgen.datasets.shapenet import ShapeNet as ShapeNet
from vision3dgen.datasets.shapes import Shapes as Shapes
from vision3dgen.datasets.splits import choose_split as choose_split
from vision3dgen.datasets.splits import meshrcnn_split as meshrcnn_split
from vision3dgen.datasets.splits import onet_split as onet_split
from vision3dgen.datasets.splits import r2n2_split as r2n2_split
from vision3dgen.datasets.splits import random_split as random_split
from vision3dgen.datasets.store import Store as Store
from vision3dgen.datasets.store import write_store as write_store
from vision3dgen.datasets.voc import VOCDetection as VOCDetection
from vision3dgen.datasets.voc import VOCSegmentation as VOCSegmentation
from vision3dgen.datasets.vocabulary import TextLines as TextLines
from vision3dgen.datasets.vocabulary import Vocabulary as Vocabulary

DATASETS: dict[str, Callable[..., Any]] = {
    "shapenet": ShapeNet,
    "shapes": Shapes,
    "mnist": MNIST,
    "fashion_mnist": FashionMNIST,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "image_folder": ImageFolder,
    "image_list": ImageList,
    "captions": Captions,
    "scene_objects": SceneObjects,
    "scene_instances": SceneInstances,
    "text": TextLines,
    "nyu_depth": NYUDepth,
    "nyu_depth_scenes": NYUDepthScenes,
    "kitti_depth": KITTIDepth,
    "penn_fudan": PennFudan,
    "coco_detection": COCODetection,
    "coco_panoptic": COCOPanoptic,
    "voc_detection": VOCDetection,
    "voc_segmentation": VOCSegmentation,
    "pix3d": Pix3D,
}
PREPARE: dict[str, Callable[..., Any]] = {
    "procedural": prepare_procedural,
    "meshes": prepare_meshes,
    "scenes": prepare_scenes,
    "shapenet": prepare_shapenet,
}
