"""Drawn, captioned scenes, and ShapesBench, which scores a model on them.

They stand in for a data set.

world.py         the colours, shapes, relations, counts and reserved combinations
scenes.py        draw_scene, render, describe
detector.py      detect: which shapes in which colours stand where in a picture
captioner.py     caption_from_pixels: the synthetic captioner
shapes_bench.py  prompts, verdicts, scores, chance levels
"""
