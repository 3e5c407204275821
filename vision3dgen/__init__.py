"""3D and generative vision research on PyTorch; import the modules you need, this file pulls in nothing heavy."""

__version__ = "0.1.0"
