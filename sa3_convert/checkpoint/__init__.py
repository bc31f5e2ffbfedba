"""Published checkpoints: what they hold, reading them, making seeded ones, downloading them."""
