"""Models for 28x28 classification sets such as MNIST."""
