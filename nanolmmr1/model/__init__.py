"""Qwen2.5-VL on packed sequences, and Hugging Face folders as its source.

The room imports kernels/ and errors.py; it knows nothing of losses or recipes, and only that a tensor may be sharded.
Begin with qwen.py; weights.py reads config.json and safetensors.
"""
