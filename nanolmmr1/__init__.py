"""nanoLMM-R1: reinforcement learning for small vision-language models, phase after phase."""
