"""What happens around training: when it ends, what is saved, what is recorded, and what a person sees."""
