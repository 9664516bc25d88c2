"""The mathematics: masked autoencoder, gate, experts, customisation. No process group, no file."""
