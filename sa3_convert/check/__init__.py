"""How close a target model is to its reference."""
