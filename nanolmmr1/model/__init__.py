"""The model: Qwen2.5-VL on packed sequences, and Hugging Face folders as its source.

The room imports kernels/ and errors.py; it knows nothing of ranks, losses or recipes.
Begin with qwen.py; weights.py reads config.json and safetensors.
"""
