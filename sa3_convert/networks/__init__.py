"""Export-friendly torch modules of the five components; parameter names equal checkpoint names."""
