"""Speed and memory of what is worth measuring, each checked before it is timed. `python -m bench` runs all."""
