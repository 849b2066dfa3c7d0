"""What a recipe will cost, from its numbers alone: phases in memory and FLOPs, stages in hours."""
