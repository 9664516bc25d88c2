"""The models: masked autoencoder, gate, experts, customisation; no process groups, no files."""
