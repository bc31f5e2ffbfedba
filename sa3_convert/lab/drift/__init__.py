"""Whether a bundle still is what a kept baseline says."""
