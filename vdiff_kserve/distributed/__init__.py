"""More than one engine, or more than one device: replicas, and ranks that share a model."""
