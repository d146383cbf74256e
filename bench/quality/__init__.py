"""What merging does to accuracy: small models with adapters, merged in every way and measured."""
