"""Models that make data: each a family on layers and losses alone, with `loss`, `sample` and often `log_prob`."""

from torch import nn

from vision3dgen.generators.adversarial import ADVERSARIAL_LOSSES as ADVERSARIAL_LOSSES
from vision3dgen.generators.adversarial import R1 as R1
from vision3dgen.generators.adversarial import SLOPE_PENALTIES as SLOPE_PENALTIES
from vision3dgen.generators.adversarial import AdversarialLoss as AdversarialLoss
from vision3dgen.generators.adversarial import GradientPenalty as GradientPenalty
from vision3dgen.generators.adversarial import SlopePenalty as SlopePenalty
from vision3dgen.generators.adversarial import gradient_penalty as gradient_penalty
from vision3dgen.generators.adversarial import r1_penalty as r1_penalty
from vision3dgen.generators.autoencoder import CORRUPTIONS as CORRUPTIONS
from vision3dgen.generators.autoencoder import Autoencoder as Autoencoder
from vision3dgen.generators.autoencoder import Corruption as Corruption
from vision3dgen.generators.autoencoder import GaussianNoise as GaussianNoise
from vision3dgen.generators.autoencoder import MaskingNoise as MaskingNoise
from vision3dgen.generators.autoencoder import SaltAndPepper as SaltAndPepper
from vision3dgen.generators.autoregressive import Autoregressive as Autoregressive
from vision3dgen.generators.codes import PRIORS as PRIORS
from vision3dgen.generators.codes import CodePrior as CodePrior
from vision3dgen.generators.codes import LatentGAN as LatentGAN
from vision3dgen.generators.decoder_likelihoods import DECODER_LIKELIHOODS as DECODER_LIKELIHOODS
from vision3dgen.generators.decoder_likelihoods import Bernoulli as Bernoulli
from vision3dgen.generators.decoder_likelihoods import DecoderLikelihood as DecoderLikelihood
from vision3dgen.generators.decoder_likelihoods import DiscretizedLogistic as DiscretizedLogistic
from vision3dgen.generators.decoder_likelihoods import Gaussian as Gaussian
from vision3dgen.generators.decoder_likelihoods import binarize as binarize
from vision3dgen.generators.decoders import DECODERS as DECODERS
from vision3dgen.generators.decoders import MAP_DECODERS as MAP_DECODERS
from vision3dgen.generators.decoders import ConvolutionalDecoder as ConvolutionalDecoder
from vision3dgen.generators.decoders import Decoder as Decoder
from vision3dgen.generators.decoders import MapDecoder as MapDecoder
from vision3dgen.generators.decoders import MLPDecoder as MLPDecoder
from vision3dgen.generators.decoders import ResidualDecoder as ResidualDecoder
from vision3dgen.generators.diffaugment import DiffAugment as DiffAugment
from vision3dgen.generators.encoders import ENCODERS as ENCODERS
from vision3dgen.generators.encoders import MAP_ENCODERS as MAP_ENCODERS
from vision3dgen.generators.encoders import ConvolutionalEncoder as ConvolutionalEncoder
from vision3dgen.generators.encoders import Encoder as Encoder
from vision3dgen.generators.encoders import MapEncoder as MapEncoder
from vision3dgen.generators.encoders import MLPEncoder as MLPEncoder
from vision3dgen.generators.encoders import ResidualEncoder as ResidualEncoder
from vision3dgen.generators.gan import GAN as GAN
from vision3dgen.generators.gan_networks import DISCRIMINATOR_NETWORKS as DISCRIMINATOR_NETWORKS
from vision3dgen.generators.gan_networks import GENERATOR_NETWORKS as GENERATOR_NETWORKS
from vision3dgen.generators.gan_networks import DCGANDiscriminator as DCGANDiscriminator
from vision3dgen.generators.gan_networks import DCGANGenerator as DCGANGenerator
from vision3dgen.generators.gan_networks import DiscriminatorNetwork as DiscriminatorNetwork
from vision3dgen.generators.gan_networks import GeneratorNetwork as GeneratorNetwork
from vision3dgen.generators.gan_networks import MLPDiscriminator as MLPDiscriminator
from vision3dgen.generators.gan_networks import MLPGenerator as MLPGenerator
from vision3dgen.generators.gan_networks import ResNetDiscriminator as ResNetDiscriminator
from vision3dgen.generators.gan_networks import ResNetGenerator as ResNetGenerator
from vision3dgen.generators.gan_networks import VoxelDiscriminator as VoxelDiscriminator
from vision3dgen.generators.gan_networks import VoxelGenerator as VoxelGenerator
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
from vision3dgen.generators.rbm import RBM as RBM
from vision3dgen.generators.sampling import sample as sample
from vision3dgen.generators.shapes3d import OccupancyVAE as OccupancyVAE
from vision3dgen.generators.shapes3d import PointVAE as PointVAE
from vision3dgen.generators.vae import VAE as VAE
from vision3dgen.generators.vae import Elbo as Elbo
from vision3dgen.generators.vae import Posterior as Posterior
from vision3dgen.generators.vae import gaussian_kl as gaussian_kl
from vision3dgen.generators.vqvae import VQVAE as VQVAE
from vision3dgen.generators.vqvae import Quantized as Quantized
from vision3dgen.generators.vqvae import VectorQuantizer as VectorQuantizer
from vision3dgen.generators.vqvae import k_means as k_means

GENERATORS: dict[str, type[nn.Module]] = {
    "autoencoder": Autoencoder,
    "code_prior": CodePrior,
    "diagonal_bilstm": DiagonalBiLSTMPixelRNN,
    "gan": GAN,
    "gated_pixelcnn": GatedPixelCNN,
    "imagegpt": ImageGPT,
    "latent_gan": LatentGAN,
    "occupancy_vae": OccupancyVAE,
    "pixelcnn": PixelCNN,
    "pixelcnnpp": PixelCNNpp,
    "pixelsnail": PixelSNAIL,
    "point_vae": PointVAE,
    "rbm": RBM,
    "row_lstm": RowLSTMPixelRNN,
    "vae": VAE,
    "vqvae": VQVAE,
}
