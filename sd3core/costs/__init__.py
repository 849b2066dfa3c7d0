"""What a recipe will cost, from its numbers alone.

Phases in memory and FLOPs, stages in hours.
"""
