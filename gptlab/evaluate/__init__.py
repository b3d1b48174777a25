"""The door `evaluate`: what a trained network is worth, by its loss, its answers and its samples."""
