"""Ways to train, one idea a file: `build(model, setup) -> Training`, for a model that the caller gives up."""
