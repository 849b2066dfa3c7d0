"""Speed on this machine, against diffusers and the machine's own limit.

measure.py   interleaved timing, peak memory
model.py     MM-DiT against diffusers' SD3Transformer2DModel: training step and sampling
report.py    the figures as a table

Run by `sd3 bench model`; needs neither Ray nor Prefect nor DeepSpeed.
"""
