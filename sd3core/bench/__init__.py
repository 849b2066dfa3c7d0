"""Speed on this machine, against other libraries and the machine's own limit.

measure.py   interleaved timing, peak memory
model.py     MM-DiT against diffusers' SD3Transformer2DModel: training step and sampling
data.py      the loader against webdataset and boto3 that read the same tars
report.py    the figures as tables

Run by `sd3 bench model` and `sd3 bench data`; needs neither Ray nor Prefect nor DeepSpeed. (`sd3 bench encode` is
`workers.encode_bench`, which needs Ray.)
"""
