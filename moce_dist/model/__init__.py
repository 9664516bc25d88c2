"""The mathematics: masked autoencoder, gate, experts, customisation. No process groups, no files."""
