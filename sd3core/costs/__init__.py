"""What a recipe will cost, from its numbers alone.

Phases are counted in memory and FLOPs, stages in hours.
"""
