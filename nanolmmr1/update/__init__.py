"""The update: from sampled groups to one optimizer step.

The room imports model/, parallel/ and kernels/; it knows nothing of sampling, files or phases.
Begin with objective.py, the loss; pack.py lays tokens out, policy.py runs forward and backward.
"""
