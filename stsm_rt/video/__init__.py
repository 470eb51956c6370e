"""Video in and out: sources, the crop that the network sees, sinks and the overlay."""
