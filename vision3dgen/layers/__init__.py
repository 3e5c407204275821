"""Blocks with parameters that know no task; only what torch itself does not have, beside tables that name torch's."""

from collections.abc import Callable, Mapping

from torch import nn

from vision3dgen.layers.activations import ACTIVATIONS as ACTIVATIONS
from vision3dgen.layers.activations import GatedConvolution as GatedConvolution
from vision3dgen.layers.activations import GatedTanh as GatedTanh
from vision3dgen.layers.activations import Maxout as Maxout
from vision3dgen.layers.activations import activation as activation
from vision3dgen.layers.activations import gated_tanh as gated_tanh
from vision3dgen.layers.arithmetic import Reach as Reach
from vision3dgen.layers.arithmetic import ReceptiveField as ReceptiveField
from vision3dgen.layers.arithmetic import measure_receptive_field as measure_receptive_field
from vision3dgen.layers.arithmetic import receptive_field as receptive_field
from vision3dgen.layers.arithmetic import receptive_field_table as receptive_field_table
from vision3dgen.layers.arithmetic import unit_receptive_field as unit_receptive_field
from vision3dgen.layers.attention import ATTENTIONS as ATTENTIONS
from vision3dgen.layers.attention import KeyValueCache as KeyValueCache
from vision3dgen.layers.attention import LearnedPositions as LearnedPositions
from vision3dgen.layers.attention import MultiHeadAttention as MultiHeadAttention
from vision3dgen.layers.attention import SelfAttention2d as SelfAttention2d
from vision3dgen.layers.attention import SinusoidalPositions as SinusoidalPositions
from vision3dgen.layers.attention import TransformerBlock as TransformerBlock
from vision3dgen.layers.attention import TransformerDecoderBlock as TransformerDecoderBlock
from vision3dgen.layers.attention import attention_weights as attention_weights
from vision3dgen.layers.attention import causal_mask as causal_mask
from vision3dgen.layers.attention import padding_mask as padding_mask
from vision3dgen.layers.attention import sinusoidal_positions as sinusoidal_positions
from vision3dgen.layers.init import INITIALIZATIONS as INITIALIZATIONS
from vision3dgen.layers.init import Fans as Fans
from vision3dgen.layers.init import fans as fans
from vision3dgen.layers.init import initialize as initialize
from vision3dgen.layers.norm import NORMS as NORMS
from vision3dgen.layers.norm import ChannelLayerNorm as ChannelLayerNorm
from vision3dgen.layers.norm import ConditionalBatchNorm1d as ConditionalBatchNorm1d
from vision3dgen.layers.norm import ConditionalBatchNorm2d as ConditionalBatchNorm2d
from vision3dgen.layers.norm import FrozenBatchNorm2d as FrozenBatchNorm2d
from vision3dgen.layers.norm import add_spectral_norm as add_spectral_norm
from vision3dgen.layers.norm import freeze_batch_norm as freeze_batch_norm
from vision3dgen.layers.norm import norm as norm
from vision3dgen.layers.recurrent import GRU as GRU
from vision3dgen.layers.recurrent import LSTM as LSTM
from vision3dgen.layers.recurrent import RECURRENTS as RECURRENTS
from vision3dgen.layers.recurrent import RNN as RNN
from vision3dgen.layers.recurrent import ConvGRU as ConvGRU
from vision3dgen.layers.recurrent import ConvGRUCell as ConvGRUCell
from vision3dgen.layers.recurrent import GRUCell as GRUCell
from vision3dgen.layers.recurrent import LSTMCell as LSTMCell
from vision3dgen.layers.recurrent import LSTMState as LSTMState
from vision3dgen.layers.recurrent import RecurrentOutput as RecurrentOutput
from vision3dgen.layers.recurrent import RNNCell as RNNCell
from vision3dgen.layers.recurrent import truncated_bptt as truncated_bptt
from vision3dgen.layers.regularize import REGULARIZERS as REGULARIZERS
from vision3dgen.layers.regularize import DropBlock as DropBlock
from vision3dgen.layers.regularize import StochasticDepth as StochasticDepth
from vision3dgen.layers.residual import ResidualLinear as ResidualLinear
from vision3dgen.layers.unet import UNet as UNet
from vision3dgen.layers.unet import UNet3d as UNet3d
from vision3dgen.layers.upsample import UPSAMPLINGS as UPSAMPLINGS
from vision3dgen.layers.upsample import BedOfNails as BedOfNails
from vision3dgen.layers.upsample import Interpolation as Interpolation
from vision3dgen.layers.upsample import MaxUnpooling as MaxUnpooling
from vision3dgen.layers.upsample import TransposedConvolution as TransposedConvolution
from vision3dgen.layers.upsample import Upsampling as Upsampling
from vision3dgen.layers.upsample import bed_of_nails as bed_of_nails
from vision3dgen.layers.upsample import initialize_interpolation as initialize_interpolation
from vision3dgen.layers.upsample import upsampling as upsampling

LAYERS: Mapping[str, Mapping[str, Callable[..., nn.Module]]] = {
    "activation": ACTIVATIONS,
    "attention": ATTENTIONS,
    "norm": NORMS,
    "recurrent": RECURRENTS,
    "regularizer": REGULARIZERS,
    "upsampling": UPSAMPLINGS,
}
