"""What frozen policies say about the rollouts, written to a teacher cache."""
