"""A double of Kubernetes: its API server, and a control plane and nodes that run the containers as local processes."""
