"""More than one machine, by Ray: training groups on the nodes of a cluster, and replicas of the server behind Ray Serve."""
