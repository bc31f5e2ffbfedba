"""Converting: stages, their cache, the plan, and the bundle at the end."""
