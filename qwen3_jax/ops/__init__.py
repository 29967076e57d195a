"""Pure functions on arrays: the mathematics of the model, without parameters or state."""
