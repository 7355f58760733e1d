"""disco-serve on Ray Serve: fronts that take requests in, replicas that answer them, one engine each."""
