"""Neural networks: image encoders, text decoders and towers, and decoding."""
