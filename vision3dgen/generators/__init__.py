"""Models that make data: each a family on layers and losses alone, with `loss`, `sample` and often `log_prob`."""

from torch import nn

from vision3dgen.generators.autoregressive import Autoregressive as Autoregressive
from vision3dgen.generators.imagegpt import ImageGPT as ImageGPT
from vision3dgen.generators.likelihoods import Categorical as Categorical
from vision3dgen.generators.likelihoods import Likelihood as Likelihood
from vision3dgen.generators.likelihoods import LogisticMixture as LogisticMixture
from vision3dgen.generators.masked import Cache as Cache
from vision3dgen.generators.masked import CausalConv2d as CausalConv2d
from vision3dgen.generators.pixelcnn import GatedPixelCNN as GatedPixelCNN
from vision3dgen.generators.pixelcnn import PixelCNN as PixelCNN
from vision3dgen.generators.pixelcnnpp import PixelCNNpp as PixelCNNpp
from vision3dgen.generators.pixelrnn import DiagonalBiLSTMPixelRNN as DiagonalBiLSTMPixelRNN
from vision3dgen.generators.pixelrnn import RowLSTMPixelRNN as RowLSTMPixelRNN
from vision3dgen.generators.pixelsnail import PixelSNAIL as PixelSNAIL
from vision3dgen.generators.sampling import sample as sample

GENERATORS: dict[str, type[nn.Module]] = {
    "diagonal_bilstm": DiagonalBiLSTMPixelRNN,
    "gated_pixelcnn": GatedPixelCNN,
    "imagegpt": ImageGPT,
    "pixelcnn": PixelCNN,
    "pixelcnnpp": PixelCNNpp,
    "pixelsnail": PixelSNAIL,
    "row_lstm": RowLSTMPixelRNN,
}
