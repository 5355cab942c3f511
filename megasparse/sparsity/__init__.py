"""Methods of 2:4 training: when a mask changes, what the forward pass and the gradient see."""
