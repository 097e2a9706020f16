"""What we know of each DiT family. The only room with model names in it."""
