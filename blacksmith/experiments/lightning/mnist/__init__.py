"""The same MNIST MLP inside Lightning's Trainer."""
