"""A round: local training, release, aggregation, evaluation; handed its task, data and privacy plan."""
