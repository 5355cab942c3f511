"""megasparse: pretrain sparse language models on megatron-core, DeepSpeed and Transformer Engine."""

__version__ = "0.1.0"
