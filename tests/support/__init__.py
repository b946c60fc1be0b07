"""Toys, configs, references and runs that several test modules share."""
