"""What a plan does under load, in simulated time: the same scheduler, and the time model in place of stages."""
