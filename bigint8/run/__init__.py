"""Running a pipeline: workers, what they say to each other, the driver."""
