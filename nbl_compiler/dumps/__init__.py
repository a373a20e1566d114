"""Graph dumps: what every pass did to every compiled graph, as files that can be run."""
