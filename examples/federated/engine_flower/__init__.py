"""The engine's federated adapters carried by Flower; only this folder imports it."""
