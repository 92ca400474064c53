"""Windows of a machine with a GPU: pipeline.py's graph, node by node on one stream a lane."""
